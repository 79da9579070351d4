"""Charts as inline SVG: no text but numbers and axis labels of ours, so no name can harm or break them.

Names of checkpoints stay in the page's HTML, next to the `swatch` of their line. Colours are CSS variables of the page
(`--series-0` ... `--series-6`, `--paper`) and `currentColor`, so one chart serves light, dark and print. The same input
gives the same bytes.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Axis", "Line", "chart", "histogram", "roc", "swatch"]

SERIES = 7  # colours of the page; with markers and dashes, of which there are 5 and 4, 140 lines look different
MARKERS = "os^Dv"
WIDE, HIGH = 160, 56  # of a histogram
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 1.5, 1.5, 1.5)))

# Matplotlib has no CSS variables: each of these stands for one until the SVG is text.
INK, PAPER = "#010203", "#010204"
STANDINS = {INK: "currentColor", PAPER: "var(--paper)"} | {
    f"#0102{0x10 + series:02x}": f"var(--series-{series})" for series in range(SERIES)
}

CLEANING = (  # what an element inside HTML does not need, or what would act on the whole page
    (r"<style.*?</style>|<!--.*?-->", ""),
    (r"<defs>\s*</defs>", ""),
    (r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|[xy]tick|FillBetween\w+)_\d+"', ""),
    (r' transform="rotate\(-0 [^"]*"', ""),
    (r"font-family: [^;]*; ", ""),
    (r"xlink:href", "href"),
    (r"(\d\.\d\d)\d+", r"\1"),  # of a pixel
    (r"\s*\n\s*", " "),
    (r"> <", "><"),
)


class Line(NamedTuple):
    """One checkpoint's curve.

    Attributes:
        x: Where it was measured, increasing, of shape (p,).
        y: The values, of shape (p,); NaN where it is missing.
        low: Lower ends of the intervals, of shape (p,); NaN where there is none.
        high: Upper ends.
        style: The number of the checkpoint, which decides colour, marker and dashes.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    style: int


@contextmanager
def _settings() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user's matplotlibrc says, but for what the page needs."""
    import matplotlib  # heavy: half a second

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        ours: dict[Any, Any] = {
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.linewidth": 0.6,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "font.size": 10.5,
            "svg.fonttype": "none",  # text stays text: it takes the page's font, and can be searched and read out
            "svg.hashsalt": "rdiff",
            "text.color": INK,
            "text.parse_math": False,
            "xtick.color": INK,
            "ytick.color": INK,
        }
        matplotlib.rcParams.update(ours)
        yield


class Drawing(NamedTuple):
    """What an SVG element holds, and its viewBox."""

    box: str
    text: str


def _inline(figure: "Figure", prefix: str) -> Drawing:
    """The figure as the inside of an SVG element for an HTML page, its ids made unique by `prefix`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    found = re.search(r'viewBox="([^"]+)".*?</metadata>(.*)</svg>', buffer.getvalue(), re.DOTALL)
    assert found is not None, "matplotlib wrote an SVG of another form"
    box, text = found[1], found[2]
    for pattern, replacement in CLEANING:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\1{prefix}-", text)
    for standin, colour in STANDINS.items():
        text = text.replace(standin, colour)
    return Drawing(box, text.strip())


def _look(style: int) -> dict[str, Any]:
    """How matplotlib draws the line of checkpoint number `style`."""
    colour = list(STANDINS)[2 + style % SERIES]
    return {
        "color": colour,
        "linestyle": DASHES[style % len(DASHES)],
        "linewidth": 1.6,
        "marker": MARKERS[style % len(MARKERS)],
        "markersize": 4.6,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.6,
    }


def _draw(axes: "Axes", line: Line, axis: "Axis") -> None:
    """The curve and its band; between radii a certified accuracy is at least that of the larger one, hence steps."""
    look = _look(line.style)
    low, high = line.low * axis.scale, line.high * axis.scale
    finite = (np.isfinite(low) & np.isfinite(high)).tolist()
    step: Literal["pre"] | None = "pre" if axis.step else None
    axes.fill_between(line.x, low, high, where=finite, step=step, color=look["color"], alpha=0.14, linewidth=0)
    axes.plot(line.x, line.y * axis.scale, drawstyle="steps-pre" if axis.step else "default", clip_on=False, **look)


def _rule(axes: "Axes", height: float, name: str) -> None:
    """A horizontal line, its name under its left end, where curves that rise to it are low."""
    axes.axhline(height, color=INK, alpha=0.6, linewidth=0.9, linestyle=(0, (5, 3)))
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(name, (0, height), xytext=(4, -3), va="top", fontsize=9.5, **place)


class Axis(NamedTuple):
    """How a chart is laid out.

    Attributes:
        across: The label of the horizontal axis.
        scale: What values are multiplied by: 100 for percent.
        top: The upper end of the vertical axis, which then begins at 0; without it the data decide.
        step: Whether curves are steps, each down to the value at its right.
        limit: Where a horizontal line stands, as values are before they are multiplied.
        named: What is written at that line.
    """

    across: str
    scale: float = 1.0
    top: float | None = None
    step: bool = False
    limit: float | None = None
    named: str = ""


def chart(lines: Sequence[Line], axis: Axis, prefix: str, title: str, description: str) -> str:
    """An SVG element of curves with their intervals as bands.

    Arguments:
        lines: The curves.
        axis: How they are laid out.
        prefix: What its ids begin with, unique in the page: letters, digits and hyphens.
        title: What the chart shows, for screen readers; any text.
        description: What is to be seen in it, or where its numbers are.
    """
    from matplotlib.figure import Figure

    with _settings():
        figure = Figure(figsize=(5, 3.1))
        axes = figure.add_axes((0.085, 0.16, 0.895, 0.79))
        if axis.limit is not None:
            _rule(axes, axis.limit * axis.scale, axis.named)
        for line in lines:
            _draw(axes, line, axis)
        axes.set_xlabel(axis.across)
        axes.grid(axis="y", color=INK, alpha=0.14, linewidth=0.6)
        axes.tick_params(length=3, width=0.6)
        axes.margins(x=0.02)
        if axis.top is not None:
            axes.set_ylim(0, axis.top)
        axes.set_position((left := _left(axes), 0.16, 0.98 - left, 0.79))
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        drawing = _inline(figure, prefix)
    return _element(drawing, prefix, title, description)


def _left(axes: "Axes") -> float:
    """The share of a chart's width that the numbers of its vertical axis take."""
    texts = axes.yaxis.get_major_formatter().format_ticks([float(at) for at in axes.get_yticks()])
    return max(0.085, 0.035 + 0.0155 * max(map(len, texts), default=0))


