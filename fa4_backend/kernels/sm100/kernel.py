"""Blackwell prefill kernel (sm_100a, sm_103a): FlashAttention-4 forward over K and V in pages or without, packed query heads.

One persistent CTA an SM takes items from the work list until none is left: 16 warps in six roles (`warp_roles`), tied by mbarriers
(`common.edges`).
The host function has the arguments of `fa4_backend.kernels.sm90.kernel`.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.cute.nvgpu import cpasync

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import tcgen05_ops
from fa4_backend.kernels.common.cta_group import LEADER
from fa4_backend.kernels.common.hardware import SWIZZLE_ALIGN
from fa4_backend.kernels.common.mask import MaskSpec
from fa4_backend.kernels.common.padding_rows import zero_rows
from fa4_backend.kernels.common.paged_kv import KvPages
from fa4_backend.kernels.common.seqlen_info import SeqlenBounds
from fa4_backend.kernels.common.tile_scheduler import PartTensors, read_queue, wait_alone
from fa4_backend.kernels.launch_abi import prefill_fakes
from fa4_backend.kernels.schedule.work_list import QUEUE_OWN
from fa4_backend.kernels.sm100.config import Sm100Config
from fa4_backend.kernels.sm100.convert_warps import ConvertWarps
from fa4_backend.kernels.sm100.correction_warps import CorrectionWarps
from fa4_backend.kernels.sm100.epilogue_warp import EpilogueWarp
from fa4_backend.kernels.sm100.load_warp import LoadWarp, Operands, make_kv_atom, make_q_atom
from fa4_backend.kernels.sm100.lone_tile_mma_warp import LoneTileMmaWarp
from fa4_backend.kernels.sm100.mma_warp import MmaWarp
from fa4_backend.kernels.sm100.softmax_warps import SoftmaxWarps
from fa4_backend.kernels.sm100.tmem_layout import TMEM_BASE
from fa4_backend.kernels.sm100.value_tail_warp import ValueTailWarp
from fa4_backend.kernels.sm100.warp_roles import ROLES, WARPGROUP
from fa4_backend.kernels.sm100.work import Geometry, HeadTensors, Place, WorkTensors
from fa4_backend.problem import RAGGED

O_STAGE = 1  # buffers of finished tiles; the shared memory that a second one would take holds a KV stage


@dataclass(frozen=True)
class PrefillKernel:
    """The kernel of one config; `__call__` is the host side."""

    config: Sm100Config

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
        mPartSlots: cute.Tensor | None,  # (max_part_slots, part_floats) float32; None: items are not cut along KV
        mPartArrivals: cute.Tensor | None,  # (max_part_slots, PART_COUNTERS) int32
        mO: cute.Tensor,  # (total_q, num_q_heads, head_dim_v)
        mLse: cute.Tensor | None,  # (num_q_heads, total_q) float32
        mSinks: cute.Tensor | None,  # (num_q_heads,)
        mSlopes: cute.Tensor | None,  # (num_q_heads,) float32
        mKScale: cute.Tensor | None,  # (num_kv_heads,) float32
        mVScale: cute.Tensor | None,  # (num_kv_heads,) float32
        mOutScale: cute.Tensor | None,  # (1,) float32
        mQScale: cute.Tensor | None,  # (num_kv_heads,) float32
        softmax_scale: Float32,
        softcap: Float32,
        window_left: Int32,
        window_right: Int32,
        num_groups: Int32,
        stream,
    ):
        """Launch `num_groups` CTAs, or CTA pairs. Values that the config leaves out are ignored."""
        kernel, ctas = self.config.kernel, self.config.tuning.cta_group
        if const_expr(kernel.kv_source == RAGGED):
            pages, bounds = None, SeqlenBounds.of_ragged(mO, mK, mCuSeqlensK)
        else:
            pages = KvPages(mPageTable, Int32(cute.size(mK, mode=[1])), Int32(cute.size(mK, mode=[0])))
            bounds = SeqlenBounds.of(mO, mPageTable, pages.page_size)
        operands = Operands(
            make_q_atom(mQ, self.config.part_elems, kernel.q_per_kv, kernel.tokens_per_tile),
            make_kv_atom(mK, self.config.loaded_elems, self.config.k_box_rows),
            make_kv_atom(mV, self.config.loaded_elems, kernel.box_rows),
            pages,
        )
        values = MaskSpec(kernel.mask).values(softmax_scale, softcap, window_left, window_right)
        work = WorkTensors(mTiles, mQueue, mCuSeqlensQ, values, bounds, PartTensors(mPartSlots, mPartArrivals))
        heads = HeadTensors(mLse, mSinks, mSlopes, mQScale, mKScale, mVScale, mOutScale)
        self.kernel(operands, work, heads, mO).launch(
            grid=[num_groups * ctas, 1, 1],
            cluster=[ctas, 1, 1] if ctas > 1 else None,
            block=[ROLES.num_threads, 1, 1],
            smem=Geometry.of(self.config, O_STAGE).storage.num_bytes,
            min_blocks_per_mp=1,
            use_pdl=kernel.is_dependent,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        operands: Operands,
        work: WorkTensors,
        heads: HeadTensors,
        mO: cute.Tensor,  # (total_q, num_q_heads, head_dim_v)
    ):
        """Set up barriers and TMEM, then send each warp to its role."""
        g, tuning = Geometry.of(self.config, O_STAGE), self.config.tuning
        smem_base = Int32(cute.arch.get_dyn_smem(cutlass.Int8, alignment=SWIZZLE_ALIGN).toint())
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane_idx = cute.arch.lane_idx()
        if warp_idx == ROLES.load:
            for atom in (operands.q_atom, operands.k_atom, operands.v_atom):
                cpasync.prefetch_descriptor(atom)
            if lane_idx == 0:
                for offset, count in g.storage.barriers.initial_counts():
                    ptx.mbarrier_init(smem_base + offset, count)
                cute.arch.mbarrier_init_fence()
        if warp_idx == ROLES.mma:
            g.group.tmem_alloc(smem_base + g.storage.tmem_pointer, g.tmem.allocated)
        tcgen05_ops.fence_before_sync()
        g.group.sync_all()
        tcgen05_ops.fence_after_sync()
        place = Place(smem_base, g.group.leader_base(smem_base), g.group.rank(), Int32(TMEM_BASE), warp_idx, lane_idx)
        if warp_idx < ROLES.softmax_first + WARPGROUP * self.config.q_tiles:
            cute.arch.setmaxregister_increase(tuning.softmax_registers)
            SoftmaxWarps(g).run(place, work, heads)
        elif warp_idx < ROLES.correction_first:
            cute.arch.setmaxregister_decrease(tuning.other_registers)  # of a lone query tile: no second group
        elif warp_idx < ROLES.mma:
            cute.arch.setmaxregister_decrease(tuning.correction_registers)
            correction = CorrectionWarps(g, O_STAGE)
            if const_expr(self.config.converts):
                ConvertWarps(g, correction).run(place, work, heads)
            else:
                correction.run(place, work, heads)
        else:
            cute.arch.setmaxregister_decrease(tuning.other_registers)
            if warp_idx == ROLES.mma:
                if const_expr(g.group.ctas == 1) or place.cta_rank == LEADER:
                    (MmaWarp(g) if self.config.q_tiles > 1 else LoneTileMmaWarp(g)).run(place, work)
            elif warp_idx == ROLES.load:
                LoadWarp(g).run(place, work, operands)
            elif warp_idx == ROLES.epilogue:
                EpilogueWarp(g, O_STAGE).run(place, work, mO)
            else:
                if const_expr(not self.config.converts):
                    ValueTailWarp(g).run(place, work)
                wait_alone(read_queue(work.mQueue), self.config.kernel.is_dependent)
                if const_expr(not self.config.kernel.is_dependent) or work.mQueue[0, QUEUE_OWN] > 0:
                    zero_rows(work.mCuSeqlensQ[cute.size(work.mCuSeqlensQ) - 1], mO, heads.mLse)
        tcgen05_ops.fence_before_sync()
        g.group.sync_all()
        if warp_idx == ROLES.mma:
            tcgen05_ops.fence_after_sync()
            g.group.tmem_dealloc(place.tmem_base, g.tmem.allocated)
        if const_expr(self.config.kernel.is_dependent):
            # Whoever waits for this grid in the stream waits for the decode kernel too.
            cute.arch.griddepcontrol_wait()


def build(config: Sm100Config) -> tuple[PrefillKernel, tuple]:
    """Host function and fake arguments of `config` (see `fa4_backend.compile`)."""
    return PrefillKernel(config), prefill_fakes(config.kernel, config.part_floats)
