"""Batches of latent attention on a GPU for proofs and measurements: a kernel's shape, poisoned random batches, and their judgement.

The judgement is the oracle of `tests.support.emulated_mla` for all sequences at once, since a proof of 20,000 batches has no time for them
one by one (`tests/host/test_mla_batches.py` compares both).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from fa4_backend.error_budget import LSE_RELATIVE, rounding_budget
from fa4_backend.kernels.families import KernelSet, latent_kernels
from fa4_backend.kernels.launch_abi import mla_decode_arguments, schedule_arguments
from fa4_backend.kernels.loading import load
from fa4_backend.kernels.mla_decode.config import resolve
from fa4_backend.kernels.schedule.work_list import WorkLists
from fa4_backend.problem import FP8, LATENT, AttentionProblem, BatchLimits
from tests.support.emulated_mla import DIM, LATENT_DIM, Latent

DEVICE, SCALE = "cuda", 192**-0.5
NAN_BYTE = 0xFF  # repeated, NaN in e4m3, bfloat16 and float16
PADDING_ROWS = 3  # of q and out past the last token


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for, and the limits of its batches."""

    heads: int
    query_len: int = 1
    page_size: int = 64
    batch_invariant: bool = False
    dtype: str = "bfloat16"
    kv_dtype: str = "auto"
    tuning: tuple[tuple[str, int], ...] = ()  # fields of the key

    def kernels(self, num_seqs: int, max_seqlen_k: int) -> tuple[KernelSet, BatchLimits]:
        """The kernels and the limits of batches of `num_seqs` sequences."""
        problem = AttentionProblem(
            num_q_heads=self.heads, num_kv_heads=1, head_dim=DIM, head_dim_v=LATENT_DIM, dtype=self.dtype, kv_dtype=self.kv_dtype,
            page_size=self.page_size, arch="sm_90a", kv_source=LATENT, has_lse=True, batch_invariant=self.batch_invariant,
        )  # fmt: skip
        limits = BatchLimits(num_seqs, num_seqs * self.query_len + PADDING_ROWS, max_seqlen_k, self.query_len)
        num_sms = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132
        key = replace(resolve(problem, limits), **dict(self.tuning))  # type: ignore[arg-type]
        return latent_kernels(key, problem, limits, num_sms), limits


class Step:
    """Lists and kernels of a batch: `refresh` makes the lists, `run` attends."""

    def __init__(self, shape: Shape, arguments: Latent, max_seqlen_k: int, **work_fields: int) -> None:
        """work_fields: of `WorkShape`; others are as the kernel is tuned."""
        self.arguments = arguments
        self.kernels, limits = shape.kernels(len(arguments.seqused_k), max_seqlen_k)
        work = replace(self.kernels.work, **work_fields)  # type: ignore[arg-type]
        self.work = WorkLists.allocate(work, limits, DEVICE)
        self.work.slots.fill_(math.nan)
        self.schedule = load(self.kernels.schedule, emulated=False)
        assert self.kernels.decode is not None
        self.decode = load(self.kernels.decode, emulated=False)

    def refresh(self) -> None:
        """The step's lists."""
        self.schedule(*schedule_arguments(self.work, self.arguments.cu_seqlens_q, self.arguments.seqused_k))

    def run(self) -> None:
        """One layer."""
        self.decode(*mla_decode_arguments(self.arguments, self.work))


