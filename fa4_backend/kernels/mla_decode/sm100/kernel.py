"""The latent decode kernel of Blackwell: host launch and the split into roles, in CTA pairs. See `docs/mla.md`.

work list -> load warps --(Q, K, V by TMA)--> shared memory -> the leader's mma warp -> softmax warps -> merge (out | split-KV slots -> out)
"""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from fa4_backend.kernels.common import tcgen05_ops
from fa4_backend.kernels.common.cta_group import LEADER
from fa4_backend.kernels.common.decode_entry import StepTensors
from fa4_backend.kernels.common.mask import MaskSpec, MaskValues
from fa4_backend.kernels.common.padding_rows import zero_rows
from fa4_backend.kernels.common.seqlen_info import SeqlenBounds
from fa4_backend.kernels.launch_abi import mla_decode_fakes
from fa4_backend.kernels.mla_decode.config import slot_floats
from fa4_backend.kernels.mla_decode.merge import ResultTensors
from fa4_backend.kernels.mla_decode.sm100.config import PAIR, MlaSm100Config
from fa4_backend.kernels.mla_decode.sm100.load_warp import LoadWarp
from fa4_backend.kernels.mla_decode.sm100.merge import PairMerge
from fa4_backend.kernels.mla_decode.sm100.mma_warp import MmaWarp
from fa4_backend.kernels.mla_decode.sm100.softmax_warps import SoftmaxWarps
from fa4_backend.kernels.mla_decode.sm100.storage import ALL_COLUMNS, SOFTMAX_WARPS, PairStorage
from fa4_backend.kernels.mla_decode.sm100.value_tail_warp import ValueTailWarp
from fa4_backend.kernels.mla_decode.sm100.work import PairWork
from fa4_backend.kernels.mla_decode.tensor_maps import MapMaker, TensorMaps
from fa4_backend.kernels.schedule.work_list import TOTAL_Q

LOAD, MMA, VALUE_TAIL, PADDING, SOFTMAX = range(5)  # warps; softmax from there on
NUM_THREADS = 32 * (SOFTMAX + SOFTMAX_WARPS)
OTHER_REGISTERS, SOFTMAX_REGISTERS = 56, 224  # a thread after setmaxnreg: 128 * (56 + 2 * 224) of 65536


class MlaSm100Kernel:
    """One compiled kernel; construct with its frozen config, then call under `cute.compile`."""

    def __init__(self, config: MlaSm100Config):
        self.config = config
        self.storage = PairStorage(config)
        self.work = PairWork(config)
        self.load_warp = LoadWarp(self.storage, self.work)
        self.mma_warp = MmaWarp(self.storage, self.work)
        self.value_tail_warp = ValueTailWarp(self.storage, self.work)
        self.softmax_warps = SoftmaxWarps(self.storage, self.work, PairMerge(config, self.work), SOFTMAX)

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
        mFirst: cute.Tensor,  # (decode_num_ctas, DECODE_INTS) int32: a row for each pair
        mSlots: cute.Tensor,  # (max_slots, slot_floats) float32
        mArrivals: cute.Tensor,  # (max_slots,) int32
        mScale: cute.Tensor | None,  # (1,) float32; None: latents have 16 bits
        softmax_scale: Float32,
        split_blocks: Int32,
        stream,
    ):
        """Launch one pair for each range of the work list."""
        maps = MapMaker(self.config).make(mQ, mQRope, mLatent)
        page_size = Int32(mLatent.shape[1])
        step = StepTensors(mPageTable, mTiles, mFirst, page_size, split_blocks, SeqlenBounds.of(mO, mPageTable, page_size))
        values = MaskSpec(self.config.mask).values(softmax_scale, Float32(0.0), Int32(0), Int32(0))
        results = ResultTensors(mO, mLse, mSlots, mArrivals, mScale)
        self.kernel(maps, step, Int32(mLatent.shape[0]), values, results).launch(
            grid=(mFirst.shape[0] * PAIR, 1, 1), block=(NUM_THREADS, 1, 1), cluster=(PAIR, 1, 1), min_blocks_per_mp=1, stream=stream
        )

    @cute.kernel
    def kernel(self, maps: TensorMaps, step: StepTensors, num_pages: Int32, values: MaskValues, results: ResultTensors):
        """Set up barriers and tensor memory, then a role for each warp."""
        shared, base = self.storage.allocate()
        place, group = self.storage.place(shared, base), self.storage.group
        pointer = Int32(shared.sTmem.iterator.toint())
        if place.warp == LOAD:
            for atom in maps:
                cpasync.prefetch_descriptor(atom)
            if place.lane == 0:
                self.storage.init_barriers(place)
        if place.warp == MMA:
            group.tmem_alloc(pointer, ALL_COLUMNS)
        if const_expr(self.config.terms == 1):
            if place.warp >= SOFTMAX:
                self.softmax_warps.clear_unloaded_query(place)
        tcgen05_ops.fence_before_sync()
        group.sync_all()
        tcgen05_ops.fence_after_sync()
        if place.warp >= SOFTMAX:
            cute.arch.setmaxregister_increase(SOFTMAX_REGISTERS)
            self.softmax_warps.run(place, step, values, results, shared)
        else:
            cute.arch.setmaxregister_decrease(OTHER_REGISTERS)
            if place.warp == LOAD:
                self.load_warp.run(place, step, num_pages, values, maps)
            elif place.warp == MMA:
                if place.rank == LEADER:
                    self.mma_warp.run(place, step, values)
            elif place.warp == VALUE_TAIL:
                self.value_tail_warp.run(place, step, values)
            else:
                zero_rows(step.mFirst[self.work.list_idx(), TOTAL_Q], results.mO, results.mLse)
        tcgen05_ops.fence_before_sync()
        # The other CTA may still arrive at this one's barriers, and products read its shared memory.
        group.sync_all()
        if place.warp == MMA:
            tcgen05_ops.fence_after_sync()
            group.tmem_dealloc(Int32(0), ALL_COLUMNS)


def build(config: MlaSm100Config) -> tuple[MlaSm100Kernel, tuple[Any, ...]]:
    """The host function of `config` and fake arguments to trace it with (see `fa4_backend.compile`)."""
    return MlaSm100Kernel(config), mla_decode_fakes(config, slot_floats(config))
