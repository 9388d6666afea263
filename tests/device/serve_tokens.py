"""vLLM on a GPU with `--attention-backend FA4` beside FLASH_ATTN: tokens, CUDA graphs, a real model's answer, time of a step.

    python -m tests.device.serve_tokens --out results.json [--model FOLDER | --kv-cache-dtype fp8]

Each engine runs in a process of its own: small random models (`tests.engines.tiny_models`), or the real model in FOLDER. In bfloat16
two right kernels differ in the last bit now and then, and a greedy answer parts from there on. So what is judged is the log-probability
of a first token: how far Triton's is from FLASH_ATTN's is the yardstick, which FA4 must keep and a softmax scale that is 5% off must not.

With K and V in FP8 all engines are compared with FLASH_ATTN on a 16-bit cache, by the root mean square over the tokens of all prompts
(prefill) and over tokens that each engine is made to generate, the same ones (decode). The yardstick is FLASH_ATTN in FP8, which rounds
queries and weights too: FA4 must be nearer, and must not be with scales of K and V that are 25% off.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fa4_backend.kernel_stamp import gpu_stamp
from tests.engines.prompts import make_prompts
from tests.engines.tiny_models import write_gemma2, write_llama

# Of each of the engines that run side by side. A fixed size: vLLM otherwise measures the memory that is free while others take theirs.
KV_CACHE_BYTES = 1 << 30
# vLLM refuses to start where less than this share of the memory is free, whatever the cache takes: others have theirs already.
MEMORY = {"kv_cache_memory_bytes": KV_CACHE_BYTES, "gpu_memory_utilization": 0.1}
TOO_FAR = 1.5  # times the yardstick
CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
EAGER: dict[str, Any] = {"enforce_eager": True}
# Decode steps and mixed steps both replay one captured graph: what AttentionCGSupport.ALWAYS promises.
FULL_GRAPHS: dict[str, Any] = {
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 64, 256]}
}
DECODE_GRAPHS: dict[str, Any] = {
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
}
LONG_CHUNKS: dict[str, Any] = {"max_num_batched_tokens": 1024}
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
FP8: dict[str, Any] = {"kv_cache_dtype": "fp8"}
# "auto" is FP8 with the checkpoint's scales for the model that declares them, and 16 bits for the others.
FP8_RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "FLASH_ATTN, 16 bits": ("FLASH_ATTN", {**EAGER, "kv_cache_dtype": "bfloat16"}),
    "FLASH_ATTN": ("FLASH_ATTN", {**EAGER, **FP8}),
    "FA4": ("FA4", {**EAGER, **FP8}),
    "FA4, full graphs": ("FA4", {**FULL_GRAPHS, **FP8}),
    "FA4, drafts": ("FA4", {**EAGER, **FP8, **DRAFTS}),
    "FA4, pages of 64": ("FA4", {**EAGER, **FP8, "block_size": 64}),
    "FA4, sleep and reload": ("FA4", {**FULL_GRAPHS, **FP8, "enable_sleep_mode": True}),
    "FA4, first layer skipped": ("FA4", {**EAGER, **FP8, "kv_cache_dtype_skip_layers": ["0"]}),
    "FA4, windows skipped": ("FA4", {**EAGER, **FP8, "kv_cache_dtype_skip_layers": ["sliding_window"]}),
    "FLASH_ATTN, declared": ("FLASH_ATTN", EAGER),
    "FA4, declared": ("FA4", EAGER),
    "FA4, declared, full graphs": ("FA4", FULL_GRAPHS),
    # Scales come back too, at the addresses that graphs hold.
    "FA4, declared, sleep and reload": ("FA4", {**FULL_GRAPHS, "enable_sleep_mode": True}),
    "FA4, declared, scales 25% off": ("FA4", EAGER),
    "FA4, scales 25% off": ("FA4", {**EAGER, **FP8}),
    # Chunks long enough that K and V are brought to 16 bits once a call, of a model with as many query heads a KV head as that takes.
    "FLASH_ATTN, 16 bits, long chunks": ("FLASH_ATTN", {**EAGER, **LONG_CHUNKS, "kv_cache_dtype": "bfloat16"}),
    "FLASH_ATTN, long chunks": ("FLASH_ATTN", {**EAGER, **FP8, **LONG_CHUNKS}),
    "FA4, long chunks": ("FA4", {**EAGER, **FP8, **LONG_CHUNKS}),
    "FA4, long chunks, sleep and reload": ("FA4", {**EAGER, **FP8, **LONG_CHUNKS, "enable_sleep_mode": True}),
    "FA4, long chunks, decode graphs": ("FA4", {**DECODE_GRAPHS, **FP8, **LONG_CHUNKS}),
    "FA4, long chunks, scales 25% off": ("FA4", {**EAGER, **FP8, **LONG_CHUNKS}),
}
LONG_CHUNK_RUNS = [run for run in FP8_RUNS if "long chunks" in run]
# K's largest values are about 4: a scale of 2^-7 cuts what is above 3.5.
KV_SCALES: list[tuple[float, ...]] = [(0.011, 0.3), (0.07, 2.0**-7)]


@dataclass(frozen=True)
class Suite:
    """Engines to run, and how they are judged."""

    runs: dict[str, tuple[str, dict[str, Any]]]
    runs_of: dict[str, list[str]]  # of each model; first the one that all others are compared with, then the yardstick
    metrics: tuple[str, ...]  # of `compare`
    too_far: float  # times the yardstick
    planted: float  # factor on scales in runs that are "off"
    trace: str  # in the line of a kernel of ours that ran


SUITES = {
    "auto": Suite(
        RUNS,
        {"llama": list(RUNS), "gemma2": ["FLASH_ATTN", "TRITON_ATTN", "FA4", "FA4, full graphs", "FA4, scale 5% off"]},
        ("first_logprob_difference",),
        TOO_FAR,
        1.05,
        "FA4: ",
    ),
    "fp8": Suite(
        FP8_RUNS,
        {
            "llama": [run for run in FP8_RUNS if not any(word in run for word in ("declared", "windows", "long chunks"))],
            "gemma2": [
                "FLASH_ATTN, 16 bits", "FLASH_ATTN", "FA4", "FA4, full graphs", "FA4, drafts", "FA4, windows skipped",
                "FA4, scales 25% off",
            ],
            "llama_with_scales": ["FLASH_ATTN, 16 bits", *(run for run in FP8_RUNS if "declared" in run)],
            "one_kv_head": LONG_CHUNK_RUNS,
        },
        ("prefill_logprob_rms", "decode_logprob_rms"),
        1.0,
        1.25,
        "(K and V float8_e4m3fn)",
    ),
}  # fmt: skip


@contextmanager
def off_scale(scale_error: float) -> Iterator[None]:
    """Multiply the scales of K and V in FP8, and the softmax scale of any other call."""
    from fa4_backend.ops import paged_attention
    from fa4_integration.vllm_backend import impl

    def off(*tensors: Any, softmax_scale: float, k_scale: Any, v_scale: Any, **values: Any) -> Any:
        if k_scale is None:
            return paged_attention(*tensors, softmax_scale=softmax_scale * scale_error, **values)
        scales = {"k_scale": k_scale * scale_error, "v_scale": v_scale * scale_error}
        return paged_attention(*tensors, softmax_scale=softmax_scale, **scales, **values)

    if scale_error != 1.0:
        impl.paged_attention = off  # type: ignore[attr-defined]
    try:
        yield
    finally:
        impl.paged_attention = paged_attention  # type: ignore[attr-defined]


def answer(model: str, backend: str, engine_args: dict[str, Any], scale_error: float, prompts: list[Any]) -> dict[str, Any]:
    """Start an engine in this process and answer `prompts` greedily; which kernels ran is read from our trace file."""
    with off_scale(scale_error):
        return _answer(model, backend, engine_args, prompts)


def _answer(model: str, backend: str, engine_args: dict[str, Any], prompts: list[Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    arguments = {"dtype": "bfloat16", "max_num_batched_tokens": 256, "max_model_len": 1024, "max_num_seqs": 8, "seed": 0}
    begin = time.perf_counter()
    llm = LLM(model, attention_backend=backend, **{**MEMORY, **arguments, **engine_args})
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
        "prefill_logprobs": prefill_logprobs(llm, inputs) if engine_args.get("speculative_config") is None else [],
        "decode_logprobs": decode_logprobs(llm, inputs),
        "start_seconds": round(started, 1),
        "generate_seconds": round(time.perf_counter() - begin, 2),
        "kernels": sorted({line.split(" ", 1)[1] for line in trace.read_text().splitlines()}) if trace.exists() else [],
    }


def prefill_logprobs(llm: Any, inputs: list[Any], lora: list[Any] | None = None) -> list[float]:
    """The log-probability of each token of each prompt but its first. `lora`: a request's adapter, or None."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate(inputs, sampling, use_tqdm=False, **_adapters(lora))
    pairs = [pair for output in outputs for pair in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)]
    return [of_token[token].logprob for token, of_token in pairs]


