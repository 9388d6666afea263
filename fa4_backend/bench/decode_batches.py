"""The batches that `fa4 bench decode` times."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from fa4_backend.bench.batch import BatchShape, short


@dataclass(frozen=True)
class DecodeBatch(BatchShape):
    """One batch: KV lengths and query lengths of its rows. Queries as long as the shortest are decode rows, longer ones prefill chunks."""

    name: str
    kv_lens: tuple[int, ...]
    query_lens: tuple[int, ...]

    @property
    def row_lens(self) -> tuple[tuple[int, int], ...]:
        """(query length, KV length) of each row."""
        return tuple(zip(self.query_lens, self.kv_lens, strict=True))

    @property
    def size(self) -> str:
        """The rows in a few words."""
        return self.name

    @property
    def decode_query_len(self) -> int:
        """Longest query of a decode row; longer ones in the batch are prefill chunks."""
        return min(self.query_lens)


def uniform(rows: int, kv_len: int, query_len: int = 1) -> DecodeBatch:
    """`rows` equal rows."""
    queries = f", {query_len} queries" if query_len > 1 else ""
    return DecodeBatch(f"{rows} x {short(kv_len)}{queries}", (kv_len,) * rows, (query_len,) * rows)


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
