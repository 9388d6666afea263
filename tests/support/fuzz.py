"""Fuzzed ragged batches, judged on the device: thousands of batches a minute through the public operator.

Everything of a batch is vectorised and stays on the device: poisoning, oracle, yardstick, comparison. A pool of clean pages is
drawn once; each batch gets its own page table, its own NaN in every row and page it does not use, and its own queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from fa4_backend import AttentionMetadata, AttentionPlan, AttentionProblem, BatchLimits, paged_attention, plan_attention, ragged_attention
from fa4_backend.arguments import AttentionArguments
from fa4_backend.error_budget import LSE_RELATIVE, rounding_budget
from fa4_backend.kernels.launch_abi import prefill_arguments, schedule_arguments
from fa4_backend.kernels.loading import load
from fa4_backend.kernels.schedule.work_list import NO_WINDOW, PARTIAL_SLOT
from fa4_backend.problem import RAGGED, SAME_AS_Q
from tests.support.problems import make_problem

SCALES = ("k_scale", "v_scale")
NO_PAGE = 2**30  # page-table entries past a sequence's pages: following one is an access far outside


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

    def plan(self, num_sms: int | None) -> AttentionPlan:
        """A plan whose limits hold every batch of the setup."""
        limits = BatchLimits(self.max_seqs, self.max_seqs * self.max_query + 8, self.max_kv, self.decode_query_len)
        return plan_attention(self.problem, limits, num_sms=num_sms)


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
    first_failure: int = -1  # seed of the first batch over budget


class Fuzzer:
    """Draws, runs and judges batches of one setup on one device."""

    def __init__(self, setup: FuzzSetup, device: str) -> None:
        p = setup.problem
        self.setup, self.device, self.dtype = setup, device, getattr(torch, p.dtype)
        self.plan = setup.plan(_num_sms(device))
        self.metadata = AttentionMetadata.allocate(self.plan, device)
        work = self.metadata.work
        assert work is not None
        if setup.prefill_only:
            work.shape = replace(work.shape, decode_query_len=0)
        if setup.min_part_blocks is not None:
            work.shape = replace(work.shape, min_part_blocks=setup.min_part_blocks)
        self.pages_per_seq = -(-setup.max_kv // p.page_size)
        self.num_pages = setup.max_seqs * self.pages_per_seq + 2
        torch.manual_seed(1)
        shape = (self.num_pages, p.page_size, p.num_kv_heads)
        self.kv_dtype = getattr(torch, p.kv_dtype)
        # Over numbers that shift values into the subnormal ones of FP8 and past its largest.
        self.scales = torch.linspace(-7, 6, 2 * p.num_kv_heads).exp2().to(device).view(2, -1)
        if not setup.per_head_scales:
            self.scales = self.scales[:, :1]
        self.k, self.v = (self._draw((*shape, n), scale) for n, scale in zip((p.head_dim, p.head_dim_v), self.scales, strict=True))
        self.pool = torch.empty(*shape, p.head_dim + p.head_dim_v, dtype=self.kv_dtype, device=device)
        self.failed: list[torch.Tensor] = []
        self.worst = torch.zeros(2, device=device)
        self.cut: list[torch.Tensor] = []

    def _draw(self, shape: tuple[int, ...], scale: torch.Tensor) -> torch.Tensor:
        """Clean K or V as it is stored; in FP8 divided by the heads' scale, saturated, one value in eight 0."""
        values = torch.randn(*shape, device=self.device)
        if self.setup.problem.has_kv_scales:
            values = (values / scale[:, None]).clamp(-448, 448) * (torch.rand(shape, device=self.device) > 0.125)
        return values.to(self.kv_dtype)

    def _stands_for(self, stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Pages of K or V that the sequences use, as float32: (num_seqs, tokens, num_kv_heads, head_dim)."""
        listed = stored.view(_bits(stored.dtype))[self.table_pages].view(stored.dtype).flatten(1, 2).float()
        return listed * scale[:, None] if self.setup.problem.has_kv_scales else listed

    def run(self, batches: int, seed: int) -> FuzzResult:
        """Run `batches` batches; a failure is counted, not raised."""
        result = FuzzResult(self.setup.name)
        for i in range(batches):
            result.rows += self._batch(seed + i)
            result.batches += 1
        failed = torch.stack(self.failed).cpu().numpy()
        result.failures = int(failed.sum())
        if result.failures:
            result.first_failure = seed + int(failed.argmax())
        result.worst_out, result.worst_lse = self.worst.tolist()
        result.cut = int(torch.stack(self.cut).sum())
        self.failed, self.cut = [], []
        return result

    def _batch(self, seed: int) -> int:
        s, p, device = self.setup, self.setup.problem, self.device
        rng = np.random.default_rng(seed)
        num_seqs = int(rng.integers(1, s.max_seqs + 1))
        query = rng.integers(s.min_query, s.max_query + 1, num_seqs)
        if s.decode_share:
            query = np.where(rng.random(num_seqs) < s.decode_share, rng.integers(0, s.decode_query_len + 1, num_seqs), query)
        # Edges of tiles, pages and boxes more often than chance.
        kv = np.where(rng.random(num_seqs) < 0.4, rng.integers(0, s.max_kv // 16 + 1, num_seqs) * 16 + rng.integers(-1, 2, num_seqs), 0)
        kv = np.where(kv > 0, kv, rng.integers(0, s.max_kv + 1, num_seqs))
        kv = np.clip(np.where(rng.random(num_seqs) < 0.7, np.maximum(kv, query), kv), 0, s.max_kv)
        lengths = torch.from_numpy(np.stack([query, kv]).astype(np.int32)).to(device)
        query_lens, kv_lens = lengths[0], lengths[1]
        total_q = int(query.sum())
        cu_seqlens_q = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)).int()
        q = torch.full((total_q + 3, p.num_q_heads, p.head_dim), math.nan, dtype=self.dtype, device=device)
        q[:total_q] = torch.randn(total_q, p.num_q_heads, p.head_dim, device=device) * (4.0 if seed % 5 == 0 else 1.0)
        out = torch.full((total_q + 3, p.num_q_heads, p.head_dim_v), math.nan, dtype=self.dtype, device=device)
        lse = torch.full((p.num_q_heads, total_q + 3), math.nan, device=device)
        window_left = int(rng.integers(0, 200)) if p.mask.has_window_left else None
        table, k_cache, v_cache = self._poison(rng, query, kv, window_left)
        values = {
            "window_left": window_left,
            "window_right": int(rng.integers(0, 60)) if p.mask.has_window_right else None,
            "softcap": float(rng.uniform(5, 50)) if p.mask.has_softcap else 0.0,
            "sinks": torch.randn(p.num_q_heads, device=device) if p.mask.has_sinks else None,
            "alibi_slopes": torch.rand(p.num_q_heads, device=device) if p.mask.has_alibi else None,
        }
        arguments = AttentionArguments(
            q, k_cache, v_cache, table, cu_seqlens_q, kv_lens, out, lse if p.has_lse else None, p.head_dim**-0.5, **values,
            **(dict(zip(SCALES, self.scales.expand(2, p.num_kv_heads), strict=True)) if p.has_kv_scales else {}),
        )  # fmt: skip
        if p.kv_source == RAGGED:
            arguments = self._without_pages(arguments, kv)
        self._launch(arguments, max(int(query.max()), 1), max(int(kv.max()), 1))
        if total_q:
            self._judge(q[:total_q], out, lse, table, query_lens, kv_lens, cu_seqlens_q, total_q, values)
        return total_q

    def _launch(self, a: AttentionArguments, max_seqlen_q: int, max_seqlen_k: int) -> None:
        """The public operator, or the schedule and the prefill kernel alone."""
        if self.setup.prefill_only:
            prefill_alone(self.metadata, a)
            return
        values = {name: getattr(a, name) for name in ("window_left", "window_right", "softcap", "sinks", "alibi_slopes", *SCALES)}
        bounds = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
        if self.setup.problem.kv_source == RAGGED:
            self.metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, cu_seqlens_k=a.cu_seqlens_k, **bounds)
            tensors = (a.q, a.k_cache, a.v_cache, a.cu_seqlens_q, a.cu_seqlens_k)
            ragged_attention(*tensors, plan=self.plan, metadata=self.metadata, out=a.out, lse=a.lse, **values)
        else:
            self.metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, **bounds)
            paged_attention(*a[:6], plan=self.plan, metadata=self.metadata, out=a.out, lse=a.lse, **values)

    def _without_pages(self, a: AttentionArguments, kv: np.ndarray) -> AttentionArguments:
        """The same call over K and V without pages, poisoned rows of NaN behind them; the pool's pages hold a token each."""
        p, used = self.setup.problem, torch.arange(self.pages_per_seq, device=self.device) < a.seqused_k[:, None]
        tokens = self.pool.view(_bits(self.kv_dtype))[self.table_pages[used], 0].view(self.kv_dtype)
        k, v = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, int(kv.sum()) % 4), value=math.nan).split([p.head_dim, p.head_dim_v], dim=-1)
        cu_seqlens_k = torch.nn.functional.pad(a.seqused_k.cumsum(0), (1, 0)).int()
        return a._replace(k_cache=k, v_cache=v, page_table=None, cu_seqlens_k=cu_seqlens_k)

    def _poison(self, rng: np.random.Generator, query: np.ndarray, kv: np.ndarray, window_left: int | None) -> tuple[torch.Tensor, ...]:
        """Page table and pools of a batch: clean rows where a row of the sequence sees a key, NaN everywhere else.

        Pages that no row sees, left of a window, stand in the table as they are, as -1 or as `NO_PAGE`.
        """
        p, device = self.setup.problem, self.device
        pages = rng.permutation(self.num_pages)[: len(kv) * self.pages_per_seq].reshape(len(kv), -1)
        hidden = np.where(query > 0, np.clip(kv - query - window_left, 0, kv) if window_left is not None else 0, kv)
        begins = np.arange(self.pages_per_seq)[None] * p.page_size
        used, unseen = begins < kv[:, None], begins + p.page_size <= hidden[:, None]
        odd = rng.choice(np.array([-1, NO_PAGE]), pages.shape)
        entries = np.where(unseen & (rng.random(pages.shape) < 0.7), odd, pages)
        table = torch.from_numpy(np.where(used, entries, NO_PAGE).astype(np.int32)).to(device)
        bounds = np.zeros((2, self.num_pages), dtype=np.int64)  # rows of each page that hold a key somebody sees
        for bound, tokens in zip(bounds, (hidden, kv), strict=True):
            bound[pages.ravel()] = np.clip(tokens[:, None] - begins, 0, p.page_size).ravel()
        first, last = torch.from_numpy(bounds).to(device)[..., None]
        row = torch.arange(p.page_size, device=device)
        valid = (row >= first) & (row < last)
        # By bits: torch selects no FP8.
        bits = _bits(self.kv_dtype)
        nan = torch.tensor(math.nan, dtype=self.kv_dtype, device=device).view(bits)
        pool = self.pool.view(bits)
        pool[..., : p.head_dim] = torch.where(valid[..., None, None], self.k.view(bits), nan)
        pool[..., p.head_dim :] = torch.where(valid[..., None, None], self.v.view(bits), nan)
        self.table_pages = torch.from_numpy(np.where(used, pages, 0)).to(device)
        k_cache, v_cache = self.pool.split([p.head_dim, p.head_dim_v], dim=-1)
        return table, k_cache, v_cache

    def _judge(
        self,
        q: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        table: torch.Tensor,
        query_lens: torch.Tensor,
        kv_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        total_q: int,
        values: dict,
    ) -> None:
        """Compare with a float32 oracle made from the clean pages; errors over budget, NaN and padding that is not zero are failures."""
        p, device = self.setup.problem, self.device
        group = p.q_per_kv
        seq_of_row = torch.repeat_interleave(torch.arange(len(kv_lens), device=device), query_lens, output_size=total_q)
        # (total_q, tokens, num_kv_heads, head_dim)
        k, v = (self._stands_for(stored, scale)[seq_of_row] for stored, scale in zip((self.k, self.v), self.scales, strict=True))
        rows = q.float().unflatten(1, (p.num_kv_heads, group))
        scores = torch.einsum("thgd,tnhd->thgn", rows, k).flatten(1, 2) * p.head_dim**-0.5
        if values["softcap"]:
            scores = values["softcap"] * torch.tanh(scores / values["softcap"])
        position = torch.arange(total_q, device=device) - cu_seqlens_q[seq_of_row]
        diagonal = (kv_lens - query_lens)[seq_of_row] + position
        columns = torch.arange(k.shape[1], device=device)
        if values["alibi_slopes"] is not None:
            scores = scores - values["alibi_slopes"][:, None] * (diagonal[:, None] - columns).abs()[:, None]
        seen = columns < kv_lens[seq_of_row][:, None]
        right = 0 if p.mask.is_causal else values["window_right"]
        if right is not None:
            seen &= columns <= diagonal[:, None] + right
        if values["window_left"] is not None:
            seen &= columns >= diagonal[:, None] - values["window_left"]
        scores = scores.masked_fill(~seen[:, None], -math.inf)
        want_lse = torch.logsumexp(scores, dim=-1)
        empty = want_lse.isneginf()
        if values["sinks"] is not None:
            want_lse = torch.where(empty, want_lse, torch.logaddexp(want_lse, values["sinks"].expand_as(want_lse)))
        weights = torch.exp(scores - torch.where(empty, 0.0, want_lse)[..., None]).unflatten(1, (p.num_kv_heads, group))
        want = torch.einsum("thgn,tnhd->thgd", weights, v).flatten(1, 2)
        rounded = torch.einsum("thgn,tnhd->thgd", weights.to(self.dtype).float(), v).flatten(1, 2).to(self.dtype).float()
        budget = rounding_budget(rounded, want, self.dtype)
        # A batch of empty rows has no budget; its rows must be 0, which is checked below.
        share = (out[:total_q].float() - want).abs().max() / budget.clamp(min=torch.finfo(torch.float32).tiny)
        bad = ~out[:total_q].isfinite().all() | ~(out[total_q:] == 0).all() | ~(share <= 1) | (out[:total_q][empty] != 0).any()
        lse_share = torch.zeros((), device=device)
        if p.has_lse:
            got = lse[:, :total_q].T
            finite = torch.where(empty, 0.0, want_lse)
            error = torch.where(empty, 0.0, got - finite).abs().max()
            lse_share = error / (LSE_RELATIVE * finite.abs().max().clamp(min=1.0))
            bad |= ~(lse_share <= 1) | ~(got.isneginf() == empty).all() | ~lse[:, total_q:].isneginf().all()
        self.failed.append(bad)
        self.cut.append(_has_parts(self.metadata))
        self.worst = torch.maximum(self.worst, torch.stack([share, lse_share]))


