"""A step's metadata: what a graph records, what its replays read, and what a drafter's steps see."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import dense_attention as dense
from sglang.test.kits.attention_unittest.runner_modes import speculative_draft_runner as drafts
from torch.utils._python_dispatch import TorchDispatchMode

from fa4_backend import UnsupportedProblem
from fa4_integration.sglang_backend import backend as backend_module
from fa4_integration.sglang_backend import plugin
from fa4_integration.sglang_backend.draft import DraftSteps
from fa4_integration.sglang_backend.names import NAME
from fa4_integration.sglang_backend.page_tables import StepTensors
from tests.engine_sglang.pools import WindowPool
from tests.engine_sglang.test_kit import CASES, SKIPS, window_decode


class Tape(TorchDispatchMode):
    """What a CUDA graph does, for tensors of the CPU: keeps operations with their tensors, to run them again on what those hold."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            if isinstance(result, torch.Tensor) and again.data_ptr() != result.data_ptr():
                result.copy_(again)

    def host_reads(self) -> list[str]:
        """Operations that wait for the device."""
        return [str(func) for func, *_ in self.operations if "_local_scalar_dense" in str(func)]


class Buffers:
    """A runner's static buffers for a captured decode batch, and views of them as batches."""

    def __init__(self, captured: int, fill: int) -> None:
        self.captured, self.fill = captured, fill
        self.seq_lens = torch.full((captured,), fill, dtype=torch.int32)
        self.req_pool_indices = torch.zeros(captured, dtype=torch.int32)

    def view(self) -> Any:
        return SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=self.captured,
            seq_lens=self.seq_lens,
            req_pool_indices=self.req_pool_indices,
            out_cache_loc=None,
            spec_info=None,
        )

    def fill_in(self, seq_lens: list[int], rows: list[int]) -> None:
        self.seq_lens.fill_(self.fill)
        self.req_pool_indices.zero_()
        self.seq_lens[: len(seq_lens)] = torch.tensor(seq_lens, dtype=torch.int32)
        self.req_pool_indices[: len(rows)] = torch.tensor(rows, dtype=torch.int32)


@pytest.fixture
def decode(kit: Any) -> Any:
    """A backend with four requests whose pages lie shuffled in the pool."""
    case = dense.DenseAttentionCase("decode", NAME, ForwardMode.DECODE, 4, 2, 16, (14, 15, 16, 60))
    return kit.build_dense_attention_fixture(SKIPS(), case, device="cpu", max_context_len=64)


