"""Who is told how far the reading of records has come, which takes minutes where there are millions of numbers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

__all__ = ["begin", "count", "watched"]

Watch: TypeAlias = Callable[[str, int], None]
"""Told what is read, and how many rows more have been."""

_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)
_what: ContextVar[str] = ContextVar("what", default="records")


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Within it, `watch` is told."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def begin(what: str) -> None:
    """Says what is read from now on."""
    _what.set(what)
    count(0)


def count(rows: int) -> None:
    """Says that so many rows have been read."""
    if watch := _watch.get():
        watch(_what.get(), rows)
