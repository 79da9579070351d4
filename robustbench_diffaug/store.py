"""Where records live, and what is missing: one immutable Parquet file for each cell and range of samples."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.component import digest_of, fingerprint
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.files import atomic
from robustbench_diffaug.records import Piece, Records, from_table

__all__ = ["Cell", "Store", "columns_of", "of_nothing", "with_skipped"]

CONSTANTS = "constants.safetensors"
LONGEST = 200  # characters of a folder's name; most file systems take 255


@dataclass(frozen=True)
class Cell:
    """One checkpoint under one evaluator on one dataset."""

    bench: str
    checkpoint: Checkpoint
    evaluator: Evaluator
    dataset: Dataset
    seed: int

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits of all that the records depend on."""
        return digest_of([*map(fingerprint, (self.checkpoint, self.evaluator, self.dataset)), self.seed])

    @cached_property
    def folder(self) -> Path:
        """Where its files are, below the run folder; names are quoted, so that none leads elsewhere."""
        names = (self.bench, self.checkpoint.id, self.dataset.name)
        return Path("records", *map(quoted, names), self.key)


def quoted(name: str) -> str:
    """A name as one of a file or folder: no separator, not hidden, and not too long for a file system."""
    found = quote(name, safe="@+=,").replace(".", "%2E", 1 if name.startswith(".") else 0)
    return found if len(found) <= LONGEST else f"{found[:LONGEST]}~{digest_of(name)}"


SKIPPED = b"skipped"
"""Key of a file's metadata: a JSON list of [id, reason] of the images that were left out."""


def of_nothing() -> pa.Table:
    """The rows of a range of which no image can be decoded: none, and no column of an evaluator."""
    return pa.table({"sample": pa.array([], pa.string())})


def with_skipped(table: pa.Table, skipped: Sequence[tuple[str, str]]) -> pa.Table:
    """The rows of a range with a note of what was left out of it: (id, reason) of each image."""
    if not skipped:
        return table
    return table.replace_schema_metadata({SKIPPED: json.dumps(skipped, ensure_ascii=False).encode()})


