"""Ragged batches of latent attention with everything unused poisoned, and their judgement by `fa4_backend.error_budget`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from fa4_backend import AttentionMetadata, AttentionPlan, AttentionProblem, BatchLimits, mla_decode, plan_attention
from fa4_backend.arguments import LatentArguments
from fa4_backend.error_budget import Judge, judge_latent
from fa4_backend.problem import LATENT
from fa4_backend.reference import as_paged
from tests.support.paged_case import BuiltCase, Errors, move_strided, quantise


@dataclass(frozen=True)
class LatentCase:
    """One batch, described without tensors; `build` makes them."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_q_heads: int = 16
    head_dim: int = 576
    head_dim_v: int = 512
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"  # FP8 draws a scale, saturated values, zeros and subnormals
    page_size: int = 16
    arch: str = "cpu"
    batch_invariant: bool = False
    decode_query_len: int = 1
    has_lse: bool = True
    is_one_q: bool = False  # q and q_rope are columns of one tensor's rows; else two tensors
    page_gap: int = 0  # elements of NaN between a token's row and the next, in multiples of 16 bytes
    padding_rows: int = 3  # poisoned rows of q and out past cu_seqlens_q[-1]
    padding_seqs: int = 0  # sequences of no query and no key at the end, as a captured graph's batch has them
    seed: int = 0
    peaked: float = 1.0  # factor on queries: large values give rows whose softmax is one key

    @property
    def num_seqs(self) -> int:
        """Rows of the batch, those of padding included."""
        return len(self.query_lens) + self.padding_seqs

    @property
    def softmax_scale(self) -> float:
        """Of the heads before absorption: 128 + 64 wide, as DeepSeek's."""
        return 192**-0.5

    def problem(self) -> AttentionProblem:
        """The case's compile-time facts."""
        return AttentionProblem(
            num_q_heads=self.num_q_heads,
            num_kv_heads=1,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            kv_source=LATENT,
            page_size=self.page_size,
            arch=self.arch,
            has_lse=self.has_lse,
            batch_invariant=self.batch_invariant,
        )

    def plan(self, num_sms: int | None = None) -> AttentionPlan:
        """A plan whose limits just hold the case."""
        limits = BatchLimits(
            max_num_seqs=self.num_seqs,
            max_num_tokens=max(sum(self.query_lens) + self.padding_rows, self.decode_query_len),
            max_seqlen_k=max(*self.kv_lens, 1),
            decode_query_len=self.decode_query_len,
        )
        return plan_attention(self.problem(), limits, num_sms=num_sms)

    def build(self, device: torch.device | str = "cpu") -> BuiltLatent:
        """Draw the batch. Unused rows of pages, unused pages, padding rows and outputs hold NaN.

        Table entries past a sequence's pages name a page of NaN: a tensor copy from outside the pool gives zeros, which a missing bound
        could hide behind. Keys of a sequence without a query are NaN too.
        """
        generator = torch.Generator().manual_seed(self.seed)
        dtype, kv_dtype = (getattr(torch, name) for name in (self.dtype, self.problem().kv_dtype))
        scale = torch.tensor([2.0**-7]) if self.problem().has_kv_scales else None  # values of 3.5 and more are saturated
        pages_of = [-(-n // self.page_size) for n in self.kv_lens] + [0] * self.padding_seqs
        num_pages = sum(pages_of) + 2
        pool = torch.full((num_pages, self.page_size, self.head_dim + self.page_gap), math.nan).to(kv_dtype)
        cache = pool[..., : self.head_dim]
        # Pages are drawn apart from values: the same sequences in pages of another size.
        free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(self.seed + 1)).tolist()
        page_table = torch.full((self.num_seqs, max(*pages_of, 1)), free.pop(0), dtype=torch.int32)
        for seq_idx, (query_len, kv_len) in enumerate(zip(self.query_lens, self.kv_lens, strict=True)):
            values = quantise(torch.randn(kv_len, 1, self.head_dim, generator=generator), scale)[:, 0]
            if query_len == 0:
                values = torch.full_like(values, math.nan)
            for logical in range(pages_of[seq_idx]):
                page = free.pop()
                page_table[seq_idx, logical] = page
                part = values[logical * self.page_size : (logical + 1) * self.page_size]
                cache[page, : len(part)] = part.to(kv_dtype)
        total_q = sum(self.query_lens)
        rows = torch.full((total_q + self.padding_rows, self.num_q_heads, self.head_dim), math.nan, dtype=dtype)
        rows[:total_q] = (torch.randn(total_q, *rows.shape[1:], generator=generator) * self.peaked).to(dtype)
        q, q_rope = rows.tensor_split([self.head_dim_v], dim=-1)
        if not self.is_one_q:
            q, q_rope = q.contiguous(), q_rope.contiguous()
        cu_seqlens_q = torch.tensor([0, *self.query_lens, *[0] * self.padding_seqs]).cumsum(0).int()
        seqused_k = torch.tensor([*self.kv_lens, *[0] * self.padding_seqs], dtype=torch.int32)
        out = torch.full((len(rows), self.num_q_heads, self.head_dim_v), math.nan, dtype=dtype)
        lse = torch.full((self.num_q_heads, len(rows)), math.nan) if self.has_lse else None
        tensors = (q, q_rope, cache, page_table, cu_seqlens_q, seqused_k, out, lse)
        moved = (None if x is None else move_strided(x, device) if x.dim() > 1 else x.to(device) for x in tensors)
        return BuiltLatent(
            self, LatentArguments(*moved, self.softmax_scale, None if scale is None else scale.to(device)), total_q  # type: ignore[arg-type]
        )  # fmt: skip


@dataclass
class BuiltLatent:
    """A case's tensors, its run and its judgement."""

    case: LatentCase
    arguments: LatentArguments
    total_q: int
    oracle: Judge | None = field(default=None)

    def metadata(self, plan: AttentionPlan) -> AttentionMetadata:
        """Refreshed for the case."""
        a, case = self.arguments, self.case
        metadata = AttentionMetadata.allocate(plan, a.q.device)
        bounds = {"max_seqlen_q": max(*case.query_lens, 1), "max_seqlen_k": max(*case.kv_lens, 1)}
        metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, **bounds)
        return metadata

    def run(self, plan: AttentionPlan | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the operator as a user would; returns out and lse, padding rows included."""
        a = self.arguments
        plan = plan or self.case.plan()
        given = {name: getattr(a, name) for name in ("softmax_scale", "latent_scale", "out", "lse")}
        out, lse = mla_decode(*a[:6], plan=plan, metadata=self.metadata(plan), **given)
        assert lse is not None
        return out, lse

    def check(self, out: torch.Tensor, lse: torch.Tensor) -> Errors:
        """Judge a result, as `tests.support.paged_case.BuiltCase.check` does.

        Raises:
            AssertionError: padding is not 0 and -inf, NaN or infinity stands where the oracle has none, or an error is over budget.
        """
        if self.oracle is None:
            self.oracle = judge_latent(self.arguments)
        return BuiltCase(self.case, as_paged(self.arguments), self.total_q, self.oracle).check(out, lse)  # type: ignore[arg-type]
