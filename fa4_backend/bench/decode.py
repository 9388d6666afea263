"""`fa4 bench decode`: ours and every peer installed, on the same batches in the same run; CUDA graphs, cold L2, medians."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fa4_backend import AttentionMetadata, AttentionProblem, BatchLimits, paged_attention, plan_attention
from fa4_backend.arch import arch_of_capability
from fa4_backend.bench.decode_batches import BatchTensors, DecodeBatch
from fa4_backend.bench.decode_peers import WIDE, installed, prepare
from fa4_backend.bench.figures import write_bars
from fa4_backend.bench.peers import Call, ready
from fa4_backend.bench.timing import Flush, capture, copy_bandwidth, median_us

# Name -> flags of its problem.
OURS: dict[str, dict[str, bool]] = {
    "fa4": {},
    "fa4 invariant": {"batch_invariant": True},
    "fa4 exact": {"batch_invariant": True, "exact": True},
}
MAX_ERROR = 0.02  # of bf16 outputs of unit values; a wrong kernel is far above, so no figure stands for a wrong result


@dataclass(frozen=True)
class Timing:
    """One kernel on one batch."""

    batch: str
    kernel: str
    us: float
    gb_per_s: float  # bytes of K and V over time
    share_of_copy: float  # of the bandwidth an elementwise copy reaches on the same machine
    ratio_to_best_peer: float | None  # best peer's time over ours; above 1: ours is faster
    error: float  # largest error on the longest decode row


@dataclass(frozen=True)
class Ours:
    """Our operator on one batch: its metadata made once, as for all layers of a step."""

    refresh: Call
    call: Call

    @classmethod
    def make(cls, batch: DecodeBatch, t: BatchTensors, *, batch_invariant: bool = False, exact: bool = False) -> Ours:
        """Plan, allocate and refresh."""
        device = torch.cuda.get_device_properties(0)
        problem = AttentionProblem(
            num_q_heads=batch.num_q_heads, num_kv_heads=batch.num_kv_heads, head_dim=batch.head_dim, head_dim_v=batch.head_dim,
            dtype="bfloat16", page_size=batch.page_size, arch=arch_of_capability(device.major, device.minor) or "none",
            kv_dtype=batch.kv_dtype, batch_invariant=batch_invariant, exact=exact,
        )  # fmt: skip
        limits = BatchLimits(max(256, len(batch.kv_lens)), max(8192, t.q.shape[0]), 131072, batch.decode_query_len)
        plan = plan_attention(problem, limits, num_sms=device.multi_processor_count)
        metadata = AttentionMetadata.allocate(plan, "cuda")

        def refresh() -> None:
            metadata.refresh(
                cu_seqlens_q=t.cu_seqlens_q, seqused_k=t.seqused_k, max_seqlen_q=batch.max_query_len, max_seqlen_k=max(batch.kv_lens)
            )

        refresh()
        return cls(
            refresh,
            lambda: paged_attention(
                t.q, t.k_cache, t.v_cache, t.page_table, t.cu_seqlens_q, t.seqused_k, plan=plan, metadata=metadata, out=t.out
            ),
        )


def run(
    batches: list[DecodeBatch], *, peers: list[str] | None = None, milliseconds: float = 30.0, flush: Flush = Flush.WRITE
) -> Iterator[list[Timing]]:
    """Time every kernel on every batch; yields one list a batch.

    Raises:
        RuntimeError: a kernel of ours is wrong on a batch.
    """
    copy = copy_bandwidth()
    torch.manual_seed(0)
    for batch in batches:
        tensors = BatchTensors.make(batch)
        calls = {name: Ours.make(batch, tensors, **flags).call for name, flags in OURS.items()}
        chosen = installed(batch.kv_dtype) if peers is None else peers
        calls |= {peer: call for peer in chosen if (call := ready(peer, batch.label, partial(prepare, peer, batch, tensors))) is not None}
        measured: dict[str, tuple[float, float]] = {}
        for name, call in calls.items():
            tensors.out.fill_(float("nan"))
            call()
            error = tensors.error(batch)
            if name in OURS and not error <= MAX_ERROR:
                raise RuntimeError(f"{name} on {batch.label}: expected an error of at most {MAX_ERROR}, got {error}")
            measured[name] = (median_us(capture(call), milliseconds=milliseconds, flush=flush), error)
        best = min((us for name, (us, _) in measured.items() if name not in OURS), default=None)
        timings = []
        for name, (us, error) in measured.items():
            num_bytes = replace(batch, kv_dtype="bfloat16").kv_bytes if name == WIDE else batch.kv_bytes
            rate = num_bytes / us / 1e3
            ratio = None if best is None else best / us
            timings.append(Timing(batch.label, name, us, rate, rate / copy, ratio, error))
        yield timings


def time_refresh(batch: DecodeBatch) -> float:
    """Device time of a step's metadata, in microseconds."""
    return median_us(capture(Ours.make(batch, BatchTensors.make(batch)).refresh))


def format_line(timings: list[Timing]) -> str:
    """One batch on one line."""
    parts = [f"{t.kernel} {t.us:.1f} us {t.gb_per_s:.0f} GB/s {100 * t.share_of_copy:.0f}%" for t in timings]
    ratio = timings[0].ratio_to_best_peer
    ending = "" if ratio is None else f" | {ratio:.2f}x best peer"
    return f"{timings[0].batch} | {' | '.join(parts)}{ending}"


def write_plot(path: Path, timings: list[Timing]) -> None:
    """Bars of time relative to ours, a group a batch."""
    ours = {t.batch: t.us for t in timings if t.kernel == "fa4"}
    values = {(t.batch, t.kernel): t.us / ours[t.batch] for t in timings}
    write_bars(path, values, label="time relative to fa4 (below 1: faster)", largest=4)
