"""What ptxas made of the decode kernel: no mbarrier arrival may overtake an ldmatrix whose slot it releases, and no
rescale factor is an FMA.

ptxas waits for a load's registers where they are used, not at an arrival: seen on an H200 as the Q of one entry replaced by the next
one's. The emulator runs PTX, where an ldmatrix is over when the next instruction begins, so it cannot see this; the machine code can.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fa4_backend.compile_cache import ensure_object
from fa4_backend.kernel_facts import disassemble, find_cuda_tool
from fa4_backend.kernels.decode.config import DecodeConfig, resolve
from fa4_backend.problem import FP8
from tests.support.paged_case import PagedCase
from tests.support.sass import loads_in_flight_at_arrivals, product_loops

pytestmark = pytest.mark.emulated

KEYS = {
    "32/8, 1 token": {"num_q_heads": 32, "num_kv_heads": 8},
    "16/2, 4 tokens": {"num_q_heads": 16, "num_kv_heads": 2, "decode_query_len": 4},
    "d64, window, sinks": {"num_q_heads": 9, "num_kv_heads": 3, "head_dim": 64, "window_left": 64, "sinks": True},
    "batch invariant": {"num_q_heads": 8, "num_kv_heads": 2, "decode_query_len": 2, "batch_invariant": True},
    "FP8": {"num_q_heads": 8, "num_kv_heads": 2, "decode_query_len": 4, "kv_dtype": FP8},
}


def config_of(changes: dict[str, object]) -> DecodeConfig:
    fields = {"query_lens": (1,), "kv_lens": (1,), "head_dim": 128, "arch": "emulated-sm_90a", **changes}
    case = PagedCase(**fields)  # type: ignore[arg-type]
    config = resolve(case.problem(), case.plan().limits, prefill_has_parts=False)
    assert config is not None
    return config


@pytest.mark.parametrize("name", KEYS)
def test_no_arrival_overtakes_an_ldmatrix(name: str) -> None:
    tool = find_cuda_tool("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is in no package here (triton carries one)")
    cubin: Path = ensure_object(config_of(KEYS[name])).with_suffix(".cubin")
    sass = subprocess.run([tool, "--dump-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    arrivals, faults = loads_in_flight_at_arrivals(sass)
    assert arrivals >= 4, "expected arrivals for entries and KV tiles, of load warp and consumers"
    assert faults == []


@pytest.mark.parametrize("changes", [KEYS["32/8, 1 token"], KEYS["batch invariant"], KEYS["FP8"]])
def test_nothing_but_row_sums_is_fused(changes: dict[str, object]) -> None:
    """A lane's 2 row sums of a box are FMAs. A factor that is one is off 1 where a maximum stays (`online_softmax`, Note [Contraction])."""
    if find_cuda_tool("nvdisasm") is None:
        pytest.skip("nvdisasm is in no package here (triton carries one)")
    config = config_of(changes)
    loops = product_loops(disassemble(ensure_object(config).with_suffix(".cubin")), 2 * 16, "HMMA")
    assert len(loops) == 1
    assert sum(bool(re.search(r"\bFFMA\b", text)) for text in loops[0]) == 2
