"""What a small PTX program under test is: its text, its inputs, and the values that the PTX ISA says it must produce.

The same programs run on the emulator (`tests/emulator/test_*.py`) and on a GPU (`tests/device/run_programs.py`).
A program's parameters are 64-bit buffer addresses, 128-byte tensor maps and 32-bit scalars, in the order of `Program.args`.
In the body, `%p0`, `%p1`, ... hold the addresses, the generic addresses of the tensor maps, or (in the low half) the scalars.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

POISON = 0xA5  # every output byte before a run: a byte that is not written shows

HEADER = """.version {version}
.target {target}
.address_size 64
"""

# Registers every body may use, without declaring them.
REGISTERS = """    .reg .pred %q<32>;
    .reg .b16 %h<64>;
    .reg .b32 %r<320>;
    .reg .f32 %f<320>;
    .reg .b64 %d<96>;
    .reg .b32 %t;
    .reg .b32 %lane;
    .reg .b32 %warp;
    mov.u32 %t, %tid.x;
    and.b32 %lane, %t, 31;
    shr.u32 %warp, %t, 5;
"""


@dataclass(frozen=True)
class Buffer:
    """Device memory. After the run its bytes must equal `expected`'s, or its own where `expected` is None.

    `floats` names the float format of the elements ("f32", "f16", "bf16", "e4m3", "e5m2"): then a NaN matches every NaN, since the PTX ISA
    leaves payloads open. `ulp` allows that many units in the last place, `absolute` that much besides (both 0: bit for bit).
    `check` replaces the comparison where no single value is right (clocks): it raises AssertionError.
    """

    name: str
    data: np.ndarray
    expected: np.ndarray | None = None
    floats: str = ""
    ulp: float = 0
    absolute: float = 0.0
    check: Callable[[np.ndarray], None] | None = None


@dataclass(frozen=True)
class TensorMap:
    """Arguments of `cuTensorMapEncodeTiled` over the buffer called `buffer` (CUDA driver API, Tensor Map Object Management).

    `dims`, `box`, `element_strides` are in elements, innermost first; `strides` in bytes, of dimensions 1 and up.
    """

    buffer: str
    dtype: str  # a key of DTYPES
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...] = ()
    swizzle: str = "none"  # a key of SWIZZLES
    oob_nan: bool = False
    l2_promotion: int = 0
    offset: int = 0  # bytes from the start of the buffer

    DTYPES: ClassVar = {"u8": 0, "u16": 1, "u32": 2, "i32": 3, "u64": 4, "i64": 5, "f16": 6, "f32": 7, "f64": 8, "bf16": 9}
    DTYPE_BYTES: ClassVar = {"u8": 1, "u16": 2, "u32": 4, "i32": 4, "u64": 8, "i64": 8, "f16": 2, "f32": 4, "f64": 8, "bf16": 2}
    SWIZZLES: ClassVar = {"none": 0, "32B": 1, "64B": 2, "128B": 3}


@dataclass(frozen=True)
class Program:
    """One kernel. `section` is that of the PTX ISA 9.0; `body` is PTX between the generated prologue and `ret`."""

    name: str
    section: str
    body: str
    args: tuple[Buffer | TensorMap | int, ...]
    block: int = 32
    grid: int = 1
    cluster: int = 1
    smem_bytes: int = 0  # dynamic shared memory, as `smem`
    target: str = "sm_90a"
    version: str = "9.0"
    directives: str = ""
    declarations: str = ""  # module-level variables; names must be unique in the family
    faults: str = ""  # why the program must fail, on the GPU ("illegal instruction") and on the emulator (`KernelFault`)

    @property
    def entry(self) -> str:
        """The kernel's name in PTX."""
        return "k_" + re.sub(r"\W", "_", self.name)

    @property
    def text(self) -> str:
        """The `.entry` without a module header."""
        params, loads = [], []
        for i, arg in enumerate(self.args):
            name = f"{self.entry}_{i}"
            if isinstance(arg, TensorMap):
                params.append(f".param .align 64 .b8 {name}[128]")
                loads.append(f"    mov.b64 %p{i}, {name};\n    cvta.param.u64 %p{i}, %p{i};\n")
            elif isinstance(arg, Buffer):
                params.append(f".param .u64 {name}")
                loads.append(f"    ld.param.u64 %p{i}, [{name}];\n    cvta.to.global.u64 %p{i}, %p{i};\n")
            else:
                params.append(f".param .u32 {name}")
                loads.append(
                    f"    {{\n    .reg .b32 %scalar;\n    ld.param.u32 %scalar, [{name}];\n    cvt.u64.u32 %p{i}, %scalar;\n    }}\n"
                )
        smem = ".extern .shared .align 1024 .b8 smem[];\n" if self.smem_bytes else ""
        cluster = f".reqnctapercluster {self.cluster}, 1, 1\n" if self.cluster > 1 else ""
        return (
            f"{smem}{self.declarations}.visible .entry {self.entry}(\n    " + ",\n    ".join(params) + f"\n)\n"
            f".reqntid {self.block}, 1, 1\n{cluster}{self.directives}{{\n"
            f"    .reg .b64 %p<{max(len(self.args), 1)}>;\n{REGISTERS}{''.join(loads)}{_indent(self.body)}\n    ret;\n}}\n"
        )

    @property
    def ptx(self) -> str:
        """A whole module with this one kernel."""
        return HEADER.format(version=self.version, target=self.target) + self.text

    @property
    def digest(self) -> str:
        """Of the text, the inputs and the expected values: tells which version of a program a recorded result is of."""
        total = hashlib.sha256(self.ptx.encode())
        for arg in self.args:
            arrays = (arg.data, arg.expected) if isinstance(arg, Buffer) else ()
            total.update(repr(arg).encode() if not arrays else b"".join(a.tobytes() for a in arrays if a is not None))
        return total.hexdigest()[:16]

    @property
    def buffers(self) -> list[Buffer]:
        return [a for a in self.args if isinstance(a, Buffer)]


