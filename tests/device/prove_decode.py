"""Proof of schedule and decode kernel on a GPU: `python -m tests.device.prove_decode --batches 20000 --json FILE`.

Prints one line a part. Parts: the device's lists against the host's; fuzzed poisoned batches of many short rows (several entries a
CTA) and of long ones; batches of decode and prefill rows; the same bits for every page size, alone and in a batch (batch invariance),
and from a replayed graph; rows of pools above 2^32 elements, alone and beside prefill rows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fa4_backend import AttentionMetadata, AttentionPlan, AttentionProblem, BatchLimits, paged_attention, plan_attention
from fa4_backend.arch import arch_of_capability
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.kernels.launch_abi import schedule_arguments
from fa4_backend.kernels.loading import load
from fa4_backend.problem import FP8
from tests.device.fuzz_all import compile_all, fuzz_all, setup_plans
from tests.device.prove_prefill import check_large_pool
from tests.support.emulated_decode import assert_same_lists, empty_lists, host_lists
from tests.support.fuzz import SCALES, FuzzSetup
from tests.support.paged_case import PagedCase
from tests.support.problems import make_problem

HEADS = ((32, 8, 128, 1), (16, 2, 128, 1), (4, 4, 128, 2), (9, 3, 64, 1), (8, 2, 128, 4), (16, 2, 128, 4), (32, 2, 128, 4), (8, 2, 96, 2))
# Whose steps of decode rows alone go to prefill tiles of their height (`fa4_backend/narrow_tiles.py`)
NARROW = ((48, 1, 128, 1), (16, 2, 128, 8), (48, 1, 64, 1), (96, 1, 64, 1), (48, 1, 96, 1), (96, 1, 128, 1))
FEATURES: tuple[dict[str, bool], ...] = (
    {}, {"has_window_left": True}, {"has_sinks": True}, {"has_softcap": True}, {"has_alibi": True}, {"batch_invariant": True},
)  # fmt: skip
DEVICE = "cuda"


def setups(arch: str, kv_dtype: str) -> list[FuzzSetup]:
    """Problems of decode rows alone, whichever kernel serves them."""
    return kernel_setups(arch, kv_dtype) + narrow_setups(arch, kv_dtype)


def kernel_setups(arch: str, kv_dtype: str) -> list[FuzzSetup]:
    """The decode kernel's: every head shape, every feature and out in FP8 on some of them, many short rows and few long ones."""
    chosen: list[tuple[tuple[int, int, int, int], dict[str, Any]]] = [(heads, {}) for heads in HEADS]
    chosen += [(HEADS[4], features) for features in FEATURES[1:]] + [(heads, {"out_dtype": FP8}) for heads in (HEADS[0], HEADS[3])]
    # V narrower than K, wide heads, and pages of hybrid models, which are no power of 2.
    chosen += [((16, 2, 192, 1), {"head_dim_v": 128, "page_size": 48}), ((16, 2, 256, 2), {"page_size": 528})]
    if kv_dtype == FP8:
        chosen += [(heads, {"dtype": "float16"}) for heads in ((8, 2, 256, 1), (8, 2, 128, 2))]
    return of_heads(chosen, arch, kv_dtype)


def of_heads(chosen: Sequence[tuple[tuple[int, int, int, int], dict[str, Any]]], arch: str, kv_dtype: str) -> list[FuzzSetup]:
    """Heads and query length of decode rows, and features: many short rows and few long ones of each."""
    out = []
    for (q_heads, kv_heads, head_dim, query_len), features in chosen:
        problem = make_problem(
            num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim, arch=arch, kv_dtype=kv_dtype, has_lse=True,
            **{"dtype": "bfloat16", "head_dim_v": head_dim, "page_size": 16, **features},
        )  # fmt: skip
        name = f"{q_heads}/{kv_heads} d{head_dim} q{query_len} {' '.join(features)}"
        for shape, rows, kv_len in (("short", 64, 130), ("long", 6, 6000)):
            setup = FuzzSetup(
                f"{name} {shape}", problem, max_seqs=rows, max_query=query_len, max_kv=kv_len, decode_query_len=query_len,
                per_head_scales=shape == "short",
            )  # fmt: skip
            out.append(setup)
    return out


