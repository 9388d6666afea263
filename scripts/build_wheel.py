"""A wheel with compiled kernels in it: `python scripts/build_wheel.py --arch sm_90a --arch sm_100a --out dist`.

    --shape 32/8,128 [--shape 16/2,256:fp8,window,sinks,softcap] ...   heads and head_dim, then what the mask or the cache has
    --shape 32/8,128:fp8out     out in FP8, as vLLM's fusion behind attention wants it of quantised checkpoints
    --shape 16/1,576/512   MLA with 16 heads on a GPU: decode, and prompts of as many heads of 192/128
    --page-size 16 --page-size 64 --max-num-seqs 1024 ...              the engines' settings that kernels depend on
    --machine aarch64     for Grace hosts: CC then names a clang that makes its code ("python -m ziglang cc -target aarch64-linux-gnu")

Kernels are compiled into `fa4_backend/prebuilt` (an ignored folder) and the wheel is built from the tree. A shape means the kernels of a
tensor-parallel rank too: they depend on query heads a KV head, not on how many there are; those of MLA on the heads of a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fa4_backend import (  # noqa: E402
    AttentionProblem,
    BatchLimits,
    MaskFeatures,
    UnsupportedProblem,
    plan_attention,
    prebuilt,
)
from fa4_backend.arch import ARCHS  # noqa: E402
from fa4_backend.commands.shapes import dims_of, heads_of  # noqa: E402
from fa4_backend.compile_cache import PREBUILT  # noqa: E402
from fa4_backend.kernels.schedule.config import schedule_config  # noqa: E402
from fa4_backend.model_config import prompt_problems  # noqa: E402
from fa4_backend.problem import FP8, LATENT, PAGED  # noqa: E402
from fa4_backend.split_rows import message_limits  # noqa: E402
from fa4_backend.support import LATENT_PAGE  # noqa: E402

# Query heads a KV head and head_dim of models that racks serve most: Llama 3, Qwen3, GLM-4, MiniMax-M2; gpt-oss, with and without
# windows; Qwen3.5 to 3.8 and Next; DeepSeek-V3 and Kimi-K2 on eight GPUs.
COMMON = (
    "32/8,128", "64/8,128", "48/8,128", "40/8,128", "16/2,128", "64/8,64:sinks", "64/8,64:sinks,window", "16/2,256", "32/8,128:fp8",
    "64/8,128:fp8", "48/8,128:fp8", "16/2,256:fp8", "32/8,128:fp8out", "64/8,128:fp8out", "32/8,128:fp8,fp8out", "64/8,128:fp8,fp8out",
    "16/1,576/512", "8/1,576/512", "16/1,576/512:fp8", "8/1,576/512:fp8",
)  # fmt: skip
DECODE_QUERY_LENS = (1, 2, 4, 8)  # one token, and 1, 3 and 7 drafts
PAGE_SIZES = (16, 64)  # of vLLM and of SGLang where the user names none; latents have 64 with both
# Tables of the schedule: vLLM's defaults are 256 and 1024, SGLang's pool has up to 4096, and steps with messages of MLA have 4096 rows, or
# twice the sequences (`fa4_backend/split_rows.py`).
MAX_NUM_SEQS = (256, 512, 1024, 2048, 4096, 8192)
LATENT_DIMS, PROMPT_DIMS = (576, 512), (192, 128)
CONVERT_KEYS = 1  # room for any converts: how much there is, is in no kernel
DTYPES = {"fp8": "kv_dtype", "fp8out": "out_dtype"}
FEATURES = {"window": "has_window_left", "sinks": "has_sinks", "softcap": "has_softcap"}


def problems_of(shape: str, arch: str, page_sizes: Sequence[int]) -> list[AttentionProblem]:
    """The problems that a shape in words means: one for each page size, and of MLA those of prompts.

    Raises:
        ValueError: it cannot be read.
    """
    numbers, _, words = shape.partition(":")
    heads, _, dims = numbers.partition(",")
    num_heads, head_dims = heads_of(heads), dims_of(dims)
    features = [word for word in words.split(",") if word]
    if unknown := set(features) - {*FEATURES, *DTYPES}:
        raise ValueError(f"shape {shape}: expected {', '.join((*FEATURES, *DTYPES))} behind the colon, got {', '.join(sorted(unknown))}")
    mask = MaskFeatures(**{field: word in features for word, field in FEATURES.items()})
    is_latent = head_dims == LATENT_DIMS
    problems = [
        AttentionProblem(
            *num_heads, *head_dims, "bfloat16", page_size, arch, mask=mask, kv_source=LATENT if is_latent else PAGED,
            sinks_dtype="bfloat16" if mask.has_sinks else "float32", **{DTYPES[word]: FP8 for word in features if word in DTYPES},
        )
        for page_size in ((LATENT_PAGE,) if is_latent else page_sizes)
    ]  # fmt: skip
    return [*problems, *(prompt_problems(problems[0], *PROMPT_DIMS) if is_latent else ())]


def keys_of(
    shapes: Sequence[str], archs: Sequence[str], query_lens: Sequence[int], page_sizes: Sequence[int], max_num_seqs: Sequence[int]
) -> list[Any]:
    """Compile keys of all kernels; a shape that an arch does not serve is said and left out."""
    keys: dict[Any, None] = dict.fromkeys(schedule_config(arch, number) for arch in archs for number in max_num_seqs)
    for arch, shape in itertools.product(archs, shapes):
        try:
            for problem, query_len in itertools.product(problems_of(shape, arch, page_sizes), query_lens):
                limits = BatchLimits(256, 8192, 131072, query_len, CONVERT_KEYS)
                plan = plan_attention(problem, limits)
                assert plan.kernels is not None
                keys |= {key: None for key in plan.keys if key != plan.kernels.schedule}
                if problem.kv_source == LATENT and (messages := message_limits(limits, problem)) is not None:
                    keys |= dict.fromkeys(plan_attention(problem, messages).keys)
        except UnsupportedProblem as reason:
            print(f"{shape} on {arch} is left out: {reason}")
    return [*keys]


def build(out: Path, machine: str) -> Path:
    """The wheel of the tree as it stands, in `out`."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(ROOT)]
    before = {*out.glob("*.whl")} if out.exists() else set()
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools would take files of an earlier wheel along
    subprocess.run(command, check=True, env={**os.environ, "FA4_WHEEL_MACHINE": machine})
    made = {*out.glob("*.whl")} - before or before
    return max(made, key=lambda path: path.stat().st_mtime)


