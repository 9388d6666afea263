"""Products and sums that ptxas may fuse: found in the text, fused as the session says, and told apart from those that may not be."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from fa4_backend import emulator
from fa4_backend.emulator import contraction
from fa4_backend.emulator.contraction_sass import assemble, fused_sums
from fa4_backend.emulator.parser import parse_module
from fa4_backend.kernel_facts import find_cuda_tool
from tests.emulator.harness import run_program
from tests.emulator.programs.program import Program, output

# a * b = 1 + 2^-11 + 2^-24 rounds to 1 + 2^-11, so that the rounded product less itself is 0 and the exact one less the rounded 2^-24.
A = B = 1 + 2**-12
ROUNDED, REST = 1 + 2**-11, 2**-24
LOADS = "".join(f"mov.f32 %f{i}, 0f{struct.pack('>f', x).hex()};\n" for i, x in enumerate((A, B, ROUNDED, 3.0)))
STORE = "mad.wide.u32 %d0, %t, 4, %p0;\nst.global.f32 [%d0], %f9;\n"


def program(body: str) -> Program:
    target = "sm_100a" if "f32x2" in body else "sm_90a"
    return Program("contraction", "9.7.3", LOADS + body + STORE, (output("d", np.zeros(32, np.float32)),), target=target)


def result(body: str, choice: str | int) -> float:
    return float(run_program(program(body), contraction=choice)[0]["d"].view(np.float32)[0])


# body -> result where every pair is fused; without contraction a product is ROUNDED
FUSED = {
    "mul.f32 %f8, %f0, %f1;\nsub.f32 %f9, %f8, %f2;\n": REST,
    "mul.f32 %f8, %f0, %f1;\nsub.f32 %f9, %f2, %f8;\n": -REST,
    "mul.ftz.f32 %f8, %f0, %f1;\nsub.ftz.f32 %f9, %f8, %f2;\n": REST,
    "neg.f32 %f4, %f2;\nmul.f32 %f8, %f0, %f1;\nadd.f32 %f9, %f4, %f8;\n": REST,
    "mul.f32 %f8, %f0, %f1;\nneg.f32 %f7, %f8;\nadd.f32 %f9, %f2, %f7;\n": -REST,
    "mul.f32 %f8, %f0, %f1;\nmov.b32 %f7, %f8;\nsub.f32 %f9, %f7, %f2;\n": REST,
    # across a branch that no lane takes
    "mul.f32 %f8, %f0, %f1;\nsetp.gt.u32 %q0, %t, 99;\n@%q0 bra L;\nmov.u32 %r0, 1;\nL:\nsub.f32 %f9, %f8, %f2;\n": REST,
    # both sides are products: the later one is kept exact
    "mul.f32 %f7, %f0, %f1;\nmul.f32 %f8, %f1, %f0;\nsub.f32 %f9, %f7, %f8;\n": -REST,
    "mov.b64 %d1, {%f0, %f0};\nmov.b64 %d2, {%f2, %f2};\nmul.f32x2 %d3, %d1, %d1;\nsub.f32x2 %d4, %d3, %d2;\n"
    "mov.b64 {%f9, %f8}, %d4;\n": REST,
}
APART = {
    "a product with a rounding mode": "mul.rn.f32 %f8, %f0, %f1;\nsub.f32 %f9, %f8, %f2;\n",
    "a sum with a rounding mode": "mul.f32 %f8, %f0, %f1;\nsub.rn.f32 %f9, %f8, %f2;\n",
    "one of them flushes": "mul.ftz.f32 %f8, %f0, %f1;\nsub.f32 %f9, %f8, %f2;\n",
    "a saturated product": "mul.sat.f32 %f8, %f0, %f1;\nmov.f32 %f7, 0f3f800000;\nsub.f32 %f9, %f8, %f7;\n",
    "a factor that changes on the way": "mul.f32 %f8, %f0, %f1;\nmov.f32 %f0, %f3;\nsub.f32 %f9, %f8, %f2;\n",
    "a factor that changes on one way": (
        "mul.f32 %f8, %f0, %f1;\nsetp.gt.u32 %q0, %t, 99;\n@%q0 bra L;\nmov.f32 %f0, %f3;\nL:\nsub.f32 %f9, %f8, %f2;\n"
    ),
    "a product of two ways": (
        "mul.f32 %f8, %f0, %f1;\nsetp.lt.u32 %q0, %t, 99;\n@%q0 bra L;\nmov.f32 %f8, %f3;\nL:\nsub.f32 %f9, %f8, %f2;\n"
    ),
    "a guarded product": "mov.f32 %f8, %f2;\nsetp.lt.u32 %q0, %t, 99;\n@%q0 mul.f32 %f8, %f0, %f1;\nsub.f32 %f9, %f8, %f2;\n",
}


def test_the_numbers_are_what_they_are_said_to_be() -> None:
    assert np.float32(A) == A and np.float32(A) * np.float32(B) == np.float32(ROUNDED)
    assert A * B - ROUNDED == REST


@pytest.mark.parametrize("body", FUSED)
def test_what_may_be_fused_is_when_the_session_says_so(body: str) -> None:
    assert result(body, "never") == 0
    assert result(body, "always") == FUSED[body]


@pytest.mark.parametrize("reason", APART)
def test_what_may_not_be_fused_never_is(reason: str) -> None:
    body = APART[reason]
    assert result(body, "always") == result(body, "never")
    (kernel,) = parse_module(program(body).ptx).values()
    assert contraction.contractable(kernel) == []


def test_a_seed_draws_each_sum_by_itself_and_always_the_same() -> None:
    body = "mul.f32 %f8, %f0, %f1;\n" + "".join(f"sub.f32 %f{10 + i}, %f8, %f2;\n" for i in range(8))
    body += "mov.f32 %f9, 0f00000000;\n" + "".join(
        f"fma.rn.f32 %f9, %f{10 + i}, 0f{struct.pack('>f', 2.0**i).hex()}, %f9;\n" for i in range(8)
    )
    drawn = [round(result(body, seed) / REST) for seed in range(6)]
    assert len(set(drawn)) > 1 and all(0 <= x < 256 for x in drawn)
    assert drawn == [round(result(body, seed) / REST) for seed in range(6)]
    assert result(body, "always") / REST == 255


def test_a_product_keeps_its_own_uses() -> None:
    body = "mul.f32 %f8, %f0, %f1;\nsub.f32 %f7, %f8, %f2;\nadd.rn.f32 %f9, %f8, %f7;\n"
    assert result(body, "always") == np.float32(ROUNDED + REST)


@pytest.mark.parametrize("choice", ["sometimes", 1.5, None, True])
def test_a_choice_that_is_none(choice: object) -> None:
    with pytest.raises(ValueError, match="contraction: expected"), emulator.session(arch="sm_90a", contraction=choice):  # type: ignore[arg-type]
        pass


# Same value as the product's, as far as the text tells: by another product of the same factor, or by the same one a turn earlier.
CANCELS = {
    "the product of an earlier turn": (
        "mov.f32 %f7, %f2;\nmov.u32 %r0, 0;\nL:\nmul.f32 %f8, %f0, %f1;\nsub.f32 %f9, %f7, %f8;\nmov.f32 %f7, %f8;\n"
        "add.u32 %r0, %r0, 1;\nsetp.lt.u32 %q0, %r0, 2;\n@%q0 bra L;\n"
    ),
    "another product with the same factor": "mul.rn.f32 %f7, %f0, %f3;\nmul.f32 %f8, %f0, %f1;\nsub.f32 %f9, %f8, %f7;\n",
    "the larger of two products": (
        "mul.rn.f32 %f6, %f0, %f3;\nmax.f32 %f7, %f6, %f2;\nmul.f32 %f8, %f0, %f1;\nneg.f32 %f5, %f7;\nadd.f32 %f9, %f8, %f5;\n"
    ),
}
KEEPS = {
    "another number": "mul.f32 %f8, %f0, %f1;\nsub.f32 %f9, %f8, %f2;\n",
    "two negations": "mul.rn.f32 %f7, %f0, %f3;\nneg.f32 %f6, %f7;\nmul.f32 %f8, %f0, %f1;\nsub.f32 %f9, %f8, %f6;\n",
    "a sum": "mul.rn.f32 %f7, %f0, %f3;\nmul.f32 %f8, %f0, %f1;\nadd.f32 %f9, %f8, %f7;\n",
    "a product of other factors": "mul.rn.f32 %f7, %f2, %f3;\nmul.f32 %f8, %f0, %f1;\nsub.f32 %f9, %f8, %f7;\n",
    "a product that is rounded": "mul.rn.f32 %f7, %f0, %f3;\nmul.rn.f32 %f8, %f0, %f1;\nsub.f32 %f9, %f8, %f7;\n",
}


@pytest.mark.parametrize("name", CANCELS)
def test_the_lint_names_differences_that_can_cancel(name: str) -> None:
    (kernel,) = parse_module(program(CANCELS[name]).ptx).values()
    (found,) = contraction.cancelling(kernel)
    assert "mul.f32 %f8" in contraction.describe(kernel, found)


@pytest.mark.parametrize("name", KEEPS)
def test_the_lint_leaves_the_rest_alone(name: str) -> None:
    (kernel,) = parse_module(program(KEEPS[name]).ptx).values()
    assert contraction.cancelling(kernel) == []


def test_the_machine_code_says_which_were_fused(tmp_path: Path) -> None:
    """ptxas fuses the use of a product that is a float's, and keeps the two apart that have a rounding mode."""
    if (tool := find_cuda_tool("ptxas")) is None or find_cuda_tool("nvdisasm") is None:
        pytest.skip("no ptxas, or no nvdisasm")
    body = (
        "ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%p0];\nmul.f32 %f8, %f0, %f1;\nsub.f32 %f7, %f8, %f2;\n"
        "mul.rn.f32 %f6, %f7, %f3;\nadd.f32 %f9, %f6, %f0;\n"
    )
    ptx = program(body).ptx
    (kernel,) = parse_module(ptx).values()
    cubin = tmp_path / "kernel.cubin"
    counts = assemble(tool, ptx, "sm_90a", cubin)
    assert counts is not None and counts["FFMA"] == 1 and counts["FADD"] == 1
    (pair,) = contraction.contractable(kernel)
    assert fused_sums(ptx, cubin, kernel) == {pair.sum: True}
