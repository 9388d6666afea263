"""What the threads of a schedule CTA do together, and small helpers: scans, minima, broadcasts, entries written with wide stores."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from fa4_backend.kernels.schedule.limits import NUM_WARPS


def warp_scan(value: Int32, lanes: int) -> Int32:
    """Sum of `value` over this lane and those before it, of the first `lanes` (a power of two) of a warp."""
    lane = cute.arch.lane_idx()
    for step in range(lanes.bit_length() - 1):
        below = cute.arch.shuffle_sync_up(value, 1 << step, mask_and_clamp=0)
        value += cutlass.select_(lane >= 1 << step, below, Int32(0))
    return value


@cute.jit
def block_scan(value: Int32, sums: cute.Tensor) -> tuple[Int32, Int32]:  # sums: (NUM_WARPS,) int32 of shared memory
    """Sum of `value` over the threads before this one, and over all threads; every thread of the CTA must call."""
    tidx, _, _ = cute.arch.thread_idx()
    lane, warp = tidx % 32, tidx // 32
    inclusive = warp_scan(value, 32)
    if lane == 31:
        sums[warp] = inclusive
    cute.arch.sync_threads()
    part = sums[lane % NUM_WARPS]
    up_to = warp_scan(part, NUM_WARPS)
    before = cute.arch.shuffle_sync(up_to - part, warp)
    total = cute.arch.shuffle_sync(up_to, NUM_WARPS - 1)
    cute.arch.sync_threads()  # the next scan reuses `sums`
    return before + inclusive - value, total


def warp_min(value: Int32, lanes: int) -> Int32:
    """Least `value` of each `lanes` (a power of two) neighbouring lanes."""
    for step in range(lanes.bit_length() - 1):
        value = cutlass.min(value, cute.arch.shuffle_sync_bfly(value, 1 << step))
    return value


@cute.jit
def block_min(value: Int32, sums: cute.Tensor) -> Int32:  # sums: (NUM_WARPS,) int32 of shared memory
    """Least `value` of all threads; every thread of the CTA must call."""
    tidx, _, _ = cute.arch.thread_idx()
    least = warp_min(value, 32)
    if tidx % 32 == 0:
        sums[tidx // 32] = least
    cute.arch.sync_threads()
    least = warp_min(sums[tidx % NUM_WARPS], NUM_WARPS)
    cute.arch.sync_threads()  # the next one reuses `sums`
    return least


@cute.jit
def broadcast(value: Int32, thread: Int32, sums: cute.Tensor) -> Int32:
    """What `value` is in one thread; every thread of the CTA must call."""
    tidx, _, _ = cute.arch.thread_idx()
    if tidx == thread:
        sums[0] = value
    cute.arch.sync_threads()
    value = sums[0]
    cute.arch.sync_threads()
    return value


@cute.jit
def square_root(value: Int32) -> Int32:
    """Largest integer whose square is at most `value`, which is below 2^24."""
    root = Int32(cute.math.sqrt(Float32(value)))
    if root * root > value:
        root -= 1
    if (root + 1) * (root + 1) <= value:
        root += 1
    return root


@cute.jit
def store_tile(tiles: cute.Tensor, index: Int32, values: tuple) -> None:
    """Write one entry with 16-byte stores."""
    size = cutlass.const_expr(len(values))
    entry = cute.make_rmem_tensor(size, Int32)
    for i in cutlass.range_constexpr(size):
        entry[i] = values[i]
    target = cute.make_tensor(tiles.iterator + cutlass.Int64(index) * size, cute.make_layout(size))
    target = cute.make_tensor(target.iterator.align(16), target.layout)
    cute.autovec_copy(entry, target)
