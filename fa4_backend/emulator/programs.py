"""Programs: which PTX a loaded kernel image was made from, parsed and lowered once for the life of the process."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from fa4_backend import envs
from fa4_backend.compile import elf_bytes
from fa4_backend.emulator.contraction import NEVER, Contraction, choose
from fa4_backend.emulator.errors import LaunchError, UnknownProgram
from fa4_backend.emulator.lowered_program import Program
from fa4_backend.emulator.lowering import lower
from fa4_backend.emulator.memory import host_array
from fa4_backend.emulator.parser import parse_module
from fa4_backend.emulator.syntax import Kernel

_ptx_of_cubin: dict[str, str] = {}
_kernels: dict[str, dict[str, Kernel]] = {}
_programs: dict[tuple[str, str, Contraction], Program] = {}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def register_program(ptx: str, cubin: bytes) -> None:
    """Tell the emulator which PTX a cubin was made from. `Session.run` does this for compiled functions that carry both."""
    _ptx_of_cubin[_digest(cubin)] = ptx


def load_program(ptx: str, kernel: str | None = None, contraction: Contraction = NEVER) -> Program:
    """Parse and lower one kernel of a PTX text (the only one, when `kernel` is None); kept for the life of the process."""
    text = _digest(ptx.encode())
    if text not in _kernels:
        _kernels[text] = parse_module(ptx)
    name = kernel or next(iter(_kernels[text]))
    if name not in _kernels[text]:
        raise LaunchError(f"no kernel {name} in the PTX; it has {', '.join(_kernels[text])}")
    key = text, name, contraction
    if key not in _programs:
        parsed = _kernels[text][name]
        _programs[key] = lower(parsed, choose(parsed, contraction))
    return _programs[key]


def read_cubin(address: int) -> bytes:
    """The ELF image at an address: bare, or the first entry of a fat binary (16-byte header; entry: kind, version, header size, size)."""
    head = host_array(address, 64).tobytes()
    if head[:4] == b"\x50\xed\x55\xba":
        address += 16 + struct.unpack_from("<I", head, 20)[0]
        head = host_array(address, 64).tobytes()
    if head[:4] != b"\x7fELF":
        raise UnknownProgram(f"the kernel image holds no plain cubin: {head[:8].hex()}")
    return host_array(address, elf_bytes(head)).tobytes()


def known_ptx(cubin: bytes) -> str | None:
    """The PTX that a cubin was made from, as registered or as the DSL kept it."""
    return _ptx_of_cubin.get(_digest(cubin)) or _find_dumped(cubin)


def forget_programs() -> None:
    """Drop what was parsed: for processes that run hundreds of variants of a kernel."""
    _kernels.clear()
    _programs.clear()


def _find_dumped(cubin: bytes) -> str | None:
    """PTX that the DSL kept beside the same cubin in its dump directory (CUTE_DSL_KEEP=ptx,cubin)."""
    for path in envs.dsl_dump_dir().glob("*.cubin"):
        ptx = path.with_suffix(".ptx")
        if ptx.exists() and path.stat().st_size == len(cubin) and path.read_bytes() == cubin:
            return ptx.read_text()
    return None


def register_count(cubin: bytes, kernel: str) -> int | None:
    """Registers a thread at launch, from the cubin's .nv.info (attribute 0x2f: symbol index, count)."""
    try:
        (section_table,) = struct.unpack_from("<Q", cubin, 40)
        entry, count, names_index = struct.unpack_from("<HHH", cubin, 58)
        headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, section_table + i * entry) for i in range(count)]
        sections = {cubin[headers[names_index][4] + h[0] :].split(b"\0", 1)[0].decode(): h for h in headers}
        info, symbols, strings = sections[".nv.info"], sections[".symtab"], sections[".strtab"]
    except (struct.error, KeyError, IndexError):
        return None
    position, end = info[4], info[4] + info[5]
    while position + 4 <= end:
        form, attribute, size = struct.unpack_from("<BBH", cubin, position)
        position += 4
        if form != 4:
            continue
        if attribute == 0x2F:
            symbol, registers = struct.unpack_from("<II", cubin, position)
            (name_at,) = struct.unpack_from("<I", cubin, symbols[4] + 24 * symbol)
            if cubin[strings[4] + name_at :].split(b"\0", 1)[0].decode() == kernel:
                return registers
        position += size
    return None


@dataclass(slots=True)
class LoadedKernel:
    """What host code gets a handle of: one kernel of a loaded image, and the shared memory that it may ask for."""

    ptx: str
    cubin: bytes
    name: str
    max_dynamic_smem: int = 49152
    non_portable: bool = False  # clusters of more than 8 CTAs are allowed
