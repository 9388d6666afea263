"""Prefill tiles in batch-invariant mode, on Hopper: KV is cut at the ends of pieces, and a row's bits do not depend on who has which.

Pieces have a block of 128 keys here up to the 16th block and two from there on, tiles 32 tokens of 4 heads at d128. Slots hold NaN before.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fa4_backend.kernels.common.kv_pieces import tile_rule
from fa4_backend.kernels.schedule.work_list import NUM_PIECES, PARTIAL_SLOT
from tests.support import large_logits
from tests.support.emulated_prefill import Cuts, EmulatedRun, run_built
from tests.support.host_schedule import piece_ends
from tests.support.paged_case import BuiltCase, PagedCase
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

BASE = PagedCase((16,), (520,), num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16, arch="emulated-sm_90a", batch_invariant=True)


def case(query_lens: tuple[int, ...], kv_lens: tuple[int, ...], **changes: object) -> PagedCase:
    return replace(BASE, query_lens=query_lens, kv_lens=kv_lens, **changes)  # type: ignore[arg-type]


def run_pieces(built: BuiltCase, piece_blocks: int = 1, **options: object) -> EmulatedRun:
    """The kernel of a case with short pieces."""
    plan = built.case.plan(num_sms=2)
    assert plan.kernels is not None and plan.kernels.prefill is not None and plan.kernels.prefill.kernel.has_pieces
    key = plan.kernels.prefill
    run = run_built(built, key=replace(key, kernel=replace(key.kernel, piece_blocks=piece_blocks)), **options)  # type: ignore[arg-type,type-var]
    run.check()
    return run


CASES = {
    # An entry has one piece, or several.
    "one row of 5 blocks": (BASE, ((5,), (3,), (2,))),
    # Pieces of two blocks from the 16th on.
    "20 blocks": (case((5,), (2530,), num_q_heads=4, num_kv_heads=1), ((18,), (4,))),
    # Tiles of a row see other blocks than its longest, and have fewer pieces than parts: some entries have nothing.
    "both warpgroups, page 48": (case((70, 33), (400, 130), page_size=48), ((4, 2), (3, 1))),
    "rows without a key": (case((40, 3, 5), (20, 0, 300)), ((1, 1, 3),)),
    "windows": (case((40,), (600,), window_left=300, window_right=10, is_causal=False), ((4,), (2,))),
    "all score features": (case((20,), (500,), sinks=True, alibi=True, softcap=20.0, window_left=350, layout="hnd"), ((4,), (2,))),
    "FP8": (case((20,), (500,), kv_dtype="float8_e4m3fn"), ((4,), (2,))),
    "d64, three warpgroups": (case((70,), (300,), head_dim=64, num_q_heads=6, num_kv_heads=2, dtype="float16"), ((3,), (2,))),
    "d256, soft cap": (case((40,), (300,), head_dim=256, num_q_heads=2, num_kv_heads=1, softcap=3.0, window_left=290), ((4,), (2,))),
    "(192, 128) in fp16": (case((10,), (330,), head_dim=192, head_dim_v=128, num_q_heads=2, num_kv_heads=2, dtype="float16"), ((3,), (2,))),
}


@pytest.mark.parametrize("name", with_slow(CASES, ["(192, 128) in fp16", "d64, three warpgroups"]))
def test_bits_do_not_depend_on_the_cuts(name: str) -> None:
    """Whole tiles, every piece a part, and some pieces behind each other; few CTAs and many, the first entry first and last."""
    drawn, cuts = CASES[name]
    built = drawn.build()
    whole = run_pieces(built, num_ctas=2, cuts=Cuts((1,) * len(drawn.kv_lens)))
    assert (whole.work.prefill_tiles[:, PARTIAL_SLOT] == -1).all()
    want = whole.out[: built.total_q].clone(), whole.lse[:, : built.total_q].clone()
    for i, parts in enumerate(cuts):
        # One CTA adds up all but its last tile's parts in registers; as many as entries wait for each other and add up a share each. All
        # entries are taken from the queue where decode rows run beside.
        for num_ctas, is_all_taken in ((1, False), (3, True), (max(parts) * drawn.num_kv_heads, False)):
            run = run_pieces(
                built, num_ctas=num_ctas, seed=i, cuts=Cuts(parts, is_reversed=i % 2 == 1 and num_ctas > 1, is_all_taken=is_all_taken)
            )
            assert (run.work.prefill_tiles[:, PARTIAL_SLOT] >= 0).any()
            assert torch.equal(run.out[: built.total_q], want[0]) and torch.equal(run.lse[:, : built.total_q], want[1]), (parts, num_ctas)


def test_more_slots_than_lanes() -> None:
    """40 slots, of which a lane of a share has two."""
    built = case((1,), (64 * 128,), num_q_heads=1, num_kv_heads=1, head_dim=64).build()
    outs = []
    for parts, num_ctas in ((1, 1), (64, 3), (7, 7)):
        run = run_pieces(built, cuts=Cuts((parts,)), num_ctas=num_ctas, seed=parts)
        assert int(run.work.prefill_tiles[:, NUM_PIECES].max()) == {1: 1, 64: 40, 7: 36}[parts]
        outs.append((run.out[: built.total_q].clone(), run.lse[:, : built.total_q].clone()))
    assert all(torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1]) for out, lse in outs[1:])


def test_bits_depend_on_where_pieces_end() -> None:
    """The control: pieces of other sizes make other bits, so the comparison above can fail."""
    built = case((5,), (530,), num_q_heads=4, num_kv_heads=1).build()
    outs = [run_pieces(built, piece_blocks).lse[:, : built.total_q].clone() for piece_blocks in (1, 16)]
    assert not torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("name", with_slow(["random", "growing", "sink", "fp16, largest", "-3e37"], ["fp16, largest"]))
def test_large_logits(name: str) -> None:
    """Pieces whose maxima are far apart or equal, made with either scale of scores."""
    built = large_logits.build(name, query_lens=(33,), kv_lens=(500,), num_q_heads=4, num_kv_heads=1, arch=BASE.arch, batch_invariant=True)
    outs = []
    for cuts in (None, Cuts((4,)), Cuts((2,))):
        run = run_pieces(built, cuts=cuts, num_ctas=4)
        large_logits.check(built, run.out, run.lse)
        outs.append((run.out[: built.total_q].clone(), run.lse[:, : built.total_q].clone()))
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1])


def test_a_layer_whose_window_is_narrower_than_the_lists() -> None:
    """Pieces left of the layer's window see nothing, in whichever entry they are; bits are those of lists made for the window."""
    built = case((20,), (600,), window_left=150, window_right=0, is_causal=False).build()
    want = run_pieces(built).out[: built.total_q].clone()
    for parts in ((1,), (5,), (2,)):
        run = run_pieces(built, cuts=Cuts(parts, window_left=None), num_ctas=3)
        assert torch.equal(run.out[: built.total_q], want), parts


def test_the_rule() -> None:
    """Ends of pieces, as the host lists them, and what the device's functions say."""
    from fa4_backend.kernels.common.kv_pieces import piece_begin, piece_of
    from tests.emulated.test_schedule import H100

    for short in (1, 2, 16, 26):
        ends = piece_ends(replace(H100, part_piece_blocks=short), 100 * short, is_whole=True)
        begins = [0, *ends[:-1]]
        assert [piece_begin(i, tile_rule(short)) for i in range(len(begins))] == begins
        assert [piece_of(begin, tile_rule(short)) for begin in begins] == list(range(len(begins)))
        assert [piece_of(end - 1, tile_rule(short)) for end in ends] == list(range(len(begins)))
