"""What documents, docstrings and comments name exists: files, links, targets, modules, verbs with their options, notes, names."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer

from fa4_backend.cli import VERBS

ROOT = Path(__file__).parents[2]
CODE_FOLDERS = ("fa4_backend", "integration", "examples", "scripts", "tests")
COLUMNS = 120  # of prose; rows of tables and blocks of code may be longer

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "fa4_backend").rglob("*.md")])
SOURCES = sorted(
    path for folder in CODE_FOLDERS for kind in ("*.py", "*.c", "*.h") for path in (ROOT / folder).rglob(kind) if path != Path(__file__)
)

PATH = re.compile(r"(?:[\w.-]+/)*[\w-]+\.(?:py|md|json|csv|svg|png|c|h|toml|npz)")
FOLDER = re.compile(r"(?:[\w-]+/)+")
MODULE = re.compile(r"\b(?:fa4_backend|fa4_integration|tests|scripts|examples)(?:\.\w+)+")
NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?:\(\))?")
# Files that a user or a run makes, and names of other people: instructions of PTX, parts of tools.
MADE = (
    "config.json",
    "timeline.json",
    "results.json",
    "entry.json",
    "decode.csv",
    "prefill.csv",
    "decode.png",
    "prefill.png",
    "shapes.csv",
    "shapes.png",
)
FOREIGN = re.compile(r"(wgmma|tcgen05|mbarrier|mma|ex2|rcp|tanh|bar|atom|fence|griddepcontrol|mul|racecheck|memcheck)(\W.*)?")


def named(text: str, *, is_document: bool) -> Iterator[str]:
    """What stands between single backticks; of a document, blocks of code left out."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL) if is_document else text
    yield from (found[1] for found in re.finditer(r"(?<!`)`([^`\n]+)`(?!`)", text))


@cache
def files() -> frozenset[str]:
    """Every path below the root, files and folders, from each of its folders on: `a/b.py` and `b.py`."""
    tops = [path for path in ROOT.iterdir() if path.is_file() or path.name in (*CODE_FOLDERS, "docs")]
    found = [*tops, *(path for top in tops if top.is_dir() for path in top.rglob("*") if "__pycache__" not in path.parts)]
    parts = [path.relative_to(ROOT).parts for path in found]
    return frozenset("/".join(names[start:]) for names in parts for start in range(len(names)))


@cache
def words() -> frozenset[str]:
    """Every word of the code."""
    return frozenset(word for path in SOURCES for word in re.findall(r"[A-Za-z_]\w*", path.read_text()))


@cache
def options(verb: str) -> frozenset[str]:
    """What a verb of `fa4`, or a verb of its group, takes."""
    command = getattr(importlib.import_module(f"fa4_backend.commands.{verb}"), verb)
    app = command if isinstance(command, typer.Typer) else typer.Typer()
    if app is not command:
        app.command()(command)
    top = typer.main.get_command(app)
    commands = [top, *getattr(top, "commands", {}).values()]
    return frozenset(option for c in commands for p in c.params for option in (*p.opts, *p.secondary_opts)) | {"--help"}


def module_file(module: str) -> Path | None:
    """Where a module of ours lies that `python -m` may run."""
    place = ROOT / module.replace(".", "/")
    return next((path for path in (place.with_suffix(".py"), place / "__main__.py") if path.is_file()), None)


@cache
def script_options(path: Path) -> frozenset[str]:
    """What a module that is run takes, by its text and by that of modules of ours it imports: argparse's options, or typer's parameters."""
    texts = [path.read_text()]
    imports = re.compile(r"^from ((?:fa4_backend|tests|scripts|examples)[\w.]*) import ([\w, ]+)", flags=re.MULTILINE)
    for package, names in imports.findall(texts[0]):
        modules = (module_file(name) for name in (package, *(f"{package}.{name.strip()}" for name in names.split(","))))
        texts += [module.read_text() for module in modules if module is not None]
    found = {option for text in texts for option in re.findall(r'"(--[\w-]+)"', text)}
    return frozenset(found | {f"--{name.replace('_', '-')}" for name in re.findall(r"(\w+): Annotated\[", texts[0])} | {"--help"})


def missing_paths(text: str, *, is_document: bool) -> list[str]:
    """Files and folders that are named and not there."""
    spans = list(named(text, is_document=is_document))
    paths = [s for s in spans if PATH.fullmatch(s) and s.rsplit("/", 1)[-1] not in MADE]
    return [s for s in paths if s not in files()] + [s for s in spans if FOLDER.fullmatch(s) and s.rstrip("/") not in files()]


def missing_modules(text: str) -> list[str]:
    """Dotted names of our packages of which no module is there, or the module lacks what follows."""
    lacking = []
    for dotted in set(MODULE.findall(text)):
        parts = dotted.replace("fa4_integration", "integration", 1).split(".")
        depth = max(n for n in range(1, len(parts) + 1) if any("/".join(parts[:n]) + end in files() for end in ("", ".py")))
        if any(part not in words() for part in parts[depth:]) or (depth == 1 and len(parts) > 2):
            lacking.append(dotted)
    return lacking


