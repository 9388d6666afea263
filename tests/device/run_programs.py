"""Run the small PTX programs of tests/emulator/programs on this machine's GPU and compare them with their expected values.

    python -m tests.device.run_programs --out results.json --arrays arrays.npz [--family wgmma ...] [--date 2026-11-23]

Each family runs in a process of its own, so that a fault or a hang costs one program only. The JSON holds the verdict of every program
and, for approximate functions, the largest error seen; the npz the outputs of the approximate functions and of every program that differed.
Needs numpy and the CUDA driver.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.device import cuda_driver as cuda
from tests.emulator.programs import FAMILIES, load_family
from tests.emulator.programs.assemble import module_text
from tests.emulator.programs.program import Buffer, Program, TensorMap, as_float, compare, mismatches, ulp_distance

TARGET = "sm_90a"
SECONDS_A_PROGRAM = 20  # the first program of a family waits for the driver's compiler too


def run_program(module: ctypes.c_void_p, program: Program) -> dict[str, np.ndarray]:
    """Run one program; returns the contents of its buffers."""
    addresses = {b.name: cuda.upload(b.data) for b in program.buffers}
    parameters: list[Any] = []
    for arg in program.args:
        if isinstance(arg, Buffer):
            parameters.append(addresses[arg.name])
        elif isinstance(arg, TensorMap):
            parameters.append((ctypes.c_uint8 * 128).from_buffer_copy(encode(arg, addresses[arg.buffer].value)))
        else:
            parameters.append(ctypes.c_uint32(arg))
    function = cuda.get_function(module, program.entry, program.smem_bytes)
    cuda.launch(function, program.grid, program.block, program.smem_bytes, parameters)
    results = {b.name: cuda.download(addresses[b.name], b.data) for b in program.buffers}
    for address in addresses.values():
        cuda.free(address)
    return results


def encode(tensor: TensorMap, address: int) -> bytes:
    """The driver's descriptor of a tensor map."""
    return cuda.encode_tensor_map(
        TensorMap.DTYPES[tensor.dtype],
        address + tensor.offset,
        tensor.dims,
        tensor.strides,
        tensor.box,
        tensor.element_strides,
        swizzle=TensorMap.SWIZZLES[tensor.swizzle],
        l2_promotion=tensor.l2_promotion,
        oob_fill=int(tensor.oob_nan),
    )


def run_fault(module: ctypes.c_void_p, program: Program) -> dict[str, Any]:
    """The verdict on a program that must fail."""
    try:
        run_program(module, program)
    except cuda.CudaError as error:
        return {"status": "equal", "section": program.section, "digest": program.digest, "fault": str(error)}
    return {"status": "differs", "section": program.section, "message": f"no fault, expected one: {program.faults}"}


def judge(program: Program, results: dict[str, np.ndarray]) -> dict[str, Any]:
    """The verdict on one program, with the largest error of an approximate function."""
    verdict: dict[str, Any] = {"status": "equal", "section": program.section, "digest": program.digest}
    try:
        compare(program, results)
    except AssertionError as error:
        verdict |= {"status": "differs", "message": str(error)}
    for buffer in program.buffers:
        if buffer.expected is not None and (buffer.ulp or buffer.absolute):
            got, want = (a.reshape(-1).view(f"u{a.dtype.itemsize}") for a in (results[buffer.name], buffer.expected))
            x, y = as_float(got, buffer.floats), as_float(want, buffer.floats)
            both = np.isfinite(x) & np.isfinite(y)
            verdict |= {
                "ulp_allowed": buffer.ulp,
                "ulp_seen": int(ulp_distance(got, want)[both].max()),
                "absolute_allowed": buffer.absolute,
                "absolute_seen": float(np.abs(x - y)[both].max()),
                "bitwise_equal": int((~mismatches(Buffer("d", got, want, floats=buffer.floats), got, want)).sum()),
                "elements": int(got.size),
            }
    return verdict


def worker(family: str, start: int, folder: Path) -> None:
    """Run a family's programs from number `start`; prints one JSON line before and after each."""
    programs = [p for p in load_family(family) if p.target == TARGET]
    cuda.open_device()
    module = cuda.load_module(module_text(programs))
    for number, program in enumerate(programs[start:], start):
        print(json.dumps({"started": number, "name": program.name}), flush=True)
        if program.faults:
            print(json.dumps({"done": number, "name": program.name, **run_fault(module, program)}), flush=True)
            return  # the context is lost
        results = run_program(module, program)
        verdict = judge(program, results)
        if verdict["status"] != "equal" or "ulp_seen" in verdict:
            np.savez(
                folder / f"{family}-{program.entry}.npz",
                **{b.name: results[b.name] for b in program.buffers if b.expected is not None or b.check},
            )
        print(json.dumps({"done": number, "name": program.name, **verdict}), flush=True)


def run_family(family: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Verdicts by program name; restarts the worker after a program that faulted or hung."""
    names = [p.name for p in load_family(family) if p.target == TARGET]
    verdicts: dict[str, dict[str, Any]] = {}
    start, message = 0, ""
    while start < len(names):
        command = [sys.executable, "-m", "tests.device.run_programs", "--worker", family, "--start", str(start), "--folder", str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        message = "ended early"
        while True:
            ready, _, _ = select.select([process.stdout], [], [], SECONDS_A_PROGRAM)
            if not ready:
                process.kill()
                message = f"hung for {SECONDS_A_PROGRAM} s"
                break
            line = process.stdout.readline()
            if not line:
                break
            event = json.loads(line)
            if "started" in event:
                start = event["started"]
            else:
                verdicts[event.pop("name")] = event
                start = event.pop("done") + 1
        _, errors = process.communicate()
        if start < len(names) and names[start] not in verdicts and process.returncode:
            verdicts[names[start]] = {
                "status": "failed",
                "message": (errors.strip().splitlines() or [message])[-1] if process.returncode != -9 else message,
            }
            start += 1
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arrays", type=Path)
    parser.add_argument("--date", default="")
    parser.add_argument("--family", nargs="*", default=FAMILIES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/fa4_programs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.worker:
        worker(options.worker, options.start, options.folder)
        return
    from concurrent.futures import ThreadPoolExecutor

    families = [f for f in options.family if any(p.target == TARGET for p in load_family(f))]
    with ThreadPoolExecutor(16) as pool:
        verdicts = dict(zip(families, pool.map(lambda f: run_family(f, options.folder), families), strict=True))
    report = {"date": options.date, "machine": cuda.open_device(), "driver": cuda.driver_version(), "target": TARGET, "families": verdicts}
    if options.out:
        options.out.write_text(json.dumps(report).replace('}, "', '},\n "') + "\n")
    if options.arrays:
        arrays = {f"{path.stem}/{key}": value for path in sorted(options.folder.glob("*.npz")) for key, value in np.load(path).items()}
        np.savez_compressed(options.arrays, **arrays)
    bad = 0
    for family, results in verdicts.items():
        counts = {status: sum(v["status"] == status for v in results.values()) for status in ("equal", "differs", "failed")}
        print(f"{family:12} {counts}")
        for name, verdict in results.items():
            if verdict["status"] != "equal":
                bad += 1
                print(f"  {name}: {verdict['status']}: {verdict['message'][:300]}")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
