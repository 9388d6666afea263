"""A drafter's loop as vLLM records it in one CUDA graph: lengths, slots and tokens change on the device, the metadata object stays.

`TargetDependentARSpeculator._generate_fused_drafts` of vLLM builds metadata once, and at each step lengthens `seq_lens` in place, writes
new slots in place and calls `update_draft_decode_metadata`. A replay runs no Python, so nothing of it may need the host.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fa4_backend.metadata import AttentionMetadata
from tests.engines.vllm_step import BuiltStep, VllmStep

KERNELS = ["reference", *(pytest.param(f"emulate-{chip}", marks=pytest.mark.emulated) for chip in ("sm90", "sm100"))]
PAGE_SIZE = 16
NUM_DRAFTS = 3
# Ends of the first sequences cross a page at the first and at the second draft; the third has few keys, the long one is split over CTAs.
KV_LENS = (33, 15, 1, 600)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FA4_BACKEND_CPU", request.param)
    return request.param


def draft_step(**facts: Any) -> BuiltStep:
    """One token a sequence, pages for all drafts, a padded sequence as in a captured graph."""
    built = VllmStep((1,) * len(KV_LENS), KV_LENS, padding_rows=1, padding_tokens=1, num_speculative_tokens=NUM_DRAFTS, **facts).build()
    spare = [page for page in range(1, built.cache.shape[0]) if page not in built.description.block_table_tensor]
    for row, length in enumerate(KV_LENS):
        table, first = built.description.block_table_tensor[row], -(-length // PAGE_SIZE)
        last = (length + NUM_DRAFTS - 1) // PAGE_SIZE
        if last >= first:
            table[last] = spare.pop()
    # vLLM's bound at the build is that of the last draft.
    built.description.max_seq_len = max(KV_LENS) + NUM_DRAFTS
    return built


def advance(built: BuiltStep, generator: torch.Generator) -> None:
    """What the device does between two drafts: one more token a sequence, in place."""
    d, real = built.description, slice(0, len(KV_LENS))
    d.seq_lens[real] += 1
    position = d.seq_lens[real].long() - 1
    page = d.block_table_tensor[real].gather(1, (position // PAGE_SIZE)[:, None])[:, 0].long()
    d.slot_mapping[real] = page * PAGE_SIZE + position % PAGE_SIZE
    for tensor in (built.query, built.key, built.value):
        tensor[real] = torch.randn(tensor[real].shape, generator=generator).to(tensor.dtype)


def forward(built: BuiltStep, metadata: Any) -> torch.Tensor:
    """A layer of the drafter; the slots are read from the metadata, as a graph has them."""
    impl = built.layer.impl
    impl.do_kv_cache_update(built.layer, built.key, built.value, built.cache, metadata.slot_mapping)
    return impl.forward(built.layer, built.query, built.key, built.value, built.cache, metadata, torch.full_like(built.query, math.nan))


@pytest.mark.parametrize("feature", ["plain", "window"])
def test_every_draft_of_a_loop_sees_its_own_lengths(kernel: str, feature: str) -> None:
    built = draft_step(**({"sliding_window": 40} if feature == "window" else {}))
    assert built.builder.supports_draft_decode_metadata_update
    generator = torch.Generator().manual_seed(1)
    metadata = built.builder.build_for_drafting(built.description, 0)
    built.check(forward(built, metadata))
    for _ in range(NUM_DRAFTS - 1):
        advance(built, generator)
        built.builder.update_draft_decode_metadata(metadata)
        built.check(forward(built, metadata))


def test_work_lists_are_what_the_update_changes() -> None:
    """The control: without the update a kernel takes a sequence's last length for its length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FA4_BACKEND_CPU", "emulate-sm90")
        built = draft_step()
        metadata = built.builder.build_for_drafting(built.description, 0)
        forward(built, metadata)
        advance(built, torch.Generator().manual_seed(1))
        with pytest.raises(AssertionError, match="expected an error of at most"):
            built.check(forward(built, metadata))


def test_an_update_needs_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only device tensors of the build, and host numbers of the build: nothing that a replay would have to give anew."""
    built = draft_step()
    metadata = built.builder.build_for_drafting(built.description, 0)
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(AttentionMetadata, "refresh", lambda self, **lengths: seen.append(lengths))
    built.builder.update_draft_decode_metadata(metadata)
    (lengths,) = seen
    assert lengths["seqused_k"].data_ptr() == built.description.seq_lens.data_ptr()
    assert lengths["cu_seqlens_q"].data_ptr() == built.description.query_start_loc.data_ptr()
    assert (lengths["max_seqlen_q"], lengths["max_seqlen_k"]) == (1, max(KV_LENS) + NUM_DRAFTS)
