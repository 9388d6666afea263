"""Launches of one stream: one after the other, and side by side where programmatic stream serialization lets them.

A launch follows everything before it. One with the attribute may start as soon as every CTA of its predecessor has executed
`griddepcontrol.launch_dependents` or exited, and its `griddepcontrol.wait` lasts until the predecessor is complete (PTX ISA 9.7.13.14;
CUDA programming guide, programmatic dependent launch). Without a seed launches run one after the other. With a seed, a grid that has
launched its dependents goes on beside them, in turns drawn at random, until somebody needs its results.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from fa4_backend.emulator.errors import Deadlock

if TYPE_CHECKING:
    from fa4_backend.emulator.grid import Grid

TURNS = (1, 4, 32, 256)  # of warps, before another grid goes on


class Stream:
    """Grids that may still run, in the order of their launches; `seed`: of the order in which they go on, None: no two run together."""

    def __init__(self, seed: int | None) -> None:
        self.running: list[Grid] = []
        self.rng = None if seed is None else random.Random(f"{seed}/stream")

    def launch(self, grid: Grid) -> None:
        """Start a grid when its turn has come; it has run when nothing that is launched later could tell the difference.

        Raises:
            EmulatorError: what went wrong in it, or in a grid that still ran.
        """
        if not grid.programmatic:
            self.drain()
        while self.running and not self.running[-1].lets_dependents_start():
            self.step(picks=1)  # to let it start as soon as it may
        grid.predecessor = self.running[-1] if self.running else None
        grid.begin(side_by_side=self.rng is not None)
        self.running.append(grid)
        if self.rng is None or not grid.program.launches_dependents:
            self.drain()

    def step(self, picks: int | None = None) -> None:
        """Let one grid go on for a while: some turns of warps, `picks` or drawn."""
        try:
            if self.rng is None:
                grid = self.running[0]
                grid.turn(None)
            else:
                able = [grid for grid in self.running if not grid.waits_for_predecessor()]
                if not able:
                    raise Deadlock("every kernel of the stream waits for another")
                grid = self.rng.choice(able)
                grid.turn(picks or self.rng.choice(TURNS))
        except BaseException:
            for grid in self.running:
                grid.release_params()
            self.running.clear()
            raise
        if grid.is_done:
            self.running.remove(grid)
            grid.end()

    def drain(self) -> None:
        """Run until all is complete."""
        while self.running:
            self.step()
