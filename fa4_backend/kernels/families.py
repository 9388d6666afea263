"""The kernel families, and which of their kernels serve a problem: everything that is compiled for a plan is resolved here, once.

| family | rows of a batch | where |
|---|---|---|
| schedule | makes the step's work lists | `schedule/` |
| decode | short queries, KV split over CTAs | `decode/` |
| latent decode | the same of multi-head latent attention, which has no other rows | `mla_decode/`, on Blackwell `mla_decode/sm100/` |
| prefill | the rest, on the chip's own tensor cores | `sm90/`, `sm100/` |
| conversion | of the rest's K and V from FP8 to 16 bits, once a call where that pays | `convert_kv/` |

A family is a folder with a `config` (its compile key, and how it follows from a problem) and a `kernel` (what the key's `builder` names).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from fa4_backend.kernels.common.prefill_config import PrefillConfig
from fa4_backend.kernels.convert_kv import config as convert_family
from fa4_backend.kernels.convert_kv.config import ConvertConfig
from fa4_backend.kernels.decode import config as decode_family
from fa4_backend.kernels.decode.config import DecodeConfig
from fa4_backend.kernels.mla_decode import config as mla_family
from fa4_backend.kernels.mla_decode.config import MlaDecodeConfig
from fa4_backend.kernels.mla_decode.sm100 import config as mla_sm100_family
from fa4_backend.kernels.schedule.config import ScheduleConfig, schedule_config
from fa4_backend.kernels.schedule.rates import MIN_PART_KEYS, SHARED_QUARTERS, decode_full_sms, decode_tile_ticks
from fa4_backend.kernels.schedule.work_list import L2_SHARE_BYTES, WorkShape
from fa4_backend.kernels.sm90 import config as sm90_family
from fa4_backend.kernels.sm100 import config as sm100_family
from fa4_backend.problem import LATENT, PAGED, AttentionProblem, BatchLimits


class PrefillKey(Protocol):
    """What a chip's prefill config tells the schedule, beside being a compile key (`fa4_backend.compile.CompileKey`)."""

    @property
    def arch(self) -> str: ...

    @property
    def builder(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def kernel(self) -> PrefillConfig:
        """What it has in common with other chips' prefill kernels."""

    @property
    def ctas_per_item(self) -> int:
        """CTAs that work on an entry of the work list together."""

    @property
    def tokens_per_item(self) -> int:
        """Query tokens of an entry: what its `m_block` counts in."""

    @property
    def part_floats(self) -> int:
        """float32 of a slot for a part of a tile; 0: the kernel takes whole tiles only."""


# arch -> the compile key of a problem's prefill kernel
PREFILL: dict[str, Callable[..., PrefillKey]] = {
    "sm_90a": sm90_family.resolve,
    "sm_100a": sm100_family.resolve,
    "sm_103a": sm100_family.resolve,
}

# arch -> the compile key of the prefill kernel that reads what `convert_kv` made of a problem's K and V, and from how many query blocks
# that see a key on it is taken; archs that are not here convert in the prefill kernel itself
CONVERTED: dict[str, tuple[Callable[..., PrefillKey], Callable[[AttentionProblem], int]]] = {
    "sm_90a": (sm90_family.resolve_converted, sm90_family.least_converted_visits),
}

# arch -> the compile key of a latent problem's decode kernel
LATENT_DECODE: dict[str, Callable[[AttentionProblem, BatchLimits], MlaDecodeConfig]] = {
    "sm_90a": mla_family.resolve,
    "sm_100a": mla_sm100_family.resolve,
    "sm_103a": mla_sm100_family.resolve,
}


@dataclass(frozen=True)
class ConvertedPrefill:
    """What serves prefill rows in place of `KernelSet.prefill` in a step that converts their K and V first."""

    convert: ConvertConfig
    prefill: PrefillKey
    work: WorkShape  # of the step's lists
    least_visits: int  # query blocks of a KV head that see a key, from which on it pays


@dataclass(frozen=True)
class KernelSet:
    """Compile keys of all kernels of a plan, and the shape of the work lists between them."""

    schedule: ScheduleConfig
    decode: DecodeConfig | MlaDecodeConfig | None  # None: the prefill kernel serves every row
    prefill: PrefillKey | None  # None: the decode kernel does, as in latent attention
    work: WorkShape
    converted: ConvertedPrefill | None = None  # None: no step does

    @property
    def keys(self) -> tuple[ScheduleConfig | ConvertConfig | DecodeConfig | MlaDecodeConfig | PrefillKey, ...]:
        """In the order of their launches; what steps that convert have in addition comes last."""
        others = () if self.converted is None else (self.converted.convert, self.converted.prefill)
        return tuple(key for key in (self.schedule, self.decode, self.prefill, *others) if key is not None)


def resolve_kernels(problem: AttentionProblem, limits: BatchLimits, num_sms: int, memory_gb: float | None = None) -> KernelSet:
    """The kernels that serve `problem`, which has passed `fa4_backend.support.check_problem`.

    Args:
        num_sms, memory_gb: of the device: SMs, and the memory's peak in GB/s (default: the published one of the arch).
    """
    if problem.kv_source == LATENT:
        return latent_kernels(LATENT_DECODE[problem.target_arch](problem, limits), problem, limits, num_sms)
    prefill = PREFILL[problem.target_arch](problem, is_dependent=True)
    decode = decode_family.resolve(problem, limits, prefill_has_parts=prefill.part_floats > 0 and not problem.batch_invariant)
    if decode is None:
        prefill = PREFILL[problem.target_arch](problem, is_dependent=False)
    schedule = schedule_config(problem.target_arch, limits.max_num_seqs)
    work = _work_shape(problem, limits, num_sms, memory_gb, decode, prefill)
    return KernelSet(schedule, decode, prefill, work, _converted(problem, limits, num_sms, memory_gb, decode, work))


def _converted(
    problem: AttentionProblem, limits: BatchLimits, num_sms: int, memory_gb: float | None, decode: DecodeConfig | None, work: WorkShape
) -> ConvertedPrefill | None:
    """The other way to serve prefill rows. Not where a row's bits must not depend on the batch, which decides between both."""
    if problem.batch_invariant or not limits.convert_keys or problem.target_arch not in CONVERTED:
        return None
    if not problem.has_kv_scales or problem.has_q_scale or problem.kv_source != PAGED:
        return None
    resolve, least_visits = CONVERTED[problem.target_arch]
    prefill = resolve(problem, is_dependent=decode is not None)
    shape = _work_shape(problem, limits, num_sms, memory_gb, decode, prefill)
    wide = replace(problem, kv_dtype=problem.dtype)
    shape = replace(shape, convert_keys=limits.convert_keys, l2_tokens=L2_SHARE_BYTES // wide.kv_token_bytes)
    # Steps of both ways share the lists and the slots.
    assert (shape.tokens_per_item, shape.part_floats) == (work.tokens_per_item, work.part_floats), f"{shape=} {work=}"
    return ConvertedPrefill(convert_family.resolve(problem), prefill, shape, least_visits(problem))


def latent_kernels(key: MlaDecodeConfig, problem: AttentionProblem, limits: BatchLimits, num_sms: int) -> KernelSet:
    """The schedule and the latent decode kernel `key`, whose row groups are a cluster's tiles of a sequence's packed rows."""
    num_ctas = max(1, num_sms // key.cluster_size)
    tiles = key.tile_n // mla_family.TILE_N  # of 64 keys, in a block
    # Row groups of a sequence see the same keys. Teams of as many CTAs leave some without work: an eighth at most.
    has_teams = not problem.batch_invariant and num_ctas % key.num_groups * 8 <= num_ctas and key.num_groups <= num_ctas
    work = WorkShape(
        num_kv_heads=key.num_groups,
        decode_num_ctas=num_ctas,
        decode_query_len=limits.decode_query_len,
        decode_tile_n=key.tile_n,
        slot_floats=mla_family.slot_floats(key),
        split_blocks=-(-mla_family.split_tiles(limits) // tiles) if problem.batch_invariant else 0,
        slot_vectors=mla_family.slot_vectors(key),
        max_seqlen_k=-(-limits.max_seqlen_k // problem.page_size) * problem.page_size,
        max_num_tokens=limits.max_num_tokens,
        decode_part_blocks=max(1, mla_family.MIN_PART_BLOCKS // tiles),
        decode_parts_ratio=mla_family.PARTS_RATIO * tiles,
        private_slots=num_ctas if problem.batch_invariant else 0,
        decode_lines=key.num_groups if has_teams else 1,
        decode_part_quarters=0 if problem.batch_invariant else mla_family.part_quarters(key),
        lone_block_eighths=mla_family.lone_block_eighths(key),
        # No row is longer than `decode_query_len`: the other list stays empty.
        prefill_groups=1,
        tokens_per_item=limits.max_num_tokens,
        prefill_tile_n=mla_family.TILE_N,
        l2_tokens=L2_SHARE_BYTES // problem.kv_token_bytes,
        num_sms=num_sms,
        decode_tile_ticks=1,
        decode_full_sms=num_ctas,
    )
    assert work.max_parts() <= mla_family.most_parts(key), f"{work.max_parts()=}, expected at most {mla_family.most_parts(key)}"
    return KernelSet(schedule_config(problem.target_arch, limits.max_num_seqs), key, None, work)


def _work_shape(
    problem: AttentionProblem,
    limits: BatchLimits,
    num_sms: int,
    memory_gb: float | None,
    decode: DecodeConfig | None,
    prefill: PrefillKey,
) -> WorkShape:
    """What these kernels ask of their lists."""
    tile_n = prefill.kernel.tile.tile_n
    ticks = decode_tile_ticks(
        problem,
        decode_tile_n=decode_family.TILE_N,
        item_rows=prefill.tokens_per_item * problem.q_per_kv,
        item_ctas=prefill.ctas_per_item,
        prefill_tile_n=tile_n,
    )
    return WorkShape(
        num_kv_heads=problem.num_kv_heads,
        prefill_groups=max(1, num_sms // prefill.ctas_per_item),
        decode_num_ctas=num_sms * (decode.ctas_per_sm if decode else 1),
        tokens_per_item=prefill.tokens_per_item,
        prefill_tile_n=tile_n,
        decode_query_len=limits.decode_query_len if decode else 0,
        decode_tile_n=decode_family.TILE_N,
        slot_floats=decode_family.slot_floats(decode) if decode else 0,
        split_blocks=decode_family.split_tiles(limits) if problem.batch_invariant else 0,
        slot_vectors=decode_family.slot_vectors(decode) if decode else 1,
        l2_tokens=L2_SHARE_BYTES // problem.kv_token_bytes,
        num_sms=num_sms,
        decode_tile_ticks=ticks,
        decode_full_sms=decode_full_sms(problem.target_arch, num_sms, memory_gb),
        max_seqlen_k=-(-limits.max_seqlen_k // problem.page_size) * problem.page_size,
        max_num_tokens=limits.max_num_tokens,
        part_floats=prefill.part_floats,
        min_part_blocks=-(-MIN_PART_KEYS // tile_n),
        part_piece_blocks=prefill.kernel.piece_blocks,
        most_part_quarters=SHARED_QUARTERS if prefill.kernel.share_parts else 1 << 16,
        decode_part_blocks=decode_family.MIN_PART_TILES if decode and not decode.has_pieces else 0,
        decode_parts_ratio=decode_family.PARTS_RATIO,
        decode_share_vectors=decode.share_vectors if decode else 0,
        decode_part_quarters=decode_family.PART_QUARTERS if decode and not decode.has_pieces else 0,
        lone_block_eighths=decode_family.LONE_BLOCK_EIGHTHS,
    )
