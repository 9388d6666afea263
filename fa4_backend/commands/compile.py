"""`fa4 compile`: kernels into the cache on disk, for any arch, without a GPU."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fa4_backend import envs
from fa4_backend.cache.errors import CacheError
from fa4_backend.commands.dtypes import KV_DTYPE_HELP, Q_DTYPE_HELP, full_dtype
from fa4_backend.commands.shapes import check_chip, dims_of, heads_of
from fa4_backend.compile import CompileError
from fa4_backend.model_config import attention_problems, layer_groups
from fa4_backend.model_layers import ModelConfigError
from fa4_backend.plan import AttentionPlan, plan_attention
from fa4_backend.problem import PAGED, RAGGED, SAME_AS_Q, AttentionProblem, BatchLimits, MaskFeatures, UnsupportedProblem


def compile(
    arch: Annotated[str, typer.Option(help="sm_90a, sm_100a or sm_103a")],
    model: Annotated[Path | None, typer.Option(help="a model's config.json, or the folder that holds it; or give --heads")] = None,
    heads: Annotated[str, typer.Option(help="query heads / KV heads")] = "32/8",
    head_dim: Annotated[str, typer.Option(help="of keys, or keys/values such as 192/128")] = "128",
    page_size: Annotated[int, typer.Option(help="tokens a page")] = 16,
    kind: Annotated[str, typer.Option(help="of K and V, with --heads: paged, ragged, or latent (16/1, 576/512)")] = PAGED,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16; bf16 and fp16 for short")] = "bfloat16",
    kv_dtype: Annotated[str | None, typer.Option(help=f"{KV_DTYPE_HELP}; default: auto, fp8 if the model declares it")] = None,
    q_dtype: Annotated[str, typer.Option(help=Q_DTYPE_HELP)] = "auto",
    max_num_seqs: Annotated[int, typer.Option(help="sequences of a step")] = 256,
    causal: Annotated[bool, typer.Option(help="causal mask")] = True,
    lse: Annotated[bool, typer.Option(help="write the log of the denominator")] = False,
    batch_invariant: Annotated[bool, typer.Option(help="a token's bits do not depend on the batch")] = False,
    exact: Annotated[bool, typer.Option(help="nor on how its prompt was cut; implies --batch-invariant")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compile every kernel that a model or a shape needs. Exits 1 when it is not served or fails, 2 when the config cannot be read."""
    modes: dict[str, Any] = {"batch_invariant": batch_invariant or exact, "exact": exact, "q_dtype": full_dtype(q_dtype)}
    kv_dtype = None if kv_dtype is None else full_dtype(kv_dtype)
    try:
        check_chip(arch)
        limits = BatchLimits(max_num_seqs, 8192, 32768, convert_keys=envs.convert_keys())
        if model is not None:
            problems = attention_problems(layer_groups(model, arch=arch, page_size=page_size, kv_dtype=kv_dtype, **modes))
        else:
            shape = AttentionProblem(
                *heads_of(heads), *dims_of(head_dim), full_dtype(dtype), 1 if kind == RAGGED else page_size, arch,
                mask=MaskFeatures(is_causal=causal), kv_dtype=kv_dtype or SAME_AS_Q, kv_source=kind, has_lse=lse, **modes,
            )  # fmt: skip
            problems = [shape]
        plans = [plan_attention(problem, limits) for problem in problems]
    except (ModelConfigError, ValueError) as error:
        typer.echo(f"fa4 compile: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, UnsupportedProblem) else 2) from None
    try:
        kernels = compile_plans(plans)
    except (CacheError, CompileError) as error:
        typer.echo(f"fa4 compile: {type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None
    if json_output:
        print(json.dumps({"kernels": kernels}, indent=1))
        return
    for kernel in kernels:
        print(
            f"{kernel['name']}: {kernel['cpu_seconds']} CPU s, {kernel['registers']} registers, {kernel['spills']} bytes of spills, "
            f"{kernel['smem_bytes']} bytes of shared memory, {kernel['tmem_columns']} columns of tensor memory, "
            f"{kernel['ptx_instructions']} PTX instructions"
        )


def compile_plans(plans: list[AttentionPlan]) -> list[dict[str, Any]]:
    """Compile what the plans need and the cache lacks; facts of every kernel, one entry each."""
    from fa4_backend.compile_cache import ensure_object, read_facts
    from fa4_backend.kernel_facts import sass_counts

    kernels = []
    for key in dict.fromkeys(key for plan in plans if plan.kernels for key in plan.kernels.keys):
        facts = asdict(read_facts(key))
        counts: Counter[str] = sass_counts(ensure_object(key).with_suffix(".cubin"))
        kernels.append({**facts, "sass_counts": counts})
    return kernels
