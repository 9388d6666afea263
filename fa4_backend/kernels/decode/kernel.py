"""The decode kernel: host launch and the split into roles. See `docs/decode.md`.

load_warp --[kv tile: K and V boxes, one mbarrier]--> consumer_warps --> merge (out | split-KV slot -> combine)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from fa4_backend.kernels.common.decode_entry import StepTensors
from fa4_backend.kernels.common.hardware import swizzle_bits
from fa4_backend.kernels.common.mask import MaskSpec, MaskValues
from fa4_backend.kernels.common.padding_rows import zero_rows
from fa4_backend.kernels.common.seqlen_info import SeqlenBounds
from fa4_backend.kernels.decode.config import BOX_KEYS, DecodeConfig, slot_floats
from fa4_backend.kernels.decode.consumer_warps import ConsumerWarps
from fa4_backend.kernels.decode.load_warp import LoadWarp, QueryMode, TensorMaps, query_modes
from fa4_backend.kernels.decode.merge import Merge, ResultTensors
from fa4_backend.kernels.decode.operands import PlainOperands
from fa4_backend.kernels.decode.operands_fp8 import Fp8Operands
from fa4_backend.kernels.decode.scores import ScoreTransform
from fa4_backend.kernels.decode.shares import Shares
from fa4_backend.kernels.decode.storage import DecodeStorage
from fa4_backend.kernels.decode.work import VisibleTiles
from fa4_backend.kernels.launch_abi import decode_fakes
from fa4_backend.kernels.schedule.work_list import TOTAL_Q


@dataclass(frozen=True)
class DecodeKernel:
    """The kernel of one config; `__call__` is the host side."""

    config: DecodeConfig

    @property
    def mask(self) -> MaskSpec:
        """Which keys its rows see."""
        return MaskSpec(self.config.mask)

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (total_q, num_q_heads, head_dim)
        mK: cute.Tensor,  # (num_pages, page_size, num_kv_heads, head_dim)
        mV: cute.Tensor,  # (num_pages, page_size, num_kv_heads, head_dim_v)
        mPageTable: cute.Tensor,  # (batch, max_pages_per_seq) int32
        mO: cute.Tensor,  # (total_q, num_q_heads, head_dim_v)
        mLse: cute.Tensor | None,  # (num_q_heads, total_q) float32
        mTiles: cute.Tensor,  # (max_decode_tiles, DECODE_INTS) int32
        mFirst: cute.Tensor,  # (decode_num_ctas, DECODE_INTS) int32
        mSlots: cute.Tensor,  # (max_slots, slot_floats) float32
        mArrivals: cute.Tensor,  # (max_slots,) int32
        mSinks: cute.Tensor | None,  # (num_q_heads,)
        mSlopes: cute.Tensor | None,  # (num_q_heads,) float32
        mKScale: cute.Tensor | None,  # (num_kv_heads,) float32
        mVScale: cute.Tensor | None,  # (num_kv_heads,) float32
        mOutScale: cute.Tensor | None,  # (1,) float32
        mQScale: cute.Tensor | None,  # (num_kv_heads,) float32
        softmax_scale: Float32,
        softcap: Float32,
        window_left: Int32,
        window_right: Int32,
        split_blocks: Int32,
        stream,
    ):
        """Launch one CTA for each range of the work list."""
        maps = TensorMaps(self._query_tma(mQ), self._box_tma(mK), self._box_tma(mV))
        page_size = Int32(mK.shape[1])
        step = StepTensors(mPageTable, mTiles, mFirst, page_size, split_blocks, SeqlenBounds.of(mO, mPageTable, page_size))
        values = self.mask.values(softmax_scale, softcap, window_left, window_right)
        results = ResultTensors(mO, mLse, mSlots, mArrivals, mSinks, mVScale, mOutScale)
        self.kernel(maps, mSlopes, mQScale, mKScale, step, values, results).launch(
            grid=(mFirst.shape[0], 1, 1),
            block=(self.config.num_threads, 1, 1),
            min_blocks_per_mp=self.config.ctas_per_sm,
            preferred_smem_carveout=100,
            stream=stream,
        )

    def _query_tma(self, mQ: cute.Tensor) -> cute.CopyAtom:
        """TMA of q (total_q, num_q_heads, head_dim). A box: the packed rows of one KV head of all tokens that a decode row may have.

        Rows past a sequence's end are another's or zeros; they are masked.
        """
        c = self.config
        part = c.q_part_bytes // c.element_bytes
        d_stride = mQ.stride[2]
        # (elements of a box, its stride in shared memory, extent of q, stride of q)
        modes = {
            QueryMode.HEAD: (c.q_per_kv, part, mQ.shape[1], mQ.stride[1]),
            QueryMode.TOKEN: (c.query_len, part * c.q_per_kv, mQ.shape[0], mQ.stride[0]),
            QueryMode.PART: (c.head_dim // part, part * c.rows, c.head_dim // part, part),
        }
        chosen = [modes[mode] for mode in query_modes(c)]
        boxes, box_strides, extents, strides = zip(*chosen, strict=True)
        rows_first = cute.make_tensor(mQ.iterator, cute.make_layout((part, *extents), stride=(d_stride, *strides)))
        shape = (part, *boxes)
        swizzle = cute.make_swizzle(swizzle_bits(c.q_part_bytes), 4, 3)
        box = cute.make_composed_layout(swizzle, 0, cute.make_layout(shape, stride=(1, *box_strides)))
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), rows_first, box, shape)[0]

    def _box_tma(self, cache: cute.Tensor) -> cute.CopyAtom:
        """TMA of a cache (num_pages, page_size, num_kv_heads, head_dim). A box: 16 keys of a page, all parts of a head, each as wide as its
        swizzle."""
        part_bytes = self.config.kv_part_bytes(cache.shape[3])
        part = part_bytes // self.config.kv_element_bytes
        parts = cache.shape[3] // part
        swizzle = cute.make_swizzle(swizzle_bits(part_bytes), 4, 3)
        # A mode of one part would vanish from the tensor map, and its coordinate with it: see `LoadWarp`.
        inner, inner_stride = (part, cache.shape[1], parts)[: 3 if parts > 1 else 2], (1, cache.stride[1], part)
        layout = cute.make_layout(
            (*inner, cache.shape[2], cache.shape[0]), stride=(*inner_stride[: len(inner)], cache.stride[2], cache.stride[0])
        )
        rows_first = cute.make_tensor(cache.iterator, layout)
        shape = (part, BOX_KEYS, parts)[: len(inner)]
        box = cute.make_composed_layout(swizzle, 0, cute.make_layout(shape, stride=(1, part, part * BOX_KEYS)[: len(inner)]))
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), rows_first, box, shape)[0]

    @cute.kernel
    def kernel(
        self,
        maps: TensorMaps,
        mSlopes: cute.Tensor | None,  # (num_q_heads,) float32
        mQScale: cute.Tensor | None,  # (num_kv_heads,) float32
        mKScale: cute.Tensor | None,  # (num_kv_heads,) float32
        step: StepTensors,
        values: MaskValues,
        results: ResultTensors,
    ):
        """Set up, then one role a warp; the roles meet before they use a barrier."""
        # The prefill kernel of the same call reads nothing of ours: it may take the SMs that have no decode rows at once.
        cute.arch.griddepcontrol_launch_dependents()
        c, storage, visible = self.config, DecodeStorage(self.config), VisibleTiles(self.mask)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        shared = storage.allocate()
        if warp == c.num_consumer_warps:
            for atom in maps:
                cpasync.prefetch_descriptor(atom)
            if const_expr(c.has_kv_scales):
                # Consumers ask for an entry's scales when its Q has come: from the memory they would come after its first tile.
                head = cutlass.min(cute.arch.lane_idx(), cute.size(mKScale) - 1)
                for scales in (mKScale, results.mVScale) if const_expr(mQScale is None) else (mQScale, mKScale, results.mVScale):
                    cute.arch.prefetch((scales.iterator + scales.layout(head)).to_llvm_ptr(), cache_level="L2")
        if warp == 0:
            with cute.arch.elect_one():
                storage.init_barriers(shared)
        if warp == c.num_consumer_warps:
            LoadWarp(storage, visible).run(step, values, maps, shared)
            zero_rows(step.mFirst[cute.arch.block_idx()[0], TOTAL_Q], results.mO, results.mLse)
        else:
            operands = Fp8Operands(c) if c.has_kv_scales else PlainOperands(c)
            merge = Merge(c, operands)
            consumers = ConsumerWarps(c, storage, visible, ScoreTransform(c), operands, merge, Shares(merge))
            consumers.run(step, values, mSlopes, mQScale, mKScale, results, shared)


def build(config: DecodeConfig) -> tuple[DecodeKernel, tuple[Any, ...]]:
    """The host function of `config` and fake arguments to trace it with (see `fa4_backend.compile`)."""
    return DecodeKernel(config), decode_fakes(config, slot_floats(config))
