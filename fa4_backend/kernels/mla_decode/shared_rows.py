"""Rows of Q and of KV tiles that consumers write over in shared memory: zeros where no box came or a sequence ends, and Q as float16."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from fa4_backend.kernels.common import ptx_ops as ptx
from fa4_backend.kernels.common import vector_ops as vectors
from fa4_backend.kernels.common.fp8 import scaled_to_float16
from fa4_backend.kernels.mla_decode.config import LATENT_PARTS, PART_DIM, PART_ELEMS, PARTS, TILE_ELEMS, TILE_M, MlaDecodeConfig
from fa4_backend.kernels.mla_decode.merge import consumer_thread
from fa4_backend.kernels.mla_decode.storage import SIDE_THREADS, SIDES, MlaStorage, SharedTensors


@dataclass(frozen=True)
class SharedRows:
    """Each method writes, then fences for the asynchronous proxy; its caller waits before and meets the other threads after."""

    config: MlaDecodeConfig
    storage: MlaStorage

    @cute.jit
    def clear_unloaded_query(self, shared: SharedTensors):
        """Zero the rows of Q that no box brings, before the CTA's first barrier."""
        c = self.config
        if const_expr(c.loaded_rows < TILE_M):
            thread = cute.arch.thread_idx()[0] - SIDE_THREADS
            for part in cutlass.range_constexpr(PARTS):
                self._zero_rows(shared.q + part * PART_ELEMS, Int32(c.loaded_rows), Int32(TILE_M), thread, SIDES * SIDE_THREADS)
            cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def clear_values(self, shared: SharedTensors, stage: Int32, first: Int32, end: Int32):
        """Zero rows `first .. end` of V in a KV tile; the threads of one side call."""
        thread = cute.arch.thread_idx()[0] % SIDE_THREADS
        for part in cutlass.range_constexpr(LATENT_PARTS):
            self._zero_rows(shared.kv + stage * TILE_ELEMS + part * PART_ELEMS, first, end, thread, SIDE_THREADS)
        cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def scale_query(self, shared: SharedTensors):
        """A bfloat16 Q as float16 in its place, four threads a row: `common/fp8.py`, Note [bfloat16 Q]. Both sides call."""
        thread = consumer_thread()
        row = thread // 4
        line = shared.q.toint() + row * (PART_DIM * 2)
        # Chunks of 16 bytes; a row is one line whatever the swizzle.
        places = [line + part * self.config.q_part_bytes + (thread % 4 + 4 * i) * 16 for part in range(PARTS) for i in range(2)]
        words = [Int32(word) for place in places for word in vectors.elements(ptx.load_shared_v4(place))]
        scaled, factor = scaled_to_float16(words, 4)
        for i, place in enumerate(places):
            ptx.store_shared_v4(place, [word.ir_value() for word in scaled[4 * i : 4 * i + 4]])
        if thread % 4 == 0:
            shared.sFactor[row] = factor
        cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def _zero_rows(self, part: cute.Pointer, first: Int32, end: Int32, thread: Int32, threads: cutlass.Constexpr[int]):
        """Zero rows of a part. A row is one line whatever the swizzle, so its chunks may be cleared in any order."""
        chunk = const_expr(16 // self.config.element_bytes)
        row_chunks = const_expr(PART_DIM // chunk)
        zeros = cute.make_rmem_tensor(chunk, self.storage.dtype)
        zeros.fill(0.0)
        copy = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.storage.dtype, num_bits_per_copy=128)
        for i in cutlass.range(thread, (end - first) * row_chunks, threads, unroll=1):
            target = (part + (first * PART_DIM + i * chunk)).align(16)
            cute.copy(copy, zeros, cute.make_tensor(target, cute.make_layout(chunk)))
