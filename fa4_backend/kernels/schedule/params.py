"""What the schedule is told of a step's kernels, as runtime values: one compiled schedule serves every plan."""

from __future__ import annotations

from typing import NamedTuple

from cutlass import Int32


class ScheduleParams(NamedTuple):
    """`WorkShape` and the step's mask as runtime values (int32); see there for units."""

    num_kv_heads: Int32
    tokens_per_tile: Int32
    prefill_tile_n: Int32
    decode_query_len: Int32  # 0: no decode list
    decode_tile_n: Int32
    split_blocks: Int32
    l2_tokens: Int32
    window_left: Int32  # NO_WINDOW: none
    window_right: Int32  # 0 for causal attention, NO_WINDOW: none
    slot_vectors: Int32  # 16-byte vectors of a slot that each thread of a combining CTA adds
    num_sms: Int32
    decode_tile_ticks: Int32  # time of a decode n_block on an SM of its own, in TICKS of a prefill n_block
    decode_full_sms: Int32  # SMs whose decode CTAs keep the memory busy
    max_seqlen_k: Int32
    max_num_tokens: Int32
    part_slots: Int32  # `WorkShape.max_part_slots`; 0: prefill tiles are not cut along KV
    min_part_blocks: Int32
