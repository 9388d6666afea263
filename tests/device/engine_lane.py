"""Engines of vLLM one after the other in one process, which imports and compiles once: what each answers, and where its start's time went.

A lane is a model, its prompts and a list of engines. Each engine's answers are written as soon as it has given them, so that a machine
whose time ends loses the last one only. `tests.device.serve_matrix` makes lanes and judges them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.device.serve_tokens import MEMORY, decode_logprobs, off_scale, prefill_logprobs, wake_from_level_1, wake_from_level_2
from tests.device.watch_converted import watch_converted
from tests.support.collector import settled_heap

COMMON: dict[str, Any] = {"dtype": "bfloat16", "max_num_batched_tokens": 256, "max_model_len": 1024, "max_num_seqs": 8, "seed": 0}
NEW_TOKENS = 32
SLOW_SECONDS = 1.0  # a silence of an engine's start that its time line names
EVEN = "(w[0-9][0-9][02468])+"  # a grammar: words of even ids only
END = 1  # the id of the token that ends an answer


@dataclass(frozen=True)
class Engine:
    """An engine to start, and what has to be seen of it."""

    name: str
    backend: str
    arguments: dict[str, Any] = field(default_factory=dict)
    scale_error: float = 1.0  # what our softmax scale is multiplied by: a planted fault
    is_alone: bool = False  # in a process of its own
    environment: dict[str, str] = field(default_factory=dict)  # of that process, or while the engine lives
    num_processes: int = 1  # in which our kernels have to run
    ranks: int = 1  # data-parallel ranks, a lane each; all but the first get one prompt and idle then
    graphs: str | None = None  # the CUDA graph mode that has to come out
    preempts: bool = False  # the KV cache is too small for all that runs
    drafts: bool = False  # tokens have to be drafted, some accepted and some rejected
    drafts_at_random: bool = False  # none may be accepted
    sinks: bool = False  # layers have attention sinks
    converts: bool = False  # steps have to bring K and V from FP8 to 16 bits once a call
    writes_fp8: bool = False  # the quantisation behind its layers is fused: our kernels have to write FP8
    dummies: bool = False  # batches that vLLM makes up for a data-parallel rank without work run before each question
    adapters: tuple[str, ...] = ()  # folders of LoRA adapters, for the prompts in turn, and none for each third


def answer(engine: Engine, model: str, prompts: list[list[int]], trace: Path) -> dict[str, Any]:
    """Start `engine` in this process, ask it, stop it; `wrong` says what was not as it has to be."""
    from vllm import LLM

    lines: list[tuple[float, str]] = []
    with set_environment({**engine.environment, "FA4_BACKEND_TRACE_FILE": str(trace)}), off_scale(engine.scale_error):
        with (
            settled_heap(),
            count_preemptions() as preempted,
            sinks_in_llama(engine.sinks),
            watch_log(lines),
            count_dummies() as dummies,
            watch_converted() as converted,
        ):
            begin = time.perf_counter()
            arguments = {**COMMON, **MEMORY, "disable_log_stats": not engine.drafts, **engine.arguments}
            llm = LLM(model, attention_backend=engine.backend, **arguments)
            started = time.perf_counter()
            try:
                result = ask(llm, engine, prompts)
                result["config"] = describe_config(llm)
            finally:
                asked = time.perf_counter()
                stop(llm)
                del llm
                gc.collect()
    result |= {
        "start_seconds": round(started - begin, 1),
        "ask_seconds": round(asked - started, 1),
        "stop_seconds": round(time.perf_counter() - asked, 1),
        "slow_parts": slow_parts(begin, lines),
        "preemptions": preempted[0],
        "dummy_batches": dummies[0],
        **converted,
        "rebuilds": next((text for _, text in lines if "cannot update draft decode metadata" in text), None),
        **kernels_in(trace),
    }
    return {**result, "wrong": faults(engine, result)}


def ask(llm: Any, engine: Engine, prompts: list[list[int]]) -> dict[str, Any]:
    """Greedy answers, log-probabilities, answers under a grammar; the same after each way of sleeping where the engine sleeps.

    A kind of request that fails is told under "failed_kinds", and what others answered is kept; without greedy answers there is nothing.
    """
    run_dummies(llm, engine)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    lora = adapters_in_turn(engine.adapters, len(prompts))
    outputs = generate(llm, inputs, lora)
    run_dummies(llm, engine)
    result: dict[str, Any] = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "text": ["" for _ in outputs],
        "first_logprob": [max(p.logprob for p in output.outputs[0].logprobs[0].values()) for output in outputs],
        "cached_tokens": [output.num_cached_tokens or 0 for output in outputs],
        "prefill_logprobs": [],
        "decode_logprobs": [],
        "structured": [],
        "failed_kinds": {},
    }
    kinds: dict[str, Callable[[], Any]] = {
        "decode_logprobs": lambda: decode_logprobs(llm, inputs, lora),
    }
    if engine.ranks == 1:
        # vLLM waits for a grammar beside its steps: a rank that waits runs no batch, not even a dummy one, and the others hang.
        kinds["structured"] = lambda: [list(output.outputs[0].token_ids) for output in generate(llm, inputs[:4], lora[:4], EVEN)]
    if "speculative_config" not in engine.arguments:
        kinds["prefill_logprobs"] = lambda: prefill_logprobs(llm, inputs, lora)
    if engine.drafts:
        kinds["acceptance"] = lambda: acceptance(llm)
    if engine.arguments.get("enable_sleep_mode"):
        kinds["other_after"] = lambda: sleep(llm, inputs, lora, result["tokens"])
    for kind, run in kinds.items():
        try:
            result[kind] = run()
        except Exception as error:
            traceback.print_exc()
            result["failed_kinds"][kind] = f"{type(error).__name__}: {error}"[-300:]
    return result


def sleep(llm: Any, inputs: list[Any], lora: list[Any], tokens: list[list[int]]) -> list[str]:
    """Ways of sleeping after which the answers are others."""
    others = []
    for wake in (wake_from_level_1, wake_from_level_2):
        wake(llm)
        if [list(output.outputs[0].token_ids) for output in generate(llm, inputs, lora)] != tokens:
            others.append(wake.__name__)
    return others


def run_dummies(llm: Any, engine: Engine) -> None:
    """What a data-parallel rank without requests does while others work."""
    for _ in range(3 * engine.dummies):
        llm.llm_engine.engine_core.engine_core.execute_dummy_batch()


def generate(llm: Any, inputs: list[Any], lora: list[Any], regex: str | None = None) -> list[Any]:
    """Greedy answers of NEW_TOKENS tokens; under a grammar as many or less."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    grammar = None if regex is None else StructuredOutputsParams(regex=regex)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1, ignore_eos=grammar is None, structured_outputs=grammar)
    return llm.generate(inputs, sampling, use_tqdm=False, **({"lora_request": lora} if any(lora) else {}))


