"""Device state that vLLM reloads or discards: what a layer reads afterwards is right, through vLLM's own functions where they run on a CPU.

Sleep (`Worker.sleep`, `wake_up`): level 1 brings weights back, level 2 discards them; both discard the KV cache; what builders made is
kept by some versions only. Addresses stay, contents do not: buffers full of garbage stand for that.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload, record_metadata_for_reloading
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from tests.engines.vllm_step import BuiltStep, OneLayer, VllmStep

KERNELS = ("reference", "emulate-sm90", "emulate-sm100")
FEATURES = ("sinks", "alibi", "fp8")
# The layer and the builder are the same for every chip: each feature is compiled for one of them, and level 2 discards what level 1 does.
EMULATED = {"sinks": "emulate-sm100", "alibi": "emulate-sm100", "fp8": "emulate-sm90"}
GARBAGE = -0x5A5A5A5B  # of integers: neither a length nor an index
MODEL_CONFIG: Any = SimpleNamespace(dtype=torch.bfloat16, quantization=None, word_embeddings_untied_by_checkpoint=False)


class Model(torch.nn.Module):
    """Sinks and the layer that was given them, as in gpt-oss."""

    def __init__(self, built: BuiltStep) -> None:
        super().__init__()
        assert built.sinks is not None
        self.sinks, self.attn = built.sinks, built.layer
        self.sinks.weight_loader = default_weight_loader  # type: ignore[attr-defined]

    def load_weights(self, sinks: torch.Tensor) -> None:
        self.sinks.weight_loader(self.sinks, sinks)  # type: ignore[operator, attr-defined]


def case_of(kernel: str, *more: Any, is_slow: bool) -> Any:
    """Parameters of a test, marked."""
    marks = [pytest.mark.emulated] * (kernel != "reference") + [pytest.mark.slow] * is_slow
    return pytest.param(kernel, *more, marks=marks, id="-".join([kernel, *map(str, more)]))


def step(**features: Any) -> BuiltStep:
    """A decode row whose keys are split over CTAs, and rows of a prefill."""
    return VllmStep((1, 9), (300, 40), **features).build()


def after_loading(model: Model) -> None:
    process_weights_after_loading(model, MODEL_CONFIG, torch.device("cpu"))


def copied(model: Model, sinks: torch.Tensor) -> None:
    """`reload_weights` of weights in kernel format, and a second loading."""
    model.sinks.copy_(sinks)
    after_loading(model)


def replaced(model: Model, sinks: torch.Tensor) -> None:
    """What offloading does (`device_loading_context`): another storage."""
    model.sinks.data = sinks.clone()


def reloaded(model: Model, sinks: torch.Tensor) -> None:
    """`reload_weights` of a checkpoint: layers go to the meta device and come back."""
    initialize_layerwise_reload(model)
    model.load_weights(sinks)
    finalize_layerwise_reload(model, MODEL_CONFIG)


@pytest.mark.parametrize("change", [copied, replaced, reloaded], ids=lambda change: change.__name__)
@pytest.mark.parametrize("kernel", [case_of(kernel, is_slow=kernel == "emulate-sm90") for kernel in KERNELS])
def test_sinks_are_those_loaded_last(kernel: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA4_BACKEND_CPU", kernel)
    built = step(sinks=True)
    model = Model(built)
    record_metadata_for_reloading(model)
    after_loading(model)
    first = built.run()
    built.check(first)
    assert built.sinks is not None
    change(model, built.sinks + 3.0)
    second = built.run()
    built.check(second)
    assert (first - second).abs().max() > 0.1, "the new sinks change nothing: this test would not see old ones"


@pytest.mark.parametrize(
    ("kernel", "feature", "level"),
    [
        case_of(kernel, feature, level, is_slow=kernel != "reference" and (kernel, level) != (EMULATED[feature], 2))
        for kernel in KERNELS
        for feature in FEATURES
        for level in (1, 2)
    ],
)
def test_a_step_after_sleep_is_the_same(kernel: str, feature: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, at the same addresses."""
    monkeypatch.setenv("FA4_BACKEND_CPU", kernel)
    built = step(**({"kv_cache_dtype": "fp8", "scale_shape": (2,)} if feature == "fp8" else {feature: True}))
    awake = built.run()
    built.check(awake)
    cache, sinks = built.cache.clone(), None if built.sinks is None else built.sinks.clone()
    scales = {name: buffer.clone() for name, buffer in built.layer.named_buffers()}
    buffers = device_buffers(built, level)
    addresses = [buffer.data_ptr() for buffer in buffers]
    assert buffers, "nothing is discarded: this test would see nothing"
    for buffer in buffers:
        buffer.fill_(float("nan") if buffer.is_floating_point() else GARBAGE % 256 if buffer.dtype == torch.uint8 else GARBAGE)
    # What the engine brings back: its parameters and buffers, by a reload or from the host, and the KV cache, by computing it again.
    built.cache.copy_(cache)
    for name, buffer in built.layer.named_buffers():
        buffer.copy_(scales[name])
    if built.sinks is not None and sinks is not None:
        built.sinks.copy_(sinks)
    assert torch.equal(built.run()[:10], awake[:10])
    assert [buffer.data_ptr() for buffer in device_buffers(built, level)] == addresses


def device_buffers(built: BuiltStep, level: int) -> list[torch.Tensor]:
    """Every device tensor that the layer or its builder made or reads, and that a sleep of this level may discard."""
    lists = [metadata.work for metadata in built.builder.steps.values() if metadata.work is not None]
    fields = [getattr(work, field.name) for work in lists for field in dataclasses.fields(work)]
    buffers = [field for field in fields if isinstance(field, torch.Tensor)]  # the rest: a shape, and what only some archs have
    if level == 2:
        buffers += [*tensors_of(built.layer), *built.layer.buffers()]
    buffers += [step.unit_scale for step in built.builder.steps.values() if step.unit_scale is not None]
    return [*buffers, built.cache]


def tensors_of(layer: OneLayer) -> list[torch.Tensor]:
    return [tensor for tensor in (layer.impl.sinks, layer.impl.alibi_slopes) if tensor is not None]


def test_layers_with_the_same_slopes_share_them_and_keep_them() -> None:
    """One copy a step for all layers; a second builder (a microbatch's) gives a layer no other address."""
    built = step(alibi=True)
    impl, other = built.layer.impl, step(alibi=True).layer
    other.impl.slopes = None
    layers = built.builder.vllm_config.compilation_config.static_forward_context
    layers["other"] = other
    address = impl.alibi_slopes.data_ptr()
    again = type(built.builder)(built.builder.kv_cache_spec, [*layers], built.builder.vllm_config, torch.device("cpu"))
    assert impl.alibi_slopes.data_ptr() == other.impl.alibi_slopes.data_ptr() == address
    assert again.slopes == built.builder.slopes and len(again.slopes) == 1
