"""`fa4 plan`: the kernels that a model needs, before it is served."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fa4_backend import envs
from fa4_backend.arch import REFERENCE_ARCH
from fa4_backend.commands.dtypes import KV_DTYPE_HELP, Q_DTYPE_HELP, full_dtype
from fa4_backend.model_config import LayerGroup, layer_groups
from fa4_backend.model_layers import ATTENTION, ModelConfigError
from fa4_backend.plan import plan_attention
from fa4_backend.problem import BatchLimits, UnsupportedProblem


def plan(
    model: Annotated[Path, typer.Option(help="the model's config.json, or the folder that holds it")],
    arch: Annotated[str, typer.Option(help="cpu, sm_90a, sm_100a or sm_103a")] = REFERENCE_ARCH,
    page_size: Annotated[int, typer.Option(help="tokens a page")] = 16,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default: the config's, bfloat16 for float32")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help=f"{KV_DTYPE_HELP}; default: auto, fp8 if the model declares it")] = None,
    q_dtype: Annotated[str, typer.Option(help=Q_DTYPE_HELP)] = "auto",
    max_num_seqs: Annotated[int, typer.Option(help="sequences of a step")] = 256,
    max_num_tokens: Annotated[int, typer.Option(help="query tokens of a step")] = 8192,
    max_seqlen_k: Annotated[int, typer.Option(help="KV tokens of a sequence")] = 32768,
    speculative_tokens: Annotated[int, typer.Option(help="draft tokens a decode row may carry")] = 0,
    batch_invariant: Annotated[bool, typer.Option(help="a token's bits do not depend on the batch")] = False,
    exact: Annotated[bool, typer.Option(help="nor on how its prompt was cut; implies --batch-invariant")] = False,
    tp: Annotated[int, typer.Option(min=1, help="GPUs that share the heads (tensor parallelism); the plan is one GPU's")] = 1,
    text_only: Annotated[bool, typer.Option(help="a multimodal model is given no images")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show the kernel of each group of layers. Exits 1 unless all attention layers are served, 2 when the config cannot be read."""
    try:
        limits = BatchLimits(max_num_seqs, max_num_tokens, max_seqlen_k, 1 + speculative_tokens, envs.convert_keys())
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
    raise typer.Exit(1 if any(row["refusal"] for row in rows) else 0)


def _row(group: LayerGroup, limits: BatchLimits) -> dict[str, Any]:
    facts = {} if group.problem is None else asdict(group.problem)
    row: dict[str, Any] = {
        "kind": group.kind,
        "num_layers": group.num_layers,
        "window": group.window,
        "problem": {**facts, **facts.pop("mask")} if facts else None,
        "plan": None,
        "kernels": [],
        "remark": group.remark,
        "refusal": group.refusal,
    }
    if group.problem is None:
        return row
    try:
        served = plan_attention(group.problem, limits)
    except UnsupportedProblem as error:
        row["refusal"] = str(error)
        return row
    row["plan"] = served.describe()
    row["kernels"] = list(served.kernel_names)
    return row
