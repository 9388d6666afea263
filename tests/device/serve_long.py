"""An engine on FA4 under a random load for many steps: nothing is compiled, leaks, drifts or is left behind in counters.

    python -m tests.device.serve_long --steps 10000 --out long.json [--seconds 240]

Arrivals, early leavers, shared and cached prefixes, chunked prompts, and a KV cache that is too small for all that runs, so that requests
are preempted. Batch-invariant and exact, so that a request's answer depends on nothing but the request: a sample is asked again at the end,
each alone, and has to come out the same. A small random model: the machinery around the kernels is what is worn here.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from fa4_backend.kernel_stamp import gpu_stamp
from tests.engines.random_load import DrawnRequest, RandomLoad
from tests.engines.tiny_models import write_llama

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_BATCH_INVARIANT": "1",
    "FA4_BACKEND_EXACT": "1", "FA4_BACKEND_STRICT": "1",
}  # fmt: skip
ENGINE: dict[str, Any] = {
    "dtype": "bfloat16", "max_model_len": 1024, "max_num_batched_tokens": 512, "max_num_seqs": 32, "block_size": 16, "seed": 0,
    "kv_cache_memory_bytes": 1 << 30, "num_gpu_blocks_override": 256, "attention_backend": "FA4",
}  # fmt: skip
GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 128, 512]}}
INVARIANT = ("VLLM_BATCH_INVARIANT", "FA4_BACKEND_EXACT")
REHEARSAL = {"enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 64 << 20}
LOOKS = 10  # at memory and counters, evenly over the run
MEAN_ARRIVALS = 1.0  # of the exponential whose whole part is asked at a step: more than the cache holds
KEEP_EVERY = 50  # one answer of these is kept, and asked for again at the end
SECONDS_TO_COMPARE = 40  # beyond --seconds
HOST_BYTES = 64 << 20  # that the process may grow by between the first look and the last: Python's and vLLM's own keeping


class LongRun:
    """The engine and who asks it."""

    def __init__(self, model: Path, arguments: dict[str, Any], seed: int) -> None:
        from vllm import LLM

        self.llm = LLM(str(model), **{**ENGINE, **arguments})
        self.engine = self.llm.llm_engine
        self.load = RandomLoad(seed, longest_prompt=900, longest_answer=100)
        self.running: dict[str, DrawnRequest] = {}
        self.answers: dict[str, tuple[DrawnRequest, list[int]]] = {}
        self.keep_all = False  # answers; else one in KEEP_EVERY, so that they are not what grows
        self.counts = {"asked": 0, "left": 0, "answered": 0, "preempted": 0, "cached_tokens": 0}

    def step(self) -> None:
        """One step of the engine, with what came before it and whoever leaves after it."""
        for _ in range(self.load.arrivals(MEAN_ARRIVALS) if len(self.running) < 64 else 0):
            self.ask(self.load.next())
        for output in self.engine.step():
            request, tokens = self.running.get(output.request_id), list(output.outputs[0].token_ids)
            if request is None:  # who left
                continue
            if output.finished:
                self._take(output.request_id, tokens, output.num_cached_tokens or 0)
            elif request.leaves_after is not None and len(tokens) > request.leaves_after:
                self.engine.abort_request([output.request_id])
                del self.running[output.request_id]
                self.counts["left"] += 1

    def ask(self, request: DrawnRequest) -> str:
        from vllm import SamplingParams

        self.counts["asked"] += 1
        name = str(self.counts["asked"])
        sampling = SamplingParams(temperature=0.0, max_tokens=request.new_tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(name, {"prompt_token_ids": request.prompt}, sampling)
        self.running[name] = request
        return name

    def _take(self, name: str, tokens: list[int], cached: int) -> None:
        request = self.running.pop(name)
        if int(name) % KEEP_EVERY == 0 or self.keep_all:
            self.answers[name] = (request, tokens)
        self.counts["answered"] += 1
        self.counts["cached_tokens"] += cached

    def drain(self) -> None:
        """Let everybody who waits have an answer."""
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished and output.request_id in self.running:
                    self._take(output.request_id, list(output.outputs[0].token_ids), output.num_cached_tokens or 0)

    def ask_alone(self, request: DrawnRequest) -> list[int]:
        """The answer to a request that has the engine for itself and an empty prefix cache."""
        self.llm.reset_prefix_cache()
        self.keep_all = True
        name = self.ask(request)
        self.drain()
        self.keep_all = False
        return self.answers.pop(name)[1]

    def metadata(self) -> list[Any]:
        """Our metadata of every builder in the engine's runner."""
        from fa4_integration.vllm_backend.metadata_builder import FA4MetadataBuilder

        gc.unfreeze()  # vLLM freezes what it made at its start, and what is frozen is not listed
        builders = [item for item in gc.get_objects() if isinstance(item, FA4MetadataBuilder)]
        return [step for builder in builders for step in builder.steps.values()]


def look(run: LongRun) -> dict[str, Any]:
    """Memory, compiles and counters at a moment when nothing runs on the device."""
    import torch

    from fa4_backend import compile_cache

    is_gpu = torch.cuda.is_available()
    if is_gpu:
        torch.cuda.synchronize()
    gc.collect()
    return {
        "device_bytes": torch.cuda.memory_allocated() if is_gpu else 0,
        "device_reserved_bytes": torch.cuda.memory_reserved() if is_gpu else 0,
        "host_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "late_compiles": compile_cache.num_late_compiles,
        "plans": len(run.metadata()),
        "counters": [not_at_rest(step.work) for step in run.metadata() if step.work is not None],
        "addresses": [addresses(step.work) for step in run.metadata() if step.work is not None],
    }