def prefill_alone(metadata: AttentionMetadata, a: AttentionArguments) -> None:
    """The schedule, then the plan's prefill kernel without a decode kernel before it: it starts when the schedule has ended."""
    kernels, work, problem = metadata.plan.kernels, metadata.work, metadata.plan.problem
    assert kernels is not None and metadata.kernels is not None and work is not None
    metadata.kernels.schedule(
        *schedule_arguments(work, a.cu_seqlens_q, a.seqused_k, window_right=0 if problem.mask.is_causal else NO_WINDOW)
    )
    alone = replace(kernels.prefill, kernel=replace(kernels.prefill.kernel, is_dependent=False))
    load(alone, emulated=problem.is_emulated)(*prefill_arguments(a, work))


def _has_parts(metadata: AttentionMetadata) -> torch.Tensor:
    """Whether some tile of the step's prefill list is cut along KV; stays on the device."""
    assert metadata.work is not None
    tiles, begin = metadata.work.prefill_tiles, metadata.work.prefill_begin
    return ((torch.arange(len(tiles), device=tiles.device) < begin[-1]) & (tiles[:, PARTIAL_SLOT] >= 0)).any()


def _bits(dtype: torch.dtype) -> torch.dtype:
    """The integer type of the same size."""
    return torch.uint8 if dtype.itemsize == 1 else torch.int16


