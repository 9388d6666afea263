"""The MLA backend behind vLLM's interface, step by step, without an engine: padded metadata stands for captured graphs."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention.mla_attention import QueryLenSupport
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import FullAttentionSpec

from fa4_backend import BatchLimits, UnsupportedProblem, split_rows
from fa4_backend.problem import FP8
from fa4_backend.support import PAGE_MULTIPLE
from fa4_integration.vllm_backend.mla_backend import FA4MLABackend
from fa4_integration.vllm_backend.mla_messages import MessageSteps
from fa4_integration.vllm_backend.mla_metadata_builder import FA4MLAMetadataBuilder
from fa4_integration.vllm_backend.owned_models import owner_of
from tests.engines.mla_step import LAYER, NAN_BYTE, MlaStep, make_config, make_layer
from tests.engines.tiny_mla_models import write_deepseek

# Edges: first token of a page, last of a page, one past it; ragged drafts; decode rows before prefill rows.
BATCHES: dict[str, dict[str, Any]] = {
    "decode": {"query_lens": (1, 1, 1, 1), "kv_lens": (1, 16, 17, 128)},
    "drafts": {"query_lens": (4, 1, 3), "kv_lens": (20, 16, 33)},
    "mixed": {"query_lens": (1, 4, 9, 40), "kv_lens": (40, 16, 9, 40), "num_prefills": 2},
    # Messages, which are cut into rows of 8: one of as many, one more, the longest, and one that is not; a draft's rows among them.
    "messages": {"query_lens": (1, 4, 8, 9, 256), "kv_lens": (40, 16, 8, 161, 700)},
    "messages before prompts": {"query_lens": (1, 3, 8, 64, 257), "kv_lens": (40, 16, 130, 161, 700), "num_prefills": 1},
}
PADDING: dict[str, dict[str, int]] = {"exact": {}, "padded": {"padding_rows": 3, "padding_tokens": 5}}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek(tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="module")
def configs(model: Path) -> dict[str, Any]:
    """By cache dtype; rows of up to 4 queries are decode rows."""
    return {name: make_config(model, kv_cache_dtype=name, speculative_config=DRAFTS) for name in ("auto", "fp8", "fp8_e4m3")}


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_e4m3"])
@pytest.mark.parametrize("is_one_q", [False, True])
# vLLM pads batches of decode rows alone.
@pytest.mark.parametrize(
    ("batch", "padding"),
    [*itertools.product(("decode", "drafts", "messages"), PADDING), ("mixed", "exact"), ("messages before prompts", "exact")],
)
def test_step_equals_oracle(batch: str, padding: str, is_one_q: bool, kv_cache_dtype: str, configs: dict[str, Any]) -> None:
    built = MlaStep(**BATCHES[batch], **PADDING[padding], is_one_q=is_one_q).build(configs[kv_cache_dtype])
    assert (built.cache == NAN_BYTE).any() if built.cache.dtype == torch.uint8 else built.cache.isnan().any()
    out, lse = built.run()
    assert lse is None
    built.check(out)


@pytest.mark.parametrize("num_heads", [8, 16, 128])
def test_heads_and_a_gap_behind_pages(num_heads: int, configs: dict[str, Any]) -> None:
    built = MlaStep((1, 3), (50, 23), num_heads=num_heads, page_gap=64).build(configs["auto"])
    built.check(built.run()[0])


@pytest.mark.parametrize("what", ["softmax", "latents"])
def test_a_wrong_scale_fails_the_check(what: str, configs: dict[str, Any]) -> None:
    """The control of `check`: 5 % on a scale is over its budget."""
    built = MlaStep((1, 4), (300, 64)).build(configs["fp8"])
    out, _ = built.run()
    built.check(out)
    if what == "softmax":
        built.layer.impl.scale *= 1.05
        out, _ = built.run()
    else:
        built.layer._k_scale = built.layer._k_scale * 1.05  # of the judgement alone
    with pytest.raises(AssertionError, match="expected an error of at most"):
        built.check(out)


def test_lse_under_decode_context_parallelism(configs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Row-major over tokens, a natural logarithm; a rank without a key of a row says -inf and 0."""
    build = FA4MLABackend.get_impl_cls().__new__

    def with_lse(cls: Any, *args: Any, **kwargs: Any) -> Any:
        impl = build(cls)
        impl.need_to_return_lse_for_decode = True
        return impl

    monkeypatch.setattr(FA4MLABackend.get_impl_cls(), "__new__", with_lse)
    built = MlaStep((1, 1, 1), (5, 16, 130)).build(configs["auto"])
    assert built.layer.impl.lse_base_on_e and built.layer.impl.can_return_lse_for_decode and FA4MLABackend.supports_dcp()
    out, lse = built.run()
    assert lse is not None and lse.shape == (3, 8)
    built.check(out, lse)
    built.description.seq_lens[1] = 0
    out, lse = built.run()
    assert lse is not None and lse[1].isneginf().all() and (out[1] == 0).all() and lse[[0, 2]].isfinite().all()


