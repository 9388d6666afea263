"""More cells for `fa4 bench shapes --more`, which stand in no other list that is timed: do the tables' cells speak for others?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from fa4_backend.bench.batch import BatchShape, Mask
from fa4_backend.bench.decode_batches import DecodeBatch, uniform, with_chunk
from fa4_backend.bench.prefill_batches import PrefillBatch
from fa4_backend.bench.shape_cells import Kind, stored_in

CHUNK = "32 x 4K + a 2K chunk of 6K"
Batch = TypeVar("Batch", bound=BatchShape)


def more_kinds(kv_dtype: str = "bfloat16") -> dict[str, Kind]:
    """Every kind by its name on the command line, K and V in `kv_dtype`."""
    every = {
        "messages": Kind("new messages over cached prefixes, other heads and sizes", tuple(_messages())),
        "d256-decode": Kind("decode rows and drafts of wide heads", tuple(_d256_decode())),
        "d64-decode": Kind("decode rows and drafts of narrow heads", tuple(_d64_decode())),
        "groups": Kind("3, 6, 7 and 12 query heads a KV head, and one", tuple(_groups())),
        "small-decode": Kind("short and few decode rows, and many short ones", tuple(_small_decode())),
        "small-prompts": Kind("prompts of 64 to 8K tokens, windows, full attention", tuple(_small_prompts())),
        "more-drafts": Kind("drafts of 2 to 8 tokens", tuple(_drafts())),
        "more-mixed": Kind("decode rows beside chunks and messages", tuple(_mixed())),
        "pages": Kind("pages of 64, 128 and 256 tokens", tuple(_pages())),
        "more-long-rows": Kind("one to three long rows", tuple(_long_rows())),
    }
    return stored_in(kv_dtype, every)


def heads(batch: Batch, q_heads: int, kv_heads: int, head_dim: int = 128) -> Batch:
    """The batch with other heads."""
    return replace(batch, num_q_heads=q_heads, num_kv_heads=kv_heads, head_dim=head_dim)


def _messages() -> Iterator[BatchShape]:
    message = PrefillBatch(1, 64, 32768)
    yield from (heads(message, *of) for of in ((64, 8, 64), (32, 32, 96), (16, 2, 256), (28, 4), (8, 1)))
    yield replace(heads(message, 16, 16, 192), head_dim_v=128)
    yield heads(PrefillBatch(1, 16, 65536), 8, 4, 256)
    yield replace(heads(PrefillBatch(1, 64, 16384), 16, 8, 256), mask=Mask(softcap=50.0))
    yield replace(heads(message, 64, 8, 64), mask=Mask(window=128, has_sinks=True))
    yield PrefillBatch(1, 9, 131072)
    yield from (PrefillBatch(16, 64, 4096), PrefillBatch(32, 16, 8192))
    yield heads(PrefillBatch(4, 24, 16384), 28, 4)
    yield heads(PrefillBatch(1, 32, 32768), 40, 8)
    yield heads(PrefillBatch(1, 128, 65536), 16, 1)


def _d256_decode() -> Iterator[BatchShape]:
    yield from (heads(uniform(rows, kv), 16, 2, 256) for rows, kv in ((1, 4096), (1, 16384), (8, 4096), (64, 4096)))
    drafts = ((8, 4096, 4), (1, 16384, 5), (64, 2048, 5))
    yield from (heads(uniform(*size), 16, 2, 256) for size in drafts)
    yield heads(uniform(1, 4096), 8, 4, 256)
    yield replace(heads(uniform(8, 4096), 16, 8, 256), mask=Mask(window=4096, softcap=50.0))


def _d64_decode() -> Iterator[BatchShape]:
    yield from (heads(uniform(*size), 64, 8, 64) for size in ((8, 4096), (64, 1024), (16, 4096, 5)))
    yield heads(uniform(8, 4096), 32, 32, 64)
    yield heads(uniform(1, 1024), 9, 3, 64)


def _groups() -> Iterator[BatchShape]:
    yield from (heads(uniform(*size), 28, 4) for size in ((1, 4096), (64, 4096), (16, 4096, 4)))
    yield from (heads(uniform(8, 2048), 12, 2), heads(uniform(1, 4096), 48, 8), heads(uniform(16, 4096, 5), 48, 4))
    yield from (heads(PrefillBatch(8, 4096, 4096), *of) for of in ((28, 4), (12, 2), (24, 2), (32, 32)))
    yield heads(PrefillBatch(4, 512, 8192), 28, 4)
    yield heads(uniform(64, 1024), 32, 32)


def _small_decode() -> Iterator[BatchShape]:
    sizes = ((256, 512), (512, 1024), (1, 128), (8, 128), (32, 256), (2, 2048), (4, 8192))
    yield from (uniform(*size) for size in sizes)
    yield from (heads(uniform(rows, kv), 4, 1) for rows, kv in ((1, 1024), (64, 512)))
    yield from (heads(uniform(128, 512), 8, 1), heads(uniform(16, 1024), 16, 2))


def _small_prompts() -> Iterator[BatchShape]:
    yield from (PrefillBatch(1, n, n) for n in (256, 512, 1024, 2048, 8192))
    yield from (PrefillBatch(rows, n, n) for rows, n in ((8, 256), (64, 64), (32, 128)))
    yield from (heads(PrefillBatch(rows, n, n), q_heads, 1) for rows, n, q_heads in ((8, 4096, 16), (1, 4096, 8), (1, 8192, 8)))
    yield PrefillBatch(2, 16384, 16384, mask=Mask(window=4096))
    yield replace(heads(PrefillBatch(8, 512, 512), 16, 16, 64), mask=Mask(is_causal=False))
    yield heads(PrefillBatch(1, 2048, 2048), 16, 2, 256)


def _drafts() -> Iterator[BatchShape]:
    sizes = ((64, 4096, 2), (1, 16384, 8), (64, 1024, 8), (128, 2048, 4), (4, 32768, 6))
    yield from (uniform(*size) for size in sizes)
    yield from (heads(uniform(16, 4096, 8), *of) for of in ((8, 1), (64, 8, 64), (5, 1)))
    yield heads(uniform(1, 32768, 8), 64, 8)


def _mixed() -> Iterator[BatchShape]:
    chunk = with_chunk(CHUNK, 32, 4096, 2048, 6144)
    yield from (heads(chunk, 16, 2, 256), heads(chunk, 8, 1), replace(heads(chunk, 64, 8, 64), mask=Mask(has_sinks=True)))
    yield with_chunk("64 x 2K + 16 tokens of 16K", 64, 2048, 16, 16384)
    yield with_chunk("1 x 1K + a 256 chunk of 256", 1, 1024, 256, 256)
    yield with_chunk("8 x 8K + a 128 chunk of 64K", 8, 8192, 128, 65536)
    yield heads(with_chunk("64 x 4K + a 1K chunk of 1K", 64, 4096, 1024, 1024), 28, 4)
    yield DecodeBatch("16 x 4K + 4 messages of 64 of 16K", (4096,) * 16 + (16384,) * 4, (1,) * 16 + (64,) * 4)


def _pages() -> Iterator[BatchShape]:
    yield from (replace(PrefillBatch(8, 4096, 4096), page_size=size) for size in (64, 128))
    yield from (replace(uniform(rows, kv), page_size=size) for rows, kv, size in ((64, 4096, 128), (1, 16384, 256)))


def _long_rows() -> Iterator[BatchShape]:
    one = ((4, 1, 4096), (4, 1, 16384), (32, 8, 32768))
    yield from (heads(uniform(1, kv), q_heads, kv_heads) for q_heads, kv_heads, kv in one)
    yield from (heads(uniform(2, 8192), 16, 1), heads(uniform(3, 16384), 8, 1))
