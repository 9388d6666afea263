"""Makes a bundle of SGLang 0.5.23 for a GPU host without a package index: dense models on one H100, with `fa3` and `triton` beside ours.

    python scripts/make_sglang_bundle.py --out .gpu/sglang [--work FOLDER]      # Linux x86-64, pip, xz-capable Python, binutils

    # there (CPython 3.12, torch 2.11.0+cu130, triton 3.6.0, transformers 5.17, nvcc, ninja):
    bash .gpu/sglang/install.sh SITE && export PYTHONPATH=SITE SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1
    export SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python       # the Rust one reads tensors as torch 2.14 lays them out

SGLang 0.5.23 asks for torch 2.14.1, and its `sglang-kernel` 0.4.10 is built against that. 0.4.6 is the last one built against torch 2.11:
the interface of its FlashAttention 3 is 0.4.10's, the Python of both differs in names that a dense model does not call. Other kernels
SGLang compiles on the host when they are first called (nvcc), and with no FlashInfer it samples in torch.

One line is changed (PATCHES): a Llama's MLP takes its plain products, not a fused kernel that is written in CuTe DSL.

Left out, each missing with an ImportError or CUDA's "no kernel image" where it is called: other chips' code, FlashAttention 3 for other
heads than 64 and 128 and for float16, most model classes, diffusion, the HTTP server's Rust parts, grammars other than xgrammar.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import lzma
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20
LIMIT = 58 * MIB  # a transfer takes 64 MiB, the repository included
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 26, 24, 17, 12, 5)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
WHEELS = """
sglang==0.5.23 sglang-kernel==0.4.6 apache-tvm-ffi==0.1.15.post2
annotated-types==0.8.0 compressed-tensors==0.18.0 dill==0.4.1 distro==1.9.0 fastapi==0.136.3 gguf==0.19.0 interegular==0.3.3 ipython==9.18.1
jiter==0.19.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 loguru==0.7.3 msgspec==0.22.0 nvidia-ml-py==13.615.71 openai==2.54.0
orjson==3.13.0 partial-json-parser==0.2.1.1.post7 pybase64==1.5.1 pydantic==2.14.3 pydantic-core==2.50.4 pygments==2.21.0
python-multipart==0.0.34 pyzmq==27.3.0 referencing==0.37.0 rpds-py==2026.9.1 setproctitle==1.3.8 sniffio==1.3.1 starlette==1.10.0
traitlets==5.16.1 typing-inspection==0.4.5 uvicorn==0.54.0 uvloop==0.23.0 watchfiles==1.3.0 xgrammar==0.2.7
""".split()
MODELS = "__init__ registry utils llama llama_eagle llama_eagle3 gemma2 gemma3_causal gpt_oss mistral llava qwen2 qwen3 deepseek_v2".split()
DROP = [
    "*.dist-info/RECORD", "*.dist-info/licenses/*", "*.dist-info/sboms/*", "*.pyi", "example.py",
    "sglang/multimodal_gen/*", "sglang/test/*", "sglang/benchmark/*", "sglang/srt/rust_extensions/*.so", "sglang/srt/models/*.py",
    "sglang/kernels/jit/csrc/diffusion/*", "sgl_kernel/sm100/*", "sgl_kernel/infllm_ops.*", "sgl_kernel/flashmla_ops.*",
    "tvm_ffi/3rdparty/libbacktrace/*", "tvm_ffi/cython/*", "tvm_ffi/src/*",
]  # fmt: skip
# xgrammar finds its library by its list of files.
KEEP = [
    *(f"sglang/srt/models/{name}.py" for name in MODELS),
    "sglang/srt/models/deepseek_common/*",
    "sglang/test/kits/*",
    "sglang/test/__init__.py",
    "xgrammar-*.dist-info/RECORD",
]
FLASH, COMMON = "sgl_kernel/flash_ops.abi3.so", "sgl_kernel/sm90/common_ops.abi3.so"
# Which of FlashAttention 3's objects stay: heads of Q and K, heads of V, elements.
FLASH_KEPT = {(dim, dim, dtype) for dim in ("64", "128") for dtype in ("bfloat16_t", "float_e4m3_t")}
VARIANTS = 10  # objects of each: with pages or not, parts, soft cap, packed heads
CONTAINER, CONTAINER_HEADER = bytes.fromhex("50ed55ba01001000"), 16  # magic, version 1, bytes of the header; the payload's size follows
MAINLOOP = re.compile(r"CollectiveMainloopFwd(Sm\d+)<.*?cute::tuple<cute::C<\d+>, cute::C<\d+>, cute::C<(\d+)> *>, (\d+), cutlass::(\w+)")
# SGLang's Llama asks a kernel in CuTe DSL whether it serves the MLP's two products, and there is no DSL: it is told that it does not, for
# every attention backend alike.
PATCHES = {"sglang/srt/layers/dual_gemm.py": "\n\nDualGemm._select_mode = lambda self, *layers: None\n"}
SITECUSTOMIZE = """# Makes this folder behave like a folder of packages: its .pth files are honoured.
import os, site
site.addsitedir(os.path.dirname(os.path.abspath(__file__)))
"""

# Put beside what it unpacks: standard library only.
UNPACK = """import json, lzma, pathlib, sys, tarfile
here, site = pathlib.Path(__file__).parent, pathlib.Path(sys.argv[1])
with tarfile.open(here / "files.tar.xz") as tar:
    tar.extractall(site, filter="data")