def _indent(body: str) -> str:
    return "\n".join("    " + line.strip() for line in body.strip().splitlines())


def output(name: str, expected: np.ndarray, **options: Any) -> Buffer:
    """A buffer that holds poison before the run and `expected` after it."""
    return Buffer(name, np.full(expected.nbytes, POISON, np.uint8).view(expected.dtype).reshape(expected.shape), expected, **options)


def compare(program: Program, results: dict[str, np.ndarray]) -> None:
    """Judge the contents of a program's buffers after a run (`results`: by name).

    Raises:
        AssertionError: names the program, the buffer, the first wrong element, and the largest error of a float function.
    """
    for buffer in program.buffers:
        got = results[buffer.name]
        if buffer.check is not None:
            buffer.check(got)
            continue
        want = buffer.data if buffer.expected is None else buffer.expected
        wrong = mismatches(buffer, got, want)
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            a, b = got.reshape(-1).view(_unsigned(got)), want.reshape(-1).view(_unsigned(want))
            raise AssertionError(
                f"{program.name} (PTX ISA {program.section}), {buffer.name}: {int(wrong.sum())} of {wrong.size} elements wrong, "
                f"first [{i}]: expected {want.reshape(-1)[i]} ({int(b[i]):#x}), got {got.reshape(-1)[i]} ({int(a[i]):#x})"
            )


def mismatches(buffer: Buffer, got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Boolean array of the elements that are outside of the buffer's tolerance."""
    assert got.dtype == want.dtype and got.size == want.size, (got.dtype, want.dtype, got.size, want.size)
    a, b = got.reshape(-1).view(_unsigned(got)), want.reshape(-1).view(_unsigned(want))
    wrong = a != b
    if not buffer.floats:
        return wrong
    with np.errstate(invalid="ignore"):  # signalling NaN patterns are among the operands
        x, y = as_float(a, buffer.floats), as_float(b, buffer.floats)
        wrong &= ~(np.isnan(x) & np.isnan(y))
        if buffer.ulp or buffer.absolute:
            wrong &= ~(ulp_distance(a, b) <= buffer.ulp) & ~(np.abs(x - y) <= buffer.absolute)
    return wrong


def _unsigned(array: np.ndarray) -> np.dtype:
    return np.dtype(f"u{array.dtype.itemsize}")


def as_float(bits: np.ndarray, name: str) -> np.ndarray:
    """The float64 values of an array of bit patterns."""
    from tests.emulator.programs.numerics import FORMATS, decode

    if name == "f32":
        return bits.view(np.float32).astype(np.float64)
    if name == "f16":
        return bits.view(np.float16).astype(np.float64)
    if name == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.array([float(decode(int(v), FORMATS[name])) for v in bits])


def ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Steps between two arrays of float bit patterns; NaN is far from everything."""
    bits = 8 * a.dtype.itemsize
    sign = 1 << (bits - 1)
    x, y = (np.where(v & sign, -(v.astype(np.int64) & (sign - 1)), v.astype(np.int64)) for v in (a, b))
    mantissa = {16: 10, 32: 23}[bits]
    exponent = sign - (1 << mantissa) if bits == 32 else 0x7C00
    nan = ((a.astype(np.int64) & (sign - 1)) > exponent) | ((b.astype(np.int64) & (sign - 1)) > exponent)
    return np.where(nan, np.iinfo(np.int64).max, np.abs(x - y))
