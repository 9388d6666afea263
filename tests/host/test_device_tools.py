"""Tools that run on a GPU only: each can be imported here, so that a move of what it uses does not wait for a GPU to be noticed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

TOOLS = sorted(path.stem for path in (Path(__file__).parents[1] / "device").glob("*.py") if path.stem != "conftest")


@pytest.mark.parametrize("name", TOOLS)
def test_a_device_tool_can_be_imported(name: str) -> None:
    importlib.import_module(f"tests.device.{name}")
