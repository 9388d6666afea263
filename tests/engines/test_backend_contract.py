"""The backend class behind vLLM's interface, step by step, without an engine: padded metadata stands for captured graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym, kNvfp4Dynamic
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import CrossAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from fa4_backend import AttentionMetadata, UnsupportedProblem
from fa4_integration.vllm_backend.backend import FA4Backend
from fa4_integration.vllm_backend.kv_cache import split_kv_cache
from tests.engines.vllm_step import LAYER, VllmStep
from tests.support.operations import Operations

# Edges: first token of a page, last of a page, one past it; first step of a sequence; rows of a draft; prefill chunks behind a context.
BATCHES = {
    "decode": ((1, 1, 1, 1), (1, 16, 17, 128)),
    "first_prefill": ((5, 64), (5, 64)),
    "mixed_chunks": ((1, 1, 7, 33), (40, 16, 39, 161)),
    "draft_rows": ((4, 4, 2), (20, 16, 33)),
}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 9},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
}
PADDING = {"exact": {}, "padded": {"padding_rows": 3, "padding_tokens": 5}}
LAYOUTS = [KVCacheLayout.LBNHC, KVCacheLayout.LBHNC]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("batch", BATCHES)
def test_step_equals_oracle(batch: str, padding: str, feature: str, layout: KVCacheLayout) -> None:
    query_lens, kv_lens = BATCHES[batch]
    drafts = 3 if batch == "draft_rows" else 0
    built = VllmStep(query_lens, kv_lens, layout=layout, num_speculative_tokens=drafts, **FEATURES[feature], **PADDING[padding]).build()
    built.check(built.run())


# Heads: one KV head (degenerate strides), SmolLM2's 9/3, no grouping. Pages: vLLM's on GPU and CPU, a hybrid model's, the largest.
@pytest.mark.parametrize("heads", [(4, 1), (9, 3), (2, 2)], ids=str)
@pytest.mark.parametrize("page_size", [16, 128, 528, 256])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_heads_and_page_sizes(heads: tuple[int, int], page_size: int, layout: KVCacheLayout) -> None:
    built = VllmStep((1, 9, 40), (530, 9, 300), *heads, page_size=page_size, layout=layout).build()
    built.check(built.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    built = VllmStep((1, 7), (50, 23), head_dim=head_dim, dtype=dtype).build()
    built.check(built.run())


def test_a_wrong_scale_fails_the_check() -> None:
    """The control of `check`: 5% on the softmax scale is over its budget."""
    built = VllmStep((1, 64), (300, 64), dtype=torch.float32).build()
    built.layer.impl.scale *= 1.05
    with pytest.raises(AssertionError, match="expected an error of at most"):
        built.check(built.run())


def test_cache_write_touches_only_the_slots() -> None:
    """Slot -1 writes nothing (page 0 stays NaN), and every other row of the cache keeps its bits."""
    built = VllmStep((3, 1), (20, 16), padding_rows=2, padding_tokens=4).build()
    before = built.cache.clone()
    slots = built.description.slot_mapping
    built.layer.impl.do_kv_cache_update(built.layer, built.key, built.value, built.cache, slots)
    for cache, new in zip(split_kv_cache(built.cache, 64), (built.key, built.value), strict=True):
        written = slots[:4]
        torch.testing.assert_close(cache[written // 16, written % 16], new[:4], rtol=0, atol=0)
        cache[written // 16, written % 16] = float("nan")
    for cache in split_kv_cache(before, 64):
        written = slots[:4]
        cache[written // 16, written % 16] = float("nan")
    assert torch.equal(built.cache.view(torch.int16), before.view(torch.int16)), "a row outside the slots changed"


def test_cache_write_takes_keys_longer_than_the_slots() -> None:
    built = VllmStep((3, 1), (20, 16), padding_tokens=4).build()
    built.description.slot_mapping = built.description.slot_mapping[:4]
    built.check(built.run())


def test_views_of_the_cache_are_no_copies() -> None:
    built = VllmStep((1,), (5,)).build()
    for view in split_kv_cache(built.cache, 64):
        assert view.untyped_storage().data_ptr() == built.cache.untyped_storage().data_ptr()
    assert split_kv_cache(built.cache, 64)[0].shape == (5, 16, 2, 64)


def test_a_single_kv_head_has_an_ordinary_stride() -> None:
    """With one KV head (tensor parallelism) torch may report any stride for it, such as 1, which no TMA descriptor can hold."""
    odd = torch.zeros(3, 1, 16, 128).as_strided((3, 1, 16, 128), (2048, 1, 128, 1))
    for view in split_kv_cache(odd, 64):
        assert view.shape == (3, 16, 1, 64) and view.stride() == (2048, 128, 128, 1)


def test_profiling_run_has_no_metadata() -> None:
    built = VllmStep((1,), (5,)).build()
    output = torch.full_like(built.query, float("nan"))
    empty_cache = torch.tensor([])
    assert built.layer.impl.forward(built.layer, built.query, built.key, built.value, empty_cache, None, output) is output
    assert (output == 0).all()


def test_output_padding_is_zero() -> None:
    """Padded rows reach real tokens through operations over the whole batch, such as the maximum of dynamic quantisation."""
    built = VllmStep((1, 4), (9, 4), padding_tokens=5).build()
    assert (built.run()[5:] == 0).all()


def test_piecewise_slices_long_tensors() -> None:
    """PIECEWISE graphs pad q, k, v and the output, while the metadata holds the real counts."""
    built = VllmStep((1, 4), (9, 4), padding_tokens=5).build()
    built.description.num_actual_tokens = 5
    output = built.run()
    built.check(output)
    assert output[5:].isnan().all(), "rows past the call's were written"


def test_build_reads_no_tensor_and_allocates_none() -> None:
    built = VllmStep((1, 1, 7), (40, 16, 39)).build()
    with Operations() as operations:
        metadata = built.builder.build(0, built.description)
    # numpy's view of the host's offsets, of which the shortest query follows.
    assert operations.names == ["aten.detach.default"]
    assert metadata.cu_seqlens_q is built.description.query_start_loc, "the metadata must hold vLLM's persistent tensors"
    assert metadata.seqused_k is built.description.seq_lens
    assert metadata.page_table is built.description.block_table_tensor


def test_a_drafts_rows_may_be_shorter_than_the_steps() -> None:
    """A step of prefill rows alone needs no decode kernel; what a drafter's loop makes of its metadata may."""
    built = VllmStep((9, 7), (40, 39)).build()
    metadata = built.builder.build(0, built.description)
    (step,) = metadata.steps.values()
    assert step.bounds is not None and step.bounds.min_seqlen_q == 7
    built.builder.update_draft_decode_metadata(metadata)
    assert step.bounds is not None and step.bounds.min_seqlen_q == 1


