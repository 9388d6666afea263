"""What the schedule is told of a step's kernels, as runtime values: one compiled schedule serves every plan. Imports no compiler."""

from __future__ import annotations

from typing import Any, NamedTuple


class ScheduleParams(NamedTuple):
    """The numbers of `WorkShape` that the device needs, and the step's mask: int on the host, Int32 on the device."""

    num_kv_heads: Any
    prefill_groups: Any
    tokens_per_item: Any
    prefill_tile_n: Any
    decode_query_len: Any  # 0: no decode list
    decode_tile_n: Any
    split_blocks: Any
    l2_tokens: Any
    window_left: Any  # keys before the diagonal that any row of the step sees; NO_WINDOW: all
    window_right: Any  # keys after it; 0 for causal attention, NO_WINDOW: all
    slot_vectors: Any
    decode_share_vectors: Any  # parts that pay, times `slot_vectors`, from which on the two below say how many there are
    decode_parts_ratio: Any  # with it: the square of a row group's parts over its n_blocks, at most; 0: no such bound
    decode_part_blocks: (
        Any  # n_blocks that a part of a decode row group has at least; 0: as few parts as pay (`decode_cuts.LONE_PARTS_RATIO`)
    )
    decode_lines: Any  # KV heads whose row groups see the same keys; 1: each has keys of its own
    decode_part_quarters: Any  # of a decode n_block that a part of a row group costs; 0: parts are not weighed
    lone_block_eighths: Any  # of its usual time that a decode n_block takes a CTA where others are done
    num_sms: Any
    decode_tile_ticks: Any
    decode_full_sms: Any
    max_seqlen_k: Any
    max_num_tokens: Any
    part_slots: Any  # `WorkShape.max_part_slots`; 0: prefill tiles are not cut along KV
    min_part_blocks: Any
    part_piece_blocks: Any  # n_blocks of a short piece, at whose ends alone prefill tiles are cut (`kv_pieces.tile_rule`); 0: anywhere
    convert_keys: Any  # keys of the workspace for converted K and V, in a step that has any; else 0
    most_part_quarters: Any  # quarters of an n_block that adding up a prefill tile's parts takes at most
