"""What the batches of all benchmarks have in common: heads, mask, the least work they are; and a batch as tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from fa4_backend.problem import DTYPE_BYTES, FP8, PAGED, RAGGED, SHORT_NAMES, MaskFeatures

DTYPE = torch.bfloat16  # of the model
PLAIN_KEY_DIM = 128  # elements of DeepSeek's keys without rotary embedding
LONGEST_DRAFT = 8  # query tokens: rows of more are a prompt's or a message's
# Of bf16 outputs of unit values. Rows that see thousands of keys average them; the first tokens of a prompt are single values, whose
# rounding alone is 0.008 to 0.016. A wrong kernel is far above either, so no figure stands for a wrong result.
DRAFT_ERROR, PROMPT_ERROR = 0.02, 0.04
# With q in FP8 weights of a prompt's rows are e4m3: 2^-4 of the values, up to 4, where a row sees few keys.
E4M3_PROMPT_ERROR = 0.25
CHECKED_TOKENS = 64  # of a long row, spread over it


@dataclass(frozen=True)
class Mask:
    """Which keys a row sees and what becomes of its scores."""

    is_causal: bool = True
    window: int = 0  # keys that a row sees, the diagonal's included, as models count them; 0: all
    softcap: float = 0.0  # 0: none
    has_sinks: bool = False

    @property
    def features(self) -> MaskFeatures:
        """As a problem states it."""
        return MaskFeatures(
            is_causal=self.is_causal, has_window_left=self.window > 0, has_softcap=self.softcap > 0, has_sinks=self.has_sinks
        )

    @property
    def window_left(self) -> int | None:
        """Keys before the diagonal's; None without a window."""
        return self.window - 1 if self.window else None

    @property
    def label(self) -> str:
        """The parts of a batch's label that are not causal attention over all keys."""
        parts = (
            "" if self.is_causal else " full",
            f" window {self.window}" if self.window else "",
            " soft cap" if self.softcap else "",
            " sinks" if self.has_sinks else "",
        )
        return "".join(parts)

    def seen(self, query_len: int, kv_len: int) -> int:
        """Pairs of a query and a key that it sees, of a row whose queries are its last tokens."""
        if not self.is_causal:
            return query_len * kv_len
        before = kv_len - query_len  # query i sees min(window, before + i + 1) keys
        growing = query_len if not self.window else min(max(self.window - before, 0), query_len)
        return growing * before + growing * (growing + 1) // 2 + (query_len - growing) * self.window

    def keys(self, query_len: int, kv_len: int) -> int:
        """Keys that any query of a row sees."""
        return min(kv_len, self.window + query_len - 1) if self.window else kv_len


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Heads, storage and mask of a batch; its rows are a subclass's."""

    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    head_dim_v: int = 0  # 0: head_dim
    page_size: int = 16
    kv_dtype: str = "bfloat16"
    q_dtype: str = "bfloat16"
    kv_source: str = PAGED
    mask: Mask = Mask()

    @property
    def row_lens(self) -> tuple[tuple[int, int], ...]:
        """(query length, KV length) of each row."""
        raise NotImplementedError

    @property
    def size(self) -> str:
        """The rows in a few words."""
        raise NotImplementedError

    @property
    def decode_query_len(self) -> int:
        """Longest query that counts as a decode row."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """Heads, page size, mask and rows on one line."""
        kv = f" {SHORT_NAMES[self.kv_dtype]} KV" if self.kv_dtype in SHORT_NAMES else ""
        kv += f" {SHORT_NAMES[self.q_dtype]} Q" if self.q_dtype in SHORT_NAMES else ""
        dims = f"{self.head_dim}/{self.head_dim_v}" if self.head_dim_v else f"{self.head_dim}"
        source = f"page {self.page_size}" if self.kv_source == PAGED else self.kv_source
        return f"{self.num_q_heads}/{self.num_kv_heads} d{dims}{kv} {source}{self.mask.label}: {self.size}"

    @property
    def title(self) -> str:
        """The label where prompts stand beside decode rows."""
        return self.label

    @property
    def value_dim(self) -> int:
        """Elements of a value or output row."""
        return self.head_dim_v or self.head_dim

    @property
    def is_causal(self) -> bool:
        """Whether a query sees no key behind its own."""
        return self.mask.is_causal

    @property
    def max_query_len(self) -> int:
        """Longest query."""
        return max(query_len for query_len, _ in self.row_lens)

    @property
    def max_kv_len(self) -> int:
        """Longest KV."""
        return max(kv_len for _, kv_len in self.row_lens)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that must be read once."""
        keys = sum(self.mask.keys(query_len, kv_len) for query_len, kv_len in self.row_lens)
        return keys * self.num_kv_heads * (self.head_dim + self.value_dim) * DTYPE_BYTES[self.kv_dtype]

    @property
    def moved_bytes(self) -> int:
        """Bytes that any kernel must move: K, V and q read once, out written once."""
        tokens = sum(query_len for query_len, _ in self.row_lens)
        return self.kv_bytes + tokens * self.num_q_heads * (self.head_dim + self.value_dim) * DTYPE.itemsize

    @property
    def flops(self) -> float:
        """Multiplications and additions of both products over the keys that are seen, and no others."""
        seen = sum(self.mask.seen(query_len, kv_len) for query_len, kv_len in self.row_lens)
        return 2.0 * self.num_q_heads * (self.head_dim + self.value_dim) * seen

    @property
    def checked_rows(self) -> dict[int, float]:
        """Row -> largest error allowed: of the shortest queries the one with the longest KV, and the last of the longest queries."""
        lens = self.row_lens
        shortest = max(range(len(lens)), key=lambda i: (-lens[i][0], lens[i][1]))
        longest = max(range(len(lens)), key=lambda i: (lens[i][0], i))
        prompt_error = E4M3_PROMPT_ERROR if self.q_dtype == FP8 else PROMPT_ERROR
        return {row: DRAFT_ERROR if lens[row][0] <= LONGEST_DRAFT else prompt_error for row in (shortest, longest)}


