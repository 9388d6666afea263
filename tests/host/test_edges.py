"""Arrive counts and byte counts of the Blackwell kernel's pipelines, against counts worked out by hand."""

import pytest

from fa4_backend import MaskFeatures
from fa4_backend.kernels.common.edges import EdgeBarriers, Party, PipelineEdge, Signal
from fa4_backend.kernels.common.prefill_config import PrefillConfig, TileShape
from fa4_backend.kernels.sm100.config import Sm100Config
from fa4_backend.kernels.sm100.storage import FEED_BYTES, Storage
from fa4_backend.kernels.sm100.tile_bytes import TileBytes
from fa4_backend.kernels.sm100.tmem_layout import TmemLayout
from fa4_backend.kernels.sm100.tuning import ROWS
from fa4_backend.kernels.sm100.warp_roles import FEED_STAGE, pipeline_edges


def config(
    head_dim: int = 128,
    head_dim_v: int = 128,
    q_per_kv: int = 4,
    kv_stage: int = 4,
    cta_group: int = 1,
    kv_dtype: str = "bfloat16",
    q_dtype: str = "bfloat16",
) -> Sm100Config:
    kernel = PrefillConfig(
        arch="sm_100a", dtype="bfloat16", q_dtype=q_dtype, kv_dtype=kv_dtype, out_dtype="bfloat16",
        head_dim=head_dim, head_dim_v=head_dim_v, q_per_kv=q_per_kv, tile=TileShape(128, 128, kv_stage),
        box_rows=16, mask=MaskFeatures(),
        has_lse=True, sinks_dtype="float32",
    )  # fmt: skip
    return Sm100Config(kernel, ROWS["sm_100a"]).with_tuning(cta_group=cta_group)


def test_counts_by_hand() -> None:
    edges = {edge.name: edge for edge in pipeline_edges(TileBytes.of(config()), config(), o_stage=1)}
    # (full, empty): one elected thread for TMA and commits, one arrival a warp elsewhere.
    assert {name: (edge.full_count, edge.empty_count) for name, edge in edges.items()} == {
        "tile_load_to_roles": (1, 16),  # every warp
        "q_load_to_mma": (1, 1),
        "kv_load_to_mma": (1, 1),
        "v_tail_load_to_value_tail": (1, 1),
        "s_mma_to_softmax": (1, 0),
        "p_softmax_to_mma": (4, 0),
        "p_rest_softmax_to_mma": (4, 0),
        "stats_softmax_to_correction": (1, 1),
        "o_mma_to_correction": (1, 4),
        "o_correction_to_epilogue": (4, 1),
    }


def test_counts_of_a_cta_pair_by_hand() -> None:
    pair = config(192, 128, kv_stage=2, cta_group=2)
    sizes = TileBytes.of(pair)
    edges = {edge.name: edge for edge in pipeline_edges(sizes, pair, o_stage=1)}
    # Both CTAs signal what the mma warp waits for; all else stays within a CTA.
    assert {name: (edge.full_count, edge.empty_count) for name, edge in edges.items()} == {
        "tile_load_to_roles": (1, 31),  # but the mma warp that issues nothing
        "q_load_to_mma": (2, 1),
        "kv_load_to_mma": (2, 1),
        "v_tail_load_to_value_tail": (1, 1),
        "s_mma_to_softmax": (1, 0),
        "p_softmax_to_mma": (8, 0),
        "p_rest_softmax_to_mma": (8, 0),
        "stats_softmax_to_correction": (1, 1),
        "o_mma_to_correction": (1, 8),
        "o_correction_to_epilogue": (4, 1),
    }
    assert (sizes.q_tx_bytes, sizes.k_tx_bytes, sizes.v_tx_bytes) == (49152, 24576, 16384)  # 64 rows of K, 64 columns of V


def test_counts_of_a_lone_tile_by_hand() -> None:
    """Heads of 256: one query tile a CTA, both buffers of S, and a barrier for products with V."""
    lone = config(256, 256, kv_stage=2, cta_group=2)
    sizes = TileBytes.of(lone)
    edges = {edge.name: edge for edge in pipeline_edges(sizes, lone, o_stage=1)}
    assert {name: (edge.stages, edge.full_count, edge.empty_count) for name, edge in edges.items()} == {
        "tile_load_to_roles": (4, 1, 23),  # nor is there a second softmax group
        "q_load_to_mma": (1, 2, 1),
        "kv_load_to_mma": (4, 2, 1),
        "v_tail_load_to_value_tail": (1, 1, 1),
        "s_mma_to_softmax": (2, 1, 0),
        "p_softmax_to_mma": (2, 8, 0),
        "p_rest_softmax_to_mma": (2, 8, 0),
        "pv_mma_to_softmax": (1, 1, 0),
        "stats_softmax_to_correction": (4, 1, 1),
        "o_mma_to_correction": (1, 1, 8),
        "o_correction_to_epilogue": (1, 4, 1),
    }
    # 64 rows of K and 128 columns of V of 256; half a head of O on its way out.
    assert (sizes.q_tx_bytes, sizes.k_tx_bytes, sizes.v_tx_bytes, sizes.o) == (65536, 32768, 32768, 128 * (2 * 128 + 16))
    assert TmemLayout.of(lone).end == 512 and TmemLayout.of(lone).o_stride == 0


