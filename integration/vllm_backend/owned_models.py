"""Models whose attention is no backend's to serve: their own code in vLLM chooses tokens or blocks, or names the kernels.

`--attention-backend` does not reach these layers, or reaches only those between them, so a selection of FA4 would be ignored in silence.
They are known by the fields of a config that vLLM itself decides by, so that a family which vLLM learns later is known too.
"""

from __future__ import annotations

from typing import Any


def owner_of(config: Any) -> str | None:
    """Whose a model's attention is, as the end of a sentence; None where vLLM's backends serve it.

    Args:
        config: of the language model, of transformers or vLLM.
    """
    family = getattr(config, "model_type", "")
    if family.startswith("deepseek_v4"):  # before index_topk, which these have too
        what, owner = "compressed sparse attention", "the model's own code in vLLM, which chooses among *_DSV4 backends"
    elif getattr(config, "index_topk", None):
        what, owner = "sparse MLA, over tokens that an indexer chooses,", "vLLM's *_MLA_SPARSE backends"
    elif _has_narrow_values(config):
        what, owner = "attention with values narrower than keys", "the model's own code in vLLM, which chooses among *_DIFFKV backends"
    elif getattr(config, "sparse_attention_config", None):
        what, owner = "block-sparse attention", "the model's own code in vLLM, with MINIMAX_M3_SPARSE"
    else:
        return None
    return f"{family}, whose {what} belongs to {owner}: start without --attention-backend"


def _has_narrow_values(config: Any) -> bool:
    """MiMo-V2, whose keys and values differ in width, and openPangu's layers with learnt sinks: vLLM's code for them names the backend."""
    if getattr(config, "param_sink_number", 0):
        return True
    widths = [(getattr(config, f"{kind}head_dim", None), getattr(config, f"{kind}v_head_dim", None)) for kind in ("", "swa_")]
    return getattr(config, "model_type", "").startswith("mimo_v2") and any(v not in (None, k) for k, v in widths)
