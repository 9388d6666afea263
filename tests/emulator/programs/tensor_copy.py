"""Tensor copies through a tensor map (TMA): PTX ISA 5.5 and 9.7.9.27. Each case is a box, with the shared memory it must leave behind."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from tests.emulator.programs.bulk import WAIT, copy_in, copy_out, poison
from tests.emulator.programs.program import POISON, Buffer, Program, TensorMap, output

RNG = np.random.default_rng(71)
NUMPY = {
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "i32": np.int32, "u64": np.uint64, "i64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16,
}  # fmt: skip
SWIZZLE_MASK = {"none": 0, "32B": 1, "64B": 3, "128B": 7}
NAN_BITS = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}


def swizzle(offset: int, mode: str) -> int:
    """Where byte `offset` of a box lies: 16-byte chunks are exchanged by the number of the 128-byte row. 5.5.7"""
    return offset ^ (offset >> 7 & SWIZZLE_MASK[mode]) << 4


def elements(tensor: TensorMap, coordinates: tuple[int, ...]) -> list[tuple[int, int | None]]:
    """(byte offset in the box's shared memory, byte offset in the buffer or None outside) of every element, in order."""
    size = TensorMap.DTYPE_BYTES[tensor.dtype]
    steps = tensor.element_strides or (1,) * len(tensor.dims)
    counts = [-(-b // s) for b, s in zip(tensor.box, steps, strict=True)]
    strides = (size, *tensor.strides)
    out = []
    for number, index in enumerate(itertools.product(*(range(c) for c in reversed(counts)))):
        place = [c + i * s for c, i, s in zip(coordinates, reversed(index), steps, strict=True)]
        inside = all(0 <= p < d for p, d in zip(place, tensor.dims, strict=True))
        source = tensor.offset + sum(p * s for p, s in zip(place, strides, strict=True)) if inside else None
        out.append((swizzle(number * size, tensor.swizzle), source))
    return out


def image(tensor: TensorMap, memory: np.ndarray, coordinates: tuple[int, ...], count: int) -> np.ndarray:
    """`count` bytes of shared memory after a load; poison where nothing is written."""
    size = TensorMap.DTYPE_BYTES[tensor.dtype]
    out = np.full(count, POISON, np.uint8)
    raw = memory.view(np.uint8)
    fill = NAN_BITS[tensor.dtype] if tensor.oob_nan else 0
    for place, source in elements(tensor, coordinates):
        out[place : place + size] = (
            raw[source : source + size] if source is not None else np.frombuffer(fill.to_bytes(size, "little"), np.uint8)
        )
    return out


def box_bytes(tensor: TensorMap) -> int:
    steps = tensor.element_strides or (1,) * len(tensor.dims)
    return int(np.prod([-(-b // s) for b, s in zip(tensor.box, steps, strict=True)])) * TensorMap.DTYPE_BYTES[tensor.dtype]


def packed_map(dtype: str, dims: tuple[int, ...], box: tuple[int, ...], *, row_padding: int = 0, **options) -> tuple[TensorMap, np.ndarray]:
    """A tensor map over a fresh buffer; the innermost rows are padded by `row_padding` bytes (strides are multiples of 16)."""
    size = TensorMap.DTYPE_BYTES[dtype]
    strides, pitch = [], dims[0] * size + row_padding
    pitch = -(-pitch // 16) * 16
    for d in dims[1:]:
        strides.append(pitch)
        pitch *= d
    raw = RNG.integers(0, 256, pitch, dtype=np.uint8)
    if dtype in ("f16", "bf16", "f32", "f64"):
        # Whole numbers: no NaN among the bits, so that a NaN fill stands out.
        values = RNG.integers(-99, 100, pitch // size)
        raw = (
            (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else values.astype(NUMPY[dtype])
        ).view(np.uint8)
    return TensorMap("a", dtype, dims, tuple(strides), box, **options), np.ascontiguousarray(raw)


# The barrier lies behind the data, which needs the swizzle's alignment.
def _head(barrier: int) -> str:
    return (
        f"mov.u32 %r1, smem;\nadd.u32 %r0, %r1, {barrier};\nsetp.ne.u32 %q0, %t, 0;\n@%q0 bra ready;\n"
        f"mbarrier.init.shared::cta.b64 [%r0], 1;\n"
        "fence.mbarrier_init.release.cluster;\nready:\nbar.sync 0;\n"
    )


def _coordinates(coordinates: tuple[int, ...]) -> tuple[str, str]:
    names = ", ".join(f"%r{30 + i}" for i in range(len(coordinates)))
    moves = "".join(f"mov.s32 %r{30 + i}, {c};\n" for i, c in enumerate(coordinates))
    return moves, "{" + names + "}"


def load(name: str, tensor: TensorMap, memory: np.ndarray, coordinates: tuple[int, ...], form: str = "", **options) -> Program:
    """Load one box and dump the shared memory around it."""
    expected = box_bytes(tensor)
    count = -(-expected // 128) * 128 + 128
    moves, vector = _coordinates(coordinates)
    rank = len(tensor.dims)
    instruction = form or f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    body = (
        _head(count)
        + poison(count)
        + f"@%q0 bra started;\nprefetch.tensormap [%p0];\n{moves}mbarrier.arrive.expect_tx.shared.b64 %d5, [%r0], {expected};\n"
        f"{instruction} [%r1], [%p0, {vector}], [%r0]{', %d9' if 'cache_hint' in instruction else ''};\nstarted:\n"
        + WAIT
        + copy_out(count, 2)
    )
    if "cache_hint" in instruction:
        body = "createpolicy.fractional.L2::evict_first.b64 %d9, 1.0;\n" + body
    floats = tensor.dtype if tensor.oob_nan and tensor.dtype in ("f16", "bf16", "f32") else ""
    want = image(tensor, memory, coordinates, count)
    if floats:
        want = want.view({"f32": np.uint32}.get(floats, np.uint16))
    args = (tensor, Buffer("a", memory), output("d", want, floats=floats))
    return Program(name, "9.7.9.27.1.2", body, args, block=64, smem_bytes=count + 128, **options)


def store(name: str, tensor: TensorMap, memory: np.ndarray, coordinates: tuple[int, ...], operation: str = "") -> Program:
    """Store or reduce one box whose shared memory is given; elements outside of the tensor are dropped."""
    count = box_bytes(tensor)
    size = TensorMap.DTYPE_BYTES[tensor.dtype]
    source = RNG.integers(0, 100, count // size).astype(NUMPY[tensor.dtype])
    if tensor.dtype == "bf16":
        source = (RNG.integers(0, 100, count // size).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    shared = np.zeros(-(-count // 128) * 128, np.uint8)
    want = memory.copy()
    cells = want.view(np.uint8)
    for number, (place, target) in enumerate(elements(tensor, coordinates)):
        piece = source[number : number + 1].view(np.uint8)
        shared[place : place + size] = piece
        if target is not None:
            cells[target : target + size] = _combine(operation, cells[target : target + size].copy(), piece, tensor.dtype)
    moves, vector = _coordinates(coordinates)
    rank = len(tensor.dims)
    instruction = (
        f"cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.{operation}.tile.bulk_group"
        if operation
        else f"cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group"
    )
    body = (
        "mov.u32 %r1, smem;\n"
        + copy_in(len(shared), 2)
        + f"setp.ne.u32 %q0, %t, 0;\n@%q0 bra end;\n{moves}{instruction} [%p0, {vector}], [%r1];\n"
        "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\nend:"
    )
    args = (tensor, Buffer("a", memory, want), Buffer("s", shared))
    return Program(name, "9.7.9.27.1.2" if not operation else "9.7.9.27.1.3", body, args, block=64, smem_bytes=len(shared))


def _combine(operation: str, old: np.ndarray, new: np.ndarray, dtype: str) -> np.ndarray:
    if not operation:
        return new
    if dtype == "bf16":
        x, y = ((v.view(np.uint16).astype(np.uint32) << 16).view(np.float32) for v in (old, new))
    else:
        x, y = old.view(NUMPY[dtype]), new.view(NUMPY[dtype])
    result = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[
        operation
    ](x, y)
    if dtype == "bf16":
        return (result.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return result.astype(NUMPY[dtype]).view(np.uint8)


def _ranks() -> list[Program]:
    out = []
    shapes = {
        1: ((64,), (32,), [(0,), (16,), (-8,), (48,)]),
        2: ((64, 40), (32, 8), [(0, 0), (32, 24), (-8, 36), (48, -3)]),
        3: ((32, 9, 7), (16, 4, 3), [(0, 0, 0), (16, 7, 5), (-8, -1, -1)]),
        4: ((16, 5, 6, 4), (16, 2, 3, 2), [(0, 0, 0, 0), (8, 4, 5, 3), (0, -1, 2, -1)]),
        5: ((16, 3, 4, 3, 3), (8, 2, 2, 2, 2), [(0, 0, 0, 0, 0), (8, 2, 3, 2, 2), (-8, 1, -1, 2, 1)]),
    }
    for rank, (dims, box, places) in shapes.items():
        for number, coordinates in enumerate(places):
            tensor, memory = packed_map("bf16", dims, box, row_padding=0 if number else 16)
            out.append(load(f"load {rank}d {number}", tensor, memory, coordinates))
            tensor, memory = packed_map("i32", dims, box)
            faults = "a store with a negative coordinate" if min(coordinates) < 0 else ""
            out.append(replace(store(f"store {rank}d {number}", tensor, memory, coordinates), faults=faults))
    return out


def _dtypes() -> list[Program]:
    out = []
    for dtype in NUMPY:
        size = TensorMap.DTYPE_BYTES[dtype]
        tensor, memory = packed_map(dtype, (64, 12), (32 // size * 2, 4))
        out.append(load(f"load {dtype}", tensor, memory, (48, 10)))
        if dtype in ("f16", "bf16", "f32"):
            tensor, memory = packed_map(dtype, (64, 12), (32 // size * 2, 4), oob_nan=True)
            out.append(load(f"load {dtype} filled with NaN", tensor, memory, (48, 10)))
    tensor, memory = packed_map("f16", (64, 24), (16, 12), element_strides=(1, 3))
    out.append(load("load every third row", tensor, memory, (16, 2)))
    return out


def _swizzles() -> list[Program]:
    out = []
    for mode, inner in (("32B", 16), ("64B", 32), ("128B", 64)):
        for coordinates in ((0, 0), (8, 13)):
            tensor, memory = packed_map("bf16", (128, 32), (inner, 24), swizzle=mode)
            out.append(load(f"load swizzle {mode} {coordinates[0]}", tensor, memory, coordinates))
            tensor, memory = packed_map("f16", (128, 32), (inner, 24), swizzle=mode)
            out.append(store(f"store swizzle {mode} {coordinates[0]}", tensor, memory, coordinates))
        tensor, memory = packed_map("bf16", (64, 4, 9), (inner, 2, 8), swizzle=mode)
        out.append(load(f"load 3d swizzle {mode}", tensor, memory, (0, 3, 4)))
    # A page of a paged KV cache: 64 of 128 elements a row, 16 rows, one head, one page.
    tensor, memory = packed_map("bf16", (128, 16, 2, 5), (64, 16, 1, 1), swizzle="128B")
    form = "cp.async.bulk.tensor.4d.shared::cta.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
    out.append(load("load a page", tensor, memory, (64, 0, 1, 3), form))
    # The box starts 8192 bytes into the buffer.
    tensor, memory = packed_map("bf16", (128, 64), (64, 8), swizzle="128B", offset=0)
    tensor = TensorMap("a", "bf16", (128, 32), tensor.strides, (64, 8), swizzle="128B", offset=8192)
    out.append(load("load from an inner base address", tensor, memory, (0, 28)))
    return out


def _reductions() -> list[Program]:
    out = []
    for dtype, operations in {
        "u32": ("add", "min", "max", "and", "or", "xor"),
        "i32": ("add", "min", "max"),
        "f32": ("add",),
        "f16": ("add", "min", "max"),
        "bf16": ("add", "min", "max"),
        "u64": ("add",),
    }.items():
        for operation in operations:
            tensor, memory = packed_map(dtype, (32, 12), (16, 4))
            out.append(store(f"reduce {operation} {dtype}", tensor, memory, (24, 10), operation))
    return out


def _faults() -> list[Program]:
    """The inner coordinate's byte offset must be a multiple of 16: the ISA is silent, an H200 reports an illegal instruction."""
    out = []
    for dtype, coordinates in (("bf16", (4, 0)), ("bf16", (-4, 0)), ("u8", (56, 10)), ("f32", (2, 0))):
        tensor, memory = packed_map(dtype, (64, 12), (32, 4))
        name = f"load {dtype} from an odd column {coordinates[0]}"
        out.append(replace(load(name, tensor, memory, coordinates), faults="inner coordinate off 16 bytes"))
        if coordinates[0] > 0:
            name = f"store {dtype} to an odd column {coordinates[0]}"
            out.append(replace(store(name, tensor, memory, coordinates), faults="inner coordinate off 16 bytes"))
    return out


def _gather() -> list[Program]:
    """tile::gather4 (sm_100a): four rows of a matrix, anywhere; tile::scatter4 the way back. 5.5.6"""
    rows = (5, 0, 31, 17)
    tensor, memory = packed_map("bf16", (128, 32), (64, 1), swizzle="128B")
    count = 4 * 128 + 128
    want = np.full(count, POISON, np.uint8)
    for i, row in enumerate(rows):
        for byte in range(0, 128, 16):
            place = swizzle(128 * i + byte, "128B")
            source = row * tensor.strides[0] + 64 * 2 + byte
            want[place : place + 16] = memory[source : source + 16]
    moves, vector = _coordinates((64, *rows))
    body = (
        _head(count) + poison(count) + f"@%q0 bra started;\n{moves}mbarrier.arrive.expect_tx.shared.b64 %d5, [%r0], 512;\n"
        f"cp.async.bulk.tensor.2d.shared::cta.global.tile::gather4.mbarrier::complete_tx::bytes [%r1], [%p0, {vector}], [%r0];\nstarted:\n"
        + WAIT + copy_out(count, 2)
    )  # fmt: skip
    gather = Program(
        "gather4",
        "9.7.9.27.1.2",
        body,
        (tensor, Buffer("a", memory), output("d", want)),
        block=64,
        smem_bytes=count + 128,
        target="sm_100a",
    )
    shared = RNG.integers(0, 256, 512, dtype=np.uint8)
    after = memory.copy()
    for i, row in enumerate(rows):
        for byte in range(0, 128, 16):
            place = swizzle(128 * i + byte, "128B")
            target = row * tensor.strides[0] + 128 + byte
            after[target : target + 16] = shared[place : place + 16]
    body = (
        "mov.u32 %r1, smem;\n" + copy_in(512, 2) + f"setp.ne.u32 %q0, %t, 0;\n@%q0 bra end;\n{moves}"
        f"cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group [%p0, {vector}], [%r1];\n"
        "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\nend:"
    )
    scatter = Program(
        "scatter4",
        "9.7.9.27.1.2",
        body,
        (tensor, Buffer("a", memory, after), Buffer("s", shared)),
        block=64,
        smem_bytes=512,
        target="sm_100a",
    )
    return [gather, scatter]


PROGRAMS = [*_ranks(), *_dtypes(), *_swizzles(), *_reductions(), *_faults(), *_gather()]
