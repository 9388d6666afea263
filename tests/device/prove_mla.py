"""Proof and times of the latent decode kernel on a Hopper GPU: `python -m tests.device.prove_mla --json FILE`.

Parts: random poisoned batches against a float32 oracle on the GPU; the same bits for every page size, and in batch-invariant mode alone
and in a batch; replayed graphs with other lengths; times beside FA3 and FlashMLA where vLLM is installed, kernels in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fa4_backend.bench.timing import Flush, capture, median_us
from fa4_backend.compile_cache import ensure_object
from fa4_backend.error_budget import LSE_RELATIVE
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.kernels.families import KernelSet, latent_kernels
from fa4_backend.kernels.launch_abi import mla_decode_arguments, schedule_arguments
from fa4_backend.kernels.loading import load
from fa4_backend.kernels.mla_decode.config import resolve
from fa4_backend.kernels.schedule.work_list import WorkLists
from fa4_backend.problem import FP8, LATENT, AttentionProblem, BatchLimits
from tests.support.emulated_mla import DIM, LATENT_DIM, Latent, oracle

DEVICE, SCALE = "cuda", 192**-0.5
NAN_BYTE = 0xFF  # repeated, NaN in e4m3, bfloat16 and float16


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for, and the limits of its batches."""

    heads: int
    query_len: int = 1
    page_size: int = 64
    batch_invariant: bool = False
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    tuning: tuple[tuple[str, int], ...] = ()  # fields of the key

    def kernels(self, num_seqs: int, max_seqlen_k: int) -> tuple[KernelSet, BatchLimits]:
        """The kernels and the limits of batches of `num_seqs` sequences."""
        problem = AttentionProblem(
            num_q_heads=self.heads, num_kv_heads=1, head_dim=DIM, head_dim_v=LATENT_DIM, dtype=self.dtype, kv_dtype=self.kv_dtype,
            page_size=self.page_size, arch="sm_90a", kv_source=LATENT, has_lse=True, batch_invariant=self.batch_invariant,
        )  # fmt: skip
        limits = BatchLimits(num_seqs, num_seqs * self.query_len + 3, max_seqlen_k, self.query_len)
        num_sms = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132
        key = replace(resolve(problem, limits), **dict(self.tuning))  # type: ignore[arg-type]
        return latent_kernels(key, problem, limits, num_sms), limits


class Step:
    """Lists and kernels of a batch: `refresh` makes the lists, `run` attends."""

    def __init__(self, shape: Shape, arguments: Latent, max_seqlen_k: int, part_blocks: int | None = None) -> None:
        """part_blocks: KV blocks that a part has at least; None: as the kernel is tuned."""
        self.arguments = arguments
        self.kernels, limits = shape.kernels(len(arguments.seqused_k), max_seqlen_k)
        work = self.kernels.work if part_blocks is None else replace(self.kernels.work, decode_part_blocks=part_blocks)
        self.work = WorkLists.allocate(work, limits, DEVICE)
        self.work.slots.fill_(math.nan)
        self.schedule = load(self.kernels.schedule, emulated=False)
        assert self.kernels.decode is not None
        self.decode = load(self.kernels.decode, emulated=False)

    def refresh(self) -> None:
        """The step's lists."""
        self.schedule(*schedule_arguments(self.work, self.arguments.cu_seqlens_q, self.arguments.seqused_k))

    def run(self) -> None:
        """One layer."""
        self.decode(*mla_decode_arguments(self.arguments, self.work))


