"""Another project's sm90 kernels on the GPU and on the emulator, with the same inputs (the emulator's proof 3).

    python -m tests.device.upstream_sm90 compile --folder objects          # here; needs flash-attn-4 and the DSL, no GPU
    python -m tests.device.upstream_sm90 run --folder objects --out gpu.npz  # on the GPU; needs the DSL's runtime, tvm-ffi, torch
    python -m tests.device.upstream_sm90 emulate --folder objects --out emulated.npz
    python -m tests.device.upstream_sm90 compare --gpu gpu.npz --emulated emulated.npz

The kernels of flash-attn-4 are programs under test: compiled, run, compared; nothing of them is kept here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ARCH, NUM_SMS, FUNCTION = "sm_90a", 132, "upstream_fwd"


@dataclass(frozen=True)
class Case:
    """One call of the forward kernel. `page_size` 0: K and V are contiguous."""

    name: str
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_q_heads: int
    num_kv_heads: int
    is_causal: bool
    page_size: int = 0
    is_varlen: bool = True
    head_dim: int = 128


CASES = {
    c.name: c
    for c in (
        Case("causal", (320, 320), (320, 320), 2, 2, True, is_varlen=False),
        Case("varlen", (130, 1, 77), (130, 200, 77), 4, 2, False),
        Case("paged", (33, 64, 5), (133, 300, 257), 4, 2, True, page_size=128),
    )
}


def tensors(case: Case) -> dict[str, torch.Tensor]:
    """Inputs by name, drawn the same everywhere; outputs filled with NaN."""
    generator = torch.Generator().manual_seed(len(case.name))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    h, hk, d = case.num_q_heads, case.num_kv_heads, case.head_dim
    batch, total_q, total_k = len(case.query_lens), sum(case.query_lens), sum(case.kv_lens)
    out: dict[str, torch.Tensor] = {}
    if not case.is_varlen:
        length = case.query_lens[0]
        out |= {"q": draw(batch, length, h, d), "k": draw(batch, length, hk, d), "v": draw(batch, length, hk, d)}
        out |= {"out": torch.full((batch, length, h, d), torch.nan).bfloat16(), "lse": torch.full((batch, h, length), torch.nan)}
        return out
    out["q"] = draw(total_q, h, d)
    out["cu_seqlens_q"] = torch.tensor([0, *case.query_lens]).cumsum(0).int()
    if case.page_size:
        pages = [-(-n // case.page_size) for n in case.kv_lens]
        num_pages = sum(pages) + 2
        out["k"], out["v"] = (draw(num_pages, case.page_size, hk, d) for _ in range(2))
        order = torch.randperm(num_pages, generator=generator).int()
        table = torch.zeros(batch, max(pages), dtype=torch.int32)
        for i, n in enumerate(pages):
            table[i, :n] = order[sum(pages[:i]) : sum(pages[:i]) + n]
        out["page_table"] = table
        out["seqused_k"] = torch.tensor(case.kv_lens, dtype=torch.int32)
    else:
        out["k"], out["v"] = draw(total_k, hk, d), draw(total_k, hk, d)
        out["cu_seqlens_k"] = torch.tensor([0, *case.kv_lens]).cumsum(0).int()
    out["out"] = torch.full((total_q, h, d), torch.nan).bfloat16()
    out["lse"] = torch.full((h, total_q), torch.nan)
    return out


def arguments(case: Case, data: dict[str, torch.Tensor]) -> list[Any]:
    """Arguments of the compiled function, in the order of upstream's own call for this arch."""
    scale = case.head_dim**-0.5
    lengths = [data.get(n) for n in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table")]
    return [*(data[n] for n in ("q", "k", "v", "out", "lse")), scale, *lengths, None, None, None, None, (None, None), None, None]


def reference(case: Case, data: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64; out and lse in the layout of the outputs."""
    out, lse = torch.zeros(data["out"].shape).double(), torch.zeros(data["lse"].shape).double()
    start_q = start_k = 0
    for i, (m, n) in enumerate(zip(case.query_lens, case.kv_lens, strict=True)):
        if not case.is_varlen:
            q, k, v = (data[name][i] for name in ("q", "k", "v"))
        else:
            q = data["q"][start_q : start_q + m]
            if case.page_size:
                k, v = (data[name][data["page_table"][i].long()].flatten(0, 1)[:n] for name in ("k", "v"))
            else:
                k, v = (data[name][start_k : start_k + n] for name in ("k", "v"))
        repeat = case.num_q_heads // case.num_kv_heads
        q, k, v = (x.double().transpose(0, 1) for x in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)))
        scores = q @ k.transpose(1, 2) * case.head_dim**-0.5
        if case.is_causal:
            scores.masked_fill_(torch.arange(n)[None] > torch.arange(m)[:, None] + n - m, -torch.inf)
        result, log = (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)
        if case.is_varlen:
            out[start_q : start_q + m], lse[:, start_q : start_q + m] = result, log
        else:
            out[i], lse[i] = result, log
        start_q, start_k = start_q + m, start_k + n
    return out.numpy(), lse.numpy()


# -- compile --------------------------------------------------------------------------------------------------------------


class HardwareInfo:
    """Stands in for the DSL's, which asks a driver."""

    def __init__(self, *_: Any) -> None:
        pass

    def get_max_active_clusters(self, size: int) -> int:
        return NUM_SMS // size

    def get_device_multiprocessor_count(self) -> int:
        return NUM_SMS

    def get_l2_cache_size_in_bytes(self) -> int:
        return 50 << 20


def compile_case(case: Case, folder: Path) -> None:
    """Write `<name>.so`, `.ptx` and `.cubin` of one case's kernel."""
    os.environ |= {"CUTE_DSL_ARCH": ARCH, "FLASH_ATTENTION_ARCH": "sm_90", "FLASH_ATTENTION_NUM_SMS": str(NUM_SMS)}
    import cutlass.utils
    import cutlass.utils.hardware_info

    cutlass.utils.HardwareInfo = cutlass.utils.hardware_info.HardwareInfo = HardwareInfo
    import flash_attn.cute.tile_scheduler as tile_scheduler
    from torch._subclasses.fake_tensor import FakeTensorMode

    tile_scheduler.HardwareInfo = HardwareInfo
    from flash_attn.cute import interface

    compiled: list[Any] = []
    dumps = folder / "dump"
    dumps.mkdir(exist_ok=True)
    original = interface.cute.compile

    def keep(*args: Any, options: str, **kwargs: Any) -> Any:
        compiled.append(original(*args, options=f"{options} --keep-ptx --keep-cubin --dump-dir {dumps}", **kwargs))
        return compiled[-1]

    interface.cute.compile = keep
    data = tensors(case)
    with FakeTensorMode():
        fake = {n: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for n, t in data.items()}
        named = {n: fake[n] for n in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "page_table") if n in fake}
        if case.is_varlen:
            named |= {"max_seqlen_q": max(case.query_lens), "max_seqlen_k": max(case.kv_lens)}
        interface._flash_attn_fwd(fake["q"], fake["k"], fake["v"], causal=case.is_causal, return_lse=True, **named)
    interface.cute.compile = original
    if len(compiled) != 1:
        raise RuntimeError(f"{case.name}: expected one kernel, got {len(compiled)}")
    stem = folder / case.name
    compiled[0].export_to_c(str(stem.with_suffix(".o")), function_name=FUNCTION)
    subprocess.run(["gcc", "-shared", "-o", stem.with_suffix(".so"), stem.with_suffix(".o")], check=True)
    stem.with_suffix(".o").unlink()
    stem.with_suffix(".ptx").write_text(compiled[0].__ptx__.rstrip("\0"))
    stem.with_suffix(".cubin").write_bytes(compiled[0].__cubin__)


# -- run ------------------------------------------------------------------------------------------------------------------


def find_runtime() -> str:
    """The DSL's runtime library of this Python."""
    import sysconfig

    for root in (*os.environ.get("PYTHONPATH", "").split(":"), sysconfig.get_paths()["purelib"]):
        found = list(Path(root).glob("nvidia_cutlass_dsl/cu13/lib/libcute_dsl_runtime.so")) if root else []
        if found:
            return str(found[0])
    raise FileNotFoundError("libcute_dsl_runtime.so: expected on PYTHONPATH or in site-packages")


def run_on_gpu(case: Case, folder: Path) -> dict[str, np.ndarray]:
    import tvm_ffi

    ctypes.CDLL(find_runtime(), ctypes.RTLD_GLOBAL)
    data = {n: t.cuda() for n, t in tensors(case).items()}
    tvm_ffi.load_module(str(folder / f"{case.name}.so"))[FUNCTION](*arguments(case, data))
    torch.cuda.synchronize()
    return results(data)


def run_on_emulator(case: Case, folder: Path, seed: int | None = None) -> dict[str, np.ndarray]:
    from fa4_backend import emulator
    from fa4_backend.emulator.kernels import load_object

    stem = folder / case.name
    emulator.register_program(stem.with_suffix(".ptx").read_text(), stem.with_suffix(".cubin").read_bytes())
    function = load_object(stem.with_suffix(".so"))[FUNCTION]
    data = tensors(case)
    with emulator.session(arch=ARCH, num_sms=NUM_SMS, seed=seed) as session:
        session.run(function, *arguments(case, data))
        if session.report.races:
            raise RuntimeError(f"{case.name}: {session.report.races[:3]}")
    return results(data)


def results(data: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {"out": data["out"].float().cpu().numpy(), "lse": data["lse"].cpu().numpy()}


def compare(case: Case, gpu: dict[str, np.ndarray], emulated: dict[str, np.ndarray]) -> dict[str, float]:
    """Errors of both against float64, and against each other."""
    out, lse = reference(case, tensors(case))
    rounding = np.abs(torch.from_numpy(out).bfloat16().double().numpy() - out).max()
    finite = np.isfinite(lse)
    facts = {"rounding_of_out": float(rounding)}
    for name, result in (("gpu", gpu), ("emulated", emulated)):
        facts[f"{name}_out_error"] = float(np.abs(result["out"] - out).max())
        facts[f"{name}_lse_error"] = float(np.abs(result["lse"] - lse)[finite].max())
    facts["out_bits_equal"] = float((gpu["out"] == emulated["out"]).mean())
    facts["out_difference"] = float(np.abs(gpu["out"] - emulated["out"]).max())
    facts["lse_difference"] = float(np.abs(gpu["lse"] - emulated["lse"])[finite].max())
    facts["lse_bits_equal"] = float((gpu["lse"] == emulated["lse"]).mean())
    return facts


@contextmanager
def saved(path: Path) -> Iterator[dict[str, np.ndarray]]:
    arrays: dict[str, np.ndarray] = {}
    yield arrays
    np.savez_compressed(path, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("compile", "run", "emulate", "compare"))
    parser.add_argument("--folder", type=Path, default=Path("upstream_objects"))
    parser.add_argument("--case", nargs="*", default=list(CASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gpu", type=Path)
    parser.add_argument("--emulated", type=Path)
    options = parser.parse_args()
    cases = [CASES[name] for name in options.case]
    if options.action == "compile":
        options.folder.mkdir(parents=True, exist_ok=True)
        for case in cases:
            compile_case(case, options.folder)
    elif options.action == "compare":
        gpu, emulated = np.load(options.gpu), np.load(options.emulated)
        pick = lambda arrays, name: {key: arrays[f"{name}/{key}"] for key in ("out", "lse")}  # noqa: E731
        print(json.dumps({c.name: compare(c, pick(gpu, c.name), pick(emulated, c.name)) for c in cases}, indent=1))
    else:
        run = run_on_gpu if options.action == "run" else run_on_emulator
        with saved(options.out) as arrays:
            for case in cases:
                result = run(case, options.folder)
                arrays |= {f"{case.name}/{key}": value for key, value in result.items()}
                out, lse = reference(case, tensors(case))
                errors = np.abs(result["out"] - out).max(), np.nanmax(np.abs(result["lse"] - lse))
                print(f"{case.name}: out error {errors[0]:.5f}, lse error {errors[1]:.2e}")


if __name__ == "__main__":
    main()
