"""One step of an MLA layer as vLLM's runner would hand it to the backend, without an engine: batch description, cache, one real layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import MLAAttention
from vllm.v1.attention.backend import CommonAttentionMetadata

from fa4_backend.arguments import LatentArguments
from fa4_backend.error_budget import judge_latent
from fa4_integration.vllm_backend.mla_backend import FA4MLABackend
from tests.engines.tiny_mla_models import KV_LORA_RANK, NOPE, ROPE, V_DIM

LAYER = "model.layers.0.self_attn.attn"
WIDTH = KV_LORA_RANK + ROPE
NAN_BYTE = 0x7F  # of e4m3


def make_config(model: Path, **arguments: Any) -> Any:
    """A VllmConfig as `vllm serve --attention-backend FA4` makes it; the CPU platform makes its pages 16 tokens long."""
    defaults = {"dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 16, "enforce_eager": True, "attention_backend": "FA4"}
    return EngineArgs(model=str(model), **{**defaults, **arguments}).create_engine_config()


def make_layer(config: Any, num_heads: int, **arguments: Any) -> MLAAttention:
    """A layer of vLLM, without weights: the projections around attention are not asked."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(config.model_config.dtype)  # as vLLM does while it makes a model's layers
    config.compilation_config.static_forward_context.clear()
    try:
        with set_current_vllm_config(config):
            return MLAAttention(
                num_heads=num_heads, scale=(NOPE + ROPE) ** -0.5, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=V_DIM,
                q_lora_rank=None, kv_lora_rank=KV_LORA_RANK, kv_b_proj=SimpleNamespace(), cache_config=config.cache_config, prefix=LAYER,
                **arguments,
            )  # fmt: skip
    finally:
        torch.set_default_dtype(default)