def adapters_in_turn(folders: tuple[str, ...], count: int) -> list[Any]:
    """A LoRA request or none for each of `count` prompts."""
    if not folders:
        return [None] * count
    from vllm.lora.request import LoRARequest

    turns = [*(LoRARequest(Path(folder).name, index, folder) for index, folder in enumerate(folders, 1)), None]
    return [turns[index % len(turns)] for index in range(count)]


def acceptance(llm: Any) -> dict[str, int]:
    """Drafted and accepted tokens so far."""
    prefix = "vllm:spec_decode_num_"
    counters = [metric for metric in llm.get_metrics() if metric.name.startswith(prefix) and hasattr(metric, "value")]
    return {metric.name.removeprefix(prefix): int(metric.value) for metric in counters}


def describe_config(llm: Any) -> dict[str, Any]:
    """What the engine made of its arguments."""
    config = llm.llm_engine.vllm_config
    return {
        "mode": getattr(config.compilation_config.mode, "name", None),
        "graphs": config.compilation_config.cudagraph_mode.name,
        "is_async": bool(config.scheduler_config.async_scheduling),
        "second_runner": bool(config.use_v2_model_runner),
    }


def faults(engine: Engine, result: dict[str, Any]) -> list[str]:
    """What a run has to show besides numbers."""
    wrong = []
    if engine.backend == "FA4" and len(result["pids"]) != engine.num_processes:
        wrong.append(f"our kernels ran in processes {result['pids']}, expected {engine.num_processes} of them")
    if engine.environment.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "1" and os.getpid() in result["pids"]:
        wrong.append("our kernels ran in the process that asks")
    if engine.graphs and result["config"]["graphs"] != engine.graphs:
        wrong.append(f"CUDA graphs: expected {engine.graphs}, got {result['config']['graphs']}")
    if "async_scheduling" in engine.arguments and result["config"]["is_async"] != engine.arguments["async_scheduling"]:
        wrong.append(f"async scheduling: expected {engine.arguments['async_scheduling']}")
    if engine.writes_fp8 and not any("(out float8_e4m3fn)" in kernel for kernel in result["kernels"]):
        wrong.append(f"expected kernels that write FP8, got {result['kernels']}")
    if engine.converts and not result["converted_steps"]:
        wrong.append("no step converted K and V once a call")
    if late := result.get("late_bytes"):
        wrong.append(f"room for converted K and V: expected all of it before vLLM sized its cache, got {late} bytes with a plan")
    if engine.preempts and not result["preemptions"]:
        wrong.append("no request was preempted")
    is_caching = engine.arguments.get("enable_prefix_caching", True)
    if is_caching != any(result["cached_tokens"]) and not engine.preempts:
        wrong.append(f"prefix caching is {'on' if is_caching else 'off'}, cached tokens are {result['cached_tokens']}")
    if result.get("other_after"):
        wrong.append(f"other tokens after {result['other_after']}")
    wrong += [f"{kind} failed: {words}" for kind, words in result["failed_kinds"].items()]
    structured = [[token for token in tokens if token != END] for tokens in result["structured"]]
    if "structured" not in result["failed_kinds"] and engine.ranks == 1:
        if any(token % 2 for tokens in structured for token in tokens) or not any(len(tokens) > 4 for tokens in structured):
            wrong.append(f"under a grammar of even tokens: {structured}")
    if engine.drafts:
        seen = result.get("acceptance", {})
        drafted, accepted = seen.get("draft_tokens", 0), seen.get("accepted_tokens", 0)
        if not 0 <= accepted < drafted or (accepted == 0 and not engine.drafts_at_random):
            wrong.append(f"expected drafts of both fates, got {seen}")
        if result["rebuilds"]:
            wrong.append(result["rebuilds"])
    return wrong


