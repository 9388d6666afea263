"""What `fa4 model` needs of our own kernels: recordings of single tiles, and the work list of a whole step.

Both come from the kernels themselves on the emulator: a tile from the prefill kernel, the list from the schedule kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fa4_backend.emulator.chip import Chip
from fa4_backend.emulator.kernels import observed
from fa4_backend.emulator.recording import Launches, Recording
from fa4_backend.kernels.schedule import work_list as wl
from fa4_backend.metadata import AttentionMetadata
from fa4_backend.ops import paged_attention
from fa4_backend.plan import AttentionPlan, plan_attention
from fa4_backend.problem import EMULATED_PREFIX, AttentionProblem, BatchLimits, MaskFeatures

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Step:
    """One step's shape. Lengths are tokens of each sequence; head_dim_v may differ from head_dim."""

    arch: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    page_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    is_causal: bool = True

    def problem(self, num_q_heads: int, num_kv_heads: int) -> AttentionProblem:
        """The compile-time facts, with as many heads."""
        return AttentionProblem(
            num_q_heads, num_kv_heads, self.head_dim, self.head_dim_v, self.dtype, self.page_size, EMULATED_PREFIX + self.arch,
            kv_dtype=self.kv_dtype, mask=MaskFeatures(is_causal=self.is_causal),
        )  # fmt: skip

    @cached_property
    def flops(self) -> float:
        """Multiplications and additions of both products over the keys that are seen, and no others."""
        seen = 0
        for query_len, kv_len in zip(self.query_lens, self.kv_lens, strict=True):
            seen += query_len * kv_len - (query_len * (query_len - 1) // 2 if self.is_causal else 0)
        return 2.0 * self.num_q_heads * (self.head_dim + self.head_dim_v) * seen

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of K and V of as many tokens of one KV head."""
        return tokens * (self.head_dim + self.head_dim_v) * (1 if self.kv_dtype.startswith("float8") else 2)

    @property
    def num_bytes(self) -> int:
        """Bytes of q, out and of K and V, each once."""
        rows = sum(self.query_lens) * self.num_q_heads * (self.head_dim + self.head_dim_v) * 2
        return rows + self.num_kv_heads * self.kv_bytes(sum(self.kv_lens))


def plan_of(step: Step, num_sms: int) -> AttentionPlan:
    """The plan of a whole step on a chip of as many SMs."""
    limits = BatchLimits(len(step.query_lens), sum(step.query_lens), max(step.kv_lens))
    return plan_attention(step.problem(step.num_q_heads, step.num_kv_heads), limits, num_sms=num_sms)


def scheduled(step: Step, chip: Chip) -> tuple[AttentionPlan, AttentionMetadata]:
    """The plan and its metadata, filled by the schedule kernel on the emulator."""
    import torch

    plan = plan_of(step, chip.num_sms)
    metadata = AttentionMetadata.allocate(plan, "cpu")
    metadata.refresh(
        cu_seqlens_q=torch.tensor([0, *step.query_lens]).cumsum(0).int(), seqused_k=torch.tensor(step.kv_lens, dtype=torch.int32),
        max_seqlen_q=max(step.query_lens), max_seqlen_k=max(step.kv_lens),
    )  # fmt: skip
    return plan, metadata


def prefill_blocks(step: Step, plan: AttentionPlan, metadata: AttentionMetadata) -> list[int]:
    """KV blocks of the tiles in the order of the queue: an entry's range cut to what the mask lets its rows see."""
    assert metadata.work is not None and plan.kernels is not None
    work, key = metadata.work, plan.kernels.prefill
    entries = work.prefill_tiles[: int(work.prefill_queue[0, wl.QUEUE_TOTAL])].numpy()
    return [visible_blocks(step, entry, key.tokens_per_item, key.kernel.tile.tile_n) for entry in entries]


def visible_blocks(step: Step, entry: np.ndarray, tokens: int, tile_n: int) -> int:
    """KV blocks that an entry of the prefill list works on; at least one."""
    query_len, kv_len = step.query_lens[entry[wl.SEQ_IDX]], step.kv_lens[entry[wl.SEQ_IDX]]
    end = min(kv_len, kv_len - query_len + (int(entry[wl.M_BLOCK]) + 1) * tokens) if step.is_causal else kv_len
    return max(1, min(-(-end // tile_n), int(entry[wl.N_BLOCK_END])) - int(entry[wl.N_BLOCK_BEGIN]))


def record_tiles(step: Step, tiles: int, blocks: int) -> Recording:
    """What the prefill kernel does for some tiles of one KV head, one after the other, with as many KV blocks each.

    Each is a sequence: of two tiles of one, the earlier would see fewer keys.
    """
    import torch

    group = step.num_q_heads // step.num_kv_heads
    problem = step.problem(group, 1)
    probe = plan_attention(problem, BatchLimits(1, 4096, 4096), num_sms=2)
    assert probe.kernels is not None
    key = probe.kernels.prefill
    query_len, kv_len = key.tokens_per_item, blocks * key.kernel.tile.tile_n
    num_sms = getattr(key, "ctas_per_item", 1)
    plan = plan_attention(problem, BatchLimits(tiles, tiles * query_len, kv_len), num_sms=num_sms)
    launches = Launches()
    with observed(None, launches):
        metadata = AttentionMetadata.allocate(plan, "cpu")
        begins = torch.arange(tiles + 1, dtype=torch.int32) * query_len
        lengths = torch.full((tiles,), kv_len, dtype=torch.int32)
        metadata.refresh(cu_seqlens_q=begins, seqused_k=lengths, max_seqlen_q=query_len, max_seqlen_k=kv_len)
        q, k, v, table = _tensors(step, group, tiles * query_len, kv_len)
        table = table.expand(tiles, -1).contiguous()
        scale = torch.ones(1) if problem.has_kv_scales else None
        paged_attention(q, k, v, table, begins, lengths, plan=plan, metadata=metadata, k_scale=scale, v_scale=scale)
    return launches.recordings[-1]


def _tensors(step: Step, group: int, query_len: int, kv_len: int) -> tuple[torch.Tensor, ...]:
    """q, K and V pages, the page table."""
    import torch

    generator = torch.Generator().manual_seed(0)
    pages = -(-kv_len // step.page_size)
    kind = getattr(torch, step.dtype if step.kv_dtype == "auto" else step.kv_dtype)
    q = torch.randn(query_len, group, step.head_dim, generator=generator).to(getattr(torch, step.dtype))
    k, v = (torch.randn(pages, step.page_size, 1, d, generator=generator).to(kind) for d in (step.head_dim, step.head_dim_v))
    return q, k, v, torch.arange(pages, dtype=torch.int32)[None]
