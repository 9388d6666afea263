"""SGLang on a GPU with `--attention-backend fa4_plugin` beside its own `fa3` and `triton`: tokens, CUDA graphs, FP8, drafts.

    python -m tests.device.serve_sglang --out results.json [--models llama,wide_llama] [--only "fa3;triton;FA4"]

Each engine runs in a process of its own, with its scheduler in another, on small random models (`tests.engines.tiny_models`). Two right
kernels differ in the last bit of bfloat16 now and then, so what is judged is the root mean square of how far log-probabilities are from
those of `fa3`: of all tokens of all prompts (prefill), and of generated tokens as long as both engines generate the same ones (decode).
`triton`'s distance is the yardstick, which FA4 must keep and a softmax scale that is 5% off must not.

With K and V in FP8 all are compared with `fa3` on a 16-bit cache. The yardstick is `fa3` in FP8, which rounds queries and weights too: FA4
must be nearer, and must not be with a softmax scale that is 25% off.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fa4_backend.kernel_stamp import gpu_stamp
from tests.device.engine_lane import run_process
from tests.device.serve_options import serve_parser
from tests.engine_sglang.planted import ERROR, plant
from tests.engines.prompts import make_prompts
from tests.engines.tiny_models import write_gemma2, write_llama, write_wide_llama

NAME = "fa4_plugin"
NEW_TOKENS = 48
ENOUGH = 64  # decoded tokens to compare; fewer prove nothing
EAGER: dict[str, Any] = {"disable_cuda_graph": True}
# Decode steps replay whole graphs; a prompt's step replays pieces between which attention runs.
GRAPHS: dict[str, Any] = {"cuda_graph_bs_decode": [1, 2, 4, 8, 12], "cuda_graph_bs_prefill": [64, 256]}
WITHOUT_GPU: dict[str, Any] = {**EAGER, "device": "cpu", "disable_overlap_schedule": True}
FP8 = {"kv_cache_dtype": "fp8_e4m3"}
# A drafter that is the target itself: every draft is right, and each step verifies all of them.
DRAFTS = {
    "speculative_algorithm": "STANDALONE", "speculative_num_steps": 3, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4,
}  # fmt: skip


class Run(NamedTuple):
    """An engine to start."""

    backend: str
    arguments: dict[str, Any]
    is_off: bool = False  # with a wrong softmax scale, which must be noticed

    @property
    def is_ours(self) -> bool:
        return self.backend == NAME


RUNS: dict[str, Run] = {
    "fa3": Run("fa3", GRAPHS),
    "triton": Run("triton", GRAPHS),
    "FA4": Run(NAME, GRAPHS),
    "FA4, eager": Run(NAME, EAGER),
    "FA4, drafts": Run(NAME, {**GRAPHS, **DRAFTS}),
    "FA4, pages of 16": Run(NAME, {**GRAPHS, "page_size": 16}),
    "FA4, scale off": Run(NAME, GRAPHS, is_off=True),
    "fa3, FP8": Run("fa3", {**GRAPHS, **FP8}),
    "triton, FP8": Run("triton", {**GRAPHS, **FP8}),
    "FA4, FP8": Run(NAME, {**GRAPHS, **FP8}),
    "FA4, FP8, scale off": Run(NAME, {**GRAPHS, **FP8}, is_off=True),
}
PLAIN = ["fa3", "triton", "FA4", "FA4, scale off"]
WAYS = ["FA4, eager", "FA4, drafts", "FA4, pages of 16"]
RUNS_OF = {
    "llama": [*PLAIN, *WAYS],
    "wide_llama": [*PLAIN, *WAYS, "fa3, FP8", "triton, FP8", "FA4, FP8", "FA4, FP8, scale off"],
    "gemma2": PLAIN,
}
WRITE = {"llama": write_llama, "wide_llama": write_wide_llama, "gemma2": write_gemma2}
TOO_FAR = {"triton": 1.5, "fa3, FP8": 1.0}  # times the yardstick's distance
OFF = {"triton": 1.05, "fa3, FP8": 1.25}
# Its torch is older than SGLang's: the Rust radix tree reads another layout of tensors, and versions of the kernels' package differ.
OF_THE_BUNDLE = {"SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1", "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}
BATCH_LINE = re.compile(r"(Prefill|Decode) batch.*cuda graph: (True|False)")


def yardstick(run: str) -> str:
    """The run whose distance is a run's yardstick."""
    return "fa3, FP8" if "FP8" in run else "triton"