def narrow_setups(arch: str, kv_dtype: str) -> list[FuzzSetup]:
    """Every height of narrow tiles, every feature on one of them; none where no kernel has such tiles."""
    chosen: list[tuple[tuple[int, int, int, int], dict[str, Any]]] = [(heads, {}) for heads in NARROW]
    chosen += [(NARROW[0], {"has_window_left": True, "has_sinks": True}), (NARROW[0], {"has_softcap": True, "has_alibi": True})]
    chosen += [(NARROW[1], {"out_dtype": FP8})]
    if not arch.endswith("sm_90a"):
        return []
    if kv_dtype == FP8:
        chosen = [(heads, features) for heads, features in chosen if heads[0] * heads[3] // heads[1] <= 64]
        chosen += [((16, 2, 256, 5), {}), ((8, 1, 64, 5), {"dtype": "float16"})]
    return [replace(s, name=f"narrow {s.name}", is_narrow=True) for s in of_heads(chosen, arch, kv_dtype)]


def mixed_setups(arch: str, kv_dtype: str) -> list[FuzzSetup]:
    """Problems whose batches have decode rows beside prefill rows: both kernels at once, sharing the SMs."""
    problems: dict[str, tuple[tuple[int, int, int], int, dict[str, Any]]] = {
        "32/8 d128 q1": ((32, 8, 128), 1, {}),
        "8/2 d128 q4": ((8, 2, 128), 4, {}),
        "8/2 d128 q4 window": ((8, 2, 128), 4, {"has_window_left": True}),
        "8/2 d128 q4 batch_invariant": ((8, 2, 128), 4, {"batch_invariant": True}),
        "9/3 d64 q1": ((9, 3, 64), 1, {}),
        "8/2 d96 q2": ((8, 2, 96), 2, {}),
        "4/2 d256 q1": ((4, 2, 256), 1, {}),
        "8/2 d128 q2 out FP8": ((8, 2, 128), 2, {"out_dtype": FP8}),
        "8/2 d192v128 q1": ((8, 2, 192), 1, {"head_dim_v": 128}),
    }
    out = []
    for name, ((q_heads, kv_heads, head_dim), query_len, features) in problems.items():
        problem = make_problem(
            num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype="bfloat16", page_size=16, arch=arch, kv_dtype=kv_dtype,
            has_lse=True, **{"head_dim_v": head_dim, **features},
        )  # fmt: skip
        setup = FuzzSetup(
            f"mixed {name}", problem, max_seqs=16, max_query=100, max_kv=900, decode_query_len=query_len, decode_share=0.7
        )  # fmt: skip
        out.append(setup)
        if not problem.batch_invariant:
            cut = replace(setup, name=f"{setup.name} in parts", max_seqs=6, decode_share=0.5, min_part_blocks=1, per_head_scales=False)
            out.append(cut)
    return out + message_setups(arch, kv_dtype)


def message_setups(arch: str, kv_dtype: str) -> list[FuzzSetup]:
    """Short messages on tiles of their height, decode rows beside them: many rows, and few long ones whose tiles are cut; none where no
    plan has such tiles."""
    if not arch.endswith("sm_90a") or kv_dtype != FP8:
        return []
    chosen: list[tuple[tuple[int, int, int], dict[str, Any]]] = [
        ((8, 2, 128), {}), ((8, 2, 128), {"has_window_left": True, "has_sinks": True}), ((8, 2, 128), {"out_dtype": FP8}),
        ((16, 2, 64), {"dtype": "float16"}), ((4, 2, 96), {}), ((4, 2, 256), {"has_softcap": True}),
    ]  # fmt: skip
    out = []
    for (q_heads, kv_heads, head_dim), features in chosen:
        problem = make_problem(
            num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim, head_dim_v=head_dim, page_size=16, arch=arch, kv_dtype=kv_dtype,
            has_lse=True, **{"dtype": "bfloat16", **features},
        )  # fmt: skip
        name = f"messages {q_heads}/{kv_heads} d{head_dim} {' '.join(features)}"
        for shape, rows, kv_len in (("short", 32, 300), ("long", 5, 6000)):
            setup = FuzzSetup(
                f"{name} {shape}", problem, max_seqs=rows, max_query=64 // problem.q_per_kv, max_kv=kv_len, decode_share=0.5,
                has_messages=True, per_head_scales=shape == "short",
            )  # fmt: skip
            out.append(setup)
    return out


def check_lists(arch: str, steps: int) -> dict[str, Any]:
    """Random steps: every entry the device writes is the host's."""
    draw = random.Random(0)
    for _ in range(steps):
        heads, query_len = draw.choice((1, 2, 8, 32)), draw.choice((1, 4))
        problem = make_problem(
            num_q_heads=4 * heads, num_kv_heads=heads, head_dim=128, head_dim_v=128, dtype="bfloat16", page_size=16, arch=arch,
            batch_invariant=draw.random() < 0.3,
        )  # fmt: skip
        rows = draw.choice((1, 3, 40, 256))
        query_lens = [draw.choice((0, 1, 1, query_len, 5, draw.randint(1, 700))) for _ in range(rows)]
        kv_lens = [draw.choice((0, 1, 63, 64, 65, draw.randint(0, 131072))) for _ in range(rows)]
        plan = plan_of(problem, max(rows, 1), max(sum(query_lens), query_len), 131072, query_len)
        assert plan.kernels is not None
        shape = plan.kernels.work
        work = empty_lists(shape, rows)
        for name, value in vars(work).items():
            if isinstance(value, torch.Tensor):
                setattr(work, name, value.to(DEVICE))
        cu_seqlens_q = torch.tensor([0, *query_lens]).cumsum(0).int().to(DEVICE)
        seqused_k = torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE)
        load(plan.kernels.schedule, emulated=False)(*schedule_arguments(work, cu_seqlens_q, seqused_k))
        for name in ("prefill_tiles", "prefill_queue", "decode_tiles", "decode_first"):
            setattr(work, name, getattr(work, name).cpu())
        assert_same_lists(work, host_lists(shape, query_lens, kv_lens))
    return {"steps": steps}


