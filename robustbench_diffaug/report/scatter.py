"""A small chart of two measures of all checkpoints, drawn once, in which the card of each marks one point."""

from collections.abc import Sequence
from html import escape
from math import floor, isfinite, log10
from typing import NamedTuple

__all__ = ["Point", "Scatter"]

WIDE, HIGH = 232, 150
LEFT, RIGHT, TOP, BOTTOM = 34, 8, 8, 20  # room for the numbers of the axes
TICKS = 4


class Point(NamedTuple):
    """Two measures of a checkpoint, with the ends of their intervals; NaN where there is none."""

    x: float
    y: float
    across: tuple[float, float]
    up: tuple[float, float]


class _Scale(NamedTuple):
    """Where numbers are along an axis."""

    least: float
    most: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.least) / (self.most - self.least)
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """What an axis spans: the values, their intervals, and a little more."""
    finite = [value for value in values if isfinite(value)]
    least, most = min(finite, default=0.0), max(finite, default=1.0)
    room = 0.06 * (most - least) or abs(most) * 0.06 or 1.0
    return least - room, most + room


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers within a range, at most TICKS of them."""
    rough = (most - least) / TICKS
    unit = 10.0 ** floor(log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = -int(-least // step)
    return [step * number for number in range(first, first + TICKS + 1) if least <= step * number <= most]


class Scatter:
    """A chart of points.

    Arguments:
        points: Those of all checkpoints, at least one; both measures are finite.
        scale: What the measures are multiplied by for the numbers at the axes, across and up: 100 for percent.
        prefix: The id of the drawing, unique in the page: letters, digits and hyphens.
    """

    def __init__(self, points: Sequence[Point], scale: tuple[float, float], prefix: str) -> None:
        self.prefix, self.scale, self.points = prefix, scale, points
        self.across = _Scale(*_ends([end for p in points for end in (p.x, *p.across)]), LEFT, WIDE - RIGHT)
        self.up = _Scale(*_ends([end for p in points for end in (p.y, *p.up)]), HIGH - BOTTOM, TOP)

    @property
    def symbol(self) -> str:
        """The axes and all points, as a symbol that each card uses."""
        frame = f'<path class="frame" d="M{LEFT} {TOP}V{HIGH - BOTTOM}H{WIDE - RIGHT}"/>'
        dots = "".join(f'<circle cx="{self.across(p.x)}" cy="{self.up(p.y)}" r="3"/>' for p in self.points)
        return f'<symbol id="{self.prefix}">{frame}{self._numbers()}{dots}</symbol>'

    def _numbers(self) -> str:
        """The numbers at the axes."""
        made = []
        for axis, scale, level in ((self.across, self.scale[0], True), (self.up, self.scale[1], False)):
            for tick in _ticks(axis.least * scale, axis.most * scale):
                at = axis(tick / scale)
                text = f"{tick:.6g}".replace("-", "−")
                made.append(
                    f'<path class="frame" d="M{at} {HIGH - BOTTOM}v3"/><text x="{at}" y="{HIGH - 6}">{text}</text>'
                    if level
                    else f'<path class="frame" d="M{LEFT} {at}h-3"/>'
                    f'<text class="up" x="{LEFT - 6}" y="{round(at + 3, 1)}">{text}</text>'
                )
        return "".join(made)

    def marking(self, point: Point, number: int, title: str, description: str) -> str:
        """The chart with one point marked, and its intervals.

        Arguments:
            point: Which.
            number: Of the card; it makes ids unique.
            title: What the chart shows, for screen readers; any text.
            description: What is to be seen in it.
        """
        x, y = self.across(point.x), self.up(point.y)
        lines = ""
        if all(map(isfinite, point.across)):
            lines += f"M{self.across(point.across[0])} {y}H{self.across(point.across[1])}"
        if all(map(isfinite, point.up)):
            lines += f"M{x} {self.up(point.up[0])}V{self.up(point.up[1])}"
        cross = f'<path class="ends" d="{lines}"/>' if lines else ""
        name = f"{self.prefix}-{number}"
        told = f'<title id="{name}">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
        return (
            f'<svg class="scatter" viewBox="0 0 {WIDE} {HIGH}" role="img" aria-labelledby="{name} {name}-d">'
            f'{told}<use href="#{self.prefix}"/>'
            f'{cross}<path class="this" d="M{x} {round(y - 6, 1)}l6 6l-6 6l-6 -6z"/></svg>'
        )