def not_at_rest(work: Any) -> dict[str, int]:
    """Counters that kernels leave at 0 between launches (`schedule/work_list.py`), and how many of them are not."""
    from fa4_backend.kernels.schedule.work_list import QUEUE_LEFT, QUEUE_NEXT

    queue = work.prefill_queue[0, [QUEUE_NEXT, QUEUE_LEFT]]
    found = {"arrivals": work.arrivals, "part_arrivals": work.part_arrivals, "prefill_queue": queue}
    return {name: int(tensor.count_nonzero()) for name, tensor in found.items() if tensor.any()}


def addresses(work: Any) -> list[int]:
    """Where the work lists lie."""
    tensors = [getattr(work, field.name) for field in fields(work)]
    return [tensor.data_ptr() for tensor in tensors if hasattr(tensor, "data_ptr")]


def judge(result: dict[str, Any]) -> list[str]:
    """What is wrong with a run."""
    first, last, wrong = result["looks"][0], result["looks"][-1], []
    if result["steps"] < result["expected_steps"]:
        wrong.append(f"expected {result['expected_steps']} steps, the time was over after {result['steps']}")
    if not result["compared"]:
        wrong.append("expected answers to compare with those of requests alone, got none")
    for index, seen in enumerate(result["looks"]):
        if seen["late_compiles"] or any(seen["counters"]) or seen["addresses"] != first["addresses"]:
            wrong.append(f"look {index}: {seen['late_compiles']} compiles, counters not at rest {seen['counters']}, or lists that moved")
    if last["device_bytes"] != first["device_bytes"]:
        wrong.append(f"device memory: expected {first['device_bytes']} bytes as at first, got {last['device_bytes']}")
    if last["host_bytes"] - first["host_bytes"] > HOST_BYTES:
        wrong.append(f"host memory grew by {(last['host_bytes'] - first['host_bytes']) >> 20} MiB, expected {HOST_BYTES >> 20} at most")
    wrong += [f"nothing was {name}: the load is not what it should be" for name, count in result["counts"].items() if not count]
    wrong += [f"request {name}: another answer than alone" for name in result["others"]]
    if result["probe_is_other"]:
        wrong.append("the same request before and after the load: other tokens")
    if not all(seen["plans"] for seen in result["looks"]):
        wrong.append("no metadata of FA4 was found")
    return wrong


def main() -> int:
    """Run, print what was seen, write the JSON; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--seconds", type=float, default=240, help="until no more steps are made; what was seen is then judged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="on vLLM's CPU build: eager, float32, not batch-invariant")
    options = parser.parse_args()
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if not (options.rehearse and name in INVARIANT)})
    with tempfile.TemporaryDirectory() as name:
        run = LongRun(write_llama(Path(name)), REHEARSAL if options.rehearse else GRAPHS, options.seed)
    preempted = count_preemptions(run)
    probe = DrawnRequest(run.load.prefixes[0], 64, None)
    before = run.ask_alone(probe)
    looks, begin = [], time.perf_counter()
    made = 0
    while made < options.steps and time.perf_counter() - begin < options.seconds:
        if made % max(1, options.steps // LOOKS) == options.steps // LOOKS // 2:
            run.drain()  # equal conditions: memory of running requests is not what is looked at
            looks.append(look(run))
            print(f"{made} steps in {time.perf_counter() - begin:.0f} s: {run.counts}, {preempted[0]} preempted", flush=True)
        run.step()
        made += 1
    run.drain()
    seconds = time.perf_counter() - begin
    looks.append(look(run))
    run.counts["preempted"] = preempted[0]
    compared, others = compare_alone(run, begin + options.seconds + SECONDS_TO_COMPARE)
    result: dict[str, Any] = {"steps": made, "seconds": round(seconds, 1), "counts": run.counts, "looks": looks}
    result |= {"expected_steps": options.steps, "compared": compared, "others": others}
    result["probe_is_other"] = run.ask_alone(probe) != before
    wrong = judge(result)
    shown = [{key: seen[key] for key in ("device_bytes", "device_reserved_bytes", "host_bytes", "late_compiles")} for seen in looks]
    print(json.dumps({**result, "looks": shown}, indent=1))
    if options.out:
        options.out.write_text(json.dumps({"stamp": None if options.rehearse else gpu_stamp(), **result, "looks": shown}, indent=1) + "\n")
    print("\n".join(wrong) or "all as it should be")
    return 1 if wrong else 0


def compare_alone(run: LongRun, deadline: float) -> tuple[int, list[str]]:
    """How many kept answers were asked for again, each alone, before `deadline` (of `time.perf_counter`); those that came out others."""
    compared, others = 0, []
    for name, (request, tokens) in list(run.answers.items()):
        if time.perf_counter() > deadline:
            break
        compared += 1
        others += [name] if run.ask_alone(request) != tokens else []
    return compared, others


def count_preemptions(run: LongRun) -> list[int]:
    """One number, which grows with each request that the scheduler puts back."""
    scheduler, count = run.engine.engine_core.engine_core.scheduler, [0]
    preempt = scheduler._preempt_request

    def counted(*arguments: Any, **more: Any) -> Any:
        count[0] += 1
        return preempt(*arguments, **more)

    scheduler._preempt_request = counted
    return count


if __name__ == "__main__":
    raise SystemExit(main())
