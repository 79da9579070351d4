"""A share of a plan: every N-th of its tasks, so that machines which know nothing of each other divide a suite."""

import re
from dataclasses import dataclass

__all__ = ["WHOLE", "Shard"]


@dataclass(frozen=True)
class Shard:
    """One of `count` equal shares of a plan.

    Arguments:
        index: Which, from 1 to `count`.
        count: Of how many.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The share that 'I/N' names.

        Raises:
            ValueError: If it names none.
        """
        match = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"--shard {text}: needed is I/N with I from 1 to N, as 1/4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, number: int) -> bool:
        """Whether the task with this number, from 0, is of the share: tasks are dealt in turn."""
        return number % self.count == self.index - 1


WHOLE = Shard(1, 1)
"""The whole plan."""
