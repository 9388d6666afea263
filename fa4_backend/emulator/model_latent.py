"""What `fa4 model` needs of latent decode: recordings of a CTA (or pair) with some entries, and the entries of a whole step's list."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fa4_backend.emulator.kernels import observed
from fa4_backend.emulator.model_case import Step
from fa4_backend.emulator.recording import Launches, Recording
from fa4_backend.kernels.schedule import work_list as wl
from fa4_backend.metadata import AttentionMetadata
from fa4_backend.mla_ops import mla_decode
from fa4_backend.plan import AttentionPlan, plan_attention
from fa4_backend.problem import EMULATED_PREFIX, LATENT, AttentionProblem, BatchLimits

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LatentStep(Step):
    """A step of latent decode: one KV head of head_dim elements, of which the first head_dim_v are V."""

    def problem(self, num_q_heads: int, num_kv_heads: int) -> AttentionProblem:
        """The compile-time facts."""
        return AttentionProblem(
            num_q_heads, num_kv_heads, self.head_dim, self.head_dim_v, self.dtype, self.page_size, EMULATED_PREFIX + self.arch,
            kv_dtype=self.kv_dtype, kv_source=LATENT,
        )  # fmt: skip

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of as many latents."""
        return tokens * self.head_dim * (1 if self.kv_dtype.startswith("float8") else 2)

    def plan(self, num_sms: int) -> AttentionPlan:
        """The plan of the step on a chip of as many SMs."""
        limits = BatchLimits(len(self.query_lens), sum(self.query_lens), max(self.kv_lens), max(self.query_lens))
        return plan_attention(self.problem(self.num_q_heads, 1), limits, num_sms=num_sms)


def scheduled(step: LatentStep, num_sms: int) -> tuple[AttentionPlan, AttentionMetadata]:
    """The plan and its metadata, filled by the schedule kernel on the emulator."""
    plan = step.plan(num_sms)
    metadata = AttentionMetadata.allocate(plan, "cpu")
    begins, lengths = _lengths(step)
    metadata.refresh(cu_seqlens_q=begins, seqused_k=lengths, max_seqlen_q=max(step.query_lens), max_seqlen_k=max(step.kv_lens))
    return plan, metadata


def entry_blocks(metadata: AttentionMetadata) -> list[list[int]]:
    """KV blocks of the entries of each CTA (or pair)."""
    assert metadata.work is not None
    first, tiles = metadata.work.decode_first.tolist(), metadata.work.decode_tiles.tolist()
    lists = []
    for row in first:
        count = row[wl.NUM_ENTRIES]
        entries = [row, *tiles[row[wl.NEXT_ENTRY] : row[wl.NEXT_ENTRY] + count - 1]] if count else []
        lists.append([entry[wl.N_BLOCK_END] - entry[wl.N_BLOCK_BEGIN] for entry in entries])
    return lists


def record_entries(step: LatentStep, entries: int, blocks: int) -> Recording:
    """What a CTA (or pair) does for some sequences, one after the other, with as many KV blocks each."""
    key = step.plan(2).kernels.decode  # type: ignore[union-attr]
    kv_len, query_len = blocks * key.tile_n, max(step.query_lens)
    # Rows of one CTA's tile, or of a pair's two.
    heads = min(step.num_q_heads, key.cluster_size * 64)
    small = replace(
        step, num_q_heads=heads, query_lens=(min(query_len, key.cluster_size * 64 // heads),) * entries, kv_lens=(kv_len,) * entries
    )
    launches = Launches()
    with observed(None, launches):
        plan, metadata = scheduled(small, key.cluster_size)
        begins, lengths = _lengths(small)
        q, q_rope, latents, table = _tensors(small)
        mla_decode(q, q_rope, latents, table, begins, lengths, plan=plan, metadata=metadata, softmax_scale=192**-0.5)
    return launches.recordings[-1]


def _lengths(step: LatentStep) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    return torch.tensor([0, *step.query_lens]).cumsum(0).int(), torch.tensor(step.kv_lens, dtype=torch.int32)


def _tensors(step: LatentStep) -> tuple[torch.Tensor, ...]:
    """q in two parts, pages of latents, the page table."""
    import torch

    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, step.dtype)
    kind = dtype if step.kv_dtype == "auto" else getattr(torch, step.kv_dtype)
    each = -(-max(step.kv_lens) // step.page_size)
    rows = torch.randn(sum(step.query_lens), step.num_q_heads, step.head_dim, generator=generator).to(dtype)
    latents = torch.randn(each * len(step.kv_lens), step.page_size, step.head_dim, generator=generator).to(kind)
    q, q_rope = rows.split([step.head_dim_v, step.head_dim - step.head_dim_v], dim=-1)
    table = torch.arange(each * len(step.kv_lens), dtype=torch.int32).view(len(step.kv_lens), each)
    return q.contiguous(), q_rope.contiguous(), latents, table
