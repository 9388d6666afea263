"""K and V of a step's prefill rows from pages in e4m3 to a workspace in 16 bits, one sequence behind the other: (keys, kv_heads, head_dim).

A warp takes 16 keys of one head at a time, K and then V: a lane reads 8 bytes and writes 16, so that both sides are whole lines whatever
the strides. All of a group's loads are under way before its first store. Which sequence a key belongs to is searched on the device, so the
grid depends on no length. Keys that no row sees (left of a window) are neither read nor written, and their page-table entries not followed;
a key in a page outside the pool becomes zeros, as TMA would bring it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm

from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.fp8 import e4m3_to_16bit
from fa4_backend.kernels.common.search import upper_bound
from fa4_backend.kernels.convert_kv.config import THREADS, ConvertConfig
from fa4_backend.kernels.launch_abi import convert_fakes

LANES = 32
KEYS = 16  # of a warp's group
VEC = 8  # elements that a lane converts at once


class Place(NamedTuple):
    """Where a lane's key lies in the pool; of lanes 0 .. KEYS."""

    page: Int32  # negative: outside the pool
    row: Int32  # of the page; negative: nobody sees the key


class Sources(NamedTuple):
    """What tells a key's place."""

    mPageTable: cute.Tensor  # (batch, max_pages_per_seq) int32
    mKeyStarts: cute.Tensor  # (batch + 1,) int32
    mCuSeqlensQ: cute.Tensor  # (batch + 1,) int32
    num_pages: Int32
    page_size: Int32


@dataclass(frozen=True)
class ConvertKernel:
    """The kernel of one config; `__call__` is the host side."""

    config: ConvertConfig

    @cute.jit
    def __call__(
        self,
        mK: cute.Tensor,  # (num_pages, page_size, num_kv_heads, head_dim) e4m3
        mV: cute.Tensor,  # likewise, head_dim_v
        mPageTable: cute.Tensor,  # (batch, max_pages_per_seq) int32
        mKeyStarts: cute.Tensor,  # (batch + 1,) int32
        mCuSeqlensQ: cute.Tensor,  # (batch + 1,) int32
        mKeys: cute.Tensor,  # (max_keys, num_kv_heads, head_dim)
        mValues: cute.Tensor,  # (max_keys, num_kv_heads, head_dim_v)
        window_left: Int32,
        num_ctas: Int32,
        stream,
    ):
        """Launch `num_ctas` CTAs."""
        sources = Sources(mPageTable, mKeyStarts, mCuSeqlensQ, Int32(mK.shape[0]), Int32(mK.shape[1]))
        self.kernel(mK, mV, sources, mKeys, mValues, window_left).launch(grid=(num_ctas, 1, 1), block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(
        self,
        mK: cute.Tensor,
        mV: cute.Tensor,
        sources: Sources,
        mKeys: cute.Tensor,
        mValues: cute.Tensor,
        window_left: Int32,
    ):
        """Every warp takes each n-th group, n the warps of the grid."""
        # A prefill kernel that waits for this one may come to the SMs that are free again; it waits before it reads.
        cute.arch.griddepcontrol_launch_dependents()
        grid, bidx = cute.arch.grid_dim()[0], cute.arch.block_idx()[0]
        warps = const_expr(THREADS // LANES)
        warp = bidx * warps + cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        heads = Int32(mK.shape[2])
        total = cutlass.min(sources.mKeyStarts[cute.size(sources.mKeyStarts) - 1], Int32(mKeys.shape[0]))
        groups = (total + KEYS - 1) // KEYS
        for unit in cutlass.range(warp, groups * heads, grid * warps, unroll=1):
            group = unit // heads
            head, first = unit - group * heads, group * KEYS
            place = self._find(sources, first + lane % KEYS, total, window_left)
            _convert(mK, mKeys, place, head, first, self.config.head_dim, self.config.dtype)
            _convert(mV, mValues, place, head, first, self.config.head_dim_v, self.config.dtype)

    @cute.jit
    def _find(self, sources: Sources, key: Int32, total: Int32, window_left: Int32) -> Place:
        """Place of a key of the workspace."""
        starts = sources.mKeyStarts
        page, row = Int32(-1), Int32(-1)
        if key < total:
            seq_idx = upper_bound(starts, cute.size(starts), key) - 1
            begin, end = starts[seq_idx], starts[seq_idx + 1]
            query_len = sources.mCuSeqlensQ[seq_idx + 1] - sources.mCuSeqlensQ[seq_idx]
            token = key - begin
            page_idx = token // sources.page_size
            if token >= end - begin - query_len - window_left and page_idx < sources.mPageTable.shape[1]:
                row = token - page_idx * sources.page_size
                page = sources.mPageTable[seq_idx, page_idx]
                if page >= sources.num_pages:
                    page = Int32(-1)
        return Place(page, row)


@cute.jit
def _convert(
    mX: cute.Tensor,  # (num_pages, page_size, num_kv_heads, head_dim) e4m3
    mOut: cute.Tensor,  # (max_keys, num_kv_heads, head_dim)
    place: Place,
    head: Int32,
    first: Int32,  # key of the workspace that lane 0 knows
    head_dim: cutlass.Constexpr[int],
    dtype: cutlass.Constexpr[str],
):
    """Convert the group's rows of one head."""
    lane = cute.arch.lane_idx()
    vectors_of_row = const_expr(head_dim // VEC)
    loads = const_expr(KEYS * vectors_of_row // LANES)
    loaded, targets = [], []
    for i in cutlass.range_constexpr(loads):
        at = lane + i * LANES
        key = at // vectors_of_row
        column = (at - key * vectors_of_row) * VEC
        page, row = cute.arch.shuffle_sync(place.page, key), cute.arch.shuffle_sync(place.row, key)
        # Loads without a branch: what is not to be read is read in the pool's first row, and thrown away.
        source = mX[cutlass.max(page, 0), cutlass.select_(page < 0, Int32(0), row), head, None].iterator + column
        loaded.append((_load(source), page >= 0))
        targets.append((row >= 0, first + key, column))
    for i in cutlass.range_constexpr(loads):
        pair, is_inside = loaded[i]
        is_seen, key, column = targets[i]
        words = [word for half in vectors.elements(pair) for word in e4m3_to_16bit(half, dtype)]
        if is_seen:
            _store(mOut[key, head, None].iterator + column, words, is_inside)


def _load(pointer: cute.Pointer) -> ir.Value:
    """Eight bytes as two words."""
    return llvm.load(vectors.int32s(2), pointer.to_llvm_ptr(), alignment=8)


def _store(pointer: cute.Pointer, words: list[ir.Value], is_inside: Boolean) -> None:
    """Four words, or zeros."""
    packed = vectors.select_words(is_inside, vectors.from_words([Int32(word) for word in words]))
    llvm.store(packed, pointer.to_llvm_ptr(), alignment=16)


def build(config: ConvertConfig) -> tuple[ConvertKernel, tuple]:
    """Host function and fake arguments of `config` (see `fa4_backend.compile`)."""
    return ConvertKernel(config), convert_fakes(config)
