"""Is a rebuild of the host side visible in the machine code? Digests of every kernel's code for a spread of problems.

    python -m scripts.cubin_digests --out build/before.json      # on the commit before
    python -m scripts.cubin_digests --against build/before.json  # after: exits 1 and lists the kernels whose code differs
    python -m scripts.cubin_digests --only mladecode sm_90a-d128 --against build/before.json  # those that a change concerns

A digest covers the instructions, the launch attributes (`.nv.info`: registers, parameters, barriers) and the sizes of constant and shared
memory. It leaves out symbol names, which hold module paths and the fields of a config.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from elftools.elf.elffile import ELFFile

from fa4_backend import BatchLimits, plan_attention
from fa4_backend.compile import CompileKey, compile_to_object
from fa4_backend.problem import FP8, LATENT, RAGGED, UnsupportedProblem
from tests.support.problems import make_problem

ARCHS = ("sm_90a", "sm_100a", "sm_103a")
ORDINARY = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "head_dim_v": 128, "dtype": "bfloat16", "page_size": 16}
RAGGED_KV = {"kv_source": RAGGED, "page_size": 1, "has_lse": True}
LATENTS = {"kv_source": LATENT, "num_kv_heads": 1, "head_dim": 576, "head_dim_v": 512, "page_size": 64, "has_lse": True}
# (fields of the problem that differ from ORDINARY, decode_query_len), on every arch
CASES: tuple[tuple[dict[str, object], int], ...] = (
    ({}, 1),
    ({"batch_invariant": True, "has_lse": True}, 4),
    ({"batch_invariant": True, "exact": True}, 1),
    ({"head_dim": 64, "head_dim_v": 64, "has_sinks": True, "has_window_left": True, "num_q_heads": 64}, 1),
    ({"head_dim": 96, "head_dim_v": 96, "has_softcap": True, "dtype": "float16", "page_size": 64}, 1),
    ({"head_dim": 192, "head_dim_v": 128, "has_alibi": True, "num_kv_heads": 32}, 1),
    ({"head_dim": 256, "head_dim_v": 256, "num_q_heads": 16, "num_kv_heads": 2}, 1),
    ({"is_causal": False, "has_window_left": True, "has_window_right": True, "page_size": 784}, 2),
    ({"kv_dtype": FP8}, 1),
    ({"kv_dtype": FP8, "dtype": "float16", "batch_invariant": True}, 4),
    ({"kv_dtype": FP8, "q_dtype": FP8}, 1),
    ({"out_dtype": FP8, "has_sinks": True, "has_softcap": True}, 1),
    (RAGGED_KV, 1),
    ({**RAGGED_KV, "head_dim": 192, "num_kv_heads": 32, "is_causal": False}, 1),
    ({**LATENTS, "num_q_heads": 128}, 1),
    ({**LATENTS, "num_q_heads": 16, "batch_invariant": True}, 2),
    ({**LATENTS, "num_q_heads": 16, "kv_dtype": FP8}, 1),
    ({**LATENTS, "num_q_heads": 128, "kv_dtype": FP8}, 2),
)
LIMITS = {"max_num_seqs": 256, "max_num_tokens": 8192, "max_seqlen_k": 32768, "convert_keys": 32768}


def code_digest(cubin: Path) -> str:
    """Digest of what a cubin makes the chip do; names left out."""
    digest = hashlib.sha256()
    with cubin.open("rb") as file:
        for section in ELFFile(file).iter_sections():
            kind = next((kind for kind in (".text.", ".nv.info.", ".nv.constant", ".nv.shared.") if section.name.startswith(kind)), None)
            if kind in (".text.", ".nv.info."):
                digest.update(kind.encode() + section.data())
            elif kind:
                digest.update(f"{kind}{section['sh_size']}".encode())
    return digest.hexdigest()[:16]


def distinct_keys() -> dict[str, CompileKey]:
    """name -> compile key of all kernels that the plans of `CASES` launch; of a problem that an arch refuses, none."""
    keys: dict[str, CompileKey] = {}
    for arch in ARCHS:
        for facts, decode_query_len in CASES:
            try:
                plan = plan_attention(
                    make_problem(arch=arch, **{**ORDINARY, **facts}), BatchLimits(**LIMITS, decode_query_len=decode_query_len)
                )
            except UnsupportedProblem as refusal:
                print(f"left out: {refusal}")
                continue
            keys |= {key.name: key for key in plan.keys}
    return keys


def digest_of(key: CompileKey) -> str:
    """Digest of the code that `key` compiles to."""
    with tempfile.TemporaryDirectory() as folder:
        compile_to_object(key, Path(folder) / "kernel")
        return code_digest(Path(folder) / "kernel.cubin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", nargs="+", default=[""], help="texts: kernels whose name holds one of them")
    arguments = parser.parse_args()
    keys = {name: key for name, key in distinct_keys().items() if any(text in name for text in arguments.only)}
    with ProcessPoolExecutor(2) as pool:
        found = dict(zip(keys, pool.map(digest_of, keys.values()), strict=True))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1, sort_keys=True))
    if arguments.against:
        before = set(json.loads(arguments.against.read_text()).values())  # by digest: a rebuild may rename a kernel
        differing = [name for name, digest in found.items() if digest not in before]
        print(f"{len(found)} kernels, {len(differing)} differ" + "".join(f"\n  {name}" for name in differing))
        sys.exit(bool(differing))
    print(f"{len(found)} kernels")


if __name__ == "__main__":
    main()
