"""The batches that `fa4 bench prefill` times, without tensors and with them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fa4_backend.bench.decode_batches import gathered
from fa4_backend.problem import FP8, KV_SHORT_NAMES, PAGED, RAGGED

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class PrefillBatch:
    """`rows` equal sequences: the last `query_len` of `kv_len` tokens are queries."""

    rows: int
    query_len: int
    kv_len: int
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    head_dim_v: int = 0  # 0: head_dim
    page_size: int = 16
    is_causal: bool = True
    kv_dtype: str = "bfloat16"
    kv_source: str = PAGED

    @property
    def value_dim(self) -> int:
        """Elements of a value or output row."""
        return self.head_dim_v or self.head_dim

    @property
    def label(self) -> str:
        """Heads, page size and batch on one line."""
        kv = f" {KV_SHORT_NAMES[self.kv_dtype]} KV" if self.kv_dtype in KV_SHORT_NAMES else ""
        size = f"{self.rows} x {_short(self.query_len)}" + ("" if self.query_len == self.kv_len else f" of {_short(self.kv_len)}")
        source = f"page {self.page_size}" if self.kv_source == PAGED else self.kv_source
        mask = "" if self.is_causal else " full"
        dims = f"{self.head_dim}/{self.head_dim_v}" if self.head_dim_v else f"{self.head_dim}"
        return f"{self.num_q_heads}/{self.num_kv_heads} d{dims}{kv} {source}{mask}: {size}"

    @property
    def flops(self) -> float:
        """Multiplications and additions of both products over the keys that are seen, and no others."""
        seen = self.query_len * self.kv_len
        if self.is_causal:
            seen -= self.query_len * (self.query_len - 1) // 2
        return 2.0 * self.rows * self.num_q_heads * (self.head_dim + self.value_dim) * seen


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
    full = [replace(b, is_causal=False) for b in some]
    sets = {"whole": whole, "chunked": chunked, "heads": heads, "full": full, "wide": wide, "prefix": prefix}
    return {name: [replace(b, kv_dtype=kv_dtype) for b in batches] for name, batches in sets.items()}


def ragged_batches(kv_dtype: str = "bfloat16") -> dict[str, list[PrefillBatch]]:
    """Sets of batches without pages. `mla`: prompts of models with multi-head latent attention, whose K and V are made for each query head,
    by 16 heads and by 128; `context`: queries that see all of an earlier chunk; `whole`: grouped heads."""
    sixteen = PrefillBatch(32, 1024, 1024, num_q_heads=16, num_kv_heads=16, head_dim=192, head_dim_v=128, kv_source=RAGGED)
    mla = [replace(sixteen, rows=rows, query_len=n, kv_len=n) for rows, n in ((32, 1024), (8, 4096), (2, 16384))]
    mla.append(replace(sixteen, rows=1, query_len=8192, kv_len=8192, num_q_heads=128, num_kv_heads=128))
    context = [replace(sixteen, rows=4, query_len=2048, kv_len=8192, is_causal=False)]
    grouped = PrefillBatch(8, 4096, 4096, kv_source=RAGGED)
    sets = {"mla": mla, "context": context, "whole": [grouped, replace(grouped, rows=2, query_len=16384, kv_len=16384)]}
    return {name: [replace(b, kv_dtype=kv_dtype) for b in batches] for name, batches in sets.items()}


@dataclass
class PrefillTensors:
    """A batch on the GPU: random values; FP8 K and V with a scale of 1.

    With pages they are shuffled, and K and V of a token adjacent, as in vLLM 0.33. Without, K is dense, and V the second half of rows that
    begin with the part of K that has no rotary embedding, as vLLM's projection of latents makes both.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    out: torch.Tensor
    cu_seqlens_k: torch.Tensor | None = None

    @classmethod
    def make(cls, batch: PrefillBatch) -> PrefillTensors:
        """Draw the tensors; the seed is the caller's."""
        b, device = batch, "cuda"
        table = cu_seqlens_k = None
        if b.kv_source == PAGED:
            pages = -(-b.kv_len // b.page_size)
            num_pages = b.rows * pages + 8
            pool = torch.randn(num_pages, b.page_size, b.num_kv_heads, b.head_dim + b.value_dim, device=device, dtype=DTYPE)
            k_cache, v_cache = pool.to(getattr(torch, b.kv_dtype)).split([b.head_dim, b.value_dim], dim=-1)
            table = torch.randperm(num_pages, device=device)[: b.rows * pages].reshape(b.rows, pages).int()
        else:
            tokens = torch.randn(b.rows * b.kv_len, b.num_kv_heads, b.head_dim + 128 + b.value_dim, device=device, dtype=DTYPE)
            stored = getattr(torch, b.kv_dtype)
            k_cache, v_cache = (
                tokens[..., : b.head_dim].contiguous().to(stored),
                tokens[..., b.head_dim :].contiguous().to(stored)[..., 128:],
            )
            cu_seqlens_k = torch.arange(0, b.rows + 1, device=device, dtype=torch.int32) * b.kv_len
        q = torch.randn(b.rows * b.query_len, b.num_q_heads, b.head_dim, device=device, dtype=DTYPE)
        cu_seqlens_q = torch.arange(0, b.rows + 1, device=device, dtype=torch.int32) * b.query_len
        seqused_k = torch.full((b.rows,), b.kv_len, device=device, dtype=torch.int32)
        out = torch.empty(*q.shape[:2], b.value_dim, device=device, dtype=DTYPE)
        return cls(q, k_cache, v_cache, table, cu_seqlens_q, seqused_k, out, cu_seqlens_k)

    def in_bf16(self) -> PrefillTensors:
        """The same values of K and V in bfloat16."""
        k_cache, v_cache = torch.cat([self.k_cache.to(DTYPE), self.v_cache.to(DTYPE)], dim=-1).split(
            [self.k_cache.shape[-1], self.v_cache.shape[-1]], dim=-1
        )
        return replace(self, k_cache=k_cache, v_cache=v_cache)

    def error(self, batch: PrefillBatch) -> float:
        """Largest error of `out` against float32 attention, on 64 query tokens spread over the last sequence."""
        b, row = batch, batch.rows - 1
        if self.page_table is None:
            k, v = (x[row * b.kv_len : (row + 1) * b.kv_len].float() for x in (self.k_cache, self.v_cache))
        else:
            pages = self.page_table[row].long()
            k, v = (gathered(x, pages).flatten(0, 1)[: b.kv_len].float() for x in (self.k_cache, self.v_cache))
        tokens = torch.linspace(0, b.query_len - 1, 64, device=k.device).long()
        q = self.q[row * b.query_len + tokens].float().unflatten(1, (b.num_kv_heads, -1))
        scores = torch.einsum("qhgd,khd->hgqk", q, k) * b.head_dim**-0.5
        if b.is_causal:
            diagonal = tokens + b.kv_len - b.query_len
            scores = scores.masked_fill(torch.arange(b.kv_len, device=k.device) > diagonal[:, None], -math.inf)
        want = torch.einsum("hgqk,khd->qhgd", scores.softmax(-1), v).flatten(1, 2)
        return (self.out[row * b.query_len + tokens].float() - want).abs().max().item()


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
