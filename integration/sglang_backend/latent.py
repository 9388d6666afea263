"""The backend of models with multi-head latent attention: decode steps and verifications in absorbed form.

SGLang gives prompts to the backend of `--prefill-attention-backend`, and everything else to this one.
"""

from __future__ import annotations

from typing import Any

import torch

from fa4_backend import mla_decode
from fa4_backend.problem import UnsupportedProblem
from fa4_integration.sglang_backend.backend import FA4Backend, refuse_arguments
from fa4_integration.sglang_backend.names import NAME


class FA4LatentBackend(FA4Backend):
    """One operator call a layer over SGLang's pool of latents (`MLATokenToKVPool`); steps and graphs are the base class's.

    Raises:
        UnsupportedProblem: at construction, where no kernel on this device serves latents, or verifications are too long.
    """

    is_latent = True

    def __init__(self, runner: Any, draft_step: int = 0) -> None:
        super().__init__(runner, draft_step)
        ask_for_parts(runner.model_config)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        batch: Any,
        save_kv_cache: bool,
        sinks: torch.Tensor | None,
        others: dict[str, Any],
    ) -> torch.Tensor:
        """Store a step's latents, then attention over all of them.

        Args:
            q: (tokens, num_q_heads * head_dim); with `q_rope` (tokens, num_q_heads, rope) among `others` only the first head_dim_v of it.
            k: (tokens, 1, head_dim); with `k_rope` (tokens, 1, rope) among `others` only the latents. None where they are stored.
            v: the latents again, not read.
            sinks: none.
            others: as above; nothing else.

        Returns:
            (tokens, num_q_heads * head_dim_v).

        Raises:
            UnsupportedProblem: the model wants something that the operator does not have.
        """
        q_rope, k_rope = others.pop("q_rope", None), others.pop("k_rope", None)
        refuse_arguments(layer, batch, {"sinks": sinks, **others})
        if save_kv_cache and k is not None:
            write_latents(self.pool, layer, batch, k, k_rope)
        tensors, step = self.step, self.steps.of_layer(layer, None)
        assert tensors is not None, "SGLang calls no layer for a step without sequences"
        heads, latent_dim, rope_dim = layer.tp_q_head_num, layer.v_head_dim, layer.qk_head_dim - layer.v_head_dim
        if q_rope is None:
            q_latent, q_rope = q.view(-1, heads, layer.qk_head_dim).split([latent_dim, rope_dim], dim=-1)
        else:
            q_latent, q_rope = q.view(-1, heads, latent_dim), q_rope.view(-1, heads, rope_dim)
        given = getattr(batch, "_attn_output", None)
        out = q.new_empty(q.shape[0], heads * latent_dim) if given is None else given
        mla_decode(
            q_latent,
            q_rope,
            latent_pages(self.pool, layer, self.slots.page_size),
            tensors.page_table,
            tensors.cu_seqlens_q,
            tensors.seqused_k,
            plan=step.plan,
            metadata=step,
            softmax_scale=layer.scaling,
            out=out.view(-1, heads, latent_dim),
        )
        return out

    def _take_over(self, batch: Any, tensors: Any, *, in_graph: bool = False) -> None:
        mode = batch.forward_mode
        if mode.is_extend_without_speculative():
            raise UnsupportedProblem(
                f"step of latent attention: expected decode or verification, got {mode.name}; see --prefill-attention-backend"
            )
        super()._take_over(batch, tensors, in_graph=in_graph)


def ask_for_parts(model_config: Any) -> None:
    """Have SGLang's models hand over q and k in two parts each, which the operator and the pool take; else they copy them side by side.

    SGLang scales a model's queries by position (`llama_4_scaling`, Mistral Large 3) only where it copies, so such a model stays with that.
    """
    if getattr(getattr(model_config, "hf_config", None), "llama_4_scaling", None) is not None:
        return
    from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS

    if NAME not in FORWARD_ABSORB_CORE_ATTENTION_BACKENDS:
        FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.append(NAME)


def latent_pages(pool: Any, layer: Any, page_size: int) -> torch.Tensor:
    """A layer's latents, (num_pages, page_size, head_dim), of SGLang's (slots, 1, head_dim). Asked of the pool at each call: with a
    hierarchical cache that is where SGLang waits for a layer's pages to arrive."""
    latents: torch.Tensor = pool.get_key_buffer(layer.layer_id)
    slots = latents.shape[0] // page_size * page_size
    return latents[:slots].view(-1, page_size, latents.shape[-1])


def write_latents(pool: Any, layer: Any, batch: Any, latents: torch.Tensor, k_rope: torch.Tensor | None) -> None:
    """Store a step's latents, and their rotary part where it comes apart from them, as SGLang's pool wants it."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    places = KVWriteLoc.for_layer(batch, layer, swa_loc=None)
    if k_rope is None:
        pool.set_kv_buffer(layer, places, latents, latents)
    else:
        pool.set_mla_kv_buffer(layer, places, latents, k_rope)
