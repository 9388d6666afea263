"""Exact mode: a token's bits are the same from a whole prompt, from a later chunk of it, alone as a decode row, and beside others.

Run on the emulator for both chips. Tokens sit at the edges of a KV block (128 keys) and of a query tile (32 tokens of 4 heads).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fa4_backend import AttentionMetadata, BatchLimits, UnsupportedProblem, paged_attention, plan_attention
from fa4_backend.kernels import families
from fa4_backend.kernels.schedule.work_list import PARTIAL_SLOT, QUEUE_TOTAL
from fa4_backend.kernels.sm90 import config as sm90_config
from fa4_backend.support import check_problem
from tests.support.problems import make_problem
from tests.support.slow_cases import with_slow

pytestmark = pytest.mark.emulated

PROMPT, NUM_Q_HEADS, NUM_KV_HEADS, PAGE = 290, 8, 2, 16
PROBLEM = {
    "num_q_heads": NUM_Q_HEADS, "num_kv_heads": NUM_KV_HEADS, "head_dim": 64, "head_dim_v": 64, "dtype": "bfloat16", "page_size": PAGE,
    "has_lse": True, "batch_invariant": True,
}  # fmt: skip


class Prompt:
    """One sequence in a pool; `attend` computes any ranges of its tokens in one batch, as an engine might cut them."""

    def __init__(
        self,
        arch: str,
        *,
        head_dim: int = 64,
        window_left: int | None = None,
        softcap: float = 0.0,
        growing: bool = False,
        num_sms: int = 3,
        **flags: bool,
    ) -> None:
        """`growing`: the first key's score is 10 (even tokens) or 20 (odd ones) log2 units above all others, which are seen before it."""
        generator = torch.Generator().manual_seed(0)
        pages = -(-PROMPT // PAGE)
        self.q = torch.randn(PROMPT, NUM_Q_HEADS, head_dim, generator=generator).bfloat16()
        pool = torch.randn(pages + 2, PAGE, NUM_KV_HEADS, 2 * head_dim, generator=generator).bfloat16()
        self.k, self.v = pool.split(head_dim, dim=-1)
        self.table = torch.randperm(pages + 2, generator=generator)[:pages].int()
        if growing:
            self.q *= 0.1
            self.k[..., 0] = 0.0
            self.k[self.table[0], 0] = 0.0
            self.k[self.table[0], 0, :, 0] = 8.0
            log2_units = torch.where(torch.arange(PROMPT) % 2 == 0, 10.0, 20.0)
            self.q[..., 0] = (log2_units / (8.0 * head_dim**-0.5 * math.log2(math.e))).bfloat16()[:, None]
        self.window_left = window_left
        self.softcap = softcap
        flags |= {"has_window_left": window_left is not None, "has_softcap": softcap > 0}
        dims = {"head_dim": head_dim, "head_dim_v": head_dim}
        problem = make_problem(arch=f"emulated-{arch}", **(PROBLEM | dims | flags))
        self.plan = plan_attention(problem, BatchLimits(8, 1024, PROMPT), num_sms=num_sms)
        self.is_cut = False  # whether the last batch had tiles that were cut along KV

    def attend(self, *ranges: tuple[int, int], known: int = PROMPT) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """O and lse of tokens `begin .. end` of each range, a row of the batch each. Keys from token `known` on are of another prompt."""
        tokens = torch.arange(known, PROMPT)
        k = self.k.clone()
        k[self.table[tokens // PAGE].long(), tokens % PAGE] *= -1.5
        lens = [end - begin for begin, end in ranges]
        q = torch.cat([self.q[begin:end] for begin, end in ranges])
        cu_seqlens_q = torch.tensor([0, *lens]).cumsum(0).int()
        seqused_k = torch.tensor([end for _, end in ranges], dtype=torch.int32)
        metadata = AttentionMetadata.allocate(self.plan, "cpu")
        metadata.refresh(cu_seqlens_q=cu_seqlens_q, seqused_k=seqused_k, max_seqlen_q=max(lens), max_seqlen_k=PROMPT)
        out, lse = torch.full_like(q, math.nan), torch.full((NUM_Q_HEADS, len(q)), math.nan)
        table = self.table.expand(len(ranges), -1).contiguous()
        paged_attention(
            q,
            k,
            self.v,
            table,
            cu_seqlens_q,
            seqused_k,
            plan=self.plan,
            metadata=metadata,
            window_left=self.window_left,
            softcap=self.softcap,
            out=out,
            lse=lse,
        )
        work = metadata.work
        assert work is not None
        self.is_cut = bool((work.prefill_tiles[: int(work.prefill_queue[0, QUEUE_TOTAL]), PARTIAL_SLOT] >= 0).any())
        return list(zip(out.split(lens), lse.split(lens, dim=1), strict=True))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    # Blocks that only other rows of a tile see; a row's reference is of the first block in which it sees a key.
    "window, soft cap": {"window_left": 150, "softcap": 2.0},
    "wide soft cap": {"window_left": 150, "softcap": 60.0},  # wider than references that stay
    "growing": {"growing": True},  # rows that move their maximum beside rows that need not
}


CHIPS = ("sm_90a", "sm_100a")


@pytest.mark.parametrize(("name", "arch"), with_slow([(name, arch) for name in CASES for arch in CHIPS], [("window, soft cap", "sm_100a")]))
def test_a_tokens_bits_do_not_depend_on_how_the_prompt_was_cut(name: str, arch: str) -> None:
    prompt = Prompt(arch, exact=True, **CASES[name])
    ((whole, whole_lse),) = prompt.attend((0, PROMPT))
    cuts = [(127, 128), (128, 129), (PROMPT - 1, PROMPT), (31, 33), (100, 230), (1, 3), (9, 11)]
    cuts.append((255, 270))  # its first token sees nothing of the last block, and its first key in one that all see whole
    alone = [prompt.attend(cut, known=cut[1])[0] for cut in cuts]
    for (begin, end), (out, lse) in zip([*cuts, *cuts], [*prompt.attend(*cuts), *alone], strict=True):
        assert torch.equal(out, whole[begin:end]) and torch.equal(lse, whole_lse[:, begin:end]), (begin, end)


def test_nor_on_which_ctas_have_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces of a block, tiles of a token by itself are cut along KV; those of many rows and of the prompt are not."""
    monkeypatch.setattr(sm90_config, "DECODE_PIECE_KEYS", 128)
    monkeypatch.setattr(families, "MIN_PART_KEYS", 128)
    prompt = Prompt("sm_90a", exact=True, head_dim=128, num_sms=8)
    assert prompt.plan.kernels is not None and prompt.plan.kernels.work.part_piece_blocks == 1
    ((whole, whole_lse),) = prompt.attend((0, PROMPT))
    assert not prompt.is_cut
    cut = []
    for ranges in ([(PROMPT - 1, PROMPT)], [(260, 270), (128, 129)], [(255, 270)] * 6, [(100, 230), (PROMPT - 5, PROMPT)]):
        for (begin, end), (out, lse) in zip(ranges, prompt.attend(*ranges), strict=True):
            assert torch.equal(out, whole[begin:end]) and torch.equal(lse, whole_lse[:, begin:end]), (begin, end)
        cut.append(prompt.is_cut)
    assert True in cut and False in cut, cut


def test_without_it_decode_and_prefill_differ() -> None:
    """The control: the decode kernel has tiles of its own, so the comparison above can fail."""
    prompt = Prompt("sm_90a", head_dim=128)  # of kernels that other tests compile
    ((_, whole_lse),) = prompt.attend((0, PROMPT))
    ((_, alone_lse),) = prompt.attend((PROMPT - 1, PROMPT))
    assert not torch.equal(alone_lse, whole_lse[:, -1:])


def test_every_row_goes_to_the_prefill_kernel() -> None:
    prompt = Prompt("sm_90a", exact=True)
    assert prompt.plan.kernels.decode is None


def test_refusals() -> None:
    with pytest.raises(UnsupportedProblem, match="exact: expected batch_invariant=True"):
        make_problem(arch="sm_90a", exact=True, **{**PROBLEM, "batch_invariant": False})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedProblem, match="exact on cpu: expected False"):
        check_problem(make_problem(arch="cpu", exact=True, **PROBLEM))  # type: ignore[arg-type]
