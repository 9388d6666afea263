"""Fuzzed ragged batches, drawn and judged on the device: thousands a second, since a batch is one replay of a captured graph.

Lengths, page tables, poison, oracle, yardstick and comparison are tensor operations of fixed shapes: a batch of fewer sequences or tokens
is padded, as an engine's is. What is an argument on the host (how many sequences, how wide a window, how high a cap) is drawn once a
graph, of which a setup has `GRAPHS`. Without a GPU the same steps run one by one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from fa4_backend import AttentionMetadata, AttentionPlan, AttentionProblem, BatchLimits, paged_attention, plan_attention, ragged_attention
from fa4_backend.arguments import AttentionArguments
from fa4_backend.error_budget import LSE_RELATIVE, rounding_budget
from fa4_backend.kernels.launch_abi import prefill_arguments, schedule_arguments
from fa4_backend.kernels.schedule.work_list import NO_WINDOW, PARTIAL_SLOT, QUEUE_TOTAL
from fa4_backend.problem import FP8_MAX, RAGGED

SCALES = ("k_scale", "v_scale")
NO_PAGE = 2**30  # page-table entries past a sequence's pages: following one is an access far outside
PADDING_ROWS = 3  # of q and out at least, past the last query
GRAPHS = 6  # draws of what a graph cannot draw
AT_ONCE = 64  # batches between two looks at the clock


@dataclass(frozen=True)
class FuzzSetup:
    """One problem and the batches drawn for it."""

    name: str
    problem: AttentionProblem
    max_seqs: int = 6
    max_query: int = 90
    max_kv: int = 420
    min_query: int = 0
    prefill_only: bool = False  # rows of one token go to the prefill kernel too
    decode_query_len: int = 1
    min_part_blocks: int | None = None  # n_blocks of the shortest part of a prefill tile; None: the plan's
    decode_share: float = 0.0  # of the rows, these have at most `decode_query_len` tokens whatever `max_query` is
    per_head_scales: bool = True  # of K and V in FP8: a scale a KV head, or one for all
    converts: bool = False  # K and V in FP8 are brought to 16 bits once a call; then rows of one token are decode rows
    is_narrow: bool = False  # batches are decode rows alone, on the plan's narrow tiles
    has_messages: bool = False  # prefill rows are short enough for the plan's tiles for messages, decode rows beside them
    is_extreme: bool = False  # logits from one end of a soft cap of up to 300 to the other, V of up to 2^126

    def plan(self, num_sms: int | None) -> AttentionPlan:
        """A plan whose limits hold every batch of the setup; its prefill kernel alone where nothing else is to run."""
        room = self.max_seqs * self.max_kv if self.converts else 0
        limits = BatchLimits(self.max_seqs, self.max_seqs * self.max_query + 8, self.max_kv, self.decode_query_len, room)
        plan = plan_attention(self.problem, limits, num_sms=num_sms)
        if self.converts:
            return converting_plan(plan, self.min_part_blocks)
        assert not self.is_narrow or plan.narrow is not None, plan.describe()
        assert not self.has_messages or plan.messages is not None, plan.describe()
        return prefill_plan(plan) if self.prefill_only else plan


@dataclass
class FuzzResult:
    """What was seen over all batches of a setup."""

    name: str
    batches: int = 0
    rows: int = 0
    cut: int = 0  # batches with prefill tiles that were cut along KV
    failures: int = 0
    worst_out: float = 0.0  # largest error as a share of its budget
    worst_lse: float = 0.0
    first_failure: int = -1  # number of the first batch over budget
    seconds: float = 0.0


class HostDraw(NamedTuple):
    """What is an argument on the host: the same for all batches of a graph."""

    num_seqs: int
    kv_rows: int  # of k and v without pages
    window_left: int | None
    window_right: int | None
    softcap: float


class Batch(NamedTuple):
    """A drawn batch: what the operator is given, and what the oracle needs besides."""

    arguments: AttentionArguments
    query_lens: torch.Tensor  # (num_seqs,) int64
    kv_lens: torch.Tensor
    table_pages: torch.Tensor  # (num_seqs, pages_per_seq) int64: pages of the clean pool; 0 where a sequence has none


class Fuzzer:
    """Draws, runs and judges batches of one setup on one device."""

    def __init__(self, setup: FuzzSetup, device: str, seed: int = 0, *, has_graphs: bool = True) -> None:
        p = setup.problem
        self.setup, self.device, self.dtype, self.kv_dtype = setup, device, getattr(torch, p.dtype), getattr(torch, p.kv_dtype)
        self.has_graphs = has_graphs and device.startswith("cuda")
        self.plan = setup.plan(_num_sms(device))
        self.metadata = AttentionMetadata.allocate(self.plan, device)
        work = self.metadata.work
        if work is not None and setup.prefill_only:
            work.shape = replace(work.shape, decode_query_len=0)
        if work is not None and setup.min_part_blocks is not None:
            work.shape = replace(work.shape, min_part_blocks=setup.min_part_blocks)
        self.pages_per_seq = -(-setup.max_kv // p.page_size)
        self.num_pages = setup.max_seqs * self.pages_per_seq + 2
        torch.manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        shape = (self.num_pages, p.page_size, p.num_kv_heads)
        # Numbers that shift values into the subnormal ones of FP8 and past its largest, of K and of V.
        self.scales = torch.linspace(-7, 6, 2 * p.num_kv_heads, device=device).exp2().view(-1, 2).T
        if not setup.per_head_scales:
            self.scales = self.scales[:, :1]
        self.k, self.v = (self._draw((*shape, n), scale) for n, scale in zip((p.head_dim, p.head_dim_v), self.scales, strict=True))
        if setup.is_extreme:
            self.v = self.v.clamp(-7, 7) * 2.0**123
        self.pool = torch.empty(*shape, p.head_dim + p.head_dim_v, dtype=self.kv_dtype, device=device)
        self.nan = torch.full((), math.nan, device=device).to(self.kv_dtype).view(_bits(self.kv_dtype))
        # Of all batches so far: how many, rows, batches with cut tiles, failures, the first of them.
        self.counts = torch.tensor([0, 0, 0, 0, -1], device=device)
        self.worst = torch.zeros(2, device=device)

    def _draw(self, shape: tuple[int, ...], scale: torch.Tensor) -> torch.Tensor:
        """Clean K or V as it is stored; in FP8 divided by the heads' scale, saturated, one value in eight 0."""
        values = torch.randn(*shape, device=self.device)
        if self.setup.problem.has_kv_scales:
            values = (values / scale[:, None]).clamp(-FP8_MAX, FP8_MAX) * (torch.rand(shape, device=self.device) > 0.125)
        return values.to(self.kv_dtype)

    def run(self, batches: int, seconds: float = math.inf) -> FuzzResult:
        """Run `batches` batches, or as many as begin within `seconds`; a failure is counted, not raised."""
        begin = time.perf_counter()
        steps = [self._capture(self._draw_host(index)) for index in range(min(GRAPHS, batches))]
        done = len(steps)  # a step is run once before it is captured
        while done < batches and time.perf_counter() - begin < seconds:
            for _ in range(min(AT_ONCE, batches - done)):
                steps[done % len(steps)]()
                done += 1
            self.counts.cpu()
        counts = self.counts.tolist()
        assert counts[0] == done, f"batches: expected {done}, got {counts[0]} judged"
        seen = FuzzResult(self.setup.name, *counts[:4], *self.worst.tolist(), first_failure=counts[4])
        seen.seconds = round(time.perf_counter() - begin, 1)
        return seen

    def _draw_host(self, index: int) -> HostDraw:
        """The first has as many sequences as there can be."""
        s, mask, draw = self.setup, self.setup.problem.mask, self.rng
        num_seqs = int(draw.integers(1, s.max_seqs + 1)) if index else s.max_seqs
        return HostDraw(
            num_seqs,
            kv_rows=max(1, int(num_seqs * s.max_kv * draw.uniform(0.3, 1.0))),
            window_left=int(draw.integers(0, 200)) if mask.has_window_left else None,
            window_right=int(draw.integers(0, 60)) if mask.has_window_right else None,
            softcap=float(draw.uniform(5, 300 if s.is_extreme and index % 3 == 2 else 55)) if mask.has_softcap else 0.0,
        )

    def _capture(self, host: HostDraw) -> Callable[[], object]:
        """A batch with these arguments, again and again; one has been run."""

        def step() -> None:
            batch = self._batch(host)
            self._launch(batch.arguments)
            self._judge(batch, host)

        step()
        if not self.has_graphs:
            return step
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def _integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Whole numbers from `low` to `high`, both included."""
        return torch.randint(low, high + 1, shape, device=self.device)

    def _chance(self, share: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape, device=self.device) < share

    def _lengths(self, host: HostDraw) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and KV lengths; edges of tiles, pages and boxes more often than chance. Of some batches the last rows are padding."""
        s, n = self.setup, host.num_seqs
        query = self._integers(s.min_query, s.max_query, n)
        if s.decode_share:
            query = torch.where(self._chance(s.decode_share, n), self._integers(0, s.decode_query_len, n), query)
        edges = self._integers(0, s.max_kv // 16, n) * 16 + self._integers(-1, 1, n)
        kv = torch.where(self._chance(0.4, n) & (edges > 0), edges, self._integers(0, s.max_kv, n))
        kv = torch.where(self._chance(0.7, n), torch.maximum(kv, query), kv).clamp(max=s.max_kv)
        is_padding = torch.arange(n, device=self.device) >= torch.maximum(self._integers(1, n), n * self._chance(0.5).long())
        query, kv = query.masked_fill(is_padding, 0), kv.masked_fill(is_padding, 0)
        if s.problem.kv_source == RAGGED:
            kv = torch.minimum(kv, (host.kv_rows - (kv.cumsum(0) - kv)).clamp(min=0))
        return query, kv

    def _batch(self, host: HostDraw) -> Batch:
        p, device = self.setup.problem, self.device
        query_lens, kv_lens = self._lengths(host)
        cu_seqlens_q = _bounds(query_lens)
        num_rows = host.num_seqs * self.setup.max_query + PADDING_ROWS
        is_row = torch.arange(num_rows, device=device) < cu_seqlens_q[-1]
        peak = 1 + 3 * self._chance(0.2).float()
        if self.setup.is_extreme:
            peak = peak * (1 + 60 * self._chance(0.7).float())
        q = (torch.randn(num_rows, p.num_q_heads, p.head_dim, device=device) * peak).masked_fill(~is_row[:, None, None], math.nan)
        out = torch.full((num_rows, p.num_q_heads, p.head_dim_v), math.nan, device=device).to(getattr(torch, p.out_dtype))
        lse = torch.full((p.num_q_heads, num_rows), math.nan, device=device) if p.has_lse else None
        table, table_pages = self._poison(query_lens, kv_lens, host.window_left)
        k_cache, v_cache = self.pool.split([p.head_dim, p.head_dim_v], dim=-1)
        arguments = AttentionArguments(
            q.to(self.dtype), k_cache, v_cache, table, cu_seqlens_q, kv_lens.int(), out, lse, p.head_dim**-0.5, host.window_left,
            host.window_right, host.softcap, torch.randn(p.num_q_heads, device=device) if p.mask.has_sinks else None,
            torch.rand(p.num_q_heads, device=device) if p.mask.has_alibi else None,
            *(self.scales.expand(2, p.num_kv_heads) if p.has_kv_scales else (None, None)),
            # From all of out in a few units to most of it saturated.
            out_scale=self._integers(-14, -5, 1).float().exp2() if p.has_out_scale else None,
        )  # fmt: skip
        if p.kv_source == RAGGED:
            arguments = self._without_pages(arguments, kv_lens, table_pages, host.kv_rows)
        return Batch(arguments, query_lens, kv_lens, table_pages)

    def _without_pages(self, a: AttentionArguments, kv_lens: torch.Tensor, table_pages: torch.Tensor, kv_rows: int) -> AttentionArguments:
        """The same call over K and V without pages, rows of NaN behind them; the pool's pages hold a token each."""
        p, cu_seqlens_k, row = self.setup.problem, _bounds(kv_lens), torch.arange(kv_rows, device=self.device)
        seq = torch.searchsorted(cu_seqlens_k[1:], row.int(), right=True).clamp(max=len(kv_lens) - 1)
        page = table_pages[seq, (row - cu_seqlens_k[seq]).clamp(max=self.pages_per_seq - 1)]
        bits = self.pool.view(_bits(self.kv_dtype))[page, 0]
        tokens = torch.where((row < cu_seqlens_k[-1])[:, None, None], bits, self.nan).view(self.kv_dtype)
        k, v = tokens.split([p.head_dim, p.head_dim_v], dim=-1)
        return a._replace(k_cache=k, v_cache=v, page_table=None, cu_seqlens_k=cu_seqlens_k)

    def _poison(self, query_lens: torch.Tensor, kv_lens: torch.Tensor, window_left: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Page table and pages of a batch; fills the pool: clean rows where a row of the sequence sees a key, NaN everywhere else.

        Pages that no row sees, left of a window, stand in the table as they are, as -1 or as `NO_PAGE`.
        """
        p, device = self.setup.problem, self.device
        shape = (len(kv_lens), self.pages_per_seq)
        pages = torch.rand(self.num_pages, device=device).argsort()[: math.prod(shape)].view(shape)
        seen_from = (kv_lens - query_lens - window_left).clamp(min=0) if window_left is not None else torch.zeros_like(kv_lens)
        hidden = torch.where(query_lens > 0, torch.minimum(seen_from, kv_lens), kv_lens)
        begins = torch.arange(self.pages_per_seq, device=device) * p.page_size
        used, unseen = begins < kv_lens[:, None], begins + p.page_size <= hidden[:, None]
        is_odd = used & unseen & self._chance(0.7, *shape)
        table = pages.masked_fill(is_odd & self._chance(0.5, *shape), -1).masked_fill(is_odd & self._chance(0.5, *shape), NO_PAGE)
        table = table.masked_fill(~used, NO_PAGE).int()
        # Rows of each page that hold a key somebody sees.
        first, last = (
            torch.zeros(self.num_pages, dtype=torch.long, device=device)
            .scatter(0, pages.flatten(), (tokens[:, None] - begins).clamp(0, p.page_size).flatten())[:, None]
            for tokens in (hidden, kv_lens)
        )  # fmt: skip
        row = torch.arange(p.page_size, device=device)
        valid = ((row >= first) & (row < last))[..., None, None]
        # By bits: torch selects no FP8.
        bits = _bits(self.kv_dtype)
        pool = self.pool.view(bits)
        pool[..., : p.head_dim] = torch.where(valid, self.k.view(bits), self.nan)
        pool[..., p.head_dim :] = torch.where(valid, self.v.view(bits), self.nan)
        return table, torch.where(used, pages, 0)

    def _launch(self, a: AttentionArguments) -> None:
        """The public operator, or the schedule and the prefill kernel alone."""
        if self.setup.prefill_only:
            prefill_alone(self.metadata, a)
            return
        names = ("window_left", "window_right", "softcap", "sinks", "alibi_slopes", *SCALES, "out_scale")
        values = {name: getattr(a, name) for name in names}
        bounds = {"max_seqlen_q": self.setup.max_query, "max_seqlen_k": self.setup.max_kv}
        if self.setup.problem.kv_source == RAGGED:
            self.metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, cu_seqlens_k=a.cu_seqlens_k, **bounds)
            tensors = (a.q, a.k_cache, a.v_cache, a.cu_seqlens_q, a.cu_seqlens_k)
            ragged_attention(*tensors, plan=self.plan, metadata=self.metadata, out=a.out, lse=a.lse, **values)
        else:
            prefill_keys = self.plan.limits.convert_keys if self.setup.converts else None
            if self.setup.has_messages:
                prefill_keys = self.setup.max_seqs * self.setup.max_kv
            lengths = {"cu_seqlens_q": a.cu_seqlens_q, "seqused_k": a.seqused_k}
            self.metadata.refresh(**lengths, prefill_keys=prefill_keys, decode_alone=self.setup.is_narrow, **bounds)
            paged_attention(*a[:6], plan=self.plan, metadata=self.metadata, out=a.out, lse=a.lse, **values)

    def _stands_for(self, stored: torch.Tensor, scale: torch.Tensor, table_pages: torch.Tensor) -> torch.Tensor:
        """What the pages of the sequences stand for, as float32: (num_seqs, tokens, num_kv_heads, head_dim)."""
        listed = stored.view(_bits(stored.dtype))[table_pages].view(stored.dtype).flatten(1, 2).float()
        return listed * scale[:, None] if self.setup.problem.has_kv_scales else listed

    def _judge(self, batch: Batch, host: HostDraw) -> None:
        """Compare with a float32 oracle made from the clean pages; errors over budget, NaN and padding that is not zero are failures."""
        p, a, device = self.setup.problem, batch.arguments, self.device
        position = torch.arange(self.setup.max_query, device=device)
        is_row = position < batch.query_lens[:, None]  # (num_seqs, max_query)
        row = (a.cu_seqlens_q[:-1, None] + position).masked_fill(~is_row, 0)
        # Float32 of all rows of a sequence, heads by KV head: (num_seqs, num_kv_heads, group, max_query, ..).
        of_heads = (p.num_kv_heads, p.q_per_kv)
        q = a.q[row].float().masked_fill(~is_row[..., None, None], 0.0).unflatten(2, of_heads)
        k, v = (self._stands_for(x, scale, batch.table_pages) for x, scale in zip((self.k, self.v), self.scales, strict=True))
        scores = torch.einsum("bthgd,bnhd->bhgtn", q, k) * p.head_dim**-0.5
        if host.softcap:
            scores = host.softcap * torch.tanh(scores / host.softcap)
        diagonal = ((batch.kv_lens - batch.query_lens)[:, None] + position)[..., None]
        columns = torch.arange(k.shape[1], device=device)
        if a.alibi_slopes is not None:
            distance = (diagonal - columns).abs()[:, None, None]
            scores = scores - a.alibi_slopes.view(*of_heads, 1, 1) * distance
        seen = (columns < batch.kv_lens[:, None, None]) & is_row[..., None]
        right = 0 if p.mask.is_causal else host.window_right
        if right is not None:
            seen &= columns <= diagonal + right
        if host.window_left is not None:
            seen &= columns >= diagonal - host.window_left
        scores = scores.masked_fill(~seen[:, None, None], -math.inf)
        want_lse = torch.logsumexp(scores, dim=-1)
        empty = want_lse.isneginf()
        if a.sinks is not None:
            sinks = a.sinks.view(*of_heads, 1).expand_as(want_lse)
            want_lse = torch.where(empty, want_lse, torch.logaddexp(want_lse, sinks))
        weights = torch.exp(scores - want_lse.masked_fill(empty, 0.0)[..., None])
        want = torch.einsum("bhgtn,bnhd->bthgd", weights, v).flatten(2, 3)
        rounded = torch.einsum("bhgtn,bnhd->bthgd", weights.to(self.dtype).float(), v).flatten(2, 3).to(self.dtype).float()
        got = a.out[row].float()
        is_empty = empty.permute(0, 3, 1, 2).flatten(2, 3)
        budget = rounding_budget(rounded, want, self.dtype)
        share = self._out_share(got, want, budget, is_row, a.out_scale)
        is_padding = torch.arange(len(a.out), device=device) >= a.cu_seqlens_q[-1]
        bad = (is_row[..., None, None] & ~got.isfinite()).any() | ~(share <= 1)
        bad |= (is_padding[:, None, None] & (a.out.float() != 0)).any() | ((is_empty & is_row[..., None])[..., None] & (got != 0)).any()
        lse_share = torch.zeros((), device=device)
        if a.lse is not None:
            got_lse = a.lse.T[row].unflatten(2, of_heads).permute(0, 2, 3, 1)
            counted = is_row[:, None, None] & ~empty
            error = (got_lse - want_lse).masked_fill(~counted, 0.0).abs().max()
            lse_share = error / (LSE_RELATIVE * want_lse.masked_fill(~counted, 0.0).abs().max().clamp(min=1.0))
            bad |= ~(lse_share <= 1) | (is_row[:, None, None] & (got_lse.isneginf() != empty)).any()
            bad |= (is_padding & ~a.lse.isneginf()).any()
        self.counts[4] = torch.where(bad & (self.counts[3] == 0), self.counts[0], self.counts[4])
        self.counts[:4] += torch.stack([torch.ones_like(bad).long(), is_row.sum(), self._has_parts().long(), bad.long()])
        self.worst.copy_(torch.maximum(self.worst, torch.stack([share, lse_share])))

    @staticmethod
    def _out_share(
        got: torch.Tensor, want: torch.Tensor, budget: torch.Tensor, is_row: torch.Tensor, out_scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Largest error of `out`'s rows as a share of its budget; out in FP8 as in `BuiltCase`: beyond half a unit of e4m3."""
        allowed = torch.zeros((), device=want.device)
        if out_scale is not None:
            largest = FP8_MAX * out_scale
            want = torch.clamp(want, -largest, largest)
            got, allowed, budget = got * out_scale, 2.0**-4 * want.abs(), (1 + 2.0**-4) * budget + 2.0**-10 * out_scale[0]
        error = ((got - want).abs() - allowed).masked_fill(~is_row[..., None, None], 0.0).max()
        # A batch of empty rows has no budget; its rows must be 0, which is asked apart.
        return error / budget.clamp(min=torch.finfo(torch.float32).tiny)

    def _has_parts(self) -> torch.Tensor:
        """Whether some tile of the step's prefill list is cut along KV; stays on the device."""
        work = self.metadata.work
        if work is None:
            return torch.zeros((), device=self.device)
        tiles, total = work.prefill_tiles, work.prefill_queue[0, QUEUE_TOTAL]
        return ((torch.arange(len(tiles), device=tiles.device) < total) & (tiles[:, PARTIAL_SLOT] >= 0)).any()


def converting_plan(plan: AttentionPlan, min_part_blocks: int | None = None) -> AttentionPlan:
    """The same plan, whose steps always convert K and V once a call; `min_part_blocks` as in a FuzzSetup."""
    plan = plan.always_converting()
    assert plan.kernels is not None and plan.kernels.converted is not None
    if min_part_blocks is None:
        return plan
    converted = plan.kernels.converted
    converted = replace(converted, work=replace(converted.work, min_part_blocks=min_part_blocks))
    return replace(plan, kernels=replace(plan.kernels, converted=converted))


def prefill_plan(plan: AttentionPlan) -> AttentionPlan:
    """The same plan with a prefill kernel that has no decode kernel before it, and starts when the schedule has ended."""
    kernels = plan.kernels
    assert kernels is not None and kernels.prefill is not None
    alone = replace(kernels.prefill, kernel=replace(kernels.prefill.kernel, is_dependent=False))
    return replace(plan, kernels=replace(kernels, decode=None, prefill=alone), narrow=None, messages=None)


def prefill_alone(metadata: AttentionMetadata, a: AttentionArguments) -> None:
    """The schedule, then the prefill kernel of a `prefill_plan`, over all rows."""
    kernels, work, problem = metadata.kernels, metadata.work, metadata.plan.problem
    assert kernels is not None and kernels.prefill is not None and work is not None
    kernels.schedule(*schedule_arguments(work, a.cu_seqlens_q, a.seqused_k, window_right=0 if problem.mask.is_causal else NO_WINDOW))
    kernels.prefill(*prefill_arguments(a, work))


def _bounds(lens: torch.Tensor) -> torch.Tensor:
    """Where each sequence begins, and the end: int32."""
    return torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()


def _bits(dtype: torch.dtype) -> torch.dtype:
    """The integer type of the same size."""
    return torch.uint8 if dtype.itemsize == 1 else torch.int16


def _num_sms(device: str) -> int | None:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.startswith("cuda") else None
