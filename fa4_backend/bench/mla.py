"""`fa4 bench mla`: ours, FA3 and FlashMLA on the same batches in the same run; CUDA graphs, kernels in turns, L2 clean, medians.

FA3 is called as vLLM's FLASH_ATTN_MLA does, FlashMLA as FLASHMLA does. Neither reads FP8 latents on Hopper: there both get the same values
in bf16, which is what a server would keep for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fa4_backend import AttentionMetadata, mla_decode
from fa4_backend.arguments import LatentArguments
from fa4_backend.bench import ours
from fa4_backend.bench.batch import DTYPE
from fa4_backend.bench.figures import Cell, write_overview
from fa4_backend.bench.mla_batches import LARGEST_ERROR, LATENT_DIM, MlaBatch
from fa4_backend.bench.ours import gpu_arch
from fa4_backend.bench.peers import Call, has_module, ready
from fa4_backend.bench.shapes import Ceilings
from fa4_backend.bench.timing import Flush, capture, cold_in_turns
from fa4_backend.device import plan_on
from fa4_backend.problem import FP8

OURS, FA3, FLASH_MLA = "fa4", "fa3", "flashmla"
WIDE = " bf16"  # behind a peer's name: beside FP8 latents
FAMILIES = ("schedule", "mla_decode")  # whose kernels are timed
ROUNDS = 6


@dataclass(frozen=True)
class Timing:
    """One kernel on one batch."""

    batch: str
    kernel: str
    us: float
    gb_per_s: float  # bytes of latents over time
    tflop_per_s: float  # of the keys that are seen
    bound_by: str  # which ceiling is the lower one
    share_of_roofline: float
    ratio_to_best_peer: float | None  # best peer's time over this kernel's; above 1: this kernel is faster
    goal_us: float | None
    error: float  # the largest on the last row


@dataclass(frozen=True)
class Ours:
    """Our operator on one batch."""

    refresh: Call
    call: Call

    @classmethod
    def make(cls, batch: MlaBatch, a: LatentArguments) -> Ours:
        """Plan for the device of the tensors, allocate and refresh."""
        plan = plan_on(*batch.asked(gpu_arch() if a.q.is_cuda else "cpu"), a.q.device)
        metadata = AttentionMetadata.allocate(plan, a.q.device)

        def refresh() -> None:
            metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, max_seqlen_q=batch.queries, max_seqlen_k=batch.kv_len)

        def call() -> object:
            return mla_decode(
                a.q, a.q_rope, a.latent_cache, a.page_table, a.cu_seqlens_q, a.seqused_k, plan=plan, metadata=metadata,
                softmax_scale=a.softmax_scale, latent_scale=a.latent_scale, out=a.out,
            )[0]  # fmt: skip

        refresh()
        return cls(refresh, call)


def run(batches: list[MlaBatch], *, peers: list[str] | None = None, rounds: int = ROUNDS) -> Iterator[list[Timing]]:
    """Time every kernel on every batch; yields one list a batch, ours first.

    Raises:
        RuntimeError: our kernel is wrong on a batch.
    """
    compile_all(batches)
    ceilings = Ceilings.measure()
    torch.manual_seed(0)
    for batch in batches:
        us, errors = time_batch(batch, peers, rounds)
        yield judge(batch, us, errors, ceilings)


def judge(batch: MlaBatch, us: dict[str, float], errors: dict[str, float], ceilings: Ceilings) -> list[Timing]:
    """What times of a batch say. us, errors: by kernel."""
    best = min((time for name, time in us.items() if name != OURS), default=None)
    bound_by, least = ceilings.least_us(batch)
    return [
        Timing(
            batch.label, name, time, batch.latent_bytes * (2 if name.endswith(WIDE) else 1) / time / 1e3, batch.flops / time / 1e6,
            bound_by, least / time, None if best is None else best / time, batch.goal_us, errors[name],
        )
        for name, time in us.items()
    ]  # fmt: skip


def time_batch(batch: MlaBatch, peers: list[str] | None, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds and largest error of each kernel that serves the batch.

    Raises:
        RuntimeError: our kernel is wrong.
    """
    a = batch.tensors()
    makers: dict[str, Callable[[], Call]] = {OURS: lambda: Ours.make(batch, a).call}
    wide = a._replace(latent_cache=a.latent_cache.to(DTYPE))
    for peer in installed() if peers is None else peers:
        makers[peer + WIDE * (batch.kv_dtype == FP8)] = partial(PEERS[peer], batch, wide)
    replays: dict[str, Call] = {}
    errors: dict[str, float] = {}
    kept: list[Call] = []  # a graph holds addresses, not tensors: what a call reads must outlive its replays
    for name, maker in makers.items():
        call = ready(name, batch.label, maker, must_run=name == OURS)
        if call is None:
            continue
        a.out.fill_(float("nan"))
        out = call()
        assert isinstance(out, torch.Tensor)
        errors[name] = batch.error(a, out.reshape(a.q.shape))
        if not errors[name] <= LARGEST_ERROR:
            words = f"{batch.label}: {name}: expected an error of at most {LARGEST_ERROR}, got {errors[name]}"
            if name == OURS:
                raise RuntimeError(words)
            print(f"{words}; not timed", file=sys.stderr, flush=True)
            continue
        kept.append(call)
        replays[name] = capture(call)
    return cold_in_turns(replays, rounds, Flush.READ), errors


