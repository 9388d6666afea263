"""What a consumer warpgroup holds, as its files share it: shared memory, operands of its products, a tile and its rows."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32

from fa4_backend.kernels.common.block_info import BlockRange
from fa4_backend.kernels.common.mask import Columns
from fa4_backend.kernels.common.tile_scheduler import WorkTile
from fa4_backend.kernels.common.wgmma_fragment import RowStats, ScoreScale, row_of_thread
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS, WGMMA_ROWS


class SharedTiles(NamedTuple):
    """Shared memory as a consumer sees it."""

    q: cute.Pointer  # q_stage buffers
    kv: cute.Pointer  # the ring of K and V tiles
    sWork: cute.Tensor  # (WORK_INTS, WORK_STAGE) int32
    sRowScales: cute.Tensor | None  # (tile_m, WORK_STAGE) float32: what a row of Q was divided by; None: Q is as it came


class Products(NamedTuple):
    """Operands of both products of this warpgroup."""

    qk: cute.TiledMma
    pv: cute.TiledMma
    tSrQ: cute.Tensor  # (MMA, 1, k steps, q_stage) descriptors of A
    tSrK: cute.Tensor  # (MMA, 1, k steps, kv_stage) descriptors of B
    tOrVt: cute.Tensor  # (MMA, column tiles, k steps, kv_stage) descriptors of B
    rP: cute.Tensor  # (MMA, 1, k steps) of 16 bits: A operand of the second product
    rO: cute.Tensor  # (MMA, 1, column tiles) float32


class TileState(NamedTuple):
    """A tile, its KV blocks, and what its rows need of the sequence: their keys and their bias."""

    is_tile: Int32  # 0: the empty one behind the last
    work: WorkTile
    blocks: BlockRange
    columns: tuple[Columns, Columns]  # of this thread's two rows
    diagonals: tuple[Int32, Int32]  # key on the diagonal of each row
    slopes: tuple[Float32, Float32]  # ALiBi slope of each row, times log2(e)
    softmax_scales: tuple[Float32, Float32]  # multiply raw scores of each row; K's scale and that of the row's Q included
    log2_scales: tuple[Float32, Float32]  # the same times log2(e), where K and V are FP8
    scale: ScoreScale  # of all rows of the call; where K and V were FP8 of all rows of the tile, K's scale included


class TileSums(NamedTuple):
    """A tile behind its last product with V."""

    products: Products  # whose rO is the tile's
    stats: RowStats
    scales: tuple[ScoreScale, ScoreScale] | None  # of raw scores of both rows; None: they were in log2 units
    work: WorkTile


class Place(NamedTuple):
    """Who a consumer thread is."""

    group: Int32  # its warpgroup among the consumers
    thread: Int32  # its index among the threads of all consumers


def row_of_tile(group: Int32, thread: Int32, i: int) -> Int32:
    """Tile row of a consumer thread's accumulators of half `i`."""
    return row_of_thread(thread % WARPGROUP_THREADS, i, group * WGMMA_ROWS)
