"""The little of the CUDA driver API that small programs need, through ctypes: no package, any Python."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 5, 6  # CUjit_option


class CudaError(RuntimeError):
    """A driver call failed; the message names the call and the driver's text."""


@functools.cache
def driver() -> ctypes.CDLL:
    """The driver library. Raises `OSError` where there is none."""
    return ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments: object) -> None:
    """Call a driver function; raises `CudaError` unless it returns 0."""
    status = getattr(driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise CudaError(f"{name}: error {status}: {(text.value or b'?').decode()}")


def open_device(index: int = 0) -> str:
    """Make the device's primary context current; returns its name and capability."""
    call("cuInit", 0)
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call("cuDeviceGet", ctypes.byref(device), index)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)
    name = ctypes.create_string_buffer(100)
    call("cuDeviceGetName", name, 100, device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    call("cuDeviceGetAttribute", ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
    call("cuDeviceGetAttribute", ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device)
    return f"{name.value.decode()} (sm_{major.value}{minor.value})"


def driver_version() -> str:
    version = ctypes.c_int()
    call("cuDriverGetVersion", ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def load_module(text: str) -> ctypes.c_void_p:
    """Assemble PTX text with the driver's compiler."""
    module, log = ctypes.c_void_p(), ctypes.create_string_buffer(8192)
    options = (ctypes.c_int * 2)(JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
    values = (ctypes.c_void_p * 2)(ctypes.cast(log, ctypes.c_void_p), 8192)
    source = text.encode() + b"\0"
    try:
        call("cuModuleLoadDataEx", ctypes.byref(module), source, 2, options, values)
    except CudaError as error:
        raise CudaError(f"{error}\n{log.value.decode(errors='replace')}") from None
    return module


def get_function(module: ctypes.c_void_p, name: str, smem_bytes: int) -> ctypes.c_void_p:
    function = ctypes.c_void_p()
    call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    if smem_bytes > 48 * 1024:
        call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes)
    return function


def upload(array: np.ndarray) -> ctypes.c_uint64:
    """A device buffer with the array's bytes."""
    address = ctypes.c_uint64()
    call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(array.nbytes, 16)))
    source = np.ascontiguousarray(array)
    call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(source.ctypes.data), ctypes.c_size_t(source.nbytes))
    return address


def download(address: ctypes.c_uint64, like: np.ndarray) -> np.ndarray:
    out = np.empty(like.shape, like.dtype)
    call("cuMemcpyDtoH_v2", ctypes.c_void_p(out.ctypes.data), address, ctypes.c_size_t(out.nbytes))
    return out


def free(address: ctypes.c_uint64) -> None:
    call("cuMemFree_v2", address)


def launch(
    function: ctypes.c_void_p, grid: int, block: int, smem_bytes: int, parameters: Sequence[ctypes.Array | ctypes._SimpleCData]
) -> None:
    """Run a kernel and wait for it."""
    pointers = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(p) for p in parameters))
    call("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, smem_bytes, None, pointers, None)
    call("cuCtxSynchronize")


def encode_tensor_map(
    dtype: int,
    address: int,
    dims: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    element_strides: Sequence[int] = (),
    *,
    interleave: int = 0,
    swizzle: int = 0,
    l2_promotion: int = 0,
    oob_fill: int = 0,
) -> bytes:
    """The 128 bytes that `cuTensorMapEncodeTiled` makes. Raises `CudaError` when the driver refuses."""
    rank = len(dims)
    room = (ctypes.c_uint8 * 256)()
    aligned = -(-ctypes.addressof(room) // 64) * 64
    u64, u32 = ctypes.c_uint64 * rank, ctypes.c_uint32 * rank
    call(
        "cuTensorMapEncodeTiled", ctypes.c_void_p(aligned), dtype, rank, ctypes.c_void_p(address), u64(*dims),
        (ctypes.c_uint64 * max(rank - 1, 1))(*strides), u32(*box), u32(*(element_strides or [1] * rank)),
        interleave, swizzle, l2_promotion, oob_fill,
    )  # fmt: skip
    return ctypes.string_at(aligned, 128)
