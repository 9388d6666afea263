"""How fast decode rows with K and V in FP8 are on an SM of their own, in steps that have prefill rows too.

The schedule shares the SMs between both by `kernels/schedule/rates.py`, whose rate of a lone decode CTA is that of 16-bit K and V, in
bytes: such a CTA waits for latencies, so half the bytes do not come in half the time. What stands here is a plan's number and no part
of a kernel: a change leaves compiled kernels as they are.
"""

from __future__ import annotations

from dataclasses import replace

from fa4_backend.kernels.families import KernelSet
from fa4_backend.kernels.schedule.rates import CHIP_RATES
from fa4_backend.kernels.schedule.work_list import WorkShape
from fa4_backend.problem import LATENT, AttentionProblem

# arch -> GB/s of an SM whose CTA decodes rows with K and V in FP8 while others do not: 16 KB in 0.6 us. H200, 32/8 d128 page 16, us of
# steps by this rate (22 ticks a tile, 132 SMs), by that of 16 bits (10, 76), and of FA3 in FP8 and in 16 bits in the same run, 2026-11-29:
#   250 x 2K + 2K of 4K 426, 683 (679, 681); 128 x 4K + 2K of 8K 611, 903 (849, 852); 64 x 8K + 512 of 4K 330, 580 (536, 561); 128 x 1K + a
#   prompt of 2K 145, 234 (246, 217); four other steps alike. 18 ticks: 418, 683, 326, 145.
LONE_FP8_GB = {"sm_90a": 27.0}


def with_fp8_rates(kernels: KernelSet, problem: AttentionProblem, num_sms: int, memory_gb: float | None) -> KernelSet:
    """The same kernels, their lists by the rates of FP8; as they are where K and V have 16 bits, or where no rate is known.

    Args:
        memory_gb: the memory's peak; default: the published one of the arch.
    """
    gb = LONE_FP8_GB.get(problem.target_arch)
    if gb is None or not problem.has_kv_scales or problem.kv_source == LATENT or problem.batch_invariant or kernels.decode is None:
        return kernels
    rates = CHIP_RATES[problem.target_arch]
    slower = rates.lone_decode_gb(problem) / gb
    full = min(num_sms, round(rates.memory_share * (memory_gb or rates.published_memory_gb) / gb))

    def changed(work: WorkShape) -> WorkShape:
        return replace(work, decode_tile_ticks=max(1, round(work.decode_tile_ticks * slower)), decode_full_sms=full)

    converted = kernels.converted and replace(kernels.converted, work=changed(kernels.converted.work))
    return replace(kernels, work=changed(kernels.work), converted=converted)
