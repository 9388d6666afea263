"""Which products of one warp are in order: all of them by default, those of one shape and accumulator by the ISA's text."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from tests.emulator.harness import run_program
from tests.emulator.programs import load_family

PRODUCT = next(p for p in load_family("tcgen05") if p.name == "tcgen05.mma bf16 K-major 128B")  # two steps of K, one accumulator
DESCRIPTORS = re.findall(r"mov\.u32 %r10, (0x[0-9a-f]+);", PRODUCT.body)
SEEDS = (None, *range(6))


def with_second(descriptor: int, column: int = 0) -> str:
    """The program with another shape, or accumulator, in the second product."""
    first, rest = PRODUCT.body.rsplit("mov.u32 %r10, ", 1)
    second = f"{descriptor:#x};" + rest.split(";", 1)[1]
    return first + "mov.u32 %r10, " + second.replace("[%r2]", f"[%r2+{column}]", 1)


@pytest.mark.parametrize("isa_order", [False, True])
def test_products_of_one_shape_and_accumulator_are_in_order(isa_order: bool) -> None:
    first = run_program(PRODUCT, isa_order=isa_order)[0]["d"]
    for seed in SEEDS:
        results, report = run_program(PRODUCT, seed=seed, isa_order=isa_order)
        assert report.races == [] and np.array_equal(results["d"], first)


@pytest.mark.parametrize("what", ["shape", "accumulator"])
def test_others_are_in_order_only_by_default(what: str) -> None:
    """Half of the columns of the product before; or an accumulator that begins 8 columns on."""
    assert len(set(DESCRIPTORS)) == 1
    same, n = int(DESCRIPTORS[0], 16), int(DESCRIPTORS[0], 16) >> 17 & 63
    half = same & ~(63 << 17) | n // 2 << 17
    changed = replace(PRODUCT, body=with_second(half, 0 if what == "shape" else 8))
    outputs = set()
    for seed in SEEDS:
        results, report = run_program(changed, seed=seed)
        assert report.races == []
        outputs.add(results["d"].tobytes())
        assert run_program(changed, seed=seed, isa_order=True)[1].races, seed
    assert len(outputs) == 1
    assert len({run_program(changed, seed=seed, isa_order=True)[0]["d"].tobytes() for seed in range(12)}) > 1
