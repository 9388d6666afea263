"""vLLM on a GPU as people run it, FA4 beside FLASH_ATTN: compile modes, CUDA graphs, async scheduling, prefix caching, preemption,
sleep, LoRA, structured output, soft cap and windows, sinks, drafts.

    python -m tests.device.serve_matrix --out matrix.json [--groups llama,sinks] [--side-by-side 4]

Every engine of a group is compared with the group's FLASH_ATTN, on a small random model, by the root mean square over log-probabilities of
prompts' tokens (prefill) and of tokens that each engine is made to generate (decode). TRITON_ATTN's distance is the yardstick, which FA4
must keep and a softmax scale that is 5% off must not. What else an engine has to show stands in `engine_lane.Engine`.

The engines of a group are cut into lanes: one process each, one engine after the other. First our kernels are compiled and vLLM's imports
warmed, once for all lanes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from fa4_backend import AttentionProblem, BatchLimits, MaskFeatures, plan_attention
from fa4_backend.arch import arch_of_capability
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.problem import FP8, SAME_AS_Q
from tests.device.compiling import compile_lacking
from tests.device.engine_groups import DEFAULT_GROUPS, GROUPS, OFF, PEERS, Group, rehearsed
from tests.device.engine_lane import COMMON, Engine, answers_name, run_process, write_request
from tests.device.serve_options import serve_parser
from tests.device.serve_tokens import TOO_FAR, Suite, compare, judge
from tests.engines.prompts import make_prompts
from tests.engines.tiny_models import write_eagle, write_lora

METRICS = ("prefill_logprob_rms", "decode_logprob_rms")
ANSWERS = ("tokens", "text", "first_logprob", "prefill_logprobs", "decode_logprobs", "structured", "slow_parts")
APART = 5.0  # times the distance of two right engines, of which none is a hundredth of a wrong one's
# FlashInfer's and torch's all-reduce use NVLink multicast, which can put a host's GPUs out of service for others. The first also compiles
# at an engine's start, for longer than the rest of it takes.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1", "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_USE_NCCL_SYMM_MEM": "0",
}  # fmt: skip


def suite_of(groups: dict[str, Group]) -> Suite:
    """How `serve_tokens.judge` judges the groups."""
    names = {name: [engine.name for engine in group.engines] for name, group in groups.items()}
    return Suite({name: ("", {}) for name in PEERS}, names, METRICS, TOO_FAR, OFF, "FA4: ")


def lone_references(results: dict[str, Any]) -> list[str]:
    """Groups whose reference is far from both others, which are near each other: it is the one that is wrong, and proves nothing."""
    found = []
    for group in sorted({run.split(": ")[0] for run in results}):
        reference, yardstick, mine = (results.get(f"{group}: {name}", {"failed": "not there"}) for name in (*PEERS, "FA4"))
        if any("failed" in result for result in (reference, yardstick, mine)):
            continue
        theirs, between = compare(yardstick, reference), compare(mine, yardstick)
        apart = [part for part in METRICS if part in between and theirs[part] > APART * between[part]]
        found += [f"{group}: {PEERS[0]} is apart in {part}: {theirs[part]} from {PEERS[1]}, FA4 {between[part]}" for part in apart]
    return found


def place_models(engine: Engine, model: Path) -> Engine:
    """Paths in place of names: the drafter's model, and adapters."""
    arguments = dict(engine.arguments)
    if "model" in arguments.get("speculative_config", {}):
        of_drafter = arguments["speculative_config"]["model"]
        path = model if of_drafter == "MODEL" else model / "eagle"
        arguments["speculative_config"] = {**arguments["speculative_config"], "model": str(path)}
    adapters = tuple(str(model / f"adapter{index}") for index in (1, 2)) if "enable_lora" in arguments else ()
    return replace(engine, arguments=arguments, adapters=adapters)


def write_models(group: Group, folder: Path) -> Path:
    """The model of a group, with the EAGLE head and the adapters that its engines use."""
    model = group.write(folder)
    config = json.loads((model / "config.json").read_text())
    heads = (config["num_attention_heads"], config["num_key_value_heads"])
    if any("speculative_config" in engine.arguments for engine in group.engines):
        write_eagle(model / "eagle", heads)
    if any("enable_lora" in engine.arguments for engine in group.engines):
        for index in (1, 2):
            write_lora(model / f"adapter{index}", seed=index)
    return model


def lanes(groups: dict[str, Group], folder: Path, per_lane: int | None = None) -> list[tuple[str, Path]]:
    """(group, request) of each process: the reference and the yardstick; the group's other engines, `per_lane` at most; those alone in
    one of their own. Who dies takes its lane with it.

    Args:
        per_lane: None: as each group says.
    """
    found = []
    prompts = make_prompts()
    for name, group in groups.items():
        model = write_models(group, folder / name)
        engines = [place_models(engine, model) for engine in group.engines]
        together = [engine for engine in engines if not engine.is_alone and engine.name not in PEERS]
        size = per_lane or group.per_lane
        parts = [part] if (part := [engine for engine in engines if engine.name in PEERS]) else []
        parts += [together[i : i + size] for i in range(0, len(together), size)]
        parts += [[engine] for engine in engines if engine.is_alone]
        found += [(name, write_request(folder / f"lane-{name}-{index}", model, part, prompts)) for index, part in enumerate(parts)]
    return found


