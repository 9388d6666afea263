"""Runs compiled sm_100a, sm_103a and sm_90a kernels on a CPU, and finds their races.

The PTX that the CuTe-DSL compiler emitted and the host code it generated are executed unchanged. Example:

    from fa4_backend import emulator

    emulator.install()                        # before cute.compile: host code is then linked against the emulator
    compiled = cute.compile(host_function, ..., options="--enable-tvm-ffi --keep-ptx --keep-cubin")
    with emulator.session(arch="sm_100a", num_sms=4, seed=None) as emu:
        emu.run(compiled, q, k, v, out, ...)  # torch CPU tensors and numpy arrays are used in place
    print(emu.report.races, emu.report.instructions, emu.report.seconds)

* `session(arch, num_sms, seed=None, detect_races=True)`: `seed=None` is a deterministic schedule; an integer makes warps run at random
  speeds and asynchronous operations finish at random legal times. `detect_races="raise"` raises `RaceDetected` after the launch.
* `session(..., contraction="never")`: which products and sums run as one FMA, as ptxas may make them: "never", "always" or a seed
  (`contraction.py`).
* `emu.run(compiled, *args)`: torch CPU tensors and numpy arrays among the arguments are registered for the call; others pass through.
* `emu.tensor(t, name, output=False)`: register a tensor for the whole session; the handle also works as an argument of `compiled` itself.
  `output=True` fills it with NaN and counts in `report.unwritten[name]` what was never written.
* `emu.launch(ptx, grid, block, args, cluster=, smem=, programmatic=)`: run a kernel of a PTX text without host code.
* `emu.report`: `races`, `notes` (leaks, reads of what nobody wrote), `instructions`, `opcodes()`, `seconds` (CPU time), `as_dict()`.
* `register_program(ptx, cubin)`: needed once for objects that were loaded from disk and carry no PTX.

Errors are named: see `errors.py`. An instruction, modifier or descriptor field that is not modelled raises `UnsupportedInstruction`.
"""

from fa4_backend.emulator.errors import (
    BarrierMisuse,
    Deadlock,
    EmulatorError,
    KernelFault,
    LaunchError,
    MemoryFault,
    NativeBuildError,
    PtxSyntaxError,
    RaceDetected,
    UnknownProgram,
    UnsupportedInstruction,
)
from fa4_backend.emulator.host_calls import install
from fa4_backend.emulator.programs import load_program, register_program
from fa4_backend.emulator.report import Report
from fa4_backend.emulator.session import Session, session
from fa4_backend.emulator.tensors import poison

__all__ = [
    "BarrierMisuse",
    "Deadlock",
    "EmulatorError",
    "KernelFault",
    "LaunchError",
    "MemoryFault",
    "NativeBuildError",
    "PtxSyntaxError",
    "RaceDetected",
    "Report",
    "Session",
    "UnknownProgram",
    "UnsupportedInstruction",
    "install",
    "load_program",
    "poison",
    "register_program",
    "session",
]
