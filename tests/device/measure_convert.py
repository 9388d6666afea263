"""K and V in FP8 converted once a call beside converted in the prefill kernel, and beside bf16, on Hopper: checked, then timed in turns.

    python -m tests.device.measure_convert --compile   # on any machine, in many processes
    python -m tests.device.measure_convert [--only "d128.*4K"] [--json FILE]

What `CONVERT_VISITS` of `kernels/sm90/tuning.py` comes from: here steps convert however short their rows are. The last columns are the
conversion alone, us and GB/s of bytes read and written, by CTAs an SM.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fa4_backend import convert_room
from fa4_backend.arguments import AttentionArguments
from fa4_backend.bench.batch import BatchTensors, Mask
from fa4_backend.bench.ours import Ours, asked
from fa4_backend.bench.prefill_batches import PrefillBatch
from fa4_backend.bench.timing import Flush, capture, cold_in_turns, in_turns
from fa4_backend.kernels.launch_abi import convert_arguments
from fa4_backend.kernels.loading import load
from fa4_backend.kernels.schedule.work_list import WorkLists
from fa4_backend.kernels.sm90.tuning import CONVERT_VISITS
from fa4_backend.plan import plan_attention
from fa4_backend.problem import FP8
from tests.device.compiling import compile_lacking
from tests.support.paged_case import PagedCase

ROOM = 1 << 18  # keys of the workspace: every cell fits
BF16, IN_KERNEL, ONCE = "bf16", "in the kernel", "once a call"


def cells() -> list[PrefillBatch]:
    """Rows of FP8 K and V."""
    heads = {
        "d128": {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128},
        "d96": {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 96},
        "d256": {"num_q_heads": 16, "num_kv_heads": 2, "head_dim": 256},
        "d64": {"num_q_heads": 16, "num_kv_heads": 16, "head_dim": 64},
        "mla": {"num_q_heads": 16, "num_kv_heads": 16, "head_dim": 192, "head_dim_v": 128},
    }
    rows = ((8, 4096, 4096), (2, 16384, 16384), (4, 512, 8192), (32, 1024, 1024), (4, 256, 8192), (4, 128, 8192))
    short = ((8, 4096, 4096), (4, 512, 8192), (32, 1024, 1024))
    out = []
    for name, fields in heads.items():
        out += [PrefillBatch(*row, kv_dtype=FP8, **fields) for row in (rows if name in ("d128", "d256") else short)]
    out.append(replace(out[0], num_q_heads=64))
    out.append(replace(out[0], mask=Mask(window=1024)))
    chunk = replace(out[0], rows=1, query_len=2048, kv_len=32768)
    out += [chunk, replace(chunk, kv_len=65536), replace(chunk, kv_len=131072, num_q_heads=16, num_kv_heads=2, head_dim=256)]
    return out


def all_keys(batches: list[PrefillBatch]) -> list[Any]:
    """Compile keys of every version of every cell and of the cases."""
    plans = []
    for batch in batches:
        for shape, keys in ((batch, ROOM), (replace(batch, kv_dtype="bfloat16"), 0)):
            problem, limits = asked(shape, "sm_90a", convert_keys=keys)
            plans.append(plan_attention(problem, limits))
    plans += [case.plan() for case in cases().values()]
    return list(dict.fromkeys(key for plan in plans for key in plan.keys))


def cases() -> dict[str, PagedCase]:
    """Poisoned batches of the edges, decode rows among them."""
    base = PagedCase(
        (5, 128, 1, 0, 300, 33, 127), (133, 128, 77, 50, 700, 33, 129), head_dim=128, num_q_heads=8, num_kv_heads=2, kv_dtype=FP8,
        arch="sm_90a", converts=True,
    )  # fmt: skip
    return {
        "d128": base,
        "d128 window, hnd": replace(base, window_left=70, layout="hnd", page_size=48),
        "d128 both windows": replace(base, window_left=70, window_right=9, is_causal=False, layout="nhd", page_size=64),
        "d128 empty rows": replace(base, query_lens=(40, 3, 7, 200), kv_lens=(9, 0, 7, 100)),
        "d64, all score features": replace(base, head_dim=64, num_q_heads=6, sinks=True, alibi=True, softcap=20.0),
        "d256, cap": replace(base, head_dim=256, num_q_heads=4, softcap=30.0, layout="hnd"),
        "d96 out in FP8": replace(base, head_dim=96, out_dtype=FP8),
        "(192, 128) fp16": replace(base, head_dim=192, head_dim_v=128, num_kv_heads=8, dtype="float16", sinks=True),
        "d128 parts": replace(base, query_lens=(9, 40), kv_lens=(5000, 3000)),
    }


def check() -> None:
    """Every case against the oracle, five times the same bits."""
    for name, case in cases().items():
        built = case.build("cuda")
        plan = case.plan(num_sms=torch.cuda.get_device_properties(0).multi_processor_count)
        outs = []
        for _ in range(5):
            built.arguments.out.fill_(float("nan"))
            out, lse = built.run(plan)
            outs.append(out[: built.total_q].view(torch.uint8).clone())
        errors = built.check(out, lse)
        assert all(torch.equal(x, outs[0]) for x in outs), f"{name}: bits differ between runs"
        print(f"right: {name}: {errors.out:.2e} of {errors.out_budget:.2e}, lse {errors.lse:.1e} of {errors.lse_budget:.1e}", flush=True)


def convert_alone(batch: PrefillBatch, t: BatchTensors) -> dict[str, float]:
    """The conversion of a cell alone: GB/s by CTAs an SM, L2 cold."""
    problem, limits = asked(batch, "sm_90a", convert_keys=ROOM)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    plan = plan_attention(problem, limits, num_sms=num_sms)
    assert plan.kernels is not None and plan.kernels.converted is not None and t.page_table is not None
    work = WorkLists.allocate(plan.kernels.converted.work, limits, "cuda")
    assert work.key_starts is not None
    work.key_starts[: batch.rows + 1] = torch.arange(batch.rows + 1, device="cuda") * batch.kv_len
    room = convert_room.reserve(plan, torch.device("cuda"))
    assert room is not None
    keys, values, _ = room.views(plan)
    a = AttentionArguments(
        t.q,
        t.k_cache,
        t.v_cache,
        t.page_table,
        t.cu_seqlens_q,
        t.seqused_k,
        t.out,
        None,
        1.0,
        batch.mask.window_left,
        None,
        0.0,
        None,
        None,
    )
    given = convert_arguments(a, work, keys, values)
    launch = load(plan.kernels.converted.convert, emulated=False)
    launch(*given)
    pages = t.page_table[0, :1].long()
    for cache, wide in ((t.k_cache, keys), (t.v_cache, values)):
        first = cache.view(torch.uint8)[pages].view(FP8_TORCH)[0].to(wide.dtype)
        if batch.mask.window_left is None:
            assert torch.equal(first, wide[: batch.page_size]), "converted keys: expected those of the first page"
    launches = {str(n): capture(lambda n=n: launch(*given._replace(num_ctas=n * num_sms))) for n in (1, 2, 3, 4, 5, 6, 8)}
    us = cold_in_turns(launches, 3, Flush.READ)
    num_bytes = batch.rows * batch.kv_len * batch.num_kv_heads * (batch.head_dim + batch.value_dim) * 3
    return {f"{n}: {us[n]:.1f} us": round(num_bytes / us[n] / 1e3) for n in us}


FP8_TORCH = torch.float8_e4m3fn


def time_cell(batch: PrefillBatch, rounds: int) -> dict[str, Any]:
    """Time of each version.

    Raises:
        RuntimeError: one is wrong.
    """
    torch.manual_seed(0)
    tensors = BatchTensors.make(batch)
    versions = {
        BF16: (replace(batch, kv_dtype="bfloat16"), tensors.in_bf16(), 0),
        IN_KERNEL: (batch, tensors, 0),
        ONCE: (batch, tensors, ROOM),
    }
    replays, errors, kept = {}, {}, []
    for name, (shape, own, keys) in versions.items():
        own.out.fill_(float("nan"))
        ours = Ours.make(shape, own, convert_keys=keys)
        ours.call()
        torch.cuda.synchronize()
        errors[name] = own.worst_error(batch, name, must_hold=True)
        replays[name] = capture(ours.call)
        kept.append(ours)
    us = in_turns(replays, rounds)
    row = {"cell": batch.label, "us": us, "tflops": {n: batch.flops / t / 1e6 for n, t in us.items()}, "errors": errors}
    row["convert"] = convert_alone(batch, tensors)
    return row


def main() -> None:
    """Compile, or check and time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processes", type=int, default=32)
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for dims in CONVERT_VISITS:
        CONVERT_VISITS[dims] = 0
    batches = [batch for batch in cells() if re.search(options.only, batch.label)]
    if options.compile:
        compile_lacking(all_keys(batches), processes=options.processes)
        return
    print(torch.cuda.get_device_name())
    check()
    rows = []
    for batch in batches:
        row = time_cell(batch, options.rounds)
        rows.append(row)
        base = row["us"][BF16]
        shown = [f"{n} {t:.0f} us {row['tflops'][n]:.0f} ({base / t:.3f}) err {row['errors'][n]:.1e}" for n, t in row["us"].items()]
        print(batch.label, *shown, row["convert"], sep=" | ", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
