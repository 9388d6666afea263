"""`fa4 plan`: the kernels that a model needs, before it is served."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fa4_backend.arch import REFERENCE_ARCH
from fa4_backend.commands import options
from fa4_backend.commands.dtypes import full_dtype
from fa4_backend.model_config import LayerGroup, layer_groups
from fa4_backend.model_layers import ATTENTION, ModelConfigError
from fa4_backend.plan import plan_attention
from fa4_backend.problem import AttentionProblem, BatchLimits, UnsupportedProblem

PROMPTS = {True: "prompts", False: "prompts, to chunks of cached context"}  # of MLA, by whether the mask is causal


def plan(
    model: Annotated[Path, typer.Option(help="the model's config.json, or the folder that holds it")],
    arch: Annotated[str, typer.Option(help="cpu, sm_90a, sm_100a or sm_103a")] = REFERENCE_ARCH,
    page_size: options.PageSize = 16,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default: the config's, bfloat16 for float32")] = None,
    kv_dtype: options.KvDtype = None,
    q_dtype: options.QDtype = "auto",
    max_num_seqs: options.MaxNumSeqs = 256,
    max_num_tokens: Annotated[int, typer.Option(help="query tokens of a step")] = 8192,
    max_seqlen_k: Annotated[int, typer.Option(help="KV tokens of a sequence")] = 32768,
    speculative_tokens: options.SpeculativeTokens = 0,
    batch_invariant: options.BatchInvariant = False,
    exact: options.Exact = False,
    tp: options.Tp = 1,
    text_only: options.TextOnly = False,
    json_output: options.JsonOutput = False,
) -> None:
    """Show the kernel of each group of layers. Exits 1 unless all attention layers are served, 2 when the config cannot be read."""
    try:
        limits = options.batch_limits(max_num_seqs, speculative_tokens, max_num_tokens, max_seqlen_k)
        modes: dict[str, Any] = {"batch_invariant": batch_invariant or exact, "exact": exact, "q_dtype": full_dtype(q_dtype)}
        dtypes = {name: full_dtype(given) for name, given in (("dtype", dtype), ("kv_dtype", kv_dtype)) if given is not None}
        groups = layer_groups(model, arch=arch, page_size=page_size, tp=tp, text_only=text_only, **dtypes, **modes)
    except (ModelConfigError, ValueError) as error:
        typer.echo(f"fa4 plan: {error}", err=True)
        raise typer.Exit(1 if isinstance(error, UnsupportedProblem) else 2) from None
    rows = [_row(group, limits) for group in groups]
    if json_output:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            kind = "" if row["kind"] == ATTENTION else f" ({row['kind']})"
            window = "" if row["window"] is None else f", window {row['window']}"
            refusal = row["refusal"] and f"not served: {row['refusal']}"
            print(f"{row['num_layers']} layers{kind}{window}: {row['plan'] or row['remark'] or refusal}")
            for name in row["kernels"]:
                print(f"    {name}")
            for prompts in row["prompts"]:
                served_by = prompts["plan"] or f"another prefill backend of the engine, since {prompts['refusal']}"
                print(f"    {PROMPTS[prompts['is_causal']]}: {served_by}")
                for name in prompts["kernels"]:
                    print(f"        {name}")
    raise typer.Exit(1 if any(row["refusal"] for row in rows) else 0)


def _row(group: LayerGroup, limits: BatchLimits) -> dict[str, Any]:
    facts = {} if group.problem is None else asdict(group.problem)
    return {
        "kind": group.kind,
        "num_layers": group.num_layers,
        "window": group.window,
        "problem": {**facts, **facts.pop("mask")} if facts else None,
        "remark": group.remark,
        **(_planned(group.problem, limits) if group.problem else {"plan": None, "kernels": [], "refusal": group.refusal}),
        "prompts": [{"is_causal": problem.mask.is_causal, **_planned(problem, limits)} for problem in group.prompts],
    }


def _planned(problem: AttentionProblem, limits: BatchLimits) -> dict[str, Any]:
    """What serves a problem, or why nothing does."""
    try:
        served = plan_attention(problem, limits)
    except UnsupportedProblem as error:
        return {"plan": None, "kernels": [], "refusal": str(error)}
    return {"plan": served.describe(), "kernels": list(served.kernel_names), "refusal": None}
