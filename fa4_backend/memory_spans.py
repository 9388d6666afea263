"""Which memory a strided tensor takes, and whether two share an element; from addresses and strides alone, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_WORK = 100_000  # steps of the exact search, some milliseconds; what it leaves open counts as shared


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last, gaps included; 0 where it has no elements."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two indices may name one element: some dimension's stride does not reach past all smaller dimensions."""
    last = 0  # element that the smaller dimensions reach
    for stride, n in sorted((stride, n) for n, stride in zip(shape, strides, strict=True) if n > 1):
        if stride <= last:
            return True
        last += (n - 1) * stride
    return False


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share a byte. Tensors side by side in one buffer, such as columns of its rows, do not."""
    import numpy as np

    try:
        return bool(np.shares_memory(_Bytes(a).array(), _Bytes(b).array(), max_work=MAX_WORK))
    except np.exceptions.TooHardError:
        return True


class _Bytes:
    """A tensor's memory as numpy describes it; never read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }

    def array(self) -> object:
        import numpy as np

        return np.asarray(self)
