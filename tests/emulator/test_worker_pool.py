"""The pool of the sweep: which task a worker takes, what is kept of a failure and of a run that is cut short."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.emulator.worker_pool import Task, TaskList, run_tasks


def act(folder: str, what: str) -> None:
    """Leave a file; or fail, or take for ever."""
    if what == "fails":
        raise ValueError("as asked")
    if what == "dies":
        os._exit(1)
    if what == "endless":
        time.sleep(600)
    (Path(folder) / what).touch()


def test_workers_keep_to_a_group_and_share_the_longest() -> None:
    tasks = [
        Task(group, rank, 1.0, (group, rank, i)) for group, rank, count in (("a", 1, 6), ("b", 1, 3), ("c", 0, 1)) for i in range(count)
    ]
    todo = TaskList(tasks)
    assert todo.take(0).group == "c", "the lowest rank comes first"  # type: ignore[union-attr]
    taken = [[todo.take(worker).group for worker in (1, 2)] for _ in range(3)]  # type: ignore[union-attr]
    assert taken == [["a", "b"]] * 3, "most left for each worker that has prepared it, then the same again"
    assert [todo.take(2).group, todo.take(1).group, todo.take(0).group] == ["a"] * 3  # type: ignore[union-attr]
    assert todo.take(0) is None


def test_failures_and_the_end_of_time_are_told(tmp_path: Path) -> None:
    """Two workers; one dies and another takes its place; then one hangs, so that the other does the rest."""
    names = ["one", "fails", "dies", "endless", "two"]
    tasks = [Task(name, rank, 1.0, (str(tmp_path), name)) for rank, name in enumerate(names)]
    begin = time.monotonic()
    problems = run_tasks(tasks, act, 2, 20.0, [str(tmp_path / f"{i}.log") for i in range(2)])
    assert time.monotonic() - begin < 60
    assert (tmp_path / "one").exists() and (tmp_path / "two").exists()
    assert len(problems) == 3 and "endless" in problems[2] and "under way" in problems[2]
    assert {"ValueError: as asked" in p for p in problems[:2]} == {"the process ended" in p for p in problems[:2]} == {True, False}
