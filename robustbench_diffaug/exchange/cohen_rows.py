r"""A file of certificates as the code of Cohen et al. leaves it, and that of DDS: a row for each image, tabs between.

`idx label predict radius correct time`: the image's position, its class, the class that is certified (-1 where it
abstains), the l2 radius in [0, 1] pixel units, whether the class is right, and how long it took. The file says neither
the noise level nor the draws nor alpha, and its radii are printed with three significant digits, the last one rounded.

References:
    Certified Adversarial Robustness via Randomized Smoothing (Cohen et al., 2019),
        https://arxiv.org/abs/1902.02918; code: https://github.com/locuslab/smoothing
    (Certified!!) Adversarial Robustness for Free! (Carlini et al., 2022), https://arxiv.org/abs/2206.10550; code:
        https://github.com/ethz-spylab/diffusion_denoised_smoothing
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from robustbench_diffaug.evaluators.certificates import reach
from robustbench_diffaug.exchange import folder

__all__ = ["COLUMNS", "MOST_DRAWS", "Protocol", "Rows", "read"]

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
LARGEST = 2**23  # bytes; a row has some 40, ImageNet's validation set 50,000 rows
MOST_DRAWS = 10**9
FARTHEST = 1000  # images of 3 x 512 x 512 in [0, 1] are at most 887 apart
DIGITS = 3  # significant ones that certify.py prints of a radius
WHOLE = re.compile("[0-9]{1,9}")
CLASS = re.compile("-1|[0-9]{1,9}")
NUMBER = re.compile(r"[0-9]{1,20}(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?")
CLOCK = re.compile(r"([0-9]{1,4} days?, )?[0-9]{1,2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?")
SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,20})?")


@dataclass(frozen=True)
class Protocol:
    """How certificates were made, which their file does not say.

    Arguments:
        sigma: The noise level, in [0, 1] pixel units, above 0.
        n: Draws that estimate the probability, at least 1; None stands for 100,000, the default of certify.py.
        alpha: The probability that a certificate is wrong, in ]0, 1/2[; None stands for 0.001, its default.
        n0: Draws that select the class, at least 1; None stands for 100, its default. No radius depends on it.

    Raises:
        ValueError: If one is out of its range.
    """

    sigma: float
    n: int | None = None
    alpha: float | None = None
    n0: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not (isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"--sigma {self.sigma:g}: needed is the noise level, above 0, as 0.25")
        if not 0 < self.risk < 0.5:
            raise ValueError(f"--alpha {self.risk:g}: needed is a probability of failure above 0 and below 0.5")
        for name, count in (("n", self.draws), ("n0", 1 if self.n0 is None else self.n0)):
            if not 1 <= count <= MOST_DRAWS:
                raise ValueError(f"--{name} {count}: needed is a number of draws, 1 to {MOST_DRAWS:,}")

    @property
    def draws(self) -> int:
        """What n is taken to be."""
        return 100_000 if self.n is None else self.n

    @property
    def risk(self) -> float:
        """What alpha is taken to be."""
        return 0.001 if self.alpha is None else self.alpha

    @property
    def ceiling(self) -> float:
        """The radius of unanimous votes, `sigma * Phi^-1(alpha^(1/n))`; 0 where even they prove nothing."""
        return reach(self.draws, self.sigma, self.risk)

    @property
    def stated(self) -> dict[str, object]:
        """All values, and the names of those that are assumed."""
        values = {"sigma": self.sigma, "n0": 100 if self.n0 is None else self.n0, "n": self.draws, "alpha": self.risk}
        return values | {"assumed": [name for name in ("n0", "n", "alpha") if getattr(self, name) is None]}


class Rows(NamedTuple):
    """The rows of a file, in its order.

    Arguments:
        line: Of the file, from 1.
        idx: The image's position in its dataset.
        label: Its class.
        predict: The class certified, -1 where it abstains.
        radius: As printed.
        below: The least number that prints so where the last digit is rounded to the nearest.
        above: The largest one: half a unit of the last digit above the radius where they are printed as certify.py has
            it, with three significant digits; elsewhere a unit, since they may have been rounded down.
        correct: The column as it is.
        clock: Whether the time is h:mm:ss, and not seconds.
    """

    line: Int[np.ndarray, " n"]
    idx: Int[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]
    predict: Int[np.ndarray, " n"]
    radius: Float[np.ndarray, " n"]
    below: Float[np.ndarray, " n"]
    above: Float[np.ndarray, " n"]
    correct: Int[np.ndarray, " n"]
    clock: Bool[np.ndarray, " n"]

    @property
    def right(self) -> Bool[np.ndarray, " n"]:
        """Whether the class is right, whatever the column says: DDS writes a running total there."""
        return np.asarray(self.predict == self.label)


def read(path: Path) -> Rows:
    """The certificates of a file.

    Raises:
        ValueError: If it is no such file; the message names the line.
    """
    found = folder.text(path, LARGEST, "a file of certificates", "the path of what certify.py wrote")
    head, *body = (line.removesuffix("\r") for line in found.split("\n"))
    if tuple(head.split("\t")) != COLUMNS:
        raise ValueError(f"{path}:1: the header is {head[:80]!r}; needed is {' '.join(COLUMNS)}, with tabs between")
    rows = [(number, *_row(f"{path}:{number}", line)) for number, line in enumerate(body, 2) if line]
    if not rows:
        raise ValueError(f"{path}: there is no row below the header")
    line, idx, label, predict, radii, correct, clock = zip(*rows, strict=True)
    radius, below, above = _bounds(radii)
    whole = [np.array(column, dtype=np.int64) for column in (line, idx, label, predict)]
    return Rows(whole[0], whole[1], whole[2], whole[3], radius, below, above, np.array(correct), np.array(clock))


def _row(place: str, line: str) -> tuple[int, int, int, Decimal, int, bool]:
    """The values of a line, without its number."""
    cells = line.split("\t")
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{place}: there are {len(cells)} cells with tabs between, and needed are {len(COLUMNS)}")
    idx, label, predict, radius, correct, time = cells
    for name, cell in (("idx", idx), ("label", label), ("correct", correct)):
        if not WHOLE.fullmatch(cell):
            raise ValueError(f"{place}: {name} is {cell[:40]!r}; needed is a whole number of at least 0")
    if not CLASS.fullmatch(predict):
        raise ValueError(f"{place}: predict is {predict[:40]!r}; needed is a class, or -1 for none")
    if not NUMBER.fullmatch(radius) or Decimal(radius) > Decimal(FARTHEST):
        raise ValueError(f"{place}: radius is {radius[:40]!r}; needed is a number in [0, {FARTHEST:g}]")
    if not (clock := bool(CLOCK.fullmatch(time))) and not SECONDS.fullmatch(time):
        raise ValueError(f"{place}: time is {time[:40]!r}; needed is h:mm:ss or seconds")
    return int(idx), int(label), int(predict), Decimal(radius), int(correct), clock


def _bounds(radii: Sequence[Decimal]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The radii of a file, and the least and the largest number that each of them may have been printed for.

    Where all have the same number of decimals, three or more, so many were printed. Else there are three significant
    digits, of which zeros at the end are not printed, or more where more are seen.
    """
    exponents = [int(radius.as_tuple().exponent) for radius in radii]
    fixed = len(set(exponents)) == 1 and exponents[0] <= -DIGITS
    thirds = [radius.adjusted() - DIGITS + 1 for radius in radii]
    lasts = exponents if fixed else [min(pair) for pair in zip(thirds, exponents, strict=True)]
    nearest = not fixed and lasts == thirds  # as certify.py has it; others may have rounded down
    below, above = [], []
    for radius, last in zip(radii, lasts, strict=True):
        unit = Decimal(1).scaleb(last) if radius else Decimal(0)
        finer = not fixed and radius == Decimal(1).scaleb(last + DIGITS - 1)  # what comes before 1.00 is 0.999
        below.append(radius - unit / (20 if finer else 2))
        above.append(radius + unit / (2 if nearest else 1))
    return np.array(radii, dtype=np.float64), np.array(below, dtype=np.float64), np.array(above, dtype=np.float64)
