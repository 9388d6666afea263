"""Large logits on the GPU present: our error beside that of torch's SDPA in the same dtype, which may be half of ours at most.

    python -m tests.device.prove_large_logits [--only NAME] [--json FILE]

Decode (a CTA has the whole row, or splits it with others), batch-invariant decode and prefill, 2K to 32K keys; the channels of
`tests.support.large_logits`, all rows of a head dim of 128 alike. The oracle is in float64. What a channel costs is not measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fa4_backend import AttentionMetadata, AttentionProblem, BatchLimits, paged_attention, plan_attention
from fa4_backend.arch import arch_of_capability
from fa4_backend.kernel_stamp import gpu_stamp
from fa4_backend.problem import MaskFeatures
from tests.support.large_logits import CHANNELS, Channel

DEVICE, HEAD_DIM, PAGE = "cuda", 128, 16
HEADS, KV_HEADS = 4, 1
LSE_ABSOLUTE = 2e-5
# A tensor core cuts a sum to float32 at each step of 16 (2^-23, always towards 0), while a large product waits in it; then the product with
# the scale, the bias and the sum, rounded.
LSE_RELATIVE = (HEAD_DIM // 16 + 2) * 2.0**-23


class Setup(NamedTuple):
    """A kernel and how it is fed."""

    rows: int
    query_len: int
    batch_invariant: bool = False

    def __str__(self) -> str:
        kind = "decode" if self.query_len == 1 else "prefill"
        return f"{kind}, {self.rows} x {self.query_len}{', invariant' * self.batch_invariant}"


# 264 rows: a CTA each on an H100 (two an SM), so that none is cut; 1 and 3 rows are cut into slots.
SETUPS = (Setup(264, 1), Setup(3, 1), Setup(1, 1), Setup(264, 1, True), Setup(3, 1, True), Setup(1, 300), Setup(1, 300, True))
KEYS = (2048, 8192, 16384, 32768)


class Tensors(NamedTuple):
    """One sequence's keys and values, which all rows share, and the queries."""

    q: torch.Tensor  # (rows * query_len, HEADS, HEAD_DIM)
    k: torch.Tensor  # (keys, KV_HEADS, HEAD_DIM)
    v: torch.Tensor
    sinks: torch.Tensor | None  # (HEADS,) float32
    slopes: torch.Tensor | None

    @classmethod
    def make(cls, channel: Channel, setup: Setup, keys: int) -> Tensors:
        """Drawn on the GPU from a fixed seed."""
        torch.manual_seed(keys)
        dtype = getattr(torch, str(channel.case.get("dtype", "bfloat16")))
        q = torch.randn(setup.rows * setup.query_len, HEADS, HEAD_DIM, device=DEVICE).to(dtype)
        k, v = (torch.randn(keys, KV_HEADS, HEAD_DIM, device=DEVICE).to(dtype) for _ in range(2))
        if not channel.is_random:
            q.zero_(), k.zero_()
            v = v.sign() if channel.signs else torch.ones_like(v)
        q[..., 0] = channel.q
        k[..., 0] = (channel.k * channel.factor(torch.arange(keys, dtype=torch.float64))).to(DEVICE, dtype)[:, None]
        sinks = None if channel.sink is None else torch.full((HEADS,), channel.sink, device=DEVICE)
        slopes = torch.rand(HEADS, device=DEVICE) if channel.case.get("alibi") else None
        return cls(q, k, v, sinks, slopes)