def _num_sms(device: str) -> int | None:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.startswith("cuda") else None


def prefill_setups(arch: str, kv_dtype: str = SAME_AS_Q) -> list[FuzzSetup]:
    """Problems that cover every head dimension, dtype, ratio, page size and mask feature of the prefill kernel at least once."""

    def setup(name: str, heads: tuple[int, int], dims: tuple[int, int], page: int, dtype: str = "bfloat16", **flags: bool) -> FuzzSetup:
        problem = make_problem(*heads, *dims, dtype, page, arch, kv_dtype=kv_dtype, has_lse=True, **flags)
        return FuzzSetup(name, problem, prefill_only=True, per_head_scales=page != 64)

    def parts(whole: FuzzSetup) -> FuzzSetup:
        return replace(whole, name=f"{whole.name} in parts", min_part_blocks=1, max_seqs=4, max_kv=1200)

    setups = [
        setup("d128 page 16", (8, 2), (128, 128), 16),
        setup("d128 page 64 fp16", (8, 2), (128, 128), 64, "float16"),
        setup("d128 MHA page 32", (3, 3), (128, 128), 32),
        setup("d128 ratio 7 page 48", (14, 2), (128, 128), 48),
        setup("d128 ratio 8 page 256 left window", (8, 1), (128, 128), 256, has_window_left=True),
        setup("d128 non-causal page 16", (8, 2), (128, 128), 16, is_causal=False),
        setup("d128 both windows page 128", (8, 2), (128, 128), 128, is_causal=False, has_window_left=True, has_window_right=True),
        setup("d128 soft cap, sinks, ALiBi", (8, 2), (128, 128), 16, has_softcap=True, has_sinks=True, has_alibi=True),
        setup("d128 sinks, left window page 528", (8, 2), (128, 128), 528, has_sinks=True, has_window_left=True),
        setup("d128 left window, invariant", (8, 2), (128, 128), 16, has_window_left=True, batch_invariant=True),
        setup("d64 ratio 3 page 16", (9, 3), (64, 64), 16),
        setup("d64 ratio 8 sinks fp16", (16, 2), (64, 64), 16, "float16", has_sinks=True, has_window_left=True),
        setup("d96 page 16", (4, 2), (96, 96), 16),
        setup("d192/128 page 64", (4, 1), (192, 128), 64),
        setup("d256 page 16 soft cap", (4, 2), (256, 256), 16, has_softcap=True),
        setup("d256 page 784", (4, 2), (256, 256), 784),
    ]
    # The same kernels where few tiles are cut along KV: into parts of single blocks, and as the plan cuts long rows.
    cut = [parts(s) for s in setups if not s.problem.batch_invariant]
    long = replace(setups[0], name="d128 page 16, long rows", max_seqs=3, max_query=60, max_kv=9000)
    return [*setups, *cut, long]


