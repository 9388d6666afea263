"""The 128-byte tensor map: what the CUDA driver of an H200 made (recorded) against our encoder and the emulator's decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fa4_backend import emulator
from fa4_backend.emulator.tensor_maps import decode_tensor_map
from tests.emulator.harness import HARDWARE_DTYPES, encode_tensor_map
from tests.emulator.programs.program import TensorMap

RECORDS = json.loads((Path(__file__).parents[1] / "device/results/tensor_maps_h200.json").read_text())["tensor_maps"]
MADE = [r for r in RECORDS if "bytes" in r]
MODELLED = [r for r in MADE if r["dtype"] in HARDWARE_DTYPES and not r.get("interleave")]


def fields(record: dict[str, Any]) -> TensorMap:
    swizzle = {code: name for name, code in TensorMap.SWIZZLES.items()}[record.get("swizzle", 0)]
    return TensorMap(
        "a",
        record["dtype"],
        tuple(record["dims"]),
        tuple(record["strides"]),
        tuple(record["box"]),
        tuple(record.get("element_strides", ())),
        swizzle,
        bool(record.get("oob_fill", 0)),
        record.get("l2_promotion", 0),
    )


def test_enough_was_recorded() -> None:
    assert len(MODELLED) >= 80
    assert sum("refused" in r for r in RECORDS) == 13


@pytest.mark.parametrize("record", MODELLED, ids=range(len(MODELLED)))
def test_encoder_equals_the_driver(record: dict[str, Any]) -> None:
    assert encode_tensor_map(fields(record), record["address"])[:64].hex() == record["bytes"][:128]


@pytest.mark.parametrize("record", MODELLED, ids=range(len(MODELLED)))
def test_decoder_reads_what_the_driver_wrote(record: dict[str, Any]) -> None:
    tensor = fields(record)
    decoded = decode_tensor_map(bytes.fromhex(record["bytes"]))
    assert decoded.base == record["address"]
    assert decoded.rank == len(tensor.dims)
    assert decoded.element_bytes == TensorMap.DTYPE_BYTES[tensor.dtype]
    assert decoded.dims == tensor.dims
    assert decoded.strides == (decoded.element_bytes, *tensor.strides)
    assert decoded.box == tensor.box
    assert decoded.swizzle == (0, 1, 3, 7)[TensorMap.SWIZZLES[tensor.swizzle]]


@pytest.mark.parametrize("interleave", [1, 2])
def test_interleaved_maps_are_refused(interleave: int) -> None:
    record = next(r for r in MADE if r.get("interleave") == interleave)
    with pytest.raises(emulator.UnsupportedInstruction):
        decode_tensor_map(bytes.fromhex(record["bytes"]))