def draw(shape: Shape, query_lens: list[int], kv_lens: list[int], seed: int, *, peaked: float = 1.0, poison: bool = True) -> Latent:
    """A batch on the GPU; what no row sees is NaN."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)
    pages_of = [-(-n // shape.page_size) for n in kv_lens]
    num_pages = sum(pages_of) + 2
    order = torch.randperm(num_pages - 1, generator=generator, device=DEVICE).int() + 1
    table = torch.zeros((len(pages_of), max(*pages_of, 1)), dtype=torch.int32, device=DEVICE)  # page 0 holds NaN
    cache = torch.randn(num_pages, shape.page_size, DIM, generator=generator, device=DEVICE, dtype=dtype)
    scale = None
    if shape.kv_dtype == FP8:
        scale = torch.full((1,), 2.0**-6, device=DEVICE)
        cache = (cache * 64).to(torch.float8_e4m3fn)
    cache[0].view(torch.uint8).fill_(NAN_BYTE)
    at = 0
    for i, (n, pages) in enumerate(zip(kv_lens, pages_of, strict=True)):
        table[i, :pages] = order[at : at + pages]
        at += pages
        if poison and n % shape.page_size:
            cache[int(table[i, pages - 1]), n % shape.page_size :].view(torch.uint8).fill_(NAN_BYTE)
    total_q = sum(query_lens)
    rows = torch.randn(total_q + 3, shape.heads, DIM, generator=generator, device=DEVICE, dtype=dtype) * peaked
    rows[total_q:] = math.nan
    cu = torch.tensor([0, *query_lens], device=DEVICE).cumsum(0).int()
    return Latent(
        rows[..., :LATENT_DIM], rows[..., LATENT_DIM:], cache, table, cu, torch.tensor(kv_lens, device=DEVICE).int(),
        torch.full((total_q + 3, shape.heads, LATENT_DIM), math.nan, device=DEVICE, dtype=dtype),
        torch.full((shape.heads, total_q + 3), math.nan, device=DEVICE), SCALE, scale,
    )  # fmt: skip


def judge(a: Latent) -> tuple[float, float]:
    """Largest errors of out and lse as shares of their budgets.

    Raises:
        AssertionError: padding, NaN or infinity is not where it should be, or an error is over budget.
    """
    n = int(a.cu_seqlens_q[-1])
    assert (a.out[n:] == 0).all() and a.lse[:, n:].isneginf().all(), "padding rows: expected 0 and -inf"
    want, want_lse = oracle(a, torch.float32)
    yardstick, _ = oracle(a, a.q.dtype)
    got, got_lse = a.out[:n].float(), a.lse[:, :n]
    want, want_lse, yardstick = want[:n], want_lse[:, :n], yardstick[:n]
    assert got.isfinite().all(), f"out: {int((~got.isfinite()).sum())} values are not finite"
    assert torch.equal(got_lse.isneginf(), want_lse.isneginf()), "lse: -inf elsewhere than the oracle's"
    seen = ~want_lse.isneginf()
    assert (got[~seen.T] == 0).all(), "rows without a key: expected 0"
    if not seen.any():
        return 0.0, 0.0
    budget = 2 * (yardstick - want).abs().max() + torch.finfo(a.out.dtype).eps * want.abs().max()
    share = ((got - want).abs().max() / budget).item()
    lse_share = ((got_lse - want_lse)[seen].abs().max() / (LSE_RELATIVE * max(1.0, want_lse[seen].abs().max().item()))).item()
    assert share <= 1 and lse_share <= 1, f"share of the budget: out {share:.2f}, lse {lse_share:.2f}"
    return share, lse_share


FUZZ_SHAPES = (
    Shape(16), Shape(128), Shape(128, 4), Shape(16, 4, 16), Shape(64, 8, 128), Shape(8, 3, 48), Shape(24, 3, 32),
    Shape(128, 2, batch_invariant=True), Shape(16, 1, 16, batch_invariant=True), Shape(32, 2, dtype="float16"),
    Shape(16, kv_dtype=FP8), Shape(128, 2, 16, kv_dtype=FP8),
)  # fmt: skip
PAGES = (16, 32, 64, 128, 48)


def fuzz(seconds: float) -> dict[str, Any]:
    """Random batches of every shape in turns, for about `seconds`."""
    begin, batches, worst = time.monotonic(), 0, [0.0, 0.0]
    while time.monotonic() - begin < seconds:
        shape = FUZZ_SHAPES[batches % len(FUZZ_SHAPES)]
        rng = random.Random(batches)
        rows, longest = rng.choice(((1, 20000), (3, 6000), (20, 1500), (150, 200)))
        query_lens = [rng.randint(0, shape.query_len) for _ in range(rows)]
        kv_lens = [rng.choice((0, 1, rng.randint(1, longest), rng.randint(1, longest), rng.randint(1, longest))) for _ in range(rows)]
        a = draw(shape, query_lens, kv_lens, batches, peaked=rng.choice((1.0, 1.0, 20.0)))
        step = Step(shape, a, max(*kv_lens, 1))
        step.refresh()
        for _ in range(2):  # counters are back at 0
            a.out.fill_(math.nan)
            a.lse.fill_(math.nan)
            step.run()
        try:
            shares = judge(a)
        except AssertionError as failure:
            raise AssertionError(f"batch {batches}, {shape}, query_lens {query_lens}, kv_lens {kv_lens}: {failure}") from failure
        worst = [max(x, y) for x, y in zip(worst, shares, strict=True)]
        batches += 1
    return {"batches": batches, "worst_share_out": worst[0], "worst_share_lse": worst[1]}


def same_bits() -> dict[str, Any]:
    """Every page size, repeated launches, and in batch-invariant mode alone and in a batch."""

    def run(shape: Shape, a: Latent) -> torch.Tensor:
        step = Step(shape, a, 6000)
        step.refresh()
        step.run()
        return a.out[:-3].clone()

    first = None
    for page_size in PAGES:
        shape = Shape(128, 1, page_size)
        a = draw(shape, [1, 1], [5000, 777], 5, poison=False)
        # The same tokens whatever the pages: written through the page table.
        generator = torch.Generator(DEVICE).manual_seed(9)
        for i, n in enumerate((5000, 777)):
            tokens = torch.randn(n, DIM, generator=generator, device=DEVICE, dtype=torch.bfloat16)
            at = torch.arange(n, device=DEVICE)
            a.latent_cache[a.page_table[i, at // page_size].long(), at % page_size] = tokens
        a.q.copy_(torch.randn(a.q.shape, generator=generator, device=DEVICE, dtype=a.q.dtype))
        a.q_rope.copy_(torch.randn(a.q_rope.shape, generator=generator, device=DEVICE, dtype=a.q.dtype))
        for _ in range(3):
            out = run(shape, a)
            first = out if first is None else first
            assert torch.equal(out, first), f"page size {page_size}: other bits"
    for shape in (Shape(128, 2, batch_invariant=True), Shape(16, 1, 16, batch_invariant=True)):
        kv_lens = [5000, 900, 3000, 64, 1, 4097]
        queries = [shape.query_len] * len(kv_lens)
        a = draw(shape, queries, kv_lens, 6)
        together = run(shape, a)
        for i, n in enumerate(kv_lens):
            rows = slice(i * shape.query_len, (i + 1) * shape.query_len)
            padded = slice(rows.start, rows.stop + 3)
            alone = a._replace(
                q=a.q[padded], q_rope=a.q_rope[padded], page_table=a.page_table[i : i + 1], seqused_k=a.seqused_k[i : i + 1].clone(),
                cu_seqlens_q=torch.tensor([0, shape.query_len], device=DEVICE).int(), out=torch.empty_like(a.out[padded]),
                lse=torch.empty(shape.heads, shape.query_len + 3, device=DEVICE),
            )  # fmt: skip
            assert torch.equal(run(shape, alone), together[rows]), f"{shape}, row of {n}: other bits alone"
    return {"page_sizes": len(PAGES)}


def graphs() -> dict[str, Any]:
    """A captured schedule and launch, replayed with other lengths."""
    shape, count = Shape(128, 2), 0
    a = draw(shape, [2] * 8, [3000] * 8, 7, poison=False)
    step = Step(shape, a, 3000)
    replay = capture(lambda: (step.refresh(), step.run()))
    for seed in range(20):
        rng = random.Random(seed)
        a.seqused_k.copy_(torch.tensor([rng.randint(0, 3000) for _ in range(8)]))
        lens = [rng.randint(0, 2) for _ in range(8)]
        a.cu_seqlens_q.copy_(torch.tensor([0, *lens]).cumsum(0))
        a.out.fill_(math.nan)
        a.lse.fill_(math.nan)
        replay()
        a.q[int(a.cu_seqlens_q[-1]) :].nan_to_num_()
        judge(a)
        count += 1
    return {"replays": count}


# (heads, batch, KV, queries, kv_dtype): FA3 and FlashMLA as measured before, and the goal, us (issue 13)
CELLS = {
    (128, 1, 1024, 1, "auto"): 14, (128, 1, 4096, 1, "auto"): 18, (128, 1, 16384, 1, "auto"): 29,
    (128, 8, 4096, 1, "auto"): 32,
    (128, 64, 1024, 1, "auto"): 45,
    (128, 64, 4096, 1, "auto"): 128, (128, 64, 16384, 1, "auto"): 445, (128, 64, 4096, 2, "auto"): 240, (128, 64, 4096, 4, "auto"): 445,
    (16, 1, 4096, 1, "auto"): 15,
    (16, 8, 4096, 1, "auto"): 24, (16, 64, 4096, 1, "auto"): 110, (16, 64, 16384, 1, "auto"): 405,
    (16, 64, 16384, 1, FP8): 215, (128, 64, 4096, 1, FP8): 128, (128, 64, 4096, 4, FP8): 445,
}  # fmt: skip


# Beside the kernel as it is: its tuned numbers otherwise.
VARIANTS = {"c2": (("max_cluster", 2),), "l2": (("prefetch_blocks", 2),)}
VARIED = ((128, "auto"),)


def peers(a: Latent, heads: int, batch: int, keys: int, queries: int) -> dict[str, Callable[[], object]]:
    """FA3 and FlashMLA as vLLM calls them."""
    calls: dict[str, Callable[[], object]] = {}
    n = batch * queries
    q, c = torch.cat((a.q, a.q_rope), -1)[:n], a.latent_cache[:, :, None]
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

        metadata = get_scheduler_metadata(
            batch, queries, keys, heads, 1, 64, a.seqused_k, qkv_dtype=q.dtype, headdim_v=LATENT_DIM, cu_seqlens_q=a.cu_seqlens_q,
            page_size=64, causal=True, num_splits=0,
        )  # fmt: skip
        calls["fa3"] = lambda: flash_attn_varlen_func(
            q=q[..., LATENT_DIM:], k=c[..., LATENT_DIM:], v=c[..., :LATENT_DIM], q_v=q[..., :LATENT_DIM], max_seqlen_q=queries,
            cu_seqlens_q=a.cu_seqlens_q, max_seqlen_k=keys, seqused_k=a.seqused_k, block_table=a.page_table, softmax_scale=SCALE,
            causal=True, fa_version=3, scheduler_metadata=metadata, num_splits=0,
        )  # fmt: skip
    except ImportError as reason:
        print("no FA3:", reason)
    try:
        from vllm.third_party.flashmla.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata

        tiles = get_mla_metadata()[0]
        view = q.view(batch, queries, heads, DIM)
        calls["flashmla"] = lambda: flash_mla_with_kvcache(view, c, a.page_table, a.seqused_k, LATENT_DIM, tiles, None, SCALE, True)
    except ImportError as reason:
        print("no FlashMLA:", reason)
    return calls


def times(rounds: int) -> list[dict[str, Any]]:
    """Medians of every cell, kernels in turns, L2 full of clean lines."""
    table = []
    for (heads, batch, keys, queries, kv_dtype), goal in CELLS.items():
        shape = Shape(heads, queries, kv_dtype=kv_dtype)
        a = draw(shape, [queries] * batch, [keys] * batch, 1)
        step = Step(shape, a, keys)
        step.refresh()
        step.run()
        if batch * keys <= 1 << 16:
            judge(a)
        calls = {"fa4": capture(step.run)}
        variants = []
        for name, tuning in VARIANTS.items() if (heads, kv_dtype) in VARIED else ():
            variants.append(Step(replace(shape, tuning=tuning), a, keys))
            variants[-1].refresh()
            calls[name] = capture(variants[-1].run)
        alive = peers(a, heads, batch, keys, queries) if kv_dtype == "auto" else {}  # a graph holds no tensor of its calls
        for name, call in alive.items():
            call()
            torch.cuda.synchronize()
            replay = capture(call)
            replay()
            torch.cuda.synchronize()
            got = call()
            out = (got[0] if isinstance(got, tuple) else got).reshape(batch * queries, heads, LATENT_DIM)
            wrong = (out - a.out[: batch * queries]).abs().max().item() > 0.02
            calls[f"{name} WRONG" if wrong else name] = replay
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds):
            for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
                taken[name].append(median_us(calls[name], milliseconds=4.0, flush=Flush.READ))
        us = {name: statistics.median(values) for name, values in taken.items()}
        gb = batch * keys * DIM * a.latent_cache.element_size() / us["fa4"] / 1e3
        tflops = 2 * batch * queries * heads * keys * (DIM + LATENT_DIM) / us["fa4"] / 1e6
        table.append(
            {
                "heads": heads,
                "batch": batch,
                "keys": keys,
                "queries": queries,
                "kv_dtype": kv_dtype,
                "goal": goal,
                **us,
                "gb_s": gb,
                "tflops": tflops,
            }
        )
        others = "  ".join(f"{name} {value:7.1f}" for name, value in us.items() if name != "fa4")
        mark = "ok" if us["fa4"] <= goal else f"{us['fa4'] / goal:.2f}x"
        ours = f"fa4 {us['fa4']:7.1f} us (goal {goal:3d} {mark})"
        print(
            f"h{heads:3d} {batch:2d} x {keys:5d} q{queries} {kv_dtype[:8]}: {ours}  {others}  {gb:.0f} GB/s {tflops:.0f} TFLOP/s",
            flush=True,
        )
        del a, step, calls, alive, variants
    return table


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="fuzz,bits,graphs,times")
    parser.add_argument("--fuzz-seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shapes = {
        *FUZZ_SHAPES,
        *(Shape(heads, queries, kv_dtype=kind) for heads, _, _, queries, kind in CELLS),
        *(Shape(128, 1, page) for page in PAGES),
    }
    shapes |= {
        Shape(heads, queries, kv_dtype=kind, tuning=tuning)
        for heads, _, _, queries, kind in CELLS if (heads, kind) in VARIED for tuning in VARIANTS.values()
    }  # fmt: skip
    keys = {key for shape in shapes for key in shape.kernels(64, 16384)[0].keys}
    begin = time.monotonic()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(ensure_object, keys))
    print(f"compiled {len(keys)} kernels in {time.monotonic() - begin:.0f} s", flush=True)
    results: dict[str, Any] = {"stamp": gpu_stamp(("schedule", "mla_decode"))}
    parts: dict[str, Callable[[], Any]] = {
        "fuzz": lambda: fuzz(args.fuzz_seconds), "bits": same_bits, "graphs": graphs, "times": lambda: times(args.rounds),
    }  # fmt: skip
    for name in args.parts.split(","):
        begin = time.monotonic()
        try:
            results[name] = parts[name]()
        except AssertionError as failure:
            results[name] = {"failed": str(failure)}
        print(name, "" if name == "times" else results[name], f"{time.monotonic() - begin:.0f} s", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
