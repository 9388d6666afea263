"""`fa4 bench prefill`, `decode`, `mla`, `shapes` and `engine`: ours beside the peers that are installed. Needs a GPU."""

from __future__ import annotations

import json
import math
import re
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fa4_backend.commands.shapes import check_chip
from fa4_backend.problem import FP8, PAGED, RAGGED

bench = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

KV_DTYPES = {"auto": "bfloat16", "fp8": FP8, "fp8_e4m3": FP8}

Sets = Annotated[str, typer.Option("--batches", help="comma-separated sets of batches; empty: all")]
Peers = Annotated[str | None, typer.Option(help="comma-separated peers; default: all that are installed")]
Csv = Annotated[Path | None, typer.Option("--csv", help="write all figures there, and beside them which kernels made them")]
Plot = Annotated[Path | None, typer.Option(help="write a plot there (needs matplotlib)")]
KvDtype = Annotated[str, typer.Option(help=f"of K and V: {', '.join(KV_DTYPES)}; auto is that of q, bfloat16")]
QDtype = Annotated[str, typer.Option(help=f"of q: {', '.join(KV_DTYPES)}; fp8 beside K and V in fp8, auto is bfloat16")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def _chip(arch: str) -> str:
    """The value of --compile-for, checked; empty: measure."""
    try:
        if arch:
            check_chip(arch, "--compile-for")
    except ValueError as error:
        typer.echo(f"fa4 bench: {error}", err=True)
        raise typer.Exit(2) from None
    return arch


CompileFor = Annotated[str, typer.Option(help="compile our kernels for this arch and time none; needs no GPU", callback=_chip)]


@bench.command()
def prefill(
    batches: Sets = "",
    peers: Peers = None,
    csv_path: Csv = None,
    plot: Plot = None,
    json_output: Json = False,
    kv_dtype: KvDtype = "auto",
    q_dtype: QDtype = "auto",
    kind: Annotated[str, typer.Option(help="of K and V: paged or ragged")] = PAGED,
    compile_for: CompileFor = "",
) -> None:
    """Prefill: microseconds, TFLOP/s, share of a measured matmul, ratio to the best peer that reads K and V as ours does."""
    from fa4_backend.bench import prefill as module
    from fa4_backend.bench.dense_peers import DENSE
    from fa4_backend.bench.peers import PAGED as PAGED_PEERS
    from fa4_backend.bench.prefill_batches import named_batches, ragged_batches

    sets = {PAGED: named_batches, RAGGED: ragged_batches}
    if kind not in sets:
        typer.echo(f"fa4 bench: --kind: expected one of {', '.join(sets)}, got {kind}", err=True)
        raise typer.Exit(2)
    chosen = _with_queries(_chosen("--batches", sets[kind](_stored(kv_dtype)), batches), q_dtype)
    if compile_for:
        print(f"{module.compile_all(chosen, compile_for)} kernels for {compile_for}")
        return
    listed = _listed(peers, (*PAGED_PEERS, *DENSE))
    _require_gpu()
    _report(module, module.run(chosen, peers=listed), csv_path, plot, json_output)


@bench.command()
def decode(
    batches: Sets = "",
    peers: Peers = None,
    csv_path: Csv = None,
    plot: Plot = None,
    json_output: Json = False,
    kv_dtype: KvDtype = "auto",
    q_dtype: QDtype = "auto",
    flush: Annotated[str, typer.Option(help="L2 before each call: write (full of dirty lines, as do_bench leaves it) or read")] = "write",
    compile_for: CompileFor = "",
) -> None:
    """Decode: microseconds, GB/s of K and V, share of a measured copy, ratio to the best peer."""
    from fa4_backend.bench import decode as module
    from fa4_backend.bench.decode_batches import issue_batches
    from fa4_backend.bench.peers import PAGED as PAGED_PEERS
    from fa4_backend.bench.timing import Flush

    if flush not in list(Flush):
        typer.echo(f"fa4 bench: --flush: expected one of {', '.join(Flush)}, got {flush}", err=True)
        raise typer.Exit(2)
    chosen = _with_queries(_chosen("--batches", issue_batches(_stored(kv_dtype)), batches), q_dtype)
    if compile_for:
        print(f"{module.compile_all(chosen, compile_for)} kernels for {compile_for}")
        return
    listed = _listed(peers, PAGED_PEERS)
    _require_gpu()
    _report(module, module.run(chosen, peers=listed, flush=Flush(flush)), csv_path, plot, json_output)


@bench.command()
def mla(
    batches: Sets = "",
    peers: Peers = None,
    csv_path: Csv = None,
    plot: Plot = None,
    json_output: Json = False,
    list_only: Annotated[bool, typer.Option("--list", help="print the batches and time none; needs no GPU")] = False,
) -> None:
    """Decode of multi-head latent attention: microseconds, GB/s of latents, share of the roofline, ratio to FA3 and FlashMLA."""
    from fa4_backend.bench.mla_batches import sets

    chosen = _chosen("--batches", sets(), batches)
    if list_only:
        for name, batches_of in chosen.items():
            print(f"{name}:", *(f"  {batch.label}" for batch in batches_of), sep="\n")
        return
    from fa4_backend.bench import mla as module

    listed = _listed(peers, tuple(module.PEERS))
    _require_gpu()
    every = [batch for batches_of in chosen.values() for batch in batches_of]
    _report(module, module.run(every, peers=listed), csv_path, plot, json_output)


@bench.command()
def shapes(
    kinds: Annotated[str, typer.Option(help="comma-separated kinds of cells; empty: all")] = "",
    peers: Peers = None,
    csv_path: Csv = None,
    plot: Plot = None,
    json_output: Json = False,
    kv_dtype: KvDtype = "auto",
    list_only: Annotated[bool, typer.Option("--list", help="print the cells and time none; needs no GPU")] = False,
    compile_for: CompileFor = "",
    only: Annotated[str, typer.Option(help="cells whose title matches this regular expression; empty: all")] = "",
    more: Annotated[bool, typer.Option("--more", help="other kinds, of cells that stand in no other list")] = False,
    seconds: Annotated[
        float | None, typer.Option(help="how long the run may take, compilation included; default: as long as it does")
    ] = None,
) -> None:
    """Shapes where kernels have cliffs: microseconds, share of the roofline, ratio to the best peer; in turns, L2 clean."""
    from fa4_backend.bench.more_cells import more_kinds
    from fa4_backend.bench.shape_cells import kinds as all_kinds
    from fa4_backend.bench.shape_cells import matching

    try:
        chosen = matching(_chosen("--kinds", (more_kinds if more else all_kinds)(_stored(kv_dtype)), kinds), only)
    except (ValueError, re.error) as error:
        typer.echo(f"fa4 bench: --only: {error}", err=True)
        raise typer.Exit(2) from None
    if list_only:
        for name, kind in chosen.items():
            print(f"{name}: {kind.what}", *(f"  {batch.title}" for batch in kind.batches), sep="\n")
        return
    from fa4_backend.bench import shapes as module
    from fa4_backend.bench.peers import PAGED as PAGED_PEERS

    if compile_for:
        print(f"{module.compile_all(chosen, compile_for)} kernels for {compile_for}")
        return
    listed = _listed(peers, PAGED_PEERS)
    _require_gpu()
    every = _report(module, module.run(chosen, peers=listed, seconds=seconds), csv_path, plot, json_output)
    if not json_output:
        print(module.summary(every))


@bench.command()
def engine(
    backends: Annotated[str | None, typer.Option(help="comma-separated backends of vLLM; default: the model's four")] = None,
    model: Annotated[str, typer.Option(help="llama (8B's shape), or DeepSeek's with so many heads: mla16, mla128")] = "llama",
    context: Annotated[int, typer.Option(help="tokens of a decoding request")] = 2048,
    mode: Annotated[str, typer.Option(help="0 (no torch.compile, full graphs of decode steps) or default (vLLM's)")] = "default",
    rounds: Annotated[int, typer.Option(help="turns of every engine")] = 3,
    layers: Annotated[int, typer.Option(help="of the model; engines of all backends and dtypes have to fit on the GPU")] = 4,
    groups: Annotated[str, typer.Option(help="comma-separated groups of cases: rows that decode meanwhile, or ragged; empty: all")] = "",
    starts: Annotated[bool, typer.Option(help="after the rounds, start FA4 with an empty cache of kernels and with a full one")] = False,
    seconds: Annotated[float, typer.Option(help="after these the run ends, with what was measured")] = math.inf,
    csv_path: Csv = None,
    json_output: Json = False,
    kv_dtype: Annotated[str, typer.Option(help=f"comma-separated, an engine each: {', '.join(KV_DTYPES)}")] = "auto",
    logs: Annotated[Path | None, typer.Option(help="folder that keeps the engines' logs, with the longest kernels of each case")] = None,
    compile_for: CompileFor = "",
) -> None:
    """A whole vLLM engine: time to first token, decode steps and ragged load on host and device, attention's share, seconds to start."""
    from fa4_backend.bench import engine as module
    from fa4_backend.bench.figures import write_csv

    dtypes = ["auto" if _stored(name) == KV_DTYPES["auto"] else "fp8" for name in kv_dtype.split(",")]
    if mode not in module.MODES:
        typer.echo(f"fa4 bench: --mode: expected one of {', '.join(module.MODES)}, got {mode}", err=True)
        raise typer.Exit(2)
    (of_model,) = _chosen("--model", module.MODELS, model).values()
    chosen = tuple(_chosen("--groups", dict.fromkeys(module.GROUPS), groups))
    if compile_for:
        print(*module.compile_kernels(dtypes, compile_for, model), sep="\n")
        return
    _require_gpu()
    # A command that `timeout` ends has to end its engines too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    every: list[Any] = []
    try:
        asked = module.EngineRun(
            backends=[*of_model.backends] if backends is None else backends.split(","), kv_cache_dtypes=dtypes, context=context, mode=mode,
            rounds=rounds, starts=starts, model=model, num_layers=layers, groups=chosen, seconds=seconds, logs=logs,
        )  # fmt: skip
        for figures in module.run(asked):
            every += figures
            if figures and not json_output:
                print(module.format_line(figures), flush=True)
            if figures and csv_path is not None:  # after each answer: a machine's time may end before the last one's
                write_csv(csv_path, every, of_model.families)
    except module.EngineBenchError as error:
        typer.echo(f"fa4 bench: {error}", err=True)
        raise typer.Exit(1) from None
    finally:
        print(json.dumps([asdict(f) for f in every], indent=1) if json_output else module.summary(every), flush=True)


def _with_queries(chosen: dict[str, Any], q_dtype: str) -> list[Any]:
    """The batches of the chosen sets, q in the dtype that the command line names."""
    stored = _stored(q_dtype, "--q-dtype")
    return [replace(batch, q_dtype=stored) for batches_of in chosen.values() for batch in batches_of]


def _stored(kv_dtype: str, option: str = "--kv-dtype") -> str:
    """The dtype of a problem for what the command line calls it."""
    if kv_dtype not in KV_DTYPES:
        typer.echo(f"fa4 bench: {option}: expected one of {', '.join(KV_DTYPES)}, got {kv_dtype}", err=True)
        raise typer.Exit(2)
    return KV_DTYPES[kv_dtype]


def _require_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        typer.echo("fa4 bench: expected a CUDA GPU, found none", err=True)
        raise typer.Exit(2)


def _chosen(option: str, sets: dict[str, Any], names: str) -> dict[str, Any]:
    """The sets that the command line names, in its order; all where it names none."""
    chosen = names.split(",") if names else list(sets)
    unknown = [name for name in chosen if name not in sets]
    if unknown:
        typer.echo(f"fa4 bench: {option}: expected names of {', '.join(sets)}, got {', '.join(unknown)}", err=True)
        raise typer.Exit(2)
    return {name: sets[name] for name in chosen}


def _listed(peers: str | None, known: tuple[str, ...]) -> list[str] | None:
    """The peers that the command line names; None where it leaves the choice."""
    if peers is None:
        return None
    return [*_chosen("--peers", dict.fromkeys(known), peers)] if peers else []


def _report(module: Any, timings: Iterable[list[Any]], csv_path: Path | None, plot: Path | None, json_output: bool) -> list[Any]:
    """Run one benchmark, print each batch as it comes, and write what was asked for; all timings."""
    from fa4_backend.bench.figures import write_csv

    every = []
    for batch in timings:
        every += batch
        if not json_output:
            print(module.format_line(batch), flush=True)
    if json_output:
        print(json.dumps([asdict(t) for t in every], indent=1))
    if csv_path is not None:
        write_csv(csv_path, every, getattr(module, "FAMILIES", None))
    if plot is not None:
        module.write_plot(plot, every)
    return every
