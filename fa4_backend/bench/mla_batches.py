"""The batches that `fa4 bench mla` times, decode of multi-head latent attention in absorbed form, and a batch as tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fa4_backend.arguments import LatentArguments
from fa4_backend.bench.batch import DTYPE, short
from fa4_backend.problem import DTYPE_BYTES, FP8, LATENT, SHORT_NAMES, AttentionProblem, BatchLimits
from fa4_backend.reference import latent_oracle

LATENT_DIM, ROPE_DIM = 512, 64
DIM = LATENT_DIM + ROPE_DIM
SOFTMAX_SCALE = 192**-0.5  # of DeepSeek's heads before absorption
# Of outputs below 1, averages of a thousand unit values and more, of which rounding is up to 0.002. FP8 latents are compared as stored.
LARGEST_ERROR = 0.01


@dataclass(frozen=True)
class MlaBatch:
    """Equal rows over one KV head of latents."""

    num_heads: int
    rows: int
    kv_len: int
    queries: int = 1
    kv_dtype: str = "bfloat16"
    page_size: int = 64
    goal_us: float | None = None  # on an H100

    @property
    def label(self) -> str:
        """Heads, storage and rows on one line."""
        kv = f" {SHORT_NAMES[self.kv_dtype]} latents" if self.kv_dtype in SHORT_NAMES else ""
        queries = f", {self.queries} queries" if self.queries > 1 else ""
        return f"{self.num_heads} heads{kv} page {self.page_size}: {self.rows} x {short(self.kv_len)}{queries}"

    @property
    def latent_bytes(self) -> int:
        """Bytes of latents, each read once."""
        return self.rows * self.kv_len * DIM * DTYPE_BYTES[self.kv_dtype]

    @property
    def moved_bytes(self) -> int:
        """Bytes that any kernel must move: latents and q read once, out written once."""
        return self.latent_bytes + self.rows * self.queries * self.num_heads * (DIM + LATENT_DIM) * DTYPE.itemsize

    @property
    def flops(self) -> float:
        """Multiplications and additions of both products over the keys that are seen."""
        seen = self.rows * (self.queries * self.kv_len - self.queries * (self.queries - 1) // 2)
        return 2.0 * self.num_heads * (DIM + LATENT_DIM) * seen

    def asked(self, arch: str, *, batch_invariant: bool = False) -> tuple[AttentionProblem, BatchLimits]:
        """What a server would plan for whose largest step is at least this batch."""
        problem = AttentionProblem(
            num_q_heads=self.num_heads, num_kv_heads=1, head_dim=DIM, head_dim_v=LATENT_DIM, dtype="bfloat16", page_size=self.page_size,
            arch=arch, kv_dtype=self.kv_dtype, kv_source=LATENT, batch_invariant=batch_invariant,
        )  # fmt: skip
        rows = max(256, self.rows)
        return problem, BatchLimits(rows, rows * self.queries, 131072, self.queries)

    def tensors(self, device: str = "cuda") -> LatentArguments:
        """Random values, pages shuffled; FP8 latents with a scale of 1. The seed is the caller's."""
        pages = -(-self.kv_len // self.page_size)
        num_pages, tokens = self.rows * pages + 8, self.rows * self.queries
        cache = torch.randn(num_pages, self.page_size, DIM, device=device, dtype=DTYPE).to(getattr(torch, self.kv_dtype))
        table = torch.randperm(num_pages, device=device)[: self.rows * pages].reshape(self.rows, pages).int()
        q = torch.randn(tokens, self.num_heads, DIM, device=device, dtype=DTYPE)
        return LatentArguments(
            q[..., :LATENT_DIM], q[..., LATENT_DIM:], cache, table, torch.arange(0, tokens + 1, self.queries, device=device).int(),
            torch.full((self.rows,), self.kv_len, device=device, dtype=torch.int32),
            torch.empty(tokens, self.num_heads, LATENT_DIM, device=device, dtype=DTYPE), None, SOFTMAX_SCALE,
            torch.ones(1, device=device) if self.kv_dtype == FP8 else None,
        )  # fmt: skip

    def error(self, a: LatentArguments, out: torch.Tensor) -> float:
        """Largest error of the last row of `out` (tokens, num_heads, 512) against float32 attention."""
        last = slice(-self.queries, None)
        row = a._replace(
            q=a.q[last], q_rope=a.q_rope[last], page_table=a.page_table[-1:], seqused_k=a.seqused_k[-1:],
            cu_seqlens_q=torch.tensor([0, self.queries], device=a.q.device).int(),
        )  # fmt: skip
        return (out[last].float() - latent_oracle(row)[0]).abs().max().item()


def sets() -> dict[str, list[MlaBatch]]:
    """Named sets. `short`: few keys in all; `long`; `drafts`: several queries a row; `fp8`: latents in e4m3; `pages`: pages of 16."""
    small = [
        MlaBatch(128, 1, 1024, goal_us=14), MlaBatch(128, 1, 4096, goal_us=18), MlaBatch(128, 1, 16384, goal_us=29),
        MlaBatch(128, 8, 4096, goal_us=32), MlaBatch(16, 1, 4096, goal_us=15), MlaBatch(16, 8, 4096, goal_us=24),
    ]  # fmt: skip
    large = [
        MlaBatch(128, 64, 1024, goal_us=45), MlaBatch(128, 64, 4096, goal_us=128), MlaBatch(128, 64, 16384, goal_us=445),
        MlaBatch(16, 64, 4096, goal_us=110), MlaBatch(16, 64, 16384, goal_us=405),
    ]  # fmt: skip
    drafts = [MlaBatch(128, 64, 4096, 2, goal_us=240), MlaBatch(128, 64, 4096, 4, goal_us=445)]
    stored = [
        MlaBatch(16, 64, 16384, goal_us=215), MlaBatch(16, 64, 4096), MlaBatch(16, 8, 4096), MlaBatch(16, 1, 4096),
        MlaBatch(128, 64, 4096), MlaBatch(128, 64, 4096, 4), MlaBatch(128, 1, 4096),
    ]  # fmt: skip
    pages = [MlaBatch(128, 64, 4096, page_size=16), MlaBatch(16, 64, 4096, page_size=16)]
    return {"pages": pages, "short": small, "long": large, "drafts": drafts, "fp8": [replace(batch, kv_dtype=FP8) for batch in stored]}
