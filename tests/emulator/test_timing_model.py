"""The timing model's arithmetic by hand, and the model beside measured cells that were fixed before it was built."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fa4_backend.commands.model import rows_of
from fa4_backend.emulator import kernel_model
from fa4_backend.emulator.chip import CHIPS
from fa4_backend.emulator.issue_stalls import parse, ratios_of
from fa4_backend.emulator.kernel_model import TileCosts, dealt_cycles, decode_time, kernel_time, queued_cycles
from fa4_backend.emulator.machine_counts import machine_block, ptx_block, unit_scales
from fa4_backend.emulator.machine_order import early_shares, reorder
from fa4_backend.emulator.model_case import Step, visible_blocks
from fa4_backend.emulator.parser import parse_module
from fa4_backend.emulator.recorded_step import Step as Event
from fa4_backend.emulator.recording import Recording, pipe_cycles
from fa4_backend.emulator.timing import TIMINGS, extremes
from fa4_backend.kernels.schedule import work_list as wl

DATA = Path(__file__).parents[2] / "docs" / "data"
COSTS = TileCosts(first=500.0, tile=100.0, block=10.0, tensor=8.0, busy={}, critical={})


def line(address: int, text: str, stall: int) -> str:
    """Two lines of `nvdisasm -c -hex`: the instruction, and the word with its control bits."""
    return f"        /*{address:04x}*/    {text} ;   /* 0x{7:016x} */\n    /* 0x{stall << 41:016x} */\n"


def sass(body: list[tuple[str, int]]) -> str:
    """A loop over `body`, closed by a backward branch."""
    lines = [line(16 * i, text, stall) for i, (text, stall) in enumerate([*body, ("@P0 BRA `(.L_x_1)", 5)])]
    return ".L_x_1:\n" + "".join(lines)


LOOP = [
    *[("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24", 2)] * 8,
    ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 2),
    *[("FMNMX R1, R2, R3, !PT", 2)] * 5,
    ("MUFU.EX2 R4, R4", 1),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 2),
    *[("MUFU.EX2 R4, R4", 1)] * 3,
    *[("FADD R1, R2, R3", 4)] * 8,
]


def test_stall_counts_are_read_from_the_second_word() -> None:
    instructions, labels = parse(sass([("FADD R1, R2, R3", 4), ("NOP", 15)]))
    assert [stall for _, stall in instructions] == [4, 15, 5] and labels == {".L_x_1": 0}


def test_a_loop_of_products_gives_its_role_cycles_an_instruction() -> None:
    stalls = 8 * 2 + 2 + 5 * 2 + 1 + 2 + 3 + 8 * 4 + 5
    assert ratios_of(sass(LOOP)) == pytest.approx({"consumer": stalls / 28})
    assert ratios_of(sass([*LOOP[:4], ("EXIT", 5), *LOOP[4:]])) == {}, "what holds an EXIT is no loop"


def test_shares_before_the_second_wait() -> None:
    early = early_shares(sass(LOOP))
    assert early is not None
    assert early == pytest.approx((6 / (6 + 12), 1 / 4))  # the branch counts
    assert early_shares(sass(LOOP[:9])) is None


def test_reordering_moves_work_behind_the_second_wait_and_loses_none() -> None:
    def event(kind: str, issue: float, special: float, edge: int | None = None) -> Event:
        return Event(kind, np.array([issue, special, 0.0, 0.0, 0.0]), 0, [] if edge is None else [(edge, 0)])

    steps = [event("wgmma", 1, 0), event("wait", 2, 0, -1), event("arrive", 60, 30, 5), event("wait", 20, 10, -1), event("wgmma", 20, 0)]
    before = sum(step.work for step in steps)
    early = early_shares(sass(LOOP))
    assert early is not None
    reorder(steps, early, special_function_pipe=1)
    assert sum(step.work for step in steps) == pytest.approx(before)
    kept = steps[2].work + steps[3].work
    assert kept[0] == pytest.approx(100 / 3) and kept[1] == pytest.approx(40 / 4)


def test_a_block_of_machine_code_by_unit() -> None:
    """LOOP: 28 instructions; 4 special functions of 8 cycles, 8 sums, 5 maxima of 2 cycles; products, waits and the branch only issue."""
    found = machine_block(sass(LOOP))
    assert found is not None
    cycles, stalls = found
    assert cycles.tolist() == [28, 4 * 8, 8, 5 * 2, 0]
    assert stalls == pytest.approx((8 * 2 + 2 + 5 * 2 + 1 + 2 + 3 + 8 * 4 + 5) / 28)
    assert machine_block(sass(LOOP[:9])) is None, "one wait is no block"
    uniform = machine_block(sass([*LOOP, ("@!UP0 UIADD3 UR4, UR4, 0x1, URZ", 2), ("@P1 LOP3.LUT R1, R2, R3, R4, 0x3c", 2)]))
    assert uniform is not None and uniform[0].tolist() == [30, 32, 8, 12, 0], "a uniform instruction only issues"


PTX_LOOP = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry loop()
{
.reg .pred %p;
.reg .b32 %r<8>;
.reg .b64 %rd<2>;
outer:
add.f32 %r1, %r1, %r2;
inner:
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r3, %r4, %r5, %r6}, %rd0, %rd1, 1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
ex2.approx.ftz.f32 %r1, %r1;
max.f32 %r1, %r1, %r2;
wgmma.wait_group.sync.aligned 0;
setp.ne.b32 %p, %r1, 0;
@%p bra inner;
@%p bra outer;
ret;
}
"""