def test_heads_of_all_ranks_meet_the_latents(configs: dict[str, Any]) -> None:
    impl = make_layer(configs["auto"], 8).impl
    impl.dcp_world_size = 4
    assert impl.problem(PAGE_MULTIPLE).num_q_heads == 32


def test_metadata_holds_vllms_persistent_tensors(configs: dict[str, Any]) -> None:
    """What a captured graph reads keeps its address: views of the beginnings of what the runner refills."""
    built = MlaStep((1, 4), (20, 33), padding_rows=2).build(configs["auto"])
    decode = built.builder.build(0, built.description).decode
    for view, whole in (
        (decode.cu_seqlens_q, built.description.query_start_loc),
        (decode.seq_lens, built.description.seq_lens),
        (decode.block_table, built.description.block_table_tensor),
    ):
        assert view.data_ptr() == whole.data_ptr() and view.shape[0] == whole.shape[0]
    assert decode.steps is built.builder.steps


def test_decode_rows_of_a_mixed_step_are_the_first(configs: dict[str, Any]) -> None:
    built = MlaStep(**BATCHES["mixed"]).build(configs["auto"])
    metadata = built.builder.build(0, built.description)
    assert (metadata.num_decodes, metadata.num_decode_tokens, metadata.num_prefills) == (2, 5, 2)
    assert metadata.decode.cu_seqlens_q.tolist() == [0, 1, 5] and metadata.decode.seq_lens.tolist() == [40, 16]
    (step,) = metadata.decode.steps.values()
    assert step.bounds is not None and step.bounds[:4] == (2, 4, 40, 1)


def test_a_step_of_prefill_rows_alone_refreshes_nothing(configs: dict[str, Any]) -> None:
    built = MlaStep((9,), (9,), num_prefills=1).build(configs["auto"])
    metadata = built.builder.build(0, built.description)
    (step,) = built.builder.steps.values()
    assert metadata.decode is None and step.bounds is None


@pytest.mark.parametrize(("num_drafts", "decode_query_len"), [(0, 1), (3, 4), (7, 8)])
def test_drafts_are_decode_rows(num_drafts: int, decode_query_len: int, model: Path) -> None:
    config = make_config(model, speculative_config={**DRAFTS, "num_speculative_tokens": num_drafts} if num_drafts else None)
    built = MlaStep((decode_query_len, 1), (40, 17)).build(config)
    assert built.builder.decode_query_len == decode_query_len
    (step,) = built.builder.steps.values()
    assert step.plan.limits.decode_query_len == decode_query_len and step.plan.limits.max_num_tokens >= 16 * decode_query_len
    built.check(built.run()[0])