for path, pieces in json.loads((here / "pieces.json").read_text()).items():
    with open(site / path, "wb") as library:
        for name, ranges in pieces.items():
            data = lzma.decompress((here / name).read_bytes())
            for offset, size in ranges:
                library.seek(offset)
                library.write(data[:size])
                data = data[size:]
print("SGLang is in", site)
"""
INSTALL = """#!/bin/bash
# usage: bash install.sh SITE, then: export PYTHONPATH=SITE SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1
exec python3 "$(dirname "$0")/unpack.py" "${1:?the folder to unpack into}"
"""


class BundleError(Exception):
    """The bundle could not be made; the text says what was expected and what was found."""


class Entry(NamedTuple):
    """Code for one architecture in a fat binary's container: header and payload together."""

    is_cubin: bool
    arch: int
    data: bytes


def fetch(folder: Path) -> list[Path]:
    """Download the wheels that `folder` lacks. Raises BundleError when one cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [wheel for wheel in WHEELS if not find_wheel(folder, wheel)]
    if missing:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
        command += ["--implementation", "cp", "--dest", str(folder), *(f"--platform={platform}" for platform in PLATFORMS), *missing]
        subprocess.run(command, check=True)
    found = {wheel: find_wheel(folder, wheel) for wheel in WHEELS}
    lacking = [wheel for wheel, path in found.items() if path is None]
    if lacking:
        raise BundleError(f"expected a wheel of each package, got none of {', '.join(lacking)}")
    return [path for path in found.values() if path is not None]


def find_wheel(folder: Path, requirement: str) -> Path | None:
    """The wheel of "name==version" in `folder`."""
    name, version = requirement.split("==")
    return next(
        (path for path in folder.glob("*.whl") if path.name.lower().startswith(f"{name.replace('-', '_')}-{version}-".lower())), None
    )


def lay_out(wheels: list[Path], site: Path) -> None:
    """Unpack wheels into an empty folder as an installation would, without what is dropped."""
    shutil.rmtree(site, ignore_errors=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                top, _, rest = member.filename.partition("/")
                path = member.filename
                if top.endswith(".data"):
                    scheme, _, path = rest.partition("/")
                    path = path if scheme in ("purelib", "platlib") else ""
                if not path or member.is_dir() or (matches(path, DROP) and not matches(path, KEEP)):
                    continue
                (site / path).parent.mkdir(parents=True, exist_ok=True)
                (site / path).write_bytes(archive.read(member))
    for path, text in PATCHES.items():
        with (site / path).open("a") as module:
            module.write(text)
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE)


def matches(path: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def fatbin_section(binary: bytes | bytearray) -> tuple[int, int]:
    """Offset and size of the section of a 64-bit ELF file that holds GPU code. Raises BundleError when it has none."""
    (table,) = struct.unpack_from("<Q", binary, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", binary, 58)
    rows = [struct.unpack_from("<IIQQQQ", binary, table + index * entry_size) for index in range(count)]
    names = rows[names_index][4]
    for name, _, _, _, offset, size in rows:
        if binary[names + name : names + name + 11] == b".nv_fatbin\0":
            return offset, size
    raise BundleError("expected a section .nv_fatbin, got none")


def containers(binary: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Where each container's payload starts, and its size."""
    position, size = fatbin_section(binary)
    end = position + size
    while (position := binary.find(CONTAINER, position, end)) >= 0:
        (payload,) = struct.unpack_from("<Q", binary, position + 8)
        yield position + CONTAINER_HEADER, payload
        position += CONTAINER_HEADER + payload


def entries(binary: bytes | bytearray, start: int, size: int) -> list[Entry]:
    """What a container holds."""
    found, position = [], start
    while position + 64 <= start + size:
        kind, _, header, payload = struct.unpack_from("<HHIQ", binary, position)
        (arch,) = struct.unpack_from("<I", binary, position + 28)
        found.append(Entry(kind == 2, arch, bytes(binary[position : position + header + payload])))
        position += header + payload
    return found


def flash_kind(entry: Entry) -> tuple[str, str, str, str] | None:
    """(generation, heads of Q and K, heads of V, elements) of an object of FlashAttention 3; None: it holds something else."""
    kernel = re.search(rb"\.text\.(_ZN7cutlass13device_kernel\w+)", entry.data)
    if kernel is None:
        return None
    name = subprocess.run(["c++filt"], input=kernel.group(1), stdout=subprocess.PIPE, check=True).stdout.decode()
    mainloop = MAINLOOP.search(name)
    return None if mainloop is None else (mainloop.group(1), mainloop.group(2), mainloop.group(3), mainloop.group(4))


