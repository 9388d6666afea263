"""Which function lowers which instruction: modules of instructions register their makers here, `lowering.py` looks them up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fa4_backend.emulator.errors import UnsupportedInstruction
from fa4_backend.emulator.syntax import Instruction

if TYPE_CHECKING:
    from fa4_backend.emulator.builder import Builder
    from fa4_backend.emulator.warp import Warp

Handler = Callable[["Warp"], "bool | None"]  # True: blocked, run the same instruction again later
HandlerMaker = Callable[["Builder", Instruction, "Modifiers"], Handler]
NativeMaker = Callable[["Builder", Instruction, "Modifiers"], "bool | None"]  # False: not this form, look further
_MAKERS: dict[str, tuple[HandlerMaker, bool]] = {}
_NATIVE_MAKERS: dict[str, NativeMaker] = {}


def register_native(makers: dict[str, NativeMaker]) -> None:
    """Makers of records that the native loop executes, by the first part of the opcode (see `native_ops.py`)."""
    _NATIVE_MAKERS.update(makers)


def native_maker(opcode: str) -> NativeMaker | None:
    """Who may make a record of this instruction."""
    return _NATIVE_MAKERS.get(opcode.split(".", 1)[0])


def handler_maker(opcode: str) -> tuple[HandlerMaker, bool, int]:
    """Who makes this instruction's handler, whether it is aligned, and how many parts of the opcode its name has: of the longest name.

    Raises:
        UnsupportedInstruction: nobody.
    """
    parts = opcode.split(".")
    for length in range(len(parts), 0, -1):
        found = _MAKERS.get(".".join(parts[:length]))
        if found is not None:
            return *found, length
    raise UnsupportedInstruction(f"unknown opcode {opcode}")


def handles(*names: str, aligned: bool = False) -> Callable[[HandlerMaker], HandlerMaker]:
    """Register the maker of the Python handler of every opcode that starts with one of `names` (whole dotted parts).

    `aligned`: all live lanes of the warp must execute it together (`.sync.aligned`).
    """

    def register(maker: HandlerMaker) -> HandlerMaker:
        for name in names:
            _MAKERS[name] = (maker, aligned)
        return maker

    return register


class Modifiers:
    """The dotted parts of an opcode. Whatever was not taken when `done()` is called is unsupported."""

    def __init__(self, opcode: str, skip: int = 1) -> None:
        self.opcode = opcode
        self.parts = opcode.split(".")[skip:]

    def has(self, *names: str) -> bool:
        """Take one of `names` if present."""
        for name in names:
            if name in self.parts:
                self.parts.remove(name)
                return True
        return False

    def one(self, *names: str, default: str | None = None) -> str:
        """Take exactly one of `names`; `default` when none is there."""
        for name in names:
            if name in self.parts:
                self.parts.remove(name)
                return name
        if default is None:
            raise UnsupportedInstruction(f"{self.opcode}: expected one of {', '.join(names)}")
        return default

    def done(self) -> None:
        if self.parts:
            raise UnsupportedInstruction(f"{self.opcode}: modifier .{' .'.join(self.parts)}")
