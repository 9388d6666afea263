"""The timing model beside measured Hopper cells and published Blackwell figures.

    python -m scripts.model_validation --chip H200 --recordings FOLDER     (then H100, B200, B300; a process serves one arch)

Reads `docs/data/model_cells_*.json`, which were fixed before the first comparison, and writes tile costs, modelled and measured figures to
`docs/data/model_validation.json`. flash-attn-4's kernels and ours are recorded on the emulator, one head and a few KV blocks at a time
(minutes); recordings are kept in FOLDER. `--fit` prints the fit cells under several `beside_products`, and the lines of the clock.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from fa4_backend.emulator import flash_attention
from fa4_backend.emulator.chip import CHIPS, Chip

DATA = Path("docs/data")
OUT = DATA / "model_validation.json"
UPSTREAM = "flash-attn-4"
KEYS = 128  # of an upstream block
Cell = dict[str, Any]


def numbers(text: str) -> list[int]:
    """The whole numbers of a text; "4K" is 4096."""
    return [int(n) * (1024 if k else 1) for n, k in re.findall(r"(\d+)(K?)", text)]


def upstream_rows(arch: str, cell: Cell) -> int:
    """Query rows of a tile of flash-attn-4's dense kernel: of a CTA, or of a CTA pair."""
    if arch == "sm_90a":
        return 192 if cell["head_dim"] == "64" else 128
    return 512 if is_pair(arch, cell) else 256


def is_pair(arch: str, cell: Cell) -> bool:
    """Dense full attention of head dimension 128 and up works on CTA pairs on Blackwell."""
    return arch != "sm_90a" and cell["mask"] == "full" and cell["head_dim"] != "64"


def record_upstream(arch: str, cell: Cell, blocks: int) -> Any:
    """Steps of one tile of flash-attn-4's kernel, as the benchmarks call it: without the lse."""
    import torch

    from fa4_backend import emulator
    from fa4_backend.emulator.recording import Launches

    generator, dim = torch.Generator().manual_seed(0), int(cell["head_dim"])
    rows = upstream_rows(arch, cell)
    q, k, v = (torch.randn(1, n, 1, dim, generator=generator).bfloat16() for n in (rows, blocks * KEYS, blocks * KEYS))
    launches = Launches()
    with emulator.session(arch=arch, num_sms=flash_attention.NUM_SMS, trace=launches) as emu:
        flash_attention.forward(emu, q, k, v, causal=cell["mask"] == "causal", softmax_scale=dim**-0.5)
    return launches.recordings[-1]


