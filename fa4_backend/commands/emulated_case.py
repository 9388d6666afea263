"""An attention case of `fa4 emulate`: random tensors of one step, run on the emulator and held to the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fa4_backend.commands.emulated_counts import collect
from fa4_backend.commands.shapes import heads_of
from fa4_backend.problem import KV_SOURCES, LATENT, PAGED, RAGGED, SAME_AS_Q

if TYPE_CHECKING:
    import torch

    from fa4_backend.arguments import AttentionArguments
    from fa4_backend.emulator import Report
    from fa4_backend.emulator.trace import Trace
    from fa4_backend.plan import AttentionPlan
    from fa4_backend.problem import AttentionProblem

POISONED_ROWS = 3  # of q and out past the batch: they must neither be read into a result nor written


@dataclass(frozen=True, kw_only=True)
class EmulatedCase:
    """One step, as numbers and flags."""

    arch: str  # a key of ARCHS
    heads: str  # query heads / KV heads
    head_dim: int
    q_lens: list[int]  # query tokens of each sequence
    kv_lens: list[int]  # KV tokens of each sequence, this step's included
    page_size: int
    dtype: str
    head_dim_v: int | None = None  # None: as head_dim
    kv_dtype: str = SAME_AS_Q
    q_dtype: str = SAME_AS_Q
    kind: str = PAGED  # where K and V lie: one of KV_SOURCES
    causal: bool = True
    window_left: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    converted: bool = False  # K and V in FP8 are brought to 16 bits once a call
    num_sms: int = 2  # CTAs of a persistent launch

    def build(self) -> tuple[AttentionPlan, AttentionArguments]:
        """A plan, and random tensors of the step, over scattered pages or without; whatever the kernel must not use holds NaN.

        Raises:
            ValueError: the numbers do not fit each other, or no kernel serves them.
        """
        if len(self.q_lens) != len(self.kv_lens) or min(*self.q_lens, *self.kv_lens) < 0:
            raise ValueError(f"--q-lens, --kv-lens: expected as many of each, 0 or more, got {self.q_lens} and {self.kv_lens}")
        if self.softcap < 0:
            raise ValueError(f"--softcap: expected 0 (off) or more, got {self.softcap}")
        if self.kind not in KV_SOURCES:
            raise ValueError(f"--kind: expected one of {', '.join(KV_SOURCES)}, got {self.kind!r}")
        plan = self._plan()
        return plan, draw(plan.problem, self.q_lens, self.kv_lens, self.window_left, self.softcap)

    def _plan(self) -> AttentionPlan:
        """A plan whose limits just hold the step."""
        from fa4_backend.plan import plan_attention
        from fa4_backend.problem import EMULATED_PREFIX, AttentionProblem, BatchLimits, MaskFeatures

        problem = AttentionProblem(
            *heads_of(self.heads), self.head_dim, self.head_dim_v or self.head_dim, self.dtype,
            1 if self.kind == RAGGED else self.page_size, EMULATED_PREFIX + self.arch,
            mask=MaskFeatures(
                is_causal=self.causal, has_window_left=self.window_left is not None, has_softcap=self.softcap > 0, has_sinks=self.sinks
            ),
            kv_dtype=self.kv_dtype, q_dtype=self.q_dtype, kv_source=self.kind, has_lse=True,
        )  # fmt: skip
        limits = BatchLimits(
            len(self.q_lens), sum(self.q_lens) + POISONED_ROWS, max(*self.kv_lens, 1),
            decode_query_len=max(*self.q_lens, 1) if self.kind == LATENT else 1,
            convert_keys=max(sum(self.kv_lens), 1) if self.converted else 0,
        )  # fmt: skip
        plan = plan_attention(problem, limits, num_sms=self.num_sms)
        return plan.always_converting() if self.converted else plan


def draw(problem: AttentionProblem, q_lens: list[int], kv_lens: list[int], window_left: int | None, softcap: float) -> AttentionArguments:
    """The tensors of a case, always the same ones."""
    import torch

    from fa4_backend.arguments import AttentionArguments

    generator = torch.Generator().manual_seed(0)
    dims = problem.head_dim, problem.head_dim_v
    dtype_of_out, q_kind, kv_kind = (getattr(torch, name) for name in (problem.dtype, problem.q_dtype, problem.kv_dtype))
    scales = None
    if problem.has_kv_scales:
        scales = torch.rand(2, problem.num_kv_heads, generator=generator).mul(-8).exp2()
        scales[:, 0] = 2.0**-8  # values above 1.75 are cut
    sequences = [
        [_stored(torch.randn(n, problem.num_kv_heads, dim, generator=generator), scales, i).to(kv_kind) for i, dim in enumerate(dims)]
        for n in kv_lens
    ]
    q_scale = None
    if problem.has_q_scale:
        q_scale = torch.rand(problem.num_kv_heads, generator=generator).mul(-3).sub(5).exp2()
        q_scale[0] = 2.0**-8
    queries = torch.randn(sum(q_lens), problem.num_q_heads, dims[0], generator=generator)
    if q_scale is not None:
        queries = _stored(queries, q_scale.repeat_interleave(problem.q_per_kv)[None], 0)
    q = torch.full((sum(q_lens) + POISONED_ROWS, problem.num_q_heads, dims[0]), torch.nan, dtype=q_kind)
    q[: sum(q_lens)] = queries.to(q.dtype)
    page_table = cu_seqlens_k = None
    if problem.kv_source != RAGGED:
        k, v, page_table = _in_pages(sequences, problem.page_size, generator)
    else:
        poison = [torch.full((POISONED_ROWS, problem.num_kv_heads, dim), torch.nan, dtype=kv_kind) for dim in dims]
        k, v = (torch.cat([*(tokens[i] for tokens in sequences), poison[i]]) for i in range(2))
        cu_seqlens_k = torch.tensor([0, *kv_lens]).cumsum(0).int()
    k_scale, v_scale = (None, None) if scales is None else scales
    if problem.kv_source == LATENT:  # values are the first columns of what is stored once
        v, v_scale = k[..., : dims[1]], k_scale
    out = torch.full((q.shape[0], problem.num_q_heads, dims[1]), torch.nan, dtype=dtype_of_out)
    return AttentionArguments(
        q, k, v, page_table, torch.tensor([0, *q_lens]).cumsum(0).int(), torch.tensor(kv_lens, dtype=torch.int32),
        out, torch.full((problem.num_q_heads, q.shape[0]), torch.nan), dims[0]**-0.5, window_left, None, softcap,
        torch.randn(problem.num_q_heads, generator=generator) if problem.mask.has_sinks else None, None, k_scale, v_scale,
        cu_seqlens_k=cu_seqlens_k, q_scale=q_scale,
    )  # fmt: skip


def _stored(values: torch.Tensor, scales: torch.Tensor | None, index: int) -> torch.Tensor:
    """Keys (index 0) or values (1) of a sequence, or queries, as they are stored: in FP8 divided by each head's scale, and saturated."""
    from fa4_backend.problem import FP8_MAX

    return values if scales is None else (values / scales[index, :, None]).clamp(-FP8_MAX, FP8_MAX)


