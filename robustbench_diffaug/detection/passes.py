"""Passes over recorded rows: what is there, sums by class, and a percentile of all features, in bounded memory.

Sums are float64, in the order of the rows: another cut into chunks changes a score by rounding alone, below 1e-9 of it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from robustbench_diffaug.detection.rows import Chunks, Rows, Source

__all__ = ["ClassMeans", "Head", "Unsuited", "add_rows", "chunks_of", "class_means", "features_of", "head_of"]
__all__ += ["percentile", "percents", "whole"]

Floats: TypeAlias = NDArray[np.float64]


class Unsuited(ValueError):
    """A value of a hyper-parameter that these arrays do not admit, where others may do."""


class Head(NamedTuple):
    """The last layer of a network.

    Arguments:
        weight: Of shape (k, d).
        bias: Of shape (k,).
    """

    weight: Floats
    bias: Floats

    def logits(self, features: Floats) -> Floats:
        """What the layer makes of features of shape (n, d): features weight^T + bias, of shape (n, k)."""
        return features @ self.weight.T + self.bias


class ClassMeans(NamedTuple):
    """The mean feature of each class.

    Arguments:
        means: Of shape (k, d).
        counts: How many rows each is of, of shape (k,).
    """

    means: Floats
    counts: NDArray[np.int64]


def chunks_of(source: Source, role: Literal["fit", "val"], name: str) -> Chunks:
    """The rows that the score of this name is fitted to.

    Raises:
        ValueError: There are none.
    """
    chunks = source.fit if role == "fit" else source.val
    if chunks is None or not any(len(rows.logits) for rows in chunks()):
        raise ValueError(f"{name} is fitted to images, and there are none: add a dataset of group {role!r}")
    return chunks


def head_of(source: Source, name: str) -> Head:
    """The last layer, in float64.

    Raises:
        ValueError: It is not known.
    """
    if source.weight is None or source.bias is None:
        raise ValueError(f"{name} needs the weight and bias of the last layer, which were not recorded: leave it out")
    return Head(source.weight.astype(np.float64), source.bias.astype(np.float64))


def features_of(rows: Rows, name: str, width: int | None = None) -> Floats:
    """The features in float64, of shape (n, d); `width` is the d that is needed, if it is known.

    Raises:
        ValueError: They were not recorded, or are of another width.
    """
    if rows.features is None:
        raise ValueError(f"{name} needs the input of the last layer, which was not recorded: name the layer's input")
    if width is not None and rows.features.shape[1] != width:
        raise ValueError(f"{name}: features have {rows.features.shape[1]} entries, and {width} were expected")
    return rows.features.astype(np.float64)


def whole(value: float, name: str, parameter: str) -> int:
    """The value as a count, at least 1.

    Raises:
        ValueError: It is not a whole number, or less than 1.
    """
    if value < 1 or value != int(value):
        raise ValueError(f"{name}: {parameter} is {value:g}; it is a whole number, at least 1")
    return int(value)


def percents(value: float, name: str, parameter: str) -> float:
    """The value, found to lie in [0, 100].

    Raises:
        ValueError: It does not.
    """
    if not 0 <= value <= 100:
        raise ValueError(f"{name}: {parameter} is {value:g}; it is a percentage, from 0 to 100")
    return value


def add_rows(totals: Floats, labels: NDArray[np.integer[Any]], values: NDArray[np.floating[Any]]) -> None:
    """Adds each row of `values`, of shape (n, d), to the row of `totals`, of shape (k, d), that its label names."""
    index = torch.tensor(labels, dtype=torch.int64)  # copies, since recorded arrays may be read-only
    torch.from_numpy(totals).index_add_(0, index, torch.tensor(values, dtype=torch.float64))


def class_means(
    chunks: Chunks, name: str, chosen: Callable[[Rows], NDArray[np.bool_]] | None = None, which: str = ""
) -> ClassMeans:
    """The mean feature of each class the network knows.

    Arguments:
        chunks: Labelled rows.
        name: Of the score, for messages.
        chosen: Which rows count, of shape (n,); all without it.
        which: What these rows are, for messages.

    Raises:
        ValueError: A label is none of the network's classes, or a class has no row.
    """
    totals: Floats = np.zeros((0, 0))
    counts = np.zeros(0, np.int64)
    for rows in chunks():
        classes = rows.logits.shape[1]
        features = features_of(rows, name)
        if not totals.size:
            totals, counts = np.zeros((classes, features.shape[1])), np.zeros(classes, np.int64)
        for label in rows.labels[(rows.labels < 0) | (rows.labels >= classes)]:
            raise ValueError(f"{name}: a fit image has label {label}; the network's classes are 0 to {classes - 1}")
        keep = np.ones(len(rows.labels), np.bool_) if chosen is None else chosen(rows)
        add_rows(totals, rows.labels[keep], features[keep])
        counts += np.bincount(rows.labels[keep], minlength=classes)
    missing = np.flatnonzero(counts == 0)
    if len(missing):
        raise ValueError(
            f"{name} needs {which}fit images of all {len(counts)} classes, and class {missing[0]} has none "
            f"({len(missing)} such classes): add them to the dataset of group 'fit', or leave {name} out"
        )
    return ClassMeans(totals / counts[:, None], counts)


def percentile(chunks: Chunks, percent: float, name: str) -> float:
    """A percentile of all entries of all features, exact, by two passes that count.

    With the N entries in order, it stands at (N - 1) percent / 100, between neighbours by linear interpolation. The
    first pass counts by the upper half of the bits of a float32, the second by the lower half of those in question.

    Arguments:
        chunks: Rows with features.
        percent: In [0, 100].
        name: Of the score, for messages.
    """
    upper = np.zeros(2**16, np.int64)
    for rows in chunks():
        upper += np.bincount(_ordered(rows, name) >> 16, minlength=2**16)
    ends = np.cumsum(upper)
    place = (ends[-1] - 1) * (percent / 100)
    ranks = int(place), min(int(place) + 1, int(ends[-1]) - 1)
    bins = [int(np.searchsorted(ends, rank, "right")) for rank in ranks]
    lower = {bin: np.zeros(2**16, np.int64) for bin in bins}
    for rows in chunks():
        keys = _ordered(rows, name)
        for bin, counts in lower.items():
            counts += np.bincount(keys[keys >> 16 == bin] & 0xFFFF, minlength=2**16)
    below, above = (
        _float((bin << 16) + int(np.searchsorted(np.cumsum(lower[bin]), rank - ends[bin] + upper[bin], "right")))
        for bin, rank in zip(bins, ranks, strict=True)
    )
    found: float = below + (above - below) * (place - int(place))
    return found


def _ordered(rows: Rows, name: str) -> NDArray[np.uint32]:
    """The features as integers of the same order: bits of positive numbers grow with them, of negative ones fall."""
    bits = features_of(rows, name).astype(np.float32).ravel().view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _float(key: int) -> float:
    """The float32 whose integer of `_ordered` this is."""
    bits = np.uint32(key & 0x7FFFFFFF if key >> 31 else key ^ 0xFFFFFFFF)
    return float(bits.view(np.float32))
