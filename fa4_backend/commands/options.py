"""Options that `fa4 plan` and `fa4 compile` share, and what they make of an engine's limits."""

from __future__ import annotations

from typing import Annotated

import typer

from fa4_backend import envs
from fa4_backend.commands.dtypes import KV_DTYPE_HELP, Q_DTYPE_HELP
from fa4_backend.problem import MAX_CONVERT_KEYS, BatchLimits

PageSize = Annotated[int | None, typer.Option(min=1, help="tokens a page; default: vLLM's, 16 and for latents 64; SGLang's is 64")]
KvDtype = Annotated[str | None, typer.Option(help=f"{KV_DTYPE_HELP}; default: auto, fp8 if the model declares it")]
QDtype = Annotated[str, typer.Option(help=Q_DTYPE_HELP)]
MaxNumSeqs = Annotated[int, typer.Option(help="sequences of a step; vLLM's default is 1024 on an H100 and larger")]
SpeculativeTokens = Annotated[int, typer.Option(min=0, help="draft tokens a decode row may carry")]
BatchInvariant = Annotated[bool, typer.Option(help="a token's bits do not depend on the batch")]
Exact = Annotated[bool, typer.Option(help="nor on how its prompt was cut; implies --batch-invariant")]
Tp = Annotated[int, typer.Option(min=1, help="GPUs that share the model's heads (tensor parallelism); the kernels are one GPU's")]
TextOnly = Annotated[bool, typer.Option(help="a multimodal model is given no images")]
JsonOutput = Annotated[bool, typer.Option("--json", help="print JSON")]


def batch_limits(max_num_seqs: int, speculative_tokens: int, max_num_tokens: int = 8192, max_seqlen_k: int = 32768) -> BatchLimits:
    """The limits that an engine with these numbers plans for, but for the room of keys to convert (`plan.bounded`).

    Raises:
        ValueError: one of them, or FA4_BACKEND_CONVERT_MIB, is out of range.
    """
    envs.convert_bytes()
    return BatchLimits(max_num_seqs, max_num_tokens, max_seqlen_k, 1 + speculative_tokens, MAX_CONVERT_KEYS)
