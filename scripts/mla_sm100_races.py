"""Races of Blackwell's latent decode kernel under random schedules: shapes of every kind, results against the oracle.

    python -m scripts.mla_sm100_races [seeds [name ...]] > docs/data/mla_sm100_races.json

Each seed draws when warps run and when TMA, MMAs and commits finish. A run counts as right when it has no race, no misuse of a barrier, no
deadlock, and the output is within the error budget with bits equal to the deterministic schedule's.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fa4_backend.problem import FP8
from tests.support.emulated_mla import MlaCase, run_mla
from tests.support.seeded_runs import SeededCase, main

FEW = MlaCase((1, 1, 1, 0, 1, 1), (130, 64, 0, 70, 1, 300), arch="sm_100a")
DRAFTS = MlaCase((4, 1, 3, 2), (200, 65, 3, 1), num_heads=32, decode_query_len=4, page_size=16, one_q=True, arch="sm_100a")
CASES = {
    "16 heads": FEW,
    "16 heads, sm_103a": replace(FEW, arch="sm_103a"),
    "drafts, more tokens than keys": DRAFTS,
    "drafts, page 32": replace(DRAFTS, page_size=32),
    "drafts, page 64": replace(DRAFTS, page_size=64),
    "drafts, page 128": replace(DRAFTS, page_size=128),
    "drafts, peaked": replace(DRAFTS, kv_lens=(390, 300, 3, 129), peaked=20.0),
    "128 heads": MlaCase((1, 1), (300, 129), num_heads=128, arch="sm_100a"),
    "24 heads, 3 tokens: tiles that begin inside a token": MlaCase(
        (3, 1), (300, 63), num_heads=24, decode_query_len=3, page_size=48, arch="sm_100a"
    ),
    "8 heads, 8 tokens, float16": MlaCase((8, 5), (140, 266), num_heads=8, decode_query_len=8, dtype="float16", peaked=8.0, arch="sm_100a"),
    "128 heads, 3 tokens": MlaCase((3, 2), (390, 20), num_heads=128, decode_query_len=3, arch="sm_100a"),
    "batch invariant": MlaCase((1, 1), (1200, 65), num_heads=128, batch_invariant=True, max_seqlen_k=2048, arch="sm_100a"),
    "CTAs that leave their sums to the last": replace(FEW, tuning=(("arrival_looks", 1),)),
}
CASES |= {f"FP8, {name}": replace(case, kv_dtype=FP8) for name, case in CASES.items() if case.dtype == "bfloat16"}


def seeded(case: MlaCase) -> SeededCase:
    """The case on six CTAs."""

    def run(seed: int | None) -> list[torch.Tensor]:
        done = run_mla(case, num_sms=6, seed=seed)
        done.check()
        return list(done.rows)

    return SeededCase(run, ("schedule", "mla_decode/sm100"))


SEEDED = {name: seeded(case) for name, case in CASES.items()}

if __name__ == "__main__":
    raise SystemExit(main(SEEDED))
