"""What a layer's KV write costs beside its attention: both in one graph, ours and FA3's, as vLLM launches them in a captured step.

    python -m tests.device.measure_layer [--json FILE]

Needs a GPU and vLLM. "write" is vLLM's scatter kernel (`reshape_and_cache_flash`) of the step's new tokens. What a write hidden behind
attention, or fused with it, could gain at most is (write + attention) - attention. L2 is clean before each graph.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from fa4_backend.bench.batch import BatchShape, BatchTensors
from fa4_backend.bench.decode_batches import uniform
from fa4_backend.bench.ours import Ours
from fa4_backend.bench.peers import FA3, Call, prepare
from fa4_backend.bench.timing import Flush, capture, cold_in_turns
from fa4_backend.kernel_stamp import gpu_stamp

ROUNDS = 6
OURS = "fa4"


def cells() -> list[BatchShape]:
    """Short decode steps, where a launch counts, and a long one."""
    return [replace(uniform(rows, kv), num_q_heads=32, num_kv_heads=8) for rows, kv in ((1, 1024), (8, 1024), (64, 1024), (64, 4096))]


def write_of(batch: BatchShape, tensors: BatchTensors) -> Call:
    """vLLM's write of each row's last token."""
    from vllm import _custom_ops

    page_table = tensors.page_table
    assert page_table is not None
    last = tensors.seqused_k.long() - 1
    rows = torch.arange(len(last), device=last.device)
    slots = page_table[rows, last // batch.page_size].long() * batch.page_size + last % batch.page_size
    key, value = (
        torch.randn(len(last), batch.num_kv_heads, d, device="cuda", dtype=torch.bfloat16) for d in (batch.head_dim, batch.value_dim)
    )
    one = torch.ones((), device="cuda")
    return lambda: _custom_ops.reshape_and_cache_flash(key, value, tensors.k_cache, tensors.v_cache, slots, "auto", one, one)


def measure(batch: BatchShape) -> dict[str, float]:
    """Microseconds of each graph."""
    tensors = BatchTensors.make(batch)
    write = write_of(batch, tensors)
    peer = prepare(FA3, batch, tensors)
    assert peer is not None
    attention: dict[str, Call] = {OURS: Ours.make(batch, tensors).call, FA3: peer}
    calls: dict[str, Call] = {"write": write, **attention}
    for name, attend in attention.items():
        calls[f"write + {name}"] = lambda attend=attend: (write(), attend())  # type: ignore[misc]
    replays = {name: capture(call) for name, call in calls.items()}
    for name in attention:  # attention sees what the write beside it has written
        tensors.out.fill_(float("nan"))
        replays[f"write + {name}"]()
        tensors.worst_error(batch, name, must_hold=True)
    return cold_in_turns(replays, ROUNDS, Flush.READ)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = {}
    for batch in cells():
        us = found[batch.title] = measure(batch)
        print(f"{batch.title} | " + ", ".join(f"{name} {value:.1f}" for name, value in us.items()), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"stamp": gpu_stamp(None), "us": found}, indent=1))


if __name__ == "__main__":
    main()
