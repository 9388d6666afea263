"""Races of the Blackwell prefill kernel under random schedules: every compile key of the tests, 100 seeds each, results against the oracle.

    python -m scripts.sm100_races [seeds] > docs/data/sm100_races.json

Each seed draws when warps run and when TMA, MMAs and commits finish. A run counts as right when it has no race, no misuse of a barrier, no
deadlock, and the output is within the error budget with bits equal to the deterministic schedule's.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import torch

from fa4_backend.kernel_stamp import make_stamp
from fa4_backend.problem import FP8
from tests.support.emulated_prefill import Cuts, run_prefill
from tests.support.paged_case import PagedCase

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


# Items cut along KV, on several CTAs or pairs: slots, counters and whoever comes last.
CUT = {
    "parts": replace(BASE, query_lens=(70, 17, 3), kv_lens=(700, 300, 20), page_size=64),
    "parts, all score features": replace(
        BASE, query_lens=(70, 17), kv_lens=(500, 300), sinks=True, alibi=True, softcap=20.0, window_left=350
    ),
}
CUT_PAIRED = {
    "parts, CTA pairs, d256": replace(BASE, query_lens=(140, 17), kv_lens=(500, 300), head_dim=256),
    "parts, FP8 K and V, CTA pairs": replace(BASE, kv_dtype=FP8, query_lens=(70, 17), kv_lens=(500, 300)),
}
CUTS = Cuts((3, 2, 2))


def run_case(case: PagedCase, seeds: int, cta_group: int = 1, cuts: Cuts | None = None) -> dict[str, object]:
    """One case under all seeds."""
    started = time.process_time()
    key = case.plan().kernels.prefill.with_tuning(cta_group=cta_group)
    if cuts is not None:
        cuts = replace(cuts, parts=cuts.parts[: len(case.query_lens)])
    num_ctas = 1 if cuts is None else 3
    first = run_prefill(case, num_ctas=num_ctas, key=key, cuts=cuts)
    first.check()
    rows = first.built.total_q
    races = different = instructions = 0
    for seed in range(seeds):
        done = run_prefill(case, num_ctas=num_ctas, seed=seed, key=key, cuts=cuts)
        races += len(done.report.races)
        instructions += done.report.instructions
        done.built.check(done.out, done.lse, padding_is_zero=done.zeroes_padding)
        different += not (torch.equal(done.out[:rows], first.out[:rows]) and torch.equal(done.lse[:, :rows], first.lse[:, :rows]))
    return {
        "key": key.name,
        "seeds": seeds,
        "races": races + len(first.report.races),
        "runs with other bits": different,
        "warp instructions": instructions,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def main() -> int:
    """Print the results as JSON; exit 1 when a run had a race or other bits."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    results = {}
    for name, case in (CASES | PAIRED | FP8_CASES | FP8_PAIRED | CUT | CUT_PAIRED).items():
        cuts = CUTS if name in CUT | CUT_PAIRED else None
        results[name] = run_case(case, seeds, cta_group=2 if name in PAIRED | FP8_PAIRED | CUT_PAIRED else 1, cuts=cuts)
        print(name, results[name], file=sys.stderr, flush=True)
    json.dump({"stamp": make_stamp("emulator", ("sm100",)), **results}, sys.stdout, indent=1)
    print()
    return int(any(r["races"] or r["runs with other bits"] for r in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
