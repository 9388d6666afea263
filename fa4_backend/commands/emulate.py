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
from fa4_backend.commands.shapes import check_chip, heads_of
from fa4_backend.problem import KV_SOURCES, LATENT, PAGED, RAGGED, SAME_AS_Q

if TYPE_CHECKING:
    import torch

    from fa4_backend.arguments import AttentionArguments
    from fa4_backend.emulator import Report
    from fa4_backend.emulator.trace import Trace
    from fa4_backend.plan import AttentionPlan

POISONED_ROWS = 3  # of q and out past the batch: they must neither be read into a result nor written
# Opcodes by the unit that executes them, for the table; the first prefix that fits counts.
UNITS = (
    ("tcgen05.mma", "tensor"), ("wgmma.mma", "tensor"), ("mma.sync", "tensor"),
    ("ex2.", "MUFU"), ("lg2.", "MUFU"), ("rcp.", "MUFU"), ("tanh.", "MUFU"),
    ("tcgen05.ld", "TMEM"), ("tcgen05.st", "TMEM"), ("cp.async", "copies"),
    ("fma.", "FMA"), ("mul.rn", "FMA"), ("add.rn", "FMA"), ("add.rm", "FMA"), ("sub.rn", "FMA"),
    ("mul.f", "FMA"), ("add.f", "FMA"), ("sub.f", "FMA"),
    ("ld.", "loads, stores"), ("st.", "loads, stores"), ("stmatrix", "loads, stores"), ("ldmatrix", "loads, stores"),
    ("mbarrier", "synchronisation"), ("bar", "synchronisation"), ("fence", "synchronisation"),
)  # fmt: skip


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
            plan, arguments = build_case(
                arch=arch, kind=kind, heads=heads, head_dim=head_dim, head_dim_v=head_dim_v,
                q_lens=_numbers(q_lens, "--q-lens"), kv_lens=_numbers(kv_lens, "--kv-lens"),
                page_size=page_size, dtype=full_dtype(dtype), kv_dtype=full_dtype(kv_dtype), causal=causal, window_left=window_left,
                softcap=softcap, sinks=sinks, num_sms=num_sms, q_dtype=full_dtype(q_dtype), converted=converted,
            )  # fmt: skip
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


# -- an attention case -----------------------------------------------------------------------------------------------------


def build_case(
    *, arch: str, heads: str, head_dim: int, q_lens: list[int], kv_lens: list[int], page_size: int, dtype: str, kv_dtype: str,
    causal: bool, window_left: int | None, softcap: float, sinks: bool, num_sms: int, kind: str = PAGED, head_dim_v: int | None = None,
    q_dtype: str = SAME_AS_Q, converted: bool = False,
) -> tuple[AttentionPlan, AttentionArguments]:  # fmt: skip
    """Random tensors of one step, over scattered pages or without; whatever the kernel must not use holds NaN.

    Raises:
        ValueError: the numbers do not fit each other, or no kernel serves them.
    """
    import torch

    from fa4_backend.arguments import AttentionArguments
    from fa4_backend.plan import plan_attention
    from fa4_backend.problem import EMULATED_PREFIX, AttentionProblem, BatchLimits, MaskFeatures

    if len(q_lens) != len(kv_lens) or min(*q_lens, *kv_lens) < 0:
        raise ValueError(f"--q-lens, --kv-lens: expected as many of each, 0 or more, got {q_lens} and {kv_lens}")
    num_q_heads, num_kv_heads = heads_of(heads)
    if softcap < 0:
        raise ValueError(f"--softcap: expected 0 (off) or more, got {softcap}")
    if kind not in KV_SOURCES:
        raise ValueError(f"--kind: expected one of {', '.join(KV_SOURCES)}, got {kind!r}")
    dims = head_dim, head_dim_v or head_dim
    problem = AttentionProblem(
        num_q_heads, num_kv_heads, *dims, dtype, 1 if kind == RAGGED else page_size, EMULATED_PREFIX + arch,
        mask=MaskFeatures(is_causal=causal, has_window_left=window_left is not None, has_softcap=softcap > 0, has_sinks=sinks),
        kv_dtype=kv_dtype, q_dtype=q_dtype, kv_source=kind, has_lse=True,
    )  # fmt: skip
    limits = BatchLimits(
        len(q_lens), sum(q_lens) + POISONED_ROWS, max(*kv_lens, 1), decode_query_len=max(*q_lens, 1) if kind == LATENT else 1,
        convert_keys=max(sum(kv_lens), 1) if converted else 0,
    )  # fmt: skip
    plan = plan_attention(problem, limits, num_sms=num_sms)
    if converted:
        plan = plan.always_converting()
    generator = torch.Generator().manual_seed(0)
    dtype_of_out, q_kind, kv_kind = (getattr(torch, name) for name in (problem.dtype, problem.q_dtype, problem.kv_dtype))
    scales = None
    if problem.has_kv_scales:
        scales = torch.rand(2, num_kv_heads, generator=generator).mul(-8).exp2()
        scales[:, 0] = 2.0**-8  # values above 1.75 are cut
    sequences = [
        [_stored(torch.randn(n, num_kv_heads, dim, generator=generator), scales, i).to(kv_kind) for i, dim in enumerate(dims)]
        for n in kv_lens
    ]
    q_scale = None
    if problem.has_q_scale:
        q_scale = torch.rand(num_kv_heads, generator=generator).mul(-3).sub(5).exp2()
        q_scale[0] = 2.0**-8
    queries = torch.randn(sum(q_lens), num_q_heads, head_dim, generator=generator)
    if q_scale is not None:
        queries = _stored(queries, q_scale.repeat_interleave(problem.q_per_kv)[None], 0)
    q = torch.full((sum(q_lens) + POISONED_ROWS, num_q_heads, head_dim), torch.nan, dtype=q_kind)
    q[: sum(q_lens)] = queries.to(q.dtype)
    page_table = cu_seqlens_k = None
    if kind != RAGGED:
        k, v, page_table = _in_pages(sequences, page_size, generator)
    else:
        poison = [torch.full((POISONED_ROWS, num_kv_heads, dim), torch.nan, dtype=kv_kind) for dim in dims]
        k, v = (torch.cat([*(tokens[i] for tokens in sequences), poison[i]]) for i in range(2))
        cu_seqlens_k = torch.tensor([0, *kv_lens]).cumsum(0).int()
    k_scale, v_scale = (None, None) if scales is None else scales
    if kind == LATENT:  # values are the first columns of what is stored once
        v, v_scale = k[..., : dims[1]], k_scale
    out = torch.full((q.shape[0], num_q_heads, dims[1]), torch.nan, dtype=dtype_of_out)
    arguments = AttentionArguments(
        q, k, v, page_table, torch.tensor([0, *q_lens]).cumsum(0).int(), torch.tensor(kv_lens, dtype=torch.int32),
        out, torch.full((num_q_heads, q.shape[0]), torch.nan), head_dim**-0.5, window_left, None, softcap,
        torch.randn(num_q_heads, generator=generator) if sinks else None, None, k_scale, v_scale,
        cu_seqlens_k=cu_seqlens_k, q_scale=q_scale,
    )  # fmt: skip
    return plan, arguments