@pytest.mark.parametrize("cta_group", [1, 2])
def test_counts_with_fp8_by_hand(cta_group: int) -> None:
    """Staged tiles stay within a CTA; the converted halves of both CTAs make a tile of the leader's ring."""
    fp8 = config(cta_group=cta_group, kv_dtype="float8_e4m3fn")
    sizes = TileBytes.of(fp8)
    edges = {edge.name: edge for edge in pipeline_edges(sizes, fp8, o_stage=1)}
    found = {
        name: (edge.stages, edge.full_count, edge.empty_count, edge.tx_bytes) for name, edge in edges.items() if name[:2] in ("kv", "v_")
    }
    assert found == {
        "kv_load_to_convert": (2 * cta_group, 1, 4, 16384 // cta_group),
        "kv_convert_to_mma": (3 * cta_group, 4 * cta_group, 1, 0),
    }


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "kv_stage", "cta_group"),
    [(64, 64, 8, 1), (96, 96, 4, 1), (128, 128, 4, 1), (128, 128, 4, 2), (192, 128, 2, 2), (256, 256, 2, 2)],
)
def test_fp8_takes_the_shared_memory_of_16_bits(head_dim: int, head_dim_v: int, kv_stage: int, cta_group: int) -> None:
    """Staged tiles lie behind the ring, 1024-byte aligned, in the place of 16-bit tiles: what is behind them moves by less than one."""
    fp8, plain = (
        Storage.of(config(head_dim, head_dim_v, kv_stage=kv_stage, cta_group=cta_group, kv_dtype=kv_dtype), o_stage=1)
        for kv_dtype in ("float8_e4m3fn", "bfloat16")
    )
    assert fp8.kv < fp8.loaded and plain.o <= fp8.o < plain.o + fp8.loaded_stride and (fp8.o == plain.o) == (head_dim != 96)
    assert fp8.loaded % 1024 == fp8.loaded_stride % 1024 == 0 and fp8.loaded_stride == 128 // cta_group * head_dim


def test_fp8_of_192_does_not_fit_one_cta() -> None:
    with pytest.raises(ValueError, match=r"shared memory of prefill-.*-kve4m3-d192v128-.*: expected at most 232448 bytes, got 2\d{5}"):
        Storage.of(config(192, 128, kv_stage=2, kv_dtype="float8_e4m3fn"), o_stage=1)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "q_per_kv", "expected"),
    [
        (128, 128, 4, (32768, 32768, 32768)),
        (64, 64, 1, (16384, 16384, 16384)),
        (96, 96, 1, (32768, 32768, 32768)),  # the second part is half out of bounds, and boxes count in full
        (192, 128, 1, (49152, 49152, 32768)),
        (128, 128, 3, (126 * 256, 32768, 32768)),  # 42 tokens of 3 heads: two idle rows, which no box covers
        (128, 128, 7, (126 * 256, 32768, 32768)),
    ],
)
def test_tx_bytes_by_hand(head_dim: int, head_dim_v: int, q_per_kv: int, expected: tuple[int, int, int]) -> None:
    sizes = TileBytes.of(config(head_dim, head_dim_v, q_per_kv))
    assert (sizes.q_tx_bytes, sizes.k_tx_bytes, sizes.v_tx_bytes) == expected


def test_barriers_do_not_overlap() -> None:
    storage = Storage.of(config(), o_stage=1)
    offsets = [offset for offset, _ in storage.barriers.initial_counts()]
    assert len(set(offsets)) == len(offsets) == 8 + 4 + 8 + 2 + 2 + 2 + 2 + 16 + 4 + 2
    assert min(offsets) == storage.feed + FEED_STAGE * FEED_BYTES and max(offsets) + 8 == storage.num_bytes
    assert all(offset % 8 == 0 for offset in offsets)


def test_too_large_a_ring_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shared memory of prefill-.*: expected at most 232448 bytes, got 2\d{5}"):
        Storage.of(config(kv_stage=5), o_stage=1)


LOAD, MMA = Party("load", Signal.TMA), Party("mma", Signal.COMMIT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x_a_to_b", 0, (LOAD,), (MMA,), 16), "at least 1 stage, got 0"),
        (("payload", 1, (LOAD,), (MMA,), 16), "expected <payload>_<producer>_to_<consumer>, got 'payload'"),
        (("x_a_to_b", 1, (LOAD,), (MMA,), 0), "tx bytes exactly when one TMA party fills it, got 0 and 1"),
        (("x_a_to_b", 1, (MMA,), (MMA,), 16), "got 16 and 0"),
        (("x_a_to_b", 1, (LOAD,), (MMA,), 1 << 20), "1 to 1048575 tx bytes"),
        (("x_a_to_b", 1, (MMA,), ()), "expected either who empties a buffer or the edge that proves it"),
        (("x_a_to_b", 1, (), (MMA,)), "expected someone to fill it"),
    ],
)
def test_contradictions_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineEdge(*arguments)


def test_a_wrong_party_or_name_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 warp for COMMIT"):
        Party("mma", Signal.COMMIT, 4)
    edge = PipelineEdge("x_a_to_b", 1, (MMA,), drained_by="y_b_to_a")
    with pytest.raises(ValueError, match="expected drained_by to name an edge, got 'y_b_to_a'"):
        EdgeBarriers((edge,), 0)
    edges = (edge, PipelineEdge("y_b_to_a", 1, (Party("b", Signal.WARPS, 2),), (MMA,)))
    with pytest.raises(ValueError, match="distinct names, got x_a_to_b twice"):
        EdgeBarriers((*edges, edge), 0)
    with pytest.raises(ValueError, match="y_b_to_a proves"):
        EdgeBarriers(edges, 0).empty_offset("x_a_to_b")
