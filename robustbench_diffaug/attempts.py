"""What becomes of a task whose process dies, killed by the system for want of memory or by a fault in a library.

It is run again, each of its cells alone; a cell that ends `DEATHS` processes has failed, and all others go on.
"""

import signal
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from robustbench_diffaug.engine import Outcome, Task

__all__ = ["DEATHS", "Attempt", "Executor", "after_death", "cause_of"]

Executor: TypeAlias = Callable[[Iterable[Task]], Generator[Outcome, None, None]]
"""Closing what it returns stops the work."""

DEATHS = 2  # processes that a cell may end


@dataclass(frozen=True)
class Attempt:
    """A task to be run, and the processes that have died of it."""

    task: Task
    deaths: int = 0


def after_death(attempt: Attempt, cause: str) -> tuple[list[Attempt], list[Outcome]]:
    """What becomes of a task whose process has died: its cells are run again, each alone, or have failed.

    Arguments:
        attempt: The task.
        cause: Of the death, in some words.

    Returns:
        What is still to be run, and what is decided.
    """
    deaths, cells = attempt.deaths + 1, attempt.task.cells
    if deaths < DEATHS:  # alone: one that needs too much memory must not cost the others their records
        return [Attempt(replace(attempt.task, cells=(cell,)), deaths) for cell in cells], []
    why = f"the worker process died of it ({cause}), as did another before; run again to try once more"
    return [], [Outcome(attempt.task, dict.fromkeys(range(len(cells)), why))]


def cause_of(code: int | None) -> str:
    """What the exit code of a process tells: 'signal 9; out of memory?'."""
    if code is None or code >= 0:
        return f"exit code {code}"
    memory = "; out of memory?" if -code == signal.SIGKILL else ""
    return f"signal {-code}{memory}"
