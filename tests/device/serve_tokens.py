"""vLLM on a GPU with `--attention-backend FA4` beside FLASH_ATTN: tokens, CUDA graphs, a real model's answer, time of a step.

    python -m tests.device.serve_tokens --out results.json [--model FOLDER]

Each engine runs in a process of its own: small random models (`tests.engines.tiny_models`), or the real model in FOLDER. In bfloat16
two right kernels differ in the last bit now and then, and a greedy answer parts from there on. So what is judged is the log-probability
of a first token: how far Triton's is from FLASH_ATTN's is the yardstick, which FA4 must keep and a softmax scale that is 5% off must not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fa4_backend.kernel_stamp import gpu_stamp
from tests.engines.prompts import make_prompts
from tests.engines.tiny_models import write_gemma2, write_llama

# Of each of the engines that run side by side. A fixed size: vLLM otherwise measures the memory that is free while others take theirs.
KV_CACHE_BYTES = 1 << 30
TOO_FAR = 1.5  # times the yardstick
CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
EAGER: dict[str, Any] = {"enforce_eager": True}
# Decode steps and mixed steps both replay one captured graph: what AttentionCGSupport.ALWAYS promises.
FULL_GRAPHS: dict[str, Any] = {
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 64, 256]}
}
DRAFTS = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "FLASH_ATTN": ("FLASH_ATTN", EAGER),
    "TRITON_ATTN": ("TRITON_ATTN", EAGER),  # the yardstick: how far two right kernels part
    "FA4": ("FA4", EAGER),
    "FA4, full graphs": ("FA4", FULL_GRAPHS),
    "FA4, drafts": ("FA4", {**EAGER, **DRAFTS}),
    "FA4, pages of 64": ("FA4", {**EAGER, "block_size": 64}),
    "FA4, sleep and reload": ("FA4", {**FULL_GRAPHS, "enable_sleep_mode": True}),
    "FA4, scale 5% off": ("FA4", EAGER),
}
STRICT = ("FA4, full graphs", "FA4, drafts")  # run with FA4_BACKEND_STRICT=1: a compile after warm-up would end them

RUNS_OF = {"llama": list(RUNS), "gemma2": ["FLASH_ATTN", "TRITON_ATTN", "FA4", "FA4, full graphs", "FA4, scale 5% off"]}


def answer(model: str, backend: str, engine_args: dict[str, Any], scale_error: float, prompts: list[Any]) -> dict[str, Any]:
    """Start an engine in this process and answer `prompts` greedily; which kernels ran is read from our trace file."""
    if scale_error != 1.0:
        from fa4_backend.ops import paged_attention
        from fa4_integration.vllm_backend import impl

        impl.paged_attention = lambda *a, softmax_scale, **k: paged_attention(*a, softmax_scale=softmax_scale * scale_error, **k)  # type: ignore[attr-defined]
    from vllm import LLM, SamplingParams

    arguments = {"dtype": "bfloat16", "max_num_batched_tokens": 256, "max_model_len": 1024, "max_num_seqs": 8, "seed": 0}
    begin = time.perf_counter()
    llm = LLM(model, attention_backend=backend, kv_cache_memory_bytes=KV_CACHE_BYTES, **{**arguments, **engine_args})
    started = time.perf_counter() - begin
    sampling = SamplingParams(temperature=0, max_tokens=32, logprobs=1, ignore_eos=isinstance(prompts[0], list))
    inputs = [{"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt for prompt in prompts]
    begin = time.perf_counter()
    outputs = [output.outputs[0] for output in llm.generate(inputs, sampling, use_tqdm=False)]
    if engine_args.get("enable_sleep_mode"):
        awake = [list(output.token_ids) for output in outputs]
        for wake in (wake_from_level_1, wake_from_level_2):
            wake(llm)
            outputs = [output.outputs[0] for output in llm.generate(inputs, sampling, use_tqdm=False)]
            assert [list(output.token_ids) for output in outputs] == awake, f"other tokens after {wake.__name__}"
    trace = Path(os.environ["FA4_BACKEND_TRACE_FILE"])
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "text": [output.text for output in outputs],
        "first_logprob": [max(p.logprob for p in output.logprobs[0].values()) for output in outputs],
        "start_seconds": round(started, 1),
        "generate_seconds": round(time.perf_counter() - begin, 2),
        "kernels": sorted({line.split(" ", 1)[1] for line in trace.read_text().splitlines()}) if trace.exists() else [],
    }


def wake_from_level_1(llm: Any) -> None:
    """Weights go to the host and come back; the memory of the KV cache, and all that was made beside it, is other memory behind it."""
    llm.sleep(level=1)
    llm.wake_up()
    llm.reset_prefix_cache()


def wake_from_level_2(llm: Any) -> None:
    """Nothing is kept: weights are loaded anew, all else holds whatever the memory holds."""
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    llm.reset_prefix_cache()


def in_own_process(model: Path, run: str, prompts: list[Any], folder: Path) -> dict[str, Any]:
    """One engine, one process; its log is kept in `folder` and shown if it fails."""
    backend, engine_args = RUNS[run]
    scale_error = 1.05 if "off" in run else 1.0
    request = {"model": str(model), "backend": backend, "engine_args": engine_args, "prompts": prompts, "scale_error": scale_error}
    own = folder / f"{model.name}-{run.replace(' ', '_').replace('%', '')}"
    own.mkdir()
    trace = own / "trace"
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "FA4_BACKEND_TRACE_FILE": str(trace)}
    if run in STRICT:
        env["FA4_BACKEND_STRICT"] = "1"
    (own / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "tests.device.serve_tokens", "--request", str(own / "request.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    answers = own / "answers.json"
    if done.returncode or not answers.exists():
        return {"failed": (done.stdout + done.stderr)[-2500:]}
    return json.loads(answers.read_text())


def compare(got: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Equal answers and the largest difference of a first token's log-probability."""
    pairs = list(zip(got["tokens"], reference["tokens"], strict=True))
    differences = [abs(a - b) for a, b in zip(got["first_logprob"], reference["first_logprob"], strict=True)]
    return {"equal": sum(a == b for a, b in pairs), "of": len(pairs), "first_logprob_difference": round(max(differences), 5)}


