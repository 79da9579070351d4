"""What must be the same where figures of two runs stand beside each other, and where the runs differ in it."""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from pydantic import AfterValidator

from robustbench_diffaug.component import Outside, Value
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.recorded import Recorded, listed
from robustbench_diffaug.records import Records, shared
from robustbench_diffaug.suite import Bench

__all__ = ["Difference", "Measured", "benches", "differing", "is_path", "merged", "told", "unequal", "unlike"]

MERGED = ("baselines", "gains")
"""Fields of evaluators that name checkpoints of their own run; figures of one of them do not depend on the others."""


class Measured(NamedTuple):
    """A bench of a run that has records.

    Arguments:
        run: Its lock and records.
        bench: The name.
    """

    run: Recorded
    bench: str

    @property
    def found(self) -> Bench:
        """The bench, as the lock has it."""
        return next(bench for bench in self.run.suite.benches if bench.name == self.bench)


class Difference(NamedTuple):
    """A field in which two runs differ."""

    place: str
    one: object
    other: object

    def said(self, one: Path, other: Path) -> str:
        """In which run folder it is what."""
        mine, theirs = ("nothing" if value is None else str(value) for value in (self.one, self.other))
        pairs = enumerate(zip(mine, theirs, strict=False))
        alike = next((at for at, (first, second) in pairs if first != second), min(len(mine), len(theirs)))
        return f"{self.place} is {_short(mine, alike)} in {one} and {_short(theirs, alike)} in {other}"


def _short(text: str, alike: int) -> str:
    """At most 60 characters of a text: its first ones, or where those begin that the other text does not have."""
    cut = len(text) > 60 and alike > 40
    shown = f"...{text[alike - 20 :]}" if cut else text
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def benches(one: Measured, other: Measured) -> Iterator[Difference]:
    """Where two benches differ in what records or figures depend on: seed, settings, versions, denoisers, images.

    Paths may differ, digests of what lies there may not. Fields that are marked `Outside` are looked at in the
    evaluator itself, since figures depend on them.
    """
    place, sides = f"benches.{one.bench}", (one, other)
    yield from unequal("seed", *(side.run.suite.seed for side in sides))
    yield from _evaluators(f"{place}.evaluator", one.found.evaluator, other.found.evaluator)
    yield from unequal(f"{place}.evaluator.version", *_versions(*sides))
    yield from unequal(f"{place}.denoisers.contents", *map(_contents, sides))
    names = [[part.name for part in side.found.parts()] for side in sides]
    yield from unequal(f"{place}.datasets", *names)
    for name in names[0] if names[0] == names[1] else ():
        facts = [side.run.declared(side.bench, name) for side in sides]
        for key in dict.fromkeys((*facts[0], *facts[1])):
            if key != "bench":
                yield from unequal(f"{place}.datasets.{name}.{key}", *(fact.get(key) for fact in facts))
    yield from differing(f"{place}.datasets", one.found.datasets, other.found.datasets)


def unequal(place: str, one: object, other: object) -> Iterator[Difference]:
    """The difference of two values that are not equal."""
    if one != other:
        yield Difference(place, one, other)


def _evaluators(place: str, one: Evaluator, other: Evaluator) -> Iterator[Difference]:
    if type(one) is not type(other):
        yield from unequal(f"{place}.kind", one.kind, other.kind)
        return
    for name, about in type(one).model_fields.items():
        mine, theirs = getattr(one, name), getattr(other, name)
        if name in MERGED:
            yield from unequal(f"{place}.{name}", *_contradicting(mine, theirs))
        elif not is_path(about.metadata):
            yield from differing(f"{place}.{name}", mine, theirs)


def is_path(metadata: Collection[Any]) -> bool:
    """Whether a field is a path or a digest, which may differ from machine to machine; the contents tell."""
    return Outside in metadata and any(isinstance(entry, AfterValidator) for entry in metadata)


def is_outside(metadata: Collection[Any]) -> bool:
    """Whether no record depends on a field."""
    return Outside in metadata


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


def differing(
    place: str, one: object, other: object, skipped: Callable[[Collection[Any]], bool] = is_outside
) -> Iterator[Difference]:
    """Where two values of a suite differ, deep in them.

    Arguments:
        place: What they are called.
        one: A value, or a tuple of values.
        other: Likewise.
        skipped: Which fields do not count, by their metadata: those that no record depends on.
    """
    if isinstance(one, Value) and type(one) is type(other):
        for name, about in type(one).model_fields.items():
            if not skipped(about.metadata):
                yield from differing(_within(place, name), getattr(one, name), getattr(other, name), skipped)
    elif isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other) and _holds_values(one):
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from differing(_within(place, index), mine, theirs, skipped)
    elif isinstance(one, Value) and isinstance(other, Value):
        yield Difference(_within(place, "kind"), *(getattr(each, "kind", type(each).__name__) for each in (one, other)))
    else:
        yield from unequal(place, one, other)


def _within(place: str, part: str | int) -> str:
    return f"{place}.{part}" if place else str(part)


def _holds_values(found: tuple[object, ...]) -> bool:
    return any(isinstance(entry, Value) for entry in found)


def _versions(*sides: Measured) -> tuple[object, ...]:
    """The versions of the evaluators that made the records, where both manifests say so."""
    found = []
    for side in sides:
        entries = listed(side.run.manifest, "benches")
        found.append(next((entry.get("version") for entry in entries if entry.get("name") == side.bench), None))
    return (None, None) if None in found else tuple(found)


def _contents(side: Measured) -> list[str]:
    """The digests of the denoisers of a bench, as the manifest lists them."""
    distinct = dict.fromkeys(denoiser for each in side.run.suite.benches for denoiser in each.evaluator.denoisers())
    said = dict(zip(distinct, listed(side.run.manifest, "denoisers"), strict=False))
    return [str(said.get(denoiser, {}).get("contents")) for denoiser in side.found.evaluator.denoisers()]


def unlike(one: Records, other: Records, names: Sequence[str] = ("image", "label")) -> str:
    """The first column in which samples that both have are not equal, in how many, and one of them; or nothing."""
    rows = shared(one, other)
    for name in names:
        odd = one[name][rows[0]] != other[name][rows[1]]
        if odd.any():
            return told(name, odd, one, rows[0])
    return ""


def told(name: str, odd: Bool[np.ndarray, " n"], records: Records, rows: Int[np.ndarray, " n"]) -> str:
    """In how many samples a column differs, and the first of them.

    Arguments:
        name: Of the column.
        odd: Which samples differ, of shape (n,).
        records: Of one side.
        rows: Where its samples stand, of shape (n,).
    """
    at = rows[int(odd.argmax())]
    return f"{name} of {odd.sum():,} of {len(odd):,} samples, as of {records['dataset'][at]}/{records['sample'][at]},"
