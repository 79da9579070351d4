"""A finished run folder, read by what it says of itself: neither weights nor images are needed for its figures.

Records lie in folders named by a key, which depends on the digests of weights and data. Where these are not at hand the
key is taken from the manifest, or is the only one that there is.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

from pydantic import Field, NonNegativeInt, ValidationError

from robustbench_diffaug import document
from robustbench_diffaug.component import Outside, Value, look_again, trusting
from robustbench_diffaug.data.base import Dataset, Images
from robustbench_diffaug.engine import cells
from robustbench_diffaug.store import Cell, Store
from robustbench_diffaug.suite import Bench, Suite

__all__ = ["BOARD", "LOCK", "Absent", "Archive", "Recorded", "keys_of", "listed", "manifest_of", "open_run"]

LOCK = "suite.lock.yaml"
MANIFEST = "manifest.json"
BOARD = "board.json"
SCHEMA = 1  # of manifests

Keys = Mapping[str, Mapping[str, Mapping[str, str]]]
"""The key of a cell by its bench, dataset and checkpoint."""


class Absent(Dataset):
    """What a manifest says of a dataset, in the dataset's place: how many images there are, and none of them.

    Arguments:
        n: Samples of the declared subset.
        n_available: Samples of the whole dataset.
        known: How many classes its images can be of, where they are not all.
    """

    kind: Literal["absent"] = "absent"
    n: NonNegativeInt = Field(le=10_000_000)
    n_available: NonNegativeInt
    known: NonNegativeInt = Field(0, le=1_000_000)

    def covers(self) -> tuple[int, ...]:
        """As many classes as are known of."""
        return tuple(range(self.known))

    def population(self) -> int:
        """The samples of the whole dataset."""
        return self.n_available

    def contents(self) -> str:
        """Nothing."""
        return ""

    def open(self) -> Images:
        """Positions, and no images."""

        def read(rows: Sequence[int]) -> Any:
            raise ValueError(f"the images of {self.name} are not at hand; only its records are")

        return Images(_Positions(self.n), read)


@dataclass(frozen=True)
class _Positions(Sequence[str]):
    """The positions of so many images as their names, none of which is made before it is asked for."""

    size: int

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[str]: ...
    def __getitem__(self, row: int | slice) -> str | Sequence[str]:
        found = range(self.size)[row]
        return str(found) if isinstance(found, int) else [str(each) for each in found]


@dataclass(frozen=True)
class Archive(Store):
    """The records of a run folder, found by the names of their folders and the keys that were written down.

    Arguments:
        keys: Those that the manifest names; a cell that is not among them must have one folder alone.
    """

    keys: Keys = field(default_factory=dict)

    def key(self, cell: Cell) -> str | None:
        """The key of a cell's folder; None where it has no records.

        Raises:
            ValueError: If there are several and the manifest names none.
        """
        known = self.keys.get(cell.bench, {}).get(cell.dataset.name, {}).get(cell.checkpoint.id)
        if known is not None:
            return known
        found = self.versions(cell)
        if len(found) > 1:
            raise ValueError(
                f"{self.root / _keyed(cell, '').folder} holds {len(found)} versions of these records, and the manifest "
                "does not say which counts; run the suite again with rdiff run, which writes that down"
            )
        return found[0] if found else None

    def versions(self, cell: Cell) -> list[str]:
        """All keys that a cell has folders of."""
        folder = self.root / _keyed(cell, "").folder
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def _folder(self, cell: Cell) -> Path | None:
        key = self.key(cell)
        return None if key is None else self.root / _keyed(cell, key).folder

    def files(self, cell: Cell) -> list[tuple[int, int, Path]]:
        """The first and the last position of each file of a cell, and its path."""
        return self._files(cell)


def _keyed(cell: Cell, key: str) -> Cell:
    """The cell with its key given, so that none is computed from files."""
    copy = replace(cell)
    vars(copy)["key"] = key  # where `cached_property` looks first
    return copy


def keys_of(suite: Suite) -> dict[str, dict[str, dict[str, str]]]:
    """The key of every cell of a suite, for the manifest."""
    return {
        bench.name: {
            dataset.name: {cell.checkpoint.id: cell.key for cell in row} for dataset, row in cells(suite, bench)
        }
        for bench in suite.benches
    }


@dataclass(frozen=True)
class Recorded:
    """A run folder.

    Arguments:
        root: The folder.
        data: What its lock holds.
        suite: The suite of the lock, with settings applied.
        manifest: Of the run.
        given: 'a.b=value (the suite says ...)' of each setting.
        current: Whether the lock has the very fields that suites have in this version of rdiff.
    """

    root: Path
    data: Any
    suite: Suite
    manifest: dict[str, Any]
    given: tuple[str, ...] = ()
    current: bool = True

    @cached_property
    def bare(self) -> Suite:
        """The suite with what the manifest says of its datasets in their place: metrics need no more."""
        return self.suite.model_copy(update={"benches": tuple(map(self._bare, self.suite.benches))})

    @cached_property
    def archive(self) -> Archive:
        """The records.

        Raises:
            ValueError: If the manifest's keys are none.
        """
        keys = self.manifest.get("keys", {})
        try:
            flat = [key for bench in keys.values() for row in bench.values() for key in row.values()]
            if all(re.fullmatch("[0-9a-f]{16}", key) for key in flat):
                return Archive(self.root, keys)
        except (AttributeError, TypeError):
            pass
        raise ValueError(f"{self.root / MANIFEST} is damaged: keys has what is no key of a cell")

    def _bare(self, bench: Bench) -> Bench:
        return bench.model_copy(update={"datasets": tuple(self.absent(bench, part) for part in bench.parts())})

    def absent(self, bench: Bench, dataset: Dataset) -> Absent:
        """The stand-in for a dataset of a bench."""
        found = self.declared(bench.name, dataset.name)
        names = ("origin", "group", "severity", "n", "n_available", "class_space")
        try:
            fields = {name: found[name] for name in names if name in found}
            return Absent(name=dataset.name, known=found.get("classes", 0), **fields)
        except ValidationError as error:
            wrong = ", ".join(".".join(map(str, entry["loc"])) for entry in error.errors())
            raise ValueError(f"{self.root / MANIFEST} is damaged: {wrong} of dataset {dataset.name}") from error

    def declared(self, bench: str, dataset: str) -> Mapping[str, Any]:
        """What the manifest says of a dataset.

        Raises:
            ValueError: If it says nothing.
        """
        for entry in listed(self.manifest, "datasets"):
            if (entry.get("bench"), entry.get("name")) == (bench, dataset):
                return entry
        raise ValueError(f"{self.root / MANIFEST} does not list dataset {dataset} of bench {bench}")


def listed(manifest: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The mappings in a list of a manifest."""
    found = manifest.get(key)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list) else []


