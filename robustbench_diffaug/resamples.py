"""Resamples of clusters, and sums over them that are the same on every machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["draws", "remembering", "sums_of_draws"]

Floats = NDArray[np.float64]

BLOCK = 1 << 18  # cluster indices drawn at once: 2 MB an array, which stays in cache; no result depends on it
KEPT = 1 << 29  # bytes of resamples that are remembered


def draws(key: int, clusters: int, resamples: int, level: float) -> Iterator[NDArray[np.intp]]:
    """Blocks of resamples: cluster indices, of shape (resamples in the block, clusters).

    Arguments:
        key: The stream; resample r is draw r of it.
        clusters: How many there are, and are drawn.
        resamples: How many.
        level: Of the interval that there must be enough of them for.

    Raises:
        ValueError: If there are not.
    """
    from robustbench_diffaug.rng import uniform  # loads torch, which proportions and certificates do without

    if not 0 < level < 1 or (resamples + 1) * (1 - level) / 2 < 1 - 1e-9:
        raise ValueError(f"{resamples} resamples have no interval at {level=}: take 1000, and a level in ]0, 1[")
    step = max(1, BLOCK // clusters)
    for start in range(0, resamples, step):
        numbers = range(start, min(start + step, resamples))
        # A uniform is at most 1 - 2**-53, so its product with the number of clusters never rounds up to it.
        yield (uniform(key, numbers, (clusters,)) * clusters).astype(np.intp)


Blocks = list[NDArray[np.unsignedinteger[Any]]]


@dataclass
class _Memory:
    """How often each resample has drawn each cluster, by the stream and the sizes, and how many bytes these are."""

    blocks: dict[tuple[int, int, int], Blocks] = field(default_factory=dict)
    held: int = 0


_memory: ContextVar[_Memory | None] = ContextVar("memory", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Within it the resamples of a stream are drawn once, as far as `KEPT` goes; no result depends on it.

    Checkpoints that saw the same images share their streams, and drawing takes longer than what follows.
    """
    token = _memory.set(_Memory())
    try:
        yield
    finally:
        _memory.reset(token)


def _counted(key: int, clusters: int, resamples: int, level: float) -> Iterator[NDArray[Any]]:
    """Blocks of resamples: how often each has drawn each cluster, of shape (resamples in the block, clusters)."""
    memory, place = _memory.get(), (key, clusters, resamples)
    if memory is not None and place in memory.blocks:
        yield from memory.blocks[place]
        return
    made: Blocks = []
    room = memory is not None and memory.held + clusters * resamples <= KEPT
    for drawn in draws(key, clusters, resamples, level):
        starts = np.arange(len(drawn))[:, None] * clusters
        counts = np.bincount((drawn + starts).ravel(), minlength=drawn.size).reshape(drawn.shape)
        small = counts.astype(np.min_scalar_type(counts.max()))
        made += [small] if room else []
        yield small
    if memory is not None and room:
        memory.blocks[place] = made
        memory.held += sum(block.nbytes for block in made)


def sums_of_draws(key: int, columns: Floats, resamples: int, level: float, fine: bool = True) -> Floats:
    """The sums of columns over the clusters of each resample, of shape (resamples, columns).

    Numbers are split into a coarse and a fine part, multiples of powers of two such that no sum of either is rounded.
    So the result, which is the true sum to its last digits, does not depend on the order of additions, and thereby not
    on the machine or the number of threads.

    Arguments:
        key: The stream.
        columns: Of each cluster, of shape (clusters, columns).
        resamples: How many.
        level: As of `draws`.
        fine: Whether there is a fine part; without it sums are right to about n 2^-53 of the largest there could be.
    """
    clusters, width = columns.shape
    parts, steps = _multiples(columns)
    rest, small = _multiples(columns - parts * steps) if fine else (parts[:, :0], steps[:0])
    if rest.any():
        parts = np.concatenate([parts, rest], axis=1)
    # Whole numbers of which no sum reaches 2^24 are exact in half the bytes, and twice as fast.
    short = bool((clusters * np.abs(columns).max(axis=0) < 2**24).all() and (columns == np.rint(columns)).all())
    blocks = _counted(key, clusters, resamples, level)
    if short:
        factors = columns.astype(np.float32)
        return np.concatenate([block.astype(np.float32) @ factors for block in blocks]).astype(np.float64)
    sums = np.concatenate([block.astype(np.float64) @ parts for block in blocks])
    return sums[:, :width] * steps + (sums[:, width:] * small if sums.shape[1] > width else 0)


def _multiples(columns: Floats) -> tuple[Floats, Floats]:
    """Columns in whole steps, and the step of each: with as many summands as rows, no sum of steps reaches 2^53."""
    most = np.frexp(len(columns) * np.abs(columns).max(axis=0))[1]
    steps = np.ldexp(1.0, np.maximum(most, -900) - 52)  # of what is smaller than that, nothing is left
    return np.rint(columns / steps), steps
