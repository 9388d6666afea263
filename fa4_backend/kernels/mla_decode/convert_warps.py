"""The convert warps: tiles of e4m3 latents to float16, where each is exact, in the tile's own memory.

TMA brings a tile's e4m3 numbers, nine parts of 64 keys x 64 bytes, to the upper half of the tile's place; part p of the finished tile
takes 8 KiB from 8 p KiB on, its e4m3 numbers lie in 4 KiB from 36 + 4 p KiB on. Written in order, part p takes the place of the numbers of
parts 2 p - 9 and 2 p - 8: all of them come before it, or are in registers. So tiles need no staging, and two of them are loaded, converted
or attended to at any time.

A warp works on 8 keys of a part at a time: a lane reads 16 bytes and writes 32. Eight lanes have two neighbouring keys, of which they read
128 bytes in a row, and write the even chunks of one key's line and the odd ones of the other's: no bank conflicts.
"""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass._mlir import ir

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.decode_entry import StepTensors, entry_of
from fa4_backend.kernels.common.fp8 import e4m3_to_float16
from fa4_backend.kernels.common.mask import MaskValues
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.mla_decode.config import CONVERT_WARPS, KV_STAGE, LATENT_PARTS, PART_DIM, PART_ELEMS, PARTS, TILE_ELEMS, TILE_N
from fa4_backend.kernels.mla_decode.storage import GROUPS, LEFT, SIDE_PARTS, MlaStorage, SharedTensors
from fa4_backend.kernels.mla_decode.work import MlaWork
from fa4_backend.kernels.schedule.work_list import NEXT_ENTRY, NUM_ENTRIES

CONVERT_BARRIER = 4  # named barrier of the convert warps
GROUP_KEYS = 8  # of a part that a warp converts at a time
KEY_GROUPS = TILE_N // GROUP_KEYS
CHUNK_BYTES = 16
ROUNDS = -(-KEY_GROUPS // CONVERT_WARPS)


@dataclass(frozen=True)
class ConvertWarps:
    """Role of warps 1 to 3 where latents are FP8 and the kernel is not narrow."""

    storage: MlaStorage
    work: MlaWork

    @cute.jit
    def run(self, step: StepTensors, values: MaskValues, shared: SharedTensors, warp: Int32):
        """Convert every tile of the CTA's entries: waits for its numbers and for its left half's place, which alone may still be in use;
        hands on group after group. warp: 0 .. CONVERT_WARPS."""
        kv = RingPosition(Int32(0), Int32(0))
        cta = self.work.list_idx()
        num_entries, next_entry = step.mFirst[cta, NUM_ENTRIES], step.mFirst[cta, NEXT_ENTRY]
        for index in cutlass.range(num_entries, unroll=1):
            entry = entry_of(lambda field: step.mFirst[cta, field], step.bounds)
            if index > 0:
                entry = entry_of(lambda field: step.mTiles[next_entry + index - 1, field], step.bounds)  # noqa: B023
            blocks = self.work.blocks(entry, values)
            for n_block in cutlass.range(blocks.begin, blocks.end, unroll=1):
                cute.arch.mbarrier_wait(shared.barriers.raw_full + kv.slot, kv.phase)
                cute.arch.mbarrier_wait(shared.barriers.kv_empty[LEFT] + kv.slot, kv.phase ^ 1)
                self._convert_tile(entry.seqlen.seqlen_k - n_block * TILE_N, kv, shared, warp)
                kv = advance(kv, KV_STAGE)

    @cute.jit
    def _convert_tile(self, num_keys: Int32, kv: RingPosition, shared: SharedTensors, warp: Int32):
        """One tile; keys from `num_keys` on become zeros: a weight of 0 times NaN would be NaN.

        A part's numbers are asked for before the part before it is stored. So all warps have those of parts 0 to 5 when they meet before
        part 4, which parts 4 to 6 take the place of 0 to 4 of, and all numbers when they meet before part 7.
        """
        tile = shared.kv.toint() + kv.slot * (TILE_ELEMS * 2)
        loaded = self._load_part(tile, 0, warp)
        for part in cutlass.range_constexpr(PARTS):
            ahead = self._load_part(tile, part + 1, warp) if part + 1 < PARTS else loaded
            if const_expr(part in (SIDE_PARTS, LATENT_PARTS - 1)):
                self._meet()
            for i in cutlass.range_constexpr(ROUNDS):
                self._store(tile, part, loaded[i], num_keys, warp, i)
            for group, (_, end) in enumerate(GROUPS):
                if const_expr(part + 1 == end):
                    self._hand_on(shared.barriers.kv_full[group] + kv.slot)
            loaded = ahead

    def _load_part(self, tile: Int32, part: int, warp: Int32) -> list[ir.Value]:
        """This warp's numbers of a part."""
        return [self._load(tile, part, warp, i) for i in range(ROUNDS)]

    def _group(self, warp: Int32, i: int) -> Int32:
        """The warp's i-th group of keys; past the last one for some warps."""
        return warp + i * CONVERT_WARPS

    def _load(self, tile: Int32, part: int, warp: Int32, i: int) -> ir.Value:
        """A lane's 16 numbers of a part; of another group's where there is none."""
        group = cutlass.min(self._group(warp, i), KEY_GROUPS - 1)
        raw = tile + (TILE_ELEMS + part * PART_ELEMS)  # bytes: the upper half
        return ptx.load_shared_v4(raw + (group * 32 + cute.arch.lane_idx()) * CHUNK_BYTES)

    @cute.jit
    def _store(self, tile: Int32, part: cutlass.Constexpr[int], words: ir.Value, num_keys: Int32, warp: Int32, i: cutlass.Constexpr[int]):
        """The same as two chunks of the finished part."""
        group = self._group(warp, i)
        if group < KEY_GROUPS:
            lane = cute.arch.lane_idx()
            row, chunk = group * GROUP_KEYS + lane // 4, lane % 4
            kept = vectors.select_words(row < num_keys, words)
            converted = [half.ir_value() for word in vectors.elements(kept) for half in e4m3_to_float16(Int32(word))]
            line = tile + part * (PART_ELEMS * 2) + row * (PART_DIM * 2)
            swizzled = ((2 * chunk) ^ (row % 8)) * CHUNK_BYTES
            ptx.store_shared_v4(line + swizzled, converted[:4])
            ptx.store_shared_v4(line + (swizzled ^ CHUNK_BYTES), converted[4:])

    def _meet(self) -> None:
        """All convert warps."""
        cute.arch.barrier(barrier_id=CONVERT_BARRIER, number_of_threads=32 * CONVERT_WARPS)

    @cute.jit
    def _hand_on(self, full: cute.Pointer):
        """This warp's share of a group is there for wgmma."""
        ptx.fence_proxy_async_shared()
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(full)


assert KEY_GROUPS * GROUP_KEYS == TILE_N