def kept(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """A recording from the folder, made where it is not there."""
    path = folder / f"{name}.pkl"
    if not path.exists():
        path.write_bytes(pickle.dumps(make()))
    return pickle.loads(path.read_bytes())


class Modelled:
    """Tile costs by kernel and shape, and the time of cells."""

    def __init__(self, chip: Chip, folder: Path, timing: Any) -> None:
        self.chip, self.folder, self.timing = chip, folder, timing
        self.costs: dict[str, Any] = {}

    def step(self, cell: Cell) -> Any:
        """Our kernel's step of a cell."""
        from fa4_backend.emulator.model_case import Step

        dims, (rows, query_len, *kv) = numbers(cell["head_dim"]), numbers(cell["batch"])
        lengths = (query_len,) * rows, (kv[0] if kv else query_len,) * rows
        return Step(self.chip.arch, *numbers(cell["heads"]), dims[0], dims[-1], *lengths, is_causal=cell["mask"] == "causal")

    def tile_costs(self, cell: Cell) -> Any:
        """Costs of the cell's kernel, replayed once for all cells of a shape."""
        from fa4_backend.emulator import kernel_model, model_case

        ours = cell["kernel"] != UPSTREAM
        name = f"{cell['kernel']} {cell['heads'].replace('/', '-') if ours else 'dense'} d{cell['head_dim']} {cell['mask']}"
        if name not in self.costs:
            print(f"{self.chip.arch} {name}", flush=True)

            def record(tiles: int, blocks: int) -> Any:
                make = partial(model_case.record_tiles, self.step(cell), tiles, blocks)
                if not ours:
                    make = partial(record_upstream, self.chip.arch, cell, blocks)
                return kept(self.folder, f"{self.chip.arch} {name} {tiles} {blocks}", make)

            self.costs[name] = (kernel_model.tile_costs if ours else kernel_model.single_tile_costs)(record, self.timing)
        return self.costs[name]

    def tiles(self, cell: Cell) -> tuple[list[int], int]:
        """KV blocks of every tile, longest first, and how many CTAs (or pairs) share them."""
        from fa4_backend.emulator import model_case

        rows, query_len, *kv = numbers(cell["batch"])
        kv_len = kv[0] if kv else query_len
        num_q_heads, num_kv_heads = numbers(cell["heads"])
        tokens, tile_n, heads, ctas = (
            upstream_rows(self.chip.arch, cell),
            KEYS,
            num_q_heads,
            self.chip.num_sms // (1 + is_pair(self.chip.arch, cell)),
        )
        if cell["kernel"] != UPSTREAM:
            key = model_case.plan_of(self.step(cell), self.chip.num_sms).kernels.prefill  # type: ignore[union-attr]
            tokens, tile_n, heads, ctas = key.tokens_per_item, key.kernel.tile.tile_n, num_kv_heads, self.chip.num_sms
        ends = (min(kv_len, kv_len - query_len + (t + 1) * tokens) for t in range(-(-query_len // tokens)))
        blocks = [-(-(end if cell["mask"] == "causal" else kv_len) // tile_n) for end in ends]
        return sorted(blocks * (heads * rows), reverse=True), ctas

    def time(self, cell: Cell) -> Any:
        """The cell's modelled time. Upstream starts a CTA a tile, except for full attention on Blackwell."""
        from fa4_backend.emulator import kernel_model

        costs, (blocks, ctas) = self.tile_costs(cell), self.tiles(cell)
        is_persistent = cell["kernel"] != UPSTREAM or (self.chip.arch != "sm_90a" and cell["mask"] == "full")
        cycles = kernel_model.queued_cycles(costs, blocks, ctas, 0.0 if is_persistent else self.chip.cta_start.value)
        return kernel_model.kernel_time(self.chip, cycles, sum(blocks) * costs.tensor / ctas, 0.0)

    def flops(self, cell: Cell) -> float:
        return float(self.step(cell).flops)


def clocks_of(cell: Cell, chip: str) -> dict[str, Any] | None:
    """The measured clocks and times of the same kernel and batch, rested and sustained, where they are known."""
    rows = json.loads(Path(f"tests/device/results/clocks_{chip.lower()}.json").read_text())["rows"]
    dims, mask = cell["head_dim"].replace(",", "/"), " full" if cell["mask"] == "full" else ""
    wanted = cell["kernel"], f"{cell['heads']} d{dims} page 16{mask}: {cell['batch']}"
    return next((row for row in rows if (row["kernel"], row["cell"]) == wanted), None)


def measured_cycles(cell: Cell, chip: str) -> float | None:
    """Mean of a rested and a sustained run."""
    row = clocks_of(cell, chip)
    return row and (row["rested us"] * row["rested mhz"] + row["sustained us"] * row["sustained mhz"]) / 2


def hopper_cells(chip: str) -> list[Cell]:
    """The list of a chip."""
    return list(json.loads((DATA / f"model_cells_{chip.lower()}.json").read_text())["cells"])


def fit_clock(model: Modelled, chip: str) -> None:
    """Print the lines of clock over utilisation that fit the measured cells best, and their worst residuals."""
    import numpy as np

    cells = [cell for cell in hopper_cells(chip) if cell["kind"] == "prefill" and clocks_of(cell, chip)]
    load = [model.time(cell).utilisation for cell in cells]
    for name in ("rested", "sustained"):
        mhz = [clocks_of(cell, chip)[f"{name} mhz"] for cell in cells]  # type: ignore[index]
        slope, base = np.polyfit(load, mhz, 1)
        worst = max(abs(np.polyval((slope, base), load) - mhz))
        print(f"{name}: {base:.0f} MHz and {slope:.0f} MHz a utilisation, {len(mhz)} cells, worst residual {worst:.0f} MHz")


def hopper(model: Modelled, chip: str) -> dict[str, Any]:
    """Every cell of the list."""
    from fa4_backend.emulator import kernel_model
    from fa4_backend.emulator.model_case import Step

    rows = []
    for cell in hopper_cells(chip):
        if cell["kind"] == "decode":
            count, kv_len = numbers(cell["batch"])
            step = Step("sm_90a", *numbers(cell["heads"]), 128, 128, (1,) * count, (kv_len,) * count)
            us = kernel_model.decode_time(model.chip, step.num_kv_heads * step.kv_bytes(count * kv_len), is_split=True).us
            rows.append(cell | {"modelled us": round(us, 2), "ratio": round(us / cell["us"], 3)})
            continue
        time = model.time(cell)
        row = cell | {"modelled us": round(time.us, 1), "ratio": round(time.us / cell["us"], 3), "modelled MHz": round(time.mhz)}
        if cycles := measured_cycles(cell, chip):
            row |= {
                "modelled cycles": round(time.cycles),
                "measured cycles": round(cycles),
                "ratio of cycles": round(float(time.cycles / cycles), 3),
            }
        rows.append(row)
    return {"rows": rows}


def blackwell(model: Modelled) -> dict[str, Any]:
    """Published figures of one chip's kind; on B200 the pair's ratio to one CTA as well."""
    rows = []
    wanted = "B200" if model.chip.arch == "sm_100a" else "peak 2500"
    for cell in json.loads((DATA / "model_cells_blackwell.json").read_text())["cells"]:
        if cell["gpu"] != wanted:
            continue
        cell |= {"kernel": UPSTREAM}
        time, flops = model.time(cell), model.flops(cell)
        rates = {
            name: round(flops / us / 1e6, 1) for name, us in (("modelled", time.us), ("throttled", time.high_us), ("rested", time.low_us))
        }
        rows.append(cell | rates | {"ratio": round(rates["modelled"] / cell["tflop_per_s"], 3)})
    return {"rows": rows}


def main() -> int:
    """Compare, print, and put the chip's part into the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=list(CHIPS), required=True)
    parser.add_argument("--recordings", type=Path, default=Path("build/model_recordings"))
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    chip = CHIPS[options.chip]
    flash_attention.prepare(chip.arch)
    from fa4_backend.emulator.timing import TIMINGS
    from fa4_backend.kernel_stamp import make_stamp

    options.recordings.mkdir(parents=True, exist_ok=True)
    timing = TIMINGS[chip.arch]
    for factor in (1.7, 1.8, 1.9, 2.0, 2.1) if options.fit else ():
        model = Modelled(chip, options.recordings, replace(timing, beside_products=factor))
        cells = [c for c in hopper_cells(options.chip) if c["use"] == "fit"]
        errors = [model.time(cell).cycles / (measured_cycles(cell, options.chip) or 1) - 1 for cell in cells]
        print(factor, [round(e, 3) for e in errors], "root mean square", round((sum(e * e for e in errors) / len(errors)) ** 0.5, 4))
    model = Modelled(chip, options.recordings, timing)
    if options.fit:
        fit_clock(model, options.chip)
    result = hopper(model, options.chip) if chip.arch == "sm_90a" else blackwell(model)
    for row in result["rows"]:
        print({k: v for k, v in row.items() if k not in ("source", "kind", "gpu")})
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    stamp = make_stamp("emulator", ("sm90" if chip.arch == "sm_90a" else "sm100",))
    stamp["kernels"] = found.get("stamp", {}).get("kernels", {}) | stamp["kernels"]  # each chip's run speaks of its own family
    costs = {
        name: {key: value for key, value in asdict(cost).items() if key not in ("busy", "critical")} for name, cost in model.costs.items()
    }
    found |= {"stamp": stamp, options.chip: {"tile costs": costs, **result}}
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
