#!/bin/bash
# Variants of the cells that a peer wins or ties, beside another checkout, on two GPUs: tests/device/cliffs.sh OTHER OUT
set -u
other=$1 out=$2
mkdir -p "$out"
m="python -m tests.device.measure_tiles"
d96=(--kinds d96 --only "prompts|512 of" --tiles tile_m=128,tile_n=128,kv_stage=6 frees_first=1 --other "$other")
d64=(--kinds windows,heads,one-kv-head --only "d64" --tiles frees_first=1 --other "$other")
window=(--kinds windows --only "window 128.*(prompts|512 of)|sinks: 8 x 4K" --tiles tile_n=80,kv_stage=12 rescale_threshold=8,asks_first=1 tile_n=64,kv_stage=16)
d128=(--kinds whole,chunked --only "prompts|512 of|2K of" --tiles frees_first=1 --other "$other" --rounds 6)
d256=(--kinds d256 --tiles frees_first=1 --other "$other" --rounds 8)
d192=(--kinds d192 --tiles frees_first=1 --other "$other")
mixed=(--kinds mixed --other "$other")
for part in d96 d64 window d128 d256 d192 mixed; do
  declare -n args=$part
  $m "${args[@]}" --compile-for sm_90a --processes 5 > "$out/compile_$part.txt" 2>&1 &
done
# While the CPUs compile: decode in every mode, L2 clean, and prefill beside cuDNN's dense kernel. Device times alone count.
(CUDA_VISIBLE_DEVICES=0 python -m fa4_backend.cli bench decode --flush read --batches grid,ragged --csv "$out/decode_read.csv" > "$out/decode_read.txt" 2>&1) &
(CUDA_VISIBLE_DEVICES=1 python -m fa4_backend.cli bench prefill --batches heads,full --csv "$out/prefill.csv" > "$out/prefill.txt" 2>&1) &
(CUDA_VISIBLE_DEVICES=1 timeout 120 python -m tests.device.prove_prefill --parts cases,pages,fuzz --batches 6000 --seconds 45 --repeats 3 --processes 10 \
   --json "$out/prove.json" > "$out/prove.txt" 2>&1) &
wait
timed() { for part in "$@"; do declare -n args=$part; $m "${args[@]}" --json "$out/$part.json" > "$out/$part.txt" 2>&1; done; }
(CUDA_VISIBLE_DEVICES=0 timed d96 mixed d128) &
(CUDA_VISIBLE_DEVICES=1 timed d64 window d256 d192
 CUDA_VISIBLE_DEVICES=1 python -m tests.device.read_counters --kinds d96,d256,one-kv-head,full,heads,decode-grid,decode-ragged,decode-heads \
   --json "$out/counters.json" > "$out/counters.txt" 2>&1 \
   --only "d96.*2 x 16K|16/8.*soft cap: (8 x 4K|1 x 16K)|(48|71)/1 d64.*8 x 4K|full: 2 x 16K|16/16 d64.*32 x 1K|32/8.*: (1 x 1K|1 x 16K|8 x 4K)\$|7 x 512|31 x 1K|32 x 4K, 4") &
wait
tail -n 200 "$out"/compile_*.txt "$out"/{d96,d64,window,mixed,d128,d256,d192,counters,decode_read,prefill,prove}.txt
