"""flash-attn-4's own kernels on the emulator: compiled without a GPU by its own code, run on CPU tensors.

    def causal(session):                                   # fa4 emulate my_module:causal --arch sm_90a
        q, k, v = (torch.randn(1, 256, 2, 128).bfloat16() for _ in range(3))
        out, lse = flash_attention.forward(session, q, k, v, causal=True, return_lse=True)[:2]

Needs the package flash-attn-4. A process serves one arch: flash-attn-4 and the DSL read it from the environment once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from fa4_backend import envs
from fa4_backend.emulator.host_calls import install
from fa4_backend.emulator.session import Session

NUM_SMS = 148  # that flash-attn-4 plans for


class _Hardware:
    """Stands in for cutlass.utils.HardwareInfo, which asks the driver."""

    def __init__(self, *_: Any) -> None: ...

    def get_max_active_clusters(self, cluster_size: int) -> int:
        return NUM_SMS // cluster_size

    def get_device_multiprocessor_count(self) -> int:
        return NUM_SMS

    def get_l2_cache_size_in_bytes(self) -> int:
        return 126 << 20


class _EmulatedCache(dict):
    """A compile cache whose entries run on the emulator."""

    def __init__(self, entries: Any, emu: Session) -> None:
        super().__init__(entries)
        self.emu = emu

    def __getitem__(self, key: Any) -> Callable[..., Any]:
        compiled = super().__getitem__(key)
        return lambda *args: self.emu.run(compiled, *args)


def prepare(arch: str) -> None:
    """Set the process up for `arch` (one arch a process: upstream and the DSL read it once)."""
    os.environ["CUTE_DSL_ARCH"] = arch
    os.environ["FLASH_ATTENTION_ARCH"] = arch.rstrip("a")
    os.environ["FLASH_ATTENTION_NUM_SMS"] = str(NUM_SMS)
    os.environ["CUTE_DSL_KEEP"] = "ptx,cubin"
    folder = envs.set_default("CUTE_DSL_DUMP_DIR", os.path.join(tempfile.gettempdir(), "fa4_backend_dump"))
    os.makedirs(folder, exist_ok=True)
    install()


@contextmanager
def _patched(caches: dict[str, Any]) -> Any:
    import cutlass.utils
    import cutlass.utils.hardware_info
    import flash_attn.cute.interface as interface
    import flash_attn.cute.tile_scheduler as tile_scheduler

    with ExitStack() as stack:
        for module in (cutlass.utils, cutlass.utils.hardware_info, tile_scheduler):
            stack.enter_context(mock.patch.object(module, "HardwareInfo", _Hardware))
        for name, cache in caches.items():
            stack.enter_context(mock.patch.object(getattr(interface, name), "compile_cache", cache))
        yield interface


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return change(value) if isinstance(value, torch.Tensor) else value


def forward(emu: Session, *args: Any, **kwargs: Any) -> Any:
    """`flash_attn.cute.interface._flash_attn_fwd` on CPU tensors: compiled with fake CUDA tensors, then run on `emu`."""
    prepare(emu.arch)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with _patched({}) as interface:
        names = [n for n in dir(interface) if hasattr(getattr(interface, n), "compile_cache")]
        with FakeTensorMode():
            fake = lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")  # noqa: E731
            interface._flash_attn_fwd(*(_map(a, fake) for a in args), **{k: _map(v, fake) for k, v in kwargs.items()})
        caches = {n: _EmulatedCache(_entries(getattr(interface, n).compile_cache), emu) for n in names}
    with _patched(caches) as interface:
        with mock.patch.object(torch.Tensor, "is_cuda", True, create=True):  # upstream checks; the tensors stay on the CPU
            return interface._flash_attn_fwd(*args, **kwargs)


def _entries(cache: Any) -> Any:
    return cache if isinstance(cache, dict) else getattr(cache, "cache", cache.__dict__)