def ours(t: Tensors, setup: Setup, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Our operator; all rows list the same pages."""
    arch = arch_of_capability(*torch.cuda.get_device_capability())
    assert arch is not None, torch.cuda.get_device_name()
    keys = t.k.shape[0]
    mask = MaskFeatures(has_softcap=softcap > 0, has_sinks=t.sinks is not None, has_alibi=t.slopes is not None)
    problem = AttentionProblem(
        num_q_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, head_dim_v=HEAD_DIM, dtype=str(t.q.dtype).removeprefix("torch."),
        page_size=PAGE, arch=arch, has_lse=True, batch_invariant=setup.batch_invariant, mask=mask,
    )  # fmt: skip
    limits = BatchLimits(max_num_seqs=setup.rows, max_num_tokens=t.q.shape[0], max_seqlen_k=keys, decode_query_len=1)
    plan = plan_attention(problem, limits, num_sms=torch.cuda.get_device_properties(0).multi_processor_count)
    metadata = AttentionMetadata.allocate(plan, DEVICE)
    cu_seqlens_q = torch.arange(setup.rows + 1, device=DEVICE, dtype=torch.int32) * setup.query_len
    seqused_k = torch.full((setup.rows,), keys, device=DEVICE, dtype=torch.int32)
    metadata.refresh(cu_seqlens_q=cu_seqlens_q, seqused_k=seqused_k, max_seqlen_q=setup.query_len, max_seqlen_k=keys)
    table = torch.arange(keys // PAGE, device=DEVICE, dtype=torch.int32).expand(setup.rows, -1).contiguous()
    k, v = (x.view(keys // PAGE, PAGE, KV_HEADS, HEAD_DIM) for x in (t.k, t.v))
    out, lse = paged_attention(
        t.q, k, v, table, cu_seqlens_q, seqused_k, plan=plan, metadata=metadata, softcap=softcap, sinks=t.sinks, alibi_slopes=t.slopes
    )
    assert lse is not None
    return out, lse


def bias_of(t: Tensors, query_len: int) -> torch.Tensor:
    """(HEADS, query_len, keys) float64: the causal mask and ALiBi."""
    keys = t.k.shape[0]
    distance = torch.arange(keys - query_len, keys, device=DEVICE)[:, None] - torch.arange(keys, device=DEVICE)
    bias = torch.zeros(HEADS, query_len, keys, device=DEVICE, dtype=torch.float64)
    if t.slopes is not None:
        bias -= t.slopes.double()[:, None, None] * distance.abs()
    return bias.masked_fill_(distance < 0, float("-inf"))


def oracle(t: Tensors, q: torch.Tensor, softcap: float, rounded: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """out (query_len, HEADS, HEAD_DIM) and lse (HEADS, query_len) of one sequence's q in float64, weights and out rounded to `rounded`."""
    scores = torch.einsum("qhd,kd->hqk", q.double(), t.k[:, 0].double()) * HEAD_DIM**-0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores += bias_of(t, q.shape[0])
    if t.sinks is not None:
        scores = torch.cat([scores, t.sinks.double()[:, None, None].expand(HEADS, q.shape[0], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : t.k.shape[0]].to(rounded).double()
    return torch.einsum("hqk,kd->qhd", weights, t.v[:, 0].double()).to(rounded).double(), torch.logsumexp(scores, -1)


def torch_sdpa(t: Tensors, q: torch.Tensor) -> torch.Tensor:
    """(query_len, HEADS, HEAD_DIM) of torch's SDPA; without soft cap and sinks, for which the rounded oracle stands in."""
    k, v = (x.transpose(0, 1)[None].expand(1, HEADS, -1, -1) for x in (t.k, t.v))
    bias = None if q.shape[0] == 1 and t.slopes is None else bias_of(t, q.shape[0]).to(q.dtype)[None]
    return torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=bias)[0].transpose(0, 1)


def judge(name: str, setup: Setup, keys: int) -> dict[str, Any]:
    """Errors of the first and the last sequence, which hold other queries."""
    channel = CHANNELS[name]
    softcap = float(channel.case.get("softcap", 0.0))  # type: ignore[arg-type]
    t = Tensors.make(channel, setup, keys)
    out, lse = ours(t, setup, softcap)
    n = setup.query_len
    error = torch_error = lse_error = lse_size = largest = 0.0
    for first in sorted({0, (setup.rows - 1) * n}):
        rows = slice(first, first + n)
        want, want_lse = oracle(t, t.q[rows], softcap)
        error = max(error, (out[rows].double() - want).abs().nan_to_num(torch.inf).max().item())
        lse_error = max(lse_error, (lse[:, rows].double() - want_lse).abs().nan_to_num(torch.inf).max().item())
        lse_size, largest = max(lse_size, want_lse.abs().max().item()), max(largest, want.abs().max().item())
        if softcap or t.sinks is not None:
            torch_error = max(torch_error, (oracle(t, t.q[rows], softcap, t.q.dtype)[0] - want).abs().max().item())
        else:
            torch_error = max(torch_error, (torch_sdpa(t, t.q[rows]).double() - want).abs().nan_to_num(torch.inf).max().item())
    # Where torch is right by luck (one key, V = 1), the last rounding alone may cost half a unit in the last place.
    allowed = max(2 * torch_error, torch.finfo(t.q.dtype).eps / 2 * largest)
    is_right = error <= allowed and lse_error <= max(LSE_ABSOLUTE, LSE_RELATIVE * lse_size)
    return {"out": error, "torch": torch_error, "allowed": allowed, "lse": lse_error, "lse size": lse_size, "ok": is_right}


def main() -> int:
    """Exit status 1 when an error is above twice torch's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="channels, setups whose name contains this")
    parser.add_argument("--json", type=Path, help="write what was seen there")
    options = parser.parse_args()
    seen: dict[str, dict[str, Any]] = {}
    for name in CHANNELS:
        for setup in SETUPS:
            for keys in KEYS:
                label = f"{name}: {setup}, {keys} keys"
                if options.only in label:
                    seen[label] = judge(name, setup, keys)
                    print(label, {key: f"{x:.2g}" if isinstance(x, float) else x for key, x in seen[label].items()}, flush=True)
    if options.json:
        options.json.write_text(json.dumps({"stamp": gpu_stamp(), "cases": seen}, indent=1) + "\n")
    wrong = [label for label, result in seen.items() if not result["ok"]]
    print(f"{len(seen)} cases, wrong: {wrong or 'none'}")
    return 1 if wrong or not seen else 0


if __name__ == "__main__":
    sys.exit(main())
