"""What parsed PTX consists of: operands, instructions, variables, kernels. Grammar: PTX ISA 9.0, sections 4 to 6."""

from __future__ import annotations

from dataclasses import dataclass, field

TYPE_BYTES = {
    "pred": 4,
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "b128": 16,
    "f16": 2,
    "f16x2": 4,
    "bf16": 2,
    "bf16x2": 4,
    "f32": 4,
    "f64": 8,
}


@dataclass(frozen=True, slots=True)
class Register:
    """A virtual register; `index` is unique in its kernel."""

    name: str
    type: str
    index: int


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant. `bits` is the value of an integer, or the bits of a float; `float_bytes` is 0, 4 or 8."""

    bits: int
    float_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Special:
    """A special register such as `%tid.x` (PTX ISA section 10)."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, a parameter or a label, by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Address:
    """`[base + offset]`; `coords` holds the vector of a tensor-map address `[map, {c0, c1}]`."""

    base: Operand | None
    offset: int = 0
    coords: tuple[Operand, ...] = ()
    extra: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """`d|p`: a result and a predicate."""

    first: Operand
    second: Operand


@dataclass(frozen=True, slots=True)
class Not:
    """`!p`."""

    operand: Operand


@dataclass(frozen=True, slots=True)
class Sink:
    """`_`: the result is dropped."""


Operand = Register | Immediate | Special | Symbol | Address | Vector | Pair | Not | Sink


@dataclass(slots=True)
class Instruction:
    """One statement with its names resolved; `line` and `text` are those of the PTX."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    guard_negated: bool
    line: int
    text: str
    labels: dict[str, int]  # target name -> instruction index, filled when its scope closes


@dataclass(slots=True)
class Variable:
    """A `.shared`, `.local`, `.global` or `.const` array."""

    name: str
    space: str
    align: int
    num_bytes: int
    dynamic: bool
    initial: bytes = b""
    offset: int = 0


@dataclass(slots=True)
class Parameter:
    """A kernel parameter and its place in the parameter block."""

    name: str
    num_bytes: int
    align: int
    offset: int = 0


@dataclass(slots=True)
class Kernel:
    """An `.entry`: its instructions in order, and what they refer to."""

    name: str
    target: str
    params: dict[str, Parameter]
    instructions: list[Instruction] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    branch_tables: dict[str, list[str]] = field(default_factory=dict)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def param_bytes(self) -> int:
        return max((p.offset + p.num_bytes for p in self.params.values()), default=0)