def check_fuzz(setups_of_arch: list[FuzzSetup], batches: int, **how: Any) -> dict[str, Any]:
    """`batches` fuzzed batches over all setups, against the float32 oracle; `how`: as for `fuzz_all`."""
    results = fuzz_all(setups_of_arch, batches, **how)
    failed = [r for r in results if r["failures"]]
    assert not failed, "\n".join(str(r) for r in failed)
    return {"batches": sum(r["batches"] for r in results), "setups": results}


def check_bits(arch: str, kv_dtype: str, rounds: int) -> dict[str, Any]:
    """Page sizes, neighbours (batch-invariant mode) and graph replay do not change a bit."""
    case = PagedCase(
        (1, 2, 2, 1), (3000, 17, 8000, 0), num_q_heads=8, num_kv_heads=2, head_dim=128, kv_dtype=kv_dtype, arch=arch, decode_query_len=2
    )  # fmt: skip
    outs = [replace(case, page_size=size).build(DEVICE).run(case_plan(replace(case, page_size=size)))[0][:6] for size in (16, 48, 128, 528)]
    assert all(torch.equal(out, outs[0]) for out in outs), "bits depend on the page size"
    draw = random.Random(0)
    batch = Batch(arch, kv_dtype, batch_invariant=True)
    for _ in range(rounds):
        rows = draw.randint(2, batch.rows)
        query_lens = [draw.choice((1, 2)) for _ in range(rows)]
        kv_lens = [max(n, draw.choice((1, 64, 500, draw.randint(1, batch.max_kv)))) for n in query_lens]
        batch.set(query_lens, kv_lens)
        together = batch.step(rows)[: sum(query_lens)].clone()
        row = draw.randrange(rows)
        at = sum(query_lens[:row])
        alone = batch.alone(row, at, query_lens[row], kv_lens[row])
        assert torch.equal(alone, together[at : at + query_lens[row]]), (query_lens, kv_lens, row)
    for invariant in (False, True):
        batch = Batch(arch, kv_dtype, batch_invariant=invariant)
        replay = batch.capture()
        for _ in range(rounds):
            longest = draw.choice((0, 1, 64, 1000, batch.max_kv))
            batch.set([draw.choice((0, 1, 2)) for _ in range(batch.rows)], [draw.randint(0, longest) for _ in range(batch.rows)])
            batch.out.fill_(7)
            replay()
            replayed = batch.out.clone()
            batch.out.fill_(7)
            assert torch.equal(replayed, batch.step(batch.rows)), "a replayed graph differs from eager"
    return {"rounds": rounds}


