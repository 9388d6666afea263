"""Hopper prefill kernel: K and V in pages or without, packed query heads; one persistent CTA an SM takes tiles from the work list until
none is left.

work list -> load warps --(Q, K, V by TMA)--> shared memory -> consumer warpgroups -> out, lse

K and V in FP8 come by a single load warp, and convert warps bring them to 16 bits on their way to the consumers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils.hopper_helpers import make_trivial_tiled_mma

from fa4_backend.kernels.common.block_info import BlockInfo
from fa4_backend.kernels.common.mask import MaskSpec, MaskValues
from fa4_backend.kernels.common.output_store import OutputStore
from fa4_backend.kernels.common.pack_gqa import PackGqa
from fa4_backend.kernels.common.padding_rows import zero_rows
from fa4_backend.kernels.common.paged_kv import KvPages, PagedKv
from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.common.ragged_kv import RaggedKv
from fa4_backend.kernels.common.ring import RingSlots
from fa4_backend.kernels.common.seqlen_info import SeqlenBounds
from fa4_backend.kernels.common.tile_scheduler import PartTensors
from fa4_backend.kernels.launch_abi import prefill_fakes
from fa4_backend.kernels.schedule.work_list import QUEUE_OWN
from fa4_backend.kernels.sm90.arguments import Outputs, Step
from fa4_backend.kernels.sm90.block_weights import BlockWeights
from fa4_backend.kernels.sm90.config import Sm90Config
from fa4_backend.kernels.sm90.consumer_state import SharedTiles
from fa4_backend.kernels.sm90.consumer_warpgroup import ConsumerWarpgroup
from fa4_backend.kernels.sm90.convert_warps import ConvertWarps, SharedBuffers
from fa4_backend.kernels.sm90.load_warp import LoadWarp, QueryOperand
from fa4_backend.kernels.sm90.part_shares import PartShares
from fa4_backend.kernels.sm90.query_rows import QueryRows
from fa4_backend.kernels.sm90.staging import STAGE_INTS, converts_query, staging_slots
from fa4_backend.kernels.sm90.staging_warp import StagingWarp
from fa4_backend.kernels.sm90.storage import Storage
from fa4_backend.kernels.sm90.tile_end import TileEnd
from fa4_backend.kernels.sm90.tile_numbers import WORK_INTS
from fa4_backend.kernels.sm90.tile_parts import TileParts
from fa4_backend.kernels.sm90.tile_pieces import TilePieces
from fa4_backend.kernels.sm90.value_rows import ValueRows
from fa4_backend.kernels.sm90.warp_roles import WARPGROUP_THREADS, WGMMA_ROWS, WORK_STAGE, WarpRoles
from fa4_backend.problem import RAGGED


class TmaTensor(NamedTuple):
    """A TMA copy and its coordinate tensor."""

    atom: cute.CopyAtom
    mX: cute.Tensor  # (num_q_heads, total_q, head_dim) of Q; of K and V as their boxes want it (`PagedKv`, `RaggedKv`)


@dataclass(frozen=True)
class PrefillKernel:
    """The kernel of one config; `__call__` is the host side."""

    config: PrefillConfig

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,  # (total_q, num_q_heads, head_dim)
        mK: cute.Tensor,  # (num_pages, page_size, num_kv_heads, head_dim); without pages (total_k, num_kv_heads, head_dim)
        mV: cute.Tensor,  # likewise, head_dim_v
        mPageTable: cute.Tensor | None,  # (batch, max_pages_per_seq) int32; None without pages
        mCuSeqlensK: cute.Tensor | None,  # (batch + 1,) int32; None with pages
        mCuSeqlensQ: cute.Tensor,  # (batch + 1,) int32
        mTiles: cute.Tensor,  # (max_tiles, TILE_INTS) int32, see fa4_backend.kernels.schedule.work_list
        mQueue: cute.Tensor,  # (1, QUEUE_INTS) int32
        mPartSlots: cute.Tensor | None,  # (max_part_slots + own_part_slots, part_floats) float32
        mPartArrivals: cute.Tensor | None,  # (max_part_slots, PART_COUNTERS) int32
        mO: cute.Tensor,  # (total_q, num_q_heads, head_dim_v)
        mLse: cute.Tensor | None,  # (num_q_heads, total_q) float32
        mSinks: cute.Tensor | None,  # (num_q_heads,)
        mSlopes: cute.Tensor | None,  # (num_q_heads,) float32
        mKScale: cute.Tensor | None,  # (num_kv_heads,) float32
        mVScale: cute.Tensor | None,  # (num_kv_heads,) float32
        mOutScale: cute.Tensor | None,  # (1,) float32
        mQScale: None,  # q has the dtype of the model
        softmax_scale: Float32,
        softcap: Float32,
        window_left: Int32,
        window_right: Int32,
        num_groups: Int32,
        stream,
    ):
        """Launch `num_groups` CTAs. Values that the config leaves out are ignored."""
        c, storage = self.config, Storage(self.config)
        pack, k_boxes, v_boxes = self._geometry(storage)
        q = TmaTensor(*pack.make_tma(mQ, storage.row_atom(c.head_dim).inner))
        swizzles = [cute.make_swizzle(0, 4, 3) if c.converts_kv else storage.row_atom(d).inner for d in (c.head_dim, c.head_dim_v)]
        k, v = TmaTensor(*k_boxes.make_tma(mK, swizzles[0])), TmaTensor(*v_boxes.make_tma(mV, swizzles[1]))
        if const_expr(c.kv_source == RAGGED):
            pages, bounds = None, SeqlenBounds.of_ragged(mO, mK, mCuSeqlensK)
        else:
            pages = KvPages(mPageTable, Int32(cute.size(mK, mode=[1])), Int32(cute.size(mK, mode=[0])))
            bounds = SeqlenBounds.of(mO, mPageTable, pages.page_size)
        step = Step(pages, mCuSeqlensQ, mTiles, mQueue, bounds, mKScale, mVScale, mOutScale)
        values = MaskSpec(c.mask).values(softmax_scale, softcap, window_left, window_right)
        outputs = Outputs(mO, mLse, mSinks, mSlopes, PartTensors(mPartSlots, mPartArrivals))
        groups = (WarpRoles.of(c).num_consumers, 1, 1)
        major = warpgroup.OperandMajorMode
        qk = make_trivial_tiled_mma(
            storage.key_dtype, storage.key_dtype, major.K, major.K, Float32, groups, (WGMMA_ROWS, c.tile.tile_n)
        )  # fmt: skip
        pv = make_trivial_tiled_mma(
            storage.value_dtype, storage.value_dtype, major.K, major.MN, Float32, groups,
            (WGMMA_ROWS, min(c.head_dim_v, c.tile.value_columns)),
            a_source=warpgroup.OperandSource.RMEM,
        )  # fmt: skip
        self.kernel(q, k, v, qk, pv, step, values, outputs).launch(
            grid=[num_groups, 1, 1],
            block=[WarpRoles.of(c).threads, 1, 1],
            min_blocks_per_mp=1,
            use_pdl=c.is_dependent,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        q: TmaTensor,
        k: TmaTensor,
        v: TmaTensor,
        qk: cute.TiledMma,
        pv: cute.TiledMma,
        step: Step,
        values: MaskValues,
        outputs: Outputs,
    ):
        """Set up shared memory and barriers, then send each warpgroup to its role."""
        c, storage, roles = self.config, Storage(self.config), WarpRoles.of(self.config)
        pack, k_boxes, v_boxes = self._geometry(storage)
        blocks = BlockInfo.of(c)
        shared = cutlass.utils.SmemAllocator().allocate(storage.struct())
        barrier_base = shared.barriers.data_ptr()
        barriers = storage.barriers(barrier_base)
        sWork = shared.work.get_tensor(cute.make_layout((WORK_INTS, WORK_STAGE)))
        sQ, sKV = shared.q.data_ptr(), shared.kv.data_ptr()
        sRowScales = None
        if const_expr(converts_query(c)):
            sRowScales = shared.row_scales.get_tensor(cute.make_layout((c.tile.tile_m, WORK_STAGE)))
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == 0:
            for tensor in (q, k, v):
                cpasync.prefetch_descriptor(tensor.atom)
            with cute.arch.elect_one():
                storage.init_barriers(barrier_base)
        cute.arch.sync_threads()
        if warp < roles.first_consumer_warp:
            cute.arch.setmaxregister_decrease(roles.load_registers)
            # K and V by a warp each: one warp that issues every 16-row box holds up the consumers of its scheduler
            # (H200, page 16, 1 x 32K: 605 to 623 TFLOP/s).
            load = LoadWarp(storage, blocks, pack, k_boxes, v_boxes, TilePieces(c.piece_blocks))
            if const_expr(c.converts_kv):
                sFp8 = shared.fp8.data_ptr()
                sNotes = shared.notes.get_tensor(cute.make_layout((STAGE_INTS, staging_slots(c))))
                if warp == 0:
                    operands = k_boxes.partition(*k, sFp8), v_boxes.partition(*v, sFp8)
                    StagingWarp(load).run(step, values, QueryOperand(*q, sQ), operands, barriers, sWork, sNotes)
                else:
                    ConvertWarps(storage, roles.convert_warps).run(SharedBuffers(sFp8, sKV, sNotes), barriers, warp - 1)
            else:
                operands = k_boxes.partition(*k, sKV), v_boxes.partition(*v, sKV)
                for loads_v in cutlass.range_constexpr(2):
                    if warp == loads_v:
                        load.run(step, values, QueryOperand(*q, sQ), operands, barriers, sWork, loads_v)
            if const_expr(c.is_dependent):
                # Whoever waits for this grid in the stream waits for the decode kernel too.
                cute.arch.griddepcontrol_wait()
            if warp == 2:
                if const_expr(not c.is_dependent) or step.mQueue[0, QUEUE_OWN] > 0:
                    zero_rows(step.mCuSeqlensQ[cute.size(step.mCuSeqlensQ) - 1], outputs.mO, outputs.mLse)
        else:
            cute.arch.setmaxregister_increase(roles.consumer_registers)
            part = c.part_elems(c.head_dim_v)
            output = OutputStore(pack, WGMMA_ROWS, c.tile.tile_m, WARPGROUP_THREADS, c.head_dim_v, part, c.element_bytes)
            parts = TileParts(c)
            tile_end = TileEnd(c, roles, storage, pack, output, parts, PartShares(c, pack, parts))
            value_rows = ValueRows(c, roles, storage, blocks)
            weights = BlockWeights(c, blocks)
            consumer = ConsumerWarpgroup(c, roles, storage, blocks, pack, weights, value_rows, tile_end, QueryRows(storage))
            consumer.run(qk, pv, SharedTiles(sQ, sKV, sWork, sRowScales), barriers, values, outputs)

    def _geometry(self, storage: Storage) -> tuple[PackGqa, PagedKv | RaggedKv, PagedKv | RaggedKv]:
        """How Q, K and V lie in global and shared memory."""
        c = self.config
        boxes: list[PagedKv | RaggedKv] = []
        for head_dim, is_v in ((c.head_dim, False), (c.head_dim_v, True)):
            # FP8 is staged row after row, whole heads.
            part, slots = c.part_elems(head_dim), storage.tile_slots
            if c.converts_kv:
                part, slots = head_dim, RingSlots(staging_slots(c), storage.slot_elems, storage.slot_elems)
            parts, whole_rows = head_dim // part, is_v or c.converts_kv
            if c.kv_source == RAGGED:
                boxes.append(RaggedKv(c.tile.tile_n, part, parts, slots))
            else:
                boxes.append(PagedKv(c.tile.tile_n, c.box_rows, part, parts, slots, whole_rows))
        return PackGqa.of(c), boxes[0], boxes[1]


def build(config: Sm90Config) -> tuple[PrefillKernel, tuple]:
    """Host function and fake arguments of `config` (see `fa4_backend.compile`)."""
    return PrefillKernel(config.kernel), prefill_fakes(config.kernel, config.part_floats)
