"""The arguments of each kernel's launch, in their order, stated once: what a call passes and what tracing is given in its place.

The names are those of the host functions' parameters (`__call__` of each family's `kernel`);
`tests/host/test_launch_abi.py` holds them to it. Imports no compiler; `*_fakes` do when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fa4_backend.kernels.convert_kv.config import CTAS_PER_SM
from fa4_backend.kernels.mla_decode.config import LATENT_DIM, ROPE_DIM
from fa4_backend.kernels.schedule.params import ScheduleParams
from fa4_backend.kernels.schedule.work_list import DECODE_INTS, NO_WINDOW, PART_COUNTERS, QUEUE_INTS, TILE_INTS, WorkLists
from fa4_backend.problem import DTYPE_BYTES, FP8, RAGGED

if TYPE_CHECKING:
    from fa4_backend.arguments import AttentionArguments, LatentArguments
    from fa4_backend.kernels.common.prefill_config import PrefillConfig
    from fa4_backend.kernels.convert_kv.config import ConvertConfig
    from fa4_backend.kernels.decode.config import DecodeConfig
    from fa4_backend.kernels.mla_decode.config import MlaDecodeConfig
    from fa4_backend.kernels.schedule.work_list import WorkShape


class ScheduleArguments(NamedTuple):
    """A launch of the schedule, once a step."""

    cu_seqlens_q: Any  # (batch + 1,) int32
    seqused_k: Any  # (batch,) int32
    prefill_tiles: Any  # (max_prefill_tiles, TILE_INTS) int32
    prefill_queue: Any  # (1, QUEUE_INTS) int32
    decode_tiles: Any  # (max_decode_tiles, DECODE_INTS) int32
    decode_first: Any  # (decode_num_ctas, DECODE_INTS) int32
    arrivals: Any  # (max_slots,) int32
    part_arrivals: Any  # (max(1, max_part_slots), PART_COUNTERS) int32
    key_starts: Any  # (max_num_seqs + 1,) int32, written where `params.convert_keys` is not 0
    params: ScheduleParams


class ConvertArguments(NamedTuple):
    """A conversion of the K and V of a step's prefill rows, before its prefill launch."""

    mK: Any  # (num_pages, page_size, num_kv_heads, head_dim) e4m3
    mV: Any  # (num_pages, page_size, num_kv_heads, head_dim_v) e4m3
    mPageTable: Any  # (batch, max_pages_per_seq) int32
    mKeyStarts: Any  # (batch + 1,) int32
    mCuSeqlensQ: Any  # (batch + 1,) int32
    mKeys: Any  # (max_keys, num_kv_heads, head_dim)
    mValues: Any  # (max_keys, num_kv_heads, head_dim_v)
    window_left: Any  # int32; NO_WINDOW: none
    num_ctas: Any  # int32


class PrefillArguments(NamedTuple):
    """A prefill launch over one work list."""

    mQ: Any  # (total_q, num_q_heads, head_dim)
    mK: Any  # (num_pages, page_size, num_kv_heads, head_dim); without pages (total_k, num_kv_heads, head_dim)
    mV: Any  # likewise, head_dim_v
    mPageTable: Any  # (batch, max_pages_per_seq) int32; None where K and V have no pages
    mCuSeqlensK: Any  # (batch + 1,) int32; None where they have
    mCuSeqlensQ: Any  # (batch + 1,) int32
    mTiles: Any  # (max_tiles, TILE_INTS) int32
    mQueue: Any  # (1, QUEUE_INTS) int32
    mPartSlots: Any  # (max_part_slots + own_part_slots, part_floats) float32; None where the config has no parts
    mPartArrivals: Any  # (max_part_slots, PART_COUNTERS) int32; None where the config has no parts
    mO: Any  # (total_q, num_q_heads, head_dim_v)
    mLse: Any  # (num_q_heads, total_q) float32, natural log; None where the config has no lse
    mSinks: Any  # (num_q_heads,); None where the config has no sinks
    mSlopes: Any  # (num_q_heads,) float32; None where the config has no ALiBi
    mKScale: Any  # (num_kv_heads,) float32, any stride; None where K and V neither are FP8 nor were
    mVScale: Any  # (num_kv_heads,) float32, any stride; likewise
    mOutScale: Any  # (1,) float32; None where out is not FP8
    mQScale: Any  # (num_kv_heads,) float32, any stride; None where q is not FP8
    softmax_scale: Any  # float32, multiplies raw logits
    softcap: Any  # float32
    window_left: Any  # int32
    window_right: Any  # int32
    num_groups: Any  # int32, CTAs of the launch, or CTA pairs