def test_a_replay_follows_the_runners_buffers(decode: Any) -> None:
    """Recorded once with padding only; the replays see other lengths, other requests and pages that have moved."""
    backend, table = decode.backend, decode.runner.req_to_token_pool.req_to_token
    backend.init_cuda_graph_state(max_bs=8, max_num_tokens=8)
    buffers = Buffers(4, backend.get_cuda_graph_seq_len_fill_value())
    backend.init_forward_metadata_out_graph(buffers.view(), in_capture=True)
    with Tape() as tape:
        backend.init_forward_metadata_in_graph(buffers.view())
    step = backend.step
    addresses = [tensor.data_ptr() for tensor in (step.cu_seqlens_q, step.seqused_k, step.page_table)]
    assert not tape.host_reads()
    for seq_lens, rows in (([61, 15], [3, 0]), ([16, 17, 33, 64], [2, 1, 3, 0]), ([2], [1])):
        table[1].copy_(table[1].roll(16))  # request 1's pages change places
        buffers.fill_in(seq_lens, rows)
        backend.init_forward_metadata_out_graph(buffers.view())
        tape.replay()
        padding = 4 - len(rows)
        assert step.seqused_k.tolist() == seq_lens + [1] * padding
        assert step.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4]
        expected = (table[rows + [0] * padding, ::16] // 16).tolist()
        assert step.page_table.tolist() == expected
    assert addresses == [tensor.data_ptr() for tensor in (step.cu_seqlens_q, step.seqused_k, step.page_table)]


def test_a_step_reads_no_length_on_the_host(decode: Any) -> None:
    """SGLang keeps lengths on the device (`needs_cpu_seq_lens` is False) and may hand out no copy of them."""
    assert decode.backend.needs_cpu_seq_lens is False
    decode.forward_batch.seq_lens_cpu = None
    with Tape() as tape:
        decode.backend.init_forward_metadata(decode.forward_batch)
    assert not tape.host_reads()


def test_a_rank_without_work(decode: Any) -> None:
    batch = decode.forward_batch
    batch.forward_mode, batch.batch_size = ForwardMode.IDLE, 0
    decode.backend.init_forward_metadata(batch)
    q = torch.empty(0, 64)
    assert decode.backend.forward(q, q, q, decode.actual_module.attn, batch).shape == (0, 64)


def test_a_whole_prefill_as_a_graph_is_refused(kit: Any) -> None:
    fixture = kit.build_dense_attention_fixture(SKIPS(), CASES["mha_extend_ragged_page_boundary"], device="cpu")
    fixture.backend.init_cuda_graph_state(max_bs=4, max_num_tokens=64)
    with pytest.raises(UnsupportedProblem, match="CUDA graph: expected one of decode, verification or drafts, got EXTEND"):
        fixture.backend.init_forward_metadata_out_graph(fixture.forward_batch, in_capture=True)


def test_mixed_batch(kit: Any, calls: list[dict[str, Any]]) -> None:
    """Decode rows among a prompt's, as --enable-mixed-chunk makes them."""
    case = dense.DenseAttentionCase("mixed", NAME, ForwardMode.MIXED, 4, 2, 16, (0, 31, 16), (20, 1, 1))
    kit.run_dense_attention_case(SKIPS(), case, device="cpu")


# The operator's kernel for page tables on a GPU is SGLang's; Triton's interpreter runs it here, in a process of its own.
COMPARE = """
import torch
from types import SimpleNamespace
from tests.engine_sglang.test_steps import both_tables
both_tables(torch.device("cpu"))
"""


def both_tables(device: torch.device) -> None:
    """Page tables by SGLang's kernel and by torch, with lengths ahead and a pool of windows: equal as far as pages are live."""
    from fa4_integration.sglang_backend.page_tables import TokenSlots

    generator = torch.Generator().manual_seed(3)
    slots = object.__new__(TokenSlots)
    slots.page_size, slots.max_pages = 16, 5
    pages = torch.stack([torch.randperm(40, generator=generator)[:5] for _ in range(6)])
    slots.table = (pages[:, :, None] * 16 + torch.arange(16)).reshape(6, 80).to(device, torch.int32)
    moved = torch.randperm(40, generator=generator)
    mapping = torch.cat([(moved[:, None] * 16 + torch.arange(16)).reshape(-1), torch.tensor([-1])]).to(device)
    slots.window_pool = SimpleNamespace(full_to_swa_index_mapping=mapping, translate_loc_from_full_to_swa=lambda places: mapping[places])
    rows = torch.tensor([4, 1, 0, 5], dtype=torch.int32, device=device)
    seq_lens = torch.tensor([1, 16, 31, 77], dtype=torch.int64, device=device)
    for ahead in (0, 3):
        steps = [StepTensors.allocate(4, 0, 5, device, has_window_pool=True) for _ in range(2)]
        slots._write_by_kernel(rows, seq_lens, ahead, steps[0])
        slots._write_by_torch(rows, seq_lens, ahead, steps[1])
        assert steps[0].seqused_k.tolist() == steps[1].seqused_k.tolist() == (seq_lens + ahead).tolist()
        for index, length in enumerate((seq_lens + ahead).tolist()):
            live = -(-length // 16)
            for table in ("page_table", "window_page_table"):
                by_kernel, by_torch = (getattr(step, table)[index, :live].tolist() for step in steps)
                assert by_kernel == by_torch, (table, index, by_kernel, by_torch)
            assert steps[1].page_table[index].tolist() == pages[rows[index]].tolist()


def test_sglangs_kernel_writes_the_same_tables() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARE], env=environment, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def chain(kit: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's own harness of an EAGLE drafter: three steps, one branch, and its look-up of a backend by name."""
    # SGLang's test helpers import its benchmarks, and those a library that loads data sets; nothing here does.
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=None))
    # The harness seeds the GPU's generator beside the CPU's.
    monkeypatch.setattr(drafts, "_seeded_rng", lambda seed, device: contextlib.nullcontext(torch.manual_seed(seed)))
    case = dense.DenseAttentionCase("chain", NAME, ForwardMode.DECODE, 4, 2, 16, (13, 14, 15, 16))
    settings = drafts.EagleDraftRunnerSettings(1, 4, 5, 4, dense.DEFAULT_HIDDEN_SIZE, 64, 64, torch.float32, "cpu", 1e-5, 1e-5)
    adapter = drafts.EagleDraftCudaGraphRunnerAdapter(
        build_fixture=dense.build_dense_attention_fixture,
        make_model_forward=drafts._make_dense_model_forward,
        make_draft_inputs=drafts._make_dense_draft_inputs,
        prepare_replay_state=drafts._prepare_dense_draft_replay_state,
        make_forward_batch=drafts._make_dense_eagle_draft_forward_batch,
    )
    sizes = {"head_dim": 16, "hidden_size": 64, "max_context_len": 64, "dtype": torch.float32, "device": "cpu"}
    fixture, worker, found = drafts._build_eagle_draft_fixture(SKIPS(), case, adapter=adapter, build_kwargs=sizes, settings=settings)
    inputs = adapter.make_draft_inputs(case, settings)

    def run() -> Any:
        adapter.prepare_replay_state(fixture, case, inputs, settings)
        batch = adapter.make_forward_batch(case, inputs, settings)
        fixture.runner.kv_index_translator.bind_own_plan(batch)
        return drafts._run_eagle_draft_eager(worker, batch)

    yield SimpleNamespace(fixture=fixture, backend=found, run=run)
    drafts._reset_cuda_graph_test_buffers()


