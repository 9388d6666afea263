"""K and V of a step's prefill rows from pages in e4m3 to a workspace in 16 bits, one sequence behind the other: (keys, kv_heads, head_dim).

A warp takes neighbours in the workspace, some rows of a key and a head each, of K and of V: a lane reads 8 bytes and writes 16, so that
both sides are whole lines whatever the strides. All of its loads are under way before its first store. Which sequence a key belongs to is
searched on the device, so the grid depends on no length. Keys that no row sees (left of a window) are neither read nor written, and their
page-table entries not followed; a key in a page outside the pool becomes zeros, as TMA would bring it.

What limits is memory: docs/sm90.md, "Converted once a call", has other forms and the counters.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T

from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.fp8 import e4m3_to_16bit
from fa4_backend.kernels.common.hardware import LANES
from fa4_backend.kernels.common.search import upper_bound
from fa4_backend.kernels.convert_kv.config import THREADS, ConvertConfig
from fa4_backend.kernels.launch_abi import convert_fakes

VEC = 8  # elements that a lane converts at once
UNIT_BYTES = 2048  # of K that a warp takes at once: with V's 16 loads a lane, which 64 registers hold


class Place(NamedTuple):
    """Where a lane's row of the unit lies in the pool, and where it goes."""

    page: Int32  # negative: outside the pool
    row: Int32  # of the page; negative: nobody sees the key
    key: Int32  # of the workspace
    head: Int32


class Loaded(NamedTuple):
    """Eight elements that a lane has under way."""

    pair: ir.Value
    source: Int32  # the lane that knows their row's place
    column: Int32
    is_inside: Boolean


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
        """Every warp takes each n-th unit, n the warps of the grid."""
        # A prefill kernel that waits for this one may come to the SMs that are free again; it waits before it reads.
        cute.arch.griddepcontrol_launch_dependents()
        config, rows = self.config, const_expr(unit_rows(self.config))
        grid, bidx = cute.arch.grid_dim()[0], cute.arch.block_idx()[0]
        warps = const_expr(THREADS // LANES)
        warp = bidx * warps + cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        heads = Int32(mK.shape[2])
        total = cutlass.min(sources.mKeyStarts[cute.size(sources.mKeyStarts) - 1], Int32(mKeys.shape[0]))
        policy = _read_once()
        for unit in cutlass.range(warp, (total * heads + rows - 1) // rows, grid * warps, unroll=1):
            place = self._find(sources, unit * rows + lane % rows, heads, total, window_left)
            keys = _loads(mK, place, config.head_dim, rows, policy)
            values = _loads(mV, place, config.head_dim_v, rows, policy)
            _write(mKeys, place, keys, config.dtype)
            _write(mValues, place, values, config.dtype)

    @cute.jit
    def _find(self, sources: Sources, at: Int32, heads: Int32, total: Int32, window_left: Int32) -> Place:
        """Place of row `at` of the workspace: its keys, each with all heads."""
        key = at // heads
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
        return Place(page, row, key, at - key * heads)


def unit_rows(config: ConvertConfig) -> int:
    """Rows, of one key and head each, that a warp takes at once."""
    return min(16, UNIT_BYTES // config.head_dim // 8 * 8)


def _loads(mX: cute.Tensor, place: Place, head_dim: int, rows: int, policy: ir.Value) -> list[Loaded]:
    """Begin to read a unit's rows of K or V, `mX`: (num_pages, page_size, num_kv_heads, head_dim) e4m3."""
    per_row = head_dim // VEC
    loaded = []
    for i in range(rows * per_row // LANES):
        at = cute.arch.lane_idx() + i * LANES
        lane = at // per_row
        column = (at - lane * per_row) * VEC
        page, row, head = (cute.arch.shuffle_sync(value, lane) for value in (place.page, place.row, place.head))
        # Loads without a branch: what is not to be read is read in the pool's first row, and thrown away.
        pointer = mX[cutlass.max(page, 0), cutlass.select_(page < 0, Int32(0), row), head, None].iterator + column
        loaded.append(Loaded(_load(pointer, policy), lane, column, page >= 0))
    return loaded


@cute.jit
def _write(
    mOut: cute.Tensor,  # (max_keys, num_kv_heads, head_dim)
    place: Place,
    loaded: list[Loaded],
    dtype: cutlass.Constexpr[str],
):
    """Convert what was loaded, and write the rows that are seen."""
    for i in cutlass.range_constexpr(len(loaded)):
        pair, lane, column, is_inside = loaded[i]
        row, key, head = (cute.arch.shuffle_sync(value, lane) for value in (place.row, place.key, place.head))
        words = [word for half in vectors.elements(pair) for word in e4m3_to_16bit(half, dtype)]
        if row >= 0:
            _store(mOut[key, head, None].iterator + column, words, is_inside)


def _read_once() -> ir.Value:
    """A cache policy for what nobody reads again: L2 keeps what is written instead, which the prefill kernel reads.

    PTX ISA, "createpolicy". A call of 32 x 1K and of 4 x 512 of 8K takes 0.5 % less with it (32/8 heads d128, H200, 2026-11-29).
    """
    text = "createpolicy.fractional.L2::evict_first.b64 $0, 1.0;"
    return llvm.inline_asm(T.i64(), [], text, "=l", has_side_effects=False, is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT)


def _load(pointer: cute.Pointer, policy: ir.Value) -> ir.Value:
    """Eight bytes as two words. PTX ISA, "ld.global.nc": no launch writes what it reads. In the order of the source, before the stores."""
    text = "ld.global.nc.L1::no_allocate.L2::cache_hint.v2.b32 {$0, $1}, [$2], $3;"
    pair = llvm.inline_asm(
        llvm.StructType.get_literal([T.i32(), T.i32()]), [pointer.toint().ir_value(), policy], text, "=r,=r,l,l",
        has_side_effects=True, is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT,
    )  # fmt: skip
    return vectors.from_words([Int32(llvm.extractvalue(T.i32(), pair, [i])) for i in range(2)])


def _store(pointer: cute.Pointer, words: list[ir.Value], is_inside: Boolean) -> None:
    """Four words, or zeros."""
    packed = vectors.select_words(is_inside, vectors.from_words([Int32(word) for word in words]))
    llvm.store(packed, pointer.to_llvm_ptr(), alignment=16)


def build(config: ConvertConfig) -> tuple[ConvertKernel, tuple]:
    """Host function and fake arguments of `config` (see `fa4_backend.compile`)."""
    return ConvertKernel(config), convert_fakes(config)
