"""What evaluators leave behind: per-sample columns, and the metrics that are functions of them alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from math import nan, prod
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Shaped, UInt8

from robustbench_diffaug import reading, rng
from robustbench_diffaug.batch import Batch, Columns
from robustbench_diffaug.stats import Estimate

__all__ = ["INDEX", "Declared", "Metric", "Picture", "Piece", "Records", "from_table", "shared", "to_table"]

Better: TypeAlias = Literal["higher", "lower"]

INDEX = ("dataset", "origin", "group", "severity", "sample", "label", "image")
"""Columns that every record has; `image` is BLAKE2b-64 of the pixels that were evaluated."""


_NOWHERE = np.array([], dtype=np.intp)


@dataclass(frozen=True)
class Metric:
    """A figure with its interval.

    Arguments:
        name: 'accuracy/fog@s5', 'certified@0.50', ...
        group: What of the bench it is about.
        value: The figure; shares are fractions in [0, 1].
        low: Lower end of its interval; NaN for a count, which has none.
        high: Upper end.
        n: Samples (images, where one image counts several times) it rests on.
        n_available: Samples that the whole datasets have.
        complete: Whether all declared samples were measured; an image that was left out as damaged is one too few.
        better: Which way is better.
        unit: 'fraction', 'nats', 'pixels' (l2, of images in [0, 1]), 'count'.
        headline: Whether it belongs on the leaderboard.
    """

    name: str
    group: str
    value: float
    low: float = nan
    high: float = nan
    n: int = 0
    n_available: int = 0
    complete: bool = True
    better: Better = "higher"
    unit: str = "fraction"
    headline: bool = False


@dataclass(frozen=True)
class Declared:
    """A dataset that a bench declares.

    Arguments:
        name: Of the dataset.
        origin: The dataset whose images these are versions of; itself where they are nobody's.
        group: What metrics group by.
        severity: Of a corruption; 0 for none.
        n: Samples of the declared subset.
        n_available: Samples of the whole dataset.
        classes: How many classes its images can be of, where they are not all; 0 for all.
        class_space: Whether predictions are among those classes ('subset') or all ('full').
    """

    name: str
    origin: str
    group: str
    severity: int
    n: int
    n_available: int
    classes: int = 0
    class_space: str = "subset"


@dataclass(frozen=True, eq=False)
class Picture:
    """A grid of small pictures, or a drawing, made from records.

    Arguments:
        name: Of its file, without ending: letters, digits, hyphens and dots.
        title: What it shows, in a line.
        caption: How to read it.
        tiles: Rows and columns of pictures of 8 bits, with 1 or 3 channels; None where there is a drawing.
        down: What each row is; empty for none.
        across: What each column is; empty for none.
        svg: A drawing in place of tiles: an SVG document of ours, without scripts and references.
    """

    name: str
    title: str
    caption: str = ""
    tiles: UInt8[np.ndarray, "r k h w c"] | None = None
    down: tuple[str, ...] = ()
    across: tuple[str, ...] = ()
    svg: str = ""


class Piece(NamedTuple):
    """Some rows of a dataset, of which columns are still to be read.

    Arguments:
        dataset: Its name.
        rows: How many.
        read: The named columns of these rows.
    """

    dataset: str
    rows: int
    read: Callable[[Sequence[str]], Mapping[str, Shaped[np.ndarray, "n ..."]]]


class Span(NamedTuple):
    """Rows that follow each other, of one dataset.

    Arguments:
        dataset: Its name.
        start: The first row.
        stop: The one after the last.
    """

    dataset: str
    start: int
    stop: int


class _Some(Mapping[str, Shaped[np.ndarray, "n ..."]]):
    """Some rows of columns, each cut when it is asked for: few of them ever are.

    Arguments:
        columns: Of all rows.
        rows: Which; a slice where they follow each other, and then nothing is copied.
    """

    def __init__(
        self, columns: Mapping[str, Shaped[np.ndarray, "n ..."]], rows: slice | Shaped[np.ndarray, " m"]
    ) -> None:
        self._columns, self._rows = columns, rows
        self._held: dict[str, Shaped[np.ndarray, "n ..."]] = {}

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "n ..."]:
        if name not in self._held:
            self._held[name] = self._columns[name][self._rows]
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


@dataclass(frozen=True, eq=False)  # by identity: what follows from records is kept as long as they are
class Records:
    """Rows of one checkpoint on the datasets of a bench, sorted by dataset and position.

    Arguments:
        columns: `INDEX` and the evaluator's own, read-only, the sample on the first axis; not those left in files.
        declared: The datasets that there should be rows of.
        seed: The suite's, to key resampling.
        constants: Arrays of the checkpoint itself.
        pieces: Where the columns are that were left in files, in the order of the rows; empty where none were.
    """

    columns: Mapping[str, Shaped[np.ndarray, "n ..."]]
    declared: tuple[Declared, ...]
    seed: int = 0
    constants: Mapping[str, Shaped[np.ndarray, "..."]] = field(default_factory=dict)
    pieces: tuple[Piece, ...] = ()

    def __getitem__(self, column: str) -> Shaped[np.ndarray, "n ..."]:
        """A column."""
        return self.columns[column]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.columns["sample"]) if self.columns else 0

    def of(self, keep: Callable[[Declared], bool]) -> "Records":
        """The rows of the datasets that a predicate keeps."""
        declared = tuple(dataset for dataset in self.declared if keep(dataset))
        if not len(self):
            return replace(self, declared=declared)
        names = {dataset.name for dataset in declared}
        spans = [span for span in self.spans if span.dataset in names]
        together = all(one.stop == other.start for one, other in pairwise(spans))
        each = [np.arange(span.start, span.stop) for span in ([] if together and spans else spans)]
        cut = slice(spans[0].start, spans[-1].stop) if together and spans else np.concatenate([*each, _NOWHERE])
        pieces = tuple(piece for piece in self.pieces if piece.dataset in names)
        found = replace(self, columns=_Some(self.columns, cut), declared=declared, pieces=pieces)
        ends = np.cumsum([span.stop - span.start for span in spans]).tolist()
        moved = zip(spans, [0, *ends], ends, strict=False)
        # Where `cached_property` looks first.
        vars(found)["spans"] = tuple(Span(span.dataset, start, stop) for span, start, stop in moved)
        if "images" in vars(self):
            vars(found)["images"] = self.images[cut]
        return found

    def chunks(self, names: Sequence[str], size: int = 4096) -> Iterator[dict[str, Shaped[np.ndarray, "n ..."]]]:
        """The named columns from the first row to the last, some rows at a time; files are read when it is their turn.

        Arguments:
            names: Of columns, whether held or left in files.
            size: The most rows of a chunk, unless a file has more.
        """
        held = [name for name in names if name in self.columns]
        left = [name for name in names if name not in self.columns]
        start, waiting = 0, list[Piece]()
        pieces = self.pieces or tuple(Piece("", count, lambda _: {}) for count in _cut(len(self), size))
        for piece in (*pieces, None):
            count = sum(found.rows for found in waiting)
            if waiting and (piece is None or count + piece.rows > size):
                read = [found.read(left) for found in waiting] if left else []
                columns = {name: np.concatenate([part[name] for part in read]) for name in left}
                yield columns | {name: self.columns[name][start : start + count] for name in held}
                start, waiting = start + count, []
                reading.count(count)
            if piece is not None:
                waiting.append(piece)

    def group(self, *names: str) -> "Records":
        """The rows of the datasets of some groups."""
        return self.of(lambda dataset: dataset.group in names)

    def groups(self) -> Iterator[tuple[str, "Records"]]:
        """The rows of each group that has some, in the order of the datasets."""
        for name in dict.fromkeys(dataset.group for dataset in self.declared):
            if len(rows := self.group(name)):
                yield name, rows

    def take(self, rows: Int[np.ndarray, " m"]) -> "Records":
        """The held columns of the rows at some positions."""
        return replace(self, columns={name: column[rows] for name, column in self.columns.items()}, pieces=())

    def clusters(self) -> Shaped[np.ndarray, " n"]:
        """A name of the image behind each row: versions of one image are one cluster."""
        joined = np.char.add(self.columns["origin"], "\x1f")
        names: np.ndarray = np.char.add(joined, self.columns["sample"])
        return names

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Which rows are of which dataset."""
        column = self.columns["dataset"]
        starts = [0, *(np.flatnonzero(column[1:] != column[:-1]) + 1).tolist()]
        ends = [*starts[1:], len(column)]
        return tuple(Span(str(column[start]), start, stop) for start, stop in zip(starts, ends, strict=True) if stop)

    @cached_property
    def datasets(self) -> tuple[tuple[str, ...], Int[np.ndarray, " n"]]:
        """The names of datasets that there are rows of, and the number of that of each row."""
        names = tuple(dict.fromkeys(span.dataset for span in self.spans))
        numbers = {name: number for number, name in enumerate(names)}
        each = [numbers[span.dataset] for span in self.spans]
        return names, np.repeat(np.array(each, dtype=np.intp), [span.stop - span.start for span in self.spans])

    @cached_property
    def _samples(self) -> tuple[tuple[str, ...], Int[np.ndarray, " n"]]:
        """The names of samples, and the number of that of each row."""
        return _numbered(self.columns["sample"])

    @cached_property
    def images(self) -> Int[np.ndarray, " n"]:
        """A number of the image behind each row, in the order of the names that `clusters` gives."""
        (origins, from_), (samples, which) = _numbered(self.columns["origin"]), self._samples
        pairs, places = np.unique(from_ * len(samples) + which, return_inverse=True)
        names = [f"{origins[pair // len(samples)]}\x1f{samples[pair % len(samples)]}" for pair in pairs.tolist()]
        order = np.empty(len(names), dtype=np.intp)
        order[np.argsort(np.array(names, dtype=np.str_))] = np.arange(len(names))
        found: np.ndarray = order[places]
        return found

    def repeated(self) -> int | None:
        """A row whose sample and dataset another has too; None where there is none."""
        names, which = self._samples
        places = self.datasets[1] * len(names) + which
        order = np.argsort(places, kind="stable")
        twice = np.flatnonzero(np.diff(places[order]) == 0)
        return int(order[twice[0] + 1]) if len(twice) else None

    def key(self, *parts: object) -> int:
        """The stream for resampling these rows, the same for every checkpoint."""
        return rng.key(self.seed, "bootstrap", *(dataset.name for dataset in self.declared), *parts)

    def metric(
        self,
        name: str,
        group: str,
        estimate: Estimate,
        better: Better = "higher",
        unit: str = "fraction",
        headline: bool = False,
    ) -> Metric:
        """A metric of these rows, with how many there are, could be and should be."""
        origins = {dataset.origin: dataset.n_available for dataset in self.declared}  # a version of an image is no more
        complete = len(self) == sum(dataset.n for dataset in self.declared)
        return Metric(name, group, *estimate, sum(origins.values()), complete, better, unit, headline)