@pytest.mark.parametrize(
    ("query_lens", "mode", "drafts", "told"),
    [
        ((1, 1), CUDAGraphMode.FULL_AND_PIECEWISE, 0, True),
        ((1, 9), CUDAGraphMode.FULL_AND_PIECEWISE, 0, False),
        ((4, 2), CUDAGraphMode.FULL_DECODE_ONLY, 3, True),
        ((1, 1), CUDAGraphMode.FULL, 0, False),  # replayed by a graph that was captured of a step with prompts
    ],
)
def test_a_step_of_decode_rows_alone_is_told(
    query_lens: tuple[int, ...], mode: CUDAGraphMode, drafts: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of a drafter's loop what was told at its first step: one graph holds them all."""
    built = VllmStep(query_lens, (40, 39), cudagraph_mode=mode, num_speculative_tokens=drafts).build()
    seen: list[bool] = []
    monkeypatch.setattr(AttentionMetadata, "refresh", lambda self, *, decode_alone, **_: seen.append(decode_alone))
    built.builder.update_draft_decode_metadata(built.builder.build(0, built.description))
    assert seen == [told, told]


def test_buffers_stay_from_step_to_step() -> None:
    built = VllmStep((1, 1, 7), (40, 16, 39)).build()
    first = built.builder.build(0, built.description)
    second = built.builder.build(0, replace(built.description, num_reqs=3))
    assert [id(step) for step in first.steps.values()] == [id(step) for step in second.steps.values()]


@pytest.mark.parametrize("drafts", [0, 3])
def test_decode_rows_are_as_long_as_a_draft(drafts: int) -> None:
    built = VllmStep((1,), (5,), num_speculative_tokens=drafts).build()
    assert built.builder.reorder_batch_threshold == 1 + drafts
    (metadata,) = built.builder.steps.values()
    assert metadata.plan.limits.decode_query_len == 1 + drafts


def test_layers_of_one_group_may_differ_in_their_masks() -> None:
    """Gemma-3 without the hybrid cache manager: windowed and full layers share pages, metadata and builder."""
    built = VllmStep((1, 30), (40, 30)).build()
    windowed = VllmStep((1, 30), (40, 30), sliding_window=9).build()
    layers = built.builder.vllm_config.compilation_config.static_forward_context
    layers["windowed"] = windowed.layer
    built.builder = FA4Backend.get_builder_cls()(
        built.builder.kv_cache_spec, [LAYER, "windowed"], built.builder.vllm_config, torch.device("cpu")
    )
    assert len(built.builder.steps) == 2
    built.check(built.run())
    windowed.builder = built.builder
    windowed.check(windowed.run())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_type": "encoder_only"}, "attention type: expected decoder, got encoder_only"),
        ({"head_size": 100}, "expected a multiple of 8, got 100"),
        ({"num_heads": 5, "num_kv_heads": 2}, "expected a positive multiple of num_kv_heads"),
    ],
)
def test_layers_that_cannot_be_served_are_refused_at_start(arguments: dict[str, Any], message: str) -> None:
    ordinary = {"num_heads": 4, "head_size": 64, "scale": 0.1, "num_kv_heads": 2}
    with pytest.raises(UnsupportedProblem, match=message):
        FA4Backend.get_impl_cls()(**{**ordinary, **arguments})


