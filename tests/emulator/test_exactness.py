"""Bits that the README promises: products of an instruction are added exactly, and every NaN result is the canonical one."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulator.harness import run_program
from tests.emulator.programs.program import Program, output

INF, MINUS_INF, PAYLOAD = "0f7F800000", "0fFF800000", "0fFFC12345"
STORE = "mad.wide.u32 %d0, %t, 4, %p0;\nst.global.f32 [%d0], %f9;\n"
CANONICAL = 0x7FFFFFFF


def first_word(body: str, target: str = "sm_90a") -> int:
    program = Program("exactness", "9.7.3", body + STORE, (output("d", np.zeros(32, np.uint32)),), target=target)
    return int(run_program(program)[0]["d"].view(np.uint32)[0])


# bfloat16: 4096 is 0x4580, 1 is 0x3f80, -4096 is 0xc580. Lane t of four holds k = 2 t and 2 t + 1.
CANCEL = """
and.b32 %r0, %lane, 3;
setp.eq.u32 %q0, %r0, 0;
setp.eq.u32 %q1, %r0, 1;
mov.u32 %r1, 0;
mov.u32 %r2, 0;
@%q0 mov.u32 %r1, 0x3f804580;
@%q0 mov.u32 %r2, 0x3f804580;
@%q1 mov.u32 %r1, 0x00004580;
@%q1 mov.u32 %r2, 0x0000c580;
mov.f32 %f0, 0f00000000;
mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f9, %f1, %f2, %f3}, {%r1, %r1}, {%r2}, {%f0, %f0, %f0, %f0};
"""


def test_products_of_mma_sync_are_added_exactly() -> None:
    """2^24 + 1 - 2^24: term by term in float32 the 1 would be lost."""
    assert first_word(CANCEL) == int(np.float32(1).view(np.uint32))


@pytest.mark.parametrize(
    "body",
    [
        f"add.f32 %f9, {INF}, {MINUS_INF};\n",
        f"mul.f32 %f9, {INF}, 0f00000000;\n",
        f"add.f32 %f9, {PAYLOAD}, 0f3F800000;\n",
        f"fma.rn.f32 %f9, {PAYLOAD}, 0f3F800000, 0f3F800000;\n",
        f"add.rz.f32 %f9, {INF}, {MINUS_INF};\n",
        f"max.f32 %f9, {PAYLOAD}, {PAYLOAD};\n",
        "sqrt.rn.f32 %f9, 0fBF800000;\n",
        f"sub.ftz.f32 %f9, {INF}, {INF};\n",
        CANCEL.replace("0f00000000", PAYLOAD),
        CANCEL.replace("0x00004580", "0x7f804580"),  # an infinity times 0
    ],
)  # fmt: skip
def test_a_nan_result_has_the_canonical_bits(body: str) -> None:
    assert first_word(body) == CANONICAL


def test_packed_results_are_canonical_too() -> None:
    body = f"mov.f32 %f0, {INF};\nmov.f32 %f1, {MINUS_INF};\nmov.b64 %d1, {{%f0, %f0}};\nmov.b64 %d2, {{%f1, %f1}};\n"
    assert first_word(body + "add.f32x2 %d3, %d1, %d2;\nmov.b64 {%f8, %f9}, %d3;\n", "sm_100a") == CANONICAL


def test_a_moved_nan_keeps_its_bits() -> None:
    assert first_word(f"mov.f32 %f9, {PAYLOAD};\n") == 0xFFC12345
    assert first_word(f"setp.eq.u32 %q0, %t, 0;\nselp.f32 %f9, {PAYLOAD}, 0f00000000, %q0;\n") == 0xFFC12345
