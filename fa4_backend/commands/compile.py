"""`fa4 compile`: kernels into the cache on disk, for any arch, without a GPU."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fa4_backend.cache.errors import CacheError
from fa4_backend.commands import options
from fa4_backend.commands.dtypes import full_dtype
from fa4_backend.commands.latent_steps import latent_steps
from fa4_backend.commands.shapes import check_chip, dims_of, heads_of
from fa4_backend.compile import CompileError
from fa4_backend.model_config import LayerGroup, attention_problems, layer_groups
from fa4_backend.model_layers import ModelConfigError
from fa4_backend.plan import AttentionPlan, bounded, plan_attention
from fa4_backend.problem import FP8, LATENT, PAGED, RAGGED, SAME_AS_Q, AttentionProblem, BatchLimits, MaskFeatures, UnsupportedProblem
from fa4_backend.support import LATENT_PAGE, PAGE_MULTIPLE

PAGES = {RAGGED: 1, LATENT: LATENT_PAGE}  # tokens a page where the user names none, of kinds that have not vLLM's 16


def compile(
    arch: Annotated[str, typer.Option(help="sm_90a, sm_100a or sm_103a")],
    model: Annotated[Path | None, typer.Option(help="a model's config.json, or the folder that holds it; or give --heads")] = None,
    heads: Annotated[str, typer.Option(help="query heads / KV heads")] = "32/8",
    head_dim: Annotated[str, typer.Option(help="of keys, or keys/values such as 192/128")] = "128",
    page_size: options.PageSize = None,
    kind: Annotated[str, typer.Option(help="of K and V, with --heads: paged, ragged, or latent (16/1, 576/512)")] = PAGED,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16, with --heads; bf16 and fp16 for short")] = "bfloat16",
    kv_dtype: options.KvDtype = None,
    q_dtype: options.QDtype = "auto",
    max_num_seqs: options.MaxNumSeqs = 256,
    speculative_tokens: options.SpeculativeTokens = 0,
    causal: Annotated[bool, typer.Option(help="causal mask, with --heads")] = True,
    lse: Annotated[bool, typer.Option(help="write the log of the denominator, with --heads")] = False,
    batch_invariant: options.BatchInvariant = False,
    exact: options.Exact = False,
    tp: options.Tp = 1,
    text_only: options.TextOnly = False,
    fused_output: Annotated[
        bool, typer.Option("--fused-output", help="also kernels that write FP8, for vLLM's fusion behind attention (fuse_attn_quant)")
    ] = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Compile every kernel that a model or a shape needs. Exits 1 when it is not served or fails, 2 when the config cannot be read."""
    modes: dict[str, Any] = {"batch_invariant": batch_invariant or exact, "exact": exact, "q_dtype": full_dtype(q_dtype)}
    kv_dtype = None if kv_dtype is None else full_dtype(kv_dtype)
    try:
        check_chip(arch)
        limits = options.batch_limits(max_num_seqs, speculative_tokens)
        if model is not None:
            groups = layer_groups(model, arch=arch, page_size=page_size, kv_dtype=kv_dtype, tp=tp, text_only=text_only, **modes)
            plans = [plan_attention(problem, bounded(limits, problem)) for problem in attention_problems(groups)]
            plans += _latent_plans(groups, limits)
        else:
            shape = AttentionProblem(
                *heads_of(heads), *dims_of(head_dim), full_dtype(dtype), page_size or PAGES.get(kind, PAGE_MULTIPLE), arch,
                mask=MaskFeatures(is_causal=causal), kv_dtype=kv_dtype or SAME_AS_Q, kv_source=kind, has_lse=lse, **modes,
            )  # fmt: skip
            plans = [plan_attention(shape, bounded(limits, shape))]
        if fused_output:
            plans += [plan_attention(replace(p.problem, out_dtype=FP8), p.limits) for p in plans if p.problem.kv_source == PAGED]
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


def _latent_plans(groups: list[LayerGroup], limits: BatchLimits) -> Iterator[AttentionPlan]:
    """Of a model with MLA, where our kernels serve its prompts: elsewhere an engine takes another prefill backend, which is no refusal."""
    for step in (step for group in groups for step in latent_steps(group, limits)):
        try:
            yield plan_attention(step.problem, step.limits)
        except UnsupportedProblem as reason:
            typer.echo(f"fa4 compile: {step.name}: no kernel of ours, since {reason}", err=True)


def compile_plans(plans: list[AttentionPlan]) -> list[dict[str, Any]]:
    """Compile what the plans need and the cache lacks; facts of every kernel, one entry each."""
    from fa4_backend.compile_cache import ensure_object, ensure_objects, read_facts
    from fa4_backend.kernel_facts import sass_counts

    keys = dict.fromkeys(key for plan in plans for key in plan.keys)
    ensure_objects(keys)
    kernels = []
    for key in keys:
        facts = asdict(read_facts(key))
        counts: Counter[str] = sass_counts(ensure_object(key).with_suffix(".cubin"))
        kernels.append({**facts, "sass_counts": counts})
    return kernels