def ragged_setups(arch: str, kv_dtype: str = SAME_AS_Q) -> list[FuzzSetup]:
    """Problems of the prefill kernel over K and V without pages: head dimensions, masks, and tiles cut along KV."""

    def setup(name: str, heads: tuple[int, int], dims: tuple[int, int], dtype: str = "bfloat16", **flags: bool) -> FuzzSetup:
        problem = make_problem(*heads, *dims, dtype, 1, arch, kv_dtype=kv_dtype, kv_source=RAGGED, has_lse=True, **flags)
        return FuzzSetup(name, problem)

    setups = [
        setup("d192/128 causal", (4, 4), (192, 128)),
        setup("d192/128 full", (4, 4), (192, 128), is_causal=False),
        setup("d192/128 both windows fp16", (4, 2), (192, 128), "float16", is_causal=False, has_window_left=True, has_window_right=True),
        setup("d128 causal", (8, 2), (128, 128)),
        setup("d128 full, invariant", (8, 2), (128, 128), is_causal=False, batch_invariant=True),
        setup(
            "d128 left window, sinks, soft cap, ALiBi",
            (6, 2),
            (128, 128),
            has_window_left=True,
            has_sinks=True,
            has_softcap=True,
            has_alibi=True,
        ),
        setup("d64 ratio 3", (9, 3), (64, 64)),
        setup("d96", (4, 2), (96, 96)),
    ]
    if arch.endswith("sm_90a"):
        setups.append(setup("d256 soft cap", (4, 2), (256, 256), has_softcap=True))
    cut = [
        replace(s, name=f"{s.name} in parts", min_part_blocks=1, max_seqs=4, max_kv=1200) for s in setups if not s.problem.batch_invariant
    ]
    return [*setups, *cut]