def judge(results: dict[str, Any]) -> list[str]:
    """What is wrong with the runs of one or several models: engines that failed, answers too far away, controls that are not."""
    wrong = [f"{name} failed" for name, result in results.items() if "failed" in result]
    for name, result in results.items():
        model, run = name.split(": ", 1)
        yardstick = results.get(f"{model}: TRITON_ATTN", {}).get("against_flash_attn")
        if "FA4" not in run or "failed" in result or yardstick is None:
            continue
        share = result["against_flash_attn"]["first_logprob_difference"] / yardstick["first_logprob_difference"]
        if (share > TOO_FAR) != ("off" in run):
            wrong.append(f"{name}: a first token's log-probability is {share:.2f} times as far from FLASH_ATTN's as Triton's")
        if not result["kernels"]:
            wrong.append(f"{name}: none of our kernels ran")
    return wrong


def report(name: str, result: dict[str, Any]) -> None:
    """One line for an engine that answered, its last words for one that failed."""
    if "failed" in result:
        print(f"{name}: FAILED\n{result['failed']}", flush=True)
        return
    print(f"{name}: {result.get('against_flash_attn')}, {result['start_seconds']} s to start, {result['kernels']}", flush=True)
    print(f"    {result['text'][0]!r}" if result["text"][0] else "", flush=True)


def main() -> int:
    """Run everything, print a table, write the JSON; 1 when an engine failed or the control was not noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path, help="folder of a real model to ask about France; only this one is asked then")
    parser.add_argument("--side-by-side", type=int, default=3, help="engines that run at once")
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.request:
        request = json.loads(options.request.read_text())
        options.request.with_name("answers.json").write_text(json.dumps(answer(**request)))
        return 0
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.model:
            models = [(options.model, [CHAT], ["FLASH_ATTN", "TRITON_ATTN", "FA4", "FA4, full graphs"])]
        else:
            models = [
                (write(folder / kind), make_prompts(), RUNS_OF[kind]) for kind, write in (("llama", write_llama), ("gemma2", write_gemma2))
            ]
        jobs = [(model, run, prompts) for model, prompts, runs in models for run in runs]
        with ThreadPoolExecutor(options.side_by_side) as pool:
            for (model, run, _), result in zip(jobs, pool.map(lambda job: in_own_process(*job, folder), jobs), strict=True):
                results[f"{model.name}: {run}"] = result
                reference = results[f"{model.name}: FLASH_ATTN"]
                if "failed" not in result and "failed" not in reference:
                    result["against_flash_attn"] = compare(result, reference)
                report(f"{model.name}: {run}", result)
                if options.out:  # after each engine: a machine's time may end before the last one's
                    options.out.write_text(json.dumps({"stamp": gpu_stamp(), "runs": results}, indent=1) + "\n")
    wrong = judge(results)
    print("\n".join(wrong) or "all as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
