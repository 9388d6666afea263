"""Build and load the native core: the launch shim, the interpreter loop and the race detector.

The C sources lie in `native/`; the switch over register instructions is generated from `alu.TABLE`. The library is built with the
system's C compiler at first use and kept in the cache (`fa4_backend.cache`), keyed by the sources, the compiler and the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fa4_backend import envs
from fa4_backend.cache.entry import Entry, ensure
from fa4_backend.compile import CompileError, find_c_compiler
from fa4_backend.emulator import alu
from fa4_backend.emulator.errors import NativeBuildError

LIBRARY = "core.so"
NUM_UNITS = 4  # generated C units, compiled side by side
SOURCES = Path(__file__).parent / "native"
UNITS = ("shim.c", "memory.c", "shadow.c", "races.c", "global_races.c", "undefined.c", "registers.c", "exchange.c", "interp.c")
FLAGS = (
    "-O2",
    "-ftree-vectorize",
    "-fvect-cost-model=dynamic",
    "-march=native",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fPIC",
    "-g0",
    "-w",
)
# The core defines the launch runtime's names; its own calls must reach its own functions also where that runtime was loaded before.
LINK_FLAGS = ("-shared", "-Wl,-Bsymbolic")

# Instructions that the interpreter handles itself, besides the rows of alu.TABLE.
CONTROL_OPS = (
    "PACK64 UNPACK64 PACK32 UNPACK32 PACK16 LOAD STORE ATOMIC BRANCH BRANCH_TABLE EXIT SHUFFLE VOTE MATCH REDUX ELECT ACTIVEMASK "
    "WARP_SYNC CLOCK TRAP NOP HANDLER MMA_SYNC MOVE128 CARRY"
).split()
OP = {name: len(alu.OPCODES) + i for i, name in enumerate(CONTROL_OPS)}

# How a lane value of each type is read from its register (`p` is the register's first byte).
_READ = {
    "u8": "u8 {v} = (u8)((const u32*){p})[l];",
    "i8": "i8 {v} = (i8)((const u32*){p})[l];",
    "u16": "u16 {v} = (u16)((const u32*){p})[l];",
    "i16": "i16 {v} = (i16)((const u32*){p})[l];",
    "f16": "f32 {v} = f16_to((u16)((const u32*){p})[l]);",
    "bf16": "f32 {v} = bf16_to((u16)((const u32*){p})[l]);",
    "pred": "u32 {v} = *(const u32*){p} >> l & 1;",
    "mask": "u32 {v} = *(const u32*){p};",
    **{t: f"{t} {{v}} = ((const {t}*){{p}})[l];" for t in ("u32", "i32", "f32", "u64", "i64", "f64")},
    "f32x2": "f32 {v} = ((const f32*){p})[l];",
}
_WRITE = {
    "u8": "t[l] = (u8)({x});",
    "i8": "t[l] = (u16)(i16)(i8)({x});",
    "u16": "t[l] = (u16)({x});",
    "i16": "t[l] = (u16)({x});",
    "u32": "t[l] = (u32)({x});",
    "i32": "t[l] = (u32)({x});",
    "f32": "t[l] = f32_result({x});",
    "f16": "t[l] = f16_of((f32)({x}));",
    "bf16": "t[l] = bf16_of((f32)({x}));",
    "u64": "t[l] = (u64)({x});",
    "i64": "t[l] = (u64)({x});",
    "f64": "t[l] = f64_bits({x});",
    "f32x2": "((u32*)t)[l] = f32_result({x});",
}
WIDE = frozenset(("u64", "i64", "f64", "f32x2"))


def _function(name: str, row: alu.Row) -> str:
    fields = "abce"
    pointers = "".join(f" const u8* p{v} = SLOT(I->{v});" for v in fields[: len(row.srcs)])
    reads = " ".join(_READ[t].format(v=v, p=f"p{v}") for v, t in zip(fields, row.srcs, strict=False))
    if row.dst == "mask":
        body = f"{reads} put_mask(SLOT(I->d), {row.expr}, m);"
    elif row.dst == "pred":
        loop = f"for (int l = 0; l < LANES; l++) {{ {reads} bits |= (u32)(({row.expr}) != 0) << l; }}"
        body = f"u32 bits = 0; {loop} put_compare(R, I, bits, m);"
    else:
        lanes = "2 * LANES" if row.dst == "f32x2" else "LANES"
        kind = "u64" if row.dst in WIDE else "u32"
        store = "put64" if row.dst in WIDE else "put32"
        loop = f"for (int l = 0; l < {lanes}; l++) {{ {reads} {_WRITE[row.dst].format(x=row.expr)} }}"
        if row.rounding:
            loop = f'fesetround({row.rounding}); {loop} __asm__ volatile("" : : "r"(t) : "memory"); fesetround(FE_TONEAREST);'
        body = f"{kind} t[LANES]; {loop} {store}(SLOT(I->d), t, m);"
    return f"static void {name}(u8* R, const Inst* I, u32 m, u32 cta_rank) {{{pointers} {body} }}\n"


def generated_source() -> tuple[str, list[str]]:
    """Header with the operation numbers, and C units with one function a row: each unit ends with its part of the dispatch table."""
    header = "".join(f"#define OP_{name} {number}\n" for name, number in OP.items()) + f"#define NUM_ALU {len(alu.OPCODES)}\n"
    units = []
    names = list(alu.TABLE)
    size = -(-len(names) // NUM_UNITS)
    for unit in range(NUM_UNITS):
        # Two names with one meaning (mov.b32, mov.u32) share one function.
        bodies: dict[alu.Row, str] = {}
        text, entries = '#include "alu.h"\n', []
        for name in names[unit * size : (unit + 1) * size]:
            row = alu.TABLE[name]
            key = alu.Row(row.dst, row.srcs, row.expr, "", row.rounding)
            if key not in bodies:
                bodies[key] = f"row_{alu.OPCODES[name]}"
                text += f"// {name}: {row.section}\n" + _function(bodies[key], row)
            entries.append(f"  table[{alu.OPCODES[name]}] = {bodies[key]};")
        units.append(text + f"void alu_fill_{unit}(AluFunction* table) {{\n" + "\n".join(entries) + "\n}\n")
    return header, units


def _compiler() -> list[str]:
    try:
        return find_c_compiler()
    except CompileError as error:
        raise NativeBuildError(f"the emulator builds its core with {error}") from None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("flags")), "")


@functools.cache
def library_path() -> Path:
    """Path of the built shared library; builds it when the cache has none that is whole.

    Raises:
        NativeBuildError: no C compiler was found, or it failed.
        CacheError: see `fa4_backend.cache.entry.ensure`.
    """
    header, generated = generated_source()
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".c", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    compiler = _compiler()
    digest.update(f"{header}{generated}{FLAGS}{LINK_FLAGS}{compiler}{_cpu()}".encode())
    name = digest.hexdigest()
    entry = Entry(envs.cache_dir() / "emulator" / f"core-{name[:20]}", (LIBRARY,), {"sources": name})

    def build(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            work = Path(scratch)
            (work / "ops.h").write_text(header)
            for number, text in enumerate(generated):
                (work / f"alu_{number}.c").write_text(text)
            sources = [*(work / f"alu_{n}.c" for n in range(len(generated))), *(SOURCES / u for u in UNITS)]
            _compile(compiler, work, sources, folder / LIBRARY)
        return {}

    return ensure(entry, build) / LIBRARY


def _compile(compiler: list[str], work: Path, sources: list[Path], library: Path) -> None:
    objects = [work / f"{source.stem}.o" for source in sources]
    commands = [[*compiler, *FLAGS, "-c", f"-I{work}", f"-I{SOURCES}", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    _run([*compiler, *LINK_FLAGS, *map(str, objects), "-o", str(library), "-lm"])


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise NativeBuildError(f"the C compiler failed: {' '.join(command)}\n{result.stderr[-4000:]}")


class Region(ctypes.Structure):
    """`Region` of native/core.h."""

    _fields_ = (("base", ctypes.c_uint64), ("end", ctypes.c_uint64), ("read_only", ctypes.c_uint32), ("pad", ctypes.c_uint32))


class ClusterState(ctypes.Structure):
    """`Cluster` of native/core.h."""

    _fields_ = (
        ("smem", ctypes.c_void_p * 16),
        ("smem_bytes", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("regions", ctypes.c_void_p),
        ("num_regions", ctypes.c_uint32),
        ("num_knowledge", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("race", "global_race", "knowledge", "fenced_global")),
        *((name, ctypes.c_uint32) for name in ("number", "first_of_launch", "settled", "gap_begin", "gap_end", "first_start")),
    )


class WarpState(ctypes.Structure):
    """`Warp` of native/core.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("regs", "code", "aux", "counts", "skipped", "cluster", "param", "local")),
        *((name, ctypes.c_uint32) for name in ("param_bytes", "local_bytes", "cta_rank", "warp_in_cluster")),
        *((name, ctypes.c_uint32) for name in ("pc", "active", "alive", "parked", "diverged", "exec", "wait_pc")),
        ("lane_pc", ctypes.c_uint32 * 32),
        *((name, ctypes.c_uint32) for name in ("fault", "fault_lane", "fault_bytes", "fault_space")),
        ("fault_address", ctypes.c_uint64),
        ("steps", ctypes.c_uint64),
        ("last_region", ctypes.c_uint32),
        ("actor", ctypes.c_uint32),
        ("lane_clocks", ctypes.c_uint64 * 32),
        ("pc_now", ctypes.c_uint32),
        ("strong_mask", ctypes.c_uint32),
        ("strong_addresses", ctypes.c_uint64 * 32),
        ("epoch", ctypes.c_uint32),
        ("split", ctypes.c_uint32),
        ("remote_epoch", ctypes.c_uint32 * 32 * 16),
        *((name, ctypes.c_uint32 * 16) for name in ("remote_pc", "early_pc")),
        *((name, ctypes.c_void_p) for name in ("watched", "written", "read_unwritten")),
        ("num_watched", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class Accessor(ctypes.Structure):
    """`Accessor` of native/races.h."""

    _fields_ = (
        ("clock", ctypes.c_void_p),
        *(
            (n, ctypes.c_uint32)
            for n in ("actor", "epoch", "pc", "warp", "through_async", "partial", "strong", "lanes", "non_coherent", "modifies")
        ),
        ("cluster", ctypes.c_void_p),
    )


class Knowledge(ctypes.Structure):
    """`Knowledge` of native/races.h."""

    _fields_ = (*((n, ctypes.c_uint32) for n in ("actor", "epoch", "cluster", "pad")), ("clock", ctypes.c_void_p))


class Conflict(ctypes.Structure):
    """`Conflict` of native/races.h."""

    _fields_ = tuple(
        (n, ctypes.c_uint32)
        for n in ("kind", "cell", *(f"{o}_{f}" for o in ("old", "new") for f in ("actor", "epoch", "pc", "warp", "cluster")))
    )


MAX_CONFLICTS = 64
EV_STEPS, EV_EXIT, EV_HANDLER, EV_FAULT, EV_ALL_PARKED, EV_STRONG, EV_WARP_SYNC = range(7)
FAULTS = (
    "none",
    "address outside every registered buffer",
    "address outside shared memory",
    "misaligned address",
    "address outside local memory",
    "address outside the kernel parameters",
    "write to read-only memory",
    "shared::cta access to the shared memory of another CTA",
    "trap",
    "unknown operation in the core",
    "an instruction that all lanes of a warp must execute (.aligned) has a guard that only some pass",
    "a member mask leaves out the lane that executes, or lanes of one mask have different ones",
)
SPACES = ("generic", "global", "shared", "shared::cluster", "local", "param")


@functools.cache
def core() -> ctypes.CDLL:
    """The loaded native core. Also the library that generated host code finds its launch functions in."""
    library = ctypes.CDLL(str(library_path()), mode=ctypes.RTLD_GLOBAL)
    library.emu_run.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    for name in ("emu_regroup", "emu_park"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    library.emu_shim_set_error.argtypes = (ctypes.c_char_p,)
    library.emu_shim_set_error.restype = None
    pointer, word, flag = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int
    library.emu_race_new.argtypes, library.emu_race_new.restype = (pointer, word, word, word), pointer
    library.emu_race_free.argtypes, library.emu_race_free.restype = (pointer,), None
    library.emu_race_num_conflicts.argtypes, library.emu_race_num_conflicts.restype = (pointer,), word
    library.emu_race_take.argtypes, library.emu_race_take.restype = (pointer, pointer), word
    library.emu_race_access.argtypes = (pointer, flag, word, pointer, word, word, word, pointer, flag)
    library.emu_race_access.restype = None
    library.emu_race_barrier.argtypes, library.emu_race_barrier.restype = (pointer, word, word, flag), None
    library.emu_race_tmem.argtypes = (pointer, word, word, word, word, word, pointer, flag)
    library.emu_race_tmem.restype = None
    library.emu_global_new.argtypes, library.emu_global_new.restype = (), pointer
    for name in ("emu_global_forget", "emu_global_free"):
        getattr(library, name).argtypes, getattr(library, name).restype = (pointer,), None
    library.emu_global_access.argtypes = (pointer, pointer, word, word, pointer, flag)
    library.emu_global_access.restype = None
    return library