def test_the_same_block_of_the_ptx() -> None:
    kernel = parse_module(PTX_LOOP)["loop"]
    cycles = np.array([pipe_cycles(i.opcode, "sm_90a") for i in kernel.instructions])
    executed = np.ones(len(cycles), np.int64)
    block = ptx_block(kernel, cycles, executed)
    inner = [i.opcode for i in kernel.instructions[1:-2]]
    assert block is not None and block[1] == 8
    assert block.tolist() == np.sum([pipe_cycles(opcode, "sm_90a") for opcode in inner], axis=0).tolist()
    # Ten rounds, of which one ran the special function.
    executed *= 10
    executed[5] = 1
    assert kernel.instructions[5].opcode.startswith("ex2")
    seldom = ptx_block(kernel, cycles, executed)
    assert seldom is not None and seldom[1] == pytest.approx(0.8) and seldom[0] == pytest.approx(block[0] - 0.9)
    assert ptx_block(kernel, cycles, 0 * executed) is None, "the loop was not run"
    assert ptx_block(parse_module(PTX_LOOP.replace("wgmma.wait_group", "wgmma.fence"))["loop"], cycles, executed) is None
    assert unit_scales(np.array([6.0, 4.0, 3.0]), np.array([4.0, 8.0, 0.0])).tolist() == [1.5, 0.5, 1.0]


def test_tiles_by_list_and_by_queue() -> None:
    assert dealt_cycles(COSTS, [[4, 4], [9], []]) == 500 + 2 * 100 + 8 * 10
    # Three CTAs: 9, 9 and 5 first; the fourth tile goes to the CTA with 5, the fifth to one with 9.
    assert queued_cycles(COSTS, [9, 9, 5, 5, 1], 3) == 500 + 200 + 100
    assert queued_cycles(COSTS, [9, 9], 3, per_tile=50) == 500 + 100 + 90 + 50
    assert queued_cycles(COSTS, [], 3) == dealt_cycles(COSTS, []) == 0.0