def answer(model: str, backend: str, arguments: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    """Start an engine and answer `prompts` greedily, twice: the second time from the radix cache. The engine is left running: its shutdown
    ends the process that calls it with a signal, and whoever started that ends its group."""
    import sglang

    if "speculative_algorithm" in arguments:
        arguments = {**arguments, "speculative_draft_model_path": model, "speculative_draft_attention_backend": backend}
    begin = time.perf_counter()
    engine = sglang.Engine(
        model_path=model, attention_backend=backend, dtype="bfloat16", skip_tokenizer_init=True, random_seed=0, sampling_backend="pytorch",
        context_length=1024, chunked_prefill_size=256, enable_mixed_chunk="speculative_algorithm" not in arguments, max_running_requests=12,
        max_total_tokens=16384, mem_fraction_static=0.5, decode_log_interval=1, log_level="info", **arguments,
    )  # fmt: skip
    started = time.perf_counter() - begin
    begin = time.perf_counter()
    greedy = {"temperature": 0, "ignore_eos": True}
    first = engine.generate(input_ids=prompts, sampling_params={**greedy, "max_new_tokens": 1}, return_logprob=True, logprob_start_len=0)
    generated = engine.generate(input_ids=prompts, sampling_params={**greedy, "max_new_tokens": NEW_TOKENS}, return_logprob=True)
    return {
        "tokens": [reply["output_ids"] for reply in generated],
        "prefill": [entry[0] for reply in first for entry in reply["meta_info"]["input_token_logprobs"] if entry[0] is not None],
        "decode": [[entry[0] for entry in reply["meta_info"]["output_token_logprobs"]] for reply in generated],
        "cached_tokens": sum(reply["meta_info"]["cached_tokens"] for reply in generated),
        "drafts_right": min(reply["meta_info"].get("spec_accept_length", 0.0) for reply in generated),
        "pid": os.getpid(),
        "start_seconds": round(started, 1),
        "generate_seconds": round(time.perf_counter() - begin, 2),
    }


def rehearsed(run: Run) -> Run:
    """A run as a machine without a GPU has it: SGLang's torch attention in place of its GPU backends, no graphs."""
    kept = {name: value for name, value in run.arguments.items() if not name.startswith("cuda_graph")}
    return run._replace(backend=run.backend if run.is_ours else "torch_native", arguments={**kept, **WITHOUT_GPU})


def in_own_process(model: Path, name: str, folder: Path, deadline: float, is_rehearsal: bool) -> dict[str, Any]:
    """One engine, one process; the end of its log if it has not answered by `deadline` (of `time.monotonic`)."""
    run = rehearsed(RUNS[name]) if is_rehearsal else RUNS[name]
    own = folder / f"{model.name}-{name.replace(' ', '_').replace(',', '')}"
    own.mkdir()
    trace, log, request = own / "trace", own / "log", own / "request.json"
    request.write_text(json.dumps({"model": str(model), "backend": run.backend, "arguments": run.arguments, "prompts": make_prompts()}))
    environment = {**OF_THE_BUNDLE, "HF_HUB_OFFLINE": "1", "FA4_BACKEND_TRACE_FILE": str(trace)}
    if run.is_off:
        environment |= {"PYTHONPATH": plant(own / "site"), ERROR: str(OFF[yardstick(name)])}
    seconds = max(0.0, round(deadline - time.monotonic(), 1))
    command = [sys.executable, "-m", "tests.device.serve_sglang", "--request", str(request)]
    is_done = run_process(command, environment, log, seconds)
    answers, said = own / "answers.json", log.read_text(errors="replace")
    if not answers.exists():
        return {"failed": ("" if is_done else f"not done within {seconds} s\n") + said[-3000:], "log": said}
    lines = trace.read_text().splitlines() if trace.exists() else []
    batches = BATCH_LINE.findall(said)
    return json.loads(answers.read_text()) | {
        "log": said,
        "kernels": sorted({line.split(" ", 1)[1] for line in lines}),
        "processes": sorted({int(line.split()[0]) for line in lines}),
        "graphs": {kind.lower(): batches.count((kind, "True")) for kind in ("Prefill", "Decode")},
        "without_graph": {kind.lower(): batches.count((kind, "False")) for kind in ("Prefill", "Decode")},
    }


def compare(got: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Equal answers, and root mean squares of how far log-probabilities are apart."""
    pairs = list(zip(got["tokens"], reference["tokens"], strict=True))
    prefill = [a - b for a, b in zip(got["prefill"], reference["prefill"], strict=True)]
    decode: list[float] = []
    for (mine, theirs), a, b in zip(pairs, got["decode"], reference["decode"], strict=True):
        same = next((index for index, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), len(mine))
        decode += [x - y for x, y in zip(a[1:same], b[1:same], strict=True)]  # the first is a prefill's
    return {
        "equal": sum(mine == theirs for mine, theirs in pairs),
        "of": len(pairs),
        "prefill_rms": round(rms(prefill), 6),
        "decode_rms": round(rms(decode), 6),
        "decode_tokens": len(decode),
    }


def rms(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / max(1, len(values)))


def judge(results: dict[str, Any]) -> list[str]:
    """What is wrong: engines that failed, answers too far away, controls that are not, kernels and graphs that did not run."""
    wrong = [f"{name} failed" for name, result in results.items() if "failed" in result]
    for name, result in results.items():
        model, label = name.split(": ", 1)
        run, other = RUNS[label], yardstick(label)
        measure = results.get(f"{model}: {other}", {}).get("against_fa3")
        if not run.is_ours or "failed" in result:
            continue
        seen = result.get("against_fa3")
        if seen is None or measure is None:
            wrong.append(f"{name}: expected fa3 and {other} beside it, got none of one")
            continue
        shares = {part: seen[part] / max(measure[part], 1e-9) for part in ("prefill_rms", "decode_rms")}
        far = [part for part, share in shares.items() if share > TOO_FAR[other]]
        if bool(far) != run.is_off:
            bound = f"{'above' if run.is_off else 'at most'} {TOO_FAR[other]}"
            wrong.append(f"{name}: expected {bound} times the distance of {other}, got {shares}")
        if not run.is_off:
            wrong += [f"{name}: {text}" for text in what_did_not_run(run, result)]
    return wrong


def what_did_not_run(run: Run, result: dict[str, Any]) -> list[str]:
    """What a run of ours should have done and did not."""
    trace = "(K and V float8_e4m3fn)" if "kv_cache_dtype" in run.arguments else "FA4: "
    has_graphs = "disable_cuda_graph" not in run.arguments
    graphs = result["graphs"]
    checks = {
        f"expected {ENOUGH} decoded tokens to compare, got {result['against_fa3']['decode_tokens']}": (
            result["against_fa3"]["decode_tokens"] >= ENOUGH
        ),
        f"expected our kernels with {trace!r} in their lines, got {result['kernels']}": any(trace in line for line in result["kernels"]),
        f"expected them in the scheduler's process, got {result['processes']}": result["pid"] not in result["processes"],
        "expected prompts from the radix cache, got none": result["cached_tokens"] > 0,
        f"expected {'decode steps in graphs' if has_graphs else 'no graphs'}, got {graphs}": bool(graphs["decode"]) == has_graphs,
        f"expected drafts that are verified, got {result['drafts_right']} tokens a step": (
            "speculative_algorithm" not in run.arguments or result["drafts_right"] > 1.5
        ),
    }
    return [text for text, is_right in checks.items() if not is_right]


def keep_log(said: str, folder: Path | None, name: str) -> None:
    """What an engine said, for whoever wants to read all of it."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name.replace(' ', '_').replace(',', '')}.log").write_text(said)


def report(name: str, result: dict[str, Any]) -> None:
    """One line for an engine that answered, its last words for one that failed."""
    if "failed" in result:
        print(f"{name}: FAILED\n{result['failed']}", flush=True)
        return
    shown = {key: result[key] for key in ("against_fa3", "graphs", "without_graph", "cached_tokens", "kernels") if key in result}
    print(f"{name}: {shown}, {result['start_seconds']} s to start, {result['generate_seconds']} s", flush=True)


def main() -> int:
    """Run everything, print a table, write the JSON; 1 when something is not as it should be."""
    parser = serve_parser(__doc__, runs="engines", side_by_side=4, seconds=240)
    parser.add_argument("--models", default=",".join(RUNS_OF), help="which of the small models")
    parser.add_argument("--only", help="which runs, separated by semicolons; fa3 and the yardsticks belong to it")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: see `rehearsed`; graphs are then told missing")
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.request:
        request = json.loads(options.request.read_text())
        options.request.with_name("answers.json").write_text(json.dumps(answer(**request)))
        return 0
    begin, deadline = time.perf_counter(), time.monotonic() + options.seconds
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.side_by_side) as pool:
        folder = Path(temporary)
        models = {kind: WRITE[kind](folder / kind) for kind in options.models.split(",")}
        wanted = options.only.split(";") if options.only else list(RUNS)
        jobs = [(kind, run) for kind in models for run in RUNS_OF[kind] if run in wanted]
        found = pool.map(lambda job: in_own_process(models[job[0]], job[1], folder, deadline, options.rehearse), jobs)
        for (kind, run), result in zip(jobs, found, strict=True):
            keep_log(result.pop("log"), options.logs, f"{kind}-{run}")
            results[f"{kind}: {run}"] = result
            reference = results.get(f"{kind}: fa3", {"failed": "it did not run"})
            if "failed" not in result and "failed" not in reference:
                result["against_fa3"] = compare(result, reference)
            report(f"{kind}: {run}", result)
            if options.out:  # after each engine: a machine's time may end before the last one's
                stamp = None if options.rehearse else gpu_stamp()
                options.out.write_text(json.dumps({"stamp": stamp, "runs": results}, indent=1) + "\n")
            print(f"    [{time.perf_counter() - begin:.0f} s]", flush=True)
    wrong = judge(results)
    print("\n".join(wrong) or "all as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
