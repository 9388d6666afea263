"""Modelled cycles of one KV block in steady state, ours beside upstream flash-attn-4's: where the tensor core idles, and for whom.

    python -m scripts.sm100_schedule [shape ...] > schedule.json

`docs/data/sm100_schedule.json` has all shapes, each with the stamp of the kernels that it was made of.

The deterministic emulated run of each kernel is recorded (`emulator.recording`) and replayed with modelled times (`emulator.replay`,
which states the rules). Each kernel works on 256 query rows a CTA, at d256 on 128 (one head, bf16, page 128), against 8 and against 24 KV
blocks of 128; a figure is the difference over 16. `latency` is what a barrier costs its waiter, for which there is no published figure:
both ends of a range.
Units and queues alone: no latency of an instruction, a product or a cluster takes part, which `fa4 model` and `model_validation` have.
Nothing here was measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fa4_backend.emulator import flash_attention

flash_attention.prepare("sm_100a")

import torch  # noqa: E402

from fa4_backend import emulator  # noqa: E402
from fa4_backend.emulator.recording import Recording  # noqa: E402
from fa4_backend.emulator.replay import Replay, Times  # noqa: E402
from fa4_backend.emulator.timing import TIMINGS, Timing  # noqa: E402
from fa4_backend.kernel_stamp import make_stamp  # noqa: E402
from fa4_backend.problem import FP8, SAME_AS_Q  # noqa: E402
from tests.support.emulated_prefill import run_prefill  # noqa: E402
from tests.support.paged_case import PagedCase  # noqa: E402

ARCH, BLOCK = "sm_100a", 128
SHORT, LONG = 8, 24  # KV blocks
LATENCIES = (0, 64)
COPY_LATENCIES = (0, 300, 600, 1000)  # for the cycles alone, with barriers that cost nothing


@dataclass(frozen=True)
class Shape:
    """A problem; upstream works on CTA pairs, so it gets the rows of two CTAs."""

    head_dim: int
    head_dim_v: int
    is_causal: bool

    @property
    def rows(self) -> int:
        """Query rows of a CTA: two tiles, or one where tensor memory holds O of one."""
        return 128 if self.head_dim_v > 128 else 256


SHAPES = {
    "causal d128": Shape(128, 128, True),
    "full attention d128": Shape(128, 128, False),
    "causal d64": Shape(64, 64, True),
    "causal d96": Shape(96, 96, True),
    "causal d192 and 128": Shape(192, 128, True),
    "full attention d192 and 128": Shape(192, 128, False),
    "causal d256": Shape(256, 256, True),
    "full attention d256": Shape(256, 256, False),
}


def ours(shape: Shape, num_blocks: int, arch: str, cta_group: int = 1, kv_dtype: str = SAME_AS_Q, q_dtype: str = SAME_AS_Q) -> Recording:
    """Our kernel's steps."""
    rows, keys = shape.rows * cta_group, num_blocks * BLOCK
    fields = {"head_dim": shape.head_dim, "head_dim_v": shape.head_dim_v, "is_causal": shape.is_causal, "kv_dtype": kv_dtype}
    case = PagedCase(
        (rows,), (keys,), num_q_heads=1, num_kv_heads=1, page_size=128, arch=f"emulated-{arch}", q_dtype=q_dtype, **fields
    )  # fmt: skip
    recording = Recording()
    key = case.plan().kernels.prefill.with_tuning(cta_group=cta_group)
    run_prefill(case, num_ctas=1, key=key, trace=recording).check()
    return recording


