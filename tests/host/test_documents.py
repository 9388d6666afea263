"""What documents, docstrings and comments name exists: files, links, modules to run, `fa4` verbs with their options, identifiers.

Words between backticks are taken for names of the code. Other people's names, instructions and the like stand in `FOREIGN`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE_FOLDERS = ("fa4_backend", "integration", "examples", "scripts", "tests")
LARGEST_LINE = 120  # columns of prose; rows of tables and blocks of code may be longer

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "fa4_backend").rglob("*.md")])
SOURCES = sorted(path for folder in CODE_FOLDERS for kind in ("*.py", "*.c", "*.h") for path in (ROOT / folder).rglob(kind))

PATH = re.compile(r"(?:[\w.-]+/)*[\w-]+\.(?:py|md|json|csv|svg|png|c|h|toml|npz)")
FOLDER = re.compile(r"(?:[\w-]+/)+")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
FOREIGN = re.compile(
    # PTX and SASS, file names of a user, and names of torch, vLLM, the compiler, ptxas and other tools.
    r"(wgmma|tcgen05|mbarrier|mma|ex2|rcp|tanh|bar|atom|fence|griddepcontrol|setmaxnreg|ldmatrix|stmatrix|activemask|cp|mul|add|fma|ld|st)\b.*"
)


def spans(path: Path) -> Iterator[str]:
    """Texts between single backticks, blocks of code left out."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL) if path.suffix == ".md" else path.read_text()
    for found in re.finditer(r"(?<!`)`([^`\n]+)`(?!`)", text):
        yield found[1]


@cache
def files() -> frozenset[str]:
    """Every path below the root that a document may name, files and folders, from each of its folders on."""
    tops = [path for path in ROOT.iterdir() if path.is_file() or path.name in (*CODE_FOLDERS, "docs")]
    found = [*tops, *(path for top in tops if top.is_dir() for path in top.rglob("*") if "__pycache__" not in path.parts)]
    parts = [path.relative_to(ROOT).parts for path in found]
    return frozenset("/".join(names[start:]) for names in parts for start in range(len(names)))


@cache
def words() -> frozenset[str]:
    """Every word of the code."""
    return frozenset(word for path in SOURCES for word in re.findall(r"[A-Za-z_]\w*", path.read_text()) if path != Path(__file__))


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))
