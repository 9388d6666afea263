"""Proof of the prefill kernel on a GPU: `python -m tests.device.prove_prefill --batches 20000 --json FILE`.

Prints one line a check and writes all of it as data. Parts: poisoned cases against the oracle and bits over repeats;
bits over page sizes; pools above 2^32 elements; rows alone and in a batch in batch-invariant mode; fuzzed ragged
batches. compute-sanitizer has short cases of its own: `tests.device.sanitize`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fa4_backend import AttentionMetadata, AttentionPlan, BatchLimits, plan_attention
from fa4_backend.arch import arch_of_capability
from fa4_backend.arguments import AttentionArguments
from fa4_backend.kernel_stamp import families_of, gpu_stamp
from fa4_backend.kernels.families import CONVERTED
from fa4_backend.kernels.schedule.work_list import PARTIAL_SLOT, QUEUE_TOTAL
from fa4_backend.problem import FP8, SAME_AS_Q
from tests.device.fuzz_all import compile_all, fuzz_all, setup_plans
from tests.support.fuzz import converting_plan, prefill_alone, prefill_plan
from tests.support.fuzz_setups import case_of, prefill_setups
from tests.support.paged_case import BuiltCase, PagedCase, repage
from tests.support.problems import make_problem

LENGTHS = (5, 128, 1, 0, 300, 33, 127), (133, 128, 77, 50, 700, 33, 129)  # of queries, of keys

LARGE_POOLS = ("d128 page 16", "d64 ratio 3 page 16", "d256 page 784")
ONCE = ("once a call: d128 page 16",)  # drawn where K and V in FP8 are converted once a call


def prepare_case(built: BuiltCase, min_part_blocks: int | None = None, num_sms: int | None = None) -> Callable[[], None]:
    """The schedule and the prefill kernel alone, over all rows of a case, or the operator where it converts.

    Args:
        min_part_blocks: as in a FuzzSetup.
        num_sms: as planned for so many; all of the device by default.
    """
    case, a = built.case, built.arguments
    plan = case.plan(num_sms=num_sms or torch.cuda.get_device_properties(0).multi_processor_count)
    if case.converts:
        return partial(_run_converting, built, converting_plan(plan, min_part_blocks))
    plan = prefill_plan(plan)
    metadata = AttentionMetadata.allocate(plan, "cuda")
    work = metadata.work
    assert work is not None
    work.shape = replace(work.shape, decode_query_len=0)
    if min_part_blocks is not None:
        work.shape = replace(work.shape, min_part_blocks=min_part_blocks)

    def run() -> None:
        a.out.fill_(math.nan)
        prefill_alone(metadata, a)
        torch.cuda.synchronize()

    return run


def _run_converting(built: BuiltCase, plan: AttentionPlan) -> None:
    built.arguments.out.fill_(math.nan)
    built.run(plan)
    torch.cuda.synchronize()


def run_case(built: BuiltCase) -> None:
    """`prepare_case` and one run."""
    prepare_case(built)()


def cases(arch: str, kv_dtype: str) -> dict[str, PagedCase]:
    """A poisoned case for each fuzzed problem (same compile keys), with lengths at the edges of tiles and pages."""
    out = {}
    for setup in prefill_setups(arch, kv_dtype):
        out[setup.name] = case_of(setup, *LENGTHS, layout=("nhd", "hnd", "separate")[len(out) % 3])
    first = out["d128 page 16"]
    out["d128 empty rows"] = replace(first, query_lens=(40, 3, 7, 200), kv_lens=(9, 0, 7, 100))
    out["d128 one dominant key"] = replace(first, peaked=20.0)
    return out


def check_cases(arch: str, kv_dtype: str, repeats: int, only: str) -> list[dict]:
    """Every case whose name begins with `only` against the oracle, and the same bits over repeats."""
    results = []
    for name, case in cases(arch, kv_dtype).items():
        if not name.startswith(tuple(only.split(";"))):
            continue
        built = case.build("cuda")
        run = prepare_case(built, 1 if name.endswith(" in parts") else None)
        run()
        first, lse = built.arguments.out.clone(), built.arguments.lse
        assert lse is not None
        row = {"case": name, "ok": True, "why": ""}
        try:
            row |= asdict(built.check(first, lse))
        except AssertionError as error:
            row |= {"ok": False, "why": str(error)[:200]}
        for _ in range(repeats):
            run()
            if not torch.equal(first[: built.total_q], built.arguments.out[: built.total_q]):
                row |= {"ok": False, "why": "bits differ between repeats"}
        results.append(row)
        print(f"{time.process_time():.0f} s, case", row, flush=True)
    return results


def plain_cases(arch: str, kv_dtype: str) -> list[PagedCase]:
    """A case without features for each way to serve its K and V."""
    drawn = cases(arch, kv_dtype)
    return [drawn[name] for name in (*LARGE_POOLS[:1], *ONCE) if name in drawn]


def check_page_sizes(case: PagedCase) -> dict:
    """One batch in pages of 16 to 256 tokens: the same bits."""
    outs = []
    base = case.build("cuda")
    for page_size in (16, 32, 48, 64, 128, 256):
        built = repage(base, page_size)
        run_case(built)
        outs.append(built.arguments.out[: built.total_q].clone())
    result = {"ok": all(torch.equal(out, outs[0]) for out in outs) and bool(outs[0].isfinite().all())}
    print("page sizes", result, flush=True)
    return result


def check_large_pool(
    case: PagedCase, run: Callable[[BuiltCase], object], elements: int = 2**32, device: torch.device | str = "cuda"
) -> dict[str, Any]:
    """Pages past half of `elements` and past all of them in a pool that is NaN elsewhere: the oracle's values, a small pool's bits.

    An offset of 32 bits, signed or not, would end outside of the pool or at its NaN.
    """
    built = replace(case, layout="nhd").build(device)
    a = built.arguments
    assert a.lse is not None
    used, width = torch.arange(a.k_cache.shape[0], device=device), a.k_cache.shape[-1] + a.v_cache.shape[-1]
    per_page = case.page_size * case.num_kv_heads * width
    num_pages = elements // per_page + len(used) + 1
    at = torch.where(used % 2 == 0, elements // 2 // per_page + 1 + used, num_pages - 1 - used)
    pool = torch.empty((num_pages, case.page_size, case.num_kv_heads, width), dtype=a.k_cache.dtype, device=device)
    pool.view(torch.int8).fill_(-1)  # NaN in every format
    k, v = pool.split([a.k_cache.shape[-1], a.v_cache.shape[-1]], dim=-1)
    for page, place in enumerate(at.tolist()):
        k[place], v[place] = a.k_cache[page], a.v_cache[page]
    is_page = (a.page_table >= 0) & (a.page_table < len(used))
    table = torch.where(is_page, at[a.page_table.clamp(0, len(used) - 1)], a.page_table).int()
    run(built)
    want = a.out[: built.total_q].clone()
    a.out.fill_(math.nan)
    a.lse.fill_(math.nan)
    run(BuiltCase(case, a._replace(k_cache=k, v_cache=v, page_table=table), built.total_q))
    result: dict[str, Any] = {"ok": True, "elements": pool.numel(), "bytes": pool.nbytes}
    try:
        result |= asdict(built.check(a.out, a.lse))
        assert torch.equal(want, a.out[: built.total_q]), "bits differ from those of a small pool"
    except AssertionError as error:
        result |= {"ok": False, "why": str(error)[:200]}
    print("large pool", result, flush=True)
    return result


def check_alone(arch: str, kv_dtype: str, rounds: int = 100) -> dict[str, Any]:
    """Rows of a batch-invariant plan, short queries behind long prefixes among them, have the same bits alone and in a batch, whose tiles
    are cut along KV or not."""
    draw, rows, max_kv = random.Random(0), 24, 40000
    problem = make_problem(8, 2, 128, 128, "bfloat16", 16, arch, kv_dtype=kv_dtype, has_lse=True, batch_invariant=True)
    plan = prefill_plan(plan_attention(problem, BatchLimits(rows, 8192, max_kv, 1), num_sms=_num_sms()))
    metadata = AttentionMetadata.allocate(plan, "cuda")
    work = metadata.work
    assert work is not None
    work.shape = replace(work.shape, decode_query_len=0)
    pages = -(-max_kv // 16)
    dtype = getattr(torch, problem.kv_dtype)
    k, v = torch.randn(2 * pages, 16, 2, 256, device="cuda", dtype=torch.bfloat16).to(dtype).split(128, dim=-1)
    table = torch.stack([torch.randperm(2 * pages, device="cuda")[:pages].int() for _ in range(rows)])
    scale = torch.ones(2, device="cuda") if problem.has_kv_scales else None

    def attend(q: torch.Tensor, chosen: list[int], query_lens: list[int], kv_lens: list[int]) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """O, the lse, and whether a tile was cut."""
        cu_seqlens_q = torch.tensor([0, *query_lens], device="cuda").cumsum(0).int()
        out, lse = torch.empty_like(q), torch.empty(8, len(q), device="cuda")
        seqused_k = torch.tensor(kv_lens, device="cuda").int()
        a = AttentionArguments(
            q, k, v, table[chosen], cu_seqlens_q, seqused_k, out, lse, 128**-0.5, None, None, 0.0, None, None, scale, scale
        )  # fmt: skip
        prefill_alone(metadata, a)
        tiles = work.prefill_tiles[: int(work.prefill_queue[0, QUEUE_TOTAL])]
        return out, lse, bool((tiles[:, PARTIAL_SLOT] >= 0).any())

    seen = {(a, b): 0 for a in (False, True) for b in (False, True)}
    result: dict[str, Any] = {"ok": True, "rows": 0}
    for _ in range(rounds):
        count, is_full = draw.randint(1, rows), draw.random() < 0.3
        if is_full:  # more tiles than CTAs
            count = rows
        query_lens = [300 if is_full else draw.choice((1, 1, 5, 40, draw.randint(1, 300))) for _ in range(count)]
        kv_lens = [max(n, draw.choice((500, 2048, 16384, draw.randint(1, max_kv)))) for n in query_lens]
        q = torch.randn(sum(query_lens), 8, 128, device="cuda", dtype=torch.bfloat16)
        out, lse, is_cut = attend(q, list(range(count)), query_lens, kv_lens)
        for row in draw.sample(range(count), min(count, 4)):
            at = slice(sum(query_lens[:row]), sum(query_lens[: row + 1]))
            alone, alone_lse, alone_is_cut = attend(q[at].contiguous(), [row], query_lens[row : row + 1], kv_lens[row : row + 1])
            seen[is_cut, alone_is_cut] += 1
            result["rows"] += 1
            if not (torch.equal(alone, out[at]) and torch.equal(alone_lse, lse[:, at])):
                result |= {"ok": False, "why": f"{query_lens=} {kv_lens=} {row=}"}
    result["cut in the batch, and alone"] = {f"{a}, {b}": n for (a, b), n in seen.items()}
    result["ok"] = result["ok"] and min(seen.values()) > 0
    print("alone", result, flush=True)
    return result


def _num_sms() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def main() -> None:
    """Run the parts asked for; exits 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="cases,pages,pool,alone,fuzz")
    parser.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="of K and V; auto: that of q")
    parser.add_argument("--batches", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=20, help="runs of each case that must give the same bits")
    parser.add_argument("--only", default="", help="cases and fuzzed problems whose name begins so; several apart by semicolons")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of fuzzed batches: no further one begins after them")
    parser.add_argument("--eager", action="store_true", help="fuzzed batches without graphs")
    parser.add_argument("--processes", type=int, default=14, help="that compile kernels side by side")
    parser.add_argument("--shard", default="0/1", help="fuzz every n-th problem from the i-th on: i/n, to run n processes at once")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.cuda.get_device_properties(0)
    arch = arch_of_capability(device.major, device.minor) or "none"
    schedule, _, prefill = families_of(arch)
    kv_dtype = {"auto": SAME_AS_Q, "fp8": FP8}[options.kv_dtype]
    families = (schedule, prefill, *(["convert_kv"] if kv_dtype == FP8 and arch in CONVERTED else []))
    report: dict = {"stamp": gpu_stamp(families), "torch": torch.__version__, "seed": options.seed, "kv_dtype": kv_dtype}
    parts = options.parts.split(",")
    setups = [setup for setup in prefill_setups(arch, kv_dtype) if setup.name.startswith(tuple(options.only.split(";")))]
    print(f"compiled in {compile_all(setup_plans(setups), options.processes):.0f} s", flush=True)
    if "cases" in parts:
        report["cases"] = check_cases(arch, kv_dtype, options.repeats, options.only)
    if "pages" in parts:
        report["page_sizes"] = [check_page_sizes(case) for case in plain_cases(arch, kv_dtype)]
    if "pool" in parts:
        of_name = cases(arch, kv_dtype)
        report["large_pool"] = [check_large_pool(of_name[name], run_case) for name in LARGE_POOLS + ONCE if name in of_name]
    alone = [check_alone(arch, kv_dtype)] if "alone" in parts else []
    report |= {"alone": alone[0]} if alone else {}
    if "fuzz" in parts:
        report["fuzz"] = fuzz_all(
            setups, options.batches, options.seconds, options.seed, has_graphs=not options.eager, shard=options.shard
        )  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    failed = [r for r in [*report.get("cases", []), *alone] if not r["ok"]] + [r for r in report.get("fuzz", []) if r["failures"]]
    failed += [r for part in ("page_sizes", "large_pool") for r in report.get(part, []) if not r["ok"]]
    fuzzed = [sum(r[count] for r in report.get("fuzz", [])) for count in ("batches", "cut")]
    print(f"{len(failed)} failed checks; {fuzzed[0]} fuzzed batches, {fuzzed[1]} of them with tiles cut along KV", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
