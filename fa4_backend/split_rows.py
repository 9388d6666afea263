"""Long rows of latent attention as several short ones over the same pages: a message behind a long context, served as decode.

The kernels of latent attention serve rows of up to `MAX_LATENT_QUERY_LEN` queries. Queries of a causal row need nothing of each other, so a
longer one is as many rows as it takes, each with the keys that its last query sees and with the page table's row again. Lengths and tables
are rewritten on the device from what the device holds; the host says only how many rows there are at most. So nothing waits, and a row
whose length on the device is below the host's stays right.

What it is for: an engine that does not take a row as decode makes keys and values of its whole context first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fa4_backend.arch import REFERENCE_ARCH
from fa4_backend.kernels.families import LATENT_DECODE
from fa4_backend.kernels.mla_decode.config import TILE_M
from fa4_backend.kernels.schedule.limits import largest_num_seqs
from fa4_backend.problem import AttentionProblem, BatchLimits
from fa4_backend.support import MAX_LATENT_QUERY_LEN

if TYPE_CHECKING:
    import torch

# Queries of a row up to which it is cheaper to attend to latents than to make keys and values of its context, where that is long.
# H200, a layer, us as decode and as prefill, behind 32K (2026-11-29, `python -m tests.device.measure_messages`):
#   128 heads  64 queries 772 and 4,123   256: 3,416 and 4,831   320: 4,339 and 5,337   512: 6,985 and 6,106
#   16 heads   64 queries 122 and 570   256: 439 and 613   320: 554 and 713   512: 853 and 723
# As long at 400 to 495 queries behind 2K to 32K. Prefill's keys are joined by torch's copies there; of 128 heads vLLM has FlashInfer's
# kernel for it, which takes 1,100 us less behind 32K (690 a layer in an engine): as long at some 310.
HOPPERS_QUERIES = 320
# FP8 latents: 128 heads 128: 2,407 and 4,128   192: 3,611 and 4,445   256: 4,999 and 4,473
# As long at 231 to 235 queries of 128 heads, with FlashInfer's joining at some 170, and at 277 to 345 of 16.
HOPPERS_FP8_QUERIES = 192
# Blackwell, by counts of a head: modelled 1,098 TFLOP/s for 2 * (576 + 512) operations a query and key, 1,500 for 2 * (192 + 128); a key of
# the context takes 2 * 512 * 256 operations at 1,800 and 1,770 bytes at 7.2 TB/s. As long at 252.
OTHERS_QUERIES = 256
LEAST_ROWS = 4096  # that a step has room for, or twice its sequences: few sizes, whose schedules wheels carry
TABLE_ENTRIES = 1 << 24  # of the page table's copy at most, 64 MiB: all those rows of 256K tokens in pages of 64


def row_queries(problem: AttentionProblem) -> int:
    """Queries of a row that a long one is cut into: as many as fill a row group, whose place in a step's lists costs the same with fewer.
    The reference has no tiles and takes the longest rows."""
    if problem.arch == REFERENCE_ARCH:
        return MAX_LATENT_QUERY_LEN
    key = LATENT_DECODE[problem.target_arch](problem, BatchLimits(1, MAX_LATENT_QUERY_LEN, 1, MAX_LATENT_QUERY_LEN))
    return max(1, min(MAX_LATENT_QUERY_LEN, key.cluster_size * TILE_M // key.num_heads))


def message_queries(problem: AttentionProblem) -> int:
    """Queries of a row behind a long context up to which it is cheaper as decode."""
    if problem.arch != REFERENCE_ARCH and problem.target_arch == "sm_90a":
        return HOPPERS_FP8_QUERIES if problem.has_kv_scales else HOPPERS_QUERIES
    return OTHERS_QUERIES


def is_cheaper_absorbed(queries: Iterable[int], contexts: Iterable[int], most: int) -> bool:
    """Whether rows of so many queries behind contexts of so many keys are together cheaper as decode.

    Absorbed, each query and key that see each other cost the more of both ways; otherwise each key of a context costs what `most` of those
    do: `message_queries`.
    """
    pairs = sum(q * (2 * k + q) for q, k in zip(queries, contexts, strict=True))  # twice the queries and keys that see each other
    return pairs < 2 * most * sum(contexts)


def message_limits(limits: BatchLimits, problem: AttentionProblem, queries: int | None = None) -> BatchLimits | None:
    """Limits of the plan that serves a step with messages; None where there is none: rows' bits must not depend on the batch, which decides
    between decode and prefill, or there is no room for more rows than sequences.

    Args:
        limits: of the engine's other steps, of which the longest context and the tokens of a step count.
        queries: of a row after the split, at most; None: `row_queries`.
    """
    queries = row_queries(problem) if queries is None else queries
    rows = min(max(LEAST_ROWS, 2 * limits.max_num_seqs), TABLE_ENTRIES // _pages(limits, problem.page_size))
    if problem.arch != REFERENCE_ARCH:
        rows = min(rows, largest_num_seqs(problem.target_arch, limits.max_seqlen_k))
    if problem.batch_invariant or rows <= limits.max_num_seqs:
        return None
    return BatchLimits(rows, max(limits.max_num_tokens, queries), limits.max_seqlen_k, queries)


def _pages(limits: BatchLimits, page_size: int) -> int:
    """Pages of the longest sequence."""
    return -(-limits.max_seqlen_k // page_size)


class ShortRows(NamedTuple):
    """A step's rows after the split: what `AttentionMetadata.refresh` and the operator take. Views of `SplitRows`' buffers."""

    cu_seqlens_q: torch.Tensor  # (num_rows + 1,) int32
    seqused_k: torch.Tensor  # (num_rows,) int32
    page_table: torch.Tensor  # (num_rows, max_pages_per_seq) int32


@dataclass(frozen=True)
class SplitRows:
    """Buffers of a plan whose rows have at most `queries` queries. Addresses never change after `allocate`."""

    queries: int
    max_rows: int
    max_pages: int  # of a sequence
    places: torch.Tensor  # (max_rows,) int32, written like the others in each step: an engine may discard device memory while it sleeps
    cu_seqlens_q: torch.Tensor  # (max_rows + 1,) int32
    seqused_k: torch.Tensor  # (max_rows,) int32
    page_table: torch.Tensor  # (max_rows * max_pages,) int32

    @classmethod
    def allocate(cls, limits: BatchLimits, page_size: int, device: torch.device) -> SplitRows:
        """Buffers for steps within `limits`, which `message_limits` gave."""
        import torch

        rows, pages = limits.max_num_seqs, _pages(limits, page_size)

        def ints(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return cls(limits.decode_query_len, rows, pages, ints(rows), ints(rows + 1), ints(rows), ints(rows * pages))

    def num_rows(self, queries: Iterable[int]) -> int:
        """Rows that sequences of so many queries are cut into."""
        return sum(-(-q // self.queries) for q in queries)

    def split(self, cu_seqlens_q: torch.Tensor, seqused_k: torch.Tensor, page_table: torch.Tensor, num_rows: int) -> ShortRows:
        """Cut a step's rows. No sync; what is left of `num_rows` behind the last row has no query.

        Args:
            cu_seqlens_q: (batch + 1,) int32, exclusive prefix sum of query tokens.
            seqused_k: (batch,) int32, valid KV tokens, the step's included.
            page_table: (batch, max_pages_per_seq) int32, physical page of each logical page.
            num_rows: host upper bound of the rows after the split, of `num_rows` over the lengths.

        Raises:
            ValueError: more rows than there is room for, or no sequence.
        """
        import torch

        batch = seqused_k.shape[0]
        if not (batch and num_rows <= self.max_rows):
            raise ValueError(f"num_rows: expected at most {self.max_rows} of at least one sequence, got {num_rows} of {batch}")
        begins, ends = cu_seqlens_q[:-1], cu_seqlens_q[1:]
        rows_of = (ends - begins + (self.queries - 1)).div_(self.queries, rounding_mode="floor")
        rows_until = rows_of.cumsum(0, dtype=torch.int32)
        places = torch.arange(num_rows, out=self.places[:num_rows])
        seq_idx = torch.searchsorted(rows_until, places, right=True).clamp_(max=batch - 1)
        end = ends[seq_idx]  # of the sequence's queries; rows behind the last begin there, and so are empty
        begin = begins[seq_idx] + (places - (rows_until - rows_of)[seq_idx]) * self.queries
        starts = self.cu_seqlens_q[: num_rows + 1]
        torch.minimum(begin, end, out=starts[:-1])
        starts[-1:].copy_(cu_seqlens_q[-1:])
        lens = self.seqused_k[:num_rows]
        torch.sub(seqused_k[seq_idx], end - starts[1:], out=lens)
        lens.clamp_(min=0)
        width = min(page_table.shape[1], self.max_pages)
        table = self.page_table[: num_rows * width].view(num_rows, width)
        torch.index_select(page_table[:, :width], 0, seq_idx, out=table)
        return ShortRows(starts, lens, table)
