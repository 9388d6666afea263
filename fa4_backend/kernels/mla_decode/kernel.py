"""The latent decode kernel of Hopper: host launch and the split into roles. See `docs/mla.md`.

work list -> load warp --(Q, KV tiles by TMA)--> shared memory -> two consumer warpgroups -> merge (out | split-KV slots -> out)

Consumers are wgmma's warpgroups (`consumer_warpgroup.py`), or of FP8 latents and at most 16 rows eight warps (`narrow_warps.py`).
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from fa4_backend.kernels.common.cluster_ops import sync_cluster
from fa4_backend.kernels.common.decode_entry import StepTensors
from fa4_backend.kernels.common.mask import MaskSpec, MaskValues
from fa4_backend.kernels.common.padding_rows import zero_rows
from fa4_backend.kernels.common.seqlen_info import SeqlenBounds
from fa4_backend.kernels.launch_abi import mla_decode_fakes
from fa4_backend.kernels.mla_decode.config import LATENT_PARTS, PART_DIM, TILE_M, TILE_N, MlaDecodeConfig, slot_floats
from fa4_backend.kernels.mla_decode.consumer_warpgroup import ConsumerWarpgroup, Mmas
from fa4_backend.kernels.mla_decode.convert_warps import ConvertWarps
from fa4_backend.kernels.mla_decode.load_warp import FirstEntry, LoadWarp
from fa4_backend.kernels.mla_decode.merge import Merge, ResultTensors
from fa4_backend.kernels.mla_decode.narrow_warps import NarrowWarps
from fa4_backend.kernels.mla_decode.shared_rows import SharedRows
from fa4_backend.kernels.mla_decode.storage import SIDES, MlaStorage
from fa4_backend.kernels.mla_decode.tensor_maps import MapMaker, TensorMaps
from fa4_backend.kernels.mla_decode.work import MlaWork
from fa4_backend.kernels.schedule.work_list import TOTAL_Q

WARPGROUP_WARPS = 4
NUM_THREADS = 32 * WARPGROUP_WARPS * (1 + SIDES)
# A thread after setmaxnreg, 128 * (load + 2 * consumer) of 65536: without and with warps that convert.
LOAD_REGISTERS, CONSUMER_REGISTERS = (24, 56), (240, 224)


class MlaDecodeKernel:
    """One compiled kernel; construct with its frozen config, then call under `cute.compile`."""

    def __init__(self, config: MlaDecodeConfig):
        self.config = config
        self.storage = MlaStorage(config)
        self.work = MlaWork(config)
        self.load_warp = LoadWarp(self.storage, self.work)
        self.convert_warps = ConvertWarps(self.storage, self.work)
        parts = (config, self.storage, self.work, Merge(config, self.work))
        self.shared_rows = SharedRows(config, self.storage)
        self.consumers, self.narrow_warps = ConsumerWarpgroup(*parts, self.shared_rows), NarrowWarps(*parts)

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (total_q, num_heads, 512)
        mQRope: cute.Tensor,  # (total_q, num_heads, 64)
        mLatent: cute.Tensor,  # (num_pages, page_size, 576)
        mPageTable: cute.Tensor,  # (batch, max_pages_per_seq) int32
        mO: cute.Tensor,  # (total_q, num_heads, 512)
        mLse: cute.Tensor | None,  # (num_heads, total_q) float32
        mTiles: cute.Tensor,  # (max_decode_tiles, DECODE_INTS) int32
        mFirst: cute.Tensor,  # (decode_num_ctas, DECODE_INTS) int32: a row for each cluster
        mSlots: cute.Tensor,  # (max_slots, slot_floats) float32
        mArrivals: cute.Tensor,  # (max_slots,) int32
        mScale: cute.Tensor | None,  # (1,) float32
        softmax_scale: Float32,
        split_blocks: Int32,
        stream,
    ):
        """Launch one CTA, or one cluster, for each range of the work list."""
        maps = MapMaker(self.config).make(mQ, mQRope, mLatent)
        page_size = Int32(mLatent.shape[1])
        step = StepTensors(mPageTable, mTiles, mFirst, page_size, split_blocks, SeqlenBounds.of(mO, mPageTable, page_size))
        values = MaskSpec(self.config.mask).values(softmax_scale, Float32(0.0), Int32(0), Int32(0))
        results = ResultTensors(mO, mLse, mSlots, mArrivals, mScale)
        dtype, major = self.storage.dtype, warpgroup.OperandMajorMode

        def product(columns: int, b_major: Any, source: Any) -> cute.TiledMma:
            return make_trivial_tiled_mma(dtype, dtype, major.K, b_major, Float32, (1, 1, 1), (TILE_M, columns), a_source=source)

        half = const_expr(LATENT_PARTS // SIDES * PART_DIM)
        mmas = None
        if const_expr(not self.config.is_narrow):
            mmas = Mmas(
                product(TILE_N, major.K, warpgroup.OperandSource.SMEM),
                product(half, major.MN, warpgroup.OperandSource.RMEM),
                product(half, major.MN, warpgroup.OperandSource.SMEM),
            )
        self.kernel(maps, mmas, step, Int32(mLatent.shape[0]), values, results).launch(
            grid=(mFirst.shape[0] * self.config.cluster_size, 1, 1),
            block=(NUM_THREADS, 1, 1),
            cluster=(self.config.cluster_size, 1, 1) if self.config.cluster_size > 1 else None,
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        maps: TensorMaps,
        mmas: Mmas | None,
        step: StepTensors,
        num_pages: Int32,
        values: MaskValues,
        results: ResultTensors,
    ):
        """Set up, then a role for each warpgroup."""
        cluster = const_expr(self.config.cluster_size)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared = self.storage.allocate()
        first = FirstEntry(Int32(0), Int32(0), Int32(0))
        if warp == 0:
            first = self.load_warp.look_up(step, num_pages, values)
        if warp == 1:
            for atom in maps:
                cpasync.prefetch_descriptor(atom)
            with cute.arch.elect_one():
                self.storage.init_barriers(shared.barriers)
        if const_expr(not self.config.is_narrow):
            if warp >= WARPGROUP_WARPS:
                self.shared_rows.clear_unloaded_query(shared)
        sync_cluster(cluster)
        if warp < WARPGROUP_WARPS:
            cute.arch.setmaxregister_decrease(LOAD_REGISTERS[self.config.is_converted])
            if warp == 0:
                self.load_warp.run(step, num_pages, values, maps, shared, first)
            elif const_expr(self.config.is_converted):
                self.convert_warps.run(step, values, shared, warp - 1)
            if warp == 1:
                zero_rows(step.mFirst[self.work.list_idx(), TOTAL_Q], results.mO, results.mLse)
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS[self.config.is_converted])
            if const_expr(self.config.is_narrow):
                self.narrow_warps.run(step, values, results, shared)
            else:
                num_pending = Int32(0)
                for side in cutlass.range_constexpr(SIDES):
                    if warp // WARPGROUP_WARPS == 1 + side:
                        num_pending = self.consumers.run(side, mmas, step, values, results, shared)
                self.consumers.join_parts(num_pending, step, values, results, shared)
        if const_expr(cluster > 1):
            # The other CTA may still copy into this one's shared memory, and arrive at its barriers.
            sync_cluster(cluster)


def build(config: MlaDecodeConfig) -> tuple[MlaDecodeKernel, tuple[Any, ...]]:
    """The host function of `config` and fake arguments to trace it with (see `fa4_backend.compile`)."""
    return MlaDecodeKernel(config), mla_decode_fakes(config, slot_floats(config))
