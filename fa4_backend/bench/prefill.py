"""`fa4 bench prefill`: ours and every peer installed, on the same batches in the same run.

A prefill kernel runs at the board's power limit, so the clock follows what ran just before. Kernels are therefore timed in turns, forwards
and backwards, and a figure is the median over the rounds; compare figures of one run only.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fa4_backend import AttentionMetadata, AttentionProblem, BatchLimits, MaskFeatures, paged_attention, plan_attention, ragged_attention
from fa4_backend.arch import arch_of_capability
from fa4_backend.bench.figures import write_bars
from fa4_backend.bench.peers import Call, ready
from fa4_backend.bench.prefill_batches import PrefillBatch, PrefillTensors
from fa4_backend.bench.prefill_peers import FA3_RAGGED, PAGED_PEERS, WIDE, installed, prepare
from fa4_backend.bench.timing import capture
from fa4_backend.problem import FP8, PAGED

OURS = "fa4"
OURS_WIDE = "fa4 bf16"  # beside FP8 K and V: our kernel of the same values in bf16
MAX_ERROR = 0.04  # of bf16 outputs of unit values, whose rounding alone is 0.008 to 0.016; no figure stands for a wrong result
ROUND_US = 5000.0  # device time of one kernel in one round


@dataclass(frozen=True)
class Timing:
    """One kernel on one batch."""

    batch: str
    kernel: str
    us: float
    tflop_per_s: float
    share_of_matmul: float  # of an 8192^3 bf16 matmul in the same run
    ratio_to_best_peer: (
        float | None
    )  # time of the best peer that reads K and V as ours does over this kernel's; above 1: this kernel is faster
    error: float


def ours(batch: PrefillBatch, t: PrefillTensors) -> Call:
    """Our operator on one batch, its metadata made once, as for all layers of a step."""
    device = torch.cuda.get_device_properties(0)
    problem = AttentionProblem(
        num_q_heads=batch.num_q_heads, num_kv_heads=batch.num_kv_heads, head_dim=batch.head_dim, head_dim_v=batch.value_dim,
        dtype="bfloat16", page_size=batch.page_size if batch.kv_source == PAGED else 1,
        arch=arch_of_capability(device.major, device.minor) or "none",
        kv_dtype=batch.kv_dtype, kv_source=batch.kv_source, mask=MaskFeatures(is_causal=batch.is_causal),
    )  # fmt: skip
    plan = plan_attention(problem, BatchLimits(256, 32768, 131072), num_sms=device.multi_processor_count)
    metadata = AttentionMetadata.allocate(plan, "cuda")
    bounds = {"max_seqlen_q": batch.query_len, "max_seqlen_k": batch.kv_len}
    common = {"plan": plan, "metadata": metadata, "out": t.out}
    if t.cu_seqlens_k is not None:
        cu_seqlens_k = t.cu_seqlens_k
        metadata.refresh(cu_seqlens_q=t.cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **bounds)
        return lambda: ragged_attention(t.q, t.k_cache, t.v_cache, t.cu_seqlens_q, cu_seqlens_k, **common)
    page_table = t.page_table
    assert page_table is not None
    metadata.refresh(cu_seqlens_q=t.cu_seqlens_q, seqused_k=t.seqused_k, **bounds)
    return lambda: paged_attention(t.q, t.k_cache, t.v_cache, page_table, t.cu_seqlens_q, t.seqused_k, **common)


def _ours_in_bf16(batch: PrefillBatch, t: PrefillTensors) -> Call:
    return ours(replace(batch, kv_dtype="bfloat16"), t.in_bf16())


def run(batches: list[PrefillBatch], *, peers: list[str] | None = None, rounds: int = 8) -> Iterator[list[Timing]]:
    """Time every kernel on every batch; yields one list a batch, ours first; with FP8 K and V also ours on the same values in bf16.

    Raises:
        RuntimeError: a kernel of ours is wrong on a batch.
    """
    matmul = matmul_tflop_per_s()
    torch.manual_seed(0)
    for batch in batches:
        tensors = PrefillTensors.make(batch)
        replays, errors = {}, {}
        kept: list[object] = []  # a graph holds addresses, not tensors: what a call reads and writes must outlive its replays
        makers: dict[str, Callable[[PrefillBatch, PrefillTensors], Call | None]] = {OURS: ours}
        if batch.kv_dtype == FP8:
            makers[OURS_WIDE] = _ours_in_bf16
        makers |= {name: partial(prepare, name) for name in (installed(batch) if peers is None else peers)}
        for name, maker in makers.items():
            tensors.out = torch.full_like(tensors.out, float("nan"))
            call = ready(name, batch.label, partial(maker, batch, tensors), must_run=name in (OURS, OURS_WIDE))
            if call is None:
                continue
            errors[name] = tensors.error(batch)
            if name in (OURS, OURS_WIDE) and not errors[name] <= MAX_ERROR:
                raise RuntimeError(f"{batch.label}: expected an error of at most {MAX_ERROR}, got {errors[name]}")
            kept += [call, tensors.out]
            replays[name] = capture(call)
            kept.append(tensors.out)
        us = in_turns(replays, rounds)
        best = min((us[name] for name in us if name in (*PAGED_PEERS, WIDE, FA3_RAGGED)), default=None)
        rates = {name: batch.flops / time / 1e6 for name, time in us.items()}
        yield [
            Timing(batch.label, name, us[name], rates[name], rates[name] / matmul, None if best is None else best / us[name], errors[name])
            for name in us
        ]


def in_turns(replays: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Median time of one call of each, in microseconds; order reversed every second round."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    repeats = {name: max(1, round(ROUND_US / _timed(call, 2))) for name, call in replays.items()}
    for turn in range(rounds):
        for name in list(replays)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(_timed(replays[name], repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(call: Call, repeats: int) -> float:
    """Microseconds a call, after one call that is not counted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def matmul_tflop_per_s() -> float:
    """TFLOP/s of an 8192^3 bf16 matmul: the ceiling that shares are given of."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    us = in_turns({"matmul": capture(lambda: a @ b)}, 8)["matmul"]
    return 2 * 8192**3 / us / 1e6


def format_line(timings: list[Timing]) -> str:
    """One batch on one line."""
    parts = [f"{t.kernel} {t.us:.0f} us {t.tflop_per_s:.0f} TFLOP/s {100 * t.share_of_matmul:.0f}%" for t in timings]
    ratio = timings[0].ratio_to_best_peer
    ending = "" if ratio is None else f" | {ratio:.2f}x best peer of its kind"
    return f"{timings[0].batch} | {' | '.join(parts)}{ending}"


def write_plot(path: Path, timings: list[Timing]) -> None:
    """TFLOP/s, a group of bars a batch."""
    write_bars(path, {(t.batch, t.kernel): t.tflop_per_s for t in timings}, label="TFLOP/s")
