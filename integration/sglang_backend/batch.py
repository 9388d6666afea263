"""A step as SGLang describes it (`ForwardBatch`), in the operator's words: how many query tokens a sequence has, and how many keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fa4_backend.problem import UnsupportedProblem


class StepShape(NamedTuple):
    """What the host knows of a step; the lengths themselves stay on the device."""

    num_seqs: int
    max_seqlen_q: int  # upper bound of a query's length
    queries_each: int | None  # query tokens of every sequence; None: `extend_seq_lens` of the batch says
    ahead: int  # KV tokens that SGLang's `seq_lens` does not count yet
    min_seqlen_q: int = 1  # lower bound of the length of a query that there is
    prefill_keys: int | None = None  # KV tokens of all sequences with prompts; None: the host does not know


def describe_step(batch: Any, *, draft_step: int, draft_tokens: int) -> StepShape:
    """The shape of a `ForwardBatch`, whose rows are those of a captured graph where it belongs to one.

    Args:
        draft_step: which of a drafter's steps this backend serves, from 0.
        draft_tokens: tokens that a verification checks of each sequence; 0 without speculation.

    Raises:
        UnsupportedProblem: the step's mode is not served.
    """
    mode, num_seqs = batch.forward_mode, batch.batch_size
    if mode.is_decode_or_idle():
        # A drafter's steps share one batch, in which only the verified tokens are counted.
        return StepShape(num_seqs, 1, 1, draft_step + 1 if batch.spec_info is not None else 0)
    if mode.is_target_verify():
        if getattr(batch.spec_info, "ragged_verify_layout", None) is not None:
            raise UnsupportedProblem("verification: expected as many draft tokens a sequence, got a ragged one (SGLANG_RAGGED_VERIFY_MODE)")
        return StepShape(num_seqs, draft_tokens, draft_tokens, draft_tokens)
    if mode.is_draft_extend_v2():
        # Each row has as many tokens, on the device as on the host; a replay's view of a batch has no host lengths.
        return StepShape(num_seqs, batch.positions.numel() // max(num_seqs, 1), None, 0)
    if mode.is_extend_or_draft_extend_or_mixed():
        lengths = [n for n in batch.extend_seq_lens_cpu if n > 0]
        keys = sum(batch.extend_prefix_lens_cpu) + sum(lengths)
        return StepShape(num_seqs, max(lengths, default=0), None, 0, min(lengths, default=1), keys)
    raise UnsupportedProblem(f"forward mode: expected decode, extend, mixed, verification or draft, got {mode.name}")


def write_query_bounds(batch: Any, shape: StepShape, cu_seqlens_q: torch.Tensor) -> None:
    """Write the exclusive prefix sum of the step's query lengths. No host sync: may be recorded in a graph.

    Args:
        cu_seqlens_q: (num_seqs + 1,) int32, written.
    """
    if shape.queries_each is not None:
        torch.arange(0, (shape.num_seqs + 1) * shape.queries_each, shape.queries_each, out=cu_seqlens_q)
        return
    cu_seqlens_q[:1].zero_()
    torch.cumsum(batch.extend_seq_lens[: shape.num_seqs], 0, dtype=torch.int32, out=cu_seqlens_q[1:])
