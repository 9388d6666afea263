"""One step as vLLM's runner would hand it to the backend, without an engine: batch description, KV cache in a layout, one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, get_kv_quant_mode
from vllm.v1.kv_cache_layout import KVCacheLayout

from fa4_backend.arguments import AttentionArguments
from fa4_backend.error_budget import judge
from fa4_integration.vllm_backend.backend import FA4Backend

LAYER = "model.layers.0.self_attn.attn"
NAN_BYTE = 0x7F  # of e4m3


class OneLayer(torch.nn.Module, AttentionLayerBase):
    """Stands for vLLM's Attention module: what builder and implementation read of it."""

    def __init__(self, impl: Any) -> None:
        super().__init__()
        self.impl, self.layer_name = impl, LAYER
        for name in ("_q_scale", "_k_scale", "_v_scale"):
            self.register_buffer(name, torch.ones(()))

    def get_attn_backend(self) -> Any:
        return FA4Backend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        raise NotImplementedError

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.impl.process_weights_after_loading(act_dtype)


@dataclass(frozen=True)
class VllmStep:
    """A batch and the layer it meets. `build` draws the tensors."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_q_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    kv_cache_dtype: str = "auto"
    scale_shape: tuple[int, ...] = ()  # of FP8 K and V, and Q: () or (1,) for all heads, (num_kv_heads,) for one each
    is_q_fp8: bool = False  # vLLM quantises queries: FA4_BACKEND_FP8_QUERY is set
    page_size: int = 16
    layout: KVCacheLayout = KVCacheLayout.LBNHC
    padding_rows: int = 0  # empty sequences at the end, as in a captured graph
    padding_tokens: int = 0  # NaN rows past the last query
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    alibi: bool = False
    fuses_quantisation: bool = False  # vLLM replaced the quantisation of the layer's outputs by a scale for the layer
    num_speculative_tokens: int = 0
    max_model_len: int = 1024
    cudagraph_mode: CUDAGraphMode = CUDAGraphMode.NONE

    def config(self) -> Any:
        """The parts of a VllmConfig that the builder reads."""
        speculative = SimpleNamespace(num_speculative_tokens=self.num_speculative_tokens, parallel_drafting=False)
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=512),
            compilation_config=SimpleNamespace(
                max_cudagraph_capture_size=None,
                cudagraph_mode=self.cudagraph_mode,
                static_forward_context={},
                pass_config=SimpleNamespace(fuse_attn_quant=self.fuses_quantisation),
            ),
            model_config=SimpleNamespace(max_model_len=self.max_model_len),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=speculative if self.num_speculative_tokens else None,
            use_v2_model_runner=True,
        )

    def impl(self, slopes: list[float] | None, sinks: torch.nn.Parameter | None) -> Any:
        arguments = (
            self.num_q_heads,
            self.head_dim,
            self.head_dim**-0.5,
            self.num_kv_heads,
            slopes,
            self.sliding_window,
            self.kv_cache_dtype,
            self.softcap,
        )
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # as vLLM does while it makes a model's layers
        try:
            return FA4Backend.get_impl_cls()(*arguments, "decoder", None, **({} if sinks is None else {"sinks": sinks}))
        finally:
            torch.set_default_dtype(default)

    def build(self, seed: int = 0) -> BuiltStep:
        generator = torch.Generator().manual_seed(seed)
        slopes = torch.rand(self.num_q_heads, generator=generator).tolist() if self.alibi else None
        sinks = torch.randn(self.num_q_heads, generator=generator).to(self.dtype) if self.sinks else None
        parameter = None if sinks is None else torch.nn.Parameter(sinks, requires_grad=False)
        layer = OneLayer(self.impl(slopes, parameter))
        if self.is_fp8:
            layer._k_scale, layer._v_scale = self._draw_scales(seed)
        if self.is_q_fp8:
            layer._q_scale = layer._k_scale * 2.0
        config = self.config()
        config.compilation_config.static_forward_context[LAYER] = layer
        shape = {"block_size": self.page_size, "num_kv_heads": self.num_kv_heads, "head_size": self.head_dim, "dtype": self._stored_dtype()}
        shape["kv_quant_mode"] = get_kv_quant_mode(self.kv_cache_dtype)
        spec = SlidingWindowSpec(**shape, sliding_window=self.sliding_window) if self.sliding_window else FullAttentionSpec(**shape)
        builder = FA4Backend.get_builder_cls()(spec, [LAYER], config, torch.device("cpu"))
        return BuiltStep(self, layer, builder, slopes, parameter, *self._tensors(generator, layer))

    @property
    def is_fp8(self) -> bool:
        return self.kv_cache_dtype.startswith("fp8")

    def _stored_dtype(self) -> torch.dtype:
        """The dtype of the cache that vLLM makes."""
        return self.dtype if self.kv_cache_dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[self.kv_cache_dtype]

    def _draw_scales(self, seed: int) -> torch.Tensor:
        """k_scale and v_scale, 2^-7 to 2^4; the first of K's is 2^-8, so that values above 1.75 are saturated."""
        exponents = torch.rand(2, *self.scale_shape, generator=torch.Generator().manual_seed(seed + 1)) * 11 - 7
        exponents[0].view(-1)[0] = -8.0
        return exponents.exp2()

    def _tensors(
        self, generator: torch.Generator, layer: OneLayer
    ) -> tuple[CommonAttentionMetadata, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        pages_of = [-(-n // self.page_size) for n in self.kv_lens]
        num_pages = 1 + sum(pages_of) + 3  # page 0 is vLLM's null block
        cache = self._empty_cache(num_pages)
        batch, total_q = len(self.query_lens) + self.padding_rows, sum(self.query_lens)
        width = min(max(pages_of) + 2, -(-self.max_model_len // self.page_size))
        page_table = torch.zeros(batch, width, dtype=torch.int32)
        slots = torch.full((total_q + self.padding_tokens,), -1, dtype=torch.int64)
        free = (1 + torch.randperm(num_pages - 1, generator=generator)).tolist()
        token = 0
        for seq_idx, (query_len, kv_len) in enumerate(zip(self.query_lens, self.kv_lens, strict=True)):
            pages = [free.pop() for _ in range(pages_of[seq_idx])]
            page_table[seq_idx, : len(pages)] = torch.tensor(pages)
            slot = torch.tensor([pages[n // self.page_size] * self.page_size + n % self.page_size for n in range(kv_len)])
            context = slot[: kv_len - query_len]
            drawn = self._draw((len(context), self.num_kv_heads, 2 * self.head_dim), generator)
            if self.is_fp8:
                halves = zip(drawn.float().chunk(2, dim=-1), (layer._k_scale, layer._v_scale), strict=True)
                stored = torch.cat([half / scale.view(-1, 1) for half, scale in halves], dim=-1)
                drawn = stored.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
            cache[context // self.page_size, :, context % self.page_size] = drawn
            slots[token : token + query_len] = slot[kv_len - query_len :]
            token += query_len
        # One projection makes q, k and v: each is a view with the whole row's stride.
        rows = self.num_q_heads + 2 * self.num_kv_heads
        qkv = torch.full((total_q + self.padding_tokens, rows, self.head_dim), math.nan, dtype=self.dtype)
        qkv[:total_q] = self._draw((total_q, rows, self.head_dim), generator)
        q, k, v = qkv.split([self.num_q_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.is_q_fp8:
            scale = layer._q_scale.expand(self.num_kv_heads).repeat_interleave(self.num_q_heads // self.num_kv_heads)
            q = (q.float() / scale[:, None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        starts = torch.tensor([0, *self.query_lens, *[0] * self.padding_rows]).cumsum(0).int()
        lens = torch.tensor([*self.kv_lens, *[0] * self.padding_rows], dtype=torch.int32)
        description = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            seq_lens=lens,
            num_reqs=batch,
            num_actual_tokens=total_q + self.padding_tokens,
            max_query_len=max(self.query_lens),
            max_seq_len=max(self.kv_lens),
            block_table_tensor=page_table,
            slot_mapping=slots,
            seq_lens_cpu_upper_bound=lens.clone(),
        )
        return description, cache, q, k, v

    def _empty_cache(self, num_pages: int) -> torch.Tensor:
        """(num_pages, num_kv_heads, page_size, 2 * head_dim) of NaN, physically in the layout's order; in FP8 of bytes."""
        logical = (num_pages, self.num_kv_heads, self.page_size, 2 * self.head_dim)
        order = self.layout.layer_view_order
        physical = torch.full([logical[axis] for axis in order], NAN_BYTE if self.is_fp8 else math.nan, dtype=self._stored_dtype())
        return physical.permute([order.index(axis) for axis in range(4)])

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(self.dtype)


@dataclass
class BuiltStep:
    """A step's tensors, its run through the backend and its judgement."""

    step: VllmStep
    layer: OneLayer
    builder: Any
    slopes: list[float] | None  # as given to the layer
    sinks: torch.nn.Parameter | None  # the engine's own, whose value now is what a step has to use
    description: CommonAttentionMetadata
    cache: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def run(self, output_scale: torch.Tensor | None = None) -> torch.Tensor:
        """Builder, cache write and forward, in vLLM's order; with a scale outputs are e4m3."""
        impl = self.layer.impl
        metadata = self.builder.build(0, self.description)
        impl.do_kv_cache_update(self.layer, self.key, self.value, self.cache, metadata.slot_mapping)
        output = torch.full_like(self.query, math.nan, dtype=self.step.dtype if output_scale is None else torch.float8_e4m3fn)
        result = impl.forward(self.layer, self.query, self.key, self.value, self.cache, metadata, output, output_scale)
        assert result is output
        return output

    def check(self, output: torch.Tensor) -> None:
        """Judge against the oracle, by `fa4_backend.error_budget`."""
        step = self.step
        sinks = None if self.sinks is None else self.sinks.data
        slopes = None if self.slopes is None else torch.tensor(self.slopes)
        total_q, rows = sum(step.query_lens), slice(0, len(step.query_lens))
        pages = self.cache.transpose(1, 2)
        scales: list[torch.Tensor] = []
        if step.is_fp8:
            pages = pages.view(torch.float8_e4m3fn)
            scales = [scale.expand(step.num_kv_heads) for scale in (self.layer._k_scale, self.layer._v_scale)]
        q_scale = self.layer._q_scale.expand(step.num_kv_heads) if step.is_q_fp8 else None
        window = None if step.sliding_window is None else step.sliding_window - 1
        d, starts, lens = self.description, self.description.query_start_loc[: rows.stop + 1], self.description.seq_lens[rows]
        arguments = AttentionArguments(
            self.query, pages[..., : step.head_dim], pages[..., step.head_dim :], d.block_table_tensor[rows], starts, lens, output, None,
            step.head_dim**-0.5, window, None, step.softcap or 0.0, sinks, slopes, *scales, q_scale=q_scale,
        )  # fmt: skip
        want = judge(arguments, is_causal=True)
        got = output[:total_q].double()
        assert got.isfinite().all(), f"{int((~got.isfinite()).sum())} values are not finite"
        error = (got - want.out).abs().max().item()
        assert error <= want.out_budget, f"expected an error of at most {want.out_budget:.3g}, got {error:.3g}"
