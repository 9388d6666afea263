"""Whether vLLM counts the room for converted K and V when it sizes its KV cache, on a GPU that runs nothing else.

    python -m tests.device.measure_room

Engines with K and V in FP8, one after the other: without room (FA4_BACKEND_CONVERT_MIB=0), again without, and with it. The last one's
cache has to be smaller than the second one's by the room's bytes; what vLLM measures varies by some MiB. The first is there because a
process pays for libraries' workspaces once (72 MiB on an H200). Exit status 1 where it is not smaller so, or a plan allocated room.
"""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

from tests.device.engine_lane import COMMON, set_environment, stop
from tests.device.watch_converted import watch_converted
from tests.engines.tiny_models import write_llama

LAYERS, KV_HEADS, HEAD_DIM, BLOCK = 2, 2, 64, 16  # of `write_llama`, so that `serve_fp8` has compiled the kernels
BLOCK_BYTES = LAYERS * BLOCK * 2 * KV_HEADS * HEAD_DIM  # of K and V in FP8
ROOM_MIB = 128
KEYS = (ROOM_MIB << 20) // (2 * KV_HEADS * HEAD_DIM * 2)  # of all sequences, so that they do not bound it
# A small share of the GPU: vLLM makes an object a block, 5.5 million of them in 42 GiB, which takes a minute.
ARGUMENTS = {
    **COMMON, "max_num_seqs": KEYS // COMMON["max_model_len"], "max_num_batched_tokens": 1024, "gpu_memory_utilization": 0.04,
    "kv_cache_dtype": "fp8", "enforce_eager": True, "block_size": BLOCK,
}  # fmt: skip
WITHIN = 0.1  # of the room


def cache_bytes(model: Path, room_mib: int) -> tuple[int, dict[str, int]]:
    """Bytes of vLLM's KV cache in an engine that is started and stopped; what was seen of the room."""
    from vllm import LLM

    environment = {
        "FA4_BACKEND_CONVERT_MIB": str(room_mib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles for minutes at its first start
    }
    with set_environment(environment), watch_converted() as seen:
        llm = LLM(str(model), attention_backend="FA4", **ARGUMENTS)
        found = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks * BLOCK_BYTES
        stop(llm)
    del llm
    gc.collect()
    return found, dict(seen)


def main() -> int:
    """The engines, a line for each of the last two; 1 where the cache is not smaller by the room."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as name:
        model = write_llama(Path(name), num_layers=LAYERS)
        _, (without, nothing), (with_room, seen) = (cache_bytes(model, room_mib) for room_mib in (0, 0, ROOM_MIB))
    for label, found, room in (("without room", without, nothing), ("with room", with_room, seen)):
        print(f"{label}: KV cache {found / 2**20:,.0f} MiB, room {room['room_bytes'] / 2**20:.0f} MiB, late {room['late_bytes']} bytes")
    difference, expected = without - with_room, seen["room_bytes"]
    is_right = expected > 0 and abs(difference - expected) <= WITHIN * expected and not seen["late_bytes"] and not nothing["room_bytes"]
    print(f"difference {difference / 2**20:.1f} MiB, expected {expected / 2**20:.1f}: {'right' if is_right else 'WRONG'}")
    return 0 if is_right else 1


if __name__ == "__main__":
    raise SystemExit(main())
