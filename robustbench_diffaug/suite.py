"""Suites: checkpoints times benches, read from YAML and checked before anything runs."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, NonNegativeInt, model_validator

from robustbench_diffaug import document
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.component import Outside, Value, digest_of, suggest, trusting
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.files import locate

__all__ = ["Bench", "Loaded", "Suite", "apply", "check", "load"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=80)]


class Bench(Value):
    """One evaluator, its datasets, and the checkpoints that it is for.

    Arguments:
        name: Unique in the suite.
        evaluator: What is measured.
        datasets: On which images.
        checkpoints: Ids; left out, all of the suite.
    """

    name: Name
    evaluator: Evaluator
    datasets: tuple[Dataset, ...] = Field(min_length=1)
    checkpoints: Annotated[tuple[str, ...] | None, Outside] = None

    def parts(self) -> tuple[Dataset, ...]:
        """The datasets, grids expanded."""
        return tuple(chain.from_iterable(dataset.parts() for dataset in self.datasets))

    def chosen(self, checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
        """Those of the suite's checkpoints that it is for."""
        return tuple(entry for entry in checkpoints if self.checkpoints is None or entry.id in self.checkpoints)


class Suite(Value):
    """Checkpoints times benches.

    Arguments:
        name: A run folder belongs to a suite by its name and seed.
        seed: Of all noise.
        checkpoints: What is evaluated.
        benches: How.
    """

    name: Name
    seed: NonNegativeInt = 0
    checkpoints: tuple[Checkpoint, ...] = Field(min_length=1)
    benches: tuple[Bench, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> "Suite":
        _unique("checkpoint", [entry.id for entry in self.checkpoints])
        _unique("bench", [bench.name for bench in self.benches])
        known = [entry.id for entry in self.checkpoints]
        for bench in self.benches:
            _unique(f"dataset of bench {bench.name}", [dataset.name for dataset in bench.parts()])
            for id in bench.checkpoints or ():
                if id not in known:
                    raise ValueError(f"bench {bench.name} names checkpoint {id!r}{suggest(id, known)}")
        return self

    @property
    def digest(self) -> str:
        """32 hexadecimal digits of everything the suite says, names included."""
        return digest_of(self.model_dump(mode="json", serialize_as_any=True), 16)


def _unique(what: str, names: list[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"two {what}s are called {twice[0]!r}; give each a name of its own")


@dataclass(frozen=True)
class Loaded:
    """A suite from files, with where each part of it stands, for messages.

    Arguments:
        suite: The suite.
        places: 'suite.yaml:12: checkpoints.0' of ('checkpoint', id) and ('bench', name).
    """

    suite: Suite
    places: Mapping[tuple[str, str], str]


def load(
    name: str,
    *,
    trust: bool = False,
    settings: Sequence[str] = (),
    extra: Sequence[Path] = (),
    limit: int | None = None,
    seed: int | None = None,
    data_dir: Path | None = None,
) -> Loaded:
    """A suite by name or path.

    Arguments:
        name: Of a built-in suite, or the path of a file.
        trust: Whether its files may name code of the user's.
        settings: 'a.b=value', each replacing what the file says.
        extra: Files with more checkpoint entries, one or a list each.
        limit: At most so many samples of each dataset.
        seed: Instead of the file's.
        data_dir: Where relative paths of datasets start; the file's folder where it is left out.

    Raises:
        ValueError: If something is wrong; one line with file, line and key.
    """
    path, installed = locate(name)
    found = document.read(path)
    if not isinstance(found.data, dict):
        raise ValueError(f"{path}:1: a suite is a mapping with the keys name, checkpoints and benches")
    data = copy.deepcopy(found.data)
    for setting in settings:
        apply(data, setting)
    if seed is not None:
        data["seed"] = seed
    found = document.Document(found.path, data, found.lines)
    context = {"folder": path.resolve().parent, "data": data_dir.resolve() if data_dir else None}
    with trusting(trust or installed):
        suite = found.validate(Suite, context)
    places = {("checkpoint", c.id): found.where(("checkpoints", i)) for i, c in enumerate(suite.checkpoints)}
    places |= {("bench", b.name): found.where(("benches", i)) for i, b in enumerate(suite.benches)}
    for file in extra:
        entries, where = _entries(file, trust)
        places |= {("checkpoint", entry.id): where for entry in entries}
        suite = suite.model_copy(update={"checkpoints": (*suite.checkpoints, *entries)})
    if extra:
        _unique("checkpoint", [entry.id for entry in suite.checkpoints])
    if limit is not None:
        suite = suite.model_copy(update={"benches": tuple(_limited(bench, limit) for bench in suite.benches)})
    return Loaded(suite, places)


def _entries(file: Path, trust: bool) -> tuple[tuple[Checkpoint, ...], str]:
    found = document.read(file)
    context = {"folder": file.resolve().parent}
    with trusting(trust):
        if isinstance(found.data, list):
            return found.validate(tuple[Checkpoint, ...], context), found.where(())
        return (found.validate(Checkpoint, context),), found.where(())


def _limited(bench: Bench, limit: int) -> Bench:
    datasets = tuple(
        dataset.model_copy(update={"limit": min(limit, dataset.limit or limit)}) for dataset in bench.datasets
    )
    return bench.model_copy(update={"datasets": datasets})


def apply(data: Any, setting: str) -> None:
    """Applies 'a.b=value' to what a file holds; items of lists go by position, name or id.

    Raises:
        ValueError: If there is no such place.
    """
    dotted, equals, text = setting.partition("=")
    parts = dotted.split(".")
    if not equals or not all(parts):
        raise ValueError(f"--set {setting}: needed is key=value, such as --set benches.certify.evaluator.n=1000")
    place = data
    for part in parts[:-1]:
        key = _key(place, part, setting)
        if isinstance(place, dict) and key not in place:
            raise ValueError(f"--set {setting}: there is no {part!r}{suggest(part, list(map(str, place)))}")
        place = place[key]
    place[_key(place, parts[-1], setting)] = yaml.load(text, document.Loader)  # noqa: S506  (a SafeLoader)


def _key(place: Any, part: str, setting: str) -> str | int:
    if isinstance(place, dict):
        return part
    if not isinstance(place, list):
        raise ValueError(f"--set {setting}: {part!r} is below a plain value")
    names = [str(item.get("name", item.get("id", ""))) if isinstance(item, dict) else "" for item in place]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(place):
        return int(part)
    raise ValueError(f"--set {setting}: there is no item {part!r}{suggest(part, [name for name in names if name])}")


def check(loaded: Loaded) -> tuple[str, ...]:
    """Looks at the files that a suite names and at whether its parts fit together; returns warnings.

    Raises:
        ValueError: At the first thing that is wrong.
    """
    suite, warnings = loaded.suite, []
    for entry in suite.checkpoints:
        with _at(loaded.places["checkpoint", entry.id]):
            entry.check()
    for bench in suite.benches:
        with _at(loaded.places["bench", bench.name]):
            warnings += [f"bench {bench.name}: {warning}" for warning in bench.evaluator.check()]
            for dataset in bench.datasets:
                _check_images(bench, dataset, bench.chosen(suite.checkpoints))
    return tuple(warnings)


def _check_images(bench: Bench, dataset: Dataset, checkpoints: Sequence[Checkpoint]) -> None:
    """The first image of an entry must fit the denoisers and the checkpoints."""
    first = dataset.parts()[0]
    if not len(first.rows()):
        raise ValueError(f"dataset {first.name} is empty")
    channels = first.opened().read(first.rows()[:1])[0].shape[1]
    for denoiser in bench.evaluator.denoisers():
        if denoiser.channels() not in (None, channels):
            raise ValueError(f"images of {first.name} have {channels} channels, the denoiser {denoiser.channels()}")
    for entry in checkpoints:
        expected = getattr(entry, "channels", channels)
        if expected != channels:
            raise ValueError(f"images of {first.name} have {channels} channels, checkpoint {entry.id} takes {expected}")


@contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
