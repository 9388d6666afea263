"""One fact of one argument each: raise `ValueError` with the argument's name, what was expected and what it got."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING

from fa4_backend.memory_spans import overlaps_itself

if TYPE_CHECKING:
    import torch


def expect_tensors(tensors: dict[str, object]) -> None:
    """Tensors or None, by name."""
    import torch

    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def expect_whole(name: str, value: object) -> None:
    """A whole number of the host."""
    # numpy's integers are whole numbers of the host too: engines keep lengths in numpy arrays.
    if type(value) is not int and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise ValueError(f"{name}: expected a whole number as a Python int, got {_describe_value(value)}")


def expect_number(name: str, value: object) -> None:
    """A number of the host."""
    if not isinstance(value, (float, int)) or isinstance(value, bool):
        raise ValueError(f"{name}: expected a Python float, got {_describe_value(value)}")


def _describe_value(value: object) -> str:
    # A tensor's value may lie on the device: to print it would wait for it.
    return f"a {type(value).__name__}" if hasattr(value, "shape") else f"{value!r} ({type(value).__name__})"


def expect_one_place_each(name: str, tensor: torch.Tensor) -> None:
    """Elements of what is written lie at addresses of their own."""
    if overlaps_itself(tensor.shape, tensor.stride()):
        raise ValueError(f"{name}: expected each element at an address of its own, got strides {tensor.stride()}")


def expect_shape(name: str, tensor: torch.Tensor, expected: tuple[int | None, ...]) -> None:
    """`expected`: an extent each; None: any."""
    if tensor is None:
        raise ValueError(f"{name}: expected a tensor, got None")
    fits = tensor.dim() == len(expected) and all(want is None or want == got for want, got in zip(expected, tensor.shape, strict=True))
    if not fits:
        want = ", ".join("any" if n is None else str(n) for n in expected)
        raise ValueError(f"{name}: expected shape ({want}), got {tuple(tensor.shape)}")


def expect_dtype(name: str, tensor: torch.Tensor, expected: str) -> None:
    """`expected`: a name of torch."""
    got = str(tensor.dtype).removeprefix("torch.")
    if got != expected:
        raise ValueError(f"{name}: expected dtype {expected}, got {got}")


def expect_device(name: str, tensor: torch.Tensor, device: torch.device, of: str) -> None:
    """The device of something else, which `of` names."""
    # "cuda" names the current device, as torch takes it; a tensor always has an index.
    if tensor.device.type != device.type or (device.index is not None and tensor.device.index not in (None, device.index)):
        raise ValueError(f"{name}: expected a tensor on {device} as {of}, got {tensor.device}")


def expect_dense(name: str, tensor: torch.Tensor) -> None:
    """Elements of the last dimension lie one behind the other."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: expected last stride 1, got {tensor.stride(-1)}")


def expect_rows(name: str, tensor: torch.Tensor, element_bytes: int, *, by_kernel: bool) -> None:
    """Rows are dense, and 16-byte aligned where a kernel moves them 16 bytes at a time."""
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected last stride 1, got {tensor.stride(-1)}")
    if not by_kernel:
        return
    if tensor.device.type != "meta" and tensor.data_ptr() % 16:
        raise ValueError(f"{name}: expected a 16-byte aligned address, got {tensor.data_ptr():#x}")
    for dim, stride in enumerate(tensor.stride()[:-1]):
        if tensor.shape[dim] > 1 and stride * element_bytes % 16:
            raise ValueError(
                f"{name}: expected strides of a multiple of 16 bytes, got stride {stride} ({stride * element_bytes} bytes) in dim {dim}"
            )
