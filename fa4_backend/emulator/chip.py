"""What the timing model takes for a whole chip, each figure beside its source, as in `timing.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fa4_backend.emulator.timing import Fact, known

_STAMPS = "measured: clock stamps in the decode kernel at 1 x 1K, H100, 2026-11-26 (docs/benchmarks.md)"


@dataclass(frozen=True)
class Chip:
    """Clocks in MHz are lines over the tensor cores' utilisation: (at 0, slope), and a highest one."""

    arch: str
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

    def facts(self) -> dict[str, Fact]:
        """Every figure that has a source of its own."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Fact)}


_LAUNCH = Fact(2.0, 1.5, 2.5, "measured: 10.4 us of a call at 1 x 1K less 8.4 us from its first CTA to its last, H100")
_CTA_START = Fact(1000, 500, 2000, "assumed")
_CHAIN = Fact(4.2, 3.5, 5.0, f"{_STAMPS}: 0.6 + 0.7 + 2.6 + 0.5 + 0.4, less 0.6 in which bytes flow")
_MERGE = Fact(2.9, 2.4, 3.4, f"{_STAMPS}: 1.5 + 1.4")
_CHAIN_OF_H100 = _CHAIN._replace(low=2.5, high=6.0, source=f"assumed: as on an H100 ({_CHAIN.source})")
_MERGE_OF_H100 = _MERGE._replace(low=1.5, high=4.0, source=f"assumed: as on an H100 ({_MERGE.source})")
_HBM3E = Fact(7260, 7060, 7260, "published: SemiAnalysisAI/microbench-blackwell, tma2d_throughput (B200), 64 KiB or more in flight an SM")
_H100 = Chip(
    arch="sm_90a",
    num_sms=132,
    gb_per_s=Fact(3030, 3000, 3060, "measured: a copy kernel, docs/benchmarks.md"),
    launch_us=_LAUNCH,
    cta_start=_CTA_START,
    decode_chain_us=_CHAIN,
    decode_merge_us=_MERGE,
    most_mhz=known(1980, "documented: nvidia-smi's highest SM clock"),
    rested=(1980, -303),
    sustained=(1964, -616),
    clock_source="fitted: least squares over 18 pairs of clocks measured on an H100 on 2026-11-28 "
    "(tests/device/results/clocks_h100.json; worst residuals 61 and 126 MHz) against the modelled utilisation; "
    "no kernel's time takes part",
)
CHIPS = {
    "H200": replace(
        _H100,
        gb_per_s=Fact(4110, 4070, 4110, "measured: torch's add of 128 MiB of int16, tests/device/results/clocks_h200.json"),
        rested=(1978, -290),
        sustained=(1908, -536),
        clock_source="fitted: least squares over 27 pairs of clocks measured on an H200 on 2026-11-28 "
        "(tests/device/results/clocks_h200.json; worst residuals 108 and 90 MHz) against the modelled utilisation; "
        "no kernel's time takes part",
    ),
    "H100": _H100,
    "B200": Chip(
        arch="sm_100a",
        num_sms=148,
        gb_per_s=_HBM3E,
        launch_us=_LAUNCH._replace(source=f"assumed: as on an H100 ({_LAUNCH.source})"),
        cta_start=_CTA_START,
        decode_chain_us=_CHAIN_OF_H100,
        decode_merge_us=_MERGE_OF_H100,
        most_mhz=known(1965, "published: flashinfer PR 2899 (2026-03-26): SM clock before it throttles"),
        rested=(1965, 0),
        sustained=(1965, -620),
        clock_source="published: flashinfer PR 2899: flash-attn-4 falls from 1965 to about 1580 MHz at 1000 W within 30 to 70 calls; "
        "the line through both has an H100's slope, which is assumed to hold at other loads",
    ),
    "B300": Chip(
        arch="sm_103a",
        num_sms=148,
        gb_per_s=_HBM3E._replace(source=f"assumed: as a B200's ({_HBM3E.source})"),
        launch_us=_LAUNCH._replace(source=f"assumed: as on an H100 ({_LAUNCH.source})"),
        cta_start=_CTA_START,
        decode_chain_us=_CHAIN_OF_H100,
        decode_merge_us=_MERGE_OF_H100,
        most_mhz=known(2070, "published: facebookexperimental/triton PR 2023 (2026-07-14): GB300, 1400 W, highest clock"),
        rested=(2070, 0),
        sustained=(2070, -277),
        clock_source="published: the same PR: cuBLAS reaches 2174 TFLOP/s at 1400 W, which is 1793 MHz of 148 SMs at full utilisation; "
        "the line from 2070 MHz to there is assumed",
    ),
}
CHIP_OF_ARCH = {chip.arch: name for name, chip in CHIPS.items()}  # the last one: H100 for sm_90a
