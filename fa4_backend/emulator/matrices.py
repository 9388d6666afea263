"""Matrix operands in shared memory: descriptors, canonical layouts and element formats of wgmma and tcgen05.

PTX ISA 9.0: 9.7.15.5.1 (wgmma matrix descriptor), 9.7.16.4.1 (tcgen05 shared memory descriptor), 9.7.16.4.2 (instruction descriptor).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from fa4_backend.emulator.errors import KernelFault, MemoryFault, UnsupportedInstruction

# Swizzle mode -> (bytes of a row of the atom, mask of the 16-byte chunk bits that are XORed with address bits 7 and up)
SWIZZLES = {"none": (16, 0), "32B": (32, 1), "64B": (64, 3), "128B": (128, 7)}


@dataclass(frozen=True, slots=True)
class SmemDescriptor:
    """Where and how a matrix operand lies in shared memory."""

    start: int  # byte offset in shared memory
    leading: int  # bytes
    stride: int  # bytes
    swizzle: str


def wgmma_descriptor(bits: int) -> SmemDescriptor:
    """Decode a matrix descriptor of wgmma. 9.7.15.5.1.2.2"""
    if bits >> 49 & 7:
        raise UnsupportedInstruction(f"wgmma descriptor {bits:#018x}: base offset {bits >> 49 & 7}")
    swizzle = ("none", "128B", "64B", "32B")[bits >> 62 & 3]
    return SmemDescriptor((bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, swizzle)


def tcgen05_descriptor(bits: int) -> SmemDescriptor:
    """Decode a shared memory descriptor of tcgen05. 9.7.16.4.1"""
    if bits >> 46 & 7 != 1:
        raise UnsupportedInstruction(f"tcgen05 descriptor {bits:#018x}: bits 46-48 are {bits >> 46 & 7}, expected 1")
    if bits >> 49 & 7 or bits >> 52 & 1:
        raise UnsupportedInstruction(f"tcgen05 descriptor {bits:#018x}: base offset or absolute leading dimension")
    layouts = {0: "none", 2: "128B", 4: "64B", 6: "32B"}
    if bits >> 61 & 7 not in layouts:
        raise UnsupportedInstruction(f"tcgen05 descriptor {bits:#018x}: swizzle mode {bits >> 61 & 7}")
    return SmemDescriptor((bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, layouts[bits >> 61 & 7])


@functools.lru_cache(maxsize=4096)
def chunk_indices(
    phase: int, leading: int, stride: int, swizzle: str, rows: int, row_bytes: int, mn_major: bool, mn_chunks: int
) -> np.ndarray:
    """16-byte chunks of an operand, relative to the 1024-byte block of its start, whose offset in the block is `phase`.

    K-major: result (rows, row_bytes / 16), rows along M or N. MN-major: result (rows, mn_chunks), rows along K.
    Canonical layouts: PTX ISA 9.7.16.5 (and 9.7.15.5 for wgmma).
    """
    width, mask = SWIZZLES[swizzle]
    if not mn_major:
        row, chunk = np.arange(rows)[:, None], np.arange(row_bytes // 16)[None, :]
        if swizzle == "none":
            offset = row // 8 * stride + row % 8 * 16 + chunk * leading
        else:
            offset = row // 8 * stride + row % 8 * width + chunk * 16
    else:
        k, chunk = np.arange(rows)[:, None], np.arange(mn_chunks)[None, :]
        if swizzle == "none":
            offset = chunk * stride + k // 8 * leading + k % 8 * 16
        else:
            per_atom = width // 16
            offset = chunk // per_atom * leading + chunk % per_atom * 16 + k // 8 * stride + k % 8 * width
    address = offset + phase
    return ((address ^ ((address >> 7 & mask) << 4)) >> 4).astype(np.int64)


def load_operand(
    smem16: np.ndarray, desc: SmemDescriptor, mn: int, k: int, element_bytes: int, mn_major: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Raw elements (mn, k) of an operand, and the 16-byte chunks they came from.

    `smem16` is shared memory as (chunks, 16) bytes. Elements are uint16 or uint8.
    """
    phase = desc.start & 1023
    if mn_major:
        index = chunk_indices(phase, desc.leading, desc.stride, desc.swizzle, k, 0, True, mn * element_bytes // 16)
    else:
        index = chunk_indices(phase, desc.leading, desc.stride, desc.swizzle, mn, k * element_bytes, False, 0)
    index = index + ((desc.start - phase) >> 4)
    if int(index.max()) >= len(smem16):
        raise MemoryFault(f"matrix operand ends at shared offset {int(index.max()) * 16 + 16:#x}; the CTA has {len(smem16) * 16} bytes")
    kind = RAW_TYPES[element_bytes]
    data = smem16[index].reshape(index.shape[0], -1).view(kind)
    return (data.T if mn_major else data), index


def _f8_table(mantissa: int, bias: int, ieee: bool) -> np.ndarray:
    code = np.arange(256)
    exponent, fraction = (code & 0x7F) >> mantissa, code & ((1 << mantissa) - 1)
    value = np.where(
        exponent > 0, np.ldexp(1.0 + fraction / (1 << mantissa), exponent - bias), np.ldexp(fraction / (1 << mantissa), 1 - bias)
    )
    if ieee:
        value = np.where(exponent == 31, np.where(fraction == 0, np.inf, np.nan), value)
    else:
        value = np.where(code & 0x7F == 0x7F, np.nan, value)
    return np.where(code & 0x80, -value, value).astype(np.float32)


F8_TABLES = {"e4m3": _f8_table(3, 7, False), "e5m2": _f8_table(2, 15, True)}
ELEMENT_BYTES = {"f16": 2, "bf16": 2, "e4m3": 1, "e5m2": 1, "tf32": 4}
RAW_TYPES = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def to_float32(raw: np.ndarray, kind: str) -> np.ndarray:
    """Values of elements given as bit patterns of a float format."""
    if kind == "bf16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if kind == "f16":
        return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)
    if kind == "tf32":
        return (np.ascontiguousarray(raw) & np.uint32(0xFFFFE000)).view(np.float32)
    return F8_TABLES[kind][raw]


