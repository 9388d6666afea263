"""The batches that `fa4 bench decode` times, without tensors and with them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import torch

from fa4_backend.problem import DTYPE_BYTES, SHORT_NAMES

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class DecodeBatch:
    """One batch: KV lengths and query lengths of its rows, and the heads."""

    name: str
    kv_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    kv_dtype: str = "bfloat16"

    @property
    def label(self) -> str:
        """Heads, page size and batch on one line."""
        kv = f" {SHORT_NAMES[self.kv_dtype]} KV" if self.kv_dtype in SHORT_NAMES else ""
        return f"{self.num_q_heads}/{self.num_kv_heads} d{self.head_dim}{kv} page {self.page_size}: {self.name}"

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that must be read once."""
        return 2 * sum(self.kv_lens) * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.kv_dtype]

    @property
    def max_query_len(self) -> int:
        """Longest query."""
        return max(self.query_lens)

    @property
    def decode_query_len(self) -> int:
        """Longest query of a decode row; longer ones in the batch are prefill chunks."""
        return min(self.query_lens)


def uniform(rows: int, kv_len: int, query_len: int = 1) -> DecodeBatch:
    """`rows` equal rows."""
    queries = f", {query_len} queries" if query_len > 1 else ""
    return DecodeBatch(f"{rows} x {_short(kv_len)}{queries}", (kv_len,) * rows, (query_len,) * rows)


def with_chunk(name: str, rows: int, kv_len: int, chunk_len: int, chunk_kv_len: int) -> DecodeBatch:
    """`rows` equal decode rows and one prefill chunk behind them."""
    return DecodeBatch(name, (kv_len,) * rows + (chunk_kv_len,), (1,) * rows + (chunk_len,))


def ragged_batches() -> list[DecodeBatch]:
    """The batches where schedules differ; the same lengths in every run."""
    draw = random.Random(7)

    def log_uniform(rows: int, low: int, high: int) -> tuple[int, ...]:
        return tuple(int(math.exp(draw.uniform(math.log(low), math.log(high)))) for _ in range(rows))

    named = {
        "64 rows, log-uniform 128..32K": log_uniform(64, 128, 32768),
        "256 rows, log-uniform 64..8K": log_uniform(256, 64, 8192),
        "31 x 1K + 1 x 128K": (1024,) * 31 + (131072,),
        "7 x 512 + 1 x 64K": (512,) * 7 + (65536,),
    }
    return [DecodeBatch(name, lens, (1,) * len(lens)) for name, lens in named.items()]


def issue_batches(kv_dtype: str = "bfloat16") -> dict[str, list[DecodeBatch]]:
    """Named sets with K and V in `kv_dtype`. `grid`: batch x KV; `heads`: other heads, pages and query lengths; `ragged`; `mixed`: with a
    prefill chunk; `rows`: 16 to 96 packed query rows a KV head; `quantised`: where FP8 K and V are
    compared with 16-bit ones."""
    sizes = [(rows, kv) for rows in (1, 8, 64) for kv in (1024, 4096, 16384)]
    grid = [uniform(*size) for size in [*sizes[:3], (1, 131072), *sizes[3:]]]
    some = [uniform(1, 4096), uniform(8, 4096), uniform(64, 4096)]
    heads = [
        *(replace(b, num_q_heads=64, num_kv_heads=8) for b in some),
        *(replace(b, num_q_heads=32, num_kv_heads=32) for b in some),
        *(replace(b, num_q_heads=9, num_kv_heads=3, head_dim=64) for b in some),
        *(replace(b, num_q_heads=16, num_kv_heads=2) for b in some),
        *(replace(b, page_size=64) for b in some),
        *(uniform(rows, 4096, query_len) for rows in (1, 32) for query_len in (2, 4)),
    ]
    mixed = [
        with_chunk("32 x 4K + a 2K chunk of 6K", 32, 4096, 2048, 6144),
        with_chunk("16 x 2K + a prompt of 8K", 16, 2048, 8000, 8000),
        with_chunk("128 x 1K + a prompt of 2K", 128, 1024, 2048, 2048),
        with_chunk("250 x 2K + a 2K chunk of 4K", 250, 2048, 2048, 4096),
        with_chunk("128 x 4K + a 2K chunk of 8K", 128, 4096, 1920, 8000),
        with_chunk("64 x 8K + a 512 chunk of 4K", 64, 8192, 512, 4096),
        with_chunk("8 x 16K + a 512 chunk of 512", 8, 16384, 512, 512),
        with_chunk("32 x 4K + 64 tokens of 32K", 32, 4096, 64, 32768),
    ]
    many, one = uniform(16, 4096, 8), uniform(16, 4096, 4)
    rows = [
        replace(many, num_q_heads=64),
        replace(one, num_q_heads=16, num_kv_heads=1),
        *(replace(uniform(8, 4096), num_q_heads=heads, num_kv_heads=1, head_dim=dim) for heads, dim in ((48, 64), (71, 64), (96, 128))),
        replace(uniform(1, 16384), num_q_heads=16, num_kv_heads=1),
    ]
    quantised = [
        *(b for b in grid if max(b.kv_lens) <= 16384 and b.name != "8 x 16K"),
        uniform(32, 4096, 4),
        replace(uniform(64, 4096), num_q_heads=64, num_kv_heads=8, head_dim=64),
        replace(uniform(32, 4096), num_q_heads=16, num_kv_heads=2, head_dim=256),
    ]
    sets = {"grid": grid, "heads": heads, "ragged": ragged_batches(), "mixed": mixed, "rows": rows, "quantised": quantised}
    return {name: [replace(b, kv_dtype=kv_dtype) for b in batches] for name, batches in sets.items()}


