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
from fa4_backend.commands.latent_steps import latent_steps
from fa4_backend.model_config import LayerGroup, layer_groups
from fa4_backend.model_layers import ATTENTION, ModelConfigError
from fa4_backend.plan import bounded, plan_attention
from fa4_backend.problem import AttentionProblem, BatchLimits, UnsupportedProblem


def plan(
    model: Annotated[Path, typer.Option(help="the model's config.json, or the folder that holds it")],
    arch: Annotated[str, typer.Option(help="cpu, sm_90a, sm_100a or sm_103a")] = REFERENCE_ARCH,
    page_size: options.PageSize = None,
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
            if row["room_mib"]:
                print(f"    room for converted K and V, one buffer for all layers: {row['room_mib']:g} MiB")
            for step in row["steps"]:
                print(f"    {step['name']}: {step['plan'] or 'not on FA4: ' + step['refusal']}")
                for name in step["kernels"]:
                    print(f"        {name}")
    raise typer.Exit(1 if any(row["refusal"] for row in rows) else 0)


def _row(group: LayerGroup, limits: BatchLimits) -> dict[str, Any]:
    facts = {} if group.problem is None else asdict(group.problem)
    planned = _planned(group.problem, limits) if group.problem else _not_planned(group.refusal)
    steps = latent_steps(group, limits) if planned["plan"] else ()
    return {
        "kind": group.kind,
        "num_layers": group.num_layers,
        "window": group.window,
        "problem": {**facts, **facts.pop("mask")} if facts else None,
        "remark": group.remark,
        **planned,
        "steps": [{"name": step.name, **_planned(step.problem, step.limits)} for step in steps],
    }


def _planned(problem: AttentionProblem, limits: BatchLimits) -> dict[str, Any]:
    """What serves a problem, or why nothing does."""
    try:
        served = plan_attention(problem, bounded(limits, problem))
    except UnsupportedProblem as error:
        return _not_planned(str(error))
    return {"plan": served.describe(), "kernels": list(served.kernel_names), "room_mib": served.room_bytes / 2**20, "refusal": None}


def _not_planned(refusal: str | None) -> dict[str, Any]:
    """A row of layers without a plan."""
    return {"plan": None, "kernels": [], "room_mib": 0.0, "refusal": refusal}