def shared(one: Records, other: Records) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """Where the samples stand that both have, in the order of the first."""
    mine, others = (np.char.add(np.char.add(each["dataset"], "\x1f"), each["sample"]) for each in (one, other))
    _, first, second = np.intersect1d(mine, others, return_indices=True)
    order = np.argsort(first, kind="stable")
    return first[order], second[order]


def _numbered(column: Shaped[np.ndarray, " n"]) -> tuple[tuple[str, ...], Int[np.ndarray, " n"]]:
    """The distinct texts of a column, and the number of that of each row."""
    starts = np.concatenate([[0], np.flatnonzero(column[1:] != column[:-1]) + 1]) if len(column) else _NOWHERE
    if len(starts) < len(column):  # of rows that follow each other one is enough
        names, which = _numbered(column[starts])
        return names, np.repeat(which, np.diff([*starts.tolist(), len(column)]))
    found = pa.array(column.tolist(), pa.string()).dictionary_encode()
    return tuple(found.dictionary.to_pylist()), found.indices.to_numpy(zero_copy_only=False).astype(np.intp)


def _texts(column: pa.StringArray) -> Shaped[np.ndarray, " n"]:
    """A column of texts; quickly where they are ASCII and of one length, or there are few of them."""
    _, offsets, content = column.buffers()
    if len(column) and offsets is not None and content is not None and not column.null_count:
        ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
        length = int(ends[1] - ends[0])
        if length and (np.diff(ends) == length).all():
            found = np.frombuffer(content, np.uint8)[ends[0] : ends[-1]]
            if found.min() and found.max() < 128:
                return found.astype(np.uint32).view(f"U{length}")
    words = column.dictionary_encode()
    which = words.indices.to_numpy(zero_copy_only=False)
    return np.asarray(np.array(words.dictionary.to_pylist(), dtype=np.str_)[which])


