"""A wheel with compiled kernels in it: `python scripts/build_wheel.py --arch sm_90a --arch sm_100a --out dist`.

    --shape 32/8,128 [--shape 16/2,256:fp8,window,sinks,softcap] ...   heads and head_dim, then what the mask or the cache has
    --machine aarch64     for Grace hosts: CC then names a clang that makes its code ("python -m ziglang cc -target aarch64-linux-gnu")

Kernels are compiled into `fa4_backend/prebuilt` (an ignored folder) and the wheel is built from the tree. A shape means the kernels of a
tensor-parallel rank too: they depend on query heads a KV head, not on how many there are. With no shape the wheel has no kernels.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
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
from fa4_backend.compile_cache import PREBUILT  # noqa: E402
from fa4_backend.problem import FP8, SAME_AS_Q  # noqa: E402

# Query heads a KV head and head_dim of models that racks serve most: Llama 3, Qwen3, GLM-4, MiniMax-M2; gpt-oss, with and without
# windows; Qwen3.5 to 3.8 and Next.
COMMON = (
    "32/8,128", "64/8,128", "48/8,128", "40/8,128", "16/2,128", "64/8,64:sinks", "64/8,64:sinks,window", "16/2,256", "32/8,128:fp8",
    "64/8,128:fp8", "48/8,128:fp8", "16/2,256:fp8",
)  # fmt: skip
DECODE_QUERY_LENS = (1, 2, 4, 8)  # one token, and 1, 3 and 7 drafts
CONVERT_KEYS = 1  # room for any converts: how much there is, is in no kernel
FEATURES = {"window": "has_window_left", "sinks": "has_sinks", "softcap": "has_softcap"}


def problem_of(shape: str, arch: str) -> AttentionProblem:
    """The problem that a shape in words means.

    Raises:
        ValueError: it cannot be read.
    """
    numbers, _, words = shape.partition(":")
    heads, head_dim = numbers.split(",")
    num_q_heads, num_kv_heads = (int(part) for part in heads.split("/"))
    features = [word for word in words.split(",") if word]
    if unknown := set(features) - {*FEATURES, "fp8"}:
        raise ValueError(f"shape {shape}: expected {', '.join((*FEATURES, 'fp8'))} behind the colon, got {', '.join(sorted(unknown))}")
    mask = MaskFeatures(**{field: word in features for word, field in FEATURES.items()})
    return AttentionProblem(
        num_q_heads, num_kv_heads, int(head_dim), int(head_dim), "bfloat16", 16, arch, mask=mask,
        kv_dtype=FP8 if "fp8" in features else SAME_AS_Q, sinks_dtype="bfloat16" if mask.has_sinks else "float32",
    )  # fmt: skip


def keys_of(shapes: list[str], archs: list[str], query_lens: list[int]) -> list[Any]:
    """Compile keys of all kernels; a shape that an arch does not serve is said and left out."""
    keys: dict[Any, None] = {}
    for arch in archs:
        for shape in shapes:
            try:
                for query_len in query_lens:
                    kernels = plan_attention(problem_of(shape, arch), BatchLimits(256, 8192, 131072, query_len, CONVERT_KEYS)).kernels
                    assert kernels is not None
                    keys |= dict.fromkeys(kernels.keys)
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
    parser.add_argument("--machine", default=platform.machine(), help="that will load the kernels: x86_64 or aarch64")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-kernels", action="store_true")
    options = parser.parse_args()
    shutil.rmtree(PREBUILT, ignore_errors=True)
    keys = (
        []
        if options.no_kernels
        else keys_of(options.shape or [*COMMON], options.arch or [*ARCHS], options.query_len or [*DECODE_QUERY_LENS])
    )
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for folder in pool.map(prebuilt.add, keys, [options.machine] * len(keys)):
            print(folder.relative_to(PREBUILT), flush=True)
    wheel = build(options.out, options.machine)
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB, {len(keys)} kernels for {options.machine}")


if __name__ == "__main__":
    main()
