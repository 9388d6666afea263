"""Modelled figures of our Blackwell kernels, a row a batch: `docs/sm100.md`'s table. Nothing here was measured.

    python -m scripts.model_table --recordings FOLDER        writes docs/data/model_blackwell.json

Tiles are recorded on the emulator (kept in FOLDER); each batch's work list is the schedule kernel's for 148 SMs, run on the emulator.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from fa4_backend.emulator import kernel_model, model_case
from fa4_backend.emulator.chip import CHIPS
from fa4_backend.emulator.model_case import Step
from fa4_backend.emulator.timing import TIMINGS, extremes
from fa4_backend.kernel_stamp import make_stamp
from scripts.model_validation import kept

OUT = Path("docs/data/model_blackwell.json")
FP8 = "float8_e4m3fn"
K = 1024


def prefills(arch: str) -> Iterator[tuple[str, Step]]:
    """Batches of two prompts, as the published tables have them."""
    for tokens in (2 * K, 4 * K, 8 * K, 16 * K, 32 * K):
        yield f"64/8 d128 causal 2 x {tokens // K}K", Step(arch, 64, 8, 128, 128, (tokens,) * 2, (tokens,) * 2, 128)
    for tokens in (8 * K, 16 * K):
        yield f"64/8 d128 full 2 x {tokens // K}K", Step(arch, 64, 8, 128, 128, (tokens,) * 2, (tokens,) * 2, 128, is_causal=False)
    for tokens in (4 * K, 16 * K):
        yield f"16/16 d192,128 causal 2 x {tokens // K}K", Step(arch, 16, 16, 192, 128, (tokens,) * 2, (tokens,) * 2, 128)
    for tokens in (4 * K, 16 * K):
        yield f"16/16 d64 causal 2 x {tokens // K}K", Step(arch, 16, 16, 64, 64, (tokens,) * 2, (tokens,) * 2, 128)
    for tokens in (2 * K, 8 * K, 32 * K):
        step = Step(arch, 64, 8, 128, 128, (tokens,) * 2, (tokens,) * 2, 128, kv_dtype=FP8)
        yield f"64/8 d128 causal FP8 KV 2 x {tokens // K}K", step


def decodes(arch: str) -> Iterator[tuple[str, Step]]:
    """64/8 heads, as flashinfer's table has them, and the same with FP8 K and V."""
    for kv_dtype in ("auto", FP8):
        for rows, tokens in ((1, K), (1, 4 * K), (1, 16 * K), (8, K), (8, 4 * K), (8, 16 * K), (64, K), (64, 4 * K), (64, 16 * K)):
            name = f"64/8 d128{' FP8 KV' if kv_dtype == FP8 else ''} {rows} x {tokens // K}K"
            yield name, Step(arch, 64, 8, 128, 128, (1,) * rows, (tokens,) * rows, kv_dtype=kv_dtype)


@cache
def tiles_of(step: Step) -> tuple[list[int], int]:
    """The work list for 148 SMs, and CTAs of an item."""
    plan, metadata = model_case.scheduled(step, CHIPS["B200"])
    assert plan.kernels is not None and plan.kernels.prefill is not None, plan
    return model_case.prefill_blocks(step, plan, metadata), plan.kernels.prefill.ctas_per_item


def prefill_row(chip_name: str, name: str, step: Step, folder: Path) -> dict[str, Any]:
    """One batch on one chip, with the ends of its error bar."""
    chip = CHIPS[chip_name]
    tiles, ctas = tiles_of(Step(**vars_of(step) | {"arch": "sm_100a"}))
    shape = name.split(" 2 x ")[0].replace("/", "-")

    def record(count: int, blocks: int) -> Any:
        return kept(folder, f"{step.arch} ours {shape} {count} {blocks}", partial(model_case.record_tiles, step, count, blocks))

    times = []
    for timing in (TIMINGS[step.arch], *extremes(TIMINGS[step.arch])):
        costs = kernel_model.tile_costs(record, timing)
        cycles = kernel_model.queued_cycles(costs, tiles, chip.num_sms // ctas)
        tensor = sum(tiles) * costs.tensor / (chip.num_sms // ctas)
        times.append((costs, kernel_model.kernel_time(chip, cycles, tensor, step.num_bytes)))
    (costs, time), (_, fast), (_, slow) = times

    def rate(us: float) -> float:
        return round(step.flops / us / 1e6)

    return {
        "batch": name, "cycles of a block": round(costs.block), "cycles of a tile besides": round(costs.tile), "MHz": round(time.mhz),
        "us": round(time.us, 1), "TFLOP/s": rate(time.us), "rested": rate(time.low_us), "throttled": rate(time.high_us),
        "low": rate(slow.high_us), "high": rate(fast.low_us),
    }  # fmt: skip


def vars_of(step: Step) -> dict[str, Any]:
    """The fields of a step."""
    return {name: getattr(step, name) for name in Step.__dataclass_fields__}


def decode_row(chip_name: str, name: str, step: Step) -> dict[str, Any]:
    """One decode batch on one chip; rows are cut wherever there are fewer of them than CTAs."""
    chip = CHIPS[chip_name]
    kv_bytes = step.num_kv_heads * step.kv_bytes(sum(step.kv_lens))
    time = kernel_model.decode_time(chip, kv_bytes, is_split=True)
    return {
        "batch": name,
        "us": round(time.us, 1),
        "GB/s": round(time.gb_per_s),
        "low us": round(time.low_us, 1),
        "high us": round(time.high_us, 1),
    }


def main() -> int:
    """Write the file, a row at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=Path, default=Path("build/model_recordings"))
    options = parser.parse_args()
    options.recordings.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"stamp": make_stamp("emulator", ("schedule", "decode", "sm100")), "note": "modelled, not measured"}
    for chip_name in ("B200", "B300"):
        arch = CHIPS[chip_name].arch
        result[chip_name] = {"decode": [decode_row(chip_name, *named) for named in decodes(arch)], "prefill": []}
        for name, step in prefills(arch):
            result[chip_name]["prefill"].append(prefill_row(chip_name, name, step, options.recordings))
            print(chip_name, result[chip_name]["prefill"][-1], flush=True)
            OUT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
