"""Plant one fault at a time in a kernel's PTX and see whether the emulator finds it.

    python -m tests.emulator.fault_injection --kernel sm100_prefill --out tests/emulator/results/faults_sm100_prefill.json
    python -m tests.emulator.fault_injection --kernel sm90_prefill --clean-seeds 200 --only-clean

A fault is caught when a run ends in an error, reports a race or another finding, or gives other output bits than the right program.
Each mutant runs with the deterministic schedule, then with a few random ones until it is caught. Faults in instructions that the case
never reaches are left out. A fault that no run shows is a survivor, unless `vacuous` knows why it changes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fa4_backend import emulator
from fa4_backend.emulator import launch as emulator_launch
from fa4_backend.emulator.launch import LoadedKernel

SECONDS_A_RUN = 60


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


# -- mutations ------------------------------------------------------------------------------------------------------------

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
    "drop wait_group": re.compile(r"wait_group|tcgen05\.wait::|cp\.async\.wait_all"),
}
ACCESS = re.compile(
    r"\b(ld|st|atom|red)\.(shared|global|v\d|b\d|f32|u32|relaxed|acquire|release)|stmatrix|ldmatrix|tcgen05\.(ld|st|mma|cp)\b|wgmma\.mma_async|"
    r"cp\.async\.(bulk|ca|cg)"
)
STOPS = re.compile(r"^\s*(?:[\w$]+:|\{|\}|@?.*\bbra\b|ret|exit)|bar\.|barrier\.|wait")
MOVES = re.compile(r"mbarrier\.arrive|tcgen05\.commit|fence\.proxy|tcgen05\.fence::before")


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


def mutants(ptx: str, reached: set[int]) -> Iterator[Mutant]:
    """Every single fault of the classes above in the lines that a right run reaches."""
    lines = ptx.split("\n")
    for index, line in enumerate(lines):
        if index + 1 not in reached or line.lstrip().startswith("//"):
            continue
        for kind, replacement in _changes(lines, index):
            text = "\n".join(replacement)
            yield Mutant(kind, index + 1, line, text)


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


# -- kernels under test ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A kernel with one case: `run(seed)` gives its output tensors and the emulator's report."""

    name: str
    ptx: str  # as it was compiled
    run: Callable[[int | None], tuple[list[torch.Tensor], emulator.Report]]


def own_prefill(name: str, arch: str, head_dim: int) -> Target:
    """This package's prefill kernel: two sequences over pages, causal; one CTA (or pair) has several items, so that every ring wraps."""
    emulator.install()  # before the compiler is imported: objects bind to the first launch functions they find
    from fa4_backend.compile_cache import ensure_object
    from fa4_backend.kernels.tuning import prefill_key
    from tests.support.emulated_prefill import run_built
    from tests.support.paged_case import PagedCase

    case = PagedCase(
        (300, 200), (500, 450), num_q_heads=2, num_kv_heads=1, head_dim=head_dim, head_dim_v=128, page_size=64, arch=f"emulated-{arch}"
    )
    built = case.build()
    library = ensure_object(prefill_key(case.plan(num_sms=1)))

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        result = run_built(built, num_ctas=1, seed=seed)
        return [result.out.clone(), result.lse.clone()], result.report

    return Target(name, library.with_suffix(".ptx").read_text(), run)


def upstream(name: str, folder: Path) -> Target:
    """A kernel of flash-attn-4, from the objects that `tests.device.upstream_sm90 compile` wrote."""
    from fa4_backend.emulator.kernels import load_object
    from tests.device.upstream_sm90 import ARCH, CASES, FUNCTION, NUM_SMS, arguments, tensors

    stem, case = folder / name, CASES[name]
    ptx, cubin = stem.with_suffix(".ptx").read_text(), stem.with_suffix(".cubin").read_bytes()
    emulator.register_program(ptx, cubin)
    function = load_object(stem.with_suffix(".so"))[FUNCTION]

    def run(seed: int | None) -> tuple[list[torch.Tensor], emulator.Report]:
        data = tensors(case)
        with emulator.session(arch=ARCH, num_sms=NUM_SMS, seed=seed) as session:
            session.run(function, *arguments(case, data))
        return [data["out"], data["lse"]], session.report

    return Target(f"flash-attn-4 sm90 {name}", ptx, run)


def load_target(name: str, folder: Path) -> Target:
    own = {
        "sm100_prefill": ("sm_100a prefill", "sm_100a", 128),
        "sm100_pair": ("sm_100a prefill, CTA pairs", "sm_100a", 192),  # the head dimension that runs as pairs
        "sm90_prefill": ("sm_90a prefill", "sm_90a", 128),
    }
    return own_prefill(*own[name]) if name in own else upstream(name.removeprefix("upstream_"), folder)


