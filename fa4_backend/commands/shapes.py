"""Numbers of heads and elements, and names of chips, as a user types them."""

from __future__ import annotations

import re

from fa4_backend.arch import ARCHS


def heads_of(text: str) -> tuple[int, int]:
    """Query heads and KV heads, of "32/8".

    Raises:
        ValueError: the text is something else.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise ValueError(f"--heads: expected query heads / KV heads such as 32/8, got {text!r}")
    return int(found[1]), int(found[2])


def dims_of(text: str) -> tuple[int, int]:
    """Elements of a key and of a value, of "128" or "192/128"; "192,128" will do.

    Raises:
        ValueError: the text is something else.
    """
    found = re.fullmatch(r"(\d+)(?:[/,](\d+))?", text)
    if found is None:
        raise ValueError(f"--head-dim: expected elements such as 128, or of keys/values such as 192/128, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def check_chip(arch: str, option: str = "--arch") -> None:
    """Check the name of a chip that has kernels to compile, to run or to time.

    Raises:
        ValueError: it is no such name.
    """
    if arch not in ARCHS:
        known = ", ".join(f"{name} ({limits.chips})" for name, limits in ARCHS.items())
        raise ValueError(f"{option}: expected one of {known}, got {arch!r}")