def test_exact_mode_needs_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for alone it is refused, not forgotten."""
    monkeypatch.setenv("FA4_BACKEND_EXACT", "1")
    with pytest.raises(UnsupportedProblem, match="VLLM_BATCH_INVARIANT=1"):
        FA4Backend.get_impl_cls()(num_heads=4, head_size=64, scale=0.1, num_kv_heads=2)


def test_other_kv_caches_are_refused_at_start() -> None:
    spec = CrossAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedProblem, match="expected FullAttentionSpec or SlidingWindowSpec, got CrossAttentionSpec"):
        FA4Backend.get_builder_cls()(spec, [LAYER], VllmStep((1,), (1,)).config(), torch.device("cpu"))


@pytest.mark.parametrize("causal", [False, torch.ones(1, dtype=torch.int32)])
def test_batches_that_are_not_causal_are_refused(causal: Any) -> None:
    built = VllmStep((1,), (5,)).build()
    with pytest.raises(UnsupportedProblem, match="causal: expected True"):
        built.builder.build(0, replace(built.description, causal=causal))


def test_outputs_with_scales_of_blocks_are_refused() -> None:
    built = VllmStep((1,), (5,)).build()
    metadata = built.builder.build(0, built.description)
    with pytest.raises(UnsupportedProblem, match="output quantisation"):
        tensors = (built.query, built.key, built.value, built.cache, metadata, torch.empty_like(built.query))
        built.layer.impl.forward(built.layer, *tensors, output_block_scale=torch.ones(1))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_outputs_with_one_scale_are_those_that_vllm_would_quantise(shape: tuple[int, ...]) -> None:
    """A layer of the same group without a scale stays in the dtype of q."""
    built = VllmStep((1, 40), (5, 60), kv_cache_dtype="fp8", fuses_quantisation=True).build()
    assert built.layer.impl.fused_output_quant_supported(kFp8StaticTensorSym)
    assert not built.layer.impl.fused_output_quant_supported(kNvfp4Dynamic)
    scale = torch.full(shape, 2.0**-8)  # values above 1.75 are saturated
    wide = built.run()
    built.check(wide)
    got = built.run(scale)
    # vLLM would round to bfloat16 first, by at most 2^-8 of a value; one rounding alone may end on either side of that.
    ends = [(wide.float() * factor * 256).clamp(-448, 448).to(torch.float8_e4m3fn).float() for factor in (1 - 2.0**-8, 1 + 2.0**-8)]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    assert ((low <= got.float()) & (got.float() <= high)).all() and (got.float() == 448).any()
    assert (low < high).float().mean() < 0.2  # most values have one FP8 number that is right


def test_capabilities_say_what_is_served() -> None:
    assert FA4Backend.supports_sink() and FA4Backend.supports_sliding_window() and FA4Backend.supports_batch_invariance()
    assert FA4Backend.supports_head_size(96) and not FA4Backend.supports_head_size(100)
    assert FA4Backend.supports_dtype(torch.float32) and not FA4Backend.supports_dtype(torch.float8_e4m3fn)
    assert [FA4Backend.supports_block_size(size) for size in (16, 24, 528)] == [True, False, True]
    assert FA4Backend.supports_compute_capability(None)
    assert not FA4Backend.supports_non_causal() and not FA4Backend.supports_mm_prefix() and not FA4Backend.is_mla()
    assert not FA4Backend.supports_dcp() and not FA4Backend.supports_pcp()
    assert set(LAYOUTS) == set(FA4Backend.supported_kv_cache_layouts())


def test_the_reference_claims_no_captured_graphs() -> None:
    """It reads lengths on the host; only kernels may claim ALWAYS."""
    assert FA4Backend.get_builder_cls().get_cudagraph_support(None, None) is AttentionCGSupport.NEVER
