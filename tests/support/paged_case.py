"""Ragged batches, with pages or without, with everything unused poisoned, and their judgement by `fa4_backend.error_budget`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fa4_backend import (
    AttentionMetadata,
    AttentionPlan,
    AttentionProblem,
    BatchLimits,
    MaskFeatures,
    paged_attention,
    plan_attention,
    ragged_attention,
)
from fa4_backend.arguments import AttentionArguments
from fa4_backend.error_budget import Judge, judge
from fa4_backend.problem import FP8_MAX, PAGED
from fa4_backend.reference import gather_pages

NO_PAGE = 2**30  # page-table entry of a page that no row sees: following it is an access far outside


@dataclass(frozen=True)
class PagedCase:
    """One batch, described without tensors; `build` makes them."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"  # FP8 draws scales from 2^-7 to 2^6, saturated values, zeros and subnormals
    q_dtype: str = "auto"  # FP8, beside such K and V: likewise
    per_head_scales: bool = True
    out_dtype: str = "auto"
    out_scale: float = 0.005  # of out in FP8: values above 2.24 are saturated
    page_size: int = 16
    arch: str = "cpu"
    is_causal: bool = True
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    batch_invariant: bool = False
    decode_query_len: int = 1
    converts: bool = False  # K and V in FP8 are converted once a call, however short rows are
    decode_alone: bool = False  # the host says that there are decode rows alone
    counts_prefill_keys: bool = False  # the host says how many keys prefill rows have, as of steps that are not captured
    layout: str = "separate"  # "separate": two pools (NHD); "nhd": K and V adjacent, token-major; "hnd": adjacent, head-major
    kv_source: str = PAGED  # RAGGED: the same values without pages
    padding_rows: int = 3  # poisoned rows of q and out past cu_seqlens_q[-1], and of k and v without pages past cu_seqlens_k[-1]
    seed: int = 0
    peaked: float = 1.0  # factor on queries: large values give rows whose softmax is one key

    def num_hidden(self, seq_idx: int) -> int:
        """Keys at the start of a sequence that none of its rows sees, and which are poisoned therefore."""
        query_len, kv_len = self.query_lens[seq_idx], self.kv_lens[seq_idx]
        if self.window_left is None and query_len:
            return 0
        return kv_len if not query_len else min(max(0, kv_len - query_len - (self.window_left or 0)), kv_len)

    @property
    def prefill_keys(self) -> int:
        """Keys of the rows that are no decode rows."""
        return sum(kv for q, kv in zip(self.query_lens, self.kv_lens, strict=True) if q > self.decode_query_len)

    def problem(self) -> AttentionProblem:
        """The case's compile-time facts."""
        return AttentionProblem(
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v or self.head_dim,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            q_dtype=self.q_dtype,
            out_dtype=self.out_dtype,
            page_size=self.page_size if self.kv_source == PAGED else 1,
            kv_source=self.kv_source,
            arch=self.arch,
            mask=MaskFeatures(
                is_causal=self.is_causal,
                has_window_left=self.window_left is not None,
                has_window_right=self.window_right is not None,
                has_softcap=self.softcap > 0,
                has_sinks=self.sinks,
                has_alibi=self.alibi,
            ),
            has_lse=True,
            batch_invariant=self.batch_invariant,
        )

    def plan(self, num_sms: int | None = None) -> AttentionPlan:
        """A plan whose limits just hold the case."""
        limits = BatchLimits(
            max_num_seqs=len(self.query_lens),
            max_num_tokens=max(sum(self.query_lens) + self.padding_rows, self.decode_query_len),
            max_seqlen_k=max(*self.kv_lens, 1),
            decode_query_len=self.decode_query_len,
            convert_keys=max(self.prefill_keys, 1) if self.converts else 0,
        )
        plan = plan_attention(self.problem(), limits, num_sms=num_sms)
        return plan.always_converting() if self.converts else plan

    def build(self, device: torch.device | str = "cpu") -> BuiltCase:
        """Draw the batch. Unused page rows, unused pages, padding rows and outputs hold NaN.

        Table entries past a sequence's pages name a page of NaN, not one outside the pool: a tensor copy from outside gives zeros, which a
        missing bound could hide behind. The table ends with the longest sequence's last page. Keys that no row sees are NaN or infinite;
        pages that hold nothing else are entered as -1, as `NO_PAGE` or as themselves. Without pages they lie between what others see.
        """
        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)
        scales = self._scales() if self.problem().has_kv_scales else (None, None)
        drawn = [self._draw(seq_idx, scales, generator) for seq_idx in range(len(self.kv_lens))]
        page_table = cu_seqlens_k = None
        if self.kv_source == PAGED:
            k_cache, v_cache, page_table = self._in_pages(drawn)
        else:
            k_cache, v_cache = self._empty_caches(1, sum(self.kv_lens) + self.padding_rows)
            k_cache, v_cache = k_cache[0], v_cache[0]
            cu_seqlens_k = torch.tensor([0, *self.kv_lens]).cumsum(0).int()
            for begin, values in zip(cu_seqlens_k.tolist(), drawn, strict=False):
                for cache, rows in zip((k_cache, v_cache), values, strict=True):
                    cache[begin : begin + rows.shape[0]] = rows
        cu_seqlens_q = torch.tensor([0, *self.query_lens]).cumsum(0).int()
        total_q = int(cu_seqlens_q[-1])
        q = torch.full((total_q + self.padding_rows, self.num_q_heads, self.head_dim), math.nan, dtype=dtype)
        q[:total_q] = (torch.randn(total_q, self.num_q_heads, self.head_dim, generator=generator) * self.peaked).to(dtype)
        q_scale = None
        if self.problem().has_q_scale:
            q_scale = self._query_scale()
            of_heads = q_scale.repeat_interleave(self.num_q_heads // self.num_kv_heads)
            q = quantise(q.float(), of_heads).to(getattr(torch, self.q_dtype))
        out_dtype = getattr(torch, self.problem().out_dtype)
        out = torch.full((q.shape[0], self.num_q_heads, v_cache.shape[-1]), math.nan, dtype=out_dtype)
        out_scale = torch.tensor([self.out_scale]) if self.problem().has_out_scale else None
        lse = torch.full((self.num_q_heads, q.shape[0]), math.nan)
        sinks = torch.randn(self.num_q_heads, generator=generator) if self.sinks else None
        slopes = torch.rand(self.num_q_heads, generator=generator) if self.alibi else None
        arguments = AttentionArguments(
            q, k_cache, v_cache, page_table, cu_seqlens_q, torch.tensor(self.kv_lens, dtype=torch.int32), out, lse,
            self.head_dim**-0.5, self.window_left, self.window_right, self.softcap, sinks, slopes, *scales, out_scale, cu_seqlens_k,
            q_scale,
        )  # fmt: skip
        moved = (move_strided(x, device) if isinstance(x, torch.Tensor) else x for x in arguments)
        return BuiltCase(self, AttentionArguments(*moved), total_q)

    def _draw(
        self, seq_idx: int, scales: tuple[torch.Tensor | None, torch.Tensor | None], generator: torch.Generator
    ) -> list[torch.Tensor]:
        """Keys and values of a sequence, (kv_len, num_kv_heads, d) each as stored; those that no row sees NaN or infinite."""
        kv_len, hidden, kv_dtype = self.kv_lens[seq_idx], self.num_hidden(seq_idx), getattr(torch, self.problem().kv_dtype)
        poison = torch.Generator().manual_seed(self.seed + 2 + 1000 * seq_idx)
        # FP8 has no infinity, and torch saturates it.
        unseen = torch.tensor([math.nan, math.inf, -math.inf] if scales[0] is None else [math.nan] * 3)
        values = [
            quantise(torch.randn(kv_len, self.num_kv_heads, dim, generator=generator), scale).to(kv_dtype)
            for dim, scale in zip((self.head_dim, self.head_dim_v or self.head_dim), scales, strict=True)
        ]
        for drawn in values:
            drawn[:hidden] = unseen[torch.randint(3, (hidden, 1, 1), generator=poison)].to(kv_dtype)
        return values

    def _in_pages(self, drawn: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A pool of drawn keys and values, and its table. Pages are drawn apart from values: the same sequences in pages of any size."""
        pages_of = [-(-n // self.page_size) for n in self.kv_lens]
        num_pages = sum(pages_of) + 2
        k_cache, v_cache = self._empty_caches(num_pages, self.page_size)
        poison = torch.Generator().manual_seed(self.seed + 2)
        free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(self.seed + 1)).tolist()
        page_table = torch.full((len(self.kv_lens), max(*pages_of, 1)), free.pop(0), dtype=torch.int32)
        for seq_idx, kv_len in enumerate(self.kv_lens):
            for logical in range(pages_of[seq_idx]):
                page = free.pop()
                is_hidden = (logical + 1) * self.page_size <= self.num_hidden(seq_idx)
                page_table[seq_idx, logical] = (page, -1, NO_PAGE)[int(torch.randint(3, (), generator=poison)) if is_hidden else 0]
                rows = slice(logical * self.page_size, min((logical + 1) * self.page_size, kv_len))
                for cache, values in zip((k_cache, v_cache), drawn[seq_idx], strict=True):
                    cache[page, : rows.stop - rows.start] = values[rows]
        return k_cache, v_cache, page_table

    def _scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """k_scale and v_scale, (num_kv_heads,) each: a number a head, or one for all with stride 0."""
        generator = torch.Generator().manual_seed(self.seed + 3)
        exponents = torch.rand(2, self.num_kv_heads, generator=generator) * 13 - 7
        exponents[:, 0] = -7.0  # values of 3.5 and more are saturated
        k_scale, v_scale = exponents.exp2()
        if self.per_head_scales:
            return k_scale, v_scale
        return k_scale[:1].expand(self.num_kv_heads), v_scale[:1].expand(self.num_kv_heads)

    def _query_scale(self) -> torch.Tensor:
        """q_scale, (num_kv_heads,), in the same way: 2^-7 to 2^-1, at which the largest query is not yet subnormal; times `peaked`."""
        exponents = torch.rand(self.num_kv_heads, generator=torch.Generator().manual_seed(self.seed + 4)) * 6 - 7
        exponents[0] = -7.0
        scale = exponents.exp2() * self.peaked
        return scale if self.per_head_scales else scale[:1].expand(self.num_kv_heads)

    def _empty_caches(self, num_pages: int, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        d, dv, dtype = self.head_dim, self.head_dim_v or self.head_dim, getattr(torch, self.problem().kv_dtype)
        if self.layout == "separate":
            return tuple(torch.full((num_pages, page_size, self.num_kv_heads, n), math.nan, dtype=dtype) for n in (d, dv))  # type: ignore[return-value]
        if self.layout == "nhd":
            pool = torch.full((num_pages, page_size, self.num_kv_heads, d + dv), math.nan, dtype=dtype)
        else:
            pool = torch.full((num_pages, self.num_kv_heads, page_size, d + dv), math.nan, dtype=dtype).transpose(1, 2)
        return pool.split([d, dv], dim=-1)  # type: ignore[return-value]


def quantise(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Values (keys, num_kv_heads, head_dim) as they are stored with a scale a KV head, saturated, a few of them 0; themselves without."""
    if scale is None:
        return values
    stored = (values / scale[:, None]).clamp(-448.0, 448.0)
    return stored.masked_fill(values.abs() < 0.05, 0.0)


def move_strided(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy on `device` with the same strides (K and V of one pool become two pools with gaps)."""
    if torch.device(device).type == "cpu":
        return tensor
    if tensor.dim() == 1:  # a scale for all heads has stride 0
        return tensor.as_strided((len(tensor) if tensor.stride(0) else 1,), (1,)).to(device).expand(len(tensor))
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return copy.copy_(tensor)


@dataclass
class BuiltCase:
    """A case's tensors, its run and its judgement."""

    case: PagedCase
    arguments: AttentionArguments
    total_q: int
    oracle: Judge | None = field(default=None)
    is_decoded: bool = False  # the decode kernel serves every row

    def run(self, plan: AttentionPlan | None = None, min_part_blocks: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the operator as a user would; returns out and lse, padding rows included.

        Args:
            min_part_blocks: n_blocks of the shortest part of a prefill tile; None: the plan's.
        """
        a = self.arguments
        plan = plan or self.case.plan()
        metadata = AttentionMetadata.allocate(plan, a.q.device)
        if min_part_blocks is not None:
            assert metadata.work is not None, f"min_part_blocks: expected a plan with kernels, got {self.case.arch=}"
            metadata.work.shape = replace(metadata.work.shape, min_part_blocks=min_part_blocks)
        bounds: dict[str, Any] = {"max_seqlen_q": max(*self.case.query_lens, 1), "max_seqlen_k": max(*self.case.kv_lens, 1)}
        if self.case.kv_source == PAGED:
            prefill_keys = self.case.prefill_keys if self.case.converts or self.case.counts_prefill_keys else None
            bounds |= {"prefill_keys": prefill_keys, "decode_alone": self.case.decode_alone}
            metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, **bounds)
            operator, tensors = paged_attention, a[:6]
        else:
            metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, cu_seqlens_k=a.cu_seqlens_k, **bounds)
            operator, tensors = ragged_attention, (a.q, a.k_cache, a.v_cache, a.cu_seqlens_q, a.cu_seqlens_k)
        out, lse = operator(
            *tensors, plan=plan, metadata=metadata, softmax_scale=a.softmax_scale, window_left=a.window_left, window_right=a.window_right,
            softcap=a.softcap, sinks=a.sinks, alibi_slopes=a.alibi_slopes, k_scale=a.k_scale, v_scale=a.v_scale, q_scale=a.q_scale,
            out_scale=a.out_scale, out=a.out, lse=a.lse,
        )  # fmt: skip
        assert lse is not None
        return out, lse

    def check(self, out: torch.Tensor, lse: torch.Tensor, *, padding_is_zero: bool = True) -> Errors:
        """Judge a result against the float32 oracle.

        Args:
            padding_is_zero: rows past the last query are 0 and -inf; False: untouched, since another kernel of the call writes them.

        Raises:
            AssertionError: padding is not as it should be, NaN or infinity stands where the oracle has none, or an error is over budget.
        """
        if padding_is_zero:
            assert (out[self.total_q :].float() == 0).all(), "rows of out past cu_seqlens_q[-1]: expected 0"
            assert lse[:, self.total_q :].isneginf().all(), "columns of lse past cu_seqlens_q[-1]: expected -inf"
        else:
            assert out[self.total_q :].float().isnan().all(), "rows of out past cu_seqlens_q[-1] were written"
            assert lse[:, self.total_q :].isnan().all(), "columns of lse past cu_seqlens_q[-1] were written"
        errors = self.errors(out, lse)
        assert errors.out <= errors.out_budget, f"out: {errors}"
        assert errors.lse <= errors.lse_budget, f"lse: {errors}"
        return errors

    def errors(self, out: torch.Tensor, lse: torch.Tensor) -> Errors:
        """Largest errors and their budgets; NaN and infinity positions must match the oracle's first."""
        if self.oracle is None:
            # Decode rows have weights of 16 bits: where all are, that is what they are held to.
            e4m3 = self.case.problem().has_q_scale and self.case.arch != "cpu" and not self.is_decoded
            self.oracle = judge(self.arguments, is_causal=self.case.is_causal, e4m3_weights=e4m3)
        want, want_lse, out_budget, lse_budget = self.oracle
        got, got_lse = out[: self.total_q].float(), lse[:, : self.total_q]
        assert got.isfinite().all(), f"out: {int((~got.isfinite()).sum())} values are not finite"
        assert torch.equal(got_lse.isneginf(), want_lse.isneginf()), "lse: -inf where the oracle has none, or the reverse"
        assert not got_lse.isnan().any(), f"lse: {int(got_lse.isnan().sum())} values are NaN"
        if self.total_q == 0:
            return Errors(0.0, 0.0, 0.0, 0.0)
        empty = want_lse.isneginf().transpose(0, 1)
        assert (got[empty] == 0).all(), "rows without a key: expected 0"
        finite = ~want_lse.isneginf()
        lse_error = (got_lse - want_lse)[finite].abs().max().item() if finite.any() else 0.0
        if self.arguments.out_scale is not None:
            return Errors(*self._stored_error(got, want, out_budget), lse_error, lse_budget)
        return Errors((got - want).abs().max().item(), out_budget, lse_error, lse_budget)

    def _stored_error(self, got: torch.Tensor, want: torch.Tensor, budget: float) -> tuple[float, float]:
        """Largest error and its budget of out in FP8, beyond half a unit of e4m3: 2^-4 of a value, or 2^-10 of the scale."""
        assert self.arguments.out_scale is not None
        scale = self.arguments.out_scale.item()
        want = want.clamp(-FP8_MAX * scale, FP8_MAX * scale)
        # Of a value that is off by `budget` itself.
        error = (got * scale - want).abs() - 2.0**-4 * want.abs()
        return error.max().item(), (1 + 2.0**-4) * budget + 2.0**-10 * scale


def repage(built: BuiltCase, page_size: int) -> BuiltCase:
    """The same batch, value by value, in pages of another size: two pools, unused rows and table entries poisoned."""
    a, case = built.arguments, replace(built.case, page_size=page_size, layout="separate")
    pages_of = [-(-n // page_size) for n in case.kv_lens]
    caches = case._empty_caches(sum(pages_of) + 2, page_size)
    page_table = torch.zeros((len(pages_of), max(*pages_of, 1)), dtype=torch.int32)  # page 0 holds NaN
    page = 1
    for seq_idx, kv_len in enumerate(case.kv_lens):
        hidden = case.num_hidden(seq_idx)
        for old, new in zip((a.k_cache, a.v_cache), caches, strict=True):
            tokens = gather_pages(old, a.page_table[seq_idx], hidden, kv_len).cpu()
            new[page : page + pages_of[seq_idx]].flatten(0, 1)[hidden:kv_len] = tokens
        first_page = hidden // page_size
        page_table[seq_idx, first_page : pages_of[seq_idx]] = torch.arange(page + first_page, page + pages_of[seq_idx])
        page += pages_of[seq_idx]
    k_cache, v_cache, table = (x.to(a.q.device) for x in (*caches, page_table))
    return BuiltCase(case, a._replace(k_cache=k_cache, v_cache=v_cache, page_table=table), built.total_q)


@dataclass(frozen=True)
class Errors:
    """Largest absolute errors of a result, with what is allowed."""

    out: float
    out_budget: float
    lse: float
    lse_budget: float
