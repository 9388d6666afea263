"""Proof of attention over K and V without pages on a GPU: `python -m tests.device.prove_ragged --batches 2000 --json FILE`.

Prints one line a check and writes all of it as data. Parts: fuzzed poisoned batches through the operator against the float32 oracle; a
batch with pages and without, bit by bit; a captured graph that follows the lengths of its replays.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fa4_backend import AttentionMetadata, ragged_attention
from fa4_backend.arch import arch_of_capability
from fa4_backend.kernel_stamp import families_of, gpu_stamp
from fa4_backend.problem import FP8, PAGED, RAGGED, SAME_AS_Q
from tests.device.fuzz_all import compile_all, fuzz_all, setup_plans
from tests.device.prove_prefill import run_case
from tests.support.fuzz import prefill_plan
from tests.support.fuzz_setups import ragged_setups
from tests.support.paged_case import PagedCase

LENGTHS = {"query_lens": (5, 128, 1, 0, 300, 33, 127), "kv_lens": (133, 128, 77, 50, 700, 33, 129)}


def cases(arch: str, kv_dtype: str) -> dict[str, PagedCase]:
    """Batches that are run with pages and without."""
    base = PagedCase(**LENGTHS, num_q_heads=8, num_kv_heads=2, head_dim=128, kv_dtype=kv_dtype, arch=arch, batch_invariant=True)
    return {
        "d128 causal": base,
        "d192/128 full, both windows": replace(
            base, num_kv_heads=8, head_dim=192, head_dim_v=128, is_causal=False, window_left=70, window_right=9, layout="hnd"
        ),
    }


def graph_case(arch: str, kv_dtype: str) -> PagedCase:
    """The batch whose steps are captured."""
    return replace(cases(arch, kv_dtype)["d128 causal"], kv_source=RAGGED, batch_invariant=False)


def check_bits(arch: str, kv_dtype: str) -> list[dict]:
    """Whole tiles give the same bits with pages and without: both lists are those of batch-invariant plans."""
    results = []
    for name, case in cases(arch, kv_dtype).items():
        paged, ragged = case.build("cuda"), replace(case, kv_source=RAGGED).build("cuda")
        run_case(paged)
        out, lse = ragged.run(ragged.case.plan(num_sms=torch.cuda.get_device_properties(0).multi_processor_count))
        rows, want_lse = slice(0, paged.total_q), paged.arguments.lse
        assert want_lse is not None
        row = {"case": name, "ok": True, "why": ""}
        try:
            row |= asdict(ragged.check(out, lse))
        except AssertionError as error:
            row |= {"ok": False, "why": str(error)[:200]}
        if not (torch.equal(out[rows], paged.arguments.out[rows]) and torch.equal(lse[:, rows], want_lse[:, rows])):
            row |= {"ok": False, "why": row["why"] or "bits differ from those with pages"}
        results.append(row)
        print("bits", row, flush=True)
    return results


def check_graph(arch: str, kv_dtype: str) -> dict:
    """One graph of refresh and call, replayed for batches of other lengths: each is right."""
    case = graph_case(arch, kv_dtype)
    built = case.build("cuda")
    a, plan = built.arguments, case.plan(num_sms=torch.cuda.get_device_properties(0).multi_processor_count)
    metadata = AttentionMetadata.allocate(plan, "cuda")
    bounds = {"max_seqlen_q": plan.limits.max_num_tokens, "max_seqlen_k": plan.limits.max_seqlen_k}
    values = {name: getattr(a, name) for name in ("softmax_scale", "k_scale", "v_scale", "out", "lse")}

    def step() -> None:
        metadata.refresh(cu_seqlens_q=a.cu_seqlens_q, cu_seqlens_k=a.cu_seqlens_k, **bounds)
        ragged_attention(a.q, a.k_cache, a.v_cache, a.cu_seqlens_q, a.cu_seqlens_k, plan=plan, metadata=metadata, **values)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    result = {"ok": True, "why": "", "replays": 0}
    for shift in range(4):
        # Other lengths over the same rows of q, k and v.
        queries, keys = LENGTHS["query_lens"], LENGTHS["kv_lens"]
        lens = [(q, k) for q, k in zip(queries[shift:] + queries[:shift], keys[shift:] + keys[:shift], strict=True)]
        other = replace(case, query_lens=tuple(q for q, _ in lens), kv_lens=tuple(k for _, k in lens), seed=shift).build("cuda")
        for mine, its in zip(a, other.arguments, strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(its)
        assert a.lse is not None
        a.out.fill_(math.nan)
        a.lse.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        try:
            other.check(a.out, a.lse)
        except AssertionError as error:
            result |= {"ok": False, "why": str(error)[:200]}
        result["replays"] += 1
    print("graph", result, flush=True)
    return result


def main() -> None:
    """Run the parts asked for; exits 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="bits,graph,fuzz")
    parser.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto", help="of K and V; auto: that of q")
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of fuzzed batches: no further one begins after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=12, help="that compile kernels side by side")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.cuda.get_device_properties(0)
    arch = arch_of_capability(device.major, device.minor) or "none"
    schedule, _, prefill = families_of(arch)
    kv_dtype = {"auto": SAME_AS_Q, "fp8": FP8}[options.kv_dtype]
    report: dict = {"stamp": gpu_stamp((schedule, prefill)), "torch": torch.__version__, "seed": options.seed, "kv_dtype": kv_dtype}
    setups = ragged_setups(arch, kv_dtype)
    both = [replace(case, kv_source=source) for case in cases(arch, kv_dtype).values() for source in (PAGED, RAGGED)]
    plans = [*setup_plans(setups), *(case.plan(device.multi_processor_count) for case in (*both, graph_case(arch, kv_dtype)))]
    plans += [prefill_plan(case.plan(device.multi_processor_count)) for case in both]
    print(f"compiled in {compile_all(plans, options.processes):.0f} s", flush=True)
    parts = options.parts.split(",")
    if "bits" in parts:
        report["bits"] = check_bits(arch, kv_dtype)
    if "graph" in parts:
        report["graph"] = check_graph(arch, kv_dtype)
    if "fuzz" in parts:
        report["fuzz"] = fuzz_all(setups, options.batches, options.seconds, options.seed, has_graphs=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    failed = [r for r in report.get("bits", []) if not r["ok"]] + [r for r in report.get("fuzz", []) if r["failures"]]
    failed += [report["graph"]] if "graph" in report and not report["graph"]["ok"] else []
    print(f"{len(failed)} failed checks; {sum(r['batches'] for r in report.get('fuzz', []))} fuzzed batches", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
