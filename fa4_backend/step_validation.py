"""The device and the lengths of steps against their plan. Every refusal says what was expected and what it got."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import pairwise
from typing import TYPE_CHECKING

from fa4_backend.arch import ARCHS, REFERENCE_ARCH, arch_of_capability
from fa4_backend.expectations import expect_dense, expect_device, expect_dtype, expect_shape, expect_tensors, expect_whole
from fa4_backend.problem import LATENT, RAGGED

if TYPE_CHECKING:
    import torch

    from fa4_backend.plan import AttentionPlan
    from fa4_backend.problem import AttentionProblem, BatchLimits

Passed = dict[Hashable, tuple[int, ...]]  # facts of steps and calls that were found to fit, and the bytes of a call's tensors
MAX_PASSED = 1024  # remembered facts; layers and steps repeat theirs


def device_type_of(problem: AttentionProblem) -> str:
    """torch's name of the kind of device that a problem's tensors lie on."""
    return "cpu" if problem.arch == REFERENCE_ARCH or problem.is_emulated else "cuda"


def check_plan_device(plan: AttentionPlan, device: torch.device) -> None:
    """Check that a plan's kernels run on `device`, before anything is compiled or allocated for it.

    Raises:
        ValueError: it is another kind of device, or a GPU of another arch.
    """
    arch, expected = plan.problem.arch, device_type_of(plan.problem)
    if device.type != expected:
        raise ValueError(f"device: expected {expected} for a plan of arch {arch}, got {device}")
    if expected == "cuda":
        import torch

        capability = torch.cuda.get_device_capability(device)
        if arch_of_capability(*capability) != arch:
            got = "{} of compute capability {}.{}".format(torch.cuda.get_device_name(device), *capability)
            raise ValueError(f"device: expected {arch} ({ARCHS[arch].chips}), which the plan was made for, got {got}")


def check_bounds(
    limits: BatchLimits,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor | None,
    min_seqlen_q: int,
    max_seqlen_q: int,
    prefill_keys: int | None,
) -> None:
    """Check the host's bounds of a step's lengths: with each other, and where the lengths are on the CPU with those.

    A kernel is not launched for rows that a bound rules out, and converts no more keys than it says: on a GPU, whose lengths the host
    cannot read without waiting, a wrong bound leaves rows of `out` as they were.

    Raises:
        ValueError: `min_seqlen_q` is no whole number, below 1 or above the upper bound of a step that has queries; a length on the CPU is
            outside a bound, or keys of its long rows are more than `prefill_keys`.
    """
    expect_whole("min_seqlen_q", min_seqlen_q)
    if not 1 <= min_seqlen_q <= max(max_seqlen_q, 1):
        raise ValueError(f"min_seqlen_q: expected 1 to max_seqlen_q={max_seqlen_q}, got {min_seqlen_q}")
    if cu_seqlens_q.device.type != "cpu":
        return
    starts = cu_seqlens_q.tolist()
    lengths = [end - begin for begin, end in pairwise(starts)]
    shortest = min((n for n in lengths if n > 0), default=min_seqlen_q)
    if shortest < min_seqlen_q:
        raise ValueError(f"min_seqlen_q: expected at most the shortest query, {shortest}, got {min_seqlen_q}")
    longest = max(lengths, default=0)
    if longest > max_seqlen_q:
        raise ValueError(f"max_seqlen_q: expected at least the longest query, {longest}, got {max_seqlen_q}")
    if prefill_keys is not None and seqused_k is not None:
        keys = sum(k for n, k in zip(lengths, seqused_k.tolist(), strict=True) if n > limits.decode_query_len)
        if keys > prefill_keys:
            raise ValueError(f"prefill_keys: expected at least the keys of all long rows, {keys}, got {prefill_keys}")


def check_step(
    plan: AttentionPlan,
    device: torch.device,
    passed: Passed,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> int:
    """Check the lengths of a step, which are on `device`; returns its number of sequences. `passed`: facts of steps that were found to fit.

    Raises:
        ValueError: the batch is larger than the plan's limits, or a tensor is not what is expected.
    """
    limits, source = plan.limits, plan.problem.kv_source
    name, lengths, other_name, other = "seqused_k", seqused_k, "cu_seqlens_k", cu_seqlens_k
    if source == RAGGED:
        name, lengths, other_name, other = other_name, other, name, lengths
    if lengths is None or other is not None:
        raise ValueError(f"{name}, {other_name}: expected the first alone for {source} K and V, got {_describe_given(lengths, other)}")
    try:
        facts = ("step", _facts(cu_seqlens_q), _facts(lengths))
    except AttributeError:
        expect_tensors({"cu_seqlens_q": cu_seqlens_q, name: lengths})
        raise
    ends = 1 if source == RAGGED else 0
    if facts not in passed:
        expect_shape(name, lengths, (None,))
        num_seqs = lengths.shape[0] - ends
        if not 0 <= num_seqs <= limits.max_num_seqs:
            raise ValueError(f"{name}: expected at most max_num_seqs={limits.max_num_seqs} sequences, got {num_seqs}")
        expect_shape("cu_seqlens_q", cu_seqlens_q, (num_seqs + 1,))
        for tensor_name, tensor in (("cu_seqlens_q", cu_seqlens_q), (name, lengths)):
            expect_dtype(tensor_name, tensor, "int32")
            expect_dense(tensor_name, tensor)
            expect_device(tensor_name, tensor, device, "the metadata")
        remember(passed, facts, ())
    for bound_name, got, limit_name, limit in (
        ("max_seqlen_q", max_seqlen_q, "max_num_tokens", limits.max_num_tokens),
        ("max_seqlen_k", max_seqlen_k, "max_seqlen_k (an engine's max_model_len)", limits.max_seqlen_k),
    ):
        expect_whole(bound_name, got)
        if not 0 <= got <= limit:
            raise ValueError(f"{bound_name}: expected 0 to {limit}, the plan's {limit_name}, got {got}")
    if source == LATENT and max_seqlen_q > limits.decode_query_len:
        raise ValueError(
            f"max_seqlen_q: expected at most {limits.decode_query_len}, the plan's decode_query_len, since latent attention serves short "
            f"rows only, got {max_seqlen_q}"
        )
    return int(lengths.shape[0]) - ends


def _describe_given(lengths: object, other: object) -> str:
    return {(True, False): "neither", (True, True): "the second alone"}.get((lengths is None, other is not None), "both")


def _facts(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def remember(passed: Passed, facts: Hashable, sizes: tuple[int, ...]) -> None:
    """These facts need no second look."""
    if len(passed) >= MAX_PASSED:
        passed.clear()
    passed[facts] = sizes
