"""What the timing model takes for a whole chip, each figure beside its source, as in `timing.py`."""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.emulator.timing import Fact, _known

_STAMPS = "measured: clock stamps in the decode kernel at 1 x 1K, H100, 2026-11-26 (docs/benchmarks.md)"


@dataclass(frozen=True)
class Chip:
    """Clocks in MHz are lines over the tensor cores' utilisation: (at 0, slope), and a highest one."""

    num_sms: int
    gb_per_s: Fact  # that large reads reach
    launch_us: Fact  # from one kernel's end to the next one's first CTA, in a graph
    cta_start: Fact  # cycles from a CTA's end to the first instruction of the next on its SM
    decode_chain_us: Fact  # first entry, Q, the first K and V, the arithmetic of the last tile, the end
    decode_merge_us: Fact  # arrival and adding up of a row that several CTAs share
    most_mhz: Fact
    rested: tuple[float, float]
    sustained: tuple[float, float]
    clock_source: str

    def mhz(self, utilisation: float, load: str) -> float:
        """SM clock at a utilisation of the tensor cores; load: "rested" (a few ms after a pause), "sustained", or "mixed", between both."""
        lines = {"rested": [self.rested], "sustained": [self.sustained], "mixed": [self.rested, self.sustained]}[load]
        return min(self.most_mhz.value, sum(base + slope * utilisation for base, slope in lines) / len(lines))


_H100_CLOCK = (
    "fitted: least squares over clocks measured on an H100 on 2026-11-28 (tests/device/results/clocks_h100.json; python -m "
    "tests.device.measure_clocks), against modelled utilisation; no time of a kernel takes part"
)
CHIPS = {
    "H100": Chip(
        num_sms=132,
        gb_per_s=_known(3030, "measured: a copy kernel, docs/benchmarks.md"),
        launch_us=Fact(2.0, 1.5, 2.5, "measured: 10.4 us of a call at 1 x 1K less 8.4 us from its first CTA to its last"),
        cta_start=Fact(1000, 500, 2000, "assumed"),
        decode_chain_us=Fact(4.2, 3.5, 5.0, f"{_STAMPS}: 0.6 + 0.7 + 2.6 + 0.5 + 0.4 less 0.6 in which bytes flow"),
        decode_merge_us=Fact(2.9, 2.4, 3.4, f"{_STAMPS}: 1.5 + 1.4"),
        most_mhz=_known(1980, "documented: nvidia-smi's highest SM clock"),
        rested=(2010, -350),
        sustained=(2090, -715),
        clock_source=_H100_CLOCK,
    ),
}
