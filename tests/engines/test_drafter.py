"""Which layers run on FA4: what the log says of a drafter, an image encoder, MLA and linear attention, and what vLLM really does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase

from fa4_integration.vllm_backend import layers
from fa4_integration.vllm_backend.backend import FA4Backend
from tests.engines.engine import error_of, generate, tokens, watch_operator
from tests.engines.tiny_models import write_llama

PROMPTS = [list(range(2, 19)), list(range(100, 140))]
ARGUMENTS: dict[str, Any] = {"max_tokens": 8, "max_num_seqs": 2}
ON_ITS_OWN = (
    "FA4 runs 2 of 4 attention layers. Not on FA4: 2 on CPU_ATTN, first draft_model.model.layers.0.self_attn.attn (drafter: vLLM picks its "
    "backend apart, set attention_backend to FA4 in --speculative-config)."
)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written to vLLM's log, each line once, as its `info_once` does."""
    written: list[str] = []

    def info_once(message: str, *arguments: Any) -> None:
        if message % arguments not in written:
            written.append(message % arguments)

    monkeypatch.setattr(layers, "init_logger", lambda name: SimpleNamespace(info_once=info_once))
    return written


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def drafts_by(model: Path, **more: Any) -> dict[str, Any]:
    """The model drafts for itself, so that drafts are accepted."""
    return {"speculative_config": {"model": str(model), "method": "draft_model", "num_speculative_tokens": 2, **more}, **ARGUMENTS}


@pytest.mark.engine
def test_a_drafter_runs_on_fa4_where_it_is_told_to(model: Path, lines: list[str]) -> None:
    """By itself it does not, and the log says so. Both ways give the tokens of the model without drafts."""
    plain = tokens(generate(model, "FA4", PROMPTS, **ARGUMENTS))
    lines.clear()
    with watch_operator() as alone:
        assert tokens(generate(model, "FA4", PROMPTS, block_size=32, **drafts_by(model))) == plain
    assert [line for line in lines if "layers" in line] == [ON_ITS_OWN]
    lines.clear()
    with watch_operator() as told:
        assert tokens(generate(model, "FA4", PROMPTS, block_size=32, **drafts_by(model, attention_backend="FA4"))) == plain
    assert [line for line in lines if "layers" in line] == ["FA4 runs 4 of 4 attention layers."]
    assert 0 < alone.count < told.count


@pytest.mark.engine
def test_the_line_comes_before_vllm_stops(model: Path, lines: list[str]) -> None:
    """Pages of 16 suit FA4 and not the backend that vLLM picks for the drafter here."""
    assert "No common block size for 16" in error_of(ValueError, model, "FA4", PROMPTS, block_size=16, **drafts_by(model))
    assert ON_ITS_OWN in lines


class Layer(AttentionLayerBase):
    """An entry of vLLM's registry."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def get_attn_backend(self) -> Any:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        raise NotImplementedError


class Recurrent(Layer, MambaBase):
    def get_state_shape(self) -> Any:
        raise NotImplementedError

    def get_state_dtype(self) -> Any:
        raise NotImplementedError

    mamba_type: Any = None


def backend(name: str, is_mla: bool = False) -> Any:
    return SimpleNamespace(get_name=lambda: name, is_mla=lambda: is_mla)


def config(registry: dict[str, Any], *, drafts: bool = False, has_encoder: bool = False) -> Any:
    return SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=registry),
        model_config=SimpleNamespace(multimodal_config=object() if has_encoder else None, get_total_num_hidden_layers=lambda: 2),
        speculative_config=object() if drafts else None,
    )


TARGET = {f"model.layers.{index}.self_attn.attn": Layer(FA4Backend) for index in range(2)}
MARKED = Layer(backend("TRITON_ATTN"))
MARKED.is_draft_layer = True


def test_all_layers_on_fa4() -> None:
    registry = {**TARGET, "model.layers.0.mlp.experts": torch.nn.Module()}
    assert layers.describe_layers(config(registry)) == "FA4 runs 2 of 2 attention layers."


@pytest.mark.parametrize(
    ("name", "layer", "drafts", "reason"),
    [
        ("draft_model.model.layers.0.self_attn.attn", Layer(backend("TRITON_ATTN")), True, layers.DRAFTER),
        ("model.layers.2.self_attn.attn", Layer(backend("TRITON_ATTN")), True, layers.DRAFTER),  # EAGLE counts on
        ("mtp.layers.0.self_attn.attn", Layer(backend("TRITON_ATTN")), True, layers.DRAFTER),
        ("model.layers.0.draft.attn", MARKED, True, layers.DRAFTER),
        ("model.layers.1.self_attn.attn", Layer(backend("TRITON_ATTN")), True, layers.OTHER),
        ("model.layers.2.self_attn.attn", Layer(backend("TRITON_ATTN")), False, layers.OTHER),
        ("model.layers.1.self_attn.attn", Layer(backend("FLASHMLA", is_mla=True)), False, layers.MLA),
        ("model.layers.1.linear_attn", Recurrent(backend("GDN_ATTN")), False, layers.RECURRENT),
    ],
)
def test_layers_elsewhere_are_named_with_the_reason(name: str, layer: Layer, drafts: bool, reason: str) -> None:
    line = layers.describe_layers(config({"model.layers.0.self_attn.attn": Layer(FA4Backend), name: layer}, drafts=drafts))
    kind = layer.get_attn_backend().get_name()
    assert line == f"FA4 runs 1 of 2 attention layers. Not on FA4: 1 on {kind}, first {name} ({reason})."


def test_layers_of_one_kind_are_counted_together() -> None:
    registry = {**TARGET, **{f"draft_model.model.layers.{index}.attn": Layer(backend("TRITON_ATTN")) for index in range(3)}}
    registry["model.layers.1.linear_attn"] = Recurrent(backend("GDN_ATTN"))
    line = layers.describe_layers(config(registry, drafts=True, has_encoder=True))
    assert line == (
        f"FA4 runs 2 of 6 attention layers. Not on FA4: 3 on TRITON_ATTN, first draft_model.model.layers.0.attn ({layers.DRAFTER}); "
        f"1 on GDN_ATTN, first model.layers.1.linear_attn ({layers.RECURRENT}). {layers.IMAGE_ENCODER}"
    )