# -- judging --------------------------------------------------------------------------------------------------------------


@contextmanager
def planted(target: Target, ptx: str) -> Iterator[None]:
    """Launches of the target's kernel run `ptx` inside; it must have run before, so that its image is loaded."""
    loaded = [h for h in emulator_launch._handles if isinstance(h, LoadedKernel) and h.ptx == target.ptx]
    assert loaded, f"{target.name}: no loaded kernel has this PTX"
    for kernel in loaded:
        kernel.ptx = ptx
    try:
        yield
    finally:
        for kernel in loaded:
            kernel.ptx = target.ptx
        # Parsed programs are kept for the life of the process: too many for hundreds of mutants.
        for kept in (emulator_launch._kernels, emulator_launch._programs):
            kept.clear()


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@dataclass(frozen=True)
class Right:
    """What the program without a fault gives."""

    outputs: list[torch.Tensor]
    notes: set[str]  # its own remarks, such as a named barrier that ends half full
    reached: set[int]  # lines of the PTX


def run_right(target: Target) -> Right:
    """Raises `AssertionError` when the right program races."""
    outputs, report = target.run(None)
    _, other = target.run(0)
    assert not report.races and not other.races, report.races + other.races
    return Right(outputs, remarks(report) | remarks(other), reached_lines(report))


def remarks(report: emulator.Report) -> set[str]:
    """The report's notes, without the numbers of warps and threads."""
    return {re.sub(r"\d+", "#", note) for note in report.notes}


def verdict(target: Target, mutant: Mutant, right: Right, seeds: list[int | None]) -> tuple[str, int | None]:
    """How the fault shows ("" when it does not) and under which seed."""
    with planted(target, mutant.ptx):
        for seed in seeds:
            try:
                with time_limit(SECONDS_A_RUN):
                    outputs, report = target.run(seed)
            except (emulator.UnsupportedInstruction, emulator.PtxSyntaxError) as error:
                raise AssertionError(f"{mutant.name}: the mutation makes no legal program: {error}") from error
            except emulator.EmulatorError as error:
                return type(error).__name__, seed
            except TimeoutError:
                return f"no end in {SECONDS_A_RUN} s", seed
            if report.races:
                return "race", seed
            if not same(outputs, right.outputs):
                return "wrong output", seed
            if remarks(report) - right.notes:
                return "finding", seed
    return "", None


