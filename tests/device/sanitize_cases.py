"""One process of `tests.device.sanitize`: short poisoned batches, run once each under a tool of compute-sanitizer.

    compute-sanitizer --tool memcheck --kernel-name kns=kernel_cutlass python -m tests.device.sanitize_cases --kind prefill --kv-dtype fp8

The tools make everything slow that they watch, so batches are drawn and judged on the CPU, and the filter leaves our kernels alone to be
watched. Every tensor is an allocation of its own, or memcheck would not see an access behind its end. Each batch runs twice: as it is
planned for the GPU, and as for one of few SMs, whose CTAs then use every buffer again and again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fa4_backend import AttentionPlan
from fa4_backend.arch import arch_of_capability
from fa4_backend.arguments import AttentionArguments
from fa4_backend.problem import FP8, SAME_AS_Q
from tests.device.fuzz_all import compile_all
from tests.device.prove_decode import kernel_setups, mixed_setups, narrow_setups
from tests.device.prove_prefill import LENGTHS, prepare_case
from tests.support.fuzz import FuzzSetup, prefill_plan
from tests.support.fuzz_setups import case_of, prefill_setups
from tests.support.paged_case import BuiltCase, PagedCase, move_strided

KINDS: dict[str, Callable[[str, str], list[FuzzSetup]]] = {
    "prefill": lambda arch, kv_dtype: prefill_setups(arch, kv_dtype) + narrow_setups(arch, kv_dtype),
    "decode": kernel_setups,
    "mixed": mixed_setups,
}
KV_DTYPES = {"auto": SAME_AS_Q, "fp8": FP8}
LAYOUTS = ("nhd", "hnd", "separate")
PLANTS = ("seqused_k", "page_table")
FEW_SMS = 6


def short_case(kind: str, setup: FuzzSetup, layout: str) -> PagedCase:
    """A batch of the setup's problem whose lengths stand at edges of tiles, pages and parts."""
    n = setup.decode_query_len
    if kind == "prefill" and not setup.is_narrow:
        lens = ((60,), (2100,)) if setup.max_kv > 2000 else LENGTHS
    elif setup.has_messages:
        lens = (1, setup.max_query, 0, n, 5), (900, 140, 7, 64, 33)
    elif kind == "mixed":
        lens = (1, 100, 0, n, 33), (900, 140, 7, 64, 33)
    elif setup.max_kv > 2000:
        lens = (n, 1, n), (2049, 700, 0)
    else:
        lens = (1, n, 0, n, 1, n), (130, 129, 128, 64, 1, 17)
    return case_of(setup, *lens, layout=layout)


def chosen_cases(kind: str, arch: str, kv_dtype: str, only: str = "", shard: str = "0/1") -> list[tuple[FuzzSetup, PagedCase]]:
    """Setups whose name begins with one of `only` (apart by semicolons), every n-th from the i-th on ("i/n"), and their batches."""
    first, step = map(int, shard.split("/"))
    setups = [setup for setup in KINDS[kind](arch, KV_DTYPES[kv_dtype]) if setup.name.startswith(tuple(only.split(";")))]
    return [(setup, short_case(kind, setup, LAYOUTS[index % 3])) for index, setup in enumerate(setups)][first::step]


def plans_of(chosen: Sequence[tuple[FuzzSetup, PagedCase]]) -> list[AttentionPlan]:
    """What the batches need compiled."""
    plans = [(setup, case.plan()) for setup, case in chosen]
    return [prefill_plan(plan) if setup.prefill_only else plan for setup, plan in plans]


def run(kind: str, setup: FuzzSetup, case: PagedCase) -> dict[str, float]:
    """Run one batch on the GPU, for all its SMs and for few; the larger errors against the oracle, and their budgets.

    Raises:
        AssertionError: it is wrong.
    """
    drawn = case.build("cpu")
    a = AttentionArguments(*(move_strided(x, "cuda") if isinstance(x, torch.Tensor) else x for x in drawn.arguments))
    built = BuiltCase(case, a, drawn.total_q)
    assert a.lse is not None
    seen = []
    for num_sms in (torch.cuda.get_device_properties(0).multi_processor_count, FEW_SMS):
        a.out.fill_(math.nan)
        a.lse.fill_(math.nan)
        if kind == "prefill" and not setup.is_narrow:
            prepare_case(built, setup.min_part_blocks, num_sms)()
        else:
            built.run(case.plan(num_sms), setup.min_part_blocks)
        seen.append(asdict(drawn.check(a.out.cpu(), a.lse.cpu())))
    return {name: max(errors[name] for errors in seen) for name in seen[0]}


class BeyondItsEnd:
    """What torch takes for `length` 32-bit integers where one was allocated."""

    def __init__(self, length: int) -> None:
        self.one = torch.ones(1, dtype=torch.int32, device="cuda")
        self.__cuda_array_interface__ = {"shape": (length,), "typestr": "<i4", "data": (self.one.data_ptr(), False), "version": 3}


def plant(name: str, kind: str, case: PagedCase) -> None:
    """A batch one of whose tensors lies in an allocation for a single element: does the tool watch who reads it? KV lengths are read by the
    schedule alone, the page table by the prefill kernel alone, or in a batch of decode rows by the decode kernel."""
    drawn = case.build("cpu")
    a = AttentionArguments(*(move_strided(x, "cuda") if isinstance(x, torch.Tensor) else x for x in drawn.arguments))
    whole = getattr(a, name)
    beyond = BeyondItsEnd(whole.numel())
    planted = torch.as_tensor(beyond, device="cuda").view(whole.shape)
    built = BuiltCase(case, a._replace(**{name: planted}), drawn.total_q)
    if kind == "prefill":
        prepare_case(built)()
    else:
        built.run(case.plan(torch.cuda.get_device_properties(0).multi_processor_count))


def main() -> int:
    """Compile, or run the chosen batches; exit status 1 when one was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="prefill")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="auto", help="of K and V; auto: that of q")
    parser.add_argument("--only", default="", help="setups whose name begins so; several apart by semicolons")
    parser.add_argument("--shard", default="0/1", help="every n-th setup from the i-th on: i/n")
    parser.add_argument("--compile", action="store_true", help="compile what they need and stop; nothing is launched")
    parser.add_argument("--plant", choices=PLANTS, help="read this tensor past the end of its allocation instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read at the first allocation
    arch = arch_of_capability(*torch.cuda.get_device_capability())
    assert arch is not None, torch.cuda.get_device_name()
    chosen = chosen_cases(options.kind, arch, options.kv_dtype, options.only, options.shard)
    assert chosen, f"--only: expected the beginning of a setup's name, got {options.only!r}"
    compile_all(plans_of(chosen), 1)
    if options.compile:
        return 0
    if options.plant:
        plant(options.plant, options.kind, chosen[0][1])
        return 0
    begin, results = time.perf_counter(), []
    for setup, case in chosen:
        row = {"case": setup.name, "ok": True, "why": ""}
        try:
            row |= run(options.kind, setup, case)
        except AssertionError as error:
            row |= {"ok": False, "why": str(error)[:200]}
        results.append(row)
        print(f"{time.perf_counter() - begin:.0f} s", row, flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{sum(row['ok'] for row in results)} of {len(results)} batches right", flush=True)
    return int(not all(row["ok"] for row in results))


if __name__ == "__main__":
    raise SystemExit(main())