def upstream(shape: Shape, num_blocks: int, arch: str, dtype: torch.dtype = torch.bfloat16) -> Recording:
    """Steps of flash-attn-4's dense kernel; in FP8 its Q, K, V and P all are."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2 * shape.rows, shape.head_dim), (num_blocks * BLOCK, shape.head_dim), (num_blocks * BLOCK, shape.head_dim_v))
    q, k, v = (torch.randn(1, rows, 1, columns, generator=generator).to(dtype) for rows, columns in sizes)
    scales = {f"{name}_descale": torch.ones(1, 1) for name in "qkv"} if dtype.itemsize == 1 else {}
    recording = Recording()
    with emulator.session(arch=arch, num_sms=flash_attention.NUM_SMS, trace=recording) as emu:
        flash_attention.forward(emu, q, k, v, causal=shape.is_causal, softmax_scale=shape.head_dim**-0.5, return_lse=True, **scales)
    return recording


def per_block(short: Times, long: Times, ctas: int) -> dict[str, Any]:
    """One KV block of one CTA; ctas: of the cluster, whose roles are added up in `busy` and `waits`."""

    def rate(after: float, before: float) -> float:
        return round((after - before) / (LONG - SHORT), 1)

    def rates(after: dict[str, float], before: dict[str, float], share: int = 1) -> dict[str, float]:
        found = {name: round(rate(after[name], before.get(name, 0.0)) / share, 1) for name in after}
        return {name: cycles for name, cycles in sorted(found.items(), key=lambda item: -item[1]) if abs(cycles) >= 1}

    return {
        "cycles": rate(long.total, short.total),
        "tensor core busy": rate(long.tensor_busy, short.tensor_busy),
        "shared-memory port busy": rate(long.smem_busy, short.smem_busy),
        "tensor core idle while the mma warp": rates(long.tensor_idle, short.tensor_idle),
        "critical path": rates(long.critical, short.critical),
        "busy": {role: rates(pipes, short.busy.get(role, {}), ctas) for role, pipes in long.busy.items()},
        "waits, warps added up": {role: rates(whom, short.waits.get(role, {}), ctas) for role, whom in long.waits.items()},
    }


def units_alone(arch: str, barrier: float, copy_latency: float = 600.0) -> Timing:
    """Constants without any latency but a barrier's and a copy's."""
    latencies = ("remote", "product_ss", "product_ts", "pair_ss", "pair_ts", "tensor_memory", "shuffle", "far_memory")
    return replace(TIMINGS[arch], barrier=barrier, copy_latency=copy_latency, **dict.fromkeys(latencies, 0.0))


def report(record: Callable[[Shape, int, str], Recording], shape: Shape, arch: str = ARCH) -> dict[str, Any]:
    """A kernel's figures under each latency."""
    short, long = record(shape, SHORT, arch), record(shape, LONG, arch)
    short.stalls, long.stalls = {}, {}
    ctas = len(long.warps) // long.warps_per_cta
    result: dict[str, Any] = {"CTAs of a cluster": ctas}
    for kind, name in (("mma", "operand bytes"), ("copy", "copied bytes")):
        result[f"shared memory, {name}"] = (long.smem_bytes(kind) - short.smem_bytes(kind)) // (LONG - SHORT)
    result["shared memory, bytes of warps"] = (long.port_bytes() - short.port_bytes()) // (LONG - SHORT)
    cycles = {}
    for copy_latency in COPY_LATENCIES:
        runs = (Replay(recording, units_alone(arch, 0, copy_latency)).run().total for recording in (long, short))
        cycles[copy_latency] = round((next(runs) - next(runs)) / (LONG - SHORT), 1)
    result["cycles by copy latency"] = cycles
    for latency in LATENCIES:
        times = (Replay(recording, units_alone(arch, latency)).run() for recording in (short, long))
        result[f"latency {latency}"] = per_block(*times, ctas)
    return result


def main() -> int:
    """Print the figures as JSON."""
    results: dict[str, dict[str, Any]] = {}
    for name in sys.argv[1:] or SHAPES:
        shape = SHAPES[name]
        results[name] = {"stamp": make_stamp("emulator", ("sm100",)), "upstream": report(upstream, shape)}
        if shape.head_dim_v <= 128:
            results[name]["ours"] = report(ours, shape)
        if shape.head_dim_v >= 128:
            results[name]["ours, CTA pairs"] = report(partial(ours, cta_group=2), shape)
            for arch, words in ((ARCH, ""), ("sm_103a", ", sm_103a")):
                results[name][f"ours, FP8 K and V, CTA pairs{words}"] = report(partial(ours, cta_group=2, kv_dtype=FP8), shape, arch)
        if shape.head_dim == 128:
            results[name]["upstream, FP8"] = report(partial(upstream, dtype=torch.float8_e4m3fn), shape)
        if shape.head_dim <= 128:
            results[name]["ours, FP8 K and V"] = report(partial(ours, kv_dtype=FP8), shape)
        ctas = 2 if shape.head_dim_v > 128 else 1
        for arch in (ARCH, "sm_103a"):
            results[name][f"ours, FP8 Q, K and V, {arch}"] = report(partial(ours, cta_group=ctas, kv_dtype=FP8, q_dtype=FP8), shape, arch)
    stamp = results[next(iter(results))]["stamp"]
    json.dump({"stamp": stamp, "note": "modelled cycles, not measured", **results}, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