def kernels_in(trace: Path) -> dict[str, Any]:
    """Our kernels that ran, and the processes they ran in."""
    lines = [line.split(" ", 1) for line in trace.read_text().splitlines()] if trace.exists() else []
    return {"kernels": sorted({kernel for _, kernel in lines}), "pids": sorted({int(pid) for pid, _ in lines})}


def stop(llm: Any) -> None:
    """End an engine and what it keeps of the process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


@contextmanager
def set_environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables, and put back what was."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def count_preemptions() -> Iterator[list[int]]:
    """One number, which grows with each request that this process's scheduler puts back."""
    from vllm.v1.core.sched.scheduler import Scheduler

    count, preempt = [0], Scheduler._preempt_request

    def counted(*arguments: Any, **more: Any) -> Any:
        count[0] += 1
        return preempt(*arguments, **more)

    Scheduler._preempt_request = counted
    try:
        yield count
    finally:
        Scheduler._preempt_request = preempt


@contextmanager
def count_dummies() -> Iterator[list[int]]:
    """One number, which grows with each batch that vLLM makes up for an engine without work."""
    from vllm.v1.engine.core import EngineCore

    count, execute = [0], EngineCore.execute_dummy_batch

    def counted(core: Any) -> Any:
        count[0] += 1
        return execute(core)

    EngineCore.execute_dummy_batch = counted
    try:
        yield count
    finally:
        EngineCore.execute_dummy_batch = execute


