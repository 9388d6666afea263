"""The command line that scripts share which run many engines side by side on one GPU."""

from __future__ import annotations

import argparse
from pathlib import Path


def serve_parser(description: str | None, *, runs: str, side_by_side: int, seconds: float) -> argparse.ArgumentParser:
    """A parser with where results and logs go, how many engines run at once, and for how long.

    Args:
        runs: what runs at once, in the plural: engines, or lanes of several engines.
        side_by_side, seconds: defaults.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that gets the JSON")
    parser.add_argument("--side-by-side", type=int, default=side_by_side, help=f"{runs} that run at once")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"until all {runs} are ended; their logs then say where they stood")
    parser.add_argument("--logs", type=Path, help=f"folder that keeps the {runs}' logs")
    return parser
