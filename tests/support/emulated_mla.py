"""Latent decode on the emulator: ragged poisoned batches, the device-made schedule, the kernel, and a float32 oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fa4_backend import emulator
from fa4_backend.emulator.kernels import load_function
from fa4_backend.error_budget import LSE_RELATIVE, rounding_budget
from fa4_backend.kernels.families import LATENT_DECODE, KernelSet, latent_kernels
from fa4_backend.kernels.launch_abi import mla_decode_arguments
from fa4_backend.kernels.mla_decode.config import LATENT_DIM, ROPE_DIM
from fa4_backend.kernels.schedule.work_list import FIRST_SLOT, NUM_ENTRIES, PARTIAL_SLOT, WorkLists
from fa4_backend.problem import LATENT, AttentionProblem, BatchLimits
from tests.support.emulated_decode import count_parts, fill_with_garbage, run_schedule, with_free_parts

DIM = LATENT_DIM + ROPE_DIM


class Latent(NamedTuple):
    """Arguments of a call."""

    q: torch.Tensor
    q_rope: torch.Tensor
    latent_cache: torch.Tensor
    page_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    softmax_scale: float
    latent_scale: torch.Tensor | None = None


@dataclass(frozen=True)
class MlaCase:
    """One batch, described without tensors."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_heads: int = 16
    decode_query_len: int = 1
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"  # FP8: with a scale of 2^-6, so that values of 7 and more would be saturated
    page_size: int = 64
    batch_invariant: bool = False
    max_seqlen_k: int = 0  # limit; 0: the longest row
    one_q: bool = False  # both parts of Q are views of one tensor of 576
    padding_rows: int = 3
    peaked: float = 1.0
    seed: int = 0
    tuning: tuple[tuple[str, int], ...] = ()  # fields of the key
    arch: str = "sm_90a"

    def kernels(self, num_sms: int) -> KernelSet:
        """The kernels for it."""
        problem = AttentionProblem(
            num_q_heads=self.num_heads, num_kv_heads=1, head_dim=DIM, head_dim_v=LATENT_DIM, dtype=self.dtype, kv_dtype=self.kv_dtype,
            page_size=self.page_size, arch=f"emulated-{self.arch}", kv_source=LATENT, has_lse=True, batch_invariant=self.batch_invariant,
        )  # fmt: skip
        limits = BatchLimits(
            max_num_seqs=len(self.query_lens),
            max_num_tokens=max(sum(self.query_lens) + self.padding_rows, self.decode_query_len),
            max_seqlen_k=self.max_seqlen_k or max(*self.kv_lens, 1),
            decode_query_len=self.decode_query_len,
        )
        key = replace(LATENT_DECODE[self.arch](problem, limits), **dict(self.tuning))  # type: ignore[arg-type]
        return latent_kernels(key, problem, limits, num_sms)

    def build(self) -> Latent:
        """Draw the batch; what no row sees is NaN, page-table entries past a sequence's end name a page of NaN."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)
        kv_dtype = dtype if self.kv_dtype == "auto" else getattr(torch, self.kv_dtype)
        scale = None if self.kv_dtype == "auto" else torch.tensor([2.0**-6])
        pages_of = [-(-n // self.page_size) for n in self.kv_lens]
        num_pages = sum(pages_of) + 2
        cache = torch.full((num_pages, self.page_size, DIM + 16), math.nan).to(kv_dtype)[..., :DIM]
        free = torch.randperm(num_pages, generator=torch.Generator().manual_seed(self.seed + 1)).tolist()
        page_table = torch.full((len(pages_of), max(*pages_of, 1)), free.pop(0), dtype=torch.int32)
        for seq_idx, kv_len in enumerate(self.kv_lens):
            values = torch.randn(kv_len, DIM, generator=generator)
            values = (values if scale is None else values / scale).to(kv_dtype)
            for logical in range(pages_of[seq_idx]):
                page = free.pop()
                page_table[seq_idx, logical] = page
                part = values[logical * self.page_size : (logical + 1) * self.page_size]
                cache[page, : len(part)] = part
        total_q = sum(self.query_lens)
        rows = torch.full((total_q + self.padding_rows, self.num_heads, DIM), math.nan, dtype=dtype)
        rows[:total_q] = (torch.randn(total_q, self.num_heads, DIM, generator=generator) * self.peaked).to(dtype)
        q, q_rope = rows.split([LATENT_DIM, ROPE_DIM], dim=-1)
        if not self.one_q:
            q, q_rope = q.contiguous(), q_rope.contiguous()
        return Latent(
            q, q_rope, cache, page_table, torch.tensor([0, *self.query_lens]).cumsum(0).int(), torch.tensor(self.kv_lens).int(),
            torch.full((len(rows), self.num_heads, LATENT_DIM), math.nan, dtype=dtype),
            torch.full((self.num_heads, len(rows)), math.nan), 192**-0.5, scale,
        )  # fmt: skip


def oracle(a: Latent, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention sequence by sequence in float32, P and results rounded to `dtype`."""
    out = torch.zeros(a.out.shape, device=a.q.device)
    lse = torch.full(a.lse.shape, -math.inf, device=a.q.device)
    bounds, page_size = a.cu_seqlens_q.tolist(), a.latent_cache.shape[1]
    for seq_idx, kv_len in enumerate(a.seqused_k.tolist()):
        rows = slice(bounds[seq_idx], bounds[seq_idx + 1])
        if rows.start == rows.stop or kv_len == 0:
            continue
        pages = a.page_table[seq_idx, : -(-kv_len // page_size)].long()
        raw = a.latent_cache.view(torch.uint8)[pages].view(a.latent_cache.dtype)  # torch indexes no FP8 on a GPU
        keys = raw.flatten(0, 1)[:kv_len].float()
        if a.latent_scale is not None:
            keys = keys * a.latent_scale
        q = torch.cat((a.q, a.q_rope), -1)[rows].float().transpose(0, 1)
        scores = q @ keys.T * a.softmax_scale
        diagonal = torch.arange(rows.stop - rows.start, device=a.q.device) + kv_len - (rows.stop - rows.start)
        scores = scores.masked_fill(torch.arange(kv_len, device=a.q.device) > diagonal[:, None], -math.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        out[rows] = (weights.to(dtype).float() @ keys[:, :LATENT_DIM]).to(dtype).float().transpose(0, 1)
        lse[:, rows] = torch.logsumexp(scores, -1)
    return out, lse


@dataclass(frozen=True)
class MlaRun:
    """What came out of a schedule and a latent decode launch."""

    case: MlaCase
    arguments: Latent
    work: WorkLists
    reports: tuple[emulator.Report, ...]

    @property
    def num_parts(self) -> int:
        """Parts of row groups that are cut."""
        return count_parts(self.work)

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of the tokens."""
        n = sum(self.case.query_lens)
        return self.arguments.out[:n], self.arguments.lse[:, :n]

    def check(self) -> None:
        """Within the error budget, padding rows written, no race, nothing read that nobody wrote, counters back at 0."""
        for report in self.reports:
            assert report.races == [], "\n".join(str(race) for race in report.races[:3])
            assert report.faults == [], "\n".join(str(fault) for fault in report.faults[:3])
        entries = self.work.decode_tiles[: self.work.decode_first[:, NUM_ENTRIES].sum()]
        first_slots = entries[entries[:, PARTIAL_SLOT] >= 0, FIRST_SLOT]
        assert not self.work.arrivals[first_slots].any() and not self.work.arrivals[first_slots + 1].any()
        a, n = self.arguments, sum(self.case.query_lens)
        assert (a.out[n:] == 0).all() and a.lse[:, n:].isneginf().all()
        want, want_lse = oracle(a, torch.float32)
        yardstick, _ = oracle(a, a.q.dtype)
        got, got_lse = (x.float() for x in self.rows)
        assert got.isfinite().all() and torch.equal(got_lse.isneginf(), want_lse[:, :n].isneginf())
        seen = ~want_lse[:, :n].isneginf()
        assert (got[~seen.T] == 0).all()
        if seen.any():
            budget = rounding_budget(yardstick, want, a.q.dtype).item()
            error = (got - want[:n]).abs().max().item()
            assert error <= budget, f"out: {error} of {budget}"
            lse_error = (got_lse - want_lse[:, :n])[seen].abs().max().item()
            assert lse_error <= LSE_RELATIVE * max(1.0, want_lse[:, :n][seen].abs().max().item()), f"lse: {lse_error}"


def run_mla(case: MlaCase, *, num_sms: int = 4, seed: int | None = None, arguments: Latent | None = None) -> MlaRun:
    """Schedule and attend `case`; lists, counters and slots hold garbage before."""
    kernels, a = case.kernels(num_sms), arguments or case.build()
    assert kernels.decode is not None and kernels.prefill is None
    limits = BatchLimits(len(case.query_lens), max(a.q.shape[0], case.decode_query_len), max(*case.kv_lens, 1), case.decode_query_len)
    work = WorkLists.allocate(with_free_parts(kernels.work), limits, "cpu")
    fill_with_garbage(work)
    for poisoned in (a.out, a.lse):
        poisoned.fill_(math.nan)
    lengths = a.cu_seqlens_q.diff().tolist(), a.seqused_k.tolist()
    scheduled = run_schedule(case.arch, kernels.schedule, work, *lengths, seed=seed)
    with emulator.session(arch=case.arch, num_sms=num_sms, seed=seed, detect_races=True) as emu:
        emu.run(load_function(kernels.decode), *mla_decode_arguments(a, work))
    return MlaRun(case, a, work, (scheduled, emu.report))
