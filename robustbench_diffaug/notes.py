"""What loading found and repaired, told to whoever listens: `rdiff check` shows it, a run logs it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["note", "noting"]

_listener: ContextVar[list[str] | None] = ContextVar("listener", default=None)


def note(text: str) -> None:
    """Tells one line to the innermost `noting`, or else to the logger `robustbench_diffaug` (level INFO).

    Arguments:
        text: What was found or repaired, and in which file.
    """
    heard = _listener.get()
    if heard is None:
        logging.getLogger("robustbench_diffaug").info("%s", text)
    else:
        heard.append(text)


@contextmanager
def noting() -> Iterator[list[str]]:
    """A list that gathers the notes of what is loaded within the block."""
    heard: list[str] = []
    token = _listener.set(heard)
    try:
        yield heard
    finally:
        _listener.reset(token)