def _stored(values: torch.Tensor, scales: torch.Tensor | None, index: int) -> torch.Tensor:
    """Keys (index 0) or values (1) of a sequence, or queries, as they are stored: in FP8 divided by each head's scale, and saturated."""
    from fa4_backend.problem import FP8_MAX

    return values if scales is None else (values / scales[index, :, None]).clamp(-FP8_MAX, FP8_MAX)


def _in_pages(
    sequences: list[list[torch.Tensor]], page_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V of each sequence in scattered pages, NaN elsewhere, and the page table."""
    import torch

    pages_of = [-(-k.shape[0] // page_size) for k, _ in sequences]
    caches = tuple(torch.full((sum(pages_of) + 1, page_size, *x.shape[1:]), torch.nan, dtype=x.dtype) for x in sequences[0])
    page_table = torch.zeros(len(sequences), max(*pages_of, 1), dtype=torch.int32)
    free = torch.randperm(sum(pages_of) + 1, generator=generator).tolist()
    for seq_idx, tokens in enumerate(sequences):
        for logical in range(pages_of[seq_idx]):
            page = page_table[seq_idx, logical] = free.pop()
            for cache, x in zip(caches, tokens, strict=True):
                rows = x[logical * page_size : (logical + 1) * page_size]
                cache[page, : rows.shape[0]] = rows
    return caches[0], caches[1], page_table


def run_case(plan: AttentionPlan, arguments: AttentionArguments, seeds: int, timeline: Trace | None) -> dict[str, Any]:
    """Run the operator on the emulator and judge the result: under the deterministic schedule and `seeds` random ones, whose bits must be
    the same, then with every sum of a product fused."""
    import torch

    from fa4_backend.emulator.kernels import observed
    from fa4_backend.metadata import AttentionMetadata
    from fa4_backend.mla_ops import mla_decode
    from fa4_backend.ops import paged_attention, ragged_attention

    a = arguments
    reports: list[Report] = []
    kernel_names: dict[str, str] = {}

    def run(seed: int | None, trace: Trace | None, contraction: str) -> None:
        a.out.fill_(torch.nan)
        with observed(seed, trace, contraction) as seen:
            metadata = AttentionMetadata.allocate(plan, "cpu")
            is_latent = plan.problem.kv_source == LATENT
            longest = plan.limits.decode_query_len if is_latent else plan.limits.max_num_tokens
            bounds: dict[str, Any] = {"max_seqlen_q": longest, "max_seqlen_k": plan.limits.max_seqlen_k}
            names = ("softmax_scale", "window_left", "softcap", "sinks", "k_scale", "v_scale", "q_scale", "out", "lse")
            values: dict[str, Any] = {name: getattr(a, name) for name in names}
            if a.page_table is None:
                assert a.cu_seqlens_k is not None
                metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, cu_seqlens_k=a.cu_seqlens_k, **bounds)
                ragged_attention(a.q, a.k_cache, a.v_cache, a.cu_seqlens_q, a.cu_seqlens_k, plan=plan, metadata=metadata, **values)
            else:
                prefill_keys = plan.limits.convert_keys or None
                metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, seqused_k=a.seqused_k, prefill_keys=prefill_keys, **bounds)
                if is_latent:
                    q, q_rope = a.q.tensor_split([plan.problem.head_dim_v], dim=-1)
                    batch = (a.page_table, a.cu_seqlens_q, a.seqused_k)
                    given: dict[str, Any] = {"softmax_scale": a.softmax_scale, "latent_scale": a.k_scale, "out": a.out, "lse": a.lse}
                    mla_decode(q, q_rope, a.k_cache[:, :, 0], *batch, plan=plan, metadata=metadata, **given)
                else:
                    paged_attention(*a[:3], a.page_table, a.cu_seqlens_q, a.seqused_k, plan=plan, metadata=metadata, **values)
        reports.extend(seen.reports)
        kernel_names.update(seen.names)

    run(None, timeline, "never")
    first, differing = a.out.clone(), 0
    for seed in range(seeds):
        run(seed, None, "never")
        differing += not torch.equal(first.view(torch.int16), a.out.view(torch.int16))
    result = judge(plan, arguments)
    run(None, None, "always")
    fused = judge(plan, arguments)
    for name in ("max_err", "lse_err"):
        result[name] = max(result[name], fused[name], key=lambda error: (error != error, error))  # NaN is the worst
    result["ok"] = result["ok"] and fused["ok"]
    result = {"case": plan.describe(), **result, **collect(reports, kernel_names), "schedules": 1 + seeds, "differing": differing}
    result["ok"] = result["ok"] and not result["races"] and not result["faults"] and not differing
    return result


def judge(plan: AttentionPlan, arguments: AttentionArguments) -> dict[str, Any]:
    """Errors against the float32 oracle, and what `fa4_backend.error_budget` allows."""
    import torch

    from fa4_backend import error_budget

    a = arguments
    assert a.lse is not None
    want, want_lse, budget, lse_budget = error_budget.judge(
        a, is_causal=plan.problem.mask.is_causal, e4m3_weights=_has_e4m3_weights(plan, a)
    )
    rows = slice(0, want.shape[0])
    got, got_lse, is_empty = a.out[rows].float(), a.lse[:, rows], want_lse.isneginf()
    padding_is_zero = bool((a.out[rows.stop :] == 0).all() and a.lse[:, rows.stop :].isneginf().all())
    empty_rows_are_zero = bool((got[is_empty.T] == 0).all() and torch.equal(got_lse.isneginf(), is_empty))
    max_err = (got - want).abs().max().item() if got.numel() else 0.0  # NaN where the kernel wrote none: never within budget
    lse_err = (got_lse - want_lse)[~is_empty].abs().max().item() if not is_empty.all() else 0.0
    ok = max_err <= budget and lse_err <= lse_budget and padding_is_zero and empty_rows_are_zero
    return {
        "max_err": max_err,
        "budget": budget,
        "lse_err": lse_err,
        "lse_budget": lse_budget,
        "padding_is_zero": padding_is_zero,
        "empty_rows_are_zero": empty_rows_are_zero,
        "ok": ok,
    }


def _has_e4m3_weights(plan: AttentionPlan, a: AttentionArguments) -> bool:
    """Whether the prefill kernel serves a row, and rounds its weights to e4m3."""
    assert plan.kernels is not None
    is_decoded = plan.kernels.decode is not None and int(a.cu_seqlens_q.diff().max()) <= plan.limits.decode_query_len
    return plan.problem.has_q_scale and not is_decoded


# -- a program of the user ------------------------------------------------------------------------------------------------


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


# -- reports --------------------------------------------------------------------------------------------------------------


def collect(reports: list[Report], names: dict[str, str]) -> dict[str, Any]:
    """Races, counts and times of all schedules; kernels are counted over the first that ran them. `names`: by their names in the PTX."""
    kernels: dict[str, dict[str, Any]] = {}
    for report in reports:
        for symbol, counts in report.kernels.items():
            key = names.get(symbol, symbol)
            if key not in kernels:
                units: dict[str, int] = {}
                for opcode, number in report.opcodes(symbol).items():
                    unit = next((u for start, u in UNITS if opcode.startswith(start)), "ALU, control")
                    units[unit] = units.get(unit, 0) + number
                kernels[key] = {"ctas": counts.ctas, "instructions": int(counts.executed.sum()), "units": units}
    return {
        "races": [race for report in reports for race in report.races],
        "faults": sorted({fault for report in reports for fault in report.faults}),
        "notes": sorted({note for report in reports for note in report.notes}),
        "instructions": sum(report.instructions for report in reports),
        "seconds": round(sum(report.seconds for report in reports), 3),
        "kernels": kernels,
    }


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
    for text in (*result["races"][:5], *result["notes"][:5]):
        console.print(f"  {text}", markup=False)
    if "trace" in result:
        console.print(f"timeline in {result['trace']} (modelled cycles): open it in ui.perfetto.dev")
    console.print("right" if result["ok"] else "WRONG")
