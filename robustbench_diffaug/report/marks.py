"""Where rows come from: verified, checked again, imported or published, with links to what says so."""

from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote

from robustbench_diffaug.report.cells import Digest, Link, Row, Table

__all__ = ["KINDS", "Kind", "Legend", "Mark", "legend", "origins"]


class Kind(NamedTuple):
    """How a mark looks and what it says."""

    sign: str
    words: str


KINDS = {
    "verified": Kind("✓", "every figure follows from the records, and all digests are right, when this page was made"),
    "rechecked": Kind("✓✓", "a note of rdiff verify says that samples were evaluated again as well, and were the same"),
    "unverified": Kind("?", "made from the records, and not verified; the notices say why"),
    "imported": Kind("↓", "figures of another program, read from its files"),
    "published": Kind("§", "as printed in a publication; neither ranked nor tested"),
}


class Mark(NamedTuple):
    """Where the figures of a checkpoint in a bench are from.

    Attributes:
        kind: One of `KINDS`.
        run: The run folder, relative to that of the page; or what to call it.
        manifest: The manifest, likewise.
        digest: The sha256 of the run's digests.txt.
    """

    kind: str
    run: str = ""
    manifest: str = ""
    digest: str = ""


class Legend(NamedTuple):
    """A kind of mark of a page."""

    kind: str
    sign: str
    words: str


def legend(marks: Mapping[tuple[str, str], Mark], published: bool) -> list[Legend]:
    """The kinds of marks that a page has.

    Raises:
        ValueError: If a mark is of no known kind.
    """
    for (bench, checkpoint), mark in marks.items():
        if mark.kind not in KINDS:
            raise ValueError(
                f"the mark of {checkpoint} in {bench} is {mark.kind!r}, expected one of {', '.join(KINDS)}"
            )
    used = {mark.kind for mark in marks.values()} | ({"published"} if published else set())
    return [Legend(name, *kind) for name, kind in KINDS.items() if name in used]


def _link(path: str) -> Link | str | None:
    """A link to a file beside the page; what is no relative path is text, since it may lead anywhere."""
    if not path:
        return None
    return path if path.startswith(("/", "\\")) else Link(path, f"./{quote(path)}")


def origins(marks: Mapping[tuple[str, str], Mark]) -> Table | None:
    """A table of where each row is from, or None without a mark."""
    rows = [
        Row(checkpoint, bench, [mark.kind, _link(mark.run), _link(mark.manifest), Digest(mark.digest)])
        for (bench, checkpoint), mark in marks.items()
    ]
    columns = ["mark", "run", "manifest", "digest"]
    return Table("where the figures are from", "checkpoint", columns, rows) if rows else None
