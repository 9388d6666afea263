"""Layers whose tokens see their own chunk of a sequence alone, as Llama 4 has them: vLLM cuts a sequence into a row for each chunk.

By default vLLM keeps the pages of such layers as those of layers that see all, since it is slower otherwise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention.chunked_local_attention import create_chunked_local_attention_backend
from vllm.v1.core.kv_cache_utils import unify_hybrid_kv_cache_specs
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

from fa4_backend import UnsupportedProblem
from fa4_backend.arguments import AttentionArguments
from fa4_backend.error_budget import judge
from fa4_integration.vllm_backend.backend import FA4Backend
from tests.engines.vllm_step import LAYER, BuiltStep, VllmStep

CHUNK = 64
# More rows than sequences: decode rows and a prompt of four chunks; a step of 16 sequences and 512 tokens, each row across two chunks.
BATCHES = {
    "a prompt": ((*[1] * 15, 200), (*range(1, 200, 14), 240)),
    "every row across chunks": ([32] * 16, [80 + 64 * (n % 4) for n in range(16)]),
    "within a chunk": ((1, 64, 5), (65, 128, 70)),
}


def local_spec(full: Any) -> ChunkedLocalAttentionSpec:
    """Of a local layer, for one that sees all."""
    facts = {name: getattr(full, name) for name in ("block_size", "num_kv_heads", "head_size", "dtype")}
    return ChunkedLocalAttentionSpec(**facts, attention_chunk_size=CHUNK)


def local_step(query_lens: Any, kv_lens: Any, **facts: Any) -> tuple[BuiltStep, Any]:
    """A step, and the builder that vLLM makes for a local layer beside one that sees all."""
    built = VllmStep(tuple(query_lens), tuple(kv_lens), **facts).build()
    full = built.builder.kv_cache_spec
    specs = {"all": full, LAYER: local_spec(full)}
    unify_hybrid_kv_cache_specs(specs)
    backend = create_chunked_local_attention_backend(FA4Backend, CHUNK)
    return built, backend.get_builder_cls()(specs[LAYER], [LAYER], built.builder.vllm_config, torch.device("cpu"))


@pytest.mark.parametrize("batch", BATCHES)
def test_a_token_sees_its_chunk(batch: str) -> None:
    built, built.builder = local_step(*BATCHES[batch])
    out = built.run()
    rows, tokens, pages_of = [], 0, CHUNK // built.step.page_size
    table = torch.nn.functional.pad(built.description.block_table_tensor, (0, pages_of))
    for seq_idx, (queries, keys) in enumerate(zip(built.step.query_lens, built.step.kv_lens, strict=True)):
        for chunk in range((keys - queries) // CHUNK, -(-keys // CHUNK)):
            begin, end = max(keys - queries, chunk * CHUNK), min(keys, (chunk + 1) * CHUNK)
            rows.append((end - begin, end - chunk * CHUNK, table[seq_idx, chunk * pages_of :][:pages_of]))
        tokens += queries
    starts = torch.tensor([0, *[row[0] for row in rows]]).cumsum(0).int()
    assert int(starts[-1]) == tokens
    k, v = built.cache.transpose(1, 2).split(built.step.head_dim, dim=-1)
    lens, page_table = torch.tensor([row[1] for row in rows]).int(), torch.stack([row[2] for row in rows])
    scale = built.step.head_dim**-0.5
    arguments = AttentionArguments(built.query, k, v, page_table, starts, lens, out, None, scale, None, None, 0.0, None, None)
    want = judge(arguments, is_causal=True)
    assert (out.double() - want.out).abs().max() <= want.out_budget


def test_lengths_of_chunks_are_no_drafters_to_change() -> None:
    """A drafter's loop changes vLLM's lengths; those of chunks are copies."""
    built, builder = local_step((1,), (40,))
    assert built.builder.supports_draft_decode_metadata_update and not builder.supports_draft_decode_metadata_update


def test_pages_that_hold_no_whole_sequence_are_refused() -> None:
    built = VllmStep((1,), (40,)).build()
    backend = create_chunked_local_attention_backend(FA4Backend, CHUNK)
    with pytest.raises(UnsupportedProblem, match=r"KV cache: expected .*, got ChunkedLocalAttentionSpec"):
        backend.get_builder_cls()(local_spec(built.builder.kv_cache_spec), [LAYER], built.builder.vllm_config, torch.device("cpu"))
