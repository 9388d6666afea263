"""From a block's scores to weights, for a consumer warpgroup: score features, the mask, the softmax and what it does to O."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from fa4_backend.kernels.common.block_info import BlockInfo
from fa4_backend.kernels.common.mask import MaskValues
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.wgmma_fragment import FIXED_CAP, FP8_LIFT, HEADROOM, CapScale, RowFragment, RowStats, ScoreScale
from fa4_backend.kernels.sm90.consumer_state import Products, TileState


@dataclass(frozen=True)
class BlockWeights:
    """Elementwise work of a block, in registers: rS, (MMA, 1, column tiles) float32, its scores and then weights; factors, (2,)."""

    config: PrefillConfig
    blocks: BlockInfo

    @property
    def fragment(self) -> RowFragment:
        """The arithmetic of a block's scores."""
        c = self.config
        lift = FP8_LIFT if c.converts_kv else -HEADROOM if c.may_fix_reference else 0.0
        assert lift == 0.0 or not self._asks_first, f"{lift=} {c.tile=}"
        return RowFragment(c.tile.tile_n, c.tile.rescale_threshold, lift)

    def first(
        self,
        rS: cute.Tensor,
        stats: RowStats,
        tile: TileState,
        values: MaskValues,
    ) -> None:
        """Weights of a tile's first block (its last keys), in place, and the tile's statistics."""
        self.transform(rS, tile.blocks.end - 1, values, tile, True)
        factors = cute.make_rmem_tensor(2, Float32)
        self.weigh(rS, stats, factors, tile, values, may_be_empty=True, is_first=True)

    def weigh(
        self,
        rS: cute.Tensor,
        stats: RowStats,
        factors: cute.Tensor,
        tile: TileState,
        values: MaskValues,
        *,
        may_be_empty: bool,
        is_first: bool,
    ) -> Boolean:
        """What `transform` leaves to weights, in place, and the statistics; `factors`, (2,), receives what `rescale` wants. Returns
        whether a row of the warp needs it."""
        c = self.config
        if c.may_fix_reference:
            moves = self._capped(rS, stats, factors, values, may_be_empty, is_first)
        elif self._asks_first and not may_be_empty:
            return self._stable(rS, stats, factors, tile, values)
        else:
            scales = self._weight_scales(tile, values)
            made = self.fragment.softmax(rS, stats, scales, may_be_empty=may_be_empty, is_first=is_first, by_reference=self._asks_first)
            factors[0], factors[1] = made[0], made[1]
            moves = (factors[0] != 1.0) | (factors[1] != 1.0)
        return cute.arch.vote_any_sync(moves) if c.may_skip_rescale and not is_first else Boolean(True)

    @property
    def _asks_first(self) -> bool:
        """Whether whole blocks are weighed behind a vote. Rows are the same bits whichever way: only who compares maxima differs."""
        return self.config.tile.asks_first and not self.config.mask.has_softcap

    @cute.jit
    def _stable(
        self,
        rS: cute.Tensor,
        stats: RowStats,
        factors: cute.Tensor,
        tile: TileState,
        values: MaskValues,
    ) -> Boolean:
        """Of a block that all rows see whole: the warp asks whether a lane's largest score moves a reference before quads compare theirs,
        since few blocks do."""
        fragment, scales = self.fragment, self._weight_scales(tile, values)
        maxima = cute.make_rmem_tensor(2, Float32)
        moves = cute.arch.vote_any_sync(fragment.growth(rS, stats, scales, maxima))
        factors.fill(1.0)
        if moves:
            fragment.move(stats, scales, maxima, factors)
        fragment.weigh(rS, stats, scales, factors)
        return moves

    @cute.jit
    def _capped(
        self,
        rS: cute.Tensor,
        stats: RowStats,
        factors: cute.Tensor,
        values: MaskValues,
        may_be_empty: cutlass.Constexpr[bool],
        is_first: cutlass.Constexpr[bool],
    ) -> Boolean:
        """Relative to the first block's reference, or to a running one where the cap is too wide for that. `factors` receives sums of a
        lane's weights, or factors of O; returns whether a row of the lane needs them."""
        fragment, scale = self.fragment, CapScale.of_call(values.softcap)
        moves = Boolean(False)
        if values.softcap <= FIXED_CAP:
            moves = fragment.bounded_softmax(rS, stats, scale, factors, finds_reference=may_be_empty, is_first=is_first)
        else:
            made = fragment.softmax(rS, stats, scale, may_be_empty=may_be_empty, is_first=is_first)
            factors[0], factors[1] = made[0], made[1]
            moves = (factors[0] != 1.0) | (factors[1] != 1.0)
        return moves

    @cute.jit
    def rescale(
        self,
        products: Products,
        rS: cute.Tensor,
        stats: RowStats,
        factors: cute.Tensor,
        moves: Boolean,
        values: MaskValues,
    ):
        """Multiply O's rows by their factors; where few blocks move a reference, only if a row of the warp `moves`."""
        rows = RowFragment(self.config.head_dim_v, 0.0)
        if const_expr(not self.config.may_skip_rescale):
            rows.rescale(products.rO, factors)
        elif moves:
            if const_expr(self.config.may_fix_reference):
                if values.softcap <= FIXED_CAP:
                    self.fragment.lower(rS, stats, factors)
            rows.rescale(products.rO, factors)

    def score_scales(self, tile: TileState) -> tuple[ScoreScale, ScoreScale] | None:
        """Of raw logits of both rows; None where something is added to them or bounds them first."""
        c = self.config
        if c.mask.has_softcap or c.mask.has_alibi:
            return None
        return tuple(ScoreScale.of_row(x) for x in tile.log2_scales) if c.converts_kv else (tile.scale, tile.scale)

    def _weight_scales(self, tile: TileState, values: MaskValues) -> tuple[ScoreScale, ScoreScale] | CapScale | None:
        """From what `transform` leaves to log2 units; None: there already."""
        is_capped = self.config.mask.has_softcap and not self.config.mask.has_alibi
        return CapScale.of_call(values.softcap) if is_capped else self.score_scales(tile)

    def transform(self, rS: cute.Tensor, n_block: Int32, values: MaskValues, tile: TileState, is_masked: bool) -> None:
        """Soft cap, ALiBi and mask, in place; biased scores leave in log2 units, capped ones as `CapScale` reads them."""
        c, fragment = self.config, self.fragment
        first_column = n_block * c.tile.tile_n
        if const_expr(c.mask.has_softcap):
            fragment.softcap(rS, tile.softmax_scales, values.softcap)
            if const_expr(c.mask.has_alibi):
                fragment.to_log2(rS, CapScale.of_call(values.softcap))
        elif const_expr(c.mask.has_alibi):
            fragment.scale(rS, tile.softmax_scales)
        if const_expr(c.mask.has_alibi):
            fragment.alibi(rS, first_column, tile.diagonals, tile.slopes)
        if const_expr(is_masked):
            fragment.mask_by_bits(rS, first_column, tile.columns, has_begin=self.blocks.mask.has_left)
