"""`fa4 features`: the support matrix, found by asking the code that refuses."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fa4_backend.arch import ARCHS, REFERENCE_ARCH
from fa4_backend.problem import COMPUTE_DTYPES, FP8, LATENT, AttentionProblem, MaskFeatures, UnsupportedProblem
from fa4_backend.support import check_problem

# A plain problem, and what each row of the matrix changes in it.
BASE = {
    "num_q_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "head_dim_v": 128,
    "dtype": "bfloat16",
    "page_size": 16,
}
ROWS: dict[str, dict[str, object]] = {
    **{f"dtype {name}": {"dtype": name} for name in COMPUTE_DTYPES},
    "K and V in FP8 (e4m3)": {"kv_dtype": FP8},
    "q, K and V in FP8 (e4m3)": {"kv_dtype": FP8, "q_dtype": FP8},
    "out in FP8 (e4m3)": {"out_dtype": FP8},
    **{f"head_dim {d}": {"head_dim": d, "head_dim_v": d} for d in (64, 72, 80, 96, 128, 192, 256, 512)},
    "head_dim 192, head_dim_v 128": {"head_dim": 192},
    **{f"page size {n}": {"page_size": n} for n in (1, 8, 16, 32, 48, 64, 128, 256, 528)},
    "multi-head (ratio 1)": {"num_q_heads": 8},
    "grouped heads, ratio 3": {"num_q_heads": 9, "num_kv_heads": 3},
    "grouped heads, ratio 7": {"num_q_heads": 28, "num_kv_heads": 4},
    "multi-query, ratio 128": {"num_q_heads": 128, "num_kv_heads": 1},
    "causal": {},
    "non-causal": {"mask": MaskFeatures(is_causal=False)},
    "sliding window, left": {"mask": MaskFeatures(has_window_left=True)},
    "sliding window, left and right": {"mask": MaskFeatures(is_causal=False, has_window_left=True, has_window_right=True)},
    "logits soft cap": {"mask": MaskFeatures(has_softcap=True)},
    "attention sinks": {"mask": MaskFeatures(has_sinks=True)},
    "ALiBi": {"mask": MaskFeatures(has_alibi=True)},
    "log-sum-exp output": {"has_lse": True},
    "batch-invariant mode": {"batch_invariant": True},
    "exact mode": {"batch_invariant": True, "exact": True},
}
LATENT_BASE = {"num_q_heads": 16, "num_kv_heads": 1, "head_dim": 576, "head_dim_v": 512, "kv_source": LATENT}
ROWS |= {
    **{f"MLA decode, {n} heads": {**LATENT_BASE, "num_q_heads": n} for n in (4, 8, 16, 128)},
    "MLA decode, latents in FP8 (e4m3)": {**LATENT_BASE, "kv_dtype": FP8},
    "MLA decode, batch-invariant mode": {**LATENT_BASE, "batch_invariant": True},
}
COLUMNS = (REFERENCE_ARCH, *ARCHS)


def features(
    json_output: Annotated[bool, typer.Option("--json", help="print JSON, with the reason of each refusal")] = False,
    reasons: Annotated[bool, typer.Option("--reasons", help="below the table, say why each 'no' is one")] = False,
) -> None:
    """Show which arch serves which feature."""
    matrix = support_matrix()
    if json_output:
        print(json.dumps(matrix, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="what the kernels of each arch serve", title_justify="left")
    table.add_column("feature")
    for arch in COLUMNS:
        table.add_column(arch)
    for feature, by_arch in matrix.items():
        table.add_row(feature, *("[green]yes[/]" if by_arch[arch] is None else "[red]no[/]" for arch in COLUMNS))
    console = Console()
    console.print(table)
    if reasons:
        for feature, by_arch in matrix.items():
            for arch, reason in by_arch.items():
                if reason is not None:
                    console.print(f"{feature}, {arch}: {reason}", highlight=False)


def support_matrix() -> dict[str, dict[str, str | None]]:
    """feature -> arch -> None where it is served, else the sentence that refuses it."""
    return {feature: {arch: _refusal(arch, change) for arch in COLUMNS} for feature, change in ROWS.items()}


def _refusal(arch: str, change: dict[str, object]) -> str | None:
    try:
        check_problem(AttentionProblem(arch=arch, **{**BASE, **change}))  # type: ignore[arg-type]
    except UnsupportedProblem as error:
        return str(error)
    return None