def open_run(
    root: Path, *, trust: bool = False, settings: Sequence[str] = (), data_dir: Path | None = None
) -> Recorded:
    """Reads the lock and the manifest of a run folder.

    Arguments:
        root: The folder.
        trust: Whether the lock may name code of the user's.
        settings: 'a.b=value', each of a field that records do not depend on.
        data_dir: Where files and folders that datasets name are looked for, if they are not where they were.

    Raises:
        ValueError: If it is no run folder, or damaged, or a setting would need forwards.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; give the folder of a run, such as reports/quickstart")
    look_again()
    manifest = manifest_of(root)
    if not (root / LOCK).is_file():
        for key, said in (("imported", "figures of another tool"), ("report", "a report without its records")):
            if key in manifest:
                raise ValueError(f"{root} holds {said}: there are no records to compute anything from")
        raise ValueError(f"{root} is no run folder: it has no {LOCK}; give the folder that rdiff run wrote")
    found = document.read(root / LOCK)
    if not isinstance(found.data, dict):
        raise ValueError(f"{root / LOCK}:1: is damaged; a suite is a mapping")
    data = document.unshared(found.data)
    placed = _relocated(data, data_dir) if data_dir else data
    with trusting(trust):
        before = document.Document(found.path, placed, found.lines).validate(Suite, {})
        changed = document.unshared(placed)
        places = [document.apply(changed, setting) for setting in settings]
        typed = dict(zip(places, (f"--set {setting}" for setting in settings), strict=True))
        after = document.Document(found.path, changed, found.lines, typed).validate(Suite, {})
    _refuse(before, after)
    given = tuple(
        f"{setting} (the suite says {_old(placed, place)})" for setting, place in zip(settings, places, strict=True)
    )
    current = before.model_dump(mode="json", serialize_as_any=True) == placed
    return Recorded(root, data, after, manifest, given, current)


def manifest_of(root: Path) -> dict[str, Any]:
    """What a run folder says of itself.

    Raises:
        ValueError: If it says nothing, is damaged, or of a schema of another version of rdiff.
    """
    path = root / MANIFEST
    if not path.is_file() and (root / BOARD).is_file():
        raise ValueError(f"{root} holds a board, which has no records of its own; give the runs that it is of")
    if not path.is_file():
        raise ValueError(f"{root} is no finished run folder: it has no {MANIFEST}; run the suite to its end")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no mapping")
    if (schema := found.get("schema_version", SCHEMA)) != SCHEMA:
        raise ValueError(
            f"{path}: schema_version is {schema!r:.40}, and this rdiff reads {SCHEMA}; use the rdiff that made the run"
        )
    return found


def _old(data: Any, place: Iterable[str | int]) -> str:
    """What stands at a place of a lock, in YAML."""
    for part in place:
        try:
            data = data[part]
        except (KeyError, IndexError):
            return "nothing"
    return json.dumps(data, ensure_ascii=False)


def _refuse(before: Suite, after: Suite) -> None:
    """Only what records do not depend on can be set."""
    if [entry.id for entry in before.checkpoints] != [entry.id for entry in after.checkpoints]:
        raise ValueError("--set changes the id of a checkpoint, by which its records are found; leave ids as they are")
    for place in _seen(before, after, ""):
        fields = [
            f"{bench.name}: {', '.join(names)}"
            for bench in before.benches
            if (names := [n for n, f in type(bench.evaluator).model_fields.items() if Outside in f.metadata])
        ]
        raise ValueError(
            f"--set changes {place.lstrip('.')}, on which records depend: it needs new forwards, so run the suite with "
            f"it; without them evaluators let set {'; '.join(fields) or 'nothing'}"
        )


def _seen(before: object, after: object, place: str) -> Iterator[str]:
    """The places of what differs and is not marked `Outside`."""
    if isinstance(before, Value) and type(before) is type(after):
        for name, about in type(before).model_fields.items():
            if Outside not in about.metadata:
                yield from _seen(getattr(before, name), getattr(after, name), f"{place}.{name}")
    elif isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _seen(one, other, f"{place}.{index}")
    elif before != after:
        yield place


def _relocated(data: Any, data_dir: Path) -> Any:
    """A lock in which paths that lead nowhere are replaced by the longest end of theirs that is below `data_dir`."""
    if isinstance(data, dict):
        return {key: _relocated(value, data_dir) for key, value in data.items()}
    if isinstance(data, list):
        return [_relocated(value, data_dir) for value in data]
    if isinstance(data, str) and data.startswith("/") and not Path(data).exists():
        parts = Path(data).parts[1:]
        ends = (data_dir.joinpath(*parts[start:]) for start in range(len(parts)))
        return next((str(path.resolve()) for path in ends if path.exists()), data)
    return data