def _in_pages(
    sequences: list[list[torch.Tensor]], page_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V of each sequence in scattered pages, NaN elsewhere, and the page table."""
    import torch

    pages_of = [-(-k.shape[0] // page_size) for k, _ in sequences]
    caches = tuple(torch.full((sum(pages_of) + 1, page_size, *x.shape[1:]), torch.nan, dtype=x.dtype) for x in sequences[0])
    page_table = torch.zeros(len(sequences), max(*pages_of, 1), dtype=torch.int32)
    free = torch.randperm(sum(pages_of) + 1, generator=generator).tolist()
    for seq_idx, tokens in enumerate(sequences):
        for logical in range(pages_of[seq_idx]):
            page = page_table[seq_idx, logical] = free.pop()
            for cache, x in zip(caches, tokens, strict=True):
                rows = x[logical * page_size : (logical + 1) * page_size]
                cache[page, : rows.shape[0]] = rows
    return caches[0], caches[1], page_table


def run_case(plan: AttentionPlan, arguments: AttentionArguments, seeds: int, timeline: Trace | None) -> dict[str, Any]:
    """Run the operator on the emulator and judge the result: under the deterministic schedule and `seeds` random ones, whose bits must be
    the same, then with every sum of a product fused."""
    import torch

    from fa4_backend.emulator.kernels import observed
    from fa4_backend.metadata import AttentionMetadata
    from fa4_backend.mla_ops import mla_decode
    from fa4_backend.ops import paged_attention, ragged_attention

    a = arguments
    reports: list[Report] = []
    kernel_names: dict[str, str] = {}

    def run(seed: int | None, trace: Trace | None, contraction: str) -> None:
        a.out.fill_(torch.nan)
        with observed(seed, trace, contraction) as seen:
            metadata = AttentionMetadata.allocate(plan, "cpu")
            is_latent = plan.problem.kv_source == LATENT
            longest = plan.limits.decode_query_len if is_latent else plan.limits.max_num_tokens
            bounds: dict[str, Any] = {"max_seqlen_q": longest, "max_seqlen_k": plan.limits.max_seqlen_k}
            names = ("softmax_scale", "window_left", "softcap", "sinks", "k_scale", "v_scale", "q_scale", "out", "lse")
            values: dict[str, Any] = {name: getattr(a, name) for name in names}
            if a.page_table is None:
                assert a.cu_seqlens_k is not None
                metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, cu_seqlens_k=a.cu_seqlens_k, **bounds)
                ragged_attention(a.q, a.k_cache, a.v_cache, a.cu_seqlens_q, a.cu_seqlens_k, plan=plan, metadata=metadata, **values)
            else:
                prefill_keys = plan.limits.convert_keys or None
                metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, prefill_keys=prefill_keys, **bounds)
                if is_latent:
                    q, q_rope = a.q.tensor_split([plan.problem.head_dim_v], dim=-1)
                    batch = (a.page_table, a.cu_seqlens_q, a.seqused_k)
                    given: dict[str, Any] = {"softmax_scale": a.softmax_scale, "latent_scale": a.k_scale, "out": a.out, "lse": a.lse}
                    mla_decode(q, q_rope, a.k_cache[:, :, 0], *batch, plan=plan, metadata=metadata, **given)
                else:
                    paged_attention(*a[:3], a.page_table, a.cu_seqlens_q, a.seqused_k, plan=plan, metadata=metadata, **values)
        reports.extend(seen.reports)
        kernel_names.update(seen.names)

    run(None, timeline, "never")
    first, differing = a.out.clone(), 0
    for seed in range(seeds):
        run(seed, None, "never")
        differing += not torch.equal(first.view(torch.int16), a.out.view(torch.int16))
    result = judge(plan, arguments)
    run(None, None, "always")
    fused = judge(plan, arguments)
    for name in ("max_err", "lse_err"):
        result[name] = max(result[name], fused[name], key=lambda error: (error != error, error))  # NaN is the worst
    for name in ("padding_is_zero", "empty_rows_are_zero", "ok"):
        result[name] = result[name] and fused[name]
    result = {"case": plan.describe(), **result, **collect(reports, kernel_names), "schedules": 1 + seeds, "differing": differing}
    result["ok"] = result["ok"] and not result["races"] and not result["faults"] and not differing
    return result


def judge(plan: AttentionPlan, arguments: AttentionArguments) -> dict[str, Any]:
    """Errors against the float32 oracle, and what `fa4_backend.error_budget` allows."""
    import torch

    from fa4_backend import error_budget

    a = arguments
    assert a.lse is not None
    want, want_lse, budget, lse_budget = error_budget.judge(
        a, is_causal=plan.problem.mask.is_causal, e4m3_weights=_has_e4m3_weights(plan, a)
    )
    rows = slice(0, want.shape[0])
    got, got_lse, is_empty = a.out[rows].float(), a.lse[:, rows], want_lse.isneginf()
    padding_is_zero = bool((a.out[rows.stop :] == 0).all() and a.lse[:, rows.stop :].isneginf().all())
    empty_rows_are_zero = bool((got[is_empty.T] == 0).all() and torch.equal(got_lse.isneginf(), is_empty))
    max_err = (got - want).abs().max().item() if got.numel() else 0.0  # NaN where the kernel wrote none: never within budget
    lse_err = (got_lse - want_lse)[~is_empty].abs().max().item() if not is_empty.all() else 0.0
    ok = max_err <= budget and lse_err <= lse_budget and padding_is_zero and empty_rows_are_zero
    return {
        "max_err": max_err,
        "budget": budget,
        "lse_err": lse_err,
        "lse_budget": lse_budget,
        "padding_is_zero": padding_is_zero,
        "empty_rows_are_zero": empty_rows_are_zero,
        "ok": ok,
    }


def _has_e4m3_weights(plan: AttentionPlan, a: AttentionArguments) -> bool:
    """Whether the prefill kernel serves a row, and rounds its weights to e4m3."""
    assert plan.kernels is not None
    is_decoded = plan.kernels.decode is not None and int(a.cu_seqlens_q.diff().max()) <= plan.limits.decode_query_len
    return plan.problem.has_q_scale and not is_decoded