@dataclass
class BatchTensors:
    """A batch on the GPU: random values, shuffled pages, K and V of a token adjacent as in vLLM 0.33; FP8 K and V with a scale of 1."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    out: torch.Tensor
    pages_of: list[int]

    @classmethod
    def make(cls, batch: DecodeBatch) -> BatchTensors:
        """Draw the tensors; the seed is the caller's."""
        b, device = batch, "cuda"
        pages_of = [-(-n // b.page_size) for n in b.kv_lens]
        num_pages = sum(pages_of) + 8
        pool = torch.randn(num_pages, b.page_size, b.num_kv_heads, 2 * b.head_dim, device=device, dtype=DTYPE).to(
            getattr(torch, b.kv_dtype)
        )
        k_cache, v_cache = pool.split(b.head_dim, dim=-1)
        shuffled = torch.randperm(num_pages, device=device).int()
        page_table = torch.zeros(len(pages_of), max(pages_of), device=device, dtype=torch.int32)
        at = 0
        for row, pages in enumerate(pages_of):
            page_table[row, :pages] = shuffled[at : at + pages]
            at += pages
        cu_seqlens_q = torch.tensor([0, *b.query_lens], device=device).cumsum(0).int()
        q = torch.randn(sum(b.query_lens), b.num_q_heads, b.head_dim, device=device, dtype=DTYPE)
        seqused_k = torch.tensor(b.kv_lens, device=device, dtype=torch.int32)
        return cls(q, k_cache, v_cache, page_table, cu_seqlens_q, seqused_k, torch.empty_like(q), pages_of)

    def error(self, batch: DecodeBatch) -> float:
        """Largest error of `out` on the batch's longest decode row against float32 attention."""
        row = max(range(len(batch.kv_lens)), key=lambda i: (batch.query_lens[i] == batch.decode_query_len, batch.kv_lens[i]))
        kv_len, query_len = batch.kv_lens[row], batch.query_lens[row]
        pages = self.page_table[row, : self.pages_of[row]].long()
        group = batch.num_q_heads // batch.num_kv_heads
        k, v = (gathered(x, pages).flatten(0, 1)[:kv_len].float() for x in (self.k_cache, self.v_cache))
        begin = int(self.cu_seqlens_q[row])
        q = self.q[begin : begin + query_len].float().unflatten(1, (batch.num_kv_heads, group))
        scores = torch.einsum("qhgd,khd->hgqk", q, k) * batch.head_dim**-0.5
        hidden = torch.arange(kv_len, device=q.device)[None] > torch.arange(query_len, device=q.device)[:, None] + kv_len - query_len
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        want = torch.einsum("hgqk,khd->qhgd", weights, v).flatten(1, 2)
        return (self.out[begin : begin + query_len].float() - want).abs().max().item()


def gathered(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Pages of a cache; by bytes where it is FP8, of which torch gathers none."""
    return cache.view(torch.uint8)[pages].view(cache.dtype) if cache.dtype.itemsize == 1 else cache[pages]


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