def test_rows_that_share_keys_among_ranks_have_one_query(configs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bottom-right alignment to a rank's own keys holds for one query."""
    monkeypatch.setattr(configs["auto"].parallel_config, "decode_context_parallel_size", 2)
    layer = SimpleNamespace(vllm_config=configs["auto"])
    FA4MLAMetadataBuilder._init_reorder_batch_threshold(layer, 1, True, False)  # type: ignore[arg-type]
    assert layer.reorder_batch_threshold == 1
    assert FA4MLAMetadataBuilder.query_len_support is QueryLenSupport.VARLEN


# The longest message and one query more; a context that is as long as it has to be and one key shorter: 200 (2 k + 200) < 512 k; none.
DIVIDED: dict[str, tuple[dict[str, Any], int]] = {
    "a message": ({"query_lens": (1, 64), "kv_lens": (40, 700)}, 2),
    "the longest": ({"query_lens": (1, 9, 256), "kv_lens": (40, 1009, 1024)}, 3),
    "longer": ({"query_lens": (1, 9, 257), "kv_lens": (40, 1009, 1024)}, 2),
    "longer alone": ({"query_lens": (1, 257), "kv_lens": (40, 1024)}, 1),
    "a context just long enough": ({"query_lens": (1, 200), "kv_lens": (1, 200 + 358)}, 2),
    "a shorter context": ({"query_lens": (1, 200), "kv_lens": (1, 200 + 357)}, 1),
    "a prompt": ({"query_lens": (1, 5), "kv_lens": (40, 5)}, 1),
    "a prompt beside a message": ({"query_lens": (1, 5, 64), "kv_lens": (40, 5, 700)}, 3),
}


@pytest.mark.parametrize("what", DIVIDED)
def test_messages_are_decode_rows_where_that_is_cheaper(what: str, configs: dict[str, Any]) -> None:
    facts, num_decodes = DIVIDED[what]
    built = MlaStep(**facts, num_prefills=len(facts["query_lens"]) - num_decodes).build(configs["auto"])
    metadata = built.builder.build(0, built.description)
    assert (metadata.num_decodes, metadata.num_decode_tokens) == (num_decodes, sum(facts["query_lens"][:num_decodes]))
    assert built.builder.reorder_batch_threshold == 256, "by which the runner orders its next batch"
    served = built.builder.messages.steps if max(facts["query_lens"][:num_decodes]) > 4 else built.builder.steps
    assert metadata.decode.steps is served
    for steps in (built.builder.steps, built.builder.messages.steps):
        assert all((step.bounds is not None) == (steps is served) for step in steps.values()), "of one kind of step alone"
    built.check(built.run()[0])


def test_a_message_without_room_is_prefill(configs: dict[str, Any]) -> None:
    built = MlaStep((1, 64), (40, 700)).build(configs["auto"])
    rows = built.builder.messages.rows
    for max_rows, num_decodes in ((9, 2), (8, 1)):
        built.builder.messages = replace(built.builder.messages, rows=replace(rows, max_rows=max_rows))
        assert built.builder.build(0, built.description).num_decodes == num_decodes


def test_a_message_is_cut_into_rows_of_the_plan(configs: dict[str, Any]) -> None:
    """Each row ends with the keys that its last query sees. The device's lengths count: the host may take a verification for longer."""
    built = MlaStep((4, 17), (30, 700)).build(configs["auto"])
    rows = built.builder.messages.rows
    assert rows.queries == 8
    for _ in range(2):
        decode = built.builder.build(0, built.description).decode
        assert decode.cu_seqlens_q.tolist() == [0, 4, 12, 20, 21] and decode.seq_lens.tolist() == [30, 691, 699, 700]
        table = built.description.block_table_tensor
        assert torch.equal(decode.block_table, table[[0, 1, 1, 1]])
        assert decode.cu_seqlens_q.data_ptr() == rows.cu_seqlens_q.data_ptr() and decode.seq_lens.data_ptr() == rows.seqused_k.data_ptr()
        (step,) = decode.steps.values()
        assert step.bounds is not None and step.bounds[:3] == (4, 8, 700)
    built.description.query_start_loc.copy_(torch.tensor([0, 2, 19]))
    built.description.seq_lens[0] = 28
    decode = built.builder.build(0, built.description).decode
    assert decode.cu_seqlens_q.tolist() == [0, 2, 10, 18, 19] and decode.seq_lens.tolist() == [28, 691, 699, 700]
    built.check(built.run()[0])


STAYS_PREFILL: dict[str, dict[str, Any]] = {
    "as it is": {},
    "halves of a batch": {"enable_dbo": True},
    "decode-context parallelism": {"decode_context_parallel_size": 2},
    "prefill-context parallelism": {"prefill_context_parallel_size": 2},
    "batch-invariant": {},
    "no room": {},
}


@pytest.mark.parametrize("what", STAYS_PREFILL)
def test_where_messages_stay_prefill(what: str, configs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = make_layer(configs["auto"], 8).impl.kind
    for name, value in STAYS_PREFILL[what].items():
        monkeypatch.setattr(configs["auto"].parallel_config, name, value)
    if what == "no room":  # for more rows of 1024 tokens than there are sequences
        monkeypatch.setattr(split_rows, "TABLE_ENTRIES", 16 * 1024 // kind.page_size)
    problem = replace(kind, batch_invariant=what == "batch-invariant")
    made = MessageSteps.allocate({kind: problem}, BatchLimits(16, 64, 1024, 4), configs["auto"], torch.device("cpu"))
    assert (made is None) == (what != "as it is")


def test_a_message_in_batch_invariant_mode(configs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    built = MlaStep((4, 64), (40, 700), num_prefills=1).build(configs["auto"])
    assert built.builder.messages is None and built.builder.reorder_batch_threshold == 4
    assert built.builder.build(0, built.description).num_decodes == 1
    built.check(built.run()[0])


@pytest.mark.parametrize(("arch", "support"), [("sm_90a", "UNIFORM_BATCH"), ("sm_100a", "UNIFORM_BATCH"), ("cpu", "NEVER")])
def test_graphs_of_decode_rows(arch: str, support: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fa4_integration.vllm_backend.mla_metadata_builder.serving_arch", lambda: arch)
    assert FA4MLAMetadataBuilder.get_cudagraph_support(None, None) is AttentionCGSupport[support]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_cache_write_touches_only_the_slots(kv_cache_dtype: str, configs: dict[str, Any]) -> None:
    built = MlaStep((3, 1), (20, 16), padding_rows=2, padding_tokens=4).build(configs[kv_cache_dtype])
    before, slots = built.cache.clone(), built.description.slot_mapping
    built.run()
    written = torch.zeros(before.shape[:2], dtype=torch.bool)
    written[slots[:4] // 16, slots[:4] % 16] = True
    bits = torch.uint8 if kv_cache_dtype == "fp8" else torch.int16
    assert torch.equal(built.cache.view(bits)[~written], before.view(bits)[~written]), "a row outside the slots changed"
    new = built.cache[slots[:4] // 16, slots[:4] % 16]
    want = built.new[:4, 0]
    if kv_cache_dtype == "fp8":
        want = (want.float() / built.layer._k_scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(new, want)


def test_another_cache_is_refused(configs: dict[str, Any]) -> None:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedProblem, match="KV cache: expected MLAAttentionSpec, got FullAttentionSpec"):
        FA4MLAMetadataBuilder(spec, [LAYER], configs["auto"], torch.device("cpu"))


def test_a_window_is_refused(configs: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedProblem, match="sliding_window: expected none in a layer of latent attention, got 64"):
        make_layer(configs["auto"], 8, sliding_window=64)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sparse": ({"use_sparse": True}, r"belongs to vLLM's \*_MLA_SPARSE backends: start without --attention-backend"),
    "K and V of heads": ({"use_mla": False}, "non-MLA not supported"),
    "e5m2": ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype: expected one of auto, float16, bfloat16, fp8, fp8_e4m3, got fp8_e5m2"),
    "packed": ({"kv_cache_dtype": "fp8_ds_mla"}, "kv_cache_dtype: expected one of .*, got fp8_ds_mla"),
    "page 24": ({"block_size": 24}, "page_size: expected a multiple of 16, got 24"),
    "another 16-bit dtype": ({"kv_cache_dtype": "float16"}, "kv_dtype on cpu: expected bfloat16 or float8_e4m3fn with q in bfloat16"),
    "both directions": ({"use_non_causal": True}, "non-causal attention not supported"),
    "prefill-context parallelism": ({"use_pcp": True}, "PCP not supported"),
    "a window": ({"has_sliding_window": True}, "sliding window not supported"),
    "sinks": ({"has_sink": True}, "attention sinks not supported"),
}
SELECTED = {"head_size": 576, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 64, "use_mla": True, "has_sink": False}
SELECTED |= {"use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False, "attn_type": "decoder"}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str) -> None:
    facts, words = REFUSED[what]
    reasons = FA4MLABackend.validate_configuration(device_capability=None, **{**SELECTED, **facts})  # type: ignore[arg-type]
    assert any(re.search(words, reason) for reason in reasons), reasons


@pytest.mark.parametrize(
    "facts", [{}, {"kv_cache_dtype": "fp8"}, {"use_dcp": True}, {"use_batch_invariant": True}, {"use_kv_connector": True}]
)
def test_what_is_served(facts: dict[str, Any]) -> None:
    assert FA4MLABackend.validate_configuration(device_capability=None, **{**SELECTED, **facts}) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(("default", "preferred"), [(16, 64), (32, 64), (64, 64), (128, 128), (48, 64)])
def test_pages_hold_the_keys_of_a_tile_where_the_user_names_none(default: int, preferred: int) -> None:
    assert FA4MLABackend.get_preferred_block_size(default) == preferred and FA4MLABackend.supports_block_size(preferred)


def test_vllm_asks_for_the_preferred_pages() -> None:
    """As its platform asks where there is one backend."""
    from vllm.config import VllmConfig
    from vllm.platforms.interface import Platform

    assert Platform._preferred_block_size_for_backends([FA4MLABackend], 16, VllmConfig()) == 64


def test_fp8_latents_stay_unquantised_queries(configs: dict[str, Any]) -> None:
    impl = make_layer(configs["fp8"], 8).impl
    assert impl.problem(16).kv_dtype == FP8 and not impl.supports_quant_query_input


OWNED = {
    "DeepSeek-V4": (
        {"model_type": "deepseek_v4", "index_topk": 512},
        r"the model's own code in vLLM, which chooses among",
    ),
    "DeepSeek-V3.2": ({"model_type": "deepseek_v32", "index_topk": 2048}, r"vLLM's \*_MLA_SPARSE backends"),
    "GLM-5": ({"model_type": "glm_moe_dsa", "index_topk": 2048}, r"vLLM's \*_MLA_SPARSE backends"),
    "MiniMax-M3": (
        {"model_type": "minimax_m3", "sparse_attention_config": {"block": 128}},
        "the model's own code in vLLM, with MINIMAX_M3",
    ),
    "MiMo-V2-Flash": (
        {"model_type": "mimo_v2_flash", "head_dim": 192, "v_head_dim": 128},
        r"values narrower than keys belongs to .* \*_DIFFKV backends",
    ),
    "openPangu": ({"model_type": "PanguEmbedded", "head_dim": 128, "param_sink_number": 128}, r"\*_DIFFKV backends"),
}


@pytest.mark.parametrize("name", OWNED)
def test_whose_a_models_attention_is(name: str) -> None:
    facts, words = OWNED[name]
    owner = owner_of(SimpleNamespace(**facts))
    assert owner is not None and re.search(words, owner) and owner.endswith("start without --attention-backend")


def test_a_dense_models_attention_is_nobodys() -> None:
    assert owner_of(SimpleNamespace(model_type="deepseek_v3", kv_lora_rank=512, head_dim=64, v_head_dim=128)) is None
    assert owner_of(SimpleNamespace(model_type="mimo_v2", head_dim=128, v_head_dim=128)) is None


def test_an_owned_model_is_refused_before_its_weights_are_loaded(tmp_path: Path) -> None:
    model = write_deepseek(tmp_path, index_topk=2048, index_n_heads=4, index_head_dim=128)
    with pytest.raises(ValueError, match=r"deepseek_v3, whose sparse MLA, over tokens that an indexer chooses, belongs to vLLM's"):
        make_config(model)
    make_config(model, attention_backend="CPU_MLA")
