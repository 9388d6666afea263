"""The SM clock under each kernel's load on this GPU, and so its cycles: what the timing model's clock is taken from.

    python -m tests.device.measure_clocks --compile                        (first: our kernels, on all cores)
    python -m tests.device.measure_clocks --out FILE [--seconds 50]

Between two stamps of every SM's cycle counter and the global timer a captured kernel runs again and again; their differences are the mean
clock, exactly. Once after the board was idle for a moment (`rested`: 5 ms of calls) and once under sustained load (`sustained`: 60 ms after
as long a warm-up), because a prefill kernel reaches the board's power limit only in the latter.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fa4_backend import plan_attention
from fa4_backend.bench.batch import BatchTensors
from fa4_backend.bench.dense_peers import FLASH_ATTN_4, prepare
from fa4_backend.bench.ours import Ours, asked
from fa4_backend.bench.prefill_batches import named_batches
from fa4_backend.bench.timing import capture
from fa4_backend.kernel_stamp import gpu_stamp
from tests.device import cuda_driver
from tests.device.fuzz_all import compile_all

STAMP = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry stamp(.param .u64 out)
{
    .reg .u32 %r<3>;
    .reg .u64 %d<6>;
    ld.param.u64 %d1, [out];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %smid;
    mul.wide.u32 %d2, %r1, 24;
    add.u64 %d1, %d1, %d2;
    cvt.u64.u32 %d3, %r2;
    mov.u64 %d4, %clock64;
    mov.u64 %d5, %globaltimer;
    st.global.u64 [%d1], %d3;
    st.global.u64 [%d1+8], %d4;
    st.global.u64 [%d1+16], %d5;
    ret;
}
"""
RESTED_MS, SUSTAINED_MS, REST_S = 5.0, 60.0, 0.15


class Clock:
    """Mean SM clock between two stamps."""

    def __init__(self) -> None:
        self.num_ctas = 4 * torch.cuda.get_device_properties(0).multi_processor_count
        self.function = cuda_driver.get_function(cuda_driver.load_module(STAMP), "stamp", 0)
        self.buffer = torch.zeros(self.num_ctas, 3, dtype=torch.int64, device="cuda")

    def stamp(self) -> dict[int, tuple[int, int]]:
        """(cycles, nanoseconds) by SM; waits for all work before and for itself."""
        torch.cuda.synchronize()
        cuda_driver.launch(self.function, self.num_ctas, 32, 0, [ctypes.c_uint64(self.buffer.data_ptr())])
        return {int(sm): (int(cycles), int(ns)) for sm, cycles, ns in self.buffer.cpu().numpy()}

    def mhz(self, call: Callable[[], object]) -> float:
        """Median over the SMs while `call` runs."""
        before = self.stamp()
        call()
        after = self.stamp()
        rates = [1e3 * (after[sm][0] - c) / (after[sm][1] - ns) for sm, (c, ns) in before.items() if sm in after]
        return float(np.median(rates))


def timed(replay: Callable[[], object], repeats: int) -> float:
    """Microseconds a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def measure(clock: Clock, replay: Callable[[], object]) -> dict[str, float]:
    """us and MHz, rested and sustained."""
    one = timed(replay, 2)
    found: dict[str, float] = {}
    for name, milliseconds in (("rested", RESTED_MS), ("sustained", SUSTAINED_MS)):
        repeats = max(1, round(1e3 * milliseconds / one))
        if name == "rested":
            time.sleep(REST_S)
        else:
            timed(replay, repeats)
        times: list[float] = []
        mhz = clock.mhz(lambda repeats=repeats, times=times: times.append(timed(replay, repeats)))
        found |= {f"{name} us": round(times[0], 2), f"{name} mhz": round(mhz, 1)}
    return found


def cells() -> Iterator[tuple[str, str, Any]]:
    """(kernel, name, batch) of what is measured."""
    sets = named_batches()
    few_kv_heads = replace(sets["wide"][-1], rows=4, query_len=4096, kv_len=4096, num_kv_heads=2)
    for batch in [*sets["heads"], *sets["wide"], few_kv_heads, *sets["whole"], *sets["chunked"], *sets["full"]]:
        yield "fa4", batch.label, batch
        if batch.query_len == batch.kv_len and batch.head_dim <= 128:
            yield "flash-attn-4", batch.label, batch


def compile_ours() -> None:
    """All kernels of our cells on sm_90a, side by side; needs no GPU."""
    plans = [plan_attention(*asked(batch, "sm_90a")) for kernel, _, batch in cells() if kernel == "fa4"]
    print(f"compiled in {compile_all(plans, processes=os.cpu_count() or 1):.0f} s")


def main() -> int:
    """Write what was measured; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="needed unless --compile")
    parser.add_argument("--compile", action="store_true", help="only compile our kernels; needs no GPU")
    parser.add_argument("--seconds", type=float, default=50.0, help="start no further cell after this time")
    options = parser.parse_args()
    if options.compile:
        compile_ours()
        return 0
    if options.out is None:
        parser.error("--out: expected a file")
    begin = time.monotonic()
    torch.manual_seed(0)
    torch.zeros(1, device="cuda")
    clock = Clock()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rows: list[dict[str, Any]] = [{"kernel": "matmul", "cell": "8192^3 bf16", **measure(clock, capture(lambda: a @ b))}]
    rows.append(
        {
            "kernel": "copy",
            "cell": "128 MiB",
            **measure(clock, capture(partial(torch.add, a.view(torch.int16), 1, out=b.view(torch.int16)))),
        }
    )
    for kernel, name, batch in cells():
        if time.monotonic() - begin > options.seconds:
            break
        tensors = BatchTensors.make(batch)
        try:
            call = Ours.make(batch, tensors).call if kernel == "fa4" else prepare(FLASH_ATTN_4, batch, tensors)
            assert call is not None, f"expected a call of {kernel} on {name}"
            rows.append({"kernel": kernel, "cell": name, **measure(clock, capture(call))})
        except ImportError as error:  # flash-attn-4 is not installed everywhere
            print(f"{kernel}, {name}: {error}")
            continue
        print(rows[-1], flush=True)
        options.out.write_text(json.dumps({"stamp": gpu_stamp(), "rows": rows}, indent=1) + "\n")
    print(f"{len(rows)} rows in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
