"""What the threads of a schedule CTA do together, and small searches: scans, minima, broadcasts, entries written with wide stores."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from fa4_backend.kernels.schedule.limits import NUM_WARPS


@cute.jit
def block_scan(value: Int32, sums: cute.Tensor) -> tuple[Int32, Int32]:  # sums: (NUM_WARPS,) int32 of shared memory
    """Sum of `value` over the threads before this one, and over all threads; every thread of the CTA must call."""
    tidx, _, _ = cute.arch.thread_idx()
    lane, warp = tidx % 32, tidx // 32
    inclusive = value
    for step in cutlass.range_constexpr(5):
        below = cute.arch.shuffle_sync_up(inclusive, 1 << step, mask_and_clamp=0)
        if lane >= 1 << step:
            inclusive += below
    if lane == 31:
        sums[warp] = inclusive
    cute.arch.sync_threads()
    before, total = Int32(0), Int32(0)
    for other in cutlass.range_constexpr(NUM_WARPS):
        part = sums[other]
        if other < warp:
            before += part
        total += part
    cute.arch.sync_threads()  # the next scan reuses `sums`
    return before + inclusive - value, total


@cute.jit
def block_min(value: Int32, sums: cute.Tensor) -> Int32:  # sums: (NUM_WARPS,) int32 of shared memory
    """Least `value` of all threads; every thread of the CTA must call."""
    tidx, _, _ = cute.arch.thread_idx()
    for step in cutlass.range_constexpr(5):
        value = cutlass.min(value, cute.arch.shuffle_sync_bfly(value, 1 << step))
    if tidx % 32 == 0:
        sums[tidx // 32] = value
    cute.arch.sync_threads()
    for other in cutlass.range_constexpr(NUM_WARPS):
        value = cutlass.min(value, sums[other])
    cute.arch.sync_threads()  # the next one reuses `sums`
    return value


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
def upper_bound(table: cute.Tensor, length: Int32, value: Int32) -> Int32:
    """Number of entries of the ascending `table[0 .. length]` that are at most `value`."""
    low, high = Int32(0), length
    while low < high:
        middle = (low + high) // 2
        if table[middle] <= value:
            low = middle + 1
        else:
            high = middle
    return low


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