def missing_names(text: str) -> list[str]:
    """Names between backticks that the code does not hold."""
    spans = [s.removesuffix("()") for s in named(text, is_document=True) if NAME.fullmatch(s)]
    spans = [s for s in spans if not PATH.fullmatch(s) and not FOREIGN.fullmatch(s)]
    return [s for s in spans if any(part not in words() for part in s.split("."))]


def missing_commands(text: str) -> list[str]:
    """Verbs and options of `fa4`, targets of `make`, and modules to run that are not there."""
    lacking = []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    blocks = re.findall(r"```(.*?)```", text, flags=re.DOTALL)
    for line in [*named(text, is_document=True), *(line for block in blocks for line in block.split("\n"))]:
        words_of = line.split("#")[0].split()
        if words_of[:1] == ["fa4"] and len(words_of) > 1 and words_of[1].islower():
            verb = words_of[1]
            if verb not in VERBS:
                lacking.append(line)
            else:
                lacking += [
                    f"fa4 {verb} {word}" for word in words_of[2:] if word.startswith("--") and word not in options(verb) | {"--json"}
                ]
        if words_of[:1] == ["make"] and len(words_of) > 1 and words_of[1] not in targets:
            lacking.append(line)
        if ours := re.search(r"python -m ((?:fa4_backend|tests|scripts|examples)[\w.]*)(.*)", line):
            module = module_file(ours[1])
            given = re.findall(r"(?<!\S)--[\w-]+", ours[2].split("#")[0])
            lacking += [line] if module is None else [f"{ours[1]} {option}" for option in given if option not in script_options(module)]
    return lacking


def missing_links(document: Path, text: str) -> list[str]:
    """Targets of relative links that are not there, headings included."""
    lacking = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        where, _, heading = target.partition("#")
        path = (document.parent / unquote(where)).resolve() if where else document
        if not path.exists() or (heading and heading not in headings(path)):
            lacking.append(target)
    return lacking


def headings(document: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_what_exists(document: Path) -> None:
    text = document.read_text()
    assert missing_paths(text, is_document=True) == []
    assert missing_links(document, text) == []
    assert missing_modules(text) == []
    assert missing_commands(text) == []
    if document.name != "CHANGELOG.md":  # which also names what is no longer there
        assert missing_names(text) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_has_120_columns(document: Path) -> None:
    prose = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), document.read_text(), flags=re.DOTALL)
    lines = enumerate(prose.split("\n"), 1)
    assert [number for number, line in lines if len(line) > COLUMNS and not line.lstrip().startswith("|")] == []


def test_sources_name_what_exists() -> None:
    lacking = {}
    for path in SOURCES:
        text = path.read_text()
        found = missing_paths(text, is_document=False) + missing_modules(text)
        if found:
            lacking[str(path.relative_to(ROOT))] = found
    assert lacking == {}


def test_notes_that_are_referred_to_are_written() -> None:
    texts = [path.read_text() for path in (*SOURCES, *DOCUMENTS)]
    referred = {re.sub(r"\s+", " ", title) for text in texts for title in re.findall(r"Note\s\[([^]]+)\]", text)}
    written = {title for text in texts for title in re.findall(r'^(?:\s|"|#)*Note \[([^]]+)\]\. ', text, flags=re.MULTILINE)}
    assert referred - written == set()


def test_what_does_not_exist_is_noticed() -> None:
    """The checks' own control: each finds what is planted, and nothing else."""
    text = (
        "`kernels/launch.py` `kernels/nowhere/` `kernels/schedule/` `check_problem` `check_problems()` `fa4_backend.plan.AttentionPlans` "
    )
    text += "[a](nowhere.md) [b](README.md#nowhere) [c](README.md#serving) `make dem` `make demo` "
    text += "`fa4 emulate --seed 3 --seeds 4` `fa4 emulates` `python -m scripts.nothing` `python -m scripts.decode_races` "
    text += "`python -m scripts.cubin_digests --out FILE --again` `python -m examples.serve_emulated --kernel emulate-sm90`"
    assert missing_paths(text, is_document=True) == ["kernels/launch.py", "kernels/nowhere/"]
    assert missing_names(text) == ["check_problems", "fa4_backend.plan.AttentionPlans"]
    assert missing_links(ROOT / "CHANGELOG.md", text) == ["nowhere.md", "README.md#nowhere"]
    assert missing_commands(text) == [
        "make dem",
        "fa4 emulate --seed",
        "fa4 emulates",
        "python -m scripts.nothing",
        "scripts.cubin_digests --again",
    ]
    assert missing_modules(text) == ["fa4_backend.plan.AttentionPlans"]
