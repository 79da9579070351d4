"""The sides of a board's columns and rows, and where two of them differ: checkpoints of one id, and imports."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from robustbench_diffaug.boards.folders import Folder
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.protocols import Difference, Measured, differing, unequal
from robustbench_diffaug.recorded import listed

__all__ = ["Side", "checkpoints", "imports"]

IMPORT = ("protocol", "score")  # what a manifest says of how another program measured


class Side(NamedTuple):
    """A bench of a run, which may be an import."""

    folder: Folder
    bench: str

    @property
    def measured(self) -> Measured:
        """The bench of a run that has records."""
        assert self.folder.run is not None
        return Measured(self.folder.run, self.bench)


def checkpoints(one: Folder, other: Folder, id: str) -> Iterator[Difference]:
    """Where two checkpoints of one id differ in what records depend on, first in their weights."""
    place, said = f"checkpoints.{id}", [_entry(folder, id) for folder in (one, other)]
    yield from unequal(f"{place}.sha256", *(about.get("sha256") for about in said))
    mine, theirs = (_value(folder, id) for folder in (one, other))
    if mine is not None and theirs is not None:
        yield from differing(place, mine, theirs)
    yield from unequal(f"{place}.fingerprint", *(about.get("fingerprint") for about in said))


def _entry(folder: Folder, id: str) -> Mapping[str, Any]:
    return next((entry for entry in listed(dict(folder.manifest), "checkpoints") if entry.get("id") == id), {})


def _value(folder: Folder, id: str) -> Checkpoint | None:
    entries = folder.run.suite.checkpoints if folder.run else ()
    return next((entry for entry in entries if entry.id == id), None)


def imports(one: Folder, other: Folder, bench: str) -> Iterator[Difference]:
    """Where two imports of a bench differ in format, in what is said of how it was measured, or on how many samples."""
    place, sides = f"benches.{bench}", (one, other)
    yield from unequal(f"{place}.imported.format", *(_source(folder).get("format") for folder in sides))
    for key in IMPORT:
        yield from unequal(f"{place}.{key}", *(folder.manifest.get(key) for folder in sides))
    mine, theirs = (_figures(folder, bench) for folder in sides)
    for figure in (figure for figure in mine if figure in theirs):
        for column, first, second in zip(("n", "better", "unit"), mine[figure], theirs[figure], strict=True):
            if first == first and second == second:  # a number that is not known says nothing
                yield from unequal(f"{place}.{figure[0]}.{column}", first, second)


def _figures(folder: Folder, bench: str) -> dict[tuple[str, str], tuple[float, str, str]]:
    """On how many samples each metric of a group rests, which way is better, and its unit."""
    rows = folder.imported[folder.imported["bench"] == bench]
    keys = zip(rows["metric"], rows["group"], strict=True)
    return dict(zip(keys, zip(rows["n"], rows["better"], rows["unit"], strict=True), strict=True))


def _source(folder: Folder) -> Mapping[str, Any]:
    found = folder.manifest.get("imported")
    return found if isinstance(found, Mapping) else {}
