"""What an SM and the chip do in a step with decode and prefill rows: the numbers that `share_chip` weighs, each with its evidence."""

from __future__ import annotations

from dataclasses import dataclass

from fa4_backend.problem import AttentionProblem

TICKS = 64  # time units in which a prefill n_block is measured

# What cutting prefill tiles along KV costs (`prefill_parts`), in quarters of an n_block: each entry's beginning and end, and each part
# of a tile for the CTA that adds them up. An n_block of 128 x 128 at d128 takes 1.46 us of an H100's SM (16 tokens of 64K, whole tiles);
# a part is 34 KiB a warpgroup, from L2. Modelled, not tuned on a device.
ENTRY_QUARTERS, PART_QUARTERS = 4, 2
# Where all CTAs that made a tile's parts add them up, that takes as long as waiting for the others and some reads from L2, however many
# parts there are.
SHARED_QUARTERS = 10
# Keys of the shortest part. 256, 512, 1024 and 2048 on an H100, us, L2 clean: 8 queries of 64/8 heads over 1 x 4K 25.7, 25.6, 28.2, 38.2;
# 71/1 d64 8 x 4K 22.2, 22.2, 25.8, 36.0; 96/1 8 x 4K 25.3, 25.3, 27.9, 37.5; 256 of 64K 417, 424, 428, 429;
# 8 x 128 of 16K 423, 430, 431, 444.
MIN_PART_KEYS = 256

# Decode on all SMs, before prefill, is 16/15 as fast as on `decode_full_sms`; in thirds of fifths, 15 of which are 1. On an H200 64 x 8K
# beside a 512 chunk of 4K take 573 us on 99 SMs, which 1 would choose by a hair, and 535 one after the other (FA3 572); 32 x 4K beside a
# 2K chunk of 6K, 250 x 2K beside one of 4K and 128 x 4K beside one of 8K 336, 628 and 709 side by side, 388, 676 and 735 one after the
# other, and stay so.
ALONE_THIRDS = 16


@dataclass(frozen=True)
class ChipRates:
    """What an SM and the chip do where decode and prefill run side by side (`share_chip`)."""

    prefill_tflops: float  # of an SM: products of visible and masked keys alike
    decode_gb: float  # GB/s of one SM whose CTA decodes while others do not
    decode_pieces_gb: float  # the same in batch-invariant mode, where pieces end every few tiles
    memory_share: float  # of the memory's peak that lone rates may add up to; `share_chip` reaches it with 1.5 times the SMs
    published_memory_gb: float  # GB/s, peak by the data sheet: of a plan that is made without a device

    def lone_decode_gb(self, problem: AttentionProblem) -> float:
        """GB/s of an SM that decodes alone."""
        return self.decode_pieces_gb if problem.batch_invariant else self.decode_gb


# sm_90a, on an H100 (32/8 d128 page 16): a chunk of 2K of 6K in 278 us on 132 SMs; 32 x 4K on 16, 28, 44 and 66 CTAs of an SM each 66.3,
# 61.7, 52.1 and 40.2 GB/s a CTA, in batch-invariant mode 43.9, 43.0, 41.6 and 37.8, on all SMs 2,780 GB/s together. A step of both, the
# chunk beside the 32 rows, takes 350 us with these rates and 447 one kernel after the other; with either rate 20 to 40 % off 353 to 407.
# In batch-invariant mode 392, with the other mode's rate 454. Where decode is nearly all, more SMs than saturate the memory are a little
# faster still: 64 x 8K beside a 512 chunk on 58, 69, 80 and 99 SMs 800, 807, 764 and 812 us, hence 3,180 GB/s of a peak of 3,352.
# A lone SM's rate is its bytes in flight over the latency, so a faster memory (H200: 4,917) means more SMs until it is full.
# Blackwell is modelled: prefill from the cycles of a block (docs/sm100.md) at 1.85 GHz, a lone decode CTA as on the H100, 7/8 of the peak,
# which for B200 and GB200 (sm_100a) and for B300 and GB300 (sm_103a) is 8 TB/s by NVIDIA's data sheets.
CHIP_RATES = {
    "sm_90a": ChipRates(prefill_tflops=4.75, decode_gb=60, decode_pieces_gb=39, memory_share=3180 / 3352, published_memory_gb=3352),
    "sm_100a": ChipRates(prefill_tflops=14.0, decode_gb=60, decode_pieces_gb=39, memory_share=7 / 8, published_memory_gb=8000),
    "sm_103a": ChipRates(prefill_tflops=14.0, decode_gb=60, decode_pieces_gb=39, memory_share=7 / 8, published_memory_gb=8000),
}


def decode_tile_ticks(problem: AttentionProblem, *, decode_tile_n: int, item_rows: int, item_ctas: int, prefill_tile_n: int) -> int:
    """Time of a decode n_block on an SM of its own, in TICKS of a prefill n_block.

    Args:
        item_rows, item_ctas: packed query rows of an entry of the prefill list, and the CTAs that work on it.
    """
    rates, elements = CHIP_RATES[problem.target_arch], problem.head_dim + problem.head_dim_v
    prefill_us = 2 * item_rows * prefill_tile_n * elements / (item_ctas * rates.prefill_tflops * 1e6)
    decode_us = decode_tile_n * problem.kv_token_bytes / (rates.lone_decode_gb(problem) * 1e3)
    return max(1, round(TICKS * decode_us / prefill_us))


def decode_full_sms(arch: str, num_sms: int, memory_gb: float | None = None) -> int:
    """SMs whose decode CTAs keep the memory busy: more are no faster.

    Args:
        memory_gb: the memory's peak; default: the published one of the arch.
    """
    rates = CHIP_RATES[arch]
    peak = memory_gb or rates.published_memory_gb
    return max(1, min(num_sms, round(rates.memory_share * peak / rates.decode_gb)))
