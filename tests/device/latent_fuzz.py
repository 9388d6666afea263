"""Fuzzed batches of latent attention as replays of captured graphs: lengths, page tables, poison, kernels, oracle and comparison.

A batch is tensor operations of fixed shapes (`tests.support.fuzz` does so for K and V in pages): there are as many sequences as a `Kind`
says, each padded to the longest. Nothing comes back to the host before the end, so a batch takes what its kernels take. On a CPU the
same steps run one by one, with a stand-in for the kernels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fa4_backend.error_budget import LSE_RELATIVE, rounding_budget
from fa4_backend.problem import FP8
from tests.device.mla_batches import DIM, LATENT_DIM, NAN_BYTE, PADDING_ROWS, SCALE, Latent, Shape, Step, attend_padded

AT_ONCE = 16  # batches between two looks at the clock
# Of all batches: how many, sequences, those without a key, of one token, without a query, the longest, failures, the first failure.
COUNTS = ("batches", "rows", "rows without a key", "rows of one token", "rows without a query", "longest row", "failures", "first failure")
LONGEST, FAILURES, FIRST = (COUNTS.index(name) for name in ("longest row", "failures", "first failure"))


class Kind(NamedTuple):
    """Batches of one graph."""

    rows: int  # sequences
    longest: int  # keys
    weight: int  # of 100 batches, so many are of this kind


KINDS = (Kind(1, 131072, 1), Kind(1, 20000, 19), Kind(3, 6000, 26), Kind(20, 1500, 25), Kind(150, 200, 25), Kind(200, 64, 4))


@dataclass
class Tally:
    """What was seen, on the device."""

    counts: torch.Tensor  # (COUNTS,) int64
    worst: torch.Tensor  # (2,) float32: largest errors of out and lse as shares of their budgets

    @staticmethod
    def on(device: str) -> Tally:
        """Nothing seen."""
        counts = torch.zeros(len(COUNTS), dtype=torch.long, device=device)
        counts[FIRST] = -1
        return Tally(counts, torch.zeros(2, device=device))


class LatentFuzzer:
    """Draws, runs and judges batches of one shape and kind."""

    def __init__(self, shape: Shape, kind: Kind, tally: Tally, device: str, launch: Callable[[Latent], None] | None = None) -> None:
        """launch: of the kernels; None: schedule and decode of `shape`."""
        self.shape, self.kind, self.tally, self.device = shape, kind, tally, device
        self.dtype, kv_dtype = getattr(torch, shape.dtype), torch.float8_e4m3fn if shape.kv_dtype == FP8 else getattr(torch, shape.dtype)
        self.pages_of_row = -(-kind.longest // shape.page_size)
        self.num_pages = kind.rows * self.pages_of_row + 2
        self.scale = torch.full((1,), 2.0**-6, device=device) if shape.kv_dtype == FP8 else None
        clean = torch.randn(self.num_pages, shape.page_size, DIM, device=device)
        self.clean = (clean if self.scale is None else clean / self.scale).to(kv_dtype)
        self.pool = torch.empty_like(self.clean)
        self.step: Step | None = None
        self.launch = launch or self._launch

    def _launch(self, a: Latent) -> None:
        if self.step is None:
            self.step = Step(self.shape, a, self.kind.longest)
        self.step.arguments = a
        self.step.work.slots.fill_(math.nan)
        self.step.refresh()
        self.step.run()

    def captured(self, pool: Any) -> Callable[[], object]:
        """A batch again and again; one has been run. pool: of graphs that never run side by side."""
        self.batch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.batch()
        return graph.replay

    def batch(self) -> None:
        """Draw, run and judge one."""
        a = self._draw()
        self.launch(a)
        self._judge(a)

    def _integers(self, low: int, high: int) -> torch.Tensor:
        """A whole number a sequence, both ends included."""
        return torch.randint(low, high + 1, (self.kind.rows,), device=self.device)

    def _lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and KV lengths: many of them 0, 1 or at an edge of a block."""
        longest = self.kind.longest
        any_length = self._integers(1, longest)
        edge = (any_length // 64 * 64 + self._integers(-1, 1)).clamp(0, longest)
        constants = (torch.full_like(edge, value) for value in (0, 1, longest))
        choices = torch.stack([*constants, edge, any_length, any_length])
        return self._integers(0, self.shape.query_len), choices.gather(0, self._integers(0, len(choices) - 1)[None])[0]

    def _draw(self) -> Latent:
        s, device = self.shape, self.device
        queries, lens = self._lengths()
        cu = torch.nn.functional.pad(queries.cumsum(0), (1, 0)).int()
        num_rows = self.kind.rows * s.query_len + PADDING_ROWS
        peak = 1 + 19 * (torch.rand(1, device=device) < 1 / 3).float()
        is_row = torch.arange(num_rows, device=device) < cu[-1]
        rows = (torch.randn(num_rows, s.heads, DIM, device=device) * peak).masked_fill(~is_row[:, None, None], math.nan).to(self.dtype)
        out = torch.full((num_rows, s.heads, LATENT_DIM), math.nan, device=device, dtype=self.dtype)
        lse = torch.full((s.heads, num_rows), math.nan, device=device)
        table = self._pages(queries, lens)
        return Latent(rows[..., :LATENT_DIM], rows[..., LATENT_DIM:], self.pool, table, cu, lens.int(), out, lse, SCALE, self.scale)

    def _pages(self, queries: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        """The page table; fills the pool: what a sequence's queries see, NaN everywhere else, as in page 0, which unused entries name."""
        page_size, device = self.shape.page_size, self.device
        pages = torch.rand(self.num_pages - 1, device=device).argsort()[: self.kind.rows * self.pages_of_row] + 1
        pages = pages.view(self.kind.rows, -1)
        begins = torch.arange(self.pages_of_row, device=device) * page_size
        seen = (torch.where(queries > 0, lens, 0)[:, None] - begins).clamp(0, page_size)
        of_page = torch.zeros(self.num_pages, dtype=torch.long, device=device).scatter(0, pages.flatten(), seen.flatten())
        is_seen = torch.arange(page_size, device=device) < of_page[:, None]
        # By bytes: torch selects no FP8.
        self.pool.view(torch.uint8).copy_(self.clean.view(torch.uint8).masked_fill(~is_seen[..., None], NAN_BYTE))
        return torch.where(begins < lens[:, None], pages, 0).int()

    def _judge(self, a: Latent) -> None:
        """Compare with the float32 oracle; errors over budget, NaN, and padding that is not zero are a failure."""
        want = attend_padded(a, self.shape.query_len, self.kind.longest)
        is_token, queries = want.is_token, a.cu_seqlens_q.diff()
        row = (a.cu_seqlens_q[:-1, None] + torch.arange(self.shape.query_len, device=self.device)).clamp(max=len(a.q) - 1)
        none = ~is_token[..., None, None]
        got, out, rounded = (x.masked_fill(none, 0.0) for x in (a.out[row].float(), want.out, want.rounded))
        got_lse, is_empty = a.lse.T[row], want.lse.isneginf()
        tiny = torch.finfo(torch.float32).tiny  # a batch without a key has no budget: its rows must be 0
        share = (got - out).abs().max() / rounding_budget(rounded, out, self.dtype).clamp(min=tiny)
        counted = is_token[..., None] & ~is_empty
        lse_error, lse = ((x.masked_fill(~counted, 0.0)).abs().max() for x in (got_lse - want.lse, want.lse))
        lse_share = lse_error / (LSE_RELATIVE * lse.clamp(min=1.0))
        bad = ~(share <= 1) | ~(lse_share <= 1) | ~got.isfinite().all()
        bad |= ((got != 0) & is_empty[..., None]).any() | (is_token[..., None] & (got_lse.isneginf() != is_empty)).any()
        is_padding = torch.arange(len(a.out), device=self.device) >= a.cu_seqlens_q[-1]
        bad |= (is_padding[:, None, None] & (a.out != 0)).any() | (is_padding & ~a.lse.isneginf()).any()
        self._count(a, queries, bad, torch.stack([share, lse_share]))

    def _count(self, a: Latent, queries: torch.Tensor, bad: torch.Tensor, shares: torch.Tensor) -> None:
        counts, lens = self.tally.counts, a.seqused_k
        first = torch.where(bad & (counts[FAILURES] == 0), counts[0], counts[FIRST])
        longest = torch.maximum(counts[LONGEST], lens.max())
        one, rows = torch.ones_like(first), torch.full_like(first, self.kind.rows)
        counts[:LONGEST] += torch.stack([one, rows, (lens == 0).sum(), (lens == 1).sum(), (queries == 0).sum()])
        counts[LONGEST:].copy_(torch.stack([longest, counts[FAILURES] + bad, first]))
        self.tally.worst.copy_(torch.fmax(self.tally.worst, shares))


def fuzz_graphs(shapes: tuple[Shape, ...], batches: int, seconds: float, seed: int) -> dict[str, Any]:
    """`batches` batches, as many of each shape, or what `seconds` allow: a failure is counted, and its number given.

    Raises:
        AssertionError: a batch was wrong.
    """
    begin, pool, tally, done = time.monotonic(), torch.cuda.graph_pool_handle(), Tally.on("cuda"), 0
    torch.manual_seed(seed)
    seen: dict[str, int] = {}
    for index, shape in enumerate(shapes):
        end = begin + seconds * (index + 1) / len(shapes)
        target = done + (batches - done) // (len(shapes) - index)
        fuzzers = [LatentFuzzer(shape, kind, tally, "cuda") for kind in KINDS]
        replays = [fuzzer.captured(pool) for fuzzer in fuzzers]
        first, done = done, done + len(replays)
        turns = [i for i, kind in enumerate(KINDS) for _ in range(kind.weight)]
        turns = [turns[(37 * i) % len(turns)] for i in range(len(turns))]  # mixed: 37 and 100 have no common divisor
        assert len(set(range(0, 37 * len(turns), 37))) == len(turns) == 100
        while done < target and time.monotonic() < end:
            for _ in range(min(AT_ONCE, target - done)):
                replays[turns[done % len(turns)]]()
                done += 1
            torch.cuda.synchronize()
        seen[str(shape)] = done - first
        failures, where = tally.counts[FAILURES:].tolist()
        assert failures == 0, f"{failures} batches of {shape} and those before are wrong; the first is number {where} of seed {seed}"
    counts = dict(zip(COUNTS, tally.counts.tolist(), strict=True))
    assert counts["batches"] == done, f"batches: expected {done} judged, got {counts['batches']}"
    worst = tally.worst.tolist()
    return counts | {
        "seed": seed, "worst_share_out": worst[0], "worst_share_lse": worst[1], "seconds": round(time.monotonic() - begin), "seen": seen
    }  # fmt: skip
