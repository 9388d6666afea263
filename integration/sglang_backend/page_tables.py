"""Page tables from SGLang's table of token slots, on the device.

SGLang keeps, for each request, the slot of each token; slot = page * page_size + row. The sliding-window layers of a hybrid model have a
pool of their own, to which SGLang maps slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fa4_backend.problem import UnsupportedProblem


@dataclass(frozen=True)
class StepTensors:
    """A step's lengths and pages. Those of captured graphs keep their addresses."""

    cu_seqlens_q: torch.Tensor  # (batch + 1,) int32
    seqused_k: torch.Tensor  # (batch,) int32
    cu_seqlens_k: torch.Tensor  # (batch + 1,) int32; SGLang's kernel writes it, nothing here reads it
    page_table: torch.Tensor  # (batch, max_pages_per_seq) int32
    window_page_table: torch.Tensor | None  # likewise, of the sliding-window layers' pool; None: the model has one pool
    window_slots: torch.Tensor | None  # (tokens,) int64, where those layers write the step's keys and values

    @classmethod
    def allocate(cls, num_seqs: int, num_tokens: int, max_pages: int, device: torch.device, *, has_window_pool: bool) -> StepTensors:
        """Buffers for steps of up to `num_seqs` sequences and `num_tokens` tokens; page 0, SGLang's padding, everywhere."""

        def ints(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return cls(
            ints(num_seqs + 1),
            ints(num_seqs),
            ints(num_seqs + 1),
            ints(num_seqs, max_pages),
            ints(num_seqs, max_pages) if has_window_pool else None,
            torch.zeros(num_tokens, dtype=torch.int64, device=device) if has_window_pool else None,
        )

    def first(self, num_seqs: int) -> StepTensors:
        """Views of the first sequences."""
        window = self.window_page_table
        return StepTensors(
            self.cu_seqlens_q[: num_seqs + 1],
            self.seqused_k[:num_seqs],
            self.cu_seqlens_k[: num_seqs + 1],
            self.page_table[:num_seqs],
            None if window is None else window[:num_seqs],
            self.window_slots,
        )


class TokenSlots:
    """SGLang's table of token slots and its map into the sliding-window pool.

    Raises:
        UnsupportedProblem: at construction, for a pool whose slots are not places in it.
    """

    def __init__(self, runner: Any) -> None:
        from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

        pool, self.translator = runner.token_to_kv_pool, runner.kv_index_translator
        if self.translator.is_translating:
            raise UnsupportedProblem("KV pool: expected slots that are places in the pool, got virtual ones; omit --enable-unified-memory")
        self.table: torch.Tensor = runner.req_to_token_pool.req_to_token  # (requests + 1, max tokens) int32
        self.page_size: int = runner.page_size
        self.max_pages = -(-self.table.shape[1] // self.page_size)
        self.window_pool = pool if isinstance(pool, SWAKVPool) and pool.swa_layer_nums > 0 else None

    def window_slots(self, batch: Any) -> torch.Tensor | None:
        """Where the sliding-window layers write the step's tokens, (tokens,) int64; None: they share the pool of the others."""
        if self.window_pool is None:
            return None
        from sglang.srt.mem_cache.kv_loc_plan import IdSpaceKind

        slots: torch.Tensor | None = self.translator.write_ids(batch, IdSpaceKind.SLIDING_WINDOW)
        return slots

    def write_tables(self, batch: Any, ahead: int, step: StepTensors) -> None:
        """Write the step's KV lengths and page tables. No host sync: may be recorded in a graph.

        Entries past a sequence's last page keep what they held; the operator follows none of them.
        """
        num_seqs = step.seqused_k.shape[0]
        rows, seq_lens = batch.req_pool_indices[:num_seqs], batch.seq_lens[:num_seqs]
        if num_seqs == 0:
            return
        if self.table.is_cuda:
            self._write_by_kernel(rows, seq_lens, ahead, step)
        else:
            self._write_by_torch(rows, seq_lens, ahead, step)

    def _write_by_kernel(self, rows: torch.Tensor, seq_lens: torch.Tensor, ahead: int, step: StepTensors) -> None:
        # One launch that visits live pages only; torch would gather whole rows of the table.
        from sglang.kernels.ops.attention.metadata import normal_decode_set_metadata

        mapping = None if self.window_pool is None else self.window_pool.full_to_swa_index_mapping
        normal_decode_set_metadata(
            cache_seqlens_int32=step.seqused_k,
            cu_seqlens_k=step.cu_seqlens_k,
            page_table=step.page_table,
            req_to_token=self.table,
            req_pool_indices=rows,
            max_seq_pages=self.max_pages,
            seq_lens=seq_lens,
            seq_len_delta=ahead,
            page_size=self.page_size,
            swa_page_table=step.window_page_table,
            full_to_swa_index_mapping=mapping,
        )

    def _write_by_torch(self, rows: torch.Tensor, seq_lens: torch.Tensor, ahead: int, step: StepTensors) -> None:
        torch.add(seq_lens.to(torch.int32), ahead, out=step.seqused_k)
        first_slots = self.table[:, :: self.page_size].index_select(0, rows)  # of each page
        step.page_table.copy_(first_slots // self.page_size)
        if self.window_pool is not None and step.window_page_table is not None:
            step.window_page_table.copy_(self.window_pool.translate_loc_from_full_to_swa(first_slots) // self.page_size)
