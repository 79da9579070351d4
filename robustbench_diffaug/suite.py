"""Suites: checkpoints times benches, read from YAML and checked before anything runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, RootModel, model_validator

from robustbench_diffaug import document
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.component import Outside, Value, digest_of, suggest, trusting
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.files import locate

__all__ = ["Bench", "Loaded", "Suite", "check", "entries", "limited", "load"]

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
        places: 'suite.yaml:12: checkpoints.0' of ('checkpoint', id), ('bench', name), and of a bench's datasets in turn
            ('bench', 'name/0').
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
        data_dir: Where relative paths of datasets start; the file's folder where it is left out. For an installed
            suite all relative paths start there, or at the current folder.

    Raises:
        ValueError: If something is wrong; one line with file, line and key.
    """
    path, installed = locate(name)
    found = document.read(path)
    if not isinstance(found.data, dict):
        raise ValueError(f"{path}:1: a suite is a mapping with the keys name, checkpoints and benches")
    data = document.unshared(found.data)
    given = {document.apply(data, setting): f"--set {setting}" for setting in settings}
    if seed is not None:
        data["seed"] = seed
    found = document.Document(found.path, data, found.lines, given)
    start = data_dir.resolve() if data_dir else None
    # No file of the user's lies beside a suite that is installed.
    context = {"folder": (start or Path.cwd()) if installed else path.resolve().parent, "data": start}
    with trusting(trust or installed):
        suite = found.validate(Suite, context)
    places = {("checkpoint", c.id): _weights(found, "checkpoints", i) for i, c in enumerate(suite.checkpoints)}
    for i, bench in enumerate(suite.benches):
        places["bench", bench.name] = found.where(("benches", i, "evaluator"))
        for j in range(len(bench.datasets)):
            places["bench", f"{bench.name}/{j}"] = found.where(("benches", i, "datasets", j))
    for file in extra:
        more = entries(file, trust)
        suite = suite.model_copy(update={"checkpoints": (*suite.checkpoints, *more.values())})
        with _at(str(file)):
            _unique("checkpoint", [entry.id for entry in suite.checkpoints])
        places |= {("checkpoint", entry.id): where for where, entry in more.items()}
    if limit is not None:
        suite = limited(suite, limit)
    return Loaded(suite, places)


def _weights(found: document.Document, *place: str | int) -> str:
    """Where the weights of a checkpoint entry stand, or the entry, if it has none."""
    weights = (*place, "weights")
    return found.where(weights if weights in found.lines else place)


class _Entries(RootModel[tuple[Checkpoint, ...]]):
    """A list of checkpoint entries."""


def entries(file: Path, trust: bool = False) -> dict[str, Checkpoint]:
    """The checkpoints of a file that holds one or a list of them, by where they stand.

    Arguments:
        file: Of YAML; relative paths in it start at its folder.
        trust: Whether it may name code of the user's.

    Raises:
        ValueError: If something is wrong; one line with file, line and key.
    """
    found = document.read(file)
    context = {"folder": file.resolve().parent}
    with trusting(trust):
        if not isinstance(found.data, list):
            return {_weights(found): found.validate(Checkpoint, context)}
        if not found.data:
            raise ValueError(f"{file}:1: holds no checkpoint; needed is an entry or a list of them")
        listed = found.validate(_Entries, context)
        return {_weights(found, index): entry for index, entry in enumerate(listed.root)}


def limited(suite: Suite, limit: int) -> Suite:
    """The suite with at most so many samples of each dataset."""
    return suite.model_copy(update={"benches": tuple(_limited(bench, limit) for bench in suite.benches)})


def _limited(bench: Bench, limit: int) -> Bench:
    datasets = tuple(
        dataset.model_copy(update={"limit": min(limit, dataset.limit or limit)}) for dataset in bench.datasets
    )
    return bench.model_copy(update={"datasets": datasets})