class DecodeArguments(NamedTuple):
    """A decode launch over the step's decode list; partial results go through the split-KV slots."""

    mQ: Any  # (total_q, num_q_heads, head_dim)
    mK: Any  # (num_pages, page_size, num_kv_heads, head_dim)
    mV: Any  # (num_pages, page_size, num_kv_heads, head_dim_v)
    mPageTable: Any  # (batch, max_pages_per_seq) int32
    mO: Any  # (total_q, num_q_heads, head_dim_v)
    mLse: Any  # (num_q_heads, total_q) float32, natural log; None where the config has no lse
    mTiles: Any  # (max_decode_tiles, DECODE_INTS) int32
    mFirst: Any  # (decode_num_ctas, DECODE_INTS) int32
    mSlots: Any  # (max_slots, slot_floats) float32
    mArrivals: Any  # (max_slots,) int32
    mSinks: Any  # (num_q_heads,); None where the config has no sinks
    mSlopes: Any  # (num_q_heads,) float32; None where the config has no ALiBi
    mKScale: Any  # (num_kv_heads,) float32, any stride; None where K and V are not FP8
    mVScale: Any  # (num_kv_heads,) float32, any stride; None where K and V are not FP8
    mOutScale: Any  # (1,) float32; None where out is not FP8
    mQScale: Any  # (num_kv_heads,) float32, any stride; None where q is not FP8
    softmax_scale: Any  # float32, multiplies raw logits
    softcap: Any  # float32
    window_left: Any  # int32
    window_right: Any  # int32
    split_blocks: Any  # int32, KV tiles of a long piece in batch-invariant mode


class MlaDecodeArguments(NamedTuple):
    """A latent decode launch over the step's decode list, whose row groups are tiles of packed rows; split KV as in `DecodeArguments`."""

    mQ: Any  # (total_q, num_q_heads, 512)
    mQRope: Any  # (total_q, num_q_heads, 64)
    mLatent: Any  # (num_pages, page_size, 576)
    mPageTable: Any  # (batch, max_pages_per_seq) int32
    mO: Any  # (total_q, num_q_heads, 512)
    mLse: Any  # (num_q_heads, total_q) float32, natural log; None where the config has no lse
    mTiles: Any  # (max_decode_tiles, DECODE_INTS) int32
    mFirst: Any  # (decode_num_ctas, DECODE_INTS) int32
    mSlots: Any  # (max_slots, slot_floats) float32
    mArrivals: Any  # (max_slots,) int32
    mScale: Any  # (1,) float32: a latent is what is stored times it; None unless latents are FP8
    softmax_scale: Any  # float32, multiplies raw logits
    split_blocks: Any  # int32, KV tiles of a long piece in batch-invariant mode


def schedule_arguments(
    work: WorkLists,
    cu_seqlens_q: Any,
    seqused_k: Any,
    *,
    window_left: int = NO_WINDOW,
    window_right: int = 0,
    shape: WorkShape | None = None,
) -> ScheduleArguments:
    """A call of the schedule, which makes both lists of `work` from a step's lengths.

    Args:
        cu_seqlens_q: (batch + 1,) int32.
        seqused_k: (batch,) int32.
        window_left: keys before the diagonal that any row of the step sees. A window wider than a layer's is correct for it, since the
            kernels apply their own.
        window_right: keys after the diagonal, likewise; 0 for causal attention.
        shape: what the step's kernels ask of the lists; default: what the lists were made for.
    """
    params = (shape or work.shape).params(window_left, window_right)
    return ScheduleArguments(
        cu_seqlens_q, seqused_k, work.prefill_tiles, work.prefill_queue, work.decode_tiles,
        work.decode_first, work.arrivals, work.part_arrivals, work.key_starts, params,
    )  # fmt: skip


