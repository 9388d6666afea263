"""The batches that `fa4 bench prefill` times."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fa4_backend.bench.batch import BatchShape, Mask, short
from fa4_backend.problem import FP8, RAGGED


@dataclass(frozen=True)
class PrefillBatch(BatchShape):
    """`rows` equal sequences: the last `query_len` of `kv_len` tokens are queries."""

    rows: int
    query_len: int
    kv_len: int

    @property
    def row_lens(self) -> tuple[tuple[int, int], ...]:
        """(query length, KV length) of each row."""
        return ((self.query_len, self.kv_len),) * self.rows

    @property
    def size(self) -> str:
        """The rows in a few words."""
        return f"{self.rows} x {short(self.query_len)}" + ("" if self.query_len == self.kv_len else f" of {short(self.kv_len)}")

    @property
    def title(self) -> str:
        """The label where prompts stand beside decode rows."""
        return f"{self.label} prompts" if self.query_len == self.kv_len else self.label

    @property
    def decode_query_len(self) -> int:
        """Longest query of a decode row: an engine without drafts."""
        return 1


def named_batches(kv_dtype: str = "bfloat16") -> dict[str, list[PrefillBatch]]:
    """Sets by name, K and V in `kv_dtype`. `whole`: 32K tokens as whole prompts; `chunked`: late chunks of long prompts; `heads`, `full`:
    other shapes; `wide`: head dimensions 256 and (192, 128); `prefix`: short messages over long cached prefixes, whose tiles are cut along
    KV."""
    whole = [PrefillBatch(32768 // n, n, n) for n in (1024, 4096, 16384, 32768)]
    chunked = [PrefillBatch(4, 512, 8192), PrefillBatch(1, 2048, 32768)]
    some = whole[:3]
    heads = [replace(b, num_q_heads=64) for b in [*some, *chunked]]
    heads += [replace(b, num_q_heads=16, num_kv_heads=16, head_dim=64) for b in some]
    heads += [replace(b, num_q_heads=16, num_kv_heads=2, head_dim=256) for b in some] if kv_dtype == FP8 else []
    grouped = replace(whole[1], num_q_heads=8, num_kv_heads=4, head_dim=256)
    mla = PrefillBatch(4, 4096, 4096, num_q_heads=16, num_kv_heads=16, head_dim=192, head_dim_v=128)
    wide = [grouped, replace(grouped, rows=1, query_len=16384, kv_len=16384)]
    wide += [replace(grouped, rows=4, num_q_heads=16, num_kv_heads=2), mla, replace(mla, rows=2, query_len=16384, kv_len=16384)]
    prefix = [
        PrefillBatch(1, 16, 65536),
        PrefillBatch(1, 64, 32768),
        PrefillBatch(1, 256, 65536),
        PrefillBatch(1, 512, 131072),
        PrefillBatch(8, 128, 16384),
    ]
    full = [replace(b, mask=Mask(is_causal=False)) for b in some]
    sets = {"whole": whole, "chunked": chunked, "heads": heads, "full": full, "wide": wide, "prefix": prefix}
    return {name: [replace(b, kv_dtype=kv_dtype) for b in batches] for name, batches in sets.items()}


def ragged_batches(kv_dtype: str = "bfloat16") -> dict[str, list[PrefillBatch]]:
    """Sets of batches without pages. `mla`: prompts of models with multi-head latent attention, whose K and V are made for each query head,
    by 16 heads and by 128; `context`: queries that see all of an earlier chunk; `whole`: grouped heads."""
    sixteen = PrefillBatch(32, 1024, 1024, num_q_heads=16, num_kv_heads=16, head_dim=192, head_dim_v=128, kv_source=RAGGED)
    mla = [replace(sixteen, rows=rows, query_len=n, kv_len=n) for rows, n in ((32, 1024), (8, 4096), (2, 16384))]
    mla.append(replace(sixteen, rows=1, query_len=8192, kv_len=8192, num_q_heads=128, num_kv_heads=128))
    context = [replace(sixteen, rows=4, query_len=2048, kv_len=8192, mask=Mask(is_causal=False))]
    grouped = PrefillBatch(8, 4096, 4096, kv_source=RAGGED)
    sets = {"mla": mla, "context": context, "whole": [grouped, replace(grouped, rows=2, query_len=16384, kv_len=16384)]}
    return {name: [replace(b, kv_dtype=kv_dtype) for b in batches] for name, batches in sets.items()}
