"""The cells of `fa4 bench shapes`: what traffic brings beside equal rows of usual heads, by kind, 5 to 10 cells each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from fa4_backend.bench.batch import BatchShape, Mask
from fa4_backend.bench.decode_batches import DecodeBatch, issue_batches, ragged_batches, uniform, with_chunk
from fa4_backend.bench.prefill_batches import PrefillBatch, named_batches


class Kind(NamedTuple):
    """What the cells of a kind have in common, and the cells."""

    what: str
    batches: tuple[BatchShape, ...]


def kinds(kv_dtype: str = "bfloat16") -> dict[str, Kind]:
    """Every kind by its name on the command line, K and V in `kv_dtype`."""
    every = {
        "prefix": Kind("a new message over a long cached prefix", tuple(_prefix())),
        "drafts": Kind("drafts with wide groups: 16 to 128 packed rows a KV head", tuple(_drafts())),
        "one-kv-head": Kind("one KV head, many query heads", tuple(_one_kv_head())),
        "one-kv-head-prompts": Kind("the same: prompts, messages and steps with both", tuple(_one_kv_head_prompts())),
        "long-row": Kind("one long row", tuple(_long_row())),
        "mixed": Kind("decode rows beside a prefill chunk", tuple(issue_batches()["mixed"])),
        "ragged": Kind("decode rows of many lengths", tuple(_ragged())),
        "d256": Kind("wide heads, with and without soft cap", tuple(_d256())),
        "d192": Kind("MLA's prefill shape", tuple(_d192())),
        "d96": Kind("heads of 96", tuple(_d96())),
        "groups-of-5": Kind("five query heads a KV head", tuple(_groups_of_five())),
        "windows": Kind("heads of 64 with sinks, every other layer with a window", tuple(_windows())),
    }
    return stored_in(kv_dtype, every)


def stored_in(kv_dtype: str, every: Mapping[str, Kind]) -> dict[str, Kind]:
    """The same kinds, K and V in `kv_dtype`."""
    return {name: Kind(kind.what, tuple(replace(b, kv_dtype=kv_dtype) for b in kind.batches)) for name, kind in every.items()}


def matching(chosen: Mapping[str, Kind], pattern: str) -> dict[str, Kind]:
    """The cells whose title matches a regular expression, and the kinds that have any.

    Raises:
        ValueError: no cell matches.
    """
    found = {name: Kind(kind.what, tuple(b for b in kind.batches if re.search(pattern, b.title))) for name, kind in chosen.items()}
    found = {name: kind for name, kind in found.items() if kind.batches}
    if not found:
        raise ValueError(f"expected a regular expression that matches a cell's title, got {pattern!r}")
    return found


def _prefix() -> Iterator[BatchShape]:
    yield from named_batches()["prefix"]
    yield PrefillBatch(1, 32, 131072, num_q_heads=64)
    yield PrefillBatch(4, 32, 32768, num_q_heads=64)
    yield PrefillBatch(1, 1024, 65536)
    yield PrefillBatch(1, 64, 65536, num_q_heads=16, num_kv_heads=2)
    yield PrefillBatch(2, 64, 32768, num_q_heads=32, num_kv_heads=32)


def _drafts() -> Iterator[BatchShape]:
    yield from issue_batches()["rows"][:2]
    wide: dict[str, Any] = {"num_q_heads": 64}
    yield from (replace(uniform(rows, kv, 8), **wide) for rows, kv in ((1, 4096), (4, 16384), (64, 2048)))
    yield replace(uniform(16, 4096, 4), **wide)
    yield replace(uniform(16, 4096, 8), num_q_heads=16, num_kv_heads=1)
    yield replace(uniform(32, 2048, 4), num_q_heads=32, num_kv_heads=2)
    yield replace(uniform(8, 8192, 5), num_q_heads=24, num_kv_heads=2)


def _one_kv_head() -> Iterator[BatchShape]:
    yield from (b for b in issue_batches()["rows"] if b.num_kv_heads == 1 and b.num_q_heads > 16)
    sizes = (
        (128, 128, 8, 4096), (96, 128, 1, 16384), (71, 64, 64, 1024), (48, 128, 32, 4096), (32, 128, 16, 4096), (64, 64, 1, 4096),
        (64, 64, 64, 4096),
    )  # fmt: skip
    yield from (replace(uniform(rows, kv), num_q_heads=heads, num_kv_heads=1, head_dim=dim) for heads, dim, rows, kv in sizes)


def _one_kv_head_prompts() -> Iterator[BatchShape]:
    prompt, message = PrefillBatch(8, 4096, 4096), PrefillBatch(1, 64, 32768)
    beside = with_chunk("32 x 4K + 64 tokens of 32K", 32, 4096, 64, 32768)
    for heads, dim, batches in ((64, 64, (prompt, message, beside)), (71, 64, (prompt,)), (48, 128, (message, beside))):
        yield from (replace(batch, num_q_heads=heads, num_kv_heads=1, head_dim=dim) for batch in batches)


def _long_row() -> Iterator[BatchShape]:
    slices = ((16, 1, 16384), (16, 1, 4096), (16, 1, 65536), (8, 1, 16384), (16, 2, 16384), (32, 8, 16384), (32, 8, 131072))
    yield from (replace(uniform(1, kv), num_q_heads=heads, num_kv_heads=kv_heads) for heads, kv_heads, kv in slices)


def _ragged() -> Iterator[BatchShape]:
    batches = ragged_batches()
    yield from batches
    yield from (replace(b, num_q_heads=64) for b in batches[:2])
    rows = batches[0].kv_lens[:32]
    yield DecodeBatch("32 rows, log-uniform 128..32K, 4 queries", rows, (4,) * 32)
    yield replace(batches[3], num_q_heads=16, num_kv_heads=2)


def _d256() -> Iterator[BatchShape]:
    yield from (b for b in named_batches()["wide"] if b.head_dim == 256)
    long = PrefillBatch(1, 16384, 16384, num_q_heads=16, num_kv_heads=2, head_dim=256)
    yield long
    yield replace(long, rows=4, query_len=512, kv_len=8192)
    yield replace(long, rows=4, query_len=4096, kv_len=4096, num_q_heads=32, num_kv_heads=16)
    capped = PrefillBatch(8, 4096, 4096, num_q_heads=16, num_kv_heads=8, head_dim=256, mask=Mask(softcap=50.0))
    yield capped
    yield replace(capped, rows=1, query_len=16384, kv_len=16384)
    yield replace(capped, rows=4, query_len=512, kv_len=8192)
    yield replace(capped, mask=Mask(softcap=50.0, window=4096), rows=2, query_len=8192, kv_len=8192)


def _d192() -> Iterator[BatchShape]:
    yield from (b for b in named_batches()["wide"] if b.head_dim == 192)
    whole = PrefillBatch(8, 4096, 4096, num_q_heads=16, num_kv_heads=16, head_dim=192, head_dim_v=128)
    yield whole
    yield replace(whole, rows=16, query_len=1024, kv_len=1024)
    yield replace(whole, rows=1, num_q_heads=128, num_kv_heads=128)
    yield replace(whole, rows=4, query_len=512, kv_len=8192)
    yield replace(whole, rows=4, num_q_heads=16, num_kv_heads=2)


def _d96() -> Iterator[BatchShape]:
    whole = PrefillBatch(8, 4096, 4096, num_q_heads=32, num_kv_heads=32, head_dim=96)
    yield whole
    yield replace(whole, rows=2, query_len=16384, kv_len=16384)
    yield replace(whole, rows=32, query_len=1024, kv_len=1024)
    yield replace(whole, rows=4, query_len=512, kv_len=8192)
    yield replace(whole, num_kv_heads=8)
    yield from (replace(uniform(rows, kv), num_kv_heads=32, head_dim=96) for rows, kv in ((1, 4096), (8, 4096), (64, 1024)))


def _groups_of_five() -> Iterator[BatchShape]:
    five: dict[str, Any] = {"num_q_heads": 40, "num_kv_heads": 8}
    yield from (replace(b, **five) for b in named_batches()["whole"][:3])
    yield from (replace(b, **five) for b in named_batches()["chunked"])
    yield from (replace(uniform(rows, 4096), **five) for rows in (1, 8, 64))
    yield replace(uniform(16, 4096, 4), **five)


def _windows() -> Iterator[BatchShape]:
    heads: dict[str, Any] = {"num_q_heads": 64, "num_kv_heads": 8, "head_dim": 64}
    near, far = Mask(window=128, has_sinks=True), Mask(has_sinks=True)
    yield from (replace(uniform(rows, kv), mask=near, **heads) for rows, kv in ((1, 4096), (64, 4096), (256, 16384)))
    yield from (replace(uniform(rows, 4096), mask=far, **heads) for rows in (1, 64))
    whole = PrefillBatch(8, 4096, 4096, **heads)
    yield from (replace(whole, mask=mask) for mask in (near, far))
    yield replace(whole, rows=4, query_len=512, kv_len=8192, mask=near)
    yield replace(whole, rows=1, query_len=64, kv_len=32768, mask=far)
