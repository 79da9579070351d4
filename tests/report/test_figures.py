"""Charts are the same bytes for the same input, valid, free of other people's text, and follow the page's colours."""

import re
import xml.etree.ElementTree as ElementTree
from math import nan
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from robustbench_diffaug.report import figures
from robustbench_diffaug.report.figures import Axis, Line

HOSTILE = [
    "<script>alert(1)</script>",
    "$\\frac{1}{0}$",
    "\u202egnp.exe",
    "😀 \x07 ﷽",
    '"></svg><img src=x onerror=alert(1)>',
]
X = np.arange(5, dtype=float)


def line(style: int = 0, value: float = 0.5) -> Line:
    """A curve with a band."""
    return Line(X, np.full(5, value), np.full(5, value - 0.1), np.full(5, value + 0.1), style)


def drawn(lines: list[Line], title: str = "a title", prefix: str = "chart", axis: Axis | None = None) -> str:
    """A chart in percent."""
    return figures.chart(lines, axis or Axis("t", 100, 100), prefix, title, "a description")


def test_the_same_input_gives_the_same_bytes_whatever_the_users_style() -> None:
    first = drawn([line(style) for style in range(9)])
    with mpl.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path"}):
        assert drawn([line(style) for style in range(9)]) == first
        assert mpl.rcParams["font.size"] == 30


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_titles_are_text(hostile: str) -> None:
    found = drawn([line()], hostile)
    assert "<script" not in found
    assert "<img" not in found
    root = ElementTree.fromstring(found.replace("\x07", ""))
    assert root.findtext("title") == hostile.replace("\x07", "")
    assert root.attrib["aria-labelledby"].split() == [root[0].attrib["id"], root[1].attrib["id"]]


def test_it_takes_the_pages_colours_and_font_and_makes_no_request() -> None:
    found = drawn([line(style) for style in range(7)])
    assert not re.search(r"#[0-9a-f]{6}|http|font-family|<style", found)
    assert all(f"var(--series-{series})" in found for series in range(7))
    assert "currentColor" in found


def test_ids_are_unique_and_all_references_lead_to_one() -> None:
    found = drawn([line(0), line(1)], prefix="one") + drawn([line(0), line(1)], prefix="two")
    ids = re.findall(r' id="([^"]+)"', found)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', found)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def heights(svg: str) -> list[float]:
    """The vertical coordinates of the first curve, which has no fill and a colour of the page."""
    path = re.search(r'<path d="([^"]+)" style="fill: none;[^"]*var\(--series-0\)', svg)
    assert path is not None
    return [float(number) for number in re.findall(r"[ML] [\d.]+ ([\d.]+)", path[1])]


def test_curves_are_where_their_values_are() -> None:
    y = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    found = np.array(heights(drawn([Line(X, y, y, y, 0)])))
    assert np.allclose(np.diff(found), np.diff(found)[0], atol=0.02)
    ticks = re.findall(r'y="([\d.]+)">(\d+)</text>', drawn([Line(X, y, y, y, 0)]))
    percent = {text: float(height) for height, text in ticks}
    assert found[0] - found[-1] == pytest.approx(percent["0"] - percent["100"], abs=0.05)


def test_between_radii_the_curve_is_at_the_value_of_the_larger() -> None:
    y = np.array([0.9, 0.5, 0.5, 0.1, 0.0])
    points = heights(drawn([Line(X, y, y, y, 0)], axis=Axis("radius", 100, 100, step=True)))
    assert points[1] == points[2] > points[0]  # down at once, then level


def test_wide_numbers_of_the_vertical_axis_stay_within_the_chart() -> None:
    for value in (-0.025, 0.5, 1234.5):
        y = value * (1 + X / 100)
        found = drawn([Line(X, y, y, y, 0)], axis=Axis("t"))
        ends = re.findall(r'text-anchor: end[^>]*x="([\d.]+)"[^>]*>([^<]+)<', found)
        assert ends
        for at, text in ends:
            assert float(at) > 6.3 * len(text) - 2, text  # 10.5 points, of which a digit is 6.3 wide


def test_missing_values_and_intervals_leave_gaps_without_a_warning() -> None:
    y = np.array([0.5, nan, 0.5, 0.4, 0.3])
    nothing = np.full(5, nan)
    assert "<svg" in drawn([Line(X, y, nothing, nothing, 0), Line(X, nothing, nothing, nothing, 1)])
    assert "<svg" in drawn([Line(X, y, y - np.inf, y + np.inf, 0)], axis=Axis("t"))


def test_looks_of_many_checkpoints_differ() -> None:
    looks = {re.sub(r"k\d+", "", figures.swatch(style, f"k{style}")) for style in range(140)}
    assert len(looks) == 140


def test_matplotlib_is_not_imported_with_the_module() -> None:
    text = Path(figures.__file__).read_text()
    assert not re.search(r"^(?:from|import) matplotlib|pyplot", text, re.MULTILINE)
