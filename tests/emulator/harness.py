"""Run a program of tests/emulator/programs on the emulator."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from fa4_backend import emulator
from tests.emulator.programs.program import Buffer, Program, TensorMap, compare

# Data type codes of the hardware's descriptor; `cuTensorMapEncodeTiled` numbers them otherwise.
HARDWARE_DTYPES = {"u8": 0, "u16": 1, "u32": 2, "i32": 3, "u64": 4, "i64": 5, "f16": 6, "f32": 7, "f64": 9, "bf16": 10}
STEP_LIMIT = 1_000_000


def encode_tensor_map(tensor: TensorMap, address: int) -> bytes:
    """The 128-byte descriptor as the CUDA driver makes it; `test_tensor_maps.py` compares it with the driver's own.

    Bytes 0-7 base; 8-11 flags (4-6 rank - 1, 7-10 data type, 11-12 interleave, 13-14 swizzle, 15 NaN fill, 17-18 L2 promotion); 12-27
    strides of dimensions 1 to 4 in 16 bytes, 28-31 their bits 32 to 35; 32-51 dimensions - 1; 52-54 element strides - 1, 3 bits each;
    55-59 box - 1. Bytes 64 and up hold values derived from these.
    """
    rank = len(tensor.dims)
    flags = (
        (rank - 1) << 4
        | HARDWARE_DTYPES[tensor.dtype] << 7
        | TensorMap.SWIZZLES[tensor.swizzle] << 13
        | int(tensor.oob_nan) << 15
        | tensor.l2_promotion << 17
    )
    units = [s // 16 for s in tensor.strides] + [0] * (4 - len(tensor.strides))
    strides = [u & 0xFFFFFFFF for u in units] + [sum((u >> 32) << 4 * i for i, u in enumerate(units))]
    pad = [0] * (5 - rank)
    steps = sum((s - 1) << 3 * i for i, s in enumerate(tensor.element_strides))
    head = struct.pack("<QI5I5I", address + tensor.offset, flags, *strides, *(d - 1 for d in tensor.dims), *pad)
    return (head + steps.to_bytes(3, "little") + bytes([*(b - 1 for b in tensor.box), *pad])).ljust(128, b"\0")


def run_program(
    program: Program, *, seed: int | None = None, detect_races: bool = True, **options: Any
) -> tuple[dict[str, np.ndarray], emulator.Report]:
    """Run one program; returns the contents of its buffers by name, and the session's report. `options`: more of the session's.

    A schedule under which a program only spins ends after STEP_LIMIT instructions without progress, in seconds.
    """
    buffers = {b.name: aligned_copy(b.data) for b in program.buffers}
    args: list[Any] = []
    options.setdefault("step_limit", STEP_LIMIT)
    with emulator.session(arch=program.target, num_sms=max(program.grid, 1), seed=seed, detect_races=detect_races, **options) as session:
        for arg in program.args:
            if isinstance(arg, Buffer):
                args.append(buffers[arg.name])
            elif isinstance(arg, TensorMap):
                session.tensor(buffers[arg.buffer], arg.buffer)
                args.append(encode_tensor_map(arg, buffers[arg.buffer].ctypes.data))
            else:
                args.append(arg)
        session.launch(program.ptx, program.grid, program.block, args, cluster=program.cluster, smem=program.smem_bytes)
        report = session.report
    return buffers, report


def check_program(program: Program, *, seed: int | None = None) -> None:
    """Run and judge: values and races; a program that must fail has to fail."""
    if program.faults:
        with pytest.raises(emulator.KernelFault):
            run_program(program, seed=seed)
        return
    results, report = run_program(program, seed=seed)
    compare(program, results)
    assert not report.races, f"{program.name}: {report.races[:3]}"


def name_of(program: Program) -> str:
    """A test's id."""
    return program.entry.removeprefix("k_")


def aligned_copy(data: np.ndarray) -> np.ndarray:
    """A copy on a 1024-byte boundary, as device allocations are."""
    room = np.empty(data.nbytes + 1024, np.uint8)
    start = -room.ctypes.data % 1024
    copy = room[start : start + data.nbytes].view(data.dtype).reshape(data.shape)
    copy[...] = data
    return copy
