"""The convert warps: K and V tiles from e4m3 in staging to float16 in the ring, which wgmma reads.

Every e4m3 value is exact in float16, the type of P, and one instruction makes two; a bfloat16 Q becomes float16 too (`query_rows`). A warp
works on units of 32 chunks of 16 bytes of staging, of which each lane makes two of the ring:

    staging  row after row, whole heads              16 e4m3 a chunk
    ring     part after part, row after row          8 elements a chunk, chunks swizzled as TMA does

Note [Bank conflicts]. Shared memory serves 16-byte accesses eight lanes at a time, which meet no conflict if their chunks lie apart modulo
128 bytes. Where a row of the ring has 128 bytes, eight lanes take four chunks each of two neighbouring rows: of the same part where a row
of staging has an odd number of parts (of 64 bytes), of neighbouring parts where that is even. Either way they read both halves of 128
bytes, and write the even chunks of one row and the odd ones of the other, since the swizzle of neighbouring rows differs in its last bit.
Rows of 64 bytes (head dimension 96): two chunks each of four rows, likewise.

Note [Always something under way]. Beside wgmma's operands, loads and stores of these warps get what is left of shared memory's port, and a
warp that waits leaves it idle. So each load is issued `LOADS_AHEAD` units before its stores, and the next tile's first ones, where it is
there, before the fence that waits for this tile's stores. A slot of staging is released with its last load.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.fp8 import e4m3_to_float16
from fa4_backend.kernels.common.ring import RingPosition, advance
from fa4_backend.kernels.sm90.staging import STAGE_INTS, Note, Staged, staging_slots, tile_elems
from fa4_backend.kernels.sm90.storage import Barriers, Storage

CHUNK_BYTES = 16  # of a shared-memory access of a lane
LANES = 32
LOADS_AHEAD = 3  # units that a lane loads before it stores the first: registers of a thread that keeps 40 or 32


class SharedBuffers(NamedTuple):
    """Shared memory as a convert warp sees it."""

    staging: cute.Pointer  # slots of e4m3
    ring: cute.Pointer  # slots of float16
    sNotes: cute.Tensor  # (STAGE_INTS, slots of staging) int32


class NoteWords(NamedTuple):
    """What a note says: see `staging.Note`."""

    kind: Int32
    first: Int32
    end: Int32


class Tile(NamedTuple):
    """A tile in staging: what its note says, and this lane's first chunks of it."""

    note: NoteWords
    chunks: tuple[tuple[Int32, Int32, Int32, Int32], ...]


class Lane(NamedTuple):
    """Place of a lane in a warp, and of the warp among the convert warps: 0 .. num_warps, another one from tile to tile."""

    lane: Int32
    warp: Int32