def _adapters(lora: list[Any] | None) -> dict[str, Any]:
    return {"lora_request": lora} if lora and any(lora) else {}


def decode_logprobs(llm: Any, inputs: list[Any], lora: list[Any] | None = None) -> list[float]:
    """What the model thinks of tokens that it is made to generate, for each prompt another one again and again: contexts of different
    engines do not part. Without the first, which a prefill's row decides."""
    from vllm import SamplingParams

    forced = [100 + 37 * index for index in range(len(inputs))]
    sampling = [
        SamplingParams(temperature=0, max_tokens=32, logprobs=0, allowed_token_ids=[token], ignore_eos=True, detokenize=False)
        for token in forced
    ]
    outputs = [output.outputs[0] for output in llm.generate(inputs, sampling, use_tqdm=False, **_adapters(lora))]
    assert [set(output.token_ids) for output in outputs] == [{token} for token in forced]
    return [of_token[token].logprob for output, token in zip(outputs, forced, strict=True) for of_token in output.logprobs[1:]]


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


def in_own_process(suite: Suite, model: Path, run: str, prompts: list[Any], folder: Path) -> dict[str, Any]:
    """One engine, one process; its log is kept in `folder` and shown if it fails."""
    backend, engine_args = suite.runs[run]
    scale_error = suite.planted if "off" in run else 1.0
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
    """Equal answers, and how far log-probabilities are apart: the largest of first tokens, and root mean squares (see the module)."""
    pairs = list(zip(got["tokens"], reference["tokens"], strict=True))
    differences = [abs(a - b) for a, b in zip(got["first_logprob"], reference["first_logprob"], strict=True)]
    seen = {"equal": sum(a == b for a, b in pairs), "of": len(pairs), "first_logprob_difference": round(max(differences), 5)}
    for part in ("prefill", "decode"):
        if got[f"{part}_logprobs"] and reference[f"{part}_logprobs"]:
            squares = [(a - b) ** 2 for a, b in zip(got[f"{part}_logprobs"], reference[f"{part}_logprobs"], strict=True)]
            seen |= {f"{part}_logprob_rms": round(math.sqrt(sum(squares) / len(squares)), 6), f"{part}_tokens": len(squares)}
    return seen