def test_costs_follow_from_three_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings stand for (tiles, blocks) here; their times are first + tiles * (tile + blocks * block)."""

    class FakeReplay:
        def __init__(self, recording: Recording, timing: object) -> None:
            self.tiles, self.blocks = recording.warps_per_cta, len(recording.roles)

        def run(self) -> Any:
            total = 700 + self.tiles * (90 + 11 * self.blocks)
            return type("Times", (), {"total": total, "tensor_busy": 32.0 * self.blocks, "smem_busy": 0.0, "busy": {}, "critical": {}})()

    def record(tiles: int, blocks: int) -> Recording:
        return Recording([[]] * tiles, ["consumer"] * blocks, warps_per_cta=tiles)

    monkeypatch.setattr(kernel_model, "Replay", FakeReplay)
    costs = kernel_model.tile_costs(record, TIMINGS["sm_90a"])
    assert (costs.first, costs.tile, costs.block, costs.tensor) == pytest.approx((700, 90, 11, 8))
    alone = kernel_model.single_tile_costs(record, TIMINGS["sm_90a"])
    assert (alone.first, alone.tile, alone.block) == pytest.approx((0, 790, 11))


def test_the_clock_follows_the_load_and_memory_bounds_the_time() -> None:
    chip = CHIPS["H100"]
    assert chip.mhz(0.5, "rested") == pytest.approx(1980 - 303 / 2)
    assert chip.mhz(0.5, "mixed") == pytest.approx((1980 + 1964 - (303 + 616) / 2) / 2)
    assert chip.mhz(-1.0, "rested") == 1980
    time = kernel_time(chip, cycles=2e6, tensor_cycles=1e6, num_bytes=0)
    assert time.utilisation == 0.5 and time.us == pytest.approx(2 + 2e6 / time.mhz)
    assert time.low_us < time.us < time.high_us
    assert kernel_time(chip, 2e3, 1e3, num_bytes=3.03e9).us == pytest.approx(2 + 1000)


def test_decode_is_launch_chain_and_bytes() -> None:
    time = decode_time(CHIPS["H100"], kv_bytes=3.03e8, is_split=True)
    assert time.us == pytest.approx(2.0 + 4.2 + 2.9 + 100) and sum(time.parts.values()) == pytest.approx(time.us)
    assert decode_time(CHIPS["H100"], 3.03e8, is_split=False).us == pytest.approx(time.us - 2.9)
    assert time.low_us < time.us < time.high_us


@pytest.mark.parametrize("arch", TIMINGS)
def test_every_constant_has_a_source_and_lies_in_its_range(arch: str) -> None:
    low, high = extremes(TIMINGS[arch])
    kinds = ("documented", "published", "recalled", "measured", "assumed", "fitted", "there ", "accumulators")
    for name, fact in TIMINGS[arch].facts.items():
        assert fact.low <= fact.value <= fact.high and fact.source.startswith(kinds), name
        assert (getattr(low, name), getattr(high, name)) == (fact.low, fact.high)
    for chip in CHIPS.values():
        assert all(fact.low <= fact.value <= fact.high and fact.source.startswith(kinds) for fact in chip.facts().values())


def test_batches_in_words() -> None:
    assert rows_of("2x1K, 1x512of8K", "prefill") == ((1024, 1024, 512), (1024, 1024, 8192))
    assert rows_of("3x100", "decode") == ((1, 1, 1), (100, 100, 100))
    for wrong in ("8*4K", "4x8Kof1K", "0x4K", "4x0", ""):
        with pytest.raises(ValueError, match="--batch"):
            rows_of(wrong, "prefill")
    with pytest.raises(ValueError, match="--batch"):
        rows_of("4x512of8K", "decode")


@pytest.mark.parametrize(("m_block", "causal", "blocks"), [(0, True, 7), (1, True, 7), (3, True, 8), (0, False, 8)])
def test_blocks_that_a_causal_tile_sees(m_block: int, causal: bool, blocks: int) -> None:
    """The last 128 of 1000 tokens in tiles of 32 and KV blocks of 128: tokens 872 to 903 see 904 keys."""
    step = Step("sm_90a", 4, 1, 128, 128, (128,), (1000,), is_causal=causal)
    entry = np.zeros(wl.TILE_INTS, int)
    entry[[wl.M_BLOCK, wl.N_BLOCK_END]] = m_block, 8
    assert visible_blocks(step, entry, 32, 128) == (
        math.ceil(904 / 128) if m_block == 0 and causal else math.ceil(936 / 128) if m_block == 1 else blocks
    )


# -- beside measurements --------------------------------------------------------------------------------------------------


def validation(chip: str) -> dict[str, Any]:
    return json.loads((DATA / "model_validation.json").read_text())[chip]


def cells(chip: str) -> list[dict[str, Any]]:
    return list(json.loads((DATA / f"model_cells_{chip}.json").read_text())["cells"])


def test_the_cells_compared_are_those_fixed_beforehand() -> None:
    """In their order, with nothing left out: a comparison that drops what it misses proves nothing."""
    for chip in ("H200", "H100"):
        fixed = cells(chip.lower())
        assert [{k: row[k] for k in fixed[0]} for row in validation(chip)["rows"]] == fixed
    published = cells("blackwell")
    rows = [row for chip in ("B200", "B300") for row in validation(chip)["rows"]]
    assert [{k: row[k] for k in published[0]} for row in rows] == published
    names = ("kernel", "heads", "head_dim", "mask", "batch", "use")
    of_both = [[tuple(c[k] for k in names) for c in cells(chip) if c["kernel"] != "fa4"] for chip in ("h200", "h100")]
    assert of_both[0] == of_both[1], "the H200's cells are the H100's"


@pytest.mark.parametrize("chip", ["H200", "H100"])
def test_committed_times_follow_from_committed_costs(chip: str) -> None:
    """Today's constants and arithmetic give the figures on file, from the tile costs on file."""
    from scripts.model_validation import Modelled

    part = validation(chip)
    model = Modelled(CHIPS[chip], Path("none"), TIMINGS["sm_90a"])
    model.costs = {name: TileCosts(**costs, busy={}, critical={}) for name, costs in part["tile costs"].items()}
    for row in part["rows"]:
        if row["kind"] == "prefill":
            assert model.time(row).us == pytest.approx(row["modelled us"], rel=1e-3), row
            assert row["ratio"] == pytest.approx(row["modelled us"] / row["us"], abs=1e-3)


