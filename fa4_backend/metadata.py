"""What a step of the engine tells the kernels: device buffers with fixed addresses, refreshed once, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from fa4_backend.arch import REFERENCE_ARCH
from fa4_backend.plan import AttentionPlan

if TYPE_CHECKING:
    import torch

    from fa4_backend.kernels.schedule.work_list import WorkLists


class StepBounds(NamedTuple):
    """Host-side bounds of one step. In a captured graph they are the capture's, so kernels may use them only as upper bounds."""

    num_seqs: int
    max_seqlen_q: int  # longest query of the step
    max_seqlen_k: int  # longest KV of the step


@dataclass
class AttentionMetadata:
    """Buffers of one plan on one device. `refresh` before the first layer of a step; then every layer may read them.

    Addresses never change after `allocate`, so a captured CUDA graph follows each replay's lengths.
    """

    plan: AttentionPlan
    device: torch.device
    work: WorkLists | None = None  # device-made work lists and split-KV workspace; None on the reference
    bounds: StepBounds | None = field(default=None)
    window_left: int | None = None  # no layer that reads this sees more keys before the diagonal: others get no work; None: all seen

    @classmethod
    def allocate(cls, plan: AttentionPlan, device: torch.device | str) -> AttentionMetadata:
        """Make the buffers for every batch within `plan.limits`; the only allocation."""
        import torch

        device = torch.device(device)
        if plan.problem.arch == REFERENCE_ARCH:
            return cls(plan, device)
        from fa4_backend.kernels.schedule.work_list import WorkLists

        return cls(plan, device, WorkLists.allocate(plan, device))

    def refresh(
        self,
        *,
        cu_seqlens_q: torch.Tensor,
        seqused_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
    ) -> None:
        """Take over the lengths of a step. Launches the scheduling kernel on a GPU; no sync, no allocation.

        Args:
            cu_seqlens_q: (batch + 1,) int32; padded batches repeat the last value.
            seqused_k: (batch,) int32, valid KV tokens; 0 for padding.
            max_seqlen_q, max_seqlen_k: host upper bounds of the step's query and KV lengths.

        Raises:
            ValueError: the batch is larger than the plan's limits.
        """
        limits = self.plan.limits
        num_seqs = seqused_k.shape[0]
        for name, got, limit in (
            ("seqused_k rows", num_seqs, limits.max_num_seqs),
            ("max_seqlen_q", max_seqlen_q, limits.max_num_tokens),
            ("max_seqlen_k", max_seqlen_k, limits.max_seqlen_k),
        ):
            if got > limit:
                raise ValueError(f"{name}: expected at most {limit} (the plan's limit), got {got}")
        if cu_seqlens_q.shape[0] != num_seqs + 1:
            raise ValueError(f"cu_seqlens_q: expected {num_seqs + 1} entries for {num_seqs} sequences, got {cu_seqlens_q.shape[0]}")
        self.bounds = StepBounds(num_seqs, max_seqlen_q, max_seqlen_k)
        if self.work is not None:
            from fa4_backend.kernels.launch import launch_schedule

            launch_schedule(self.plan, self.work, self.window_left, cu_seqlens_q, seqused_k)