def is_compressed(entry: Entry) -> bool:
    """Whether nvcc compressed the code, so that it tells nothing of itself."""
    (header,) = struct.unpack_from("<I", entry.data, 4)
    return entry.data[header : header + 4] != b"\x7fELF"


def slim(path: Path) -> None:
    """Keep a library's code for sm_90, of FlashAttention 3 the objects named in FLASH_KEPT; sizes and addresses stay. What is left of an
    emptied container is the smallest piece of another chip's code: a driver wants a well-formed one.

    Raises:
        BundleError: the library holds other objects than this recipe knows.
    """
    library = bytearray(path.read_bytes())
    is_flash, seen = path.name == Path(FLASH).name, dict.fromkeys(FLASH_KEPT, 0)
    listed = [(start, size, entries(library, start, size)) for start, size in containers(library)]
    filler = min((entry.data for *_, found in listed for entry in found if entry.is_cubin and entry.arch != 90), key=len)
    for start, size, found in listed:
        kept = [entry for entry in found if entry.is_cubin and entry.arch == 90]
        if is_flash and kept:
            kind = flash_kind(kept[0])
            if kind is not None and kind[0] == "Sm90" and kind[1:] in FLASH_KEPT:
                seen[kind[1:]] += 1
            elif kind is not None or is_compressed(kept[0]):
                kept = []
        data = b"".join(entry.data for entry in kept) or filler
        if len(data) <= size:
            library[start : start + size] = data.ljust(size, b"\0")
            struct.pack_into("<Q", library, start - CONTAINER_HEADER + 8, len(data))
    if is_flash and set(seen.values()) != {VARIANTS}:
        raise BundleError(f"{path.name}: expected {VARIANTS} objects of each kind, got {seen}")
    path.write_bytes(library)


def pack(site: Path, out: Path) -> None:
    """Compress a folder: GPU code and host code of the big library apart, everything else in one tar."""
    out.mkdir(parents=True, exist_ok=True)
    library = (site / FLASH).read_bytes()
    start, size = fatbin_section(library)
    end = start + size
    # Between containers' payloads are zeros.
    gpu = [(offset - CONTAINER_HEADER, CONTAINER_HEADER + payload) for offset, payload in containers(library)]
    ranges = {"gpu.xz": gpu, "host.xz": [(0, start), (end, len(library) - end)]}
    parts = {name: b"".join(library[offset : offset + length] for offset, length in pieces) for name, pieces in ranges.items()}
    with ThreadPoolExecutor() as pool:  # compressing leaves the interpreter to others
        # Machine code of this chip comes in instructions of 16 bytes.
        jobs = [
            pool.submit(compress, parts["gpu.xz"], out / "gpu.xz", lc=0, lp=4, pb=4),
            pool.submit(compress, parts["host.xz"], out / "host.xz", is_x86=True),
            pool.submit(compress, tar_of(site, left_out=site / FLASH), out / "files.tar.xz", lc=4),
        ]
    for job in jobs:
        job.result()  # raises what the job raised
    (out / "pieces.json").write_text(json.dumps({FLASH: ranges}))
    (out / "unpack.py").write_text(UNPACK)
    (out / "install.sh").write_text(INSTALL)


def tar_of(site: Path, left_out: Path) -> bytes:
    """All files of a folder but one, like next to like."""
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted((path for path in site.rglob("*") if path.is_file()), key=lambda path: (path.suffix, str(path))):
            if path != left_out:
                tar.add(path, str(path.relative_to(site)))
    return buffer.getvalue()


def compress(data: bytes, out: Path, *, is_x86: bool = False, **options: int) -> None:
    """Write `data` as xz, with a window that holds all of it, or 192 MiB: the libraries repeat themselves over long distances."""
    window = min(max(1 << 20, len(data)), 192 * MIB)
    chain: list[dict[str, int]] = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": window, **options}]
    before: list[dict[str, int]] = [{"id": lzma.FILTER_X86}] if is_x86 else []
    out.write_bytes(lzma.compress(data, check=lzma.CHECK_CRC32, filters=before + chain))


def main() -> int:
    """Make the bundle; 1 when it is larger than a transfer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="keeps wheels and the unpacked folder; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        site = work / "site"
        lay_out(fetch(work / "wheels"), site)
        for path in (FLASH, COMMON):
            subprocess.run(["strip", "--strip-all", site / path], check=True)
            slim(site / path)
        pack(site, options.out)
    sizes = {path.name: path.stat().st_size for path in options.out.iterdir()}
    print({name: f"{size / MIB:.1f} MiB" for name, size in sizes.items()}, f"{sum(sizes.values()) / MIB:.1f} MiB together")
    return int(sum(sizes.values()) > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
