"""FP8 K and V behind vLLM's interface, step by step: the cache's bytes, whose scales, which dtypes beside each other, what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsKVCacheMethod
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.v1.kv_cache_layout import KVCacheLayout

from fa4_backend import AttentionMetadata, UnsupportedProblem, convert_room
from fa4_backend.kernels import loading
from fa4_backend.problem import FP8
from fa4_integration.vllm_backend import impl
from fa4_integration.vllm_backend.backend import FA4Backend
from fa4_integration.vllm_backend.impl import FA4Impl
from fa4_integration.vllm_backend.kv_cache import quantise, split_kv_cache, write_kv
from tests.engines.vllm_step import LAYER, NAN_BYTE, BuiltStep, VllmStep

BATCHES = {"decode": ((1, 1, 1), (1, 17, 128)), "mixed_chunks": ((1, 1, 7, 33), (40, 16, 39, 161)), "draft_rows": ((4, 4, 2), (20, 16, 33))}
SCALES = {"of_a_tensor": (), "of_a_tensor_as_vector": (1,), "of_heads": (2,)}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {}, "window": {"sliding_window": 9}, "softcap": {"softcap": 3.0}, "sinks": {"sinks": True}, "alibi": {"alibi": True},
}  # fmt: skip
SERVED = {"auto", "float16", "bfloat16", "fp8", "fp8_e4m3"}


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3"])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("batch", BATCHES)
def test_step_equals_oracle(batch: str, feature: str, scales: str, name: str) -> None:
    """With a padded batch, and NaN in every byte that was not written."""
    drafts = 3 if batch == "draft_rows" else 0
    step = VllmStep(
        *BATCHES[batch], kv_cache_dtype=name, scale_shape=SCALES[scales], num_speculative_tokens=drafts, padding_rows=3, padding_tokens=5,
        **FEATURES[feature],
    )  # fmt: skip
    built = step.build()
    assert built.cache.dtype == torch.uint8 and (built.cache == NAN_BYTE).any()
    built.check(built.run())


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("feature", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("batch", BATCHES)
def test_queries_that_vllm_quantised(batch: str, feature: str, scales: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode rows and prompts of a step alike: vLLM asks a layer once, and then quantises them all."""
    monkeypatch.setenv("FA4_BACKEND_FP8_QUERY", "1")
    drafts = 3 if batch == "draft_rows" else 0
    step = VllmStep(
        *BATCHES[batch], kv_cache_dtype="fp8", is_q_fp8=True, scale_shape=SCALES[scales], num_speculative_tokens=drafts, padding_rows=3,
        padding_tokens=5, **FEATURES[feature],
    )  # fmt: skip
    built = step.build()
    assert built.layer.impl.supports_quant_query_input and built.query.dtype == torch.float8_e4m3fn
    built.check(built.run())
    built.layer._q_scale = built.layer._q_scale * 1.25
    output = built.run()
    built.layer._q_scale = built.layer._q_scale / 1.25
    with pytest.raises(AssertionError, match="expected an error of at most"):
        built.check(output)


def test_queries_stay_as_they_are_unless_asked_for_and_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM quantises what this attribute says; Hopper's kernels would refuse what it hands over."""
    fp8, bf16 = VllmStep((3,), (20,), kv_cache_dtype="fp8"), VllmStep((3,), (20,))
    assert not fp8.impl(None, None).supports_quant_query_input
    monkeypatch.setenv("FA4_BACKEND_FP8_QUERY", "1")
    assert fp8.impl(None, None).supports_quant_query_input and not bf16.impl(None, None).supports_quant_query_input
    monkeypatch.setenv("FA4_BACKEND_CPU", "emulate-sm100")
    assert fp8.impl(None, None).supports_quant_query_input
    monkeypatch.setenv("FA4_BACKEND_CPU", "emulate-sm90")
    with pytest.raises(UnsupportedProblem, match=r"q_dtype on sm_90a: expected bfloat16, got float8_e4m3fn"):
        fp8.impl(None, None)


