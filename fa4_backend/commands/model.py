"""`fa4 model`: modelled time of a step on a chip, with what was assumed. Nothing is measured."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fa4_backend.commands.dtypes import KV_DTYPE_HELP, full_dtype
from fa4_backend.commands.shapes import check_chip, dims_of, heads_of

if TYPE_CHECKING:
    from fa4_backend.emulator.chip import Chip
    from fa4_backend.emulator.model_case import Step
    from fa4_backend.emulator.model_latent import LatentStep

PREFILL, DECODE, LATENT = "prefill", "decode", "latent"


def model(
    arch: Annotated[str, typer.Option(help="sm_90a (an H100), sm_100a (B200) or sm_103a (B300)")] = "sm_100a",
    kind: Annotated[str, typer.Option(help="prefill, decode or latent (decode of MLA: 128/1 heads, 576/512; FP8 on Blackwell)")] = PREFILL,
    heads: Annotated[str, typer.Option(help="query heads / KV heads")] = "32/8",
    head_dim: Annotated[str, typer.Option(help="of keys, or keys/values such as 192/128")] = "128",
    batch: Annotated[str, typer.Option(help="groups of equal rows such as 8x4K or 4x512of8K, between commas")] = "8x4K",
    page_size: Annotated[int, typer.Option(help="tokens a page")] = 16,
    kv_dtype: Annotated[str, typer.Option(help=KV_DTYPE_HELP)] = "auto",
    causal: Annotated[bool, typer.Option(help="causal mask, aligned bottom-right")] = True,
    json_output: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Print modelled cycles of a KV block by unit, and time and rate of the whole step (decode rows have one query).

    A tile is run on the emulator and replayed with modelled times; the work list is the schedule kernel's, run on the emulator too.
    Exits 2 on a wrong call.
    """
    from fa4_backend.emulator.chip import CHIP_OF_ARCH, CHIPS
    from fa4_backend.emulator.model_case import Step
    from fa4_backend.emulator.model_latent import LatentStep

    try:
        check_chip(arch)
        if kind not in (PREFILL, DECODE, LATENT):
            raise ValueError(f"--kind: expected one of {PREFILL}, {DECODE}, {LATENT}, got {kind!r}")
        shape = (arch, *heads_of(heads), *dims_of(head_dim), *rows_of(batch, kind), page_size)
        chip = CHIPS[CHIP_OF_ARCH[arch]]
        if kind == LATENT:
            result = latent(LatentStep(*shape, kv_dtype=full_dtype(kv_dtype)), chip)
        else:
            step = Step(*shape, kv_dtype=full_dtype(kv_dtype), is_causal=causal)
            result = (prefill if kind == PREFILL else decode)(step, chip)
    except ValueError as error:
        typer.echo(f"fa4 model: {error}", err=True)
        raise typer.Exit(2) from None
    result = {"modelled": True, "chip": CHIP_OF_ARCH[arch], "kind": kind, **result}
    print(json.dumps(result, indent=2)) if json_output else print_table(result)


