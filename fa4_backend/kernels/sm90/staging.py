"""FP8 tiles on their way to the ring: the slots that they wait in for their conversion, and what is said of each. Imports no compiler.

A slot holds a K or a V tile as TMA brings it: `tile_n` rows of whole heads, one byte an element, not swizzled.
"""

from __future__ import annotations

from enum import IntEnum

from fa4_backend.arch import ARCHS
from fa4_backend.kernels.common.hardware import SWIZZLE_ALIGN
from fa4_backend.kernels.common.prefill_config import PrefillConfig

MAX_STAGING = 4  # slots; more would hide a longer latency of memory than there is


class Note(IntEnum):
    """What a slot's note says, and where: `STAGE_INTS` int32 a slot."""

    KIND = 0  # a `Staged`
    FIRST_ROW = 1  # rows of V that a row of the tile sees: FIRST_ROW .. END_ROW
    END_ROW = 2


STAGE_INTS = 4  # one vector of 16 bytes


class Staged(IntEnum):
    """What a slot holds."""

    KEYS = 0
    VALUES = 1
    NOTHING = 2  # the ring's slot goes on as it is: the keys of the empty tile behind the last
    END = 3  # nothing follows


def converts_query(config: PrefillConfig) -> bool:
    """Whether a bfloat16 Q is brought to float16, which K is: see `query_rows`."""
    return config.converts_kv and config.dtype == "bfloat16"


def header_bytes(config: PrefillConfig) -> int:
    """Bytes in front of the buffers: barriers, numbers of tiles, and where Q is converted a scale a row."""
    return SWIZZLE_ALIGN * (2 if converts_query(config) else 1)


def q_buffer_bytes(config: PrefillConfig) -> int:
    """Bytes of a buffer of Q."""
    return config.tile.tile_m * config.head_dim * config.element_bytes


def tile_elems(config: PrefillConfig) -> int:
    """Elements of a slot, of the ring or of staging: a K or a V tile."""
    return config.tile.tile_n * max(config.head_dim, config.head_dim_v)


def staging_slots(config: PrefillConfig) -> int:
    """Slots of staging: those that fit beside Q and the ring. 0 where K and V have 16 bits."""
    if not config.converts_kv:
        return 0
    taken = (
        header_bytes(config)
        + config.tile.q_stage * q_buffer_bytes(config)
        + config.tile.kv_stage * tile_elems(config) * config.element_bytes
    )
    slots = min(MAX_STAGING, (ARCHS[config.arch].smem_bytes - taken) // (tile_elems(config) * config.kv_element_bytes))
    assert slots >= 2, f"a slot of staging is filled while another is converted: {slots=} {config=}"
    return slots