def test_the_model_is_within_ten_per_cent_of_most_cells() -> None:
    """Cells that a constant was fitted on do not count."""
    rows = [row for row in validation("H200")["rows"] if row["use"] == "check"]
    assert len(rows) == 22 and sum(abs(row["ratio"] - 1) <= 0.1 for row in rows) >= 21
    assert sum(abs(row["ratio of cycles"] - 1) <= 0.1 for row in rows) >= 21
    for row in rows:
        assert abs(row["ratio"] - 1) <= 0.11 and abs(row["ratio of cycles"] - 1) <= 0.13, row
    rows = [row for row in validation("H100")["rows"] if row["use"] == "check"]
    ratios = {kind: [row["ratio"] for row in rows if row["kind"] == kind] for kind in ("prefill", "decode")}
    assert (len(ratios["prefill"]), len(ratios["decode"])) == (10, 10)
    assert all(abs(ratio - 1) <= 0.1 for ratio in (*ratios["prefill"], *ratios["decode"]))


def test_a_kernel_takes_as_many_cycles_on_an_h100_as_on_an_h200() -> None:
    """flash-attn-4's, measured on both: what one says of the model in cycles holds for the other. Short prompts
    also wait for memory, which differs."""
    cycles = [
        {tuple(row[k] for k in ("heads", "head_dim", "mask", "batch")): row["measured cycles"] for row in validation(chip)["rows"]
         if row["kernel"] != "fa4" and "measured cycles" in row}
        for chip in ("H200", "H100")
    ]  # fmt: skip
    assert len(cycles[1]) == 10
    assert all(cycles[0][cell] == pytest.approx(of_h100, rel=0.05) for cell, of_h100 in cycles[1].items())


@pytest.mark.emulated
def test_recorded_costs_of_our_kernel_are_those_on_file() -> None:
    """Hopper, 64/8 heads d128: two recordings, replayed; their cycles a block are what the comparison above rests on. Where they are not,
    the kernel is another one: measure it (`tests.device.measure_clocks`) and record it (`scripts.model_validation`)."""
    from fa4_backend.emulator.issue_stalls import find_cuda_tool
    from fa4_backend.emulator.model_case import record_tiles
    from fa4_backend.emulator.replay import Replay

    if find_cuda_tool("nvdisasm") is None:
        pytest.skip("nvdisasm is not installed: stall counts cannot be read")
    step = Step("sm_90a", 64, 8, 128, 128, (4096,), (4096,))
    short, long = (Replay(record_tiles(step, 1, blocks), "sm_90a").run().total for blocks in (kernel_model.SHORT, kernel_model.LONG))
    block = (long - short) / (kernel_model.LONG - kernel_model.SHORT)
    assert block == pytest.approx(validation("H200")["tile costs"]["fa4 64-8 d128 causal"]["block"], rel=0.02)


@pytest.mark.emulated
def test_the_command_takes_the_real_work_list(capsys: pytest.CaptureFixture[str]) -> None:
    """Three decode rows of 4K on an H100, of the kernels above: the schedule cuts them over all CTAs, and K and V are counted once."""
    from fa4_backend.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["model", "--arch", "sm_90a", "--kind", "decode", "--heads", "16/2", "--batch", "3x4K", "--json"])
    assert not stop.value.code
    result = json.loads(capsys.readouterr().out)
    assert result["modelled"] and result["chip"] == "H100" and result["rows are cut"] and result["entries"] > 3 * 2
    stream = 3 * 4096 * 2 * 128 * 2 * 2 / 3030e3
    assert result["parts us"]["K and V at the memory's rate"] == pytest.approx(stream, rel=0.01)
    assert result["us"] == pytest.approx(2.0 + 4.2 + 2.9 + stream, rel=0.01)
    with pytest.raises(SystemExit) as stop:
        main(["model", "--arch", "sm_80"])
    assert stop.value.code == 2
