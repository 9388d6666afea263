"""`fa4 emulate`: run an attention case, or a program of one's own, on the emulator."""

from __future__ import annotations

import atexit
import importlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fa4_backend.commands.dtypes import KV_DTYPE_HELP, Q_DTYPE_HELP, full_dtype
from fa4_backend.commands.emulated_case import EmulatedCase, run_case
from fa4_backend.commands.emulated_counts import collect
from fa4_backend.commands.shapes import check_chip
from fa4_backend.problem import PAGED

if TYPE_CHECKING:
    from fa4_backend.emulator.trace import Trace


MOST_LINES = 5  # of races, of faults and of other notes each


def emulate(
    program: Annotated[
        str | None, typer.Argument(help="module:function of your own instead of a case; it is called with an open emulator session")
    ] = None,
    arch: Annotated[str, typer.Option(help="sm_90a, sm_100a or sm_103a")] = "sm_100a",
    heads: Annotated[str, typer.Option(help="query heads / KV heads")] = "4/1",
    head_dim: Annotated[int, typer.Option(help="elements of a query or key row")] = 128,
    head_dim_v: Annotated[int | None, typer.Option(help="elements of a value or output row; default: as many")] = None,
    kind: Annotated[str, typer.Option(help="of K and V: paged, ragged, or latent (16/1 heads, dims 576 and 512)")] = PAGED,
    q_lens: Annotated[str, typer.Option(help="query tokens of each sequence; 0 or more, also more than keys")] = "5,40",
    kv_lens: Annotated[str, typer.Option(help="KV tokens of each sequence, this step's included; 0 or more")] = "133,300",
    page_size: Annotated[int, typer.Option(help="tokens a page")] = 64,
    dtype: Annotated[str, typer.Option(help="bf16 or fp16")] = "bf16",
    kv_dtype: Annotated[str, typer.Option(help=f"{KV_DTYPE_HELP}; fp8 comes with a scale of K and one of V for each head")] = "auto",
    q_dtype: Annotated[str, typer.Option(help=f"{Q_DTYPE_HELP}; fp8 comes with a scale for each KV head")] = "auto",
    causal: Annotated[bool, typer.Option(help="causal mask, aligned bottom-right")] = True,
    window_left: Annotated[int | None, typer.Option(help="keys visible before the diagonal")] = None,
    softcap: Annotated[float, typer.Option(help="logits become softcap * tanh(logits / softcap)")] = 0.0,
    sinks: Annotated[bool, typer.Option("--sinks", help="attention sinks")] = False,
    converted: Annotated[bool, typer.Option("--converted", help="K and V in FP8 are brought to 16 bits once a call (sm_90a)")] = False,
    num_sms: Annotated[int, typer.Option(min=1, help="CTAs of a persistent launch")] = 2,
    seeds: Annotated[int, typer.Option(min=0, help="random schedules, after the deterministic one")] = 0,
    trace: Annotated[Path | None, typer.Option(help="write a timeline that ui.perfetto.dev opens (modelled cycles)")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Run compiled kernels on the emulator with its race detector.

    Exits 0 when the result is right under every schedule; 1 on a race, a fault, a wrong result, a note that matters (such as tensor memory
    that is not freed, or memory read that nobody wrote) or a kernel that cannot be compiled or loaded; 2 on a wrong call.
    """
    from fa4_backend.cache.errors import CacheError
    from fa4_backend.compile import CompileError
    from fa4_backend.emulator import EmulatorError
    from fa4_backend.emulator.trace import Trace

    timeline = Trace() if trace is not None else None
    try:
        check_chip(arch)
        if program is not None:
            result = run_program(program, arch, num_sms, seeds, timeline)
        else:
            case = EmulatedCase(
                arch=arch, kind=kind, heads=heads, head_dim=head_dim, head_dim_v=head_dim_v,
                q_lens=_numbers(q_lens, "--q-lens"), kv_lens=_numbers(kv_lens, "--kv-lens"),
                page_size=page_size, dtype=full_dtype(dtype), kv_dtype=full_dtype(kv_dtype), causal=causal, window_left=window_left,
                softcap=softcap, sinks=sinks, num_sms=num_sms, q_dtype=full_dtype(q_dtype), converted=converted,
            )  # fmt: skip
            plan, arguments = case.build()
            result = run_case(plan, arguments, seeds, timeline)
    except ProgramError as error:
        typer.echo(f"{error}fa4 emulate: {program} raised", err=True)
        raise typer.Exit(1) from None
    except (EmulatorError, CacheError, CompileError) as error:
        typer.echo(f"fa4 emulate: {type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None
    except ValueError as error:
        typer.echo(f"fa4 emulate: {error}", err=True)
        raise typer.Exit(2) from None
    if timeline is not None and trace is not None:
        timeline.save(trace)
        result["trace"] = str(trace)
    if json_output:
        print(json.dumps(result, indent=2))
    else:
        _print_table(result)
    raise typer.Exit(0 if result["ok"] else 1)


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected whole numbers between commas, got {text!r}") from None


def run_program(name: str, arch: str, num_sms: int, seeds: int, timeline: Trace | None) -> dict[str, Any]:
    """Call `module:function` with an open session (`session.run(compiled, ...)` launches), once a schedule."""
    from fa4_backend import emulator, envs

    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise ValueError(f"expected module:function, got {name!r}")
    sys.path.insert(0, "")
    # Before the compiler is imported: host code binds to the first launch functions it finds, and what is compiled keeps its PTX.
    emulator.install()
    envs.set_default("CUTE_DSL_ARCH", arch)
    envs.set_default("CUTE_DSL_KEEP", "ptx,cubin")
    if envs.settings()["CUTE_DSL_DUMP_DIR"] is None:
        folder = tempfile.mkdtemp(prefix="fa4-emulate-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["CUTE_DSL_DUMP_DIR"] = folder
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from None
    reports = []
    for seed in (None, *range(seeds)):
        with emulator.session(arch=arch, num_sms=num_sms, seed=seed, trace=timeline if seed is None else None) as session:
            _call(function, session)
        reports.append(session.report)
    alone = {symbol: name for report in reports for symbol in report.kernels if len(report.kernels) == 1}
    result = {"case": name, **collect(reports, alone), "schedules": 1 + seeds}
    return result | {"ok": not result["races"] and not result["faults"]}


class ProgramError(Exception):
    """The user's function raised; the text is its traceback, and what to do where that is known."""


def _call(function: Callable[[Any], Any], session: Any) -> None:
    """Raises what the emulator finds as it is, anything else as a `ProgramError`."""
    from fa4_backend.emulator import EmulatorError

    try:
        function(session)
    except EmulatorError:
        raise
    except Exception as error:
        trace = error.__traceback__.tb_next if error.__traceback__ is not None else None
        text = "".join(traceback.format_exception(type(error), error, trace))
        if "cudaError" in str(error):
            text += "What is called directly goes to the CUDA driver: launch with session.run(compiled, ...) instead of compiled(...).\n"
        raise ProgramError(text) from None


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(result["case"])
    if "max_err" in result:
        errors = Table("", "error", "allowed", box=None)
        errors.add_row("out", f"{result['max_err']:.2e}", f"{result['budget']:.2e}")
        errors.add_row("lse", f"{result['lse_err']:.2e}", f"{result['lse_budget']:.2e}")
        console.print(errors)
    table = Table("kernel", "CTAs", "warp instructions", "of which", box=None)
    for name, kernel in result["kernels"].items():
        units = sorted(kernel["units"].items(), key=lambda item: -item[1])
        table.add_row(name[:48], str(kernel["ctas"]), f"{kernel['instructions']:,}", ", ".join(f"{u} {n:,}" for u, n in units[:6]))
    console.print(table)
    schedules = f"{result['schedules']} schedule{'s' * (result['schedules'] > 1)}"
    console.print(f"{len(result['races'])} races in {schedules}, {result['seconds']:.2f} s of CPU")
    harmless = [note for note in result["notes"] if note not in result["faults"]]
    for texts in (result["races"], result["faults"], harmless):
        for text in texts[:MOST_LINES]:
            console.print(f"  {text}", markup=False)
        if len(texts) > MOST_LINES:
            console.print(f"  and {len(texts) - MOST_LINES} more: --json prints all")
    if "trace" in result:
        console.print(f"timeline in {result['trace']} (modelled cycles): open it in ui.perfetto.dev")
    console.print("right" if result["ok"] else f"WRONG: {', '.join(_reasons(result))}")


def _reasons(result: dict[str, Any]) -> list[str]:
    """Why a run is not right."""
    reasons = {
        f"{len(result['races'])} races": bool(result["races"]),
        f"{len(result['faults'])} faults": bool(result["faults"]),
        "out is off": "max_err" in result and not result["max_err"] <= result["budget"],
        "lse is off": "lse_err" in result and not result["lse_err"] <= result["lse_budget"],
        "rows past the batch are not zero": not result.get("padding_is_zero", True),
        "rows that see no key are not zero": not result.get("empty_rows_are_zero", True),
        f"other bits under {result.get('differing')} of the random schedules": bool(result.get("differing")),
    }
    return [reason for reason, is_so in reasons.items() if is_so]