@pytest.mark.parametrize("layout", [KVCacheLayout.LBNHC, KVCacheLayout.LBHNC], ids=lambda layout: layout.name)
@pytest.mark.parametrize("heads", [(4, 1), (9, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [16, 528])
def test_heads_dtypes_and_layouts(page_size: int, dtype: torch.dtype, heads: tuple[int, int], layout: KVCacheLayout) -> None:
    step = VllmStep((1, 9, 40), (530, 9, 300), *heads, page_size=page_size, dtype=dtype, layout=layout, kv_cache_dtype="fp8")
    built = dataclasses.replace(step, scale_shape=heads[1:]).build()
    built.check(built.run())


def test_pages_with_a_gap_behind_them() -> None:
    """A page is as long as the longest of the layers that share the pool (`page_size_padded`)."""
    built = VllmStep((1, 9), (300, 40), kv_cache_dtype="fp8").build()
    pages, heads, tokens, width = built.cache.shape
    pool = torch.full((pages, 3 * heads * tokens * width), NAN_BYTE, dtype=torch.uint8)
    padded = pool[:, : heads * tokens * width].view(pages, tokens, heads, width).transpose(1, 2)
    padded.copy_(built.cache)
    built.cache = padded
    built.check(built.run())


def finite_e4m3() -> list[float]:
    """Every finite value from the format's definition, by its byte without the sign: 4 exponent bits biased by 7, 3 mantissa bits."""
    values = []
    for byte in range(0x7F):
        exponent, mantissa = byte >> 3, byte & 7
        values.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return values


def nearest_byte(value: float, table: list[float]) -> int:
    """The e4m3 byte of a value: the nearest, of two the one with an even last bit, no larger than the largest."""
    if math.isnan(value):
        return NAN_BYTE
    size = min(abs(value), table[-1])
    byte = min(range(len(table)), key=lambda i: (abs(table[i] - size), i & 1))
    return byte | (0x80 if math.copysign(1.0, value) < 0 else 0)


def test_quantised_as_the_format_says() -> None:
    """Each value, each midpoint of two, their neighbours, values far outside, infinities, NaN and zeros, in float32 and in bfloat16."""
    table = finite_e4m3()
    middles = [(a + b) / 2 for a, b in itertools.pairwise(table)]
    sizes = [*table, *middles, *(m * (1 + 2.0**-20) for m in middles), 449.0, 464.0, 480.0, 1e6, math.inf, 1e-9]
    values = torch.tensor([*sizes, *(-size for size in sizes), math.nan])
    for given in (values, values.bfloat16()):
        got = quantise(given.view(-1, 1, 1), torch.ones(())).view(torch.uint8).flatten() & torch.where(given.isnan(), 0x7F, 0xFF)
        assert got.tolist() == [nearest_byte(value, table) for value in given.tolist()]


@pytest.mark.parametrize("scales", SCALES)
def test_cache_write_divides_by_the_scale(scales: str) -> None:
    """K by K's and V by V's, a head by its own; slot -1 writes nothing and every other byte stays."""
    built = VllmStep((3, 1), (20, 16), kv_cache_dtype="fp8", scale_shape=SCALES[scales], padding_rows=2, padding_tokens=4).build()
    before, slots = built.cache.clone(), built.description.slot_mapping
    built.layer.impl.do_kv_cache_update(built.layer, built.key, built.value, built.cache, slots)
    table, written = finite_e4m3(), slots[:4]
    views = zip(split_kv_cache(built.cache, 64), split_kv_cache(before, 64), strict=True)
    assert built.key[:4].abs().max() > 448.0 * built.layer._k_scale.flatten()[0], "nothing is saturated"
    for (cache, old), new, scale in zip(views, (built.key, built.value), (built.layer._k_scale, built.layer._v_scale), strict=True):
        want = (new[:4].float() / scale.expand(2)[:, None]).flatten().tolist()
        assert cache[written // 16, written % 16].flatten().tolist() == [nearest_byte(value, table) for value in want]
        old[written // 16, written % 16] = cache[written // 16, written % 16]
    assert torch.equal(built.cache, before), "a byte outside the slots changed"


def test_gpu_cache_write_is_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bytes as they are, vLLM's name of the dtype and the layer's scales."""
    calls: list[Any] = []
    monkeypatch.setattr("vllm._custom_ops.reshape_and_cache_flash", lambda *arguments: calls.append(arguments))
    cache = torch.zeros(5, 2, 16, 128, dtype=torch.uint8)
    on_gpu = Mock(wraps=cache, is_cuda=True, shape=cache.shape)
    layer, new, slots = SimpleNamespace(_k_scale=object(), _v_scale=object()), torch.zeros(3, 2, 64), torch.zeros(3)
    write_kv(layer, new, new, on_gpu, slots, "fp8_e4m3")  # type: ignore[arg-type]
    ((*tensors, name, k_scale, v_scale),) = calls
    assert (name, k_scale, v_scale) == ("fp8_e4m3", layer._k_scale, layer._v_scale)
    assert [tensor.dtype for tensor in tensors[2:4]] == [torch.uint8] * 2 and tensors[3].data_ptr() == cache.data_ptr() + 64


@pytest.mark.parametrize("name", ["_k_scale", "_v_scale"])
@pytest.mark.parametrize("scales", SCALES)
def test_a_scale_that_is_off_when_it_is_read_is_noticed(scales: str, name: str) -> None:
    built = VllmStep((1, 64), (300, 64), kv_cache_dtype="fp8", scale_shape=SCALES[scales]).build()
    built.check(built.run())
    honest = getattr(built.layer, name)
    setattr(built.layer, name, honest * 1.05)
    output = torch.full_like(built.query, math.nan)
    metadata = built.builder.build(0, built.description)
    built.layer.impl.forward(built.layer, built.query, None, None, built.cache, metadata, output)
    setattr(built.layer, name, honest)
    with pytest.raises(AssertionError, match="expected an error of at most"):
        built.check(output)


@pytest.mark.parametrize("change", ["in_place", "another_tensor"])
def test_scales_are_those_of_the_call(change: str) -> None:
    """A checkpoint's come after the layer was made, in place or as tensors of another shape; what is written later uses them too."""
    built = VllmStep((1, 9), (300, 40), kv_cache_dtype="fp8").build()
    first = built.run()
    for name in ("_k_scale", "_v_scale"):
        if change == "in_place":
            getattr(built.layer, name).mul_(2.0)
        else:
            setattr(built.layer, name, torch.tensor([0.5, 3.0]))
    second = built.run()
    built.check(second)
    assert (first - second).abs().max() > 0.1, "the new scales change nothing: this test would not see old ones"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of Hopper's kernels, none of which is compiled, and no room of another test."""
    monkeypatch.setenv("FA4_BACKEND_CPU", "emulate-sm90")
    monkeypatch.setattr(loading, "load", lambda key, *, emulated: lambda *arguments: None)
    monkeypatch.setattr(convert_room, "_rooms", weakref.WeakValueDictionary())


@pytest.mark.parametrize(
    ("name", "mode", "drafts", "query_lens", "keys"),
    [
        ("fp8", CUDAGraphMode.FULL_AND_PIECEWISE, 0, (1, 9, 40), 117),
        ("fp8", CUDAGraphMode.FULL_DECODE_ONLY, 8, (1, 9, 40), 77),  # 9 tokens are a decode row
        ("fp8", CUDAGraphMode.NONE, 0, (1, 1, 1), None),
        ("fp8", CUDAGraphMode.FULL, 0, (1, 9, 40), None),  # graphs hold steps with prompts
        ("auto", CUDAGraphMode.FULL_AND_PIECEWISE, 0, (1, 9, 40), None),  # nothing to choose
    ],
)
@pytest.mark.usefixtures("hopper")
def test_keys_of_prompts_are_told_where_they_choose_kernels(
    name: str, mode: CUDAGraphMode, drafts: int, query_lens: tuple[int, ...], keys: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int | None, int]] = []
    step = VllmStep(query_lens, (300, 40, 77), kv_cache_dtype=name, cudagraph_mode=mode, num_speculative_tokens=drafts, padding_rows=2)
    built = step.build()
    monkeypatch.setattr(
        AttentionMetadata, "refresh", lambda self, *, prefill_keys, min_seqlen_q, **_: told.append((prefill_keys, min_seqlen_q))
    )
    built.builder.build(0, built.description)
    assert told == [(keys, 1)]


@pytest.mark.usefixtures("hopper")
def test_they_are_told_without_room_to_convert_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short messages have tiles of their own, unless a graph holds the step."""
    monkeypatch.setenv("FA4_BACKEND_CONVERT_MIB", "0")
    built = VllmStep((1, 9, 4), (300, 40, 77), kv_cache_dtype="fp8").build()
    (step,) = built.builder.steps.values()
    assert step.converted is None and step.messages is not None
    built.builder.build(0, built.description)
    assert step.bounds is not None and step.bounds.has_messages
    built = VllmStep((1, 9, 4), (300, 40, 77), kv_cache_dtype="fp8", cudagraph_mode=CUDAGraphMode.FULL).build()
    (step,) = built.builder.steps.values()
    built.builder.build(0, built.description)
    assert step.bounds is not None and not step.bounds.has_messages


@pytest.mark.usefixtures("hopper")
def test_room_for_converted_keys_is_reserved_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM makes layers before it measures what is left for its KV cache, and builders after: those allocate nothing more.

    Two kinds of layers in FP8, and one in 16 bits, which `kv_cache_dtype_skip_layers` names."""
    fp8, windowed = VllmStep((1, 30), (40, 30), kv_cache_dtype="fp8"), VllmStep((1, 30), (40, 30), kv_cache_dtype="fp8", sliding_window=9)
    wide = VllmStep((1, 30), (40, 30))
    monkeypatch.setattr(impl, "get_current_vllm_config_or_none", lambda: fp8.config())
    layers = [step.impl(None, None) for step in (wide, fp8, windowed)]
    assert layers[0].convert_room is None
    room = layers[1].convert_room
    assert room is not None and room is layers[2].convert_room
    keys = 16 * 1024  # 16 sequences of the longest, less than FA4_BACKEND_CONVERT_MIB has room for
    assert room.storage.numel() == 2 * keys * 2 * 64 * 2
    storage = room.storage
    steps = [step for one in (fp8, windowed, wide) for step in one.build().builder.steps.values()]
    assert [step.converted is not None and step.converted.room is room for step in steps] == [True, True, False]
    assert room.storage is storage and {step.converted.keys.data_ptr() for step in steps[:2] if step.converted} == {storage.data_ptr()}


@pytest.mark.parametrize(("variable", "mode"), [("0", CUDAGraphMode.NONE), ("256", CUDAGraphMode.FULL)])
@pytest.mark.usefixtures("hopper")
def test_no_room_where_no_step_converts(variable: str, mode: CUDAGraphMode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA4_BACKEND_CONVERT_MIB", variable)
    step = VllmStep((1, 30), (40, 30), kv_cache_dtype="fp8", cudagraph_mode=mode)
    monkeypatch.setattr(impl, "get_current_vllm_config_or_none", lambda: step.config())
    built = step.build()
    assert built.layer.impl.convert_room is None
    assert [made.converted for made in built.builder.steps.values()] == [None]


CHECKPOINTS: dict[str, tuple[type[BaseKVCacheMethod], Any, list[float], list[float]]] = {
    "ModelOpt and plain FP8": (BaseKVCacheMethod, None, [0.25], [0.5]),
    "compressed-tensors, a tensor": (CompressedTensorsKVCacheMethod, "tensor", [0.25], [0.5]),
    "compressed-tensors, attn_head": (CompressedTensorsKVCacheMethod, "attn_head", [0.25, 2.0], [0.5, 0.125]),
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_scales_of_checkpoints(checkpoint: str) -> None:
    """Loaded and put into the layer by vLLM's own code."""
    method_cls, strategy, k_scale, v_scale = CHECKPOINTS[checkpoint]
    scheme = strategy and {"type": "float", "num_bits": 8, "symmetric": True, "strategy": strategy}
    method = method_cls(SimpleNamespace(kv_cache_scheme=scheme, total_num_heads=6, total_num_kv_heads=2))  # type: ignore[arg-type]
    built = VllmStep((1, 9), (300, 40), kv_cache_dtype="fp8", scale_shape=(2,)).build()
    layer: Any = built.layer
    layer.kv_cache_dtype, layer.num_kv_heads, layer.num_heads = "fp8", 2, 6
    for name in ("_q_scale", "_k_scale", "_v_scale", "_prob_scale"):
        layer.register_buffer(name, torch.ones(()))
    layer._k_scale_cpu = layer._v_scale_cpu = torch.ones(())
    method.create_weights(layer)
    for parameter, scale in ((layer.k_scale, k_scale), (layer.v_scale, v_scale)):
        parameter.data.copy_(torch.tensor(scale).view(parameter.shape))
    method.process_weights_after_loading(layer)
    assert (layer._k_scale.flatten().tolist(), layer._v_scale.flatten().tolist()) == (k_scale, v_scale)
    built.check(built.run())


def beside(built: BuiltStep, other: BuiltStep) -> Any:
    """One builder for the layers of both steps, as for the layers of one group."""
    layers = built.builder.vllm_config.compilation_config.static_forward_context
    layers["other"] = other.layer
    return FA4Backend.get_builder_cls()(built.builder.kv_cache_spec, [LAYER, "other"], built.builder.vllm_config, torch.device("cpu"))


@pytest.mark.parametrize("windows", [(None, None), (9, None), (9, 12)], ids=str)
def test_skipped_layers_beside_fp8_layers(windows: tuple[int | None, int | None]) -> None:
    """`kv_cache_dtype_skip_layers`: 16-bit layers with scales that a checkpoint gave them, and which do not apply."""
    batch = ((1, 30), (40, 30))
    built = VllmStep(*batch, kv_cache_dtype="fp8", sliding_window=windows[0]).build()
    skipped = VllmStep(*batch, sliding_window=windows[1]).build()
    skipped.layer._k_scale = skipped.layer._v_scale = torch.tensor(3.0)
    builder = built.builder = skipped.builder = beside(built, skipped)
    assert sorted(step.plan.problem.kv_dtype for step in builder.steps.values()) == ["bfloat16", FP8]
    assert all(step.plan.problem.dtype == "bfloat16" for step in builder.steps.values())
    for one in (built, skipped):
        one.check(one.run())


def test_a_layer_that_reads_anothers_cache_reads_its_scales() -> None:
    """KV sharing: a checkpoint may hold no scales for a layer that writes nothing."""
    built = VllmStep((1, 30), (40, 30), kv_cache_dtype="fp8").build()
    reader = VllmStep((1, 30), (40, 30), kv_cache_dtype="fp8").build()
    reader.layer._k_scale = reader.layer._v_scale = torch.ones(())
    reader.layer.impl.kv_sharing_target_layer_name = LAYER
    metadata = beside(built, reader).build(0, built.description)
    built.run()
    output = torch.full_like(built.query, math.nan)
    built.check(reader.layer.impl.forward(reader.layer, built.query, None, None, built.cache, metadata, output))


def test_a_cache_of_another_dtype_is_refused() -> None:
    """Bytes where the layer has none, or the reverse: no view turns one into the other silently."""
    built, wide = (VllmStep((1,), (20,), kv_cache_dtype=name).build() for name in ("fp8", "auto"))
    built.cache, wide.cache = wide.cache, built.cache
    for one, words in ((built, "k_cache: expected shape"), (wide, "k_cache: expected dtype bfloat16, got uint8")):
        metadata = one.builder.build(0, one.description)
        with pytest.raises(ValueError, match=words):
            one.layer.impl.forward(one.layer, one.query, None, None, one.cache, metadata, torch.empty_like(one.query))


def test_queries_stay_in_16_bits() -> None:
    assert FA4Impl.supports_quant_query_input is False


@pytest.mark.parametrize("name", sorted(set(CacheDType.__args__)))  # type: ignore[attr-defined]
def test_every_dtype_is_served_or_refused_by_name(name: str) -> None:
    ordinary = {
        "head_size": 128, "dtype": torch.bfloat16, "block_size": 16, "use_mla": False, "has_sink": False, "use_sparse": False,
        "use_mm_prefix": False, "use_per_head_quant_scales": False, "attn_type": "decoder", "device_capability": None,
    }  # fmt: skip
    if name == "float16":
        ordinary["dtype"] = torch.float16
    reasons = FA4Backend.validate_configuration(kv_cache_dtype=name, **ordinary)  # type: ignore[arg-type]
    if name in SERVED:
        assert reasons == []
        return
    assert f"kv_cache_dtype: expected one of auto, float16, bfloat16, fp8, fp8_e4m3, got {name}" in reasons
    with pytest.raises(UnsupportedProblem, match=f"kv_cache_dtype: expected one of .*, got {name}"):
        FA4Impl(4, 64, 0.1, 2, kv_cache_dtype=name)


def test_per_head_scales_are_declared() -> None:
    assert FA4Backend.supports_per_head_quant_scales()
