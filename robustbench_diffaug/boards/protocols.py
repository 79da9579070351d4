"""What must be the same where figures share a column, and where two runs differ in it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import AfterValidator

from robustbench_diffaug.boards.folders import Folder
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.component import Outside, Value
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.recorded import Recorded, listed
from robustbench_diffaug.suite import Bench

__all__ = ["Difference", "Side", "benches", "checkpoints", "imports", "merged"]

MERGED = ("baselines", "gains")
"""Fields of evaluators that name checkpoints of their own run; figures of one of them do not depend on the others."""
NAMES = ("id", "expect_accuracy")  # of checkpoints, on which no figure depends
IMPORT = ("protocol", "score")  # what a manifest says of how another program measured


class Side(NamedTuple):
    """A bench of a run that has records."""

    folder: Folder
    bench: str

    @property
    def run(self) -> Recorded:
        """Its lock and records."""
        assert self.folder.run is not None
        return self.folder.run

    @property
    def found(self) -> Bench:
        """The bench, as the lock has it."""
        return next(bench for bench in self.run.suite.benches if bench.name == self.bench)


class Difference(NamedTuple):
    """A field in which two runs differ."""

    place: str
    one: object
    other: object

    def said(self, one: Folder, other: Folder) -> str:
        """In which runs it is what."""
        return f"{self.place} is {_short(self.one)} in {one.root} and {_short(self.other)} in {other.root}"


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def benches(one: Side, other: Side) -> Iterator[Difference]:
    """Where two benches differ in what records or figures depend on: seed, settings, versions, denoisers, images.

    Paths may differ, digests of what lies there may not. Fields that are marked `Outside` are looked at in the
    evaluator itself, since figures depend on them.
    """
    place, sides = f"benches.{one.bench}", (one, other)
    yield from _unequal("seed", *(side.run.suite.seed for side in sides))
    yield from _evaluators(f"{place}.evaluator", one.found.evaluator, other.found.evaluator)
    yield from _unequal(f"{place}.evaluator.version", *_versions(*sides))
    yield from _unequal(f"{place}.denoisers.contents", *map(_contents, sides))
    names = [[part.name for part in side.found.parts()] for side in sides]
    yield from _unequal(f"{place}.datasets", *names)
    for name in names[0] if names[0] == names[1] else ():
        facts = [side.run.declared(side.bench, name) for side in sides]
        for key in dict.fromkeys((*facts[0], *facts[1])):
            if key != "bench":
                yield from _unequal(f"{place}.datasets.{name}.{key}", *(fact.get(key) for fact in facts))
    yield from _differing(f"{place}.datasets", *(side.found.datasets for side in sides))


def _unequal(place: str, one: object, other: object) -> Iterator[Difference]:
    if one != other:
        yield Difference(place, one, other)


def _evaluators(place: str, one: Evaluator, other: Evaluator) -> Iterator[Difference]:
    if type(one) is not type(other):
        yield from _unequal(f"{place}.kind", one.kind, other.kind)
        return
    for name, about in type(one).model_fields.items():
        mine, theirs = getattr(one, name), getattr(other, name)
        if name in MERGED:
            yield from _unequal(f"{place}.{name}", *_contradicting(mine, theirs))
        elif not _is_path(about.metadata):
            yield from _differing(f"{place}.{name}", mine, theirs)


def _is_path(metadata: list[Any]) -> bool:
    """Whether a field is a path or a digest, which is compared by what the manifest says of the contents."""
    return Outside in metadata and any(isinstance(entry, AfterValidator) for entry in metadata)


def _contradicting(one: object, other: object) -> tuple[object, object]:
    """Entries of two mappings, as pairs, that have one key and other values; lists contradict nothing."""
    try:
        mine, theirs = dict(one), dict(other)  # type: ignore[call-overload]  # what is no mapping raises
    except (TypeError, ValueError):
        return None, None
    odd = [key for key in mine if key in theirs and mine[key] != theirs[key]]
    return {key: mine[key] for key in odd}, {key: theirs[key] for key in odd}


def merged(one: Evaluator, other: Evaluator) -> Evaluator:
    """An evaluator with the baselines and gains of both."""
    fields = [name for name in MERGED if name in type(one).model_fields]
    both = {name: tuple(dict.fromkeys((*getattr(one, name), *getattr(other, name)))) for name in fields}
    return one.model_copy(update=both) if both else one


def _differing(place: str, one: object, other: object) -> Iterator[Difference]:
    """Where two values differ in what records depend on."""
    if isinstance(one, Value) and type(one) is type(other):
        for name, about in type(one).model_fields.items():
            if Outside not in about.metadata:
                yield from _differing(f"{place}.{name}", getattr(one, name), getattr(other, name))
    elif isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) and _holds_values(one):
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from _differing(f"{place}.{index}", mine, theirs)
    elif isinstance(one, Value) and isinstance(other, Value):
        yield Difference(f"{place}.kind", *(getattr(each, "kind", type(each).__name__) for each in (one, other)))
    else:
        yield from _unequal(place, one, other)


def _holds_values(found: tuple[object, ...]) -> bool:
    return any(isinstance(entry, Value) for entry in found)


def _versions(*sides: Side) -> tuple[object, ...]:
    """The versions of the evaluators that made the records, where both manifests say so."""
    found = []
    for side in sides:
        entries = listed(side.run.manifest, "benches")
        found.append(next((entry.get("version") for entry in entries if entry.get("name") == side.bench), None))
    return (None, None) if None in found else tuple(found)


def _contents(side: Side) -> list[str]:
    """The digests of the denoisers of a bench, as the manifest lists them."""
    distinct = dict.fromkeys(denoiser for each in side.run.suite.benches for denoiser in each.evaluator.denoisers())
    said = dict(zip(distinct, listed(side.run.manifest, "denoisers"), strict=False))
    return [str(said.get(denoiser, {}).get("contents")) for denoiser in side.found.evaluator.denoisers()]


def checkpoints(one: Folder, other: Folder, id: str) -> Iterator[Difference]:
    """Where two checkpoints of one id differ in what records depend on, first in their weights."""
    place, said = f"checkpoints.{id}", [_entry(folder, id) for folder in (one, other)]
    yield from _unequal(f"{place}.sha256", *(about.get("sha256") for about in said))
    mine, theirs = (_value(folder, id) for folder in (one, other))
    if mine is not None and theirs is not None:
        yield from _differing(place, mine, theirs)
    yield from _unequal(f"{place}.fingerprint", *(about.get("fingerprint") for about in said))


def _entry(folder: Folder, id: str) -> Mapping[str, Any]:
    return next((entry for entry in listed(dict(folder.manifest), "checkpoints") if entry.get("id") == id), {})


def _value(folder: Folder, id: str) -> Checkpoint | None:
    entries = folder.run.suite.checkpoints if folder.run else ()
    return next((entry for entry in entries if entry.id == id), None)


def imports(one: Folder, other: Folder, bench: str) -> Iterator[Difference]:
    """Where two imports of a bench differ in format, in what is said of how it was measured, or on how many samples."""
    place, sides = f"benches.{bench}", (one, other)
    yield from _unequal(f"{place}.imported.format", *(_source(folder).get("format") for folder in sides))
    for key in IMPORT:
        yield from _unequal(f"{place}.{key}", *(folder.manifest.get(key) for folder in sides))
    mine, theirs = (_figures(folder, bench) for folder in sides)
    for figure in (figure for figure in mine if figure in theirs):
        for column, first, second in zip(("n", "better", "unit"), mine[figure], theirs[figure], strict=True):
            if first == first and second == second:  # a number that is not known says nothing
                yield from _unequal(f"{place}.{figure[0]}.{column}", first, second)


def _figures(folder: Folder, bench: str) -> dict[tuple[str, str], tuple[float, str, str]]:
    """On how many samples each metric of a group rests, which way is better, and its unit."""
    rows = folder.imported[folder.imported["bench"] == bench]
    keys = zip(rows["metric"], rows["group"], strict=True)
    return dict(zip(keys, zip(rows["n"], rows["better"], rows["unit"], strict=True), strict=True))


def _source(folder: Folder) -> Mapping[str, Any]:
    found = folder.manifest.get("imported")
    return found if isinstance(found, Mapping) else {}
