"""How a step with decode and prefill rows shares the SMs, and how prefill tiles are dealt out to CTAs."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from fa4_backend.kernels.schedule.block_ops import block_min, broadcast
from fa4_backend.kernels.schedule.limits import NUM_THREADS
from fa4_backend.kernels.schedule.params import ScheduleParams
from fa4_backend.kernels.schedule.rates import TICKS

# Where times are compared, decode tiles of a CTA, decode tiles of a step and ticks of all prefill rounds are cut here: above what real
# steps have, and no product passes 2^31.
MOST_TILES, MOST_STEP_TILES, MOST_TICKS = 1 << 20, 1 << 30, 1 << 29


class Share(NamedTuple):
    """How decode and prefill share the SMs in a step that has both."""

    decode_sms: Int32  # SMs that decode gets, a CTA each; 0: all of them, and prefill comes after
    early_ctas: Int32  # prefill CTAs that start at once; the others when decode has left
    early_rounds: Int32  # prefill tiles that each early CTA gets before the others get one


@cute.jit
def share_chip(decode_cost: Int32, tiles: Int32, blocks: Int32, num_groups: Int32, sums: cute.Tensor, params: ScheduleParams) -> Share:
    """The `Share` that ends soonest: a thread tries one number of SMs for decode, and prefill rounds without the late CTAs
    rounded up or down. Every thread of the CTA must call.

    Args:
        decode_cost: n_blocks of one head of all decode rows.
        tiles, blocks: query blocks of one head of all prefill rows, and the n_blocks they see.
        num_groups: prefill CTAs, or CTA pairs.
    """
    tidx, _, _ = cute.arch.thread_idx()
    sms_a_group = params.num_sms // num_groups
    most = params.num_sms - params.num_sms // 4  # decode leaves prefill a quarter of the SMs
    total = tiles * params.num_kv_heads
    tile_ticks = TICKS * (blocks // tiles + 1)  # one n_block for beginning and end
    tile_ticks = cutlass.min(tile_ticks, MOST_TICKS // (4 * (total // num_groups) + 8))  # early CTAs are a quarter or more of all
    candidate = cutlass.min(tidx // 2, most)
    share = Share(Int32(0), num_groups, Int32(0))
    fifths = 5 * params.decode_full_sms
    if candidate > 0:
        # Two thirds of the SMs that keep the memory busy are as fast each as one alone, the next ones two fifths as fast.
        fifths = cutlass.min(cutlass.min(5 * candidate, 2 * (params.decode_full_sms + candidate)), fifths)
    decode_tiles = cutlass.min(decode_cost, MOST_STEP_TILES // params.num_kv_heads) * params.num_kv_heads
    decode_tiles = decode_tiles // fifths * 5 + decode_tiles % fifths * 5 // fifths + 1
    decode_ticks = cutlass.min(decode_tiles, MOST_TILES) * params.decode_tile_ticks
    rounds = (total + num_groups - 1) // num_groups
    late_ticks = decode_ticks + rounds * tile_ticks
    ticks = late_ticks
    if candidate > 0:
        early = num_groups - (candidate + sms_a_group - 1) // sms_a_group
        early_rounds = decode_ticks // tile_ticks + tidx % 2
        share = Share(candidate, early, early_rounds)
        rounds = (total + early - 1) // early
        if total > early_rounds * early:
            rounds = early_rounds + (total - early_rounds * early + num_groups - 1) // num_groups
        late_ticks = decode_ticks + cutlass.max(rounds - early_rounds, 0) * tile_ticks
        ticks = cutlass.max(rounds * tile_ticks, late_ticks)
    # Of shares that end at one time, the one whose late CTAs have most time to spare.
    ticks += late_ticks // 16
    least = block_min(ticks, sums)
    chosen = block_min(cutlass.select_(ticks == least, tidx, Int32(NUM_THREADS)), sums)
    return Share(*(broadcast(value, chosen, sums) for value in share))


def deal(rank: Int32, num_ctas: Int32) -> tuple[Int32, Int32]:
    """CTA and round of the entry `rank` when entries are dealt out back and forth."""
    turn = rank // num_ctas
    place = rank - turn * num_ctas
    return cutlass.select_(turn % 2 == 1, num_ctas - 1 - place, place), turn


@cute.jit
def deal_begin(cta: Int32, total: Int32, num_ctas: Int32) -> Int32:
    """First entry of a CTA when `total` entries are dealt out back and forth: whole rounds, then one each from either end."""
    rounds = total // num_ctas
    left = total % num_ctas
    extra = cutlass.min(cta, left)
    if rounds % 2 == 1:
        extra = cutlass.max(cta - (num_ctas - left), 0)
    return cta * rounds + extra