def convert_arguments(a: AttentionArguments, work: WorkLists, keys: Any, values: Any) -> ConvertArguments:
    """A call of the conversion; keys, values: the workspace."""
    assert work.key_starts is not None and a.page_table is not None
    key_starts = work.key_starts[: a.page_table.shape[0] + 1]
    window_left = NO_WINDOW if a.window_left is None else a.window_left
    return ConvertArguments(
        a.k_cache, a.v_cache, a.page_table, key_starts, a.cu_seqlens_q, keys, values, window_left, CTAS_PER_SM * work.shape.num_sms
    )


def converted_arguments(a: AttentionArguments, work: WorkLists, keys: Any, values: Any) -> PrefillArguments:
    """A call of a prefill kernel over what the conversion wrote."""
    assert work.key_starts is not None and a.page_table is not None
    key_starts = work.key_starts[: a.page_table.shape[0] + 1]
    return prefill_arguments(a._replace(k_cache=keys, v_cache=values, page_table=None, cu_seqlens_k=key_starts), work)


def prefill_arguments(a: AttentionArguments, work: WorkLists) -> PrefillArguments:
    """A call of a prefill kernel over the step's list."""
    part_arrivals = None if work.part_slots is None else work.part_arrivals
    return PrefillArguments(
        a.q, a.k_cache, a.v_cache, a.page_table, a.cu_seqlens_k, a.cu_seqlens_q,
        work.prefill_tiles, work.prefill_queue, work.part_slots, part_arrivals, a.out, a.lse,
        a.sinks, a.alibi_slopes, a.k_scale, a.v_scale, a.out_scale, a.q_scale,
        a.softmax_scale, a.softcap, a.window_left or 0, a.window_right or 0, work.shape.prefill_groups,
    )  # fmt: skip


def decode_arguments(a: AttentionArguments, work: WorkLists) -> DecodeArguments:
    """A call of the decode kernel over the step's list."""
    return DecodeArguments(
        a.q, a.k_cache, a.v_cache, a.page_table, a.out, a.lse, work.decode_tiles, work.decode_first, work.slots, work.arrivals,
        a.sinks, a.alibi_slopes, a.k_scale, a.v_scale, a.out_scale, a.q_scale,
        a.softmax_scale, a.softcap, a.window_left or 0, a.window_right or 0,
        work.shape.split_blocks,
    )  # fmt: skip


def mla_decode_arguments(a: LatentArguments, work: WorkLists) -> MlaDecodeArguments:
    """A call of the latent decode kernel over the step's list."""
    return MlaDecodeArguments(
        a.q, a.q_rope, a.latent_cache, a.page_table, a.out, a.lse, work.decode_tiles, work.decode_first, work.slots, work.arrivals,
        a.latent_scale, a.softmax_scale, work.shape.split_blocks,
    )  # fmt: skip


def schedule_fakes() -> tuple[Any, ...]:
    """Arguments to trace the schedule with, the stream behind them."""
    fake = _Fakes()
    arguments = ScheduleArguments(
        cu_seqlens_q=fake.numbers(),
        seqused_k=fake.numbers(),
        prefill_tiles=fake.entries(TILE_INTS),
        prefill_queue=fake.entries(QUEUE_INTS),
        decode_tiles=fake.entries(DECODE_INTS),
        decode_first=fake.entries(DECODE_INTS),
        arrivals=fake.numbers(),
        part_arrivals=fake.entries(PART_COUNTERS),
        key_starts=fake.numbers(),
        params=ScheduleParams(*(fake.int32(0) for _ in ScheduleParams._fields)),
    )
    return (*arguments, fake.stream())


