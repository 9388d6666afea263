#!/bin/bash
# Variants of the cells that a peer wins or ties, beside another checkout, on two GPUs: tests/device/cliffs.sh OTHER OUT
set -u
other=$1 out=$2
mkdir -p "$out"
m="python -m tests.device.measure_tiles"
d96=(--kinds d96 --only "prompts|512 of" --tiles asks_first=1 tile_n=144,kv_stage=5 tile_n=144,kv_stage=5,asks_first=1
     tile_m=192,tile_n=112,kv_stage=6,rescale_threshold=0 tile_m=192,tile_n=112,kv_stage=6,asks_first=1 tile_m=192,tile_n=96,kv_stage=7,asks_first=1 --other "$other")
d64=(--kinds windows,heads --only "d64.*(prompts|512 of)" --tiles rescale_threshold=8 rescale_threshold=8,asks_first=1
     tile_n=64,kv_stage=16 tile_n=96,kv_stage=10 tile_m=128,rescale_threshold=8 --other "$other")
d128=(--kinds whole,chunked,full,groups-of-5 --only "prompts|512 of|2K of" --tiles asks_first=1 --other "$other")
d256=(--kinds d256 --tiles asks_first=1 --other "$other")
d192=(--kinds d192 --tiles rescale_threshold=8 rescale_threshold=8,asks_first=1 --other "$other")
mixed=(--kinds mixed --tiles decode_full_sms=66 decode_full_sms=90 decode_full_sms=105 decode_full_sms=132 --other "$other")
one=(--kinds one-kv-head --only "48/1 d64" --tiles decode_query_len=0 decode_part_blocks=1 decode_part_blocks=4 decode_parts_ratio=4 decode_parts_ratio=64 --other "$other")
for part in d96 d64 d128 d256 d192 mixed one; do
  declare -n args=$part
  $m "${args[@]}" --compile-for sm_90a --processes 5 > "$out/compile_$part.txt" 2>&1 &
done
# While the CPUs compile: decode in every mode, L2 clean, and prefill beside cuDNN's dense kernel. Device times alone count.
(CUDA_VISIBLE_DEVICES=0 python -m fa4_backend.cli bench decode --flush read --batches grid,ragged --csv "$out/decode_read.csv" > "$out/decode_read.txt" 2>&1) &
(CUDA_VISIBLE_DEVICES=1 python -m fa4_backend.cli bench prefill --batches heads,full --csv "$out/prefill.csv" > "$out/prefill.txt" 2>&1) &
wait
timed() { for part in "$@"; do declare -n args=$part; $m "${args[@]}" --json "$out/$part.json" > "$out/$part.txt" 2>&1; done; }
(CUDA_VISIBLE_DEVICES=0 timed d96 mixed d128 one) &
(CUDA_VISIBLE_DEVICES=1 timed d64 d256 d192
 CUDA_VISIBLE_DEVICES=1 python -m tests.device.read_counters --kinds d96,d256,windows,mixed,one-kv-head --json "$out/counters.json" \
   --only "32/32 d96.*2 x 16K|32/8 d96.*8 x 4K|soft cap: (8 x 4K|1 x 16K)|window 128.*4 x 512|64 x 8K|48/1 d64" > "$out/counters.txt" 2>&1) &
wait
tail -n 200 "$out"/compile_*.txt "$out"/{d96,d64,mixed,d128,d256,d192,one,counters,decode_read,prefill}.txt