def same(outputs: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Bit for bit, NaN included."""
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in zip(outputs, right, strict=True))


def reached_lines(report: emulator.Report) -> set[int]:
    """Lines of the PTX that a run executed."""
    lines: set[int] = set()
    for counts in report.kernels.values():
        executed = counts.executed.sum(axis=0)
        lines |= {i.line for i, n in zip(counts.program.kernel.instructions, executed, strict=False) if n}
    return lines


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


VACUOUS_SEEDS = range(100, 110)
STATIC_REASONS = re.compile(r"tcgen05\.(wait::ld|fence)")  # see `vacuous`


def vacuous(target: Target, mutant: Mutant) -> str:
    """Why a fault that nothing showed changes nothing ("" when no reason is known)."""
    if "tcgen05.wait::ld" in mutant.text and mutant.kind.startswith("drop"):
        # flash-attn-4's sm100 kernels, right on silicon, have no wait::ld at all: ptxas orders the use of a result behind its load.
        return "the use of a loaded register waits for it"
    if "tcgen05.fence" in mutant.text:
        return f"{NOT_MODELLED}: tcgen05.fence (flash-attn-4's kernels, right on silicon, have none)"
    if "tcgen05.wait::st" in mutant.text and later_wait_covers(target, mutant):
        return "a later tcgen05.wait::st comes before anything is released"
    if mutant.kind == "drop wait" and never_blocks(target, mutant):
        return f"the wait is satisfied whenever it is reached, in {len(VACUOUS_SEEDS)} random schedules"
    return ""


def later_wait_covers(target: Target, mutant: Mutant) -> bool:
    for line in one_statement_a_line(target.ptx).split("\n")[mutant.line :]:
        if "tcgen05.wait::st" in line:
            return True
        if re.search(r"mbarrier\.arrive|\bbar(rier)?\.(?!warp)|commit|\bbra\b|ret;", line):
            return False
    return False


def never_blocks(target: Target, mutant: Mutant) -> bool:
    """Whether the wait has nothing to wait for: a trap in its place, taken when the phase is not complete, never fires."""
    lines = one_statement_a_line(target.ptx).split("\n")
    line = lines[mutant.line - 1]
    match = WAIT.search(line)
    assert match
    test = line.replace("try_wait", "test_wait")
    operands = test.rsplit(",", 1) if test.count(",") == 3 else [test.rstrip("; ")]  # a suspend-time hint is not for test_wait
    lines[mutant.line - 1] = f"{operands[0]};\n@!{match.group(1)} trap;"
    with planted(target, "\n".join(lines)):
        for seed in VACUOUS_SEEDS:
            try:
                target.run(seed)
            except emulator.KernelFault:
                return False
    return True


def inject(target: Target, seeds: list[int | None], pick: Callable[[Mutant], bool] = lambda _: True) -> dict[str, Any]:
    """Run every mutant; returns the verdicts by class."""
    start = cpu_seconds()
    target.run(None)  # loads the kernel's image
    split = one_statement_a_line(target.ptx)
    with planted(target, split):
        right = run_right(target)
    faults: dict[str, list[dict[str, Any]]] = {}
    for mutant in filter(pick, mutants(split, right.reached)):
        how, seed = verdict(target, mutant, right, seeds)
        print(f"{mutant.name}: {how or 'survived'}", flush=True)
        fault = {"line": mutant.line, "text": mutant.text.strip()[:160], "caught": how, "seed": seed}
        if not how:
            fault["vacuous"] = vacuous(target, mutant)
        faults.setdefault(mutant.kind, []).append(fault)
    return {"kernel": target.name, "cpu_seconds": round(cpu_seconds() - start), "classes": faults}


NOT_MODELLED = "not modelled"


def summary(result: dict[str, Any]) -> list[str]:
    """A table of the score, then the survivors. Faults in what the emulator does not model are counted apart, and named."""
    rows, survivors = [], []
    total = caught = unseen = 0
    for kind, faults in result["classes"].items():
        counted = [f for f in faults if f["caught"] or not f["vacuous"]]
        beyond = sum(f.get("vacuous", "").startswith(NOT_MODELLED) for f in faults)
        ways = Counter(f["caught"] or "survived" for f in counted)
        good = sum(bool(f["caught"]) for f in counted)
        total, caught, unseen = total + len(counted), caught + good, unseen + beyond
        rest = f"{len(faults) - len(counted) - beyond} vacuous, {beyond} not modelled"
        rows.append(f"{kind:20} {good:4} of {len(counted):4}   {dict(ways)}   {rest}")
        survivors += [f"  {kind} @{f['line']}: {f['text']}  [{f['vacuous'] or 'SURVIVED'}]" for f in faults if not f["caught"]]
    score = f"{caught} of {total} caught ({100 * caught / max(total, 1):.1f} %); with what is not modelled {caught} of {total + unseen}"
    return [f"{result['kernel']}: {score}; {result['cpu_seconds']} s of CPU", *rows, *survivors]


def clean_runs(target: Target, count: int) -> list[str]:
    """Alarms on the right program over `count` random schedules."""
    right = run_right(target)
    alarms: list[str] = []
    for seed in range(count):
        outputs, report = target.run(seed)
        new = remarks(report) - right.notes
        if report.races or new:
            alarms.append(f"seed {seed}: {(report.races + sorted(new))[0]}")
        if not same(outputs, right.outputs):
            alarms.append(f"seed {seed}: other output bits than the deterministic schedule")
    return alarms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", required=True, help="sm100_prefill, sm100_pair, sm90_prefill, or upstream_<case>")
    parser.add_argument("--folder", type=Path, default=Path("upstream_objects"))
    parser.add_argument("--seeds", type=int, default=4, help="random schedules after the deterministic one")
    parser.add_argument("--clean-seeds", type=int, default=0)
    parser.add_argument("--only-clean", action="store_true")
    parser.add_argument("--kind", help="only this class")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    target = load_target(options.kernel, options.folder)
    result: dict[str, Any] = {"kernel": target.name}
    if not options.only_clean:
        result = inject(target, [None, *range(options.seeds)], lambda m: options.kind in (None, m.kind))
        print("\n".join(summary(result)))
    if options.clean_seeds:
        result |= {"clean_seeds": options.clean_seeds, "false_alarms": clean_runs(target, options.clean_seeds)}
        print(f"{options.clean_seeds} random schedules of the right program: {len(result['false_alarms'])} alarms")
        print("\n".join(result["false_alarms"][:10]))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result).replace('{"line"', '\n{"line"') + "\n")


if __name__ == "__main__":
    main()
