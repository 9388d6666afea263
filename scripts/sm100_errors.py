"""Errors of the Blackwell prefill kernel on the emulator with each of its ideas switched: `python -m scripts.sm100_errors` prints JSON.

Largest error of O and of the lse over three causal batches against the float32 oracle, each as a share of what is allowed
(`tests/support/paged_case.py`): random scores, one dominant key a row, and short rows with soft cap, sinks and ALiBi.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

from fa4_backend.kernel_stamp import make_stamp
from fa4_backend.kernels.sm100.config import Sm100Config
from tests.support.emulated_prefill import run_prefill
from tests.support.paged_case import PagedCase

BASE = PagedCase((300, 70), (600, 300), num_q_heads=4, num_kv_heads=1, head_dim=128, page_size=64, arch="emulated-sm_100a")
CASES = {
    "random": BASE,
    "one dominant key": replace(BASE, peaked=20.0),
    "short rows, all score features": replace(BASE, query_lens=(40, 5), kv_lens=(40, 9), softcap=20.0, sinks=True, alibi=True),
}
KERNELS: dict[str, dict[str, float]] = {
    "ours": {},
    "polynomial share 0": {"polynomial_every": 0},
    "polynomial share 1": {"polynomial_every": 1},
    "polynomial degree 3": {"polynomial_degree": 3},
    "rescale threshold 0": {"rescale_threshold": 0.0},
}


def key_of(case: PagedCase, changes: dict[str, float]) -> Sm100Config:
    """The case's compile key with an idea switched."""
    key = case.plan().kernels.prefill
    if "rescale_threshold" in changes:
        return replace(key, kernel=replace(key.kernel, tile=replace(key.kernel.tile, **changes)))
    return key.with_tuning(**changes)


def main() -> int:
    """Print the errors as JSON: kernel -> case -> shares of the budget of O and of the lse."""
    report: dict[str, dict[str, dict[str, float]]] = {}
    for kernel, changes in KERNELS.items():
        report[kernel] = {}
        for name, case in CASES.items():
            done = run_prefill(case, key=key_of(case, changes), detect_races=False)
            errors = done.built.errors(done.out, done.lse)
            report[kernel][name] = {"out": round(errors.out / errors.out_budget, 3), "lse": round(errors.lse / errors.lse_budget, 3)}
    json.dump({"stamp": make_stamp("emulator", ("sm100",)), **report}, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