def main() -> None:
    """Compile, build, and say what the wheel holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--shape", action="append", help=f"default: {' '.join(COMMON)}")
    parser.add_argument("--query-len", action="append", type=int, help=f"tokens of a decode row; default: {DECODE_QUERY_LENS}")
    parser.add_argument("--page-size", action="append", type=int, help=f"default: {PAGE_SIZES}; latents have pages of {LATENT_PAGE}")
    parser.add_argument("--max-num-seqs", action="append", type=int, help=f"sequences of a step; default: {MAX_NUM_SEQS}")
    parser.add_argument("--machine", default=platform.machine(), help="that will load the kernels: x86_64 or aarch64")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-kernels", action="store_true")
    options = parser.parse_args()
    shutil.rmtree(PREBUILT, ignore_errors=True)
    asked = (
        options.shape or COMMON, options.arch or [*ARCHS], options.query_len or DECODE_QUERY_LENS, options.page_size or PAGE_SIZES,
        options.max_num_seqs or MAX_NUM_SEQS,
    )  # fmt: skip
    keys = [] if options.no_kernels else keys_of(*asked)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for folder in pool.map(prebuilt.add, keys, [options.machine] * len(keys)):
            print(folder.relative_to(PREBUILT), flush=True)
    wheel = build(options.out, options.machine)
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB, {len(keys)} kernels for {options.machine}")


if __name__ == "__main__":
    main()
