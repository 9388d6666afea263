"""vLLM on a GPU with `--attention-backend FA4` on models with MLA, 16 and 128 heads: log-probabilities beside FLASH_ATTN_MLA.

    python -m tests.device.serve_mla --out results.json [--heads 16,128] [--only "FLASH_ATTN_MLA;TRITON_MLA;FA4"]
    python -m tests.device.serve_mla --compile-for sm_90a      # needs neither GPU nor vLLM

Each engine runs in a process of its own on a small random model whose MLPs are dense (`tests.engines.tiny_mla_models`). What is judged is
the root mean square difference of log-probabilities from FLASH_ATTN_MLA's: of tokens that each engine is made to generate, the same ones
(decode), and of prompts' tokens (prefill, ours on FA4). TRITON_MLA's distance is the yardstick, which FA4 must keep within `TOO_FAR` in
both, and a softmax scale that is 5 % off must not. With latents in FP8 the reference stays the 16-bit FLASH_ATTN_MLA and the yardstick is
TRITON_MLA in FP8, which rounds queries too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fa4_backend import AttentionProblem, BatchLimits, MaskFeatures, plan_attention
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.problem import FP8 as FP8_ELEMENTS
from fa4_backend.problem import LATENT, RAGGED
from fa4_backend.split_rows import message_limits
from fa4_backend.support import LATENT_PAGE
from tests.device.compiling import compile_lacking
from tests.device.engine_lane import run_process
from tests.device.serve_matrix import NO_MULTICAST, arch
from tests.device.serve_options import serve_parser
from tests.device.serve_tokens import DRAFTS, EAGER, FP8, MEMORY, TOO_FAR, compare, decode_logprobs, prefill_logprobs
from tests.engines.prompts import make_prompts

GRAPHS: dict[str, Any] = {
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}
}
REFERENCE = "FLASH_ATTN_MLA"
# Name -> backend, arguments, and whose distance from the reference is the yardstick.
RUNS: dict[str, tuple[str, dict[str, Any], str]] = {
    REFERENCE: ("FLASH_ATTN_MLA", EAGER, ""),
    "TRITON_MLA": ("TRITON_MLA", EAGER, ""),
    "FA4": ("FA4", EAGER, "TRITON_MLA"),
    "FA4, graphs": ("FA4", GRAPHS, "TRITON_MLA"),
    "FA4, drafts in graphs": ("FA4", {**GRAPHS, **DRAFTS}, "TRITON_MLA"),
    "FA4, pages of 16": ("FA4", {**EAGER, "block_size": 16}, "TRITON_MLA"),
    "FA4, scale 5% off": ("FA4", EAGER, "TRITON_MLA"),
    "TRITON_MLA, FP8": ("TRITON_MLA", {**EAGER, **FP8}, ""),
    "FA4, FP8": ("FA4", {**EAGER, **FP8}, "TRITON_MLA, FP8"),
    "FA4, FP8, graphs": ("FA4", {**GRAPHS, **FP8}, "TRITON_MLA, FP8"),
}
METRICS = ("decode_logprob_rms", "prefill_logprob_rms")
MAX_SEQS, MAX_TOKENS, MAX_LEN = 8, 256, 1024


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Start an engine in this process; which kernels ran is read from our trace file."""
    from vllm import LLM, SamplingParams

    if request["scale_error"] != 1.0:
        plant(request["scale_error"])
    join_keys_by_copies()
    arguments = {
        "dtype": "bfloat16", "max_num_batched_tokens": MAX_TOKENS, "max_model_len": MAX_LEN, "max_num_seqs": MAX_SEQS, "seed": 0,
    }  # fmt: skip
    llm = LLM(request["model"], attention_backend=request["backend"], **{**MEMORY, **arguments, **request["arguments"]})
    inputs = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    outputs = llm.generate(inputs, SamplingParams(temperature=0, max_tokens=32, logprobs=1, ignore_eos=True), use_tqdm=False)
    trace = Path(os.environ["FA4_BACKEND_TRACE_FILE"])
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "first_logprob": [max(p.logprob for p in output.outputs[0].logprobs[0].values()) for output in outputs],
        "prefill_logprobs": [] if "speculative_config" in request["arguments"] else prefill_logprobs(llm, inputs),
        "decode_logprobs": decode_logprobs(llm, inputs),
        "kernels": sorted({line.split(" ", 1)[1] for line in trace.read_text().splitlines()}) if trace.exists() else [],
    }


