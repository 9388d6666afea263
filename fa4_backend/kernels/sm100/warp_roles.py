"""Which warp of the CTA does what, and the pipelines between them.

    load --q---> mma --s--> softmax 0, 1 --p, p_rest--> mma
    load --kv--> mma        softmax 0, 1 --stats--> correction
    load --v_tail--> value_tail --kv--> mma --o--> correction --o--> epilogue
    load --tile--> all roles, load too

With K and V in FP8 the correction warps convert them as well, and there is no value tail:

    load --kv--> convert --kv--> mma

Each softmax group owns one query tile of 128 rows, one row a thread. Where a CTA has one tile, the second group has nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.kernels.common.edges import Party, PipelineEdge, Signal
from fa4_backend.kernels.common.hardware import LANES
from fa4_backend.kernels.sm100.config import S_STAGE, Sm100Config
from fa4_backend.kernels.sm100.tile_bytes import TileBytes

WARPGROUP = 4  # warps; TMEM lanes 32 w .. 32 w + 31 are accessible to warp w of a warpgroup (PTX ISA, "tcgen05.ld: access restrictions")
WARPGROUP_THREADS = LANES * WARPGROUP
FEED_STAGE = 4  # entries of the work list that roles may be apart


@dataclass(frozen=True)
class WarpRoles:
    """Warp indices within the CTA."""

    softmax_first: int = 0  # 8 warps: group 0, then group 1
    correction_first: int = 8  # 4 warps; they convert, too
    mma: int = 12
    load: int = 13
    epilogue: int = 14
    value_tail: int = 15
    num_warps: int = 16

    @property
    def num_threads(self) -> int:
        """Threads of the CTA."""
        return self.num_warps * LANES


ROLES = WarpRoles()


def kv_edges(sizes: TileBytes, config: Sm100Config) -> tuple[PipelineEdge, ...]:
    """How K and V come to the mma warp.

    Tiles share a ring; a V tile may be narrower than a K tile, so the load warp announces each one's own bytes.
    """
    ctas = config.tuning.cta_group
    load, load_all, mma = Party("load", Signal.TMA), Party("load", Signal.TMA, ctas=ctas), Party("mma", Signal.COMMIT)
    tx_bytes = max(sizes.k_tx_bytes, sizes.v_tx_bytes)
    if config.converts:
        convert, convert_all = Party("convert", Signal.WARPS, WARPGROUP), Party("convert", Signal.WARPS, WARPGROUP, ctas)
        return (
            PipelineEdge("kv_load_to_convert", config.staged, (load,), (convert,), tx_bytes),
            PipelineEdge("kv_convert_to_mma", config.kv_stage, (convert_all,), (mma,)),
        )
    return (
        # The arrival for a V tile with a tail is the value tail warp's instead.
        PipelineEdge("kv_load_to_mma", config.kv_stage, (load_all,), (mma,), tx_bytes),
        PipelineEdge("v_tail_load_to_value_tail", 1, (load,), (Party("value_tail", Signal.WARPS, 1),), sizes.v_tx_bytes),
    )


def feed_edge(config: Sm100Config) -> PipelineEdge:
    """How every role hears of the next entry of the work list. In a pair the leader's load warp tells both CTAs, and hears from both."""
    ctas = config.tuning.cta_group
    roles = {"softmax": WARPGROUP * config.q_tiles, "correction": WARPGROUP, "load": 1, "epilogue": 1}
    if not config.converts:
        roles["value_tail"] = 1
    consumers = tuple(Party(role, Signal.WARPS, warps, ctas) for role, warps in roles.items())
    return PipelineEdge("tile_load_to_roles", FEED_STAGE, (Party("load", Signal.WARPS, 1),), (*consumers, Party("mma", Signal.WARPS, 1)))


def pipeline_edges(sizes: TileBytes, config: Sm100Config, o_stage: int) -> tuple[PipelineEdge, ...]:
    """Every pipeline of the kernel; `docs/sm100.md` draws them. All CTAs that share products signal to the mma warp."""
    ctas = config.tuning.cta_group
    softmax_all = Party("softmax", Signal.WARPS, WARPGROUP, ctas)
    softmax_warp = Party("softmax", Signal.WARPS, 1)
    correction = Party("correction", Signal.WARPS, WARPGROUP)
    correction_warp = Party("correction", Signal.WARPS, 1)
    correction_all = Party("correction", Signal.WARPS, WARPGROUP, ctas)
    mma = Party("mma", Signal.COMMIT)
    load_all = Party("load", Signal.TMA, ctas=ctas)
    return (
        feed_edge(config),
        PipelineEdge("q_load_to_mma", config.q_tiles, (load_all,), (mma,), sizes.q_tx_bytes),
        *kv_edges(sizes, config),
        # S is overwritten by the next QK, which the mma warp issues behind the PV that read P, and P is written after S was read.
        PipelineEdge("s_mma_to_softmax", S_STAGE, (mma,), drained_by="p_softmax_to_mma"),
        # P is overwritten after the next S has arrived, whose commit covers the PV that read this P.
        PipelineEdge("p_softmax_to_mma", S_STAGE, (softmax_all,), drained_by="s_mma_to_softmax"),
        PipelineEdge("p_rest_softmax_to_mma", S_STAGE, (softmax_all,), drained_by="s_mma_to_softmax"),
        # Of one query tile a product with V may still run when the next block's scores are looked at: O is rescaled behind it. Its next
        # product waits for the weights of that block.
        *(() if config.q_tiles == S_STAGE else (PipelineEdge("pv_mma_to_softmax", 1, (mma,), drained_by="p_softmax_to_mma"),)),
        # One buffer a warp: lane i of a correction warp reads what lane i of its softmax warp wrote.
        PipelineEdge("stats_softmax_to_correction", config.q_tiles * WARPGROUP, (softmax_warp,), (correction_warp,)),
        PipelineEdge("o_mma_to_correction", config.q_tiles, (mma,), (correction_all,)),
        PipelineEdge("o_correction_to_epilogue", o_stage, (correction,), (Party("epilogue", Signal.WARPS, 1),)),
    )
