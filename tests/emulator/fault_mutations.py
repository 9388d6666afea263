"""Single faults in a kernel's PTX: a wait, arrive, commit, fence or barrier dropped, something moved, loosened or changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from tests.emulator.fault_edits import EDITS

Site = TypeVar("Site")


@dataclass(frozen=True)
class Mutant:
    """One fault: the whole PTX with it, and where it is."""

    kind: str
    line: int  # of the original text, 1-based
    text: str
    ptx: str

    @property
    def name(self) -> str:
        return f"{self.kind} @{self.line}: {self.text.strip()[:110]}"


WAIT = re.compile(r"mbarrier\.(?:try|test)_wait[\w.:]*\s+([%\w$]+),")
PARITY = re.compile(r"(mbarrier\.(?:try|test)_wait\.parity[\w.:]*\s+[%\w$]+,\s*\[[^\]]*\],\s*)([%\w$]+)")
TX = re.compile(r"((?:mbarrier\.arrive\.expect_tx|mbarrier\.expect_tx)[\w.:]*\s+(?:[%\w$]+,\s*)?\[[^\]]*\],\s*)([%\w$]+)\s*;")
GROUP = re.compile(r"((?:wgmma\.wait_group|cp\.async\.bulk\.wait_group|cp\.async\.wait_group)[\w.:]*\s+)(\d+)")
WGMMA_DESCRIPTOR = re.compile(r"(wgmma\.mma_async.*\},\s*)(%\w+)(,\s*[%\w]+,\s*-?\d)")
UMMA_DESCRIPTOR = re.compile(r"(tcgen05\.mma[\w.:]*\s+\[[^\]]*\],\s*(?:\[[^\]]*\]|[%\w$]+),\s*)([%\w$]+)(,)")
COPY_TARGET = re.compile(r"(cp\.async\.bulk\.tensor[\w.:]*shared::[\w.:]*global[\w.:]*\s+)\[([%\w$]+)(?:\+(\d+))?\]")
DROPS = {
    "drop arrive": re.compile(r"mbarrier\.arrive(?!\.expect_tx)"),
    "drop expect_tx": re.compile(r"mbarrier\.(arrive\.)?expect_tx"),
    "drop commit": re.compile(r"tcgen05\.commit|commit_group"),
    "drop fence": re.compile(r"\bfence\.|tcgen05\.fence|wgmma\.fence"),
    "drop barrier": re.compile(r"\b(bar\.sync|bar\.arrive|barrier\.)"),
    "drop warp sync": re.compile(r"bar\.warp\.sync"),
    "drop wait_group": re.compile(r"wait_group|tcgen05\.wait::|cp\.async\.wait_all"),
}
ACCESS = re.compile(
    r"\b(ld|st|atom|red)\.(shared|global|v\d|b\d|f32|u32|relaxed|acquire|release)|stmatrix|ldmatrix|tcgen05\.(ld|st|mma|cp)\b|wgmma\.mma_async|"
    r"cp\.async\.(bulk|ca|cg)"
)
STOPS = re.compile(r"^\s*(?:[\w$]+:|\{|\}|@?.*\bbra\b|ret|exit)|bar\.|barrier\.|wait")
MOVES = re.compile(
    r"mbarrier\.arrive|tcgen05\.(commit|dealloc)|fence\.proxy|tcgen05\.fence::before|commit_group|launch_dependents|barrier\.cluster\.arrive"
)
HANDS_OVER = re.compile(r"mbarrier\.arrive|\bbar\.|barrier\.cluster\.arrive|cp\.async\.bulk")


def one_statement_a_line(ptx: str) -> str:
    """The same program; inline assembly may hold many statements in one line."""
    lines = []
    for line in ptx.split("\n"):
        if line.count(";") < 2 or line.lstrip().startswith("//"):
            lines.append(line)
            continue
        for part in re.split(r"(?<=;)", line):
            text = part.strip()
            if text.startswith("{"):
                lines.append("{")
                text = text[1:].strip()
            lines += [text] if text else []
    return "\n".join(lines)


def mutants(ptx: str, reached: set[int], sample: int | None = None) -> Iterator[Mutant]:
    """Single faults in the lines that a right run reaches: all of the classes above, and some of each kind of `fault_edits.py`.

    `sample`: so many of each class, evenly over the text, and one of each kind, where another target of the kind has all.
    """
    lines = ptx.split("\n")
    yield from _edited(lines, reached, 1 if sample else None)
    by_kind: dict[str, list[tuple[int, list[str]]]] = {}
    for index, line in enumerate(lines):
        if index + 1 in reached and not line.lstrip().startswith("//"):
            for kind, replacement in _changes(lines, index):
                by_kind.setdefault(kind, []).append((index, replacement))
    for kind, sites in by_kind.items():
        for index, replacement in spread(sites, sample or len(sites)):
            yield Mutant(kind, index + 1, lines[index], "\n".join(replacement))


def spread(sites: list[Site], most: int) -> list[Site]:
    """At most so many of the sites, evenly over them."""
    count = min(most, len(sites))
    return [sites[(2 * i + 1) * len(sites) // (2 * count)] for i in range(count)]


def _edited(lines: list[str], reached: set[int], most: int | None) -> Iterator[Mutant]:
    for edit in EDITS:
        sites = []
        for index, line in enumerate(lines):
            if index + 1 in reached and not line.lstrip().startswith("//") and (changed := edit.apply(line)) is not None:
                sites.append((index, changed))
        for index, changed in spread(sites, most or edit.most):
            yield Mutant(edit.kind, index + 1, lines[index], "\n".join([*lines[:index], changed, *lines[index + 1 :]]))


def _changes(lines: list[str], index: int) -> Iterator[tuple[str, list[str]]]:
    line = lines[index]

    def put(new: str) -> list[str]:
        return [*lines[:index], new, *lines[index + 1 :]]

    if match := WAIT.search(line):
        yield "drop wait", put(f"setp.eq.u32 {match.group(1)}, 0, 0;")
    if match := PARITY.search(line):
        yield "change phase", put(_scoped(f".reg .b32 fi_p; xor.b32 fi_p, {match.group(2)}, 1;", line, match, "fi_p"))
    if match := TX.search(line):
        for amount in (-16, 16):
            yield "change tx", put(_scoped(f".reg .b32 fi_t; add.s32 fi_t, {match.group(2)}, {amount};", line, match, "fi_t"))
    if match := GROUP.search(line):
        yield "loosen wait_group", put(line[: match.start(2)] + str(int(match.group(2)) + 1) + line[match.end(2) :])
    for pattern in (WGMMA_DESCRIPTOR, UMMA_DESCRIPTOR):
        if match := pattern.search(line):
            # 8 rows further (1024 bytes in units of 16), or half a swizzle span.
            yield "change descriptor", put(_scoped(f".reg .b64 fi_d; add.s64 fi_d, {match.group(2)}, 64;", line, match, "fi_d"))
    if match := COPY_TARGET.search(line):
        offset = int(match.group(3) or 0) + 1024
        yield "change copy target", put(line[: match.start()] + f"{match.group(1)}[{match.group(2)}+{offset}]" + line[match.end() :])
    for kind, pattern in DROPS.items():
        if pattern.search(line):
            yield kind, put("")
    if MOVES.search(line):
        earlier = _earlier_access(lines, index)
        if earlier is not None:
            yield "move up", [*lines[:earlier], line, *lines[earlier:index], *lines[index + 1 :]]
    if "fence.proxy.async" in line:
        later = next((i for i in range(index + 1, min(index + 40, len(lines))) if HANDS_OVER.search(lines[i])), None)
        # Behind a barrier, whoever issues a copy then fences what it has learnt of.
        if (
            later is not None
            and "bar." not in lines[later]
            and not any(re.match(r"\s*(\$?\w+:|@?.*\bbra\b)", between) for between in lines[index:later])
        ):
            yield "fence too late", [*lines[:index], *lines[index + 1 : later + 1], line, *lines[later + 1 :]]


def _scoped(setup: str, line: str, match: re.Match[str], register: str) -> str:
    """The statement with one operand replaced by a register that is set up just before."""
    return "{ " + setup + " " + line[: match.start(2)] + register + line[match.end(2) :] + " }"


def _earlier_access(lines: list[str], index: int) -> int | None:
    """The nearest memory access above, in the same straight run of code, past which the statement's operands do not change."""
    needed = set(re.findall(r"%\w+", lines[index]))
    for i in range(index - 1, max(index - 60, -1), -1):
        line = lines[i]
        if STOPS.search(line):
            return None
        words = line.split(None, 1)
        written = set(re.findall(r"%\w+", words[1].split(",")[0])) if len(words) > 1 else set()
        if ACCESS.search(line):
            return i
        if written & needed:
            return None
    return None