def _cut(count: int, size: int) -> Iterator[int]:
    """How many of `count` rows are in each piece of `size`."""
    return (min(size, count - start) for start in range(0, count, size))


def to_table(batch: Batch, declared: Declared, columns: Columns) -> pa.Table:
    """The rows of one batch of a dataset.

    Raises:
        ValueError: If a column has not one row per sample, or the name of one that every record has.
    """
    count = len(batch.ids)
    pixels = [blake2b(image.numpy().tobytes(), digest_size=8).hexdigest() for image in batch.images.cpu().contiguous()]
    arrays: dict[str, pa.Array] = {
        "dataset": pa.array([batch.dataset] * count, pa.string()),
        "origin": pa.array([declared.origin] * count, pa.string()),
        "group": pa.array([declared.group] * count, pa.string()),
        "severity": pa.array([declared.severity] * count, pa.int8()),
        "sample": pa.array(list(batch.ids), pa.string()),
        "label": pa.array(batch.labels.cpu().numpy(), pa.int32()),
        "image": pa.array(pixels, pa.string()),
    }
    fields = [pa.field(name, array.type) for name, array in arrays.items()]
    for name, column in columns.items():
        if name in INDEX:
            raise ValueError(f"column {name} is one that every record has; give it another name")
        values = column.detach().cpu().contiguous().numpy()
        if len(values) != count:
            raise ValueError(f"column {name} has {len(values)} rows for {count} samples")
        flat = pa.array(values.reshape(-1))
        size = prod(values.shape[1:])
        arrays[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, size)
        shape = "x".join(map(str, values.shape[1:]))
        fields.append(pa.field(name, arrays[name].type, metadata={"shape": shape} if shape else None))
    return pa.Table.from_arrays(list(arrays.values()), schema=pa.schema(fields))


def from_table(table: pa.Table) -> dict[str, Shaped[np.ndarray, "n ..."]]:
    """The columns of a table as read-only arrays."""
    columns = {}
    for entry in table.schema:
        column = table[entry.name].combine_chunks()
        if pa.types.is_fixed_size_list(entry.type):
            shape = tuple(map(int, (entry.metadata or {})[b"shape"].split(b"x")))
            array = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), *shape)
        elif pa.types.is_string(entry.type):
            array = _texts(column)
        else:
            array = column.to_numpy(zero_copy_only=False)
        array = array.view()
        array.setflags(write=False)
        columns[entry.name] = array
    return columns
