"""Batches that vLLM makes up: to warm up, to capture graphs, for data-parallel ranks without work. Their numbers keep no promise.

`_dummy_run` and `CudaGraphManager.capture` give every sequence the length of all tokens together (above max_model_len where that is
short), null blocks, slots of -1, and max_seq_len either as the lengths say or max_model_len; replays pad rows and tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engines.vllm_step import BuiltStep, VllmStep

KERNELS = ["reference", *(pytest.param(f"emulate-{chip}", marks=pytest.mark.emulated) for chip in ("sm90", "sm100"))]
MAX_MODEL_LEN = 256
NUM_SEQS = 8


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FA4_BACKEND_CPU", request.param)
    return request.param


def full(*query_lens: int, **facts: Any) -> BuiltStep:
    """Sequences of max_model_len tokens, whose page table has no column to spare."""
    built = VllmStep(query_lens, (MAX_MODEL_LEN,) * len(query_lens), max_model_len=MAX_MODEL_LEN, **facts).build()
    assert built.description.block_table_tensor.shape == (len(query_lens), MAX_MODEL_LEN // 16)
    return built


@pytest.mark.parametrize("query_len", [1, 5], ids=["decode", "prefill"])
@pytest.mark.parametrize("is_capture", [True, False], ids=["capture", "warm_up"])
def test_lengths_above_max_model_len_are_those_of_the_page_table(kernel: str, is_capture: bool, query_len: int) -> None:
    """Nothing is refused, nothing is read past the table's 16 columns (the emulator faults), and the result is that of the longest
    sequence there is.
    """
    built = full(*[query_len] * NUM_SEQS)
    right = built.run()
    built.check(right)
    built.description.seq_lens.fill_(2 * MAX_MODEL_LEN)
    built.description.max_seq_len = MAX_MODEL_LEN if is_capture else 2 * MAX_MODEL_LEN
    assert torch.equal(built.run(), right)


def test_a_batch_of_null_blocks(kernel: str) -> None:
    """No sequence has pages, no token a slot: what comes out is nobody's, but it has to come out."""
    built = full(*[1] * NUM_SEQS)
    built.description.block_table_tensor.zero_()
    built.description.slot_mapping.fill_(-1)
    built.description.seq_lens.fill_(512)
    built.description.max_seq_len = 512
    assert built.run().shape == built.query.shape


def test_padded_rows_of_a_replay_are_zero(kernel: str) -> None:
    """Rows of empty sequences at the batch's end, in a buffer of NaN; real rows are right beside them."""
    built = VllmStep((1, 1), (300, 17), padding_rows=2, padding_tokens=5).build()
    output = built.run()
    built.check(output)
    assert (output[2:] == 0).all()


def test_padded_rows_of_a_prefill_are_zero(kernel: str) -> None:
    built = VllmStep((1, 9), (300, 40), padding_rows=2, padding_tokens=70).build()
    output = built.run()
    built.check(output)
    assert (output[10:] == 0).all()


def test_a_rank_without_work(kernel: str) -> None:
    """All rows are padding: none is left as it was."""
    built = VllmStep((1, 1), (300, 17), padding_rows=2, padding_tokens=5).build()
    built.description.query_start_loc.zero_()
    built.description.seq_lens.zero_()
    built.description.slot_mapping.fill_(-1)
    assert (built.run() == 0).all()


def test_a_rank_without_tokens(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even padding: no attention kernel is launched, since no tensor map has zero rows."""
    launches: list[Any] = []
    monkeypatch.setattr("fa4_backend.ops._launch", lambda *arguments: launches.append(arguments))
    built = VllmStep((1, 1), (300, 17)).build()
    built.description.query_start_loc.zero_()
    built.description.seq_lens.zero_()
    built.description.slot_mapping.fill_(-1)
    built.description.num_actual_tokens = 0
    assert built.run().isnan().all(), "rows past the step's were written"
    assert launches == []


def test_refusals_name_the_engines_limits() -> None:
    """What is too large to serve is told in vLLM's words."""
    built = VllmStep((1,) * 17, (5,) * 17).build()
    with pytest.raises(ValueError, match=r"expected at most max_num_seqs=16 sequences, got 17"):
        built.builder.build(0, built.description)