@contextmanager
def sinks_in_llama(is_wanted: bool) -> Iterator[None]:
    """Give every attention layer of a Llama sinks, as gpt-oss has them; the same in every engine."""
    if not is_wanted:
        yield
        return
    import torch
    from vllm.model_executor.models import llama

    plain = llama.Attention

    def with_sinks(num_heads: int, *arguments: Any, prefix: str, **more: Any) -> Any:
        drawn = torch.randn(num_heads, generator=torch.Generator("cpu").manual_seed(len(prefix)), device="cpu", dtype=torch.float32)
        parameter = torch.nn.Parameter((2 * drawn).to(torch.get_default_dtype()).to(torch.get_default_device()), requires_grad=False)
        return plain(num_heads, *arguments, prefix=prefix, sinks=parameter, **more)

    llama.Attention = with_sinks
    try:
        yield
    finally:
        llama.Attention = plain


@contextmanager
def watch_log(lines: list[tuple[float, str]]) -> Iterator[None]:
    """Note when vLLM says what."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append((time.perf_counter(), record.getMessage().splitlines()[0][:90] if record.getMessage() else ""))

    notes, logger = Notes(), logging.getLogger("vllm")
    logger.addHandler(notes)
    try:
        yield
    finally:
        logger.removeHandler(notes)


def slow_parts(begin: float, lines: list[tuple[float, str]]) -> list[str]:
    """The silences of an engine's log, each with what was said after it."""
    times = [begin, *(when for when, _ in lines)]
    parts = [(when - before, text) for before, (when, text) in zip(times, lines, strict=False)]
    return [f"{seconds:.1f} s until '{text}'" for seconds, text in parts if seconds >= SLOW_SECONDS]


def main() -> None:
    """Run a lane: read its request, write a line of JSON an engine. A data-parallel rank above 0 writes its answers apart."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--request", type=Path, required=True)
    folder = parser.parse_args().request.parent
    request = json.loads((folder / "request.json").read_text())
    rank = int(os.environ.get("VLLM_DP_RANK", 0))
    prompts = request["prompts"][:1] if rank else request["prompts"]
    begin = time.perf_counter()
    stand_in_for_missing_packages()
    import vllm  # noqa: F401  its import has a line of the time line of its own

    print(f"lane {folder.name}: {time.perf_counter() - begin:.1f} s to import vLLM", flush=True)
    if "VLLM_DP_RANK" in os.environ:
        call_models_mixtures()
    for index, description in enumerate(request["engines"]):
        engine = Engine(**{**description, "adapters": tuple(description["adapters"])})
        try:
            result = answer(engine, request["model"], prompts, folder / f"trace{index}")
        except BaseException as error:
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {error}"[-1500:]}
        with (folder / answers_name(rank)).open("a") as file:
            file.write(json.dumps({"name": engine.name, **result}) + "\n")
        gc.collect()


def answers_name(rank: int) -> str:
    """The file of a rank's answers."""
    return f"answers{rank or ''}.jsonl"


def call_models_mixtures() -> None:
    """vLLM 0.33 keeps data-parallel ranks in step, an idle one by dummy batches, for mixtures of experts alone; what attention sees of it
    is the same for a dense model, which then has to say that it is one."""
    from vllm.config import ModelConfig

    ModelConfig.is_moe = property(lambda config: True)


def stand_in_for_missing_packages() -> None:
    """vLLM 0.33 looks up a class of lm-format-enforcer at the first request with a grammar, whichever package serves it."""
    name = "lmformatenforcer"
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].TokenEnforcer = object  # type: ignore[attr-defined]


def run_process(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> bool:
    """Run a command in a group of its own; False if it had to be ended after `seconds`. Its log then ends with where each thread stood."""
    everything = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **environment}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=everything, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)
            time.sleep(2)
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_request(folder: Path, model: Path, engines: list[Engine], prompts: list[list[int]]) -> Path:
    """The request of a lane, in a folder of its own."""
    folder.mkdir(parents=True)
    request = {"model": str(model), "engines": [asdict(engine) for engine in engines], "prompts": prompts}
    path = folder / "request.json"
    path.write_text(json.dumps(request))
    return path


if __name__ == "__main__":
    main()
