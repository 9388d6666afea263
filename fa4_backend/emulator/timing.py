"""Every constant of the timing model, each beside its source.

A source begins with what it is: "documented", "published" (somebody's measurement), "recalled" (a paper whose figure was not looked up
again), "measured" (ours, on the device named), "assumed" (no figure is known; the range is what the error bar takes) or "fitted" (with the
cells that it was fitted on). Cycles are of the SM clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import NamedTuple

_LUO = "recalled: Luo et al., arXiv 2501.12084 (H100 and H800)"
_UMMA = "published: SemiAnalysisAI/microbench-blackwell, umma_latency/lat_results_full.csv (B200): one bf16 product"
_TMA = "published: SemiAnalysisAI/microbench-blackwell, tma2d_throughput (B200)"


class Fact(NamedTuple):
    """A constant, the least and most it may be, and where it comes from."""

    value: float
    low: float
    high: float
    source: str


def known(value: float, source: str) -> Fact:
    """A fact whose source gives one value: no range."""
    return Fact(value, value, value, source)


@dataclass(frozen=True)
class Timing:
    """What the replay of one arch takes for its units. Field names say the unit; `facts` has low, high and source of each."""

    flops_a_cycle: float  # dense 16-bit products of one SM
    smem_bytes_a_cycle: float
    copy_bytes_a_cycle: float
    copy_latency: float  # from the last byte asked for to the arrival
    barrier: float  # from the last arrival of a phase to the waiter's next instruction
    remote: float  # more, where the arrival comes from another SM of the cluster
    product_ss: float  # from a product's end to the waiter's next instruction, A in shared memory
    product_ts: float  # the same, A in tensor memory (tcgen05) or registers (wgmma)
    pair_ss: float  # the same for products of a CTA pair
    pair_ts: float
    tensor_memory: float  # from the last tcgen05.ld or st to the end of its wait
    shuffle: float  # latency of a shuffle
    far_memory: float  # latency of a load or an atomic in L2
    beside_products: float  # by how much longer an instruction of a warp whose accumulators are registers holds its scheduler and its warp
    facts: dict[str, Fact] = field(default_factory=dict, compare=False, repr=False)


def _timing(facts: dict[str, Fact]) -> Timing:
    return Timing(**{name: fact.value for name, fact in facts.items()}, facts=facts)


def extremes(timing: Timing) -> tuple[Timing, Timing]:
    """The fastest and the slowest that the ranges of its constants allow."""
    fast, slow = (_at(timing, itemgetter(index)) for index in (1, 2))
    return fast, slow


def _at(timing: Timing, pick: Callable[[Fact], float]) -> Timing:
    return replace(timing, **{name: pick(fact) for name, fact in timing.facts.items()})


_SMEM = known(128, 'documented: CUDA programming guide, "Shared Memory": 32 banks of 4 bytes')
_BARRIER = Fact(32, 0, 64, f"assumed: one round trip to shared memory, 29 to 33 cycles ({_LUO})")
_REMOTE = Fact(180, 150, 220, f"{_LUO}: latency between SMs of a cluster; taken for Blackwell too")
_COPY_RATE = known(64, "assumed: one L1 fill port; the kernels here ask for 14 to 32")
_SHUFFLE = Fact(24, 20, 30, "recalled: Jia et al., arXiv 1804.06826 (Volta: 22 to 25); taken for later chips")

_HOPPER = {
    "flops_a_cycle": known(4096, "documented: H100 data sheet, 989.4 TFLOP/s = 132 SMs x 1.83 GHz x 4096"),
    "smem_bytes_a_cycle": _SMEM,
    "copy_bytes_a_cycle": _COPY_RATE,
    "copy_latency": Fact(600, 450, 900, "assumed: an L2 hit (about 260 cycles) and the TMA unit's own; 900 is a miss"),
    "barrier": _BARRIER,
    "remote": _REMOTE,
    "product_ss": Fact(32, 16, 64, "assumed: a wgmma's pipeline, 13 to 18 cycles for the smallest, and the waiter's wake-up"),
    "product_ts": Fact(32, 16, 64, "assumed: as product_ss"),
    "pair_ss": known(0, "there are no CTA pairs"),
    "pair_ts": known(0, "there are no CTA pairs"),
    "tensor_memory": known(0, "there is no tensor memory"),
    "shuffle": _SHUFFLE,
    "far_memory": Fact(260, 200, 600, f"{_LUO}: L2 hit; 600 is a miss"),
    "beside_products": Fact(
        1.8,
        1.7,
        1.9,
        "fitted, in cycles, on the five cells of docs/data/model_cells_h200.json that say so; checked on the others. An H200's counters "
        "name the dispatch of instructions; measured since, an operation at a time: 1.3 to 2.0 (docs/data/pipes_h200.json)",
    ),
}
_BLACKWELL = {
    "flops_a_cycle": known(
        8192, "documented: 2.25 PFLOP/s (B200 data sheet); published: 8046 to 8153 in loops of 128 to 256 products (umma_throughput)"
    ),
    "smem_bytes_a_cycle": _SMEM,
    "copy_bytes_a_cycle": _COPY_RATE,
    "copy_latency": Fact(600, 450, 1040, f"assumed: an L2 hit; 1040 is a tile of 4 KB from memory, {_TMA}"),
    "barrier": _BARRIER,
    "remote": _REMOTE,
    "product_ss": known(136, f"{_UMMA}, 128 x 128 x 16, issue to the end of the wait 200 cycles, less its 64"),
    "product_ts": known(104, f"{_UMMA}, the same with A in tensor memory, 168 cycles less its 64"),
    "pair_ss": known(170, f"{_UMMA} of a pair, 256 x 128 x 16, 234 cycles less its 64"),
    "pair_ts": known(138, f"{_UMMA} of a pair, A in tensor memory, 202 cycles less its 64"),
    "tensor_memory": Fact(32, 0, 64, "assumed: as shared memory"),
    "shuffle": _SHUFFLE,
    "far_memory": Fact(
        360,
        300,
        1100,
        "published: SemiAnalysisAI/microbench-blackwell, ldgsts_latency (B200): 350 to 400 at least, 1100 to 1200 median from memory",
    ),
    "beside_products": known(1, "accumulators are in tensor memory"),
}
TIMINGS = {"sm_90a": _timing(_HOPPER), "sm_100a": _timing(_BLACKWELL), "sm_103a": _timing(_BLACKWELL)}
