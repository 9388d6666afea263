"""What can go wrong on the emulator, each with its own name."""

from __future__ import annotations


class EmulatorError(Exception):
    """Base class of everything the emulator raises."""


class NativeBuildError(EmulatorError):
    """The native core could not be built (no C compiler, or the compiler failed)."""


class PtxSyntaxError(EmulatorError):
    """The PTX text could not be parsed; the message gives the line."""


class UnsupportedInstruction(EmulatorError):
    """An opcode, modifier, operand form or descriptor field that is not modelled."""


class UnknownProgram(EmulatorError):
    """A cubin was loaded whose PTX nobody registered."""


class LaunchError(EmulatorError):
    """The launch configuration or the arguments do not fit the kernel."""


class KernelFault(EmulatorError):
    """A fault inside a running kernel. `place` names kernel, CTA, warp, lane and instruction."""

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(f"{message}\n  at {place}" if place else message)
        self.message = message
        self.place = place


class MemoryFault(KernelFault):
    """Access outside every registered buffer, outside shared memory or TMEM, or misaligned."""


class Deadlock(KernelFault):
    """No warp can make progress; the message lists where every warp waits and for what."""


class BarrierMisuse(KernelFault):
    """Over-arrival, use before init, reuse while pending, or a barrier used with two different thread counts."""


class RaceDetected(KernelFault):
    """Raised at the end of a run when `detect_races="raise"` and the report holds findings."""