def check(loaded: Loaded) -> tuple[str, ...]:
    """Looks at the files that a suite names and at whether its parts fit together; returns warnings.

    Raises:
        ValueError: At the first thing that is wrong.
    """
    suite, warnings = loaded.suite, []
    for entry in suite.checkpoints:
        with _at(loaded.places["checkpoint", entry.id]):
            entry.check()
        warnings += [f"checkpoint {entry.id}: {warning}" for warning in entry.warnings()]
    for bench in suite.benches:
        with _at(loaded.places["bench", bench.name]):
            warnings += [f"bench {bench.name}: {warning}" for warning in bench.evaluator.check()]
            chosen = bench.chosen(suite.checkpoints)
            bench.evaluator.fits(bench.parts(), [entry.id for entry in chosen])
            _check_kinds(bench.evaluator, chosen)
            _check_classes(chosen)
            for denoiser in bench.evaluator.denoisers():
                denoiser.check()
        for index, dataset in enumerate(bench.datasets):
            with _at(loaded.places["bench", f"{bench.name}/{index}"]):
                warnings += _check_images(bench, dataset, bench.chosen(suite.checkpoints))
    return tuple(dict.fromkeys(warnings))


def _check_kinds(evaluator: Evaluator, checkpoints: Sequence[Checkpoint]) -> None:
    """Classifiers go to evaluators of classifiers, denoisers to those of denoisers."""
    for entry in checkpoints:
        denoiser = entry.analysed()
        if evaluator.unclamped and denoiser is not None and denoiser.clip:
            raise ValueError(
                f"the denoiser of checkpoint {entry.id} is clamped to [0, 1], which zeroes rows of its Jacobian; set "
                "clip: false"
            )
        found = "classifier" if denoiser is None else "denoiser"
        if found != evaluator.needs:
            raise ValueError(
                f"evaluator {evaluator.kind} analyses a {evaluator.needs}, and checkpoint {entry.id} is a {found}; "
                "list under checkpoints of the bench those that it is for"
            )
        lacks = [
            word
            for word, needed, there in (
                ("gradients", evaluator.needs_gradient, entry.differentiable),
                ("the features of the last layer", evaluator.needs_layers, entry.layered),
            )
            if needed and not there
        ]
        if lacks:
            raise ValueError(
                f"evaluator {evaluator.kind} needs {' and '.join(lacks)}, and checkpoint {entry.id} of kind "
                f"{entry.kind} has none; list under checkpoints of the bench those that it is for"
            )


def _check_classes(checkpoints: Sequence[Checkpoint]) -> None:
    """All checkpoints of a bench must know the same classes, as far as their number tells."""
    for entry in checkpoints[1:]:
        if entry.classes != checkpoints[0].classes:
            raise ValueError(
                f"checkpoint {checkpoints[0].id} has {checkpoints[0].classes} classes and {entry.id} {entry.classes}; "
                "correct its classes, or make a bench of each, with its checkpoints listed"
            )


def _check_images(bench: Bench, dataset: Dataset, checkpoints: Sequence[Checkpoint]) -> list[str]:
    """All parts of an entry must be there, and its first image must fit the denoisers and the checkpoints."""
    for part in dataset.parts():
        if not len(part.rows()):
            raise ValueError(f"dataset {part.name} is empty; give it images, or take it out")
    first = dataset.parts()[0]
    channels, height, width = first.first().shape
    for denoiser in bench.evaluator.denoisers():
        if denoiser.channels() not in (None, channels):
            raise ValueError(
                f"images of {first.name} have {channels} channels, the denoiser {denoiser.channels()}; "
                "name a denoiser of such images, or convert them (mode of a folder)"
            )
    found = [_check_channels(bench, first.name, channels, entry) for entry in checkpoints]
    for entry in checkpoints:
        try:
            entry.fits(height, width)
        except ValueError as error:
            raise ValueError(f"images of {first.name} do not fit checkpoint {entry.id}: {error}") from error
    return [warning for warning in found if warning]


def _check_channels(bench: Bench, name: str, channels: int, entry: Checkpoint) -> str:
    """What is to be said of a checkpoint that takes images of other channels, which only grey ones can be shown to."""
    expected = entry.takes()
    if expected in (None, channels):
        return ""
    if (expected, channels) == (3, 1):
        return f"bench {bench.name}: checkpoint {entry.id} takes 3 channels and is shown grey images three times over"
    raise ValueError(
        f"images of {name} have {channels} channels, checkpoint {entry.id} takes {expected}; convert the images (mode "
        "of a folder), correct its channels, or list under checkpoints of the bench those that it is for"
    )


@contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    except OSError as error:
        raise ValueError(f"{place}: {error.filename} cannot be read: {error.strerror}") from error
