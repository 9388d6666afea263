"""What one 256 x 128 x 128 tile costs: instructions counted by the emulator, ours beside upstream flash-attn-4's.

    python -m scripts.sm100_counts > docs/data/sm100_counts.json

Each kernel runs one work item of 256 query rows (one head, bf16, head_dim 128, causal, bottom-right) against 1024 and against 1152 keys;
the difference is one KV block that no mask touches, in steady state. Register moves (mov, and the packing of register pairs) are left out:
the assembler removes nearly all of them. Everything else is a PTX instruction a warp issued. CTA pairs work on 512 rows: one CTA's share is
given.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

from fa4_backend.emulator import flash_attention

flash_attention.prepare("sm_100a")

import torch  # noqa: E402

from fa4_backend import emulator  # noqa: E402
from fa4_backend.kernel_stamp import make_stamp  # noqa: E402
from fa4_backend.problem import FP8, SAME_AS_Q  # noqa: E402
from tests.support.emulated_prefill import run_prefill  # noqa: E402
from tests.support.paged_case import PagedCase  # noqa: E402

ROWS, BLOCK, HEAD_DIM = 256, 128, 128
SHORT, LONG = 8 * BLOCK, 9 * BLOCK
# Warps of each role; upstream's kernel has the same layout for its first thirteen warps.
ROLES = {"softmax": range(8), "correction": range(8, 12), "others": range(12, 16)}
SCHEDULERS = 4  # of an SM; warp w runs on scheduler w % 4


def width(opcode: str) -> int:
    """Registers that a TMEM instruction of shape 32x32b moves a thread."""
    return next((int(part[1:]) for part in opcode.split(".") if part[:1] == "x" and part[1:].isdigit()), 0)


def classify(opcode: str) -> str | None:
    """The unit an instruction mainly uses; None for register moves."""
    base = opcode.split(".")[0]
    if base == "mov" or opcode.startswith(("cvta", "ld.param")):
        return None
    if base in ("ex2", "lg2", "rcp", "tanh"):
        return "mufu"
    if base in ("fma", "add", "sub", "mul") and ".f32x2" in opcode:
        return "fma_packed"
    if base in ("fma", "add", "sub", "mul") and ".f32" in opcode:
        return "fma_scalar"
    if opcode.startswith("cvt.f32.f16"):
        return "fma_scalar"  # ptxas makes it HADD2.F32
    if base == "cvt" and (".f32" in opcode or ".e4m3" in opcode):
        return "convert"
    if base in ("max", "min") and ".f32" in opcode:
        return "float_max"
    if base == "tcgen05":
        return "tcgen05"
    if base in ("mbarrier", "bar", "barrier", "fence", "elect", "vote"):
        return "synchronise"
    if base in ("ld", "st"):
        return "memory"
    return "integer_and_control"


def counts(report: emulator.Report) -> dict[str, Counter[str]]:
    """Role -> unit -> warp instructions, with bytes of TMEM and shared memory as extra units."""
    result: dict[str, Counter[str]] = {role: Counter() for role in ROLES}
    for kernel in report.kernels.values():
        for role, warps in ROLES.items():
            executed = kernel.executed[list(warps)].sum(axis=0)
            for instruction, number in zip(kernel.program.kernel.instructions, executed.tolist(), strict=False):
                opcode = instruction.opcode
                unit = classify(opcode)
                if not number or unit is None:
                    continue
                result[role][unit] += number
                result[role]["issue_slots"] += number
                if opcode.startswith(("tcgen05.ld", "tcgen05.st")):
                    result[role]["tmem_bytes"] += number * width(opcode) * 32 * 4
                if opcode.startswith("tcgen05.mma"):
                    result[role]["mma_instructions"] += number
                if ".shared" in opcode and opcode.startswith(("ld.", "st.")):
                    result[role]["shared_bytes"] += number * 32 * 4 * (4 if ".v4" in opcode else 1)
    return result


def steady_state(run: Any) -> dict[str, dict[str, int]]:
    """Counts of one KV block: a run with LONG keys less one with SHORT keys."""
    short, long = counts(run(SHORT)), counts(run(LONG))
    ctas = getattr(run, "ctas", 1)
    return {role: {unit: (number - short[role][unit]) // ctas for unit, number in sorted(long[role].items())} for role in ROLES}


def ours(kv_dtype: str = SAME_AS_Q, q_dtype: str = SAME_AS_Q, arch: str = "sm_100a", **tuning: float) -> Any:
    """A runner of our kernel."""

    def run(num_keys: int) -> emulator.Report:
        case = PagedCase(
            (ROWS * run.ctas,), (num_keys,), num_q_heads=1, num_kv_heads=1, head_dim=HEAD_DIM, page_size=128,
            arch=f"emulated-{arch}", kv_dtype=kv_dtype, q_dtype=q_dtype,
        )  # fmt: skip
        key = case.plan().kernels.prefill
        if "rescale_threshold" in tuning:
            kernel = replace(key.kernel, tile=replace(key.kernel.tile, rescale_threshold=tuning["rescale_threshold"]))
            key = replace(key, kernel=kernel)
        else:
            key = key.with_tuning(**tuning)
        done = run_prefill(case, num_ctas=1, key=key, detect_races=False)
        done.check()
        return done.report

    run.ctas = int(tuning.get("cta_group", 1))
    return run


def upstream(num_keys: int) -> emulator.Report:
    """flash-attn-4's dense causal kernel on the same problem."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, HEAD_DIM, generator=generator).bfloat16() for n in (ROWS, num_keys, num_keys))
    with emulator.session(arch="sm_100a", detect_races=False) as emu:
        flash_attention.forward(emu, q, k, v, causal=True, softmax_scale=HEAD_DIM**-0.5, return_lse=True)
    return emu.report


def main() -> int:
    """Print the counts as JSON."""
    kernels = {
        "ours": ours(),
        "upstream": upstream,
        "ours, polynomial share 0": ours(polynomial_every=0),
        "ours, polynomial share 1": ours(polynomial_every=1),
        "ours, polynomial degree 3": ours(polynomial_degree=3),
        "ours, rescale threshold 0": ours(rescale_threshold=0.0),
        "ours, CTA pairs": ours(cta_group=2),
        "ours, FP8 K and V, CTA pairs": ours(FP8, cta_group=2),
        "ours, FP8 K and V, one CTA": ours(FP8, cta_group=1),
        "ours, FP8 Q, K and V": ours(FP8, FP8),
        "ours, FP8 Q, K and V, sm_103a": ours(FP8, FP8, "sm_103a"),
    }
    counts = {name: steady_state(run) for name, run in kernels.items()}
    json.dump({"stamp": make_stamp("emulator", ("sm100",)), **counts}, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