@dataclass(frozen=True)
class Units:
    """How a tile is dealt out among warps: whole groups of rows in turns, and what is left over part by part.

    So all units but the last of a warp lie at constant distances from its first.
    """

    tile_n: int
    rows: int  # of a unit
    parts: int  # of a head, a unit each
    warps: int

    def __post_init__(self) -> None:
        assert self.tile_n % self.rows == 0 and self.steps > 0, f"{self}"

    @property
    def total(self) -> int:
        """Units of a tile."""
        return self.tile_n // self.rows * self.parts

    @property
    def steps(self) -> int:
        """Units of every warp."""
        return self.total // self.warps

    @property
    def rest(self) -> int:
        """Warps that have one more."""
        return self.total % self.warps

    def place(self, warp: Int32, step: int) -> tuple[Int32, Int32 | int]:
        """First row and part of a warp's unit."""
        groups = self.tile_n // self.rows // self.warps  # of every warp
        if step < groups * self.parts:
            return (warp + step // self.parts * self.warps) * self.rows, step % self.parts
        unit = warp + (step - groups * self.parts) * self.warps
        first = groups * self.warps * self.rows
        if self.parts & (self.parts - 1) == 0:
            return first + (unit >> _log2(self.parts)) * self.rows, unit & (self.parts - 1)
        return first + unit // self.parts * self.rows, unit % self.parts


@dataclass(frozen=True)
class ConvertWarps:
    """Role of the warps between the load warp and the consumers."""

    storage: Storage
    num_warps: int

    @cute.jit
    def run(self, shared: SharedBuffers, barriers: Barriers, warp: Int32):
        """Convert tile after tile until a note says that none follows: waits for a tile and for its slot of the ring, hands on both.

        warp: 0 .. num_warps.
        """
        c = self.storage.config
        turn = const_expr(self.units(c.head_dim).total % self.num_warps or 1)
        me = Lane(cute.arch.lane_idx(), warp)
        staged = position = RingPosition(Int32(0), Int32(0))
        cute.arch.mbarrier_wait(barriers.fp8_full + staged.slot, staged.phase)
        tile = self._begin(shared, staged, me)
        while tile.note.kind != int(Staged.END):
            empty, released = barriers.kv_empty + position.slot, (barriers.fp8_empty + staged.slot).toint()
            cute.arch.mbarrier_wait(empty, position.phase ^ 1)
            source, target = self._source(shared, staged), shared.ring.toint() + position.slot * (2 * tile_elems(c))
            has_edge = (tile.note.kind == int(Staged.VALUES)) & ((tile.note.first > 0) | (tile.note.end < c.tile.tile_n))
            if has_edge:
                self._convert(source, target, released, me, c.head_dim_v, tile, True)
            elif tile.note.kind == int(Staged.NOTHING):
                ptx.warp_arrive(released, me.lane)
            elif (tile.note.kind == int(Staged.KEYS)) | (c.head_dim == c.head_dim_v):
                self._convert(source, target, released, me, c.head_dim, tile, False)
            else:
                self._convert(source, target, released, me, c.head_dim_v, tile, False)
            staged = advance(staged, staging_slots(c))
            # Units are not a multiple of the warps: who has one more changes from tile to tile.
            me = Lane(me.lane, cutlass.select_(me.warp < turn, me.warp + (self.num_warps - turn), me.warp - turn))
            # Note [Always something under way]
            full = (barriers.fp8_full + staged.slot).toint()
            is_there = ptx.mbarrier_test(full, staged.phase)
            if is_there == 1:
                tile = self._begin(shared, staged, me)
            ptx.fence_proxy_async_shared()
            ptx.warp_arrive((barriers.kv_full + position.slot).toint(), me.lane)
            position = advance(position, c.tile.kv_stage)
            if is_there == 0:
                ptx.mbarrier_wait(full, staged.phase)
                tile = self._begin(shared, staged, me)

    def _source(self, shared: SharedBuffers, staged: RingPosition) -> Int32:
        """Shared address of a slot of staging."""
        return shared.staging.toint() + staged.slot * tile_elems(self.storage.config)

    @cute.jit
    def _begin(self, shared: SharedBuffers, staged: RingPosition, me: Lane) -> Tile:
        """Read the note of a slot that is full, and issue the first loads of its tile."""
        c = self.storage.config
        words = vectors.elements(ptx.load_shared_v4(shared.sNotes.iterator.toint() + staged.slot * (4 * STAGE_INTS)))
        note = NoteWords(*(Int32(words[int(field)]) for field in (Note.KIND, Note.FIRST_ROW, Note.END_ROW)))
        chunks = ((Int32(0),) * 4,) * self._ahead
        source = self._source(shared, staged)
        if const_expr(c.head_dim == c.head_dim_v):
            if (note.kind == int(Staged.KEYS)) | (note.kind == int(Staged.VALUES)):
                chunks = tuple(self._load(source, c.head_dim, me, k) for k in range(self._ahead))
        else:
            if note.kind == int(Staged.KEYS):
                chunks = tuple(self._load(source, c.head_dim, me, k) for k in range(self._ahead))
            if note.kind == int(Staged.VALUES):
                chunks = tuple(self._load(source, c.head_dim_v, me, k) for k in range(self._ahead))
        return Tile(note, chunks)

    @cute.jit
    def _convert(
        self,
        source: Int32,  # shared address of the slot of staging
        target: Int32,  # shared address of the slot of the ring
        released: Int32,  # barrier of the slot of staging
        me: Lane,
        head_dim: cutlass.Constexpr[int],
        tile: Tile,
        has_edge: cutlass.Constexpr[bool],  # rows that no row of Q sees become zeros: a weight of 0 times NaN would be NaN
    ):
        """This warp's units of a tile."""
        units = const_expr(self.units(head_dim))
        loaded, seen = list(tile.chunks), tile.note if const_expr(has_edge) else None
        rest = (Int32(0),) * 4
        for k in cutlass.range_constexpr(units.steps):
            if const_expr(k + self._ahead < units.steps):
                loaded.append(self._load(source, head_dim, me, k + self._ahead))
            if const_expr(k + self._ahead == units.steps and units.rest > 0):
                if me.warp < units.rest:
                    rest = self._load(source, head_dim, me, units.steps)
            if const_expr(k == units.steps - 1):
                # An arrival may overtake loads whose words nothing has used yet (`decode/consumer_warps.py`, Note [Release]).
                ptx.warp_arrive(released + ptx.zero_after(loaded[k][0] ^ rest[0]), me.lane)
            self._store(target, head_dim, me, k, loaded[k], seen)
        if const_expr(units.rest > 0):
            if me.warp < units.rest:
                self._store(target, head_dim, me, units.steps, rest, seen)

    def units(self, head_dim: int) -> Units:
        """How the units of a tile are dealt out."""
        part = self.storage.config.part_elems(head_dim)
        assert part * 2 in (64, 128), f"{self.storage.config.tile=} {part=}"
        return Units(self.storage.config.tile.tile_n, LANES * CHUNK_BYTES // part, head_dim // part, self.num_warps)

    @property
    def _ahead(self) -> int:
        """Units that a lane loads before it stores the first."""
        c = self.storage.config
        return min(LOADS_AHEAD, self.units(c.head_dim).steps, self.units(c.head_dim_v).steps)

    def _place(self, head_dim: int, me: Lane, step: int) -> tuple[Int32, Int32]:
        """Row and part of this lane's chunk of its warp's unit of a step: Note [Bank conflicts]."""
        units = self.units(head_dim)
        first_row, part_idx = units.place(me.warp, step)
        row = self._row(head_dim, me)
        return first_row + row, Int32(part_idx) ^ (row & 1) if units.parts % 2 == 0 else Int32(part_idx)

    def _row(self, head_dim: int, me: Lane) -> Int32:
        """Row of this lane's chunk in a unit."""
        return me.lane >> _log2(self.storage.config.part_elems(head_dim) // CHUNK_BYTES)

    def _chunk(self, head_dim: int, me: Lane) -> Int32:
        """Place of this lane's chunk in its part of a row."""
        return me.lane & (self.storage.config.part_elems(head_dim) // CHUNK_BYTES - 1)

    def _load(self, source: Int32, head_dim: int, me: Lane, step: int) -> tuple[Int32, ...]:
        """This lane's chunk of a unit."""
        row, part_idx = self._place(head_dim, me, step)
        part = self.storage.config.part_elems(head_dim)
        address = source + (row * head_dim + part_idx * part + self._chunk(head_dim, me) * CHUNK_BYTES)
        return tuple(Int32(word) for word in vectors.elements(ptx.load_shared_v4(address)))

    def _store(self, target: Int32, head_dim: int, me: Lane, step: int, words: tuple[Int32, ...], seen: NoteWords | None) -> None:
        """The same as float16; rows that are not seen as zeros, None: all are seen."""
        row, part_idx = self._place(head_dim, me, step)
        part, tile_n = self.storage.config.part_elems(head_dim), self.storage.config.tile.tile_n
        # Units begin at multiples of 8 rows.
        swizzle = self._row(head_dim, me) & 7 if part * 2 == 128 else self._row(head_dim, me) >> 1 & 3
        if seen is not None:
            is_seen = (row >= seen.first) & (row < seen.end)
            words = tuple(cutlass.select_(is_seen, word, Int32(0)) for word in words)
        line = target + ((part_idx * tile_n + row) * (2 * part) + ((2 * self._chunk(head_dim, me)) ^ swizzle) * CHUNK_BYTES)
        halves = [half.ir_value() for word in words for half in e4m3_to_float16(word)]
        ptx.store_shared_v4(line, halves[:4])
        ptx.store_shared_v4(line ^ CHUNK_BYTES, halves[4:])  # the neighbour, swizzled alike


def _log2(power: int) -> int:
    return power.bit_length() - 1
