"""The lint for tcgen05.fence names each fence that is left out, and nothing where both are there."""

from __future__ import annotations

import numpy as np
import pytest

from fa4_backend.emulator.parser import parse_module
from fa4_backend.emulator.tcgen05_fences import AFTER, BEFORE, missing_fences
from tests.emulator.programs.program import Program, output

BODY = f"""
mov.u32 %r0, smem;
spin:
mbarrier.try_wait.parity.shared.b64 %q1, [%r0], 0;
@!%q1 bra spin;
{AFTER};
tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r1}}, [%r2];
tcgen05.wait::ld.sync.aligned;
{BEFORE};
mbarrier.arrive.shared.b64 %d1, [%r0];
"""


def missing(body: str) -> list[str]:
    program = Program("fences", "9.7.16", body, (output("d", np.zeros(1, np.uint32)),), target="sm_100a")
    (kernel,) = parse_module(program.ptx).values()
    return [place.fence for place in missing_fences(kernel)]


def test_a_kernel_with_both_fences_lacks_none() -> None:
    assert missing(BODY) == []


@pytest.mark.parametrize("fence", [AFTER, BEFORE])
def test_a_dropped_fence_is_named(fence: str) -> None:
    assert missing(BODY.replace(f"{fence};\n", "")) == [fence]


def test_a_fence_on_one_way_is_not_enough() -> None:
    assert missing(BODY.replace(f"{AFTER};", f"setp.eq.u32 %q2, %t, 0;\n@%q2 bra past;\n{AFTER};\npast:")) == [AFTER]