def test_sglang_finds_our_drafter(chain: Any) -> None:
    assert isinstance(chain.backend, DraftSteps)
    assert [child.draft_step for child in chain.backend.attn_backends] == [0, 1, 2]
    assert {child.decode_attention_backend_str for child in chain.backend.attn_backends} == {NAME}


def test_each_draft_step_sees_the_tokens_before_it(chain: Any, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's drafter on our backends: step i attends to the verified tokens and i + 1 of its own."""
    lengths = []
    attend = backend_module.FA4Backend.attend

    def note(self: Any, *args: Any) -> torch.Tensor:
        lengths.append((self.draft_step, self.step.seqused_k.tolist(), self.step.cu_seqlens_q.tolist()))
        return attend(self, *args)

    monkeypatch.setattr(backend_module.FA4Backend, "attend", note)
    chain.run()
    assert lengths == [(step, [n + step + 1 for n in (13, 14, 15, 16)], [0, 1, 2, 3, 4]) for step in range(3)]


def test_a_verification_reads_the_places_of_a_window_pool(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer of places that a graph reads holds the padding page past the batch's own."""
    monkeypatch.setattr(dense, "MHATokenToKVPool", WindowPool)
    fixture = kit.build_dense_attention_fixture(SKIPS(), window_decode(16), device="cpu")
    backend, batch = fixture.backend, fixture.forward_batch
    backend.init_cuda_graph_state(max_bs=8, max_num_tokens=8)
    backend.captured.window_slots.fill_(99)
    backend.init_forward_metadata_out_graph(batch)
    mapped = fixture.runner.token_to_kv_pool.full_to_swa_index_mapping[batch.out_cache_loc]
    assert backend.captured.window_slots.tolist() == mapped.tolist() + [0] * (8 - batch.batch_size)
    assert backend.window_slots.data_ptr() == backend.captured.window_slots.data_ptr()


def test_names_are_taken_over_for_the_drafter_too(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fa4_integration.sglang_backend import draft

    monkeypatch.setenv("FA4_BACKEND_SGLANG_OVERRIDE_FA4", "1")
    stock = {"fa4": object(), "triton": object()}
    factory = SimpleNamespace(draft_model_runner=None, speculative_num_steps=3, topk=1)
    seen = draft.add_ours(lambda factory, name, table, *_: table, factory, "decode_attention_backend", stock, "", True)
    assert seen["triton"] is stock["triton"] and seen["fa4"] is not stock["fa4"] and set(seen) == {"fa4", "triton", plugin.NAME}
