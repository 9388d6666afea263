"""Faults that change one statement: an ordering weakened, a count or an address off, an operand swapped, a statement dropped or doubled.

Control flow and integer arithmetic are left alone: whether a bound that is off by one shows depends on the case, not on the emulator. Each
kind is a pattern and what its first match becomes. Of a kind with many sites, `most` are drawn, evenly over the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Change = Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class Edit:
    """One kind of fault: what it looks for in a statement, what it makes of the match, and how many sites are tried."""

    kind: str
    pattern: re.Pattern[str]
    change: Change
    most: int = 4

    def apply(self, line: str) -> str | None:
        """The statement with the fault; None where it has no place."""
        match = self.pattern.search(line)
        if match is None:
            return None
        changed = line[: match.start()] + self.change(match) + line[match.end() :]
        return changed if changed != line else None


def _edit(kind: str, pattern: str, change: str | Change, most: int = 4) -> Edit:
    make = change if callable(change) else lambda match: match.expand(change)
    return Edit(kind, re.compile(pattern), make, most)


def _number(amount: int) -> Change:
    """The number in group 2 plus `amount`, between groups 1 and 3."""
    return lambda match: f"{match.group(1)}{int(match.group(2), 0) + amount}{match.group(3)}"


def _offset(amount: int) -> Change:
    """[base+n] -> [base+n+amount], with the text before in group 1 and after in group 4."""
    return lambda match: f"{match.group(1)}[{match.group(2)}+{int(match.group(3) or 0) + amount}]{match.group(4)}"


def _only_where(register: str, test: str) -> Change:
    """The statement in group 1, executed only where a special register, or some bits of it, passes a test: "and 96 eq 0"."""
    _, bits, how, value = test.split()
    setup = f".reg .pred fi_p; .reg .b32 fi_w; mov.u32 fi_w, {register}; and.b32 fi_w, fi_w, {bits}; setp.{how}.u32 fi_p, fi_w, {value};"
    return lambda match: f"{{ {setup} @fi_p {match.group(1)} }}"


_ADDRESS = r"\[([%\w$]+)(?:\+(-?\d+))?\]"
_DROP = r""

EDITS = (
    # ordering
    _edit("relax atomic", r"^(\s*(?:@!?%\w+ )?atom[\w.:]*?)\.acq_rel", r"\1.relaxed"),
    _edit("atomic only acquires", r"^(\s*(?:@!?%\w+ )?atom[\w.:]*?)\.acq_rel", r"\1.acquire"),
    _edit("atomic only releases", r"^(\s*(?:@!?%\w+ )?atom[\w.:]*?)\.acq_rel", r"\1.release"),
    _edit("relax arrive", r"mbarrier\.arrive(?!\.expect_tx|\.release)\.(shared|b64)", r"mbarrier.arrive.relaxed.cta.\1"),
    _edit("relax remote arrive", r"mbarrier\.arrive\.release", r"mbarrier.arrive.relaxed"),
    _edit("relax wait", r"(try_wait\.parity)(?:\.acquire\.\w+)?\.(shared)", r"\1.relaxed.cta.\2"),
    _edit("relax cluster barrier", r"barrier\.cluster\.arrive(?:\.release)?(?!\.relaxed)", r"barrier.cluster.arrive.relaxed"),
    _edit("narrow a fence", r"fence\.acq_rel\.(gpu|sys|cluster)", r"fence.acq_rel.cta"),
    _edit("fence the other memory", r"fence\.proxy\.async\.shared::cta", r"fence.proxy.async.global"),
    _edit("fence only shared memory", r"fence\.proxy\.async;", r"fence.proxy.async.shared::cta;"),
    _edit("wait once", r"bra(?:\.uni)?\s+(LAB_WAIT|AGAIN)\s*;", _DROP, 8),
    _edit("arrive at a named barrier only", r"bar\.sync\s+([%\w]+, *\d+;)", r"bar.arrive \1"),
    _edit("drop dependency wait", r"griddepcontrol\.wait;", _DROP),
    _edit("relax acquire load", r"\bld\.acquire", "ld.relaxed"),
    _edit("weak load of a flag", r"\bld\.(?:acquire|relaxed)\.\w+\.global", "ld.global"),
    _edit("narrow an atomic", r"(atom\.global\.acq_rel)\.(add|cas)", r"\1.cta.\2"),
    _edit("fence by another lane", r"^\s*(fence\.proxy[^;]*;)", _only_where("%laneid", "and 31 eq 7"), 6),
    # counts and targets of barriers
    _edit("initial count + 1", r"(mbarrier\.init[\w.:]*\s+\[[^\]]*\],\s*)(\d+)(;)", _number(1)),
    _edit("initial count - 1", r"(mbarrier\.init[\w.:]*\s+\[[^\]]*\],\s*)([2-9]|\d\d+)(;)", _number(-1)),
    _edit("drop init", r"mbarrier\.init[\w.:]*\s+[^;]*;", _DROP, 3),
    _edit("arrive twice", r"^(\s*(?:@!?%\w+ )?mbarrier\.arrive(?!\.expect_tx)[^;]*;)", r"\1 \1"),
    _edit("commit twice", r"((?:@\w+ )?tcgen05\.commit[^;]*;)", r"\1 \1"),
    _edit("arrive at the next barrier", rf"(mbarrier\.arrive(?!\.expect_tx)[\w.:]*\s+[%\w]+,\s*){_ADDRESS}(.*)", _offset(8)),
    _edit("wait at the next barrier", rf"(try_wait[\w.:]*\s+[%\w]+,\s*){_ADDRESS}(.*)", _offset(8)),
    _edit("expect at the next barrier", rf"(arrive\.expect_tx[\w.:]*\s+[%\w]+,\s*){_ADDRESS}(.*)", _offset(8)),
    _edit("copy signals the next barrier", rf"(cp\.async\.bulk\.tensor[^}}]*\}}\],\s*){_ADDRESS}(.*)", _offset(8)),
    _edit("named barrier + 32", r"(bar\.(?:sync|arrive)\s+[%\w]+,\s*)(\d+)(;)", _number(32)),
    _edit("named barrier - 32", r"(bar\.(?:sync|arrive)\s+[%\w]+,\s*)(\d+)(;)", _number(-32)),
    _edit("drop guard of an operation", r"@(?!%)\w+ (tcgen05|mbarrier|cp\.async)", r"\1", 6),
    _edit("negate guard of an operation", r"^(\s*)@(%\w+) (st|ld|atom|red|mbarrier|cp|tcgen05|bar)", r"\1@!\2 \3", 6),
    _edit("own barrier for the peer's", r"mapa\.shared::cluster\.u32\s+([%\w]+),\s*([%\w]+),[^;]*;", r"mov.u32 \1, \2;"),
    _edit("arrive without lane 0", r"^\s*(mbarrier\.arrive(?!\.expect_tx)[^;]*;)", _only_where("%laneid", "and 31 ne 0"), 6),
    # lanes
    _edit("every lane elected", r"elect\.sync\s+[_%\w]+\|([%\w]+),[^;]*;", r"setp.eq.u32 \1, 0, 0;", 6),
    _edit("warp sync without a lane", r"(bar\.warp\.sync\s+)(?:-1|0xffffffff);", r"\g<1>-2;"),
    _edit("shuffle from elsewhere", r"(shfl\.sync\.\w+\.b32\s+[^,]+,\s*[^,]+,\s*)(\d+)(,)", _number(1)),
    _edit("shuffle among 16", r"(shfl\.sync\.\w+\.b32\s[^;]*,\s*)31(,\s*[-\w]+;)", r"\g<1>4127\2"),
    _edit("members without a lane", r"((?:shfl|vote|redux|elect|match)[^;]*,\s*)-1;", r"\g<1>-2;"),
    _edit("vote all for any", r"vote\.sync\.any", r"vote.sync.all"),
    # memory
    _edit("drop shared store", r"^\s*(?:@!?%\w+ )?(?:st\.shared|stmatrix)[^;]*;", _DROP, 6),
    _edit("drop global store", r"^\s*(?:@!?%\w+ )?st\.global[^;]*;", _DROP, 6),
    _edit("shared store 16 bytes on", rf"(st\.shared[\w.:]*\s+){_ADDRESS}(.*)", _offset(16), 6),
    _edit("shared load 16 bytes on", rf"(ld\.shared[\w.:]*\s+(?:\{{[^}}]*\}}|[%\w]+),\s*){_ADDRESS}(.*)", _offset(16), 6),
    _edit("global store 16 bytes on", rf"(st\.global[\w.:]*\s+){_ADDRESS}(.*)", _offset(16), 6),
    _edit("global load 16 bytes on", rf"(ld\.global[\w.:]*\s+(?:\{{[^}}]*\}}|[%\w]+),\s*){_ADDRESS}(.*)", _offset(16), 6),
    _edit("read-only load", r"ld\.global\.(b32|v\d|b64|u32)", r"ld.global.nc.\1", 4),
    _edit("drop copy", r"(?:@\w+ )?cp\.async\.bulk\.tensor[^;]*;", _DROP, 6),
    _edit("swap copy coordinates", r"(cp\.async\.bulk\.tensor[^{]*\{[^,]*,\s*)([%\w]+),\s*([%\w]+)", r"\1\3, \2", 4),
    _edit("misaligned copy", rf"(cp\.async\.bulk\.tensor[\w.:]*shared::[\w.:]*global[\w.:]*\s+){_ADDRESS}(.*)", _offset(16), 3),
    _edit("transposed matrices", r"ldmatrix\.sync\.aligned\.m8n8\.(x\d)\.shared", r"ldmatrix.sync.aligned.m8n8.\1.trans.shared", 3),
    _edit("transposed store of matrices", r"(stmatrix\.sync\.aligned\.m8n8\.x\d)\.shared", r"\1.trans.shared", 3),
    _edit("drop a move", r"^\s*mov\.[bufs]32\s+%[rf]\d+,[^;]*;", _DROP, 6),
    _edit("untransposed matrices", r"(ldmatrix[\w.:]*)\.trans", r"\1", 3),
    # tensor core
    _edit("negate a product", r"(wgmma\.mma_async.*,\s*)1,(\s*1[,;])", r"\1-1,\2", 3),
    _edit("drop product", r"(?:@\w+ )?(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[^;]*;", _DROP, 6),
    _edit("tensor memory columns on", rf"(tcgen05\.(?:ld|st)[\w.:]*\s+(?:\{{[^}}]*\}},\s*)?){_ADDRESS}(.*)", _offset(1), 5),
    _edit("tensor memory of another warp", rf"(tcgen05\.(?:ld|st)[\w.:]*\s+(?:\{{[^}}]*\}},\s*)?){_ADDRESS}(.*)", _offset(32 << 16)),
    _edit("drop tensor memory store", r"tcgen05\.st\.[^;]*;", _DROP, 4),
    _edit("fewer tensor memory columns", r"(tcgen05\.alloc.*,\s*)512;", r"\g<1>256;"),
    _edit("drop dealloc", r"tcgen05\.dealloc[^;]*;", _DROP),
    _edit("drop alloc", r"tcgen05\.alloc[^;]*;", _DROP),
    _edit("other group of CTAs", r"(tcgen05\.(?:alloc|dealloc|commit|relinquish)[\w.:]*cta_group)::1", r"\1::2"),
    _edit("other group of a pair", r"(tcgen05\.(?:alloc|dealloc|commit|relinquish)[\w.:]*cta_group)::2", r"\1::1"),
    _edit("allocation by one CTA", r"^\s*(tcgen05\.alloc[\w.:]*cta_group::2[^;]*;)", _only_where("%cluster_ctarank", "and 1 eq 0")),
    _edit("commit to one CTA", r"mov\.b16 ranks, 3;", r"mov.b16 ranks, 1;"),
    _edit("registers unlike the warpgroup's", r"(setmaxnreg\.\w+\.sync\.aligned\.u32\s+)(\d+)(;)", _number(-8), 3),
    _edit("setmaxnreg by one warp", r"^\s*(setmaxnreg[^;]*;)", _only_where("%tid.x", "and 96 eq 0"), 3),
    _edit("drop setmaxnreg", r"setmaxnreg[^;]*;", _DROP, 3),
    # arithmetic
    _edit("maximum as minimum", r"\bmax\.(f32|s32|NaN)", r"min.\1", 3),
    _edit("minimum as maximum", r"\bmin\.(s32|u32|f32)", r"max.\1", 4),
    _edit("sum as difference", r"\badd\.(f32|ftz\.f32|rn\.f32)", r"sub.\1", 3),
    _edit("difference as sum", r"\bsub\.(f32|ftz\.f32|rn\.f32)", r"add.\1", 3),
    _edit("round towards zero", r"cvt\.rn\.(bf16x2|f16x2)\.f32", r"cvt.rz.\1.f32", 3),
    _edit("count twice", r"(atom[\w.:]*\.add\.u32\s+%\w+,\s*\[[^\]]*\],\s*)1;", r"\g<1>2;"),
)  # fmt: skip