def join_keys_by_copies() -> None:
    """vLLM joins the two parts of a key of 128 heads by a kernel that FlashInfer compiles at the first prompt, for which an installation
    needs its sources. The same is done by two copies, as for any other number of heads."""
    from vllm.model_executor.layers.attention import mla_attention

    mla_attention.has_flashinfer = lambda: False


def plant(scale_error: float) -> None:
    """Multiply the softmax scale of decode and prefill rows."""
    from fa4_integration.vllm_backend import mla_impl, mla_prefill

    def off(operator: Any) -> Any:
        return lambda *tensors, softmax_scale, **values: operator(*tensors, softmax_scale=softmax_scale * scale_error, **values)

    mla_impl.mla_decode = off(mla_impl.mla_decode)
    mla_prefill.ragged_attention = off(mla_prefill.ragged_attention)


def in_own_process(model: Path, run: str, folder: Path, deadline: float) -> dict[str, Any]:
    """One engine, one process; the end of its log if it has not answered by `deadline` (of `time.monotonic`)."""
    backend, arguments, _ = RUNS[run]
    own = folder / f"{model.name}-{run.replace(' ', '_').replace('%', '').replace(',', '')}"
    own.mkdir()
    request = {"model": str(model), "backend": backend, "arguments": arguments, "prompts": make_prompts()}
    (own / "request.json").write_text(json.dumps({**request, "scale_error": 1.05 if "off" in run else 1.0}))
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "FA4_BACKEND_TRACE_FILE": str(own / "trace"), **NO_MULTICAST,
    }  # fmt: skip
    if "graphs" in run:
        environment["FA4_BACKEND_STRICT"] = "1"  # a compile after warm-up would end it
    command = [sys.executable, "-m", "tests.device.serve_mla", "--request", str(own / "request.json")]
    seconds = max(0.0, round(deadline - time.monotonic(), 1))
    is_done = run_process(command, environment, own / "log", seconds)
    answers, said = own / "answers.json", (own / "log").read_text(errors="replace")
    if not answers.exists():
        return {"failed": ("" if is_done else f"not done within {seconds} s\n") + said[-2500:], "log": said}
    return {**json.loads(answers.read_text()), "log": said}