# vLLM inspects a model's class in a process of its own, and Python compiles modules at their first import: once for all lanes.
WARM = """
import json, sys
import vllm.v1.worker.gpu.model_runner, vllm.entrypoints.llm, vllm.v1.engine.llm_engine
from vllm.model_executor.models.registry import ModelRegistry
for architecture in json.loads(sys.argv[1]):
    ModelRegistry.models[architecture].inspect_model_cls()
"""


def warm_imports(groups: dict[str, Group], folder: Path) -> subprocess.Popen:
    """What every lane imports, imported by one process, which the caller waits for."""
    configs = [json.loads((folder / name / "config.json").read_text()) for name in groups]
    architectures = sorted({architecture for config in configs for architecture in config["architectures"]})
    log = (folder / "imports.log").open("w")
    return subprocess.Popen([sys.executable, "-c", WARM, json.dumps(architectures)], stdout=log, stderr=subprocess.STDOUT)


def keys_of(groups: dict[str, Group], folder: Path) -> list[Any]:
    """Compile keys of our kernels for all groups' models, as their engines ask for them."""
    keys: dict[Any, None] = {}
    for name, group in groups.items():
        config = json.loads((folder / name / "config.json").read_text())
        cap = MaskFeatures(has_softcap="attn_logit_softcapping" in config)
        masks = [replace(cap, has_sinks=any(engine.sinks for engine in group.engines))]
        if config.get("sliding_window"):
            masks.append(replace(cap, has_window_left=True))
        drafted = {engine.arguments.get("speculative_config", {}).get("num_speculative_tokens", 0) for engine in group.engines}
        # Which layers write FP8 is seen at their first call: both kernels are there then.
        outs = {SAME_AS_Q, *(FP8 for engine in group.engines if engine.writes_fp8)}
        heads, head_dim = (config["num_attention_heads"], config["num_key_value_heads"]), config["head_dim"]
        for mask, out_dtype, num_tokens in product(masks, outs, drafted):
            problem = AttentionProblem(
                *heads, head_dim, head_dim, "bfloat16", 16, arch(), mask=mask, out_dtype=out_dtype,
                sinks_dtype="bfloat16" if mask.has_sinks else "float32",
            )  # fmt: skip
            limits = BatchLimits(COMMON["max_num_seqs"], COMMON["max_num_batched_tokens"], COMMON["max_model_len"], 1 + num_tokens)
            keys |= dict.fromkeys(plan_attention(problem, limits).keys)
    return [*keys]


def arch() -> str:
    """The arch of the GPU present."""
    import torch

    found = arch_of_capability(*torch.cuda.get_device_capability())
    assert found is not None
    return found


def run_lane(request: Path, deadline: float) -> list[dict[str, Any]]:
    """One process; what its engines answered, and a failure in place of those that did not by `deadline` (of `time.monotonic`)."""
    seconds = max(0.0, round(deadline - time.monotonic(), 1))
    wanted = json.loads(request.read_text())["engines"]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", **NO_MULTICAST}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "4"  # of each of the lanes
    if len(wanted) == 1:  # it is alone: what it sets holds from the start
        environment |= wanted[0]["environment"]
    log, ranks = request.with_name("log"), wanted[0]["ranks"]
    command = [sys.executable, "-m", "tests.device.engine_lane", "--request", str(request)]
    is_done = run_process(of_ranks(command, ranks), environment, log, seconds)
    results, *others = (read_answers(request.with_name(answers_name(rank))) for rank in range(ranks))
    for index, result in enumerate(results):
        check_idle_ranks(result, [answers[index] if index < len(answers) else {"failed": "no answer"} for answers in others])
    words = ("" if is_done else f"not done within {seconds} s\n") + log.read_text(errors="replace")[-3500:]
    for result in results:
        if "failed" in result:
            result["failed"] += "\n" + words
    answered = {result["name"] for result in results}
    return results + [{"name": engine["name"], "failed": words} for engine in wanted if engine["name"] not in answered]


def of_ranks(command: list[str], ranks: int) -> list[str]:
    """A command that runs `command` as each of so many data-parallel ranks."""
    if ranks == 1:
        return command
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = f"VLLM_DP_SIZE={ranks} VLLM_DP_MASTER_IP=127.0.0.1 VLLM_DP_MASTER_PORT={port}"
    both = " & ".join(f"{common} VLLM_DP_RANK={rank} VLLM_DP_RANK_LOCAL={rank} {shlex.join(command)}" for rank in range(ranks))
    return ["bash", "-c", f"{both} & wait"]


