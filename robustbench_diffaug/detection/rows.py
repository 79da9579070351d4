"""What out-of-distribution scores are functions of: recorded logits and features, read in chunks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Chunks", "Need", "Rows", "Score", "Scorer", "Source"]

Floats: TypeAlias = NDArray[Any]  # float32 as recorded, or float64


class Rows(NamedTuple):
    """Some images as a network saw them.

    Arguments:
        logits: Of shape (n, k), float32.
        features: The input of the last layer, of shape (n, d), float32; None where they were not recorded.
        labels: Classes, of shape (n,); -1 for none.
    """

    logits: Floats
    features: Floats | None
    labels: NDArray[np.integer[Any]]


Chunks: TypeAlias = Callable[[], Iterator[Rows]]
"""Reads the rows of a role from the start, in chunks of bounded size; may be called again."""

Scorer: TypeAlias = Callable[[Rows], NDArray[np.float64]]
"""One number for each row, higher for what looks in-distribution."""

Need: TypeAlias = Literal["features", "head", "fit", "val"]


@dataclass(frozen=True)
class Source:
    """What a score may be fitted to.

    Arguments:
        fit: Labelled training images, if there are any.
        val: Labelled in-distribution images for validation, if there are any.
        weight: Of the last layer, of shape (k, d), if it is known.
        bias: Of shape (k,).
        key: The stream of any subsampling.
    """

    fit: Chunks | None = None
    val: Chunks | None = None
    weight: Floats | None = None
    bias: Floats | None = None
    key: int = 0


@dataclass(frozen=True)
class Score:
    """A way to tell in-distribution images from others.

    Arguments:
        name: As suites and metrics name it.
        fit: Makes the scorer, given a source and a value of the swept parameter (None where there is none).
        needs: What of a source and of rows it reads.
        parameter: The name of the hyper-parameter that validation may choose; empty where there is none.
        default: Its value without validation.
        sweep: The values that validation chooses among, in order: the first of equals is taken.
        nonnegative: Whether it presumes features that are not negative, as after a ReLU.
    """

    name: str
    fit: Callable[[Source, float | None], Scorer]
    needs: frozenset[Need] = frozenset()
    parameter: str = ""
    default: float | None = None
    sweep: tuple[float, ...] = ()
    nonnegative: bool = False