@dataclass(frozen=True, slots=True)
class InstructionDescriptor:
    """The 32-bit descriptor of tcgen05.mma, tables 42 and 43 of the PTX ISA."""

    m: int
    n: int
    a_kind: str
    b_kind: str
    d_kind: str
    a_mn_major: bool
    b_mn_major: bool
    negate_a: bool
    negate_b: bool


@functools.lru_cache(maxsize=256)
def instruction_descriptor(bits: int, kind: str) -> InstructionDescriptor:
    """Decode the instruction descriptor of tcgen05.mma. 9.7.16.4.2"""

    def refuse(why: str) -> UnsupportedInstruction:
        return UnsupportedInstruction(f"tcgen05.mma kind::{kind} instruction descriptor {bits:#010x}: {why}")

    if bits & 0b1111:
        raise refuse("sparsity or saturation")
    if bits >> 6 & 1 or bits >> 23 & 1 or bits >> 29 & 1 or bits >> 30:
        raise refuse("reserved bits or maximum shift")
    types = {"f16": {0: "f16", 1: "bf16"}, "f8f6f4": {0: "e4m3", 1: "e5m2"}, "tf32": {2: "tf32"}}[kind]
    a_code, b_code, d_code = bits >> 7 & 7, bits >> 10 & 7, bits >> 4 & 3
    if a_code not in types or b_code not in types:
        raise refuse(f"element types {a_code}, {b_code}")
    if kind == "f16" and a_code != b_code:
        raise refuse("A and B of different types")
    if d_code not in (0, 1) or (d_code == 0 and types[a_code] == "bf16"):
        raise refuse(f"accumulator type {d_code}")
    if d_code == 0:
        raise refuse("float16 accumulator")
    m, n = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3
    return InstructionDescriptor(
        m, n, types[a_code], types[b_code], "f32", bool(bits >> 15 & 1), bool(bits >> 16 & 1), bool(bits >> 13 & 1), bool(bits >> 14 & 1)
    )


def check_shape(desc: InstructionDescriptor, cta_group: int) -> None:
    """Allowed M and N; PTX ISA table 39. A B of bytes whose N is contiguous comes in steps twice as wide (CuTe DSL, `MmaF8F6F4Op`)."""
    step = {(1, 64): 8, (1, 128): 8, (2, 128): 16, (2, 256): 16}.get((cta_group, desc.m))
    if step is not None and ELEMENT_BYTES[desc.b_kind] == 1 and desc.b_mn_major:
        step *= 2
    if step is None or not step <= desc.n <= 256 or desc.n % step:
        raise KernelFault(f"tcgen05.mma with M={desc.m}, N={desc.n}, cta_group::{cta_group} is not a legal shape")


def matrix_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a @ b` in float32, each element's products added in float64 and rounded once.

    So a row's result does not depend on its place in the tile: BLAS in float32 does not promise that, tensor cores keep it.
    """
    return np.matmul(a, b, dtype=np.float64).astype(np.float32)


def canonical(values: np.ndarray) -> np.ndarray:
    """float32 results with every NaN as hardware writes it, 0x7fffffff; changed in place."""
    nan = np.isnan(values)
    if nan.any():
        values.view(np.uint32)[nan] = 0x7FFFFFFF
    return values