def roc(lines: Sequence[Line], prefix: str, title: str, description: str) -> str:
    """An SVG element of ROC curves, and the diagonal of a score that knows nothing.

    Arguments:
        lines: Shares flagged, of the positive kind (y) against the other (x), in [0, 1]; intervals are not drawn, since
            many curves lie close together.
        prefix: What its ids begin with, as of a chart.
        title: What it shows, for screen readers; any text.
        description: What is to be seen in it, or where its numbers are.
    """
    from matplotlib.figure import Figure

    with _settings():
        figure = Figure(figsize=(4, 3.8))
        axes = figure.add_axes((0.15, 0.14, 0.82, 0.83))
        axes.plot([0, 100], [0, 100], color=INK, alpha=0.3, linewidth=0.6)
        for line in lines:
            marks = (line.style % 5, max(1, len(line.x) // 3))  # few, and of neighbours not at one place
            axes.plot(100 * line.x, 100 * line.y, clip_on=False, **_look(line.style) | {"markevery": marks})
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="ID images flagged, %", ylabel="OOD images flagged, %")
        axes.set(xticks=range(0, 101, 20), yticks=range(0, 101, 20))
        axes.grid(color=INK, alpha=0.14, linewidth=0.6)
        axes.tick_params(length=3, width=0.6)
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        drawing = _inline(figure, prefix)
    return _element(drawing, prefix, title, description)


def histogram(at: NDArray[np.float64], shares: Mapping[str, NDArray[np.float64]], prefix: str, title: str) -> str:
    """A small SVG element of histograms on top of each other, without numbers, as high as their highest bin.

    Arguments:
        at: The centres of the bins, increasing, of shape (b,).
        shares: What lies in each bin, of shape (b,), by a name: letters and hyphens; the page styles `role-<name>`.
        prefix: What its ids begin with, as of a chart.
        title: What it shows, for screen readers; any text.
    """
    width = float(np.diff(at).min()) if len(at) > 1 else 1.0
    left, span = float(at[0]) - width / 2, float(at[-1] - at[0]) + width
    top = max((float(share.max(initial=0.0)) for share in shares.values()), default=0.0) or 1.0
    ends = WIDE * (np.stack([at - width / 2, at + width / 2]) - left) / span

    def outline(share: NDArray[np.float64]) -> str:
        steps = "".join(
            f"H{start:.1f}V{HIGH * (1 - y / top):.1f}H{end:.1f}" for start, end, y in zip(*ends, share, strict=True)
        )
        return f"M0 {HIGH}{steps}V{HIGH}"

    paths = "".join(f'<path class="role-{name}" d="{outline(share)}"/>' for name, share in shares.items())
    peaks = ", ".join(f"{name} {at[int(np.argmax(share))]:.2f}" for name, share in shares.items())
    described = f"Highest bins, where 0 and 1 are the 0.5 and 99.5 percentiles of all scores: {peaks}."
    return _element(Drawing(f"-1 -1 {WIDE + 2} {HIGH + 2}", paths), prefix, title, described)


def _element(drawing: Drawing, prefix: str, title: str, description: str) -> str:
    """An SVG element that says what it shows."""
    return (
        f'<svg viewBox="{drawing.box}" role="img" aria-labelledby="{prefix}-title {prefix}-desc">'
        f'<title id="{prefix}-title">{escape(title)}</title><desc id="{prefix}-desc">{escape(description)}</desc>'
        f"{drawing.text}</svg>"
    )


def swatch(style: int, prefix: str) -> str:
    """An SVG element of a short piece of the line of checkpoint number `style`, for legends."""
    from matplotlib.figure import Figure

    with _settings():
        figure = Figure(figsize=(0.5, 0.18))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(-1, 1), ylim=(-1, 1))
        axes.plot([-1, 0, 1], [0, 0, 0], markevery=[1], **_look(style))
        figure.patch.set_visible(False)
        drawing = _inline(figure, prefix)
    return f'<svg viewBox="{drawing.box}" aria-hidden="true">{drawing.text}</svg>'
