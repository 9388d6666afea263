"""Warps that spin forever, on one resident CTA or on several that wait for each other, end in a report and not in a hang."""

from __future__ import annotations

import numpy as np
import pytest

from fa4_backend import emulator
from fa4_backend.emulator import cta

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 p)\n{\n"
HEAD += ".reg .pred %p<4>; .reg .b32 %r<8>; .reg .b64 %d<4>;\n"
SPIN = "ld.param.u64 %d0, [p]; L: ld.acquire.gpu.global.u32 %r0, [%d0]; setp.eq.u32 %p0, %r0, 0; @%p0 bra L; ret;\n}\n"
# CTA 0 waits for the flag that the last CTA raises.
HANDSHAKE = (
    "ld.param.u64 %d0, [p]; mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 bra L;"
    " mov.u32 %r2, 1; st.release.gpu.global.u32 [%d0], %r2; ret;"
    " L: ld.acquire.gpu.global.u32 %r0, [%d0]; setp.eq.u32 %p0, %r0, 0; @%p0 bra L; ret;\n}\n"
)
STEP_LIMIT = 10_000


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three turns of every spinning cluster before the limit, as many as with the limits of use, in a hundredth of the steps."""
    monkeypatch.setattr(cta, "SPIN_LIMIT", STEP_LIMIT // 3)


@pytest.mark.parametrize("num_sms", [1, 3])
def test_spinning_without_end_is_a_livelock(num_sms: int) -> None:
    with emulator.session(arch="sm_90a", num_sms=num_sms, step_limit=STEP_LIMIT) as emu, pytest.raises(emulator.Deadlock, match="livelock"):
        emu.launch(HEAD + SPIN, 3, 32, [np.zeros(1, np.uint32)])


def test_a_cta_may_wait_for_a_later_one_that_is_resident() -> None:
    flag = np.zeros(1, np.uint32)
    with emulator.session(arch="sm_90a", num_sms=2) as emu:
        emu.launch(HEAD + HANDSHAKE, 2, 32, [flag])
    assert flag[0] == 1


def test_a_cta_that_waits_for_one_that_cannot_be_resident_is_a_livelock() -> None:
    with emulator.session(arch="sm_90a", num_sms=1, step_limit=STEP_LIMIT) as emu, pytest.raises(emulator.Deadlock, match="livelock"):
        emu.launch(HEAD + HANDSHAKE, 2, 32, [np.zeros(1, np.uint32)])
