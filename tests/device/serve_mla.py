"""vLLM on a GPU with `--attention-backend FA4` on models with MLA, 16 and 128 heads: log-probabilities beside FLASH_ATTN_MLA.

    python -m tests.device.serve_mla --out results.json [--heads 16,128]

Each engine runs in a process of its own on a small random model whose MLPs are dense (`tests.engines.tiny_mla_models`). What is judged is
the root mean square difference of log-probabilities of tokens that each engine is made to generate, the same ones, from FLASH_ATTN_MLA's:
TRITON_MLA's is the yardstick, which FA4 must keep within `TOO_FAR`, and a softmax scale that is 5 % off must not. With latents in FP8 the
reference stays the 16-bit FLASH_ATTN_MLA and the yardstick is TRITON_MLA in FP8, which rounds queries too. Prefill is vLLM's own in all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fa4_backend.kernel_stamp import gpu_stamp
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
    "FA4, pages of 64": ("FA4", {**EAGER, "block_size": 64}, "TRITON_MLA"),
    "FA4, scale 5% off": ("FA4", EAGER, "TRITON_MLA"),
    "TRITON_MLA, FP8": ("TRITON_MLA", {**EAGER, **FP8}, ""),
    "FA4, FP8": ("FA4", {**EAGER, **FP8}, "TRITON_MLA, FP8"),
    "FA4, FP8, graphs": ("FA4", {**GRAPHS, **FP8}, "TRITON_MLA, FP8"),
}
METRIC = "decode_logprob_rms"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Start an engine in this process; which kernels ran is read from our trace file."""
    from vllm import LLM, SamplingParams

    if request["scale_error"] != 1.0:
        from fa4_backend import mla_decode
        from fa4_integration.vllm_backend import mla_impl

        def off(*tensors: Any, softmax_scale: float, **values: Any) -> Any:
            return mla_decode(*tensors, softmax_scale=softmax_scale * request["scale_error"], **values)

        mla_impl.mla_decode = off
    arguments = {"dtype": "bfloat16", "max_num_batched_tokens": 256, "max_model_len": 1024, "max_num_seqs": 8, "seed": 0}
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


def in_own_process(model: Path, run: str, folder: Path) -> dict[str, Any]:
    """One engine, one process; the end of its log if it fails."""
    backend, arguments, _ = RUNS[run]
    own = folder / f"{model.name}-{run.replace(' ', '_').replace('%', '').replace(',', '')}"
    own.mkdir()
    request = {"model": str(model), "backend": backend, "arguments": arguments, "prompts": make_prompts()}
    (own / "request.json").write_text(json.dumps({**request, "scale_error": 1.05 if "off" in run else 1.0}))
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "FA4_BACKEND_TRACE_FILE": str(own / "trace")}
    if "graphs" in run:
        env["FA4_BACKEND_STRICT"] = "1"  # a compile after warm-up would end it
    command = [sys.executable, "-m", "tests.device.serve_mla", "--request", str(own / "request.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    answers = own / "answers.json"
    if done.returncode or not answers.exists():
        return {"failed": (done.stdout + done.stderr)[-2500:]}
    return json.loads(answers.read_text())


def judge(results: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the runs of one model: engines that failed, answers too far away, a control that is not, kernels not run."""
    wrong = [f"{run} failed" for run, result in results.items() if "failed" in result]
    for run, result in results.items():
        other = RUNS[run][2]
        if not other or "failed" in result or METRIC not in results[other].get("against_reference", {}):
            continue
        far = result["against_reference"][METRIC] > TOO_FAR * results[other]["against_reference"][METRIC]
        if far != ("off" in run):
            wrong.append(f"{run}: {METRIC} {result['against_reference'][METRIC]}, {other} {results[other]['against_reference'][METRIC]}")
        if not any("latent attention" in line for line in result["kernels"]):
            wrong.append(f"{run}: our kernel did not run")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--heads", default="16,128")
    parser.add_argument("--request", type=Path)
    args = parser.parse_args()
    if args.request:
        (args.request.parent / "answers.json").write_text(json.dumps(answer(json.loads(args.request.read_text()))))
        return
    import torch

    from tests.engines.tiny_mla_models import write_deepseek

    every: dict[str, Any] = {"stamp": gpu_stamp(("schedule", "mla_decode"))}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        for num_heads in map(int, args.heads.split(",")):
            model = write_deepseek(
                Path(name) / f"heads{num_heads}", num_heads=num_heads, q_lora_rank=256, hidden=1024, dtype=torch.bfloat16
            )
            results = {run: in_own_process(model, run, Path(name)) for run in RUNS}
            reference = results[REFERENCE]
            for run, result in results.items():
                if "failed" not in result and "failed" not in reference and run != REFERENCE:
                    result["against_reference"] = compare(result, reference)
                print(num_heads, run, result.get("against_reference", result.get("failed", "")), flush=True)
            wrong += [f"{num_heads} heads: {line}" for line in judge(results)]
            kept = ("against_reference", "kernels", "failed")
            every[f"{num_heads} heads"] = {run: {key: r[key] for key in kept if key in r} for run, r in results.items()}
            if args.out:
                args.out.write_text(json.dumps({**every, "wrong": wrong}, indent=1))
    print(*(wrong or ["all as it has to be"]), sep="\n")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
