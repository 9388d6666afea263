"""Who accesses memory in a cluster, as numbers: every warp as a whole, its lanes, its asynchronous engines, every mbarrier's copies."""

from __future__ import annotations

import numpy as np

from fa4_backend.emulator.errors import EmulatorError

# Actors of every warp, in this order; a barrier's copies come after all warps'.
# FENCED, FENCED_GLOBAL: its writes to shared and to global memory that the asynchronous proxy sees. BULK, BULK_WRITE: its bulk stores as
# readers of shared memory and as writers of global memory. ACQUIRED: what it learnt of other clusters.
GENERIC, FENCED, FENCED_GLOBAL, TENSOR, TMEM_LOAD, TMEM_STORE, WGMMA, BULK, BULK_WRITE, CP_ASYNC, ACQUIRED = range(11)
PER_WARP = 11
NAMES = (
    "generic access", "fenced write", "fenced write", "MMA", "tcgen05.ld", "tcgen05.st", "wgmma", "bulk store", "bulk store", "cp.async",
    "acquire",
)  # fmt: skip
BARRIERS_PER_CTA = 96  # mbarriers that copies signal, and pipelines of the tensor core


class Layout:
    """Numbers of the actors of a cluster: PER_WARP a warp, then its barriers' copies, then 32 lanes a warp, three times: what they access,
    and what of it the asynchronous proxy sees in shared and in global memory; last the start of each CTA."""

    def __init__(self, num_warps: int, size: int) -> None:
        self.num_warps = num_warps
        self.first_lane = PER_WARP * num_warps + BARRIERS_PER_CTA * size
        self.first_start = self.first_lane + 3 * 32 * num_warps
        self.num_actors = self.first_start + size
        warps, lanes = PER_WARP * np.arange(num_warps), self.first_lane + np.arange(32 * num_warps)
        self.generic = np.concatenate((warps + GENERIC, lanes))
        # What stands for the writes of `generic` that the asynchronous proxy sees, in shared and in global memory.
        self.visible = [np.concatenate((warps + kind, lanes + 32 * num_warps * step)) for kind, step in ((FENCED, 1), (FENCED_GLOBAL, 2))]

    def extra(self, number: int) -> int:
        """The actor of a barrier's copies, or of a pipeline of the tensor core, the `number`th that acts.

        Raises:
            EmulatorError: there are more than actors for them; the next would be taken for a lane.
        """
        actor = PER_WARP * self.num_warps + number
        if actor >= self.first_lane:
            most = self.first_lane - PER_WARP * self.num_warps
            raise EmulatorError(
                f"expected at most {most} mbarriers of a cluster that copies signal, and pipelines of the tensor core, got more: "
                "races cannot be told apart (BARRIERS_PER_CTA)"
            )
        return actor

    def lane(self, warp: int) -> int:
        """The actor of a warp's lane 0."""
        return self.first_lane + 32 * warp

    def name(self, actor: int) -> str:
        """What the actor does."""
        if actor < PER_WARP * self.num_warps:
            return NAMES[actor % PER_WARP]
        return "copy" if actor < self.first_lane else NAMES[GENERIC]
