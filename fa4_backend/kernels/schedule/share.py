"""How a step with decode and prefill rows shares the SMs."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.schedule.block_ops import block_min, broadcast
from fa4_backend.kernels.schedule.limits import NUM_THREADS
from fa4_backend.kernels.schedule.params import ScheduleParams
from fa4_backend.kernels.schedule.rates import ALONE_THIRDS, TICKS

# Where times are compared, decode tiles of a CTA, decode tiles of a step and ticks of all prefill rounds are cut here: above what real
# steps have, and no product passes 2^31.
MOST_TILES, MOST_STEP_TILES, MOST_TICKS = 1 << 20, 1 << 30, 1 << 29


@cute.jit
def share_chip(decode_cost: Int32, tiles: Int32, blocks: Int32, sums: cute.Tensor, params: ScheduleParams) -> Int32:
    """SMs that decode gets, a CTA each, where that ends soonest; 0: all of them, and prefill comes after.

    A thread tries one number of SMs for decode, and prefill rounds without the late CTAs, which start when decode has left, rounded up or
    down. Every thread of the CTA must call.

    Args:
        decode_cost: n_blocks of one head of all decode rows.
        tiles, blocks: query blocks of one head of all prefill rows, and the n_blocks they see.
    """
    tidx, _, _ = cute.arch.thread_idx()
    num_groups = params.prefill_groups
    sms_a_group = params.num_sms // num_groups
    most = params.num_sms - params.num_sms // 4  # decode leaves prefill a quarter of the SMs
    total = tiles * params.num_kv_heads
    tile_ticks = TICKS * (blocks // tiles + 1)  # one n_block for beginning and end
    tile_ticks = cutlass.min(tile_ticks, MOST_TICKS // (4 * (total // num_groups) + 8))  # early CTAs are a quarter or more of all
    candidate = cutlass.min(tidx // 2, most)
    # All SMs, two CTAs each, read a little faster than those that keep the memory busy with one: ALONE_THIRDS.
    fifths = ALONE_THIRDS * params.decode_full_sms // 3
    if candidate > 0:
        # Two thirds of the SMs that keep the memory busy are as fast each as one alone, the next ones two fifths as fast.
        fifths = cutlass.min(cutlass.min(5 * candidate, 2 * (params.decode_full_sms + candidate)), 5 * params.decode_full_sms)
    decode_tiles = cutlass.min(decode_cost, MOST_STEP_TILES // params.num_kv_heads) * params.num_kv_heads
    decode_tiles = decode_tiles // fifths * 5 + decode_tiles % fifths * 5 // fifths + 1
    decode_ticks = cutlass.min(decode_tiles, MOST_TILES) * params.decode_tile_ticks
    rounds = (total + num_groups - 1) // num_groups
    late_ticks = decode_ticks + rounds * tile_ticks
    ticks = late_ticks
    if candidate > 0:
        early = num_groups - (candidate + sms_a_group - 1) // sms_a_group
        early_rounds = decode_ticks // tile_ticks + tidx % 2
        rounds = (total + early - 1) // early
        if total > early_rounds * early:
            rounds = early_rounds + (total - early_rounds * early + num_groups - 1) // num_groups
        late_ticks = decode_ticks + cutlass.max(rounds - early_rounds, 0) * tile_ticks
        ticks = cutlass.max(rounds * tile_ticks, late_ticks)
    # Of shares that end at one time, the one whose late CTAs have most time to spare.
    ticks += late_ticks // 16
    least = block_min(ticks, sums)
    chosen = block_min(cutlass.select_(ticks == least, tidx, Int32(NUM_THREADS)), sums)
    return broadcast(candidate, chosen, sums)
