"""Is a rebuild of the host side visible in the machine code? Digests of every kernel's code for a spread of problems.

    python -m scripts.cubin_digests --out build/before.json      # on the commit before
    python -m scripts.cubin_digests --against build/before.json  # after: exits 1 and lists the kernels whose code differs

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

# (what is compiled, by arch, fields of the problem beside 32/8 heads of 128 in bfloat16 with pages of 16, decode_query_len)
CASES: list[tuple[str, dict[str, object], int]] = [
    (arch, facts, decode_query_len)
    for arch in ("sm_90a", "sm_100a", "sm_103a")
    for facts, decode_query_len in (
        ({}, 1),
        ({"batch_invariant": True, "has_lse": True}, 4),
        ({"batch_invariant": True, "exact": True}, 1),
        ({"head_dim": 64, "head_dim_v": 64, "has_sinks": True, "has_window_left": True, "num_q_heads": 64}, 1),
        ({"head_dim": 96, "head_dim_v": 96, "has_softcap": True, "dtype": "float16", "page_size": 64}, 1),
        ({"head_dim": 192, "head_dim_v": 128, "has_alibi": True, "num_kv_heads": 32}, 1),
        ({"is_causal": False, "has_window_left": True, "has_window_right": True, "page_size": 784}, 2),
    )
]
HOPPER_CASES: list[tuple[str, dict[str, object], int]] = [
    ("sm_90a", {"head_dim": 256, "head_dim_v": 256, "num_q_heads": 16, "num_kv_heads": 2}, 1)
]


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


def digests_of(case: tuple[str, dict[str, object], int]) -> dict[str, str]:
    """name -> digest of every kernel that one problem's plan launches."""
    from fa4_backend import BatchLimits, plan_attention
    from fa4_backend.compile import compile_to_object
    from tests.support.problems import make_problem

    arch, facts, decode_query_len = case
    ordinary = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "head_dim_v": 128, "dtype": "bfloat16", "page_size": 16}
    problem = make_problem(arch=arch, **{**ordinary, **facts})
    plan = plan_attention(problem, BatchLimits(256, 8192, 32768, decode_query_len))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for key in plan.kernels.keys if plan.kernels else ():
            compile_to_object(key, Path(folder) / key.name)
            found[f"{arch} {key.name}"] = code_digest(Path(folder) / f"{key.name}.cubin")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    found: dict[str, str] = {}
    with ProcessPoolExecutor(2) as pool:
        for digests in pool.map(digests_of, CASES + HOPPER_CASES):
            found.update(digests)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1, sort_keys=True))
    if arguments.against:
        # In order, since a rebuild may rename a kernel.
        before = json.loads(arguments.against.read_text())
        differing = [name for name, digest in found.items() if digest not in before.values()]
        print(f"{len(found)} kernels, {len(differing)} differ" + "".join(f"\n  {name}" for name in differing))
        sys.exit(bool(differing))
    print(f"{len(found)} kernels")


if __name__ == "__main__":
    main()
