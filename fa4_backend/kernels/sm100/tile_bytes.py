"""How large tiles are in the shared memory of a CTA.

An operand tile consists of parts of 64 elements of the head dimension; a part is 128 rows of 128 bytes, swizzled in 16-byte units by the
row's low three bits (TMA's and tcgen05's 128-byte swizzle, PTX ISA "Shared memory matrix layout"). A head_dim of 96 fills its second part
to one half; TMA fills the rest with zeros, and no MMA reads it. K and V in FP8 are staged in parts of 64 elements, or of 32 where 64 do not
divide the head, in TMA's swizzle of that many bytes. Where Q is FP8 too, products read e4m3: parts have rows of 128, 64 or 32 bytes, the
most that divides both head dimensions, in the swizzle of that many bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.kernels.sm100.config import Sm100Config

# Padding of a row of O: rows then start four banks apart, so that eight threads with a row each store 16 bytes without conflict.
# It is not part of the tile, and holds the row's statistics, two float32 for each query tile.
O_PAD_BYTES = 16


def o_pitch(config: Sm100Config) -> int:
    """Bytes from a row of O, or of a part of it, to the next in shared memory."""
    return config.o_columns * config.kernel.out_element_bytes + O_PAD_BYTES


@dataclass(frozen=True)
class TileBytes:
    """Bytes of one buffer of each payload in this CTA, and what TMA delivers to it."""

    part: int  # one part of a Q or V tile
    k_part: int  # one part of the rows of K that this CTA holds
    q: int
    k: int
    v: int
    o: int
    q_tx_bytes: int
    k_tx_bytes: int
    v_tx_bytes: int
    kv_row: int  # a row of a part of K or V as TMA delivers it
    k_loaded_part: int  # one part of K as TMA delivers it
    v_loaded_part: int

    @staticmethod
    def of(config: Sm100Config) -> TileBytes:
        """Sizes for a kernel; K and V tiles are fetched whole, Q tiles without their idle rows."""
        kernel = config.kernel
        part, k_part = kernel.tile.tile_n * config.row_bytes, config.k_rows * config.row_bytes
        assert kernel.tile.tile_m == kernel.tile.tile_n, f"one part size serves q, k and v: {kernel.tile=}"
        qk_parts, v_parts = config.num_parts(kernel.head_dim), config.v_parts
        rows = kernel.tokens_per_tile * kernel.q_per_kv
        kv_row = config.loaded_elems * kernel.kv_element_bytes
        k_loaded_part, v_loaded_part = config.k_rows * kv_row, kernel.tile.tile_n * kv_row
        return TileBytes(
            part=part,
            k_part=k_part,
            q=qk_parts * part,
            k=qk_parts * k_part,
            v=v_parts * part,
            o=kernel.tile.tile_m * o_pitch(config),
            q_tx_bytes=qk_parts * rows * config.row_bytes,
            k_tx_bytes=config.loaded_parts(kernel.head_dim) * k_loaded_part,
            v_tx_bytes=config.loaded_parts(kernel.head_dim_v) // config.tuning.cta_group * v_loaded_part,
            kv_row=kv_row,
            k_loaded_part=k_loaded_part,
            v_loaded_part=v_loaded_part,
        )
