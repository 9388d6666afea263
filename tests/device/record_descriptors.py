"""Record the 128-byte tensor maps that the CUDA driver makes, over shapes, types, swizzles, strides and fills.

    python -m tests.device.record_descriptors --out tests/device/results/tensor_maps_h200.json [--date 2026-11-23]

`tests/emulator/test_tensor_maps.py` compares the emulator's decoder with the recorded bytes. What the driver refuses is recorded too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tests.device import cuda_driver as cuda

ADDRESS = 0x7F0012345600  # never read: the driver only encodes it
DTYPES = ("u8", "u16", "u32", "i32", "u64", "i64", "f16", "f32", "f64", "bf16", "f32_ftz", "tf32", "tf32_ftz")
DTYPE_BYTES = {
    "u8": 1,
    "u16": 2,
    "u32": 4,
    "i32": 4,
    "u64": 8,
    "i64": 8,
    "f16": 2,
    "f32": 4,
    "f64": 8,
    "bf16": 2,
    "f32_ftz": 4,
    "tf32": 4,
    "tf32_ftz": 4,
}


def settings() -> list[dict[str, Any]]:
    """Arguments of each call. One field is varied at a time around a plain 3-dimensional bf16 tensor, then some pairs."""
    plain = {"dtype": "bf16", "address": ADDRESS, "dims": [128, 77, 9], "strides": [256, 32768], "box": [64, 16, 2]}
    out: list[dict[str, Any]] = [plain]
    for dtype in DTYPES:
        for swizzle in range(4):
            inner = {0: 64, 1: 32, 2: 64, 3: 128}[swizzle] // DTYPE_BYTES[dtype]
            out.append(
                {**plain, "dtype": dtype, "dims": [1024, 77, 9], "strides": [8192, 819200], "box": [inner, 16, 2], "swizzle": swizzle}
            )
    for rank in range(1, 6):
        dims = [64, 33, 17, 5, 3][:rank]
        strides = [128, 128 * 33, 128 * 33 * 17, 128 * 33 * 17 * 5][: rank - 1]
        for swizzle in (0, 3):
            out.append({**plain, "dims": dims, "strides": strides, "box": [64, 8, 4, 2, 2][:rank], "swizzle": swizzle})
        out.append({**plain, "dims": dims, "strides": strides, "box": [32, 7, 3, 5, 1][:rank], "element_strides": [1, 2, 3, 1, 8][:rank]})
    for l2_promotion in range(4):
        for oob_fill in (0, 1):
            out.append({**plain, "l2_promotion": l2_promotion, "oob_fill": oob_fill})
    for interleave in (1, 2):
        for swizzle in (0, 1):
            out.append(
                {
                    **plain,
                    "dtype": "f16",
                    "dims": [8, 77, 9, 4],
                    "strides": [32, 32768, 1 << 20],
                    "box": [8, 16, 2, 1],
                    "interleave": interleave,
                    "swizzle": swizzle,
                }
            )
    for dims, strides in (
        ([1, 1, 1], [16, 16]),
        ([1 << 32, 2, 2], [1 << 33, 1 << 34]),
        ([64, 1 << 31, 2], [128, 1 << 39]),
        ([64, 4, 4], [(1 << 40) - 16, 128]),
        ([64, 4, 4], [0, 0]),
        ([64, 4, 4], [128, 0]),
    ):
        out.append({**plain, "dims": dims, "strides": strides, "box": [8, 1, 1]})
    # The wide strides and addresses of large KV pools.
    for address in (0x10, 0x100, 0x7FFFFFFFFF80, 0xFFFFFFFFFFF0):
        out.append({**plain, "address": address})
    for box in ([8, 1, 1], [256, 1, 1], [64, 256, 1], [64, 1, 256], [16, 256, 16], [64, 16, 2]):
        out.append({**plain, "dims": [512, 512, 512], "strides": [1024, 1 << 19], "box": box})
    # What the driver refuses.
    out += [
        {**plain, "address": ADDRESS + 8},
        {**plain, "strides": [264, 32768]},
        {**plain, "strides": [1 << 40, 1 << 41]},
        {**plain, "box": [0, 1, 1]},
        {**plain, "box": [257, 1, 1]},
        {**plain, "box": [4, 16, 2]},
        {**plain, "box": [128, 16, 2], "swizzle": 3},
        {**plain, "box": [64, 16, 2], "swizzle": 1},
        {**plain, "dims": [0, 77, 9]},
        {**plain, "element_strides": [1, 9, 1]},
        {**plain, "element_strides": [1, 0, 1]},
        {**plain, "dtype": "u32", "oob_fill": 1},
        {**plain, "swizzle": 4},
    ]
    return out


def record(setting: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(setting)
    dtype, address = DTYPES.index(arguments.pop("dtype")), arguments.pop("address")
    try:
        return {**setting, "bytes": cuda.encode_tensor_map(dtype, address, **arguments).hex()}
    except cuda.CudaError as error:
        return {**setting, "refused": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--date", default="")
    options = parser.parse_args()
    machine = cuda.open_device()
    records = [record(s) for s in settings()]
    report = {"date": options.date, "machine": machine, "driver": cuda.driver_version(), "tensor_maps": records}
    options.out.write_text(json.dumps(report, indent=None).replace('{"dtype"', '\n{"dtype"') + "\n")
    print(f"{len(records)} settings, {sum('refused' in r for r in records)} refused by the driver")


if __name__ == "__main__":
    main()
