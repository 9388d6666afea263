"""Large logits in every mode: weights, factors, parts of split KV and the lse stay right, whatever ptxas makes of a product and a sum.

The emulator rounds each instruction by itself, so what ptxas may fuse is asked of the PTX; the numbers are judged on the emulator.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fa4_backend.compile import CompileKey
from fa4_backend.compile_cache import ensure_object
from tests.support.contraction import contractible
from tests.support.emulated_decode import run_decode
from tests.support.emulated_prefill import run_built
from tests.support.large_logits import CHANNELS, build, check
from tests.support.paged_case import PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated
ARCHS = ["sm_90a", "sm_100a"]
DECODE = {"query_lens": (1, 1), "kv_lens": (700, 129), "num_q_heads": 4, "num_kv_heads": 1}
# Two query tiles, of heads of the kernels that the other tests here compile.
TOKENS = 35
PREFILL = {"query_lens": (TOKENS, 3), "kv_lens": (400, 129), "num_q_heads": 4, "num_kv_heads": 1}


def keys_of(arch: str, **changes: object) -> list[CompileKey]:
    """Decode and prefill kernel of a problem."""
    case = PagedCase((1,), (1,), num_q_heads=4, num_kv_heads=1, head_dim=128, arch=f"emulated-{arch}", **changes)  # type: ignore[arg-type]
    kernels = case.plan().kernels
    assert kernels is not None and kernels.decode is not None
    return [kernels.decode, kernels.prefill]


FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "batch invariant": {"batch_invariant": True},
    "softcap": {"softcap": 30.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "all": {"softcap": 30.0, "sinks": True, "alibi": True, "window_left": 64},
}


# One feature alone is in "all" too.
@pytest.mark.parametrize(
    ("features", "arch"),
    with_slow(
        [(features, arch) for features in FEATURES for arch in ARCHS],
        [("batch invariant", "sm_100a"), *((features, arch) for features in ("softcap", "sinks", "alibi") for arch in ARCHS)],
    ),
)
def test_no_product_may_be_fused_into_a_sum(features: str, arch: str) -> None:
    """One that may would make results depend on ptxas: a factor off 1, a sum that drifts (`online_softmax`, Note [Contraction])."""
    for key in keys_of(arch, **FEATURES[features]):
        ptx = ensure_object(key).with_suffix(".ptx").read_text()
        if not {"softcap", "alibi"} & FEATURES[features].keys():
            assert re.search(r"\bmul\.rn\.f32\b", ptx), "the reference is a product that is rounded by itself"
        assert contractible(ptx) == [], key.name


def test_what_may_be_fused_is_found() -> None:
    """Through a move and a negation, but not with a rounding modifier on either side, nor from a value written over since."""
    lines = {
        "mul.f32 %r1, %r2, %r3; mov.b32 %r4, %r1; neg.f32 %r5, %r4; add.f32 %r6, %r7, %r5;": 1,
        "mul.f32 %r1, %r2, %r3; sub.f32 %r6, %r1, %r1;": 1,
        "mul.rn.f32 %r1, %r2, %r3; sub.f32 %r6, %r1, %r7;": 0,
        "mul.f32 %r1, %r2, %r3; add.rn.f32 %r6, %r1, %r7;": 0,
        "mul.f32 %r1, %r2, %r3; mov.b32 %r1, 0f00000000; add.f32 %r6, %r1, %r7;": 0,
        "mul.f32 %r1, %r2, %r3; fma.rn.f32 %r6, %r4, %r5, %r1;": 0,
    }
    for text, count in lines.items():
        assert len(contractible(text.replace("; ", ";\n"))) == count, text


# Channels of a kernel of their own: of a feature, of float16. Decode on both chips is one source, so one chip and mode is enough for them.
OWN_KERNEL = [name for name, channel in CHANNELS.items() if channel.case or channel.sink is not None]
DECODE_CASES = [(name, batch_invariant, arch) for name in CHANNELS for batch_invariant in (False, True) for arch in ARCHS]
SLOW_DECODE = [case for case in DECODE_CASES if case[0] in OWN_KERNEL and (case[1:] != (False, "sm_90a") or case[0] == "alibi")]


@pytest.mark.parametrize(("name", "batch_invariant", "arch"), with_slow(DECODE_CASES, SLOW_DECODE))
def test_decode(name: str, batch_invariant: bool, arch: str) -> None:
    """Two rows over 3 SMs: cuts inside the long one, so that its parts meet in slots."""
    built = build(name, arch=f"emulated-{arch}", batch_invariant=batch_invariant, **DECODE)
    run = run_decode(built.case, num_ctas=3, built=built)
    assert all(report.races == [] for report in run.reports)
    check(built, *run.rows)


# Hopper's soft cap and float16 have tests in `test_sm90_prefill.py`, at d256 and d64.
SLOW_PREFILL = [("alibi", "sm_90a"), ("alibi", "sm_100a"), *((name, "sm_90a") for name in CHANNELS if name.startswith(("softcap", "fp16")))]


@pytest.mark.parametrize(("name", "arch"), with_slow([(name, arch) for name in CHANNELS for arch in ARCHS], SLOW_PREFILL))
def test_prefill(name: str, arch: str) -> None:
    built = build(name, arch=f"emulated-{arch}", **PREFILL)
    run = run_built(built)
    assert run.report.races == []
    check(built, run.out, run.lse)


BESIDE = [(name, arch) for name in ("fp16, largest", "-3e37") for arch in ARCHS]


@pytest.mark.parametrize(("name", "arch"), with_slow(BESIDE, [("fp16, largest", "sm_90a")]))
def test_a_rows_bits_do_not_depend_on_large_ones_beside_it(name: str, arch: str) -> None:
    """A warp with a row of large scores takes another way; its other rows keep their bits."""
    both = build(name, arch=f"emulated-{arch}", **PREFILL)
    small = slice(0, TOKENS, 3)
    both.arguments.q[small, :, 0] = both.arguments.q[small, :, 0].sign() * 2.0**-20
    run = run_built(both)
    out, lse = run.out[:TOKENS].clone(), run.lse[:, :TOKENS].clone()
    alone = replace(both, arguments=both.arguments._replace(q=both.arguments.q.clone()))
    large = torch.ones(TOKENS, dtype=torch.bool)
    large[small] = False
    alone.arguments.q[:TOKENS][large] = 0
    run = run_built(alone)
    assert torch.equal(run.out[small], out[small]) and torch.equal(run.lse[:, small], lse[:, small])
    assert not torch.equal(run.out[:TOKENS][large], out[large])
