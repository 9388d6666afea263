"""Processes that take tasks of one list until it is empty or time is up, each keeping to the group of tasks that it has prepared."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

TELL_S = 15


@dataclass(frozen=True)
class Task:
    """`cost` is a guess in seconds; of the lowest rank that has tasks left, those of a group with much left go first."""

    group: str
    rank: int
    cost: float
    arguments: tuple[Any, ...]


class TaskList:
    """What is left to do, and which worker has prepared which groups."""

    def __init__(self, tasks: list[Task]) -> None:
        self.left = sorted(tasks, key=lambda task: -task.cost)
        self.prepared: dict[int, set[str]] = {}

    def take(self, worker: int) -> Task | None:
        """The best task for a worker: of a group that it has prepared, else of the one with most left for each that has."""
        if not self.left:
            return None
        mine = self.prepared.setdefault(worker, set())
        rank = min(task.rank for task in self.left)
        left: Counter[str] = Counter()
        for task in self.left:
            if task.rank == rank:
                left[task.group] += task.cost  # type: ignore[assignment]
        shared = Counter(group for groups in self.prepared.values() for group in groups)
        group = max(left, key=lambda name: (name in mine, left[name] / (1 + shared[name])))
        mine.add(group)
        task = next(task for task in self.left if task.rank == rank and task.group == group)
        self.left.remove(task)
        return task


def _serve(pipe: Connection, act: Callable[..., None], log: str, begin: float) -> None:
    """A worker's life: a task, an answer, until there is none."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # says where a worker is that gets nowhere
    print(f"{time.monotonic() - begin:.1f} s to start", flush=True)
    while (arguments := pipe.recv()) is not None:
        failure = ""
        try:
            act(*arguments)
            print(f"{time.monotonic() - begin:.1f} s: done {arguments[1:]}", flush=True)
        except Exception:  # one task's failure is reported and ends no other's
            failure = traceback.format_exc()
        pipe.send(failure)


def run_tasks(tasks: list[Task], act: Callable[..., None], jobs: int, seconds: float, logs: list[str]) -> list[str]:
    """Run `act(*task.arguments)` of every task in `jobs` processes for at most so many seconds; what is under way then is given up.

    Args:
        act: a function of a module, called in the workers; it keeps its results itself.
        logs: files for the workers' output.

    Returns a line for each task that failed, and one for what was left.
    """
    begin, todo, problems = time.monotonic(), TaskList(tasks), []
    context = get_context("spawn")
    workers: dict[Connection, tuple[int, Any]] = {}
    running: dict[Connection, Task] = {}

    def start(number: int) -> None:
        pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, act, logs[number], begin), daemon=True)
        process.start()
        theirs.close()
        workers[pipe] = number, process
        give(pipe)

    def give(pipe: Connection) -> None:
        task = todo.take(workers[pipe][0])
        pipe.send(None if task is None else task.arguments)
        if task is not None:
            running[pipe] = task

    for number in range(min(jobs, len(tasks))):
        start(number)
    told = begin
    while running and (left := seconds - (time.monotonic() - begin)) > 0:
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            print(f"{told - begin:.0f} s: {len(todo.left)} tasks left, load {os.getloadavg()[0]:.0f}", flush=True)
        for pipe in wait(list(running), timeout=min(left, TELL_S)):
            number, _ = workers[pipe]
            done = running.pop(pipe)
            try:
                failure = pipe.recv()
            except EOFError:
                problems.append(f"{done.arguments}: the process ended")
                todo.prepared.pop(number, None)
                if todo.left:
                    start(number)
                continue
            if failure:
                problems.append(f"{done.arguments}: {failure}")
            give(pipe)
    for pipe, task in running.items():
        problems.append(f"{task.arguments}: under way when time was up")
        workers[pipe][1].terminate()
    problems += [f"{task.arguments}: not begun when time was up" for task in todo.left]
    return problems