def check_exact(arch: str, kv_dtype: str, rounds: int) -> dict[str, Any]:
    """Exact mode, with and without a window: tokens of a prompt, cut at random into chunks and single tokens beside each other, keep the
    whole prompt's bits."""
    return {"rounds": 2 * rounds, "tokens": sum(_check_exact(arch, kv_dtype, rounds, window_left) for window_left in (None, 700))}


def check_pool(arch: str, kv_dtype: str) -> dict[str, Any]:
    """Decode rows, split along KV, alone and beside prefill rows, whose pages lie past 2^31 and 2^32 elements of a pool."""
    seen = []
    for query_lens, kv_lens in (((1, 2, 2, 1), (3000, 17, 8000, 0)), ((1, 2, 70, 33), (3000, 17, 8000, 500))):
        case = PagedCase(
            query_lens, kv_lens, num_q_heads=8, num_kv_heads=2, head_dim=128, kv_dtype=kv_dtype, arch=arch, decode_query_len=2
        )  # fmt: skip
        seen.append(check_large_pool(case, lambda built: built.run(case_plan(built.case))))
    assert all(pool["ok"] for pool in seen), seen
    return {"pools": seen}


def _check_exact(arch: str, kv_dtype: str, rounds: int, window_left: int | None) -> int:
    """Tokens compared."""
    draw = random.Random(0)
    prompt, heads, kv_heads, dim = 6000, 8, 2, 128  # of three pieces
    problem = make_problem(
        num_q_heads=heads, num_kv_heads=kv_heads, head_dim=dim, head_dim_v=dim, dtype="bfloat16", page_size=16, arch=arch, has_lse=True,
        kv_dtype=kv_dtype, batch_invariant=True, exact=True, has_window_left=window_left is not None,
    )  # fmt: skip
    plan = plan_of(problem, 64, 8192, prompt, 1)
    metadata = AttentionMetadata.allocate(plan, DEVICE)
    q = torch.randn(prompt, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    pages = -(-prompt // 16)
    k, v = torch.randn(pages, 16, kv_heads, 2 * dim, device=DEVICE, dtype=torch.bfloat16).to(getattr(torch, kv_dtype)).split(dim, -1)
    table = torch.randperm(pages, device=DEVICE).int()

    def attend(ranges: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        lens = [end - begin for begin, end in ranges]
        cu_seqlens_q = torch.tensor([0, *lens]).cumsum(0).int().to(DEVICE)
        seqused_k = torch.tensor([end for _, end in ranges], dtype=torch.int32, device=DEVICE)
        metadata.refresh(cu_seqlens_q=cu_seqlens_q, seqused_k=seqused_k, max_seqlen_q=max(lens), max_seqlen_k=prompt)
        rows = torch.cat([q[begin:end] for begin, end in ranges])
        out, lse = paged_attention(
            rows, k, v, table.expand(len(ranges), -1).contiguous(), cu_seqlens_q, seqused_k, plan=plan, metadata=metadata,
            window_left=window_left,
        )  # fmt: skip
        assert lse is not None
        return out, lse

    whole, whole_lse = attend([(0, prompt)])
    tokens = 0
    for _ in range(rounds):
        ranges = []
        for _ in range(draw.randint(1, 64)):
            end = draw.randint(1, prompt)
            ranges.append((max(0, end - draw.choice((1, 1, 2, 17, 100))), end))
        out, lse = attend(ranges)
        at = torch.cat([torch.arange(begin, end) for begin, end in ranges]).to(DEVICE)
        assert torch.equal(out, whole[at]) and torch.equal(lse, whole_lse[:, at]), ranges
        tokens += len(at)
    return tokens


class Batch:
    """Fixed buffers for up to `rows` rows, as an engine keeps them."""

    rows, max_kv = 32, 16384

    def __init__(self, arch: str, kv_dtype: str, *, batch_invariant: bool) -> None:
        problem = make_problem(
            num_q_heads=8,
            num_kv_heads=2,
            head_dim=128,
            head_dim_v=128,
            dtype="bfloat16",
            page_size=16,
            arch=arch,
            kv_dtype=kv_dtype,
            batch_invariant=batch_invariant,
        )
        self.plan = plan_of(problem, self.rows, 2 * self.rows, self.max_kv, 2)
        self.metadata = AttentionMetadata.allocate(self.plan, DEVICE)
        pages = self.max_kv // 16
        pool = torch.randn(8 * pages, 16, 2, 256, device=DEVICE, dtype=torch.bfloat16).to(getattr(torch, kv_dtype))
        self.k, self.v = pool.split(128, -1)
        self.scales = dict(zip(SCALES, torch.tensor([[0.5, 2.0], [3.0, 0.1]], device=DEVICE), strict=True)) if kv_dtype == FP8 else {}
        self.table = torch.stack([torch.randperm(8 * pages, device=DEVICE)[:pages].int() for _ in range(self.rows)])
        self.q = torch.randn(2 * self.rows, 8, 128, device=DEVICE, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)
        self.cu_seqlens_q = torch.zeros(self.rows + 1, device=DEVICE, dtype=torch.int32)
        self.seqused_k = torch.zeros(self.rows, device=DEVICE, dtype=torch.int32)

    def set(self, query_lens: list[int], kv_lens: list[int]) -> None:
        """Lengths of the next step; rows past the lists are padding."""
        padding = [0] * (self.rows - len(kv_lens))
        self.cu_seqlens_q.copy_(torch.tensor([0, *query_lens, *padding]).cumsum(0).int())
        self.seqused_k.copy_(torch.tensor(kv_lens + padding).int())

    def step(self, rows: int) -> torch.Tensor:
        """Refresh and one call."""
        return self._call(self.q, self.table[:rows], self.cu_seqlens_q[: rows + 1], self.seqused_k[:rows], self.out)

    def alone(self, row: int, at: int, query_len: int, kv_len: int) -> torch.Tensor:
        """The same row in a batch of its own."""
        q = self.q[at : at + query_len].contiguous()
        cu_seqlens_q = torch.tensor([0, query_len], device=DEVICE, dtype=torch.int32)
        seqused_k = torch.tensor([kv_len], device=DEVICE, dtype=torch.int32)
        return self._call(q, self.table[row : row + 1], cu_seqlens_q, seqused_k, torch.empty_like(q))

    def capture(self) -> Callable[[], None]:
        """A graph of one step over all rows."""
        self.step(self.rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(self.rows)
        return graph.replay

    def _call(
        self, q: torch.Tensor, table: torch.Tensor, cu_seqlens_q: torch.Tensor, seqused_k: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        self.metadata.refresh(cu_seqlens_q=cu_seqlens_q, seqused_k=seqused_k, max_seqlen_q=2, max_seqlen_k=self.max_kv)
        return paged_attention(
            q, self.k, self.v, table, cu_seqlens_q, seqused_k, plan=self.plan, metadata=self.metadata, out=out, **self.scales
        )[0]


def plan_of(problem: AttentionProblem, rows: int, tokens: int, max_kv: int, query_len: int) -> AttentionPlan:
    """A plan for the GPU present."""
    limits = BatchLimits(max_num_seqs=rows, max_num_tokens=tokens, max_seqlen_k=max_kv, decode_query_len=query_len)
    return plan_attention(problem, limits, num_sms=torch.cuda.get_device_properties(0).multi_processor_count)


def case_plan(case: PagedCase) -> AttentionPlan:
    """A case's plan for the GPU present."""
    return case.plan(num_sms=torch.cuda.get_device_properties(0).multi_processor_count)


def main() -> int:
    """Run the chosen parts; exit status 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="lists,fuzz,mixed,pool,bits,exact", help="of these")
    parser.add_argument("--kv-dtype", choices=("bf16", "fp8"), default="bf16", help="of K and V")
    parser.add_argument("--batches", type=int, default=2000, help="fuzzed batches, all setups together")
    parser.add_argument("--mixed-batches", type=int, default=2000, help="fuzzed batches with prefill rows beside decode rows")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of each kind of fuzzed batches: no further one begins after them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="fuzzed batches without graphs")
    parser.add_argument("--processes", type=int, default=14, help="that compile kernels side by side")
    parser.add_argument("--only", default="", help="fuzz problems whose name begins so; several apart by semicolons")
    parser.add_argument("--shard", default="0/1", help="fuzz every n-th problem from the i-th on: i/n, to run n processes side by side")
    parser.add_argument("--json", type=Path, help="write what was seen there")
    options = parser.parse_args()
    arch = arch_of_capability(*torch.cuda.get_device_capability())
    assert arch is not None, torch.cuda.get_device_name()
    kv_dtype = {"bf16": "bfloat16", "fp8": FP8}[options.kv_dtype]
    of_part = {
        part: [setup for setup in of_arch if setup.name.startswith(tuple(options.only.split(";")))]
        for part, of_arch in (
            ("fuzz", setups(arch, kv_dtype)),
            ("mixed", mixed_setups(arch, kv_dtype)),
        )
        if part in options.parts.split(",")
    }
    fuzzed = [setup for of_arch in of_part.values() for setup in of_arch]
    print(f"compiled in {compile_all(setup_plans(fuzzed), options.processes):.0f} s", flush=True)
    how = {"seconds": options.seconds, "seed": options.seed, "has_graphs": not options.eager, "shard": options.shard}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "lists": lambda: check_lists(arch, 200),
        "fuzz": lambda: check_fuzz(of_part["fuzz"], options.batches, **how),
        "mixed": lambda: check_fuzz(of_part["mixed"], options.mixed_batches, **how),
        "pool": lambda: check_pool(arch, kv_dtype),
        "bits": lambda: check_bits(arch, kv_dtype, 100),
        "exact": lambda: check_exact(arch, kv_dtype, 100),
    }
    seen: dict[str, Any] = {"stamp": gpu_stamp(), "kv_dtype": kv_dtype}
    for name in options.parts.split(","):
        try:
            seen[name] = {"ok": True, **parts[name]()}
        except AssertionError as error:
            seen[name] = {"ok": False, "why": str(error)[:2000]}
        print(name, {key: value for key, value in seen[name].items() if key != "setups"}, flush=True)
    if options.json:
        options.json.write_text(json.dumps(seen, indent=1) + "\n")
    return 0 if all(seen[name]["ok"] for name in options.parts.split(",")) else 1


if __name__ == "__main__":
    sys.exit(main())
