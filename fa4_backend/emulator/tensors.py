"""Host tensors that claim to lie on cuda:0, so that generated host code accepts them. Nothing is copied."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_KDL_CUDA = 2


class _ClaimsCuda:
    """DLPack producer whose tensor says cuda:0. The memory stays the host tensor's."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return _KDL_CUDA, 0

    def __dlpack__(self, **_: Any) -> Any:
        capsule = torch.utils.dlpack.to_dlpack(self.tensor)
        # struct DLTensor { void* data; DLDevice { int32 type; int32 id; } ... } is the first member of DLManagedTensor.
        device = (ctypes.c_int32 * 2).from_address(_get_pointer(capsule, b"dltensor") + 8)
        device[0], device[1] = _KDL_CUDA, 0
        return capsule


def host_tensor(value: Any) -> torch.Tensor:
    """A torch CPU tensor over the same memory."""
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
        raise TypeError(f"expected a numpy array or a torch CPU tensor, got {type(value).__name__}")
    return tensor.detach()


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """(address, bytes) from the first to the last element."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), span * tensor.element_size()


def runtime_extent(value: Any) -> tuple[int, int] | None:
    """(address, bytes) of a tensor that `cutlass.cute.runtime.from_dlpack` made; None for anything else."""
    if not all(hasattr(value, name) for name in ("data_ptr", "element_type", "shape", "stride")) or not isinstance(value.data_ptr, int):
        return None
    span = sum((int(n) - 1) * int(s) for n, s in zip(value.shape, value.stride, strict=True)) + 1
    return value.data_ptr, -(-span * value.element_type.width // 8)


def is_plain_function(compiled: Any) -> bool:
    """Whether `cute.compile` made it without tvm-ffi."""
    names = [kind.__name__ for kind in type(compiled).__mro__]
    return "JitCompiledFunction" in names and not any(name.startswith("TVMFFI") for name in names)


def device_tensor(tensor: torch.Tensor) -> Any:
    """The `tvm_ffi.Tensor` that a compiled callable takes in place of a CUDA tensor."""
    import tvm_ffi

    return tvm_ffi.from_dlpack(_ClaimsCuda(tensor), require_alignment=0, require_contiguous=False)


def poison(tensor: torch.Tensor) -> None:
    """Fill with a NaN (or, for integers, an odd number) that kernels do not write by chance."""
    _words(tensor).fill_(_POISON[tensor.element_size()])


def count_poison(tensor: torch.Tensor) -> int:
    """Elements that still hold what `poison` wrote."""
    return int((_words(tensor) == _POISON[tensor.element_size()]).sum())


_POISON = {1: 0x7F, 2: 0x7FE7, 4: 0x7FE7A5C3, 8: 0x7FF7A5C37FE7A5C3}


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