def installed() -> list[str]:
    """Peers that can be imported here."""
    return [FA3, FLASH_MLA] if has_module("vllm") else []


def _fa3(batch: MlaBatch, a: LatentArguments) -> Call:
    """K is the rotary part, and q's latent part goes with V."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    q, cache = torch.cat((a.q, a.q_rope), dim=-1), a.latent_cache[:, :, None]
    metadata = get_scheduler_metadata(
        batch.rows, batch.queries, batch.kv_len, batch.num_heads, 1, q.shape[-1] - LATENT_DIM, a.seqused_k, qkv_dtype=q.dtype,
        headdim_v=LATENT_DIM, cu_seqlens_q=a.cu_seqlens_q, page_size=batch.page_size, causal=True, num_splits=0,
    )  # fmt: skip
    return lambda: flash_attn_varlen_func(
        q=q[..., LATENT_DIM:], k=cache[..., LATENT_DIM:], v=cache[..., :LATENT_DIM], q_v=q[..., :LATENT_DIM], max_seqlen_q=batch.queries,
        cu_seqlens_q=a.cu_seqlens_q, max_seqlen_k=batch.kv_len, seqused_k=a.seqused_k, block_table=a.page_table,
        softmax_scale=a.softmax_scale, causal=True, fa_version=3, scheduler_metadata=metadata, num_splits=0,
    )  # fmt: skip


def _flash_mla(batch: MlaBatch, a: LatentArguments) -> Call:
    from vllm.third_party.flashmla.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata

    tiles = get_mla_metadata()[0]
    q = torch.cat((a.q, a.q_rope), dim=-1).view(batch.rows, batch.queries, batch.num_heads, -1)
    arguments = (q, a.latent_cache[:, :, None], a.page_table, a.seqused_k, LATENT_DIM, tiles, None, a.softmax_scale, True)
    return lambda: flash_mla_with_kvcache(*arguments)[0]


PEERS: dict[str, Callable[[MlaBatch, LatentArguments], Call]] = {FA3: _fa3, FLASH_MLA: _flash_mla}


def compile_all(batches: list[MlaBatch]) -> None:
    """Compile what the batches need and the cache lacks."""
    arch = gpu_arch()
    ours.compile_all(batch.asked(arch) for batch in batches)


def format_line(timings: list[Timing]) -> str:
    """One batch on one line."""
    own = timings[0]
    parts = [f"{t.kernel} {t.us:.1f} us" for t in timings]
    goal = "" if own.goal_us is None else f" (goal {own.goal_us:g})"
    ending = "" if own.ratio_to_best_peer is None else f" | {own.ratio_to_best_peer:.2f}x best peer"
    rates = f"{own.gb_per_s:.0f} GB/s, {own.tflop_per_s:.0f} TFLOP/s, {100 * own.share_of_roofline:.0f}% of {own.bound_by}"
    return f"{own.batch} | {', '.join(parts)}{goal} | {rates}{ending}"


def write_plot(path: Path, timings: list[Timing]) -> None:
    """Best peer over ours, and our share of the roofline."""
    ours = [t for t in timings if t.kernel == OURS]
    write_overview(path, [Cell("", t.batch, t.ratio_to_best_peer, t.share_of_roofline) for t in ours], ceiling="roofline")
