"""Every small program is legal PTX: ptxas accepts it."""

from __future__ import annotations

import pytest

from tests.emulator.programs import FAMILIES, load_family
from tests.emulator.programs.assemble import assemble, by_target, find_ptxas, module_text


@pytest.mark.skipif(find_ptxas() is None, reason="no ptxas on this machine")
@pytest.mark.parametrize("family", FAMILIES)
def test_ptxas_accepts_every_program(family: str) -> None:
    for (target, _), programs in by_target(load_family(family)).items():
        message = assemble(module_text(programs), target)
        assert not message, f"{family}, {target}: {message[:2000]}"