def read_answers(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def check_idle_ranks(result: dict[str, Any], idle: list[dict[str, Any]]) -> None:
    """Note in the first rank's result how many dummy batches its idle ranks ran, and that one that failed or ran none is wrong."""
    for rank, other in enumerate(idle, 1):
        if "failed" in other:
            result.setdefault("wrong", []).append(f"rank {rank} failed: {other['failed'][-300:]}")
        elif not other["dummy_batches"]:
            result.setdefault("wrong", []).append(f"rank {rank} ran no dummy batch")
        result[f"dummy_batches_{rank}"] = other.get("dummy_batches")


def report(name: str, result: dict[str, Any]) -> None:
    """A line for an engine that answered with its time line, the last words of one that failed."""
    if "failed" in result:
        print(f"{name}: FAILED\n{result['failed']}", flush=True)
        return
    seen = {key: value for key, value in result.get("against_flash_attn", {}).items() if key.endswith("rms") or key == "equal"}
    times = "/".join(str(result[f"{part}_seconds"]) for part in ("start", "ask", "stop"))
    print(f"{name}: {seen}, start/ask/stop {times} s, {result['config']}, {result['kernels']}, pids {result['pids']}", flush=True)
    for what in ("preemptions", "acceptance", "dummy_batches_1", "wrong"):
        if result.get(what):
            print(f"    {what}: {result[what]}", flush=True)
    if result["slow_parts"]:
        print(f"    {'; '.join(result['slow_parts'])}", flush=True)


def run_lanes(requests: list[tuple[str, Path]], options: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """What all engines answered, "group: engine" -> result; reported and written as lanes end, in their order."""
    results: dict[str, Any] = {}
    with ThreadPoolExecutor(options.side_by_side) as pool:
        answered = pool.map(lambda lane: run_lane(lane[1], deadline), requests)
        for (group, request), answers in zip(requests, answered, strict=True):
            if options.logs:
                options.logs.mkdir(parents=True, exist_ok=True)
                (options.logs / f"{request.parent.name}.log").write_bytes(request.with_name("log").read_bytes())
            for answer in answers:
                run = f"{group}: {answer.pop('name')}"
                results[run] = answer
                measure(results, run)
                report(run, answer)
            # After each lane: a machine's time may end before the last one's.
            stamp = None if options.rehearse else gpu_stamp()
            if options.out:
                options.out.write_text(json.dumps({"stamp": stamp, "runs": without_answers(results)}, indent=1) + "\n")
            if options.logs:
                (options.logs / "answers.json").write_text(json.dumps({"stamp": stamp, "runs": results}))
    return results


def measure(results: dict[str, Any], run: str) -> None:
    """Put into a result how far it is from the reference and from the yardstick of its group."""
    result = results[run]
    for peer in PEERS:
        other = results.get(f"{run.split(': ')[0]}: {peer}", {"failed": "not there"})
        if "failed" not in result and "failed" not in other:
            result[f"against_{peer.lower()}"] = compare(result, other)


def without_answers(results: dict[str, Any]) -> dict[str, Any]:
    """What was seen of each run, short enough to be kept: without its answers."""
    return {run: {name: value for name, value in result.items() if name not in ANSWERS} for run, result in results.items()}


def chosen(options: argparse.Namespace) -> dict[str, Group]:
    """The groups and engines that the command line names."""
    groups = {name: GROUPS[name] for name in options.groups.split(",")}
    if options.engines:
        wanted = options.engines.split(";")
        groups = {name: replace(group, engines=tuple(e for e in group.engines if e.name in wanted)) for name, group in groups.items()}
    return {name: rehearsed(group) for name, group in groups.items()} if options.rehearse else groups


def main() -> int:
    """Run the groups, print a line an engine, write the JSON; 1 when an engine failed, was far away or did not show what it has to."""
    parser = serve_parser(__doc__, runs="lanes", side_by_side=10, seconds=180)
    parser.add_argument("--groups", default=",".join(DEFAULT_GROUPS), help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--engines", help="names of engines, a semicolon between them; default: all of the groups")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on vLLM's CPU build: see `rehearsed`")
    parser.add_argument("--per-lane", type=int, help="engines of a group in one process; default: as the group says")
    parser.add_argument("--compile-only", action="store_true", help="stop once our kernels are in the cache; needs no vLLM")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    groups = chosen(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requests = lanes(groups, folder, options.per_lane)
        imports = None if options.compile_only else warm_imports(groups, folder)
        if not options.rehearse:
            compile_lacking(keys_of(groups, folder))
        if imports is None:
            return 0
        begin = time.perf_counter()
        with suppress(subprocess.TimeoutExpired):  # lanes then import by themselves
            imports.wait(60)
        print(f"{time.perf_counter() - begin:.1f} s more until vLLM's imports were warm", flush=True)
        results = run_lanes(requests, options, deadline)
    failed = [f"{run} failed" for run, answer in results.items() if "failed" in answer]
    wrong = failed if options.rehearse else lone_references(results) + judge(results, suite_of(groups))
    wrong += [f"{run}: {fault}" for run, answer in results.items() for fault in answer.get("wrong", [])]
    print("\n".join(wrong) or "all as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