def convert_fakes(config: ConvertConfig) -> tuple[Any, ...]:
    """Arguments to trace a conversion with, the stream behind them; shapes and strides stay symbolic."""
    fake = _Fakes()
    pages, page_size, heads, keys = fake.size(), fake.size(), fake.size(), fake.size()
    arguments = ConvertArguments(
        mK=fake.heads(FP8, pages, page_size, heads, config.head_dim),
        mV=fake.heads(FP8, pages, page_size, heads, config.head_dim_v),
        mPageTable=fake.plain("int32", fake.size(), fake.size()),
        mKeyStarts=fake.plain("int32", fake.size()),
        mCuSeqlensQ=fake.plain("int32", fake.size()),
        mKeys=fake.heads(config.dtype, keys, heads, config.head_dim),
        mValues=fake.heads(config.dtype, keys, heads, config.head_dim_v),
        window_left=fake.int32(0),
        num_ctas=fake.int32(0),
    )
    return (*arguments, fake.stream())


def prefill_fakes(config: PrefillConfig, part_floats: int) -> tuple[Any, ...]:
    """Arguments to trace a prefill kernel with, the stream behind them; shapes and strides stay symbolic. part_floats: 0: no parts."""
    fake = _Fakes()
    total_q, heads = fake.size(), fake.size()
    is_ragged = config.kv_source == RAGGED
    tokens = (fake.size(),) if is_ragged else (fake.size(), fake.size())
    kv_heads = fake.size()
    arguments = PrefillArguments(
        mQ=fake.heads(config.q_dtype, total_q, heads, config.head_dim),
        mK=fake.heads(config.kv_dtype, *tokens, kv_heads, config.head_dim),
        mV=fake.heads(config.kv_dtype, *tokens, kv_heads, config.head_dim_v),
        mPageTable=None if is_ragged else fake.plain("int32", fake.size(), fake.size()),
        mCuSeqlensK=fake.plain("int32", fake.size()) if is_ragged else None,
        mCuSeqlensQ=fake.plain("int32", fake.size()),
        mTiles=fake.entries(TILE_INTS),
        mQueue=fake.entries(QUEUE_INTS),
        mPartSlots=fake.entries(part_floats, "float32") if part_floats else None,
        mPartArrivals=fake.entries(PART_COUNTERS) if part_floats else None,
        mO=fake.heads(config.out_dtype, total_q, heads, config.head_dim_v),
        mLse=fake.plain("float32", heads, total_q) if config.has_lse else None,
        mSinks=fake.plain(config.sinks_dtype, heads) if config.mask.has_sinks else None,
        mSlopes=fake.plain("float32", heads) if config.mask.has_alibi else None,
        mKScale=fake.scales() if config.has_kv_scales else None,
        mVScale=fake.scales() if config.has_kv_scales else None,
        mOutScale=fake.scales() if config.has_out_scale else None,
        mQScale=fake.scales() if config.has_q_scale else None,
        softmax_scale=fake.float32(1.0),
        softcap=fake.float32(0.0),
        window_left=fake.int32(0),
        window_right=fake.int32(0),
        num_groups=fake.int32(0),
    )
    return (*arguments, fake.stream())


def decode_fakes(config: DecodeConfig, slot_floats: int) -> tuple[Any, ...]:
    """Arguments to trace the decode kernel with, the stream behind them; shapes and strides stay symbolic."""
    fake = _Fakes()
    n = fake.size
    arguments = DecodeArguments(
        mQ=fake.heads(config.q_dtype, n(), n(), config.head_dim),
        mK=fake.heads(config.kv_dtype, n(), n(), n(), config.head_dim),
        mV=fake.heads(config.kv_dtype, n(), n(), n(), config.head_dim_v),
        mPageTable=fake.plain("int32", n(), n()),
        mO=fake.heads(config.out_dtype, n(), n(), config.head_dim_v),
        mLse=fake.plain("float32", n(), n()) if config.has_lse else None,
        mTiles=fake.entries(DECODE_INTS),
        mFirst=fake.entries(DECODE_INTS),
        mSlots=fake.entries(slot_floats, "float32"),
        mArrivals=fake.plain("int32", n()),
        mSinks=fake.plain(config.sinks_dtype, n()) if config.mask.has_sinks else None,
        mSlopes=fake.plain("float32", n()) if config.mask.has_alibi else None,
        mKScale=fake.scales() if config.has_kv_scales else None,
        mVScale=fake.scales() if config.has_kv_scales else None,
        mOutScale=fake.scales() if config.has_out_scale else None,
        mQScale=fake.scales() if config.has_q_scale else None,
        softmax_scale=fake.float32(1.0),
        softcap=fake.float32(0.0),
        window_left=fake.int32(0),
        window_right=fake.int32(0),
        split_blocks=fake.int32(0),
    )
    return (*arguments, fake.stream())