@dataclass(frozen=True)
class MlaStep:
    """A batch of decode rows, prefill rows behind them, and the layer they meet. `build` draws the tensors."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_prefills: int = 0  # the last rows of the batch
    num_heads: int = 8
    padding_rows: int = 0  # empty sequences at the end, as in a captured graph
    padding_tokens: int = 0  # NaN rows past the last query
    is_one_q: bool = False  # q and its rotary part as one tensor, as decode-context parallelism gathers them
    page_gap: int = 0  # elements between a page's last row and the next page

    def build(self, config: Any, seed: int = 0) -> BuiltMlaStep:
        """Everything of the cache that no row sees is NaN."""
        generator = torch.Generator().manual_seed(seed)
        layer = make_layer(config, self.num_heads)
        layer._k_scale = torch.tensor(2.0**-7)  # values of 3.5 and more are saturated
        with set_current_vllm_config(config):
            spec = layer.get_kv_cache_spec(config)
            builder = FA4MLABackend.get_builder_cls()(spec, [LAYER], config, torch.device("cpu"))
        page_size, is_fp8 = spec.block_size, spec.dtype == torch.uint8
        pages_of = [-(-n // page_size) for n in self.kv_lens]
        num_pages = 1 + sum(pages_of) + 2  # page 0 is vLLM's null block
        pool = torch.full((num_pages, page_size * WIDTH + self.page_gap), NAN_BYTE if is_fp8 else math.nan, dtype=spec.dtype)
        cache = pool[:, : page_size * WIDTH].unflatten(1, (page_size, WIDTH))
        batch, total_q = len(self.query_lens) + self.padding_rows, sum(self.query_lens)
        page_table = torch.zeros(batch, max(pages_of) + 2, dtype=torch.int32)
        slots = torch.full((total_q + self.padding_tokens,), -1, dtype=torch.int64)
        free = (1 + torch.randperm(num_pages - 1, generator=generator)).tolist()
        token = 0
        for seq_idx, (query_len, kv_len) in enumerate(zip(self.query_lens, self.kv_lens, strict=True)):
            pages = [free.pop() for _ in range(pages_of[seq_idx])]
            page_table[seq_idx, : len(pages)] = torch.tensor(pages)
            slot = torch.tensor([pages[n // page_size] * page_size + n % page_size for n in range(kv_len)])
            context = slot[: kv_len - query_len]
            drawn = torch.randn(len(context), WIDTH, generator=generator)
            if is_fp8:
                drawn = (drawn / layer._k_scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
            cache[context // page_size, context % page_size] = drawn.to(cache.dtype)
            slots[token : token + query_len] = slot[kv_len - query_len :]
            token += query_len
        rows = torch.full((total_q + self.padding_tokens, self.num_heads + 1, WIDTH), math.nan)
        rows[:total_q] = torch.randn(total_q, self.num_heads + 1, WIDTH, generator=generator)
        q, new = rows.to(config.model_config.dtype).split([self.num_heads, 1], dim=1)
        starts = torch.tensor([0, *self.query_lens, *[0] * self.padding_rows]).cumsum(0).int()
        lens = torch.tensor([*self.kv_lens, *[0] * self.padding_rows], dtype=torch.int32)
        description = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts.clone(), seq_lens=lens, num_reqs=batch,
            num_actual_tokens=total_q + self.padding_tokens, max_query_len=max(self.query_lens), max_seq_len=max(self.kv_lens),
            block_table_tensor=page_table, slot_mapping=slots, seq_lens_cpu_upper_bound=lens.clone(),
        )  # fmt: skip
        return BuiltMlaStep(self, layer, builder, description, cache, q, new)


@dataclass
class BuiltMlaStep:
    """A step's tensors, its run through the backend and its judgement."""

    step: MlaStep
    layer: MLAAttention
    builder: Any
    description: CommonAttentionMetadata
    cache: torch.Tensor
    query: torch.Tensor  # (num_tokens, num_heads, 576), absorbed
    new: torch.Tensor  # (num_tokens, 1, 576): latents of the step

    @property
    def num_decode_tokens(self) -> int:
        """Rows of q that decode gets; padded tokens of a captured graph included."""
        prefill = sum(self.step.query_lens[len(self.step.query_lens) - self.step.num_prefills :])
        return len(self.query) - prefill

    @property
    def stored(self) -> torch.Tensor:
        """The cache as `forward_impl` hands it to the implementation."""
        return self.cache.view(torch.float8_e4m3fn) if self.cache.dtype == torch.uint8 else self.cache

    def run(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Builder, cache write and decode, in vLLM's order; out (num_decode_tokens, num_heads, 512) and lse, transposed by the adapter."""
        impl, layer = self.layer.impl, self.layer
        metadata = self.builder.build(0, self.description)
        kv_c, k_pe = self.new[:, 0, :KV_LORA_RANK], self.new[..., KV_LORA_RANK:]
        impl.do_kv_cache_update(kv_c, k_pe, self.cache, self.description.slot_mapping, layer.kv_cache_dtype, layer._k_scale)
        q = self.query[: self.num_decode_tokens]
        return impl.forward_mqa(q if self.step.is_one_q else q.split([KV_LORA_RANK, ROPE], dim=-1), self.stored, metadata, layer)

    def check(self, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        """Judge decode rows against the float32 oracle, on what the cache holds after the run."""
        num_seqs = len(self.description.seq_lens) - self.step.num_prefills
        starts = self.description.query_start_loc[: num_seqs + 1]
        q, q_rope = self.query[: self.num_decode_tokens].split([KV_LORA_RANK, ROPE], dim=-1)
        scale = self.layer._k_scale.view(1) if self.stored.dtype == torch.float8_e4m3fn else None
        table, lens = self.description.block_table_tensor[:num_seqs], self.description.seq_lens[:num_seqs]
        want = judge_latent(LatentArguments(q, q_rope, self.stored, table, starts, lens, out, None, self.layer.scale, scale))
        tokens = int(starts[-1])
        error = (out[:tokens].float() - want.out).abs().max().item()
        assert error <= want.out_budget, f"expected an error of at most {want.out_budget}, got {error}"
        assert (out[tokens:] == 0).all(), "rows past the last query: expected 0"
        if lse is not None:
            lse_error = (lse[:tokens].T - want.lse).abs().max().item()
            assert lse_error <= want.lse_budget, f"lse: expected an error of at most {want.lse_budget}, got {lse_error}"