def judge(results: dict[str, Any], suite: Suite = SUITES["auto"]) -> list[str]:
    """What is wrong with the runs of one or several models: engines that failed, answers too far away, controls that are not."""
    wrong = [f"{name} failed" for name, result in results.items() if "failed" in result]
    for name, result in results.items():
        model, run = name.split(": ", 1)
        other = yardstick_of(model, suite)
        yardstick = results.get(f"{model}: {other}", {}).get("against_flash_attn")
        if "FA4" not in run or "failed" in result or yardstick is None:
            continue
        seen = result["against_flash_attn"]
        shares = {metric: seen[metric] / yardstick[metric] for metric in suite.metrics if metric in seen}
        far = [metric for metric, share in shares.items() if share > suite.too_far]
        if not shares or ("off" in run and not far) or ("off" not in run and far):
            bound = f"{'above' if 'off' in run else 'at most'} {suite.too_far}"
            wrong.append(f"{name}: expected {bound} times the distance of {other}, got {shares}")
        if not any(suite.trace in line for line in result["kernels"]):
            wrong.append(f"{name}: none of our kernels ran with {suite.trace!r} in its line")
    return wrong


def yardstick_of(model: str, suite: Suite) -> str:
    """The run whose distance is the yardstick of a model, a real one included."""
    return suite.runs_of.get(model, [*suite.runs])[1]


def report(name: str, result: dict[str, Any]) -> None:
    """One line for an engine that answered, its last words for one that failed."""
    if "failed" in result:
        print(f"{name}: FAILED\n{result['failed']}", flush=True)
        return
    print(f"{name}: {result.get('against_flash_attn')}, {result['start_seconds']} s to start, {result['kernels']}", flush=True)
    print(f"    {result['text'][0]!r}" if result["text"][0] else "", flush=True)


WRITE = {
    "llama": write_llama,
    "gemma2": write_gemma2,
    "llama_with_scales": lambda folder: write_llama(folder, KV_SCALES),
    "one_kv_head": lambda folder: write_llama(folder, heads=(16, 1)),
}


def main() -> int:
    """Run everything, print a table, write the JSON; 1 when an engine failed or the control was not noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", type=Path, help="folder of a real model to ask about France; only this one is asked then")
    parser.add_argument("--kv-cache-dtype", choices=SUITES, default="auto", help="fp8: engines with K and V in FP8")
    parser.add_argument("--side-by-side", type=int, default=3, help="engines that run at once")
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.request:
        request = json.loads(options.request.read_text())
        options.request.with_name("answers.json").write_text(json.dumps(answer(**request)))
        return 0
    results: dict[str, Any] = {}
    suite = SUITES[options.kv_cache_dtype]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.model:
            models = [(options.model, [CHAT], [*suite.runs][:4])]
        else:
            models = [(WRITE[kind](folder / kind), make_prompts(), runs) for kind, runs in suite.runs_of.items()]
        jobs = [(model, run, prompts) for model, prompts, runs in models for run in runs]
        reference_of = {model: f"{model.name}: {runs[0]}" for model, _, runs in models}
        with ThreadPoolExecutor(options.side_by_side) as pool:
            for (model, run, _), result in zip(jobs, pool.map(lambda job: in_own_process(suite, *job, folder), jobs), strict=True):
                results[f"{model.name}: {run}"] = result
                reference = results[reference_of[model]]
                if "failed" not in result and "failed" not in reference:
                    result["against_flash_attn"] = compare(result, reference)
                report(f"{model.name}: {run}", result)
                if options.out:  # after each engine: a machine's time may end before the last one's
                    options.out.write_text(json.dumps({"stamp": gpu_stamp(), "runs": results}, indent=1) + "\n")
    wrong = judge(results, suite)
    print("\n".join(wrong) or "all as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
