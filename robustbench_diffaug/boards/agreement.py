"""Whether two runs that recorded the same samples recorded the same: images of a bench, and answers of one network."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped

from robustbench_diffaug.protocols import told
from robustbench_diffaug.records import INDEX, Records, shared
from robustbench_diffaug.verify.recheck import CLASSES, DRAWS, FLOATS, LEVELS, VOTES

__all__ = ["Agreement", "agreement"]


class Agreement(NamedTuple):
    """How the records of a network in two runs compare.

    Arguments:
        wrong: What differs by more than it may; nothing if they agree.
        said: What differs within that; nothing where they are equal.
    """

    wrong: str = ""
    said: str = ""


def agreement(one: Records, other: Records) -> Agreement:
    """Whether two runs of one network agree on the samples that both have.

    Allowed is what `rdiff verify --recheck` allows on other hardware: floats may differ by `FLOATS`, votes of a sample
    by `DRAWS` of them (at least one), and `CLASSES` of the other whole numbers (at least one) may be others.
    """
    rows = shared(one, other)
    if sorted(one.columns) != sorted(other.columns):
        return Agreement("the columns")
    moved: list[str] = []
    for name in one.columns:
        mine, theirs = one[name][rows[0]], other[name][rows[1]]
        if mine.shape[1:] != theirs.shape[1:] or mine.dtype.kind != theirs.dtype.kind:
            return Agreement(f"the form of {name}")
        odd = _differs(mine, theirs)
        if not odd.any():
            continue
        if (bad := _too_far(name, mine, theirs)).any():
            return Agreement(told(name, bad, one, rows[0]))
        moved.append(f"{name} of {odd.sum():,}")
    return Agreement(said=f"{', '.join(moved)} of {len(rows[0]):,} samples" if moved else "")


def _differs(mine: Shaped[np.ndarray, "n ..."], theirs: Shaped[np.ndarray, "n ..."]) -> Bool[np.ndarray, " n"]:
    """The samples of which a column is not equal."""
    if mine.dtype.kind == "f":
        return _any((mine != theirs) & ~(np.isnan(mine) & np.isnan(theirs)))
    return _any(mine != theirs)


def _any(odd: Bool[np.ndarray, "n ..."]) -> Bool[np.ndarray, " n"]:
    """The samples of which any number is odd."""
    found: np.ndarray = np.logical_or.reduce(odd.reshape(len(odd), -1), axis=1)
    return found


def _too_far(
    name: str, mine: Shaped[np.ndarray, "n ..."], theirs: Shaped[np.ndarray, "n ..."]
) -> Bool[np.ndarray, " n"]:
    """The samples of which a column differs by more than it may; all that differ where only so many may."""
    if name in INDEX or mine.dtype.kind not in "iubf":
        return _differs(mine, theirs)
    if mine.dtype.kind == "f":
        return _any(~np.isclose(mine, theirs, rtol=0, atol=FLOATS, equal_nan=True))
    gap = np.abs(mine.astype(np.int64) - theirs)
    if name in VOTES and mine.ndim == 3:
        return _any(gap.sum(axis=2) / 2 > np.maximum(1, np.floor(DRAWS * mine.astype(np.int64).sum(axis=2))))
    if mine.dtype == np.uint8:
        return _any(gap > LEVELS)
    few = np.count_nonzero(gap) <= max(1, CLASSES * gap.size)
    return np.zeros(len(mine), dtype=bool) if few else _any(gap > 0)