def draw(
    shape: Shape, query_lens: list[int], kv_lens: list[int], seed: int, *, peaked: float = 1.0, poison: bool = True, device: str = DEVICE
) -> Latent:
    """A batch; what no row sees is NaN: rows of pages past a sequence's end, pages of sequences without a query, page 0, padding rows."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)
    lens, queries = (torch.tensor(x, device=device, dtype=torch.int32) for x in (kv_lens, query_lens))
    pages_of = (lens + shape.page_size - 1) // shape.page_size
    num_used = sum(-(-n // shape.page_size) for n in kv_lens)
    cache = torch.randn(num_used + 2, shape.page_size, DIM, generator=generator, device=device, dtype=dtype)
    scale = None
    if shape.kv_dtype == FP8:
        scale = torch.full((1,), 2.0**-6, device=device)
        cache = (cache * 64).to(torch.float8_e4m3fn)
    table = torch.zeros((len(kv_lens), max(-(-max(kv_lens) // shape.page_size), 1)), dtype=torch.int32, device=device)
    order = torch.randperm(num_used + 1, generator=generator, device=device).int() + 1
    logical = torch.arange(table.shape[1], device=device)
    table[logical < pages_of[:, None]] = order[:num_used]
    unseen = torch.ones(num_used + 2, shape.page_size, dtype=torch.bool, device=device)
    if poison:
        tokens = logical[:, None] * shape.page_size + torch.arange(shape.page_size, device=device)
        seen = tokens < torch.where(queries > 0, lens, 0)[:, None, None]
        unseen[table.long()[logical < pages_of[:, None]]] = ~seen[logical < pages_of[:, None]]
    else:
        unseen[order[:num_used].long()] = False
    cache.view(torch.uint8).masked_fill_(unseen[..., None], NAN_BYTE)
    total_q = sum(query_lens)
    rows = torch.randn(total_q + PADDING_ROWS, shape.heads, DIM, generator=generator, device=device, dtype=dtype) * peaked
    rows[total_q:] = math.nan
    cu = torch.tensor([0, *query_lens], device=device).cumsum(0).int()
    return Latent(
        rows[..., :LATENT_DIM], rows[..., LATENT_DIM:], cache, table, cu, lens,
        torch.full((total_q + PADDING_ROWS, shape.heads, LATENT_DIM), math.nan, device=device, dtype=dtype),
        torch.full((shape.heads, total_q + PADDING_ROWS), math.nan, device=device), SCALE, scale,
    )  # fmt: skip


class Attended(NamedTuple):
    """Float32 attention of all sequences at once, padded to the same number of tokens each."""

    is_token: torch.Tensor  # (num_seqs, most_queries)
    out: torch.Tensor  # (num_seqs, most_queries, heads, 512); of no token: anything
    lse: torch.Tensor  # (num_seqs, most_queries, heads)
    rounded: torch.Tensor  # as `out`, with weights and results rounded to q's dtype


def attend_padded(a: Latent, most_queries: int, most_keys: int) -> Attended:
    """The oracle of sequences of at most so many queries and keys, in tensor operations of fixed shapes."""
    device, page_size = a.q.device, a.latent_cache.shape[1]
    bounds = a.cu_seqlens_q.long()
    queries, lens = bounds.diff(), a.seqused_k.long()
    key, token = torch.arange(most_keys, device=device), torch.arange(most_queries, device=device)
    place = a.page_table.long()[:, key // page_size] * page_size + key % page_size
    stored = a.latent_cache.view(torch.uint8).flatten(0, 1)[place].view(a.latent_cache.dtype)  # torch indexes no FP8 on a GPU
    keys = stored.float().masked_fill(key[:, None] >= lens[:, None, None], 0.0)
    if a.latent_scale is not None:
        keys = keys * a.latent_scale
    is_token = token < queries[:, None]
    of_token = (bounds[:-1, None] + token).clamp(max=a.q.shape[0] - 1)
    q = torch.cat((a.q, a.q_rope), -1)[of_token].float().masked_fill(~is_token[..., None, None], 0.0)
    scores = (q.flatten(1, 2) @ keys.mT).unflatten(1, (most_queries, -1)) * a.softmax_scale
    diagonal = token + (lens - queries)[:, None]
    hidden = (key > diagonal[..., None]) | (key >= lens[:, None, None])
    scores.masked_fill_(hidden[:, :, None], -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = scores.softmax(-1).nan_to_num_(0.0).flatten(1, 2)
    latents = keys[..., :LATENT_DIM]
    out = (weights @ latents).unflatten(1, (most_queries, -1))
    rounded = (weights.to(a.q.dtype).float() @ latents).to(a.q.dtype).float().unflatten(1, (most_queries, -1))
    return Attended(is_token, out, lse, rounded)


def attend(a: Latent) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, lse, and out with weights and results rounded to q's dtype; of the tokens."""
    most_queries, most_keys = max(int(a.cu_seqlens_q.diff().max()), 1), max(int(a.seqused_k.max()), 1)
    r = attend_padded(a, most_queries, most_keys)
    return r.out[r.is_token], r.lse[r.is_token].T, r.rounded[r.is_token]


def judge(a: Latent) -> tuple[float, float]:
    """Largest errors of out and lse as shares of their budgets.

    Raises:
        AssertionError: padding, NaN or infinity is not where it should be, or an error is over budget.
    """
    n = int(a.cu_seqlens_q[-1])
    assert (a.out[n:] == 0).all() and a.lse[:, n:].isneginf().all(), "padding rows: expected 0 and -inf"
    if n == 0:
        return 0.0, 0.0
    want, want_lse, yardstick = attend(a)
    got, got_lse = a.out[:n].float(), a.lse[:, :n]
    assert got.isfinite().all(), f"out: {int((~got.isfinite()).sum())} values are not finite"
    assert torch.equal(got_lse.isneginf(), want_lse.isneginf()), "lse: -inf elsewhere than the oracle's"
    seen = ~want_lse.isneginf()
    assert (got[~seen.T] == 0).all(), "rows without a key: expected 0"
    if not seen.any():
        return 0.0, 0.0
    share = ((got - want).abs().max() / rounding_budget(yardstick, want, a.out.dtype)).item()
    lse_share = ((got_lse - want_lse)[seen].abs().max() / (LSE_RELATIVE * max(1.0, want_lse[seen].abs().max().item()))).item()
    assert share <= 1 and lse_share <= 1, f"share of the budget: out {share:.2f}, lse {lse_share:.2f}"
    return share, lse_share
