"""What an entry of the glossary is."""

from typing import NamedTuple

__all__ = ["Entry", "Source"]


class Source(NamedTuple):
    """A publication."""

    title: str
    authors: str
    year: int
    url: str


class Entry(NamedTuple):
    """A metric of the glossary; `pattern` finds its names."""

    term: str
    pattern: str
    formula: str
    source: Source | None = None
