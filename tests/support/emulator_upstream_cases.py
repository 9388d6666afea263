"""Cases of upstream's kernels on the emulator, one JSON line a run: `python -m tests.support.emulator_upstream_cases ARCH [CASE ...]`.

A process serves one arch: upstream and the DSL read it from the environment once.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch

from fa4_backend import emulator
from fa4_backend.emulator import flash_attention as upstream

HEAD_DIM = 128
NUM_SMS = 148


@dataclass(frozen=True)
class Dense:
    seqlen: int
    num_heads: int
    causal: bool

    def run(self, emu: emulator.Session) -> dict[str, float]:
        q, k, v = (torch.randn(1, self.seqlen, self.num_heads, HEAD_DIM).bfloat16() for _ in range(3))
        out = torch.full_like(q, float("nan"))
        o, lse = upstream.forward(emu, q, k, v, causal=self.causal, return_lse=True, out=out)[:2]
        errors = [
            _errors(o[0, :, h], lse[0, h], *_reference(q[0, :, h], k[0, :, h], v[0, :, h], self.causal)) for h in range(self.num_heads)
        ]
        return _worst(errors)


@dataclass(frozen=True)
class Paged:
    """Varlen queries against a paged cache whose unused pages are NaN; the heads of a KV head are packed."""

    page_size: int
    num_splits: int = 1
    q_lens: tuple[int, ...] = (5, 40, 133, 70)
    kv_lens: tuple[int, ...] = (133, 300, 257, 70)
    num_q_heads: int = 16
    num_kv_heads: int = 2

    def run(self, emu: emulator.Session) -> dict[str, float]:
        page = self.page_size
        num_pages = 5120 // page
        caches = [torch.full((num_pages, page, self.num_kv_heads, HEAD_DIM), float("nan")).bfloat16() for _ in "kv"]
        table = torch.zeros(len(self.kv_lens), -(-max(self.kv_lens) // page), dtype=torch.int32)
        free = iter(torch.randperm(num_pages).tolist())
        rows: list[list[torch.Tensor]] = []
        for b, length in enumerate(self.kv_lens):
            rows.append([torch.randn(length, self.num_kv_heads, HEAD_DIM).bfloat16() for _ in "kv"])
            for first in range(0, length, page):
                index = table[b, first // page] = next(free)
                for cache, data in zip(caches, rows[-1], strict=True):
                    cache[index] = 0  # upstream's kernels want finite rows after the last valid one
                    part = data[first : first + page]
                    cache[index, : len(part)] = part
        starts = [0, *torch.tensor(self.q_lens).cumsum(0).tolist()]
        q = torch.randn(starts[-1], self.num_q_heads, HEAD_DIM).bfloat16()
        out = torch.full_like(q, float("nan"))
        o, lse = upstream.forward(
            emu, q, *caches, cu_seqlens_q=torch.tensor(starts, dtype=torch.int32), seqused_k=torch.tensor(self.kv_lens, dtype=torch.int32),
            page_table=table, max_seqlen_q=max(self.q_lens), max_seqlen_k=max(self.kv_lens), causal=True, return_lse=True, out=out,
            num_splits=self.num_splits,
        )[:2]  # fmt: skip
        errors = []
        for b, (k, v) in enumerate(rows):
            part = slice(starts[b], starts[b + 1])
            for h in range(self.num_q_heads):
                group = h * self.num_kv_heads // self.num_q_heads
                errors.append(_errors(o[part, h], lse[h, part], *_reference(q[part, h], k[:, group], v[:, group], True)))
        return _worst(errors)


CASES: dict[str, dict[str, Dense | Paged]] = {
    "sm_100a": {
        "causal": Dense(384, 2, True),
        "noncausal-2cta": Dense(512, 1, False),
        "paged128": Paged(128),
        "paged16": Paged(16, q_lens=(5, 40), kv_lens=(133, 300)),
        "split": Paged(128, num_splits=3, q_lens=(1, 3), kv_lens=(600, 257)),
    },
    "sm_90a": {
        "causal": Dense(256, 2, True),
        "paged128": Paged(128, q_lens=(5, 40), kv_lens=(133, 300)),
        "paged16": Paged(16, q_lens=(5, 40), kv_lens=(133, 300)),
    },
}


def _reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 output (rows, head_dim) and lse (rows,) of one head, aligned to the bottom right."""
    scores = q.float() @ k.float().T * HEAD_DIM**-0.5
    if causal:
        hidden = torch.ones(len(q), len(k)).triu(len(k) - len(q) + 1).bool()
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v.float(), scores.logsumexp(-1)


def _errors(out: torch.Tensor, lse: torch.Tensor, ref: torch.Tensor, ref_lse: torch.Tensor) -> tuple[float, float, float]:
    """Largest error of the output, the rounding of the output type alone, and the relative error of lse; NaN counts as 9."""
    error = (out.float() - ref).abs().nan_to_num(9).max().item()
    rounding = (ref.to(out.dtype).float() - ref).abs().max().item()
    return error, rounding, ((lse - ref_lse).abs().nan_to_num(9) / ref_lse.abs().clamp(1)).max().item()


def _worst(errors: list[tuple[float, float, float]]) -> dict[str, float]:
    return {name: max(e[i] for e in errors) for i, name in enumerate(("err", "rounding", "lse_err"))}


def run_case(arch: str, name: str, seed: int | None) -> dict[str, Any]:
    torch.manual_seed(seed or 0)
    with emulator.session(arch=arch, num_sms=NUM_SMS, seed=seed) as emu:
        result: dict[str, Any] = CASES[arch][name].run(emu)
    report = emu.report
    return {"case": name, "seed": seed, **result, "races": report.races, "notes": report.notes, "instructions": report.instructions,
            "seconds": report.seconds, "opcodes": sorted(report.opcodes())}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", choices=sorted(CASES))
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    upstream.prepare(args.arch)
    for name in args.cases or CASES[args.arch]:
        for seed in [None, *range(args.seeds)]:
            print(json.dumps(run_case(args.arch, name, seed)), flush=True)


if __name__ == "__main__":
    main()
