"""Races of the Blackwell prefill kernel under random schedules: every compile key of the tests, 100 seeds each, results against the oracle.

    python -m scripts.sm100_races [seeds [name ...]] > docs/data/sm100_races.json

Each seed draws when warps run and when TMA, MMAs and commits finish. A run counts as right when it has no race, no misuse of a barrier, no
deadlock, and the output is within the error budget with bits equal to the deterministic schedule's.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fa4_backend.problem import FP8
from tests.support.emulated_prefill import Cuts, run_prefill
from tests.support.paged_case import PagedCase
from tests.support.seeded_runs import SeededCase, main

# Two items on one CTA, more K and V tiles than the ring holds, tails in both: every barrier goes through several phases.
BASE = PagedCase((5, 40), (301, 17), num_q_heads=2, num_kv_heads=1, head_dim=128, page_size=16, arch="emulated-sm_100a")
CASES = {
    "causal": BASE,
    "full attention, page 64": replace(BASE, is_causal=False, page_size=64),
    "d64": replace(BASE, head_dim=64),
    "d96, 3 to 1, page 48": replace(BASE, head_dim=96, num_q_heads=3, page_size=48),
    "d192 and 128, page 256": replace(BASE, head_dim=192, head_dim_v=128, num_q_heads=1, page_size=256),
    "fp16, 5 to 1": replace(BASE, dtype="float16", num_q_heads=5),
    "windows": replace(BASE, is_causal=False, window_left=90, window_right=20),
    "all score features": replace(BASE, sinks=True, alibi=True, softcap=20.0, window_left=60),
    "peaked rows": replace(BASE, peaked=20.0),  # moves the reference maximum, and so rescales O, in most blocks
    "sm_103a": replace(BASE, arch="emulated-sm_103a"),
}
# Items of two query tiles a CTA in both CTAs of a pair, and one that leaves a CTA without queries.
PAIRED = {
    "CTA pairs, causal": replace(BASE, query_lens=(70, 40)),
    "CTA pairs, full attention, page 64": replace(BASE, query_lens=(140, 40), is_causal=False, page_size=64),
    "CTA pairs, d192 and 128, page 256": replace(BASE, query_lens=(300, 40), head_dim=192, head_dim_v=128, num_q_heads=1, page_size=256),
    "CTA pairs, d192 and 128, full attention, page 16": replace(
        BASE, query_lens=(300, 140), head_dim=192, head_dim_v=128, num_q_heads=1, is_causal=False
    ),
    "CTA pairs, d192 and 128, fp16, 3 to 1, window": replace(
        BASE, query_lens=(100, 40), head_dim=192, head_dim_v=128, num_q_heads=3, window_left=90, dtype="float16"
    ),
    "CTA pairs, d256": replace(BASE, query_lens=(140, 40), head_dim=256),
    "CTA pairs, d256, peaked rows, page 64": replace(BASE, query_lens=(70, 40), head_dim=256, peaked=20.0, page_size=64),
    "CTA pairs, d256, windows": replace(BASE, query_lens=(140, 40), head_dim=256, is_causal=False, window_left=90, window_right=20),
    "CTA pairs, d256, all score features": replace(
        BASE, query_lens=(140, 40), head_dim=256, sinks=True, alibi=True, softcap=20.0, window_left=60
    ),
    "CTA pairs, fp16, 5 to 1": replace(BASE, dtype="float16", num_q_heads=5),
    "CTA pairs, windows": replace(BASE, query_lens=(70, 40), is_causal=False, window_left=90, window_right=20),
    "CTA pairs, all score features": replace(BASE, query_lens=(70, 40), sinks=True, alibi=True, softcap=20.0, window_left=60),
    "CTA pairs, peaked rows": replace(BASE, query_lens=(70, 40), peaked=20.0),
}


# The convert warps' turns with the correction: items of one, two and three blocks, tiles with an edge.
FP8_CASES = {
    "FP8 K and V, d64": replace(BASE, kv_dtype=FP8, head_dim=64),
    "FP8 K and V, d96, 3 to 1, page 48": replace(BASE, kv_dtype=FP8, head_dim=96, num_q_heads=3, page_size=48),
    "FP8 K and V, d128, one CTA": replace(BASE, kv_dtype=FP8),
}
FP8_PAIRED = {
    "FP8 K and V, CTA pairs, causal": replace(BASE, kv_dtype=FP8, query_lens=(70, 40)),
    "FP8 K and V, CTA pairs, one block an item": replace(BASE, kv_dtype=FP8, query_lens=(40, 4, 3), kv_lens=(120, 0, 17)),
    "FP8 K and V, CTA pairs, windows": replace(BASE, kv_dtype=FP8, query_lens=(70, 40), is_causal=False, window_left=90, window_right=20),
    "FP8 K and V, CTA pairs, fp16, all score features": replace(
        BASE, kv_dtype=FP8, dtype="float16", query_lens=(70, 40), sinks=True, alibi=True, softcap=20.0, window_left=60
    ),
    "FP8 K and V, CTA pairs, d256, peaked rows": replace(BASE, kv_dtype=FP8, query_lens=(140, 40), head_dim=256, peaked=20.0),
    "FP8 K and V, CTA pairs, d192 and 128": replace(
        BASE, kv_dtype=FP8, query_lens=(300, 40), head_dim=192, head_dim_v=128, num_q_heads=1, page_size=256
    ),
}


# Form (b): e4m3 in both products, whose tiles have swizzles of 128, 64 and 32 bytes.
FP8_PRODUCTS = {
    f"Q, K and V in FP8, {name}": replace(BASE, kv_dtype=FP8, q_dtype=FP8, **changes)
    for name, changes in {
        "d128": {},
        "d64, page 64": {"head_dim": 64, "page_size": 64},
        "d96, 3 to 1, page 48": {"head_dim": 96, "num_q_heads": 3, "page_size": 48},
        "one block an item": {"query_lens": (40, 4, 3), "kv_lens": (120, 0, 17)},
        "windows": {"is_causal": False, "window_left": 90, "window_right": 20},
        "fp16, all score features": {"dtype": "float16", "sinks": True, "alibi": True, "softcap": 20.0, "window_left": 60},
        "peaked rows": {"peaked": 20.0},
        "sm_103a": {"arch": "emulated-sm_103a"},
    }.items()
}
FP8_PRODUCTS_PAIRED = {
    f"Q, K and V in FP8, CTA pairs, {name}": replace(BASE, kv_dtype=FP8, q_dtype=FP8, **changes)
    for name, changes in {
        "d192 and 128, page 256": {"query_lens": (300, 40), "head_dim": 192, "head_dim_v": 128, "num_q_heads": 1, "page_size": 256},
        "d256": {"query_lens": (140, 40), "head_dim": 256},
        "d256, peaked rows": {"query_lens": (70, 40), "head_dim": 256, "peaked": 20.0},
    }.items()
}


# Items cut along KV, on several CTAs or pairs: slots, counters and whoever comes last.
CUT = {
    "parts": replace(BASE, query_lens=(70, 17, 3), kv_lens=(700, 300, 20), page_size=64),
    "parts, all score features": replace(
        BASE, query_lens=(70, 17), kv_lens=(500, 300), sinks=True, alibi=True, softcap=20.0, window_left=350
    ),
}
CUT_PAIRED = {
    "parts, CTA pairs, d192 and 128": replace(
        BASE, query_lens=(140, 17), kv_lens=(500, 300), head_dim=192, head_dim_v=128, num_q_heads=1, page_size=64
    ),
    "parts, CTA pairs, d256": replace(BASE, query_lens=(140, 17), kv_lens=(500, 300), head_dim=256),
    "parts, FP8 K and V, CTA pairs": replace(BASE, kv_dtype=FP8, query_lens=(70, 17), kv_lens=(500, 300)),
}
CUTS = Cuts((3, 2, 2))


ALONE = CASES | FP8_CASES | FP8_PRODUCTS | CUT
PAIRS = PAIRED | FP8_PAIRED | FP8_PRODUCTS_PAIRED | CUT_PAIRED


def seeded(case: PagedCase, cta_group: int, is_cut: bool) -> SeededCase:
    """The case on one CTA, or pair, or on three where its tiles are cut."""
    key = case.plan().kernels.prefill.with_tuning(cta_group=cta_group)
    cuts = Cuts(CUTS.parts[: len(case.query_lens)]) if is_cut else None

    def run(seed: int | None) -> list[torch.Tensor]:
        done = run_prefill(case, num_ctas=3 if is_cut else 1, seed=seed, key=key, cuts=cuts)
        done.check()
        rows = done.built.total_q
        return [done.out[:rows], done.lse[:, :rows]]

    return SeededCase(run, ("sm100",), key.name)


SEEDED = {name: seeded(case, 2 if name in PAIRS else 1, name in CUT | CUT_PAIRED) for name, case in (ALONE | PAIRS).items()}

if __name__ == "__main__":
    raise SystemExit(main(SEEDED))