def judge(results: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the runs of one model: engines that failed, answers too far away, a control that is not, kernels not run."""
    wrong = [f"{run} failed" for run, result in results.items() if "failed" in result]
    for run, result in results.items():
        other = RUNS[run][2]
        yardstick = results.get(other, {}).get("against_reference")
        seen = result.get("against_reference")
        if not other or "failed" in result:
            continue
        if yardstick is None or seen is None:
            wrong.append(f"{run}: expected {REFERENCE} and {other} beside it, got none of one")
            continue
        for metric in METRICS:
            if metric in seen and (seen[metric] > TOO_FAR * yardstick[metric]) != ("off" in run):
                wrong.append(f"{run}: {metric} {seen[metric]}, {other} {yardstick[metric]}")
        if not any("latent attention" in line for line in result["kernels"]):
            wrong.append(f"{run}: our kernel did not run")
    return wrong


def keys_of(num_heads: int, arch: str) -> list[Any]:
    """Compile keys of our kernels for all engines of a model, as they ask for them."""
    asked = []
    for backend, arguments, _ in RUNS.values():
        if backend == "FA4":
            stored = FP8_ELEMENTS if "kv_cache_dtype" in arguments else "bfloat16"
            page_size = arguments.get("block_size", LATENT_PAGE)
            latent = AttentionProblem(num_heads, 1, 576, 512, "bfloat16", page_size, arch, kv_dtype=stored, kv_source=LATENT)
            drafts = arguments.get("speculative_config", {}).get("num_speculative_tokens", 0)
            limits = BatchLimits(MAX_SEQS, MAX_TOKENS, MAX_LEN, 1 + drafts)
            asked += [(latent, limits), (latent, message_limits(limits, latent))]
    for is_causal in (True, False):
        mask = MaskFeatures(is_causal=is_causal)
        ragged = AttentionProblem(num_heads, num_heads, 192, 128, "bfloat16", 1, arch, mask=mask, kv_source=RAGGED, has_lse=True)
        asked.append((ragged, BatchLimits(MAX_SEQS, MAX_TOKENS, MAX_LEN)))
    keys: dict[Any, None] = {}
    for problem, limits in asked:
        assert limits is not None, problem
        keys |= dict.fromkeys(plan_attention(problem, limits).keys)
    return [*keys]


def write_model(folder: Path, num_heads: int) -> Path:
    """A model of so many heads, in bfloat16."""
    import torch

    from tests.engines.tiny_mla_models import write_deepseek

    return write_deepseek(folder / f"heads{num_heads}", num_heads=num_heads, q_lora_rank=256, hidden=1024, dtype=torch.bfloat16)


def run_all(heads: list[int], runs: list[str], options: argparse.Namespace) -> list[str]:
    """Run engines side by side, report and keep what they answered; what is wrong with it."""
    begin, deadline = time.perf_counter(), time.monotonic() + options.seconds
    every: dict[str, Any] = {"stamp": gpu_stamp(("schedule", "mla_decode", "sm90"))}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.side_by_side) as pool:
        folder = Path(name)
        models = {num_heads: write_model(folder, num_heads) for num_heads in heads}
        jobs = {(h, run): pool.submit(in_own_process, models[h], run, folder, deadline) for h in heads for run in runs}
        for num_heads in heads:
            results: dict[str, dict[str, Any]] = {}
            for run in runs:
                result = results[run] = jobs[num_heads, run].result()
                if options.logs:
                    options.logs.mkdir(parents=True, exist_ok=True)
                    (options.logs / f"{num_heads}-{run.replace(' ', '_')}.log").write_text(result["log"])
                reference = results.get(REFERENCE, {"failed": "it did not run"})
                if "failed" not in result and "failed" not in reference and run != REFERENCE:
                    result["against_reference"] = compare(result, reference)
                seconds = time.perf_counter() - begin
                print(f"[{seconds:.0f} s]", num_heads, run, result.get("against_reference", result.get("failed", "")), flush=True)
                kept = ("against_reference", "kernels", "failed")
                every[f"{num_heads} heads"] = {run: {key: r[key] for key in kept if key in r} for run, r in results.items()}
                if options.out:  # after each engine: a machine's time may end before the last one's
                    options.out.write_text(json.dumps({**every, "wrong": wrong}, indent=1) + "\n")
            wrong += [f"{num_heads} heads: {line}" for line in judge(results)]
    if options.out:
        options.out.write_text(json.dumps({**every, "wrong": wrong}, indent=1) + "\n")
    return wrong


def main() -> int:
    """Run everything, print a line an engine, write the JSON; 1 when something is not as it has to be."""
    parser = serve_parser(__doc__, runs="engines", side_by_side=5, seconds=200)
    parser.add_argument("--heads", default="16,128")
    parser.add_argument("--only", help="which runs, separated by semicolons; the reference and the yardsticks belong to it")
    parser.add_argument("--compile-for", metavar="ARCH", help="fill the cache with the kernels that these engines need, and do no more")
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.request:
        (options.request.parent / "answers.json").write_text(json.dumps(answer(json.loads(options.request.read_text()))))
        return 0
    heads = [int(number) for number in options.heads.split(",")]
    target = options.compile_for or arch()
    compile_lacking(key for num_heads in heads for key in keys_of(num_heads, target))
    if options.compile_for:
        return 0
    wrong = run_all(heads, options.only.split(";") if options.only else [*RUNS], options)
    print(*(wrong or ["all as it has to be"]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