def _skipped(schema: pa.Schema, path: Path) -> list[tuple[str, str]]:
    try:
        return [(str(id), str(reason)) for id, reason in json.loads((schema.metadata or {}).get(SKIPPED, b"[]"))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged (its note of skipped images: {error}); delete it and run again") from error


@dataclass(frozen=True)
class Store:
    """The records of a run folder."""

    root: Path

    def missing(self, cell: Cell, size: int) -> Iterator[range]:
        """Ranges of positions in the declared subset that have no file yet, cut at multiples of `size`."""
        total = len(cell.dataset.rows())
        have = np.zeros(total, dtype=bool)
        for first, last, _ in self._files(cell):
            have[first : last + 1] = True
        for start in range(0, total, size):
            stop = min(start + size, total)
            edges = np.flatnonzero(np.diff(have[start:stop].astype(int), prepend=1, append=1)) + start
            for first, end in zip(edges[::2], edges[1::2], strict=True):
                yield range(int(first), int(end))

    def write(self, cell: Cell, rows: range, table: pa.Table, cost: Mapping[str, object]) -> None:
        """Writes the rows of a range, whole or not at all, and beside them what they cost."""
        path = self.root / cell.folder / f"{rows.start:07d}-{rows.stop - 1:07d}.parquet"
        with atomic(path.with_suffix(".json")) as file:
            file.write(json.dumps(dict(cost), sort_keys=True).encode())
        with atomic(path) as file:
            # In one piece: the bytes must not tell how the rows were batched.
            pq.write_table(table.combine_chunks(), file, compression="zstd")

    def keep(self, cell: Cell, constants: Mapping[str, np.ndarray]) -> None:
        """Writes the arrays of a cell's checkpoint that figures need, beside its records; once."""
        path = self.root / cell.folder / CONSTANTS
        if constants and not path.exists():
            from safetensors.numpy import save

            with atomic(path) as file:
                file.write(save({name: np.ascontiguousarray(array) for name, array in constants.items()}))

    def read(self, cells: Iterable[Cell], whole: bool = False) -> Records:
        """All rows of one checkpoint on some datasets.

        Arguments:
            cells: Of one checkpoint in one bench.
            whole: Whether to read the columns too that the evaluator calls `heavy`; without it they are left in the
                files, for `Records.chunks`.

        Raises:
            ValueError: If a file is damaged, or two of them hold the same sample.
        """
        cells = tuple(cells)
        heavy = () if whole else cells[0].evaluator.heavy
        declared = tuple(cell.dataset.declared() for cell in cells)
        tables, pieces = [], []
        for cell in cells:
            for first, last, path in self._files(cell):
                table = _table(first, last, path, heavy)
                if len(table):
                    tables.append(table)
                    pieces.append(Piece(cell.dataset.name, len(table), partial(columns_of, path)))
        if not tables:
            return Records({}, declared, cells[0].seed)
        columns = from_table(pa.concat_tables(tables))
        constants = self._constants(cells)
        found = Records(columns, declared, cells[0].seed, constants, tuple(pieces) if heavy else ())
        if (row := found.repeated()) is not None:
            place = f"sample {columns['sample'][row]} of {columns['dataset'][row]}"
            raise ValueError(f"{self.root}: {place} is recorded twice; delete one of its files")
        return found

    def _constants(self, cells: Iterable[Cell]) -> dict[str, np.ndarray]:
        """What was kept of the checkpoint, which is the same beside all its cells."""
        found: dict[bytes, Path] = {}
        for cell in cells:
            folder = self._folder(cell)
            if folder and (path := folder / CONSTANTS).is_file():
                found.setdefault(path.read_bytes(), path)
        if len(found) > 1:
            one, other = list(found.values())[:2]
            raise ValueError(f"{one} and {other} should be equal and are not; delete the folders of both and run again")
        return {name: array for content, path in found.items() for name, array in _loaded(content, path).items()}

    def skipped(self, cell: Cell) -> list[tuple[str, str]]:
        """The images that could not be decoded and were left out of a cell: id and reason of each.

        Raises:
            ValueError: If a file is damaged.
        """
        found = []
        for _, _, path in self._files(cell):
            try:
                schema = pq.read_schema(path)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
            found += _skipped(schema, path)
        return found

    def costs(self, cell: Cell) -> list[dict[str, Any]]:
        """What each range of a cell cost, as it was written."""
        costs = []
        for first, last, path in self._files(cell):
            beside = path.with_suffix(".json")
            try:
                known = json.loads(beside.read_bytes()) if beside.exists() else {}
            except ValueError as error:
                raise ValueError(f"{beside} is damaged ({error}); delete it and run again") from error
            costs.append({"samples": last - first + 1, **known})
        return costs

    def _folder(self, cell: Cell) -> Path | None:
        """Where the files of a cell are; None for one without records."""
        return self.root / cell.folder

    def _files(self, cell: Cell) -> list[tuple[int, int, Path]]:
        found = []
        folder = self._folder(cell)
        for path in sorted(folder.glob("*.parquet")) if folder else ():
            first, _, last = path.stem.partition("-")
            if first.isdecimal() and last.isdecimal():
                found.append((int(first), int(last), path))
        return found


def _table(first: int, last: int, path: Path, heavy: Sequence[str] = ()) -> pa.Table:
    """The rows of a file, without the heavy columns."""
    try:
        with pq.ParquetFile(path) as file:  # not `read_table`, which makes a column of a folder called a=b
            light = [name for name in file.schema_arrow.names if name not in heavy] if heavy else None
            table = file.read(columns=light)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
    if len(table) + len(_skipped(table.schema, path)) != last - first + 1:
        raise ValueError(f"{path} is damaged (it holds {len(table)} samples); delete it and run again")
    return table.replace_schema_metadata(None)  # files that say different things of themselves are one table


def columns_of(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some columns of a file of records.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            return from_table(file.read(columns=list(names)))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error


def _loaded(content: bytes, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete the folder and run again") from error