def rows_of(text: str, kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Query and KV lengths of a batch: "2x16K" is two whole prompts, "4x512of8K" the last 512 of 8K tokens; decode rows have one query,
    of latents "64x4K" one and "64x2of4K" two.

    Raises:
        ValueError: the text is something else.
    """
    queries: list[int] = []
    keys: list[int] = []
    for group in text.split(","):
        found = re.fullmatch(r"(\d+)x(\d+K?)(?:of(\d+K?))?", group.strip())
        if found is None or (kind == DECODE and found.group(3)):
            raise ValueError(f"--batch: expected groups such as 8x4K or, of a prefill, 4x512of8K, got {group!r}")
        rows, length = int(found.group(1)), _tokens(found.group(2))
        kv_len = _tokens(found.group(3)) if found.group(3) else length
        if not 0 < length <= kv_len or not rows:
            raise ValueError(f"--batch: expected at least one row, and no more queries than keys, got {group!r}")
        queries += [1 if kind == DECODE or (kind == LATENT and not found.group(3)) else length] * rows
        keys += [kv_len] * rows
    return tuple(queries), tuple(keys)


def _tokens(text: str) -> int:
    return int(text[:-1]) * 1024 if text.endswith("K") else int(text)


def prefill(step: Step, chip: Chip) -> dict[str, Any]:
    """Cycles of a block, and the whole kernel's time with the ends of its error bar."""
    from fa4_backend.emulator import kernel_model, model_case
    from fa4_backend.emulator.timing import TIMINGS, extremes

    plan, metadata = model_case.scheduled(step, chip)
    tiles = model_case.prefill_blocks(step, plan, metadata)
    recordings: dict[tuple[int, int], Any] = {}

    def record(num_tiles: int, blocks: int) -> Any:
        if (num_tiles, blocks) not in recordings:
            recordings[num_tiles, blocks] = model_case.record_tiles(step, num_tiles, blocks)
        return recordings[num_tiles, blocks]

    assert plan.kernels is not None and plan.kernels.prefill is not None, plan
    per_item = getattr(plan.kernels.prefill, "ctas_per_item", 1)
    num_groups = chip.num_sms // per_item

    def whole(timing: Any) -> tuple[Any, Any]:
        costs = kernel_model.tile_costs(record, timing)
        cycles = kernel_model.queued_cycles(costs, tiles, num_groups)
        tensor = sum(tiles) * costs.tensor / num_groups
        return costs, kernel_model.kernel_time(chip, cycles, tensor, step.num_bytes)

    low, high = extremes(TIMINGS[step.arch])
    (costs, time), (_, fast), (_, slow) = whole(TIMINGS[step.arch]), whole(low), whole(high)
    return {
        "kernel": plan.kernels.prefill.name,
        "tiles": len(tiles),
        "KV blocks": sum(tiles),
        "cycles of a block": round(costs.block, 1),
        "cycles of a tile besides": round(costs.tile, 1),
        "cycles once a CTA": round(costs.first, 1),
        "busy in a block": {name: round(cycles, 1) for name, cycles in costs.busy.items()} | {"tensor core": costs.tensor},
        "longest chain of a block": {name: round(cycles, 1) for name, cycles in _largest(costs.critical)},
        "kernel cycles": round(time.cycles),
        "clock MHz": round(time.mhz),
        "memory us": round(time.memory_us, 1),
        "us": _round(time.us),
        "us, low and high": [_round(fast.low_us), _round(slow.high_us)],
        "TFLOP/s": round(step.flops / time.us / 1e6, 1),
        "TFLOP/s, low and high": [round(step.flops / us / 1e6, 1) for us in (slow.high_us, fast.low_us)],
        "assumed": sources(step.arch, chip),
    }


def latent(step: LatentStep, chip: Chip) -> dict[str, Any]:
    """Cycles of a block of latent decode, and the whole kernel's time: of its longest CTA (or pair), or that of the latents' bytes."""
    from fa4_backend.emulator import kernel_model, model_latent
    from fa4_backend.emulator.timing import TIMINGS

    if step.kv_dtype != "auto" and step.arch == "sm_90a":
        raise ValueError(f"--kv-dtype: expected auto for {LATENT} on sm_90a, got {step.kv_dtype}")
    plan, metadata = model_latent.scheduled(step, chip.num_sms)
    assert plan.kernels is not None and plan.kernels.decode is not None, plan
    lists = model_latent.entry_blocks(metadata)
    costs = kernel_model.tile_costs(lambda entries, blocks: model_latent.record_entries(step, entries, blocks), TIMINGS[step.arch])
    cycles = kernel_model.dealt_cycles(costs, lists)
    time = kernel_model.kernel_time(chip, cycles, sum(map(sum, lists)) * costs.tensor / len(lists), step.num_bytes)
    is_split = sum(map(len, lists)) > len(step.kv_lens) * plan.kernels.work.num_kv_heads
    merge_us = chip.decode_merge_us.value if is_split else 0.0
    us = time.us + merge_us
    return {
        "kernel": plan.kernels.decode.name,
        "entries": sum(map(len, lists)),
        "KV blocks of the longest list": max(map(sum, lists)),
        "cycles of a block": round(costs.block, 1),
        "cycles of an entry besides": round(costs.tile, 1),
        "cycles once a CTA": round(costs.first, 1),
        "busy in a block": {name: round(busy, 1) for name, busy in costs.busy.items()} | {"tensor core": costs.tensor},
        "longest chain of a block": {name: round(chain, 1) for name, chain in _largest(costs.critical)},
        "kernel cycles": round(time.cycles),
        "clock MHz": round(time.mhz),
        "memory us": round(time.memory_us, 1),
        "adding up parts us": merge_us,
        "us": _round(us),
        "us, fast and slow clock": [_round(time.low_us + merge_us), _round(time.high_us + merge_us)],
        "TFLOP/s": round(step.flops / us / 1e6, 1),
        "GB/s of latents": round(step.kv_bytes(sum(step.kv_lens)) / us / 1e3),
        "assumed": sources(step.arch, chip),
    }


def decode(step: Step, chip: Chip) -> dict[str, Any]:
    """A decode step's time by its parts."""
    from fa4_backend.emulator import kernel_model, model_case
    from fa4_backend.kernels.schedule import work_list as wl

    _, metadata = model_case.scheduled(step, chip)
    assert metadata.work is not None
    first = metadata.work.decode_first
    busy = first[:, wl.NUM_ENTRIES] > 0
    entries = sum(int(n) for n in first[:, wl.NUM_ENTRIES])
    is_split = entries > len(step.kv_lens) * metadata.work.shape.num_kv_heads
    kv_bytes = step.num_kv_heads * step.kv_bytes(sum(step.kv_lens))
    time = kernel_model.decode_time(chip, kv_bytes, is_split)
    return {
        "CTAs with work": int(busy.sum()),
        "entries": entries,
        "rows are cut": is_split,
        "parts us": {name: _round(us) for name, us in time.parts.items()},
        "us": _round(time.us),
        "us, low and high": [_round(time.low_us), _round(time.high_us)],
        "GB/s": round(time.gb_per_s),
        "assumed": sources(step.arch, chip, of_tiles=False),
    }


def sources(arch: str, chip: Chip, of_tiles: bool = True) -> dict[str, str]:
    """Every constant that took part, with its source."""
    from fa4_backend.emulator.timing import TIMINGS

    facts = chip.facts() | (TIMINGS[arch].facts if of_tiles else {})
    found = {name: f"{fact.value:g} ({fact.low:g} to {fact.high:g}): {fact.source}" for name, fact in facts.items()}
    return found | ({"clock": chip.clock_source} if of_tiles else {})


def _largest(table: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(((name, cycles) for name, cycles in table.items() if cycles >= 1), key=lambda item: -item[1])


def _round(us: float) -> float:
    return float(round(us, max(0, 3 - math.floor(math.log10(max(us, 1e-3))))))


def print_table(result: dict[str, Any]) -> None:
    """The result for people; constants last."""
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, part in value.items():
                print(f"    {key}: {part}")
        else:
            print(f"{name}: {value}")
