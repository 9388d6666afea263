"""Kernels that faults are planted in, each with one case, and how a fault gets into a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fa4_backend import emulator
from fa4_backend.emulator.host_calls import handles
from fa4_backend.emulator.programs import LoadedKernel, forget_programs


@dataclass(frozen=True)
class Target:
    """A kernel with one case: `run(seed)` gives its output tensors and the emulator's report."""

    name: str
    ptx: str  # as it was compiled
    run: Callable[[int | None], tuple[list[torch.Tensor], emulator.Report]]


def own_prefill(name: str, arch: str, num_kv_heads: int, head_dim: int) -> Target:
    """This package's prefill kernel for `arch`: three sequences over pages, causal.

    One CTA (or pair) has all tiles, so that every ring wraps. The last sequence has a single whole KV tile: only the epilogue's own
    barriers order it behind the tile before.
    """
    emulator.install()  # before the compiler is imported: objects bind to the first launch functions they find
    from fa4_backend.compile_cache import ensure_object
    from tests.support.emulated_prefill import run_built
    from tests.support.paged_case import PagedCase

    case = PagedCase(
        query_lens=(300, 200, 70),
        kv_lens=(500, 450, 128),
        num_q_heads=2,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=128,
        page_size=64,
        arch=f"emulated-{arch}",
    )
    built = case.build()
    library = ensure_object(case.plan(num_sms=1).kernels.prefill)

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        result = run_built(built, num_ctas=1, seed=seed)
        return [result.out.clone(), result.lse.clone()], result.report

    return Target(name, library.with_suffix(".ptx").read_text(), run)


def own_decode(arch: str) -> Target:
    """This package's decode kernel for `arch`: rows split between CTAs over global memory, several KV tiles a CTA, two entries in one."""
    emulator.install()
    from fa4_backend.compile_cache import ensure_object
    from tests.support.emulated_decode import run_decode
    from tests.support.paged_case import PagedCase

    case = PagedCase(
        (4, 1, 3), (700, 65, 300), num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=48, decode_query_len=4, arch=f"emulated-{arch}"
    )
    plan = case.plan(num_sms=3)
    key = plan.kernels.decode
    assert key is not None, case
    library = ensure_object(key)

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        result = run_decode(case, seed=seed)
        return [*(rows.clone() for rows in result.rows), result.work.arrivals.clone()], result.reports[1]

    return Target(f"{arch} decode", library.with_suffix(".ptx").read_text(), run)


def upstream(name: str, folder: Path) -> Target:
    """A kernel of flash-attn-4, from the objects that `tests.device.upstream_sm90 compile` wrote."""
    from fa4_backend.emulator.kernels import load_object
    from tests.device.upstream_sm90 import ARCH, CASES, FUNCTION, NUM_SMS, arguments, tensors

    # Long enough for the rings of two K and two V tiles to wrap twice.
    stem, case = folder / name, replace(CASES[name], query_lens=(640,), kv_lens=(640,), num_q_heads=1, num_kv_heads=1)
    ptx, cubin = stem.with_suffix(".ptx").read_text(), stem.with_suffix(".cubin").read_bytes()
    emulator.register_program(ptx, cubin)
    function = load_object(stem.with_suffix(".so"))[FUNCTION]

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        data = tensors(case)
        with emulator.session(arch=ARCH, num_sms=NUM_SMS, seed=seed) as session:
            session.run(function, *arguments(case, data))
        return [data["out"], data["lse"]], session.report

    return Target(f"flash-attn-4 sm90 {name}", ptx, run)


def load_target(name: str, folder: Path) -> Target:
    own = {
        "sm100_prefill": lambda: own_prefill("sm_100a prefill", "sm_100a", num_kv_heads=1, head_dim=128),
        # The head dimension that runs as pairs.
        "sm100_pair": lambda: own_prefill("sm_100a prefill, CTA pairs", "sm_100a", num_kv_heads=1, head_dim=192),
        # 128 tokens a tile: with two heads packed, every key after the 64th of the second masked tile is masked.
        "sm90_prefill": lambda: own_prefill("sm_90a prefill", "sm_90a", num_kv_heads=2, head_dim=128),
        "sm90_decode": lambda: own_decode("sm_90a"),
    }
    return own[name]() if name in own else upstream(name.removeprefix("upstream_"), folder)


@contextmanager
def planted(target: Target, ptx: str) -> Iterator[None]:
    """Launches of the target's kernel run `ptx` inside; it must have run before, so that its image is loaded."""
    loaded = [h for h in handles if isinstance(h, LoadedKernel) and h.ptx == target.ptx]
    assert loaded, f"{target.name}: no loaded kernel has this PTX"
    for kernel in loaded:
        kernel.ptx = ptx
    try:
        yield
    finally:
        for kernel in loaded:
            kernel.ptx = target.ptx
        # Parsed programs are kept for the life of the process: too many for hundreds of mutants.
        forget_programs()