def mla_decode_fakes(config: MlaDecodeConfig, slot_floats: int) -> tuple[Any, ...]:
    """Arguments to trace the latent decode kernel with, the stream behind them; shapes and strides stay symbolic."""
    fake = _Fakes()
    n = fake.size
    arguments = MlaDecodeArguments(
        mQ=fake.heads(config.dtype, n(), n(), LATENT_DIM),
        mQRope=fake.heads(config.dtype, n(), n(), ROPE_DIM),
        mLatent=fake.heads(config.kv_dtype, n(), n(), LATENT_DIM + ROPE_DIM),
        mPageTable=fake.plain("int32", n(), n()),
        mO=fake.heads(config.dtype, n(), n(), LATENT_DIM),
        mLse=fake.plain("float32", n(), n()) if config.has_lse else None,
        mTiles=fake.entries(DECODE_INTS),
        mFirst=fake.entries(DECODE_INTS),
        mSlots=fake.entries(slot_floats, "float32"),
        mArrivals=fake.plain("int32", n()),
        mScale=fake.scales() if config.kv_dtype != config.dtype else None,
        softmax_scale=fake.float32(1.0),
        split_blocks=fake.int32(0),
    )
    return (*arguments, fake.stream())


class _Fakes:
    """What stands for a tensor, a number or the stream while a host function is traced."""

    def __init__(self) -> None:
        import cutlass
        import cutlass.cute as cute
        from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

        self._cute, self._tensor, self._stream = cute, make_fake_tensor, make_fake_stream
        self._types = {
            "bfloat16": cutlass.BFloat16, "float16": cutlass.Float16, "float8_e4m3fn": cutlass.Float8E4M3FN,
            "float32": cutlass.Float32, "int32": cutlass.Int32,
        }  # fmt: skip
        self.float32, self.int32 = cutlass.Float32, cutlass.Int32

    def size(self) -> Any:
        """An extent known at launch."""
        return self._cute.sym_int32()

    def heads(self, dtype: str, *shape: Any) -> Any:
        """Rows of a head: any strides in multiples of 16 bytes but the last, which is 1."""
        strides = tuple(self._cute.sym_int64(divisibility=16 // DTYPE_BYTES[dtype]) for _ in shape[:-1])
        return self._tensor(self._types[dtype], shape, (*strides, 1), assumed_align=16)

    def plain(self, dtype: str, *shape: Any) -> Any:
        """Any strides but the last, which is 1."""
        strides = tuple(self._cute.sym_int64() for _ in shape[:-1])
        return self._tensor(self._types[dtype], shape, (*strides, 1), assumed_align=2 if dtype in ("bfloat16", "float16") else 4)

    def scales(self) -> Any:
        """(num_kv_heads,) float32, any stride; 0 where one scale serves all."""
        return self._tensor(self._types["float32"], (self.size(),), stride=(self._cute.sym_int64(),), assumed_align=4)

    def numbers(self) -> Any:
        """(n,) int32, one behind the other."""
        return self._tensor(self._types["int32"], (self.size(),), stride=(1,), assumed_align=4)

    def entries(self, size: int, dtype: str = "int32") -> Any:
        """(n, size), rows one behind the other, 16-byte aligned."""
        return self._tensor(self._types[dtype], (self.size(), size), (size, 1), assumed_align=16)

    def stream(self) -> Any:
        """The caller's current stream."""
        return self._stream(use_tvm_ffi_env_stream=True)
