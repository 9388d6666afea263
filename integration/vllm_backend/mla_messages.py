"""Messages behind long cached contexts in a layer of latent attention: which steps serve them as decode rows, and those steps' rows.

vLLM calls a row decode up to so many queries. As prefill a row's whole context is made keys and values, a layer at a time; as decode the
cached latents are attended to as they are, with more operations a query and key. So it is decode where a message is short for its context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fa4_backend.split_rows import ShortRows, SplitRows, is_cheaper_absorbed, message_limits, message_queries, row_queries
from fa4_integration.common import start

if TYPE_CHECKING:
    import torch

    from fa4_backend import AttentionMetadata, AttentionProblem, BatchLimits


@dataclass(frozen=True)
class MessageSteps:
    """The plans of steps with messages, beside those of other steps: their rows are more, and shorter."""

    rows: SplitRows
    steps: dict[AttentionProblem, AttentionMetadata]  # refreshed in such steps alone; by `FA4MLAImpl.kind`
    longest: int  # queries of a message

    @classmethod
    def allocate(
        cls, problems: dict[AttentionProblem, AttentionProblem], limits: BatchLimits, vllm_config: Any, device: torch.device
    ) -> MessageSteps | None:
        """Buffers and kernels; None where messages stay prefill.

        They do in batch-invariant mode, since what pays depends on a step's other rows; where ranks share a sequence's keys, since a row's
        last key is then no rank's alone; and where vLLM runs the halves of a batch side by side, since it takes a decode row for one that
        reads nothing of the other half.

        Args:
            problems: of the group's layers, by kind.
            limits: of steps without messages.

        Raises:
            UnsupportedProblem, CompileError: as `start.allocate`.
        """
        parallel = vllm_config.parallel_config
        is_shared = max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1
        if is_shared or parallel.use_ubatching:
            return None
        limits = replace(limits, max_num_tokens=max(limits.max_num_tokens, vllm_config.scheduler_config.max_num_batched_tokens))
        queries = min(row_queries(problem) for problem in problems.values())
        problem = next(iter(problems.values()))
        more = message_limits(limits, problem, queries)
        if more is None:
            return None
        steps = {kind: start.allocate(problem, more, device) for kind, problem in problems.items()}
        longest = min(message_queries(problem) for problem in problems.values())
        return cls(SplitRows.allocate(more, problem.page_size, device), steps, longest)

    def serve(self, batch: Any, decode_query_len: int) -> bool:
        """Whether a step has messages, rows above `decode_query_len`, that are cheaper as decode than as prefill; told by the host's
        lengths. Rows behind the first that is longer than a message are prefill in any case, as vLLM divides a batch."""
        if batch.max_query_len <= decode_query_len or batch.seq_lens_cpu_upper_bound is None:
            return False
        queries = np.diff(batch.query_start_loc_cpu.numpy())
        is_long = queries > self.longest
        queries = queries[: int(is_long.argmax()) if is_long.any() else len(queries)]
        is_message = queries > decode_query_len
        if not is_message.any() or self.rows.num_rows(queries.tolist()) > self.rows.max_rows:
            return False
        contexts = batch.seq_lens_cpu_upper_bound.numpy()[: len(queries)] - queries
        return is_cheaper_absorbed(queries[is_message].tolist(), contexts[is_message].tolist(), self.longest)

    def split(
        self, query_start_loc_cpu: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor
    ) -> ShortRows:
        """The rows of a step that `serve` accepted."""
        num_rows = self.rows.num_rows(np.diff(query_start_loc_cpu.numpy()).tolist())
        return self.rows.split(query_start_loc, seq_lens, block_table, num_rows)
