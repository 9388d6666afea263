"""`fa4 bench prefill` and `fa4 bench decode`: ours beside the peers that are installed. Needs a GPU."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fa4_backend.problem import FP8, PAGED, RAGGED

bench = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

KV_DTYPES = {"auto": "bfloat16", "fp8": FP8, "fp8_e4m3": FP8}

Sets = Annotated[str, typer.Option("--batches", help="comma-separated sets of batches; empty: all")]
Peers = Annotated[str | None, typer.Option(help="comma-separated peers; default: all that are installed")]
Csv = Annotated[Path | None, typer.Option("--csv", help="write all figures there, and beside them which kernels made them")]
Plot = Annotated[Path | None, typer.Option(help="write a plot there (needs matplotlib)")]
KvDtype = Annotated[str, typer.Option(help=f"of K and V: {', '.join(KV_DTYPES)}; auto is that of q, bfloat16")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@bench.command()
def prefill(
    batches: Sets = "",
    peers: Peers = None,
    csv_path: Csv = None,
    plot: Plot = None,
    json_output: Json = False,
    kv_dtype: KvDtype = "auto",
    kind: Annotated[str, typer.Option(help="of K and V: paged or ragged")] = PAGED,
) -> None:
    """Prefill: microseconds, TFLOP/s, share of a measured matmul, ratio to the best peer that reads K and V as ours does."""
    from fa4_backend.bench import prefill as module
    from fa4_backend.bench.prefill_batches import named_batches, ragged_batches

    sets = {PAGED: named_batches, RAGGED: ragged_batches}
    if kind not in sets:
        typer.echo(f"fa4 bench: --kind: expected one of {', '.join(sets)}, got {kind}", err=True)
        raise typer.Exit(2)
    _require_gpu()
    _run(module, sets[kind](_stored(kv_dtype)), batches, peers, csv_path, plot, json_output)


@bench.command()
def decode(
    batches: Sets = "",
    peers: Peers = None,
    csv_path: Csv = None,
    plot: Plot = None,
    json_output: Json = False,
    kv_dtype: KvDtype = "auto",
    flush: Annotated[str, typer.Option(help="L2 before each call: write (full of dirty lines, as do_bench leaves it) or read")] = "write",
) -> None:
    """Decode: microseconds, GB/s of K and V, share of a measured copy, ratio to the best peer."""
    from fa4_backend.bench import decode as module
    from fa4_backend.bench.decode_batches import issue_batches
    from fa4_backend.bench.timing import Flush

    _require_gpu()
    if flush not in list(Flush):
        typer.echo(f"fa4 bench: --flush: expected one of {', '.join(Flush)}, got {flush}", err=True)
        raise typer.Exit(2)
    _run(module, issue_batches(_stored(kv_dtype)), batches, peers, csv_path, plot, json_output, flush=Flush(flush))


def _stored(kv_dtype: str) -> str:
    """The `kv_dtype` of a problem for what the command line calls it."""
    if kv_dtype not in KV_DTYPES:
        typer.echo(f"fa4 bench: --kv-dtype: expected one of {', '.join(KV_DTYPES)}, got {kv_dtype}", err=True)
        raise typer.Exit(2)
    return KV_DTYPES[kv_dtype]


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        typer.echo("fa4 bench: expected a CUDA GPU, found none", err=True)
        raise typer.Exit(2)


def _run(
    module: Any, sets: dict, names: str, peers: str | None, csv_path: Path | None, plot: Path | None, json_output: bool, **options: Any
) -> None:
    """Run the chosen sets of one benchmark and write what was asked for."""
    from fa4_backend.bench.figures import write_csv

    chosen = names.split(",") if names else list(sets)
    unknown = [name for name in chosen if name not in sets]
    if unknown:
        typer.echo(f"fa4 bench: --batches: expected names of {', '.join(sets)}, got {', '.join(unknown)}", err=True)
        raise typer.Exit(2)
    every = []
    for timings in module.run(
        [b for name in chosen for b in sets[name]], peers=None if peers is None else [p for p in peers.split(",") if p], **options
    ):
        every += timings
        if not json_output:
            print(module.format_line(timings), flush=True)
    if json_output:
        print(json.dumps([asdict(t) for t in every], indent=1))
    if csv_path is not None:
        write_csv(csv_path, every)
    if plot is not None:
        module.write_plot(plot, every)