@dataclass
class BatchTensors:
    """A batch on the GPU: random values; FP8 K and V with a scale of 1. q is bfloat16, for every kernel, of values that its FP8 holds.

    With pages they are shuffled, and K and V of a token adjacent as in vLLM 0.33. Without, K is dense, and V the second part of rows whose
    first is the part of K without rotary embedding, as vLLM's projection of latents makes both.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor | None  # None without pages
    cu_seqlens_q: torch.Tensor
    seqused_k: torch.Tensor
    out: torch.Tensor
    sinks: torch.Tensor | None  # (num_q_heads,) bfloat16
    pages_of: list[int]
    cu_seqlens_k: torch.Tensor | None = None  # None with pages

    @classmethod
    def make(cls, batch: BatchShape, device: str = "cuda") -> BatchTensors:
        """Draw the tensors; the seed is the caller's."""
        b = batch
        query_lens, kv_lens = zip(*b.row_lens, strict=True)
        pages_of = [-(-n // b.page_size) for n in kv_lens]
        page_table = cu_seqlens_k = None
        if b.kv_source == RAGGED:
            k_cache, both = (
                torch.randn(sum(kv_lens), b.num_kv_heads, n, device=device, dtype=DTYPE).to(getattr(torch, b.kv_dtype))
                for n in (b.head_dim, PLAIN_KEY_DIM + b.value_dim)
            )
            v_cache = both[..., PLAIN_KEY_DIM:]
            cu_seqlens_k = torch.tensor([0, *kv_lens], device=device).cumsum(0).int()
        else:
            num_pages = sum(pages_of) + 8
            pool = torch.randn(num_pages, b.page_size, b.num_kv_heads, b.head_dim + b.value_dim, device=device, dtype=DTYPE)
            k_cache, v_cache = pool.to(getattr(torch, b.kv_dtype)).split([b.head_dim, b.value_dim], dim=-1)
            shuffled = torch.randperm(num_pages, device=device).int()
            page_table = torch.zeros(len(pages_of), max(pages_of), device=device, dtype=torch.int32)
            at = 0
            for row, pages in enumerate(pages_of):
                page_table[row, :pages] = shuffled[at : at + pages]
                at += pages
        cu_seqlens_q = torch.tensor([0, *query_lens], device=device).cumsum(0).int()
        q = torch.randn(sum(query_lens), b.num_q_heads, b.head_dim, device=device, dtype=DTYPE).to(getattr(torch, b.q_dtype)).to(DTYPE)
        seqused_k = torch.tensor(kv_lens, device=device, dtype=torch.int32)
        sinks = torch.randn(b.num_q_heads, device=device, dtype=DTYPE) if b.mask.has_sinks else None
        out = torch.empty(*q.shape[:2], b.value_dim, device=device, dtype=DTYPE)
        return cls(q, k_cache, v_cache, page_table, cu_seqlens_q, seqused_k, out, sinks, pages_of, cu_seqlens_k)

    def in_bf16(self) -> BatchTensors:
        """The same values of K and V in bfloat16, adjacent as they were."""
        k_cache, v_cache = torch.cat([self.k_cache.to(DTYPE), self.v_cache.to(DTYPE)], dim=-1).split(
            [self.k_cache.shape[-1], self.v_cache.shape[-1]], dim=-1
        )
        return replace(self, k_cache=k_cache, v_cache=v_cache)

    def worst_error(self, batch: BatchShape, kernel: str, *, must_hold: bool) -> float:
        """Largest error of `out` over the rows that are checked.

        Raises:
            RuntimeError: a row's error is above its bound, or no number, and it `must_hold`.
        """
        errors = {row: self.error(batch, row) for row in batch.checked_rows}
        for row, bound in batch.checked_rows.items():
            if must_hold and not errors[row] <= bound:
                raise RuntimeError(f"{kernel} on {batch.label}: row {row}: expected an error of at most {bound}, got {errors[row]}")
        return max(errors.values())

    def error(self, batch: BatchShape, row: int) -> float:
        """Largest error of `out` against float32 attention, on up to 64 query tokens spread over a row."""
        query_len, kv_len = batch.row_lens[row]
        if self.page_table is None:
            assert self.cu_seqlens_k is not None
            first = int(self.cu_seqlens_k[row])
            k, v = (x[first : first + kv_len].float() for x in (self.k_cache, self.v_cache))
        else:
            pages = self.page_table[row, : self.pages_of[row]].long()
            k, v = (_gathered(x, pages).flatten(0, 1)[:kv_len].float() for x in (self.k_cache, self.v_cache))
        tokens = torch.linspace(0, query_len - 1, min(query_len, CHECKED_TOKENS), device=k.device).long()
        begin = int(self.cu_seqlens_q[row])
        q = self.q[begin + tokens].float().unflatten(1, (batch.num_kv_heads, -1))
        want = _attend(q, k, v, tokens + kv_len - query_len, batch.mask, self.sinks)
        return (self.out[begin + tokens].float() - want).abs().max().item()


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, diagonal: torch.Tensor, mask: Mask, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Float32 attention of queries (tokens, num_kv_heads, q_per_kv, head_dim) whose diagonal key is given; (tokens, heads, head_dim_v)."""
    scores = torch.einsum("qhgd,khd->hgqk", q, k) * q.shape[-1] ** -0.5
    if mask.softcap:
        scores = mask.softcap * torch.tanh(scores / mask.softcap)
    keys = torch.arange(k.shape[0], device=k.device)
    if mask.is_causal:
        scores = scores.masked_fill(keys > diagonal[:, None], -math.inf)
    if mask.window:
        scores = scores.masked_fill(keys <= diagonal[:, None] - mask.window, -math.inf)
    if sinks is not None:
        sink = sinks.float().unflatten(0, (q.shape[1], -1))[..., None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    return torch.einsum("hgqk,khd->qhgd", scores.softmax(-1)[..., : k.shape[0]], v).flatten(1, 2)


def _gathered(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Pages of a cache; by bytes where it is FP8, of which torch gathers none."""
    return cache.view(torch.uint8)[pages].view(cache.dtype) if cache.dtype.itemsize == 1 else cache[pages]


def short(tokens: int) -> str:
    """4096 as 4K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
