"""What the page shows of out-of-distribution detection: each figure once, in its place, and in a real browser."""

import html
import re
from math import nan
from typing import Any

import numpy as np
import pandas as pd
import pytest

from robustbench_diffaug.report import detection_glossary, detection_sections, figures, glossary
from robustbench_diffaug.report.cells import Cell, Table
from robustbench_diffaug.report.detection_sections import Detection, Settings, detection
from robustbench_diffaug.report.page import render
from tests.report.conftest import UNFOLD, Opened, made_metrics, row
from tests.report.made_detection import AVERAGED, FIGURES, SCORES, SWEPT, VALUES, made_detection, ood

CHECKPOINTS = ("resnet-standard", "resnet-standard+diffaug", "vit-standard")
SMALL = (*AVERAGED, "knn", "energy")


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """A run of three checkpoints and six scores, of which two are drawn."""
    return made_detection(CHECKPOINTS, SMALL, ("knn", "scale"))


@pytest.fixture(scope="module")
def shown(frame: pd.DataFrame) -> Detection:
    """What there is of its bench."""
    used: set[Any] = set()
    settings = Settings(AVERAGED, {CHECKPOINTS[1]: CHECKPOINTS[0]})
    (found,) = detection(frame, used, {name: style for style, name in enumerate(CHECKPOINTS)}, {"ood": settings})
    assert used == set(frame.index)
    return found


@pytest.fixture(scope="module")
def text(frame: pd.DataFrame) -> str:
    """Its page."""
    settings = {"average": list(AVERAGED), "gains": [[CHECKPOINTS[1], CHECKPOINTS[0]]]}
    return render(frame, {"benches": [{"name": "ood", "evaluator": settings}]}, pd.DataFrame())


def every_table(found: Detection) -> list[Table]:
    """All tables of a bench, those of charts left out."""
    return [*found.boards, *found.gains, *found.scores, *(table for fold in found.folds for table in fold.tables)]


def cells_of(table: Table) -> dict[tuple[str, str], Cell]:
    """Its cells by row and column."""
    return {
        (line.name, column): cell
        for line in table.rows
        for column, cell in zip(table.columns, line.cells, strict=True)
        if isinstance(cell, Cell)
    }


def test_the_papers_table_stands_first_with_near_auroc_of_the_averaged_scores(
    shown: Detection, frame: pd.DataFrame
) -> None:
    first = shown.boards[0]
    assert list(first.columns) == ["ID accuracy", *AVERAGED, "average"]
    values = frame.set_index(["checkpoint", "metric"])["value"].to_dict()
    cells = cells_of(first)
    for checkpoint in CHECKPOINTS:
        assert cells[checkpoint, "ID accuracy"].value == values[checkpoint, "accuracy"]
        four = [cells[checkpoint, score].value for score in AVERAGED]
        assert four == [values[checkpoint, f"auroc/{score}/near"] for score in AVERAGED]
        assert cells[checkpoint, "average"].value == pytest.approx(np.mean(four))


def test_false_positive_rates_stand_side_by_side_under_the_name_of_their_convention(shown: Detection) -> None:
    table = shown.boards[1]
    assert table.spans == [("FPR at 95 %, OOD positive", 5), ("FPR at 95 %, ID positive", 5)]
    for line in table.rows:
        metrics = [cell.metric for cell in line.cells if isinstance(cell, Cell)]
        assert metrics == [
            f"fpr95_{kind}_positive/{score}/near" for kind in ("ood", "id") for score in (*AVERAGED, "average")
        ]


def test_every_figure_is_in_a_table_and_under_its_own_checkpoint(shown: Detection, frame: pd.DataFrame) -> None:
    found = {
        (line.name, cell.metric, cell.value)
        for table in every_table(shown)
        for line in table.rows
        for cell in line.cells
        if isinstance(cell, Cell)
    }
    named = "|".join((*FIGURES, "gain", "sweep", "accuracy"))
    rows = frame[frame["metric"].str.fullmatch(rf"({named})(/.+)?")]
    assert found == set(rows[["checkpoint", "metric", "value"]].itertuples(index=False, name=None))


def test_of_a_sweep_the_value_taken_is_marked(shown: Detection, text: str) -> None:
    tables = next(fold.tables for fold in shown.folds if "validation" in fold.title)
    assert len(tables) == len(SWEPT)
    for table in tables:
        assert list(table.columns) == [str(value) for value in VALUES]
        for line in table.rows:
            cells = [cell for cell in line.cells if isinstance(cell, Cell)]
            assert [cell.chosen for cell in cells] == [cell is max(cells, key=lambda c: c.value) for cell in cells]
    assert text.count("<small>chosen</small>") == len(SWEPT) * len(CHECKPOINTS)


def test_gains_name_the_checkpoint_they_are_against_and_keep_their_sign(shown: Detection) -> None:
    near, far = shown.gains
    assert "near" in near.caption and "far" in far.caption
    (line,) = near.rows
    assert (line.name, line.mode) == ("resnet-standard+diffaug", "against resnet-standard")
    assert all(isinstance(cell, Cell) and cell.signed and cell.interval for cell in line.cells)
    assert near.spans == [("AUROC", 5)]


def test_nothing_is_shown_twice_as_a_curve_or_among_others(text: str) -> None:
    assert 'id="detection"' in text
    for section in ("curves", "others", "shifts", "smoothing"):
        assert f'id="{section}"' not in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_other_benches_keep_their_sections_and_several_are_named() -> None:
    parts = [made_detection(CHECKPOINTS[:1], ("msp",), ("msp",)).assign(bench=bench) for bench in ("ood", "held-out")]
    page = render(pd.concat([made_metrics(), *parts]), {}, pd.DataFrame())
    sections = re.findall(r'<h2 id="([a-z]+)"', page)
    assert sections == [
        "overview", "shifts", "curves", "smoothing", "detection", "profiles", "others", "glossary",
    ]  # fmt: skip
    assert re.findall(r"<h3><bdi>(ood|held-out)</bdi></h3>", page) == ["ood", "held-out"]
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_averaged_scores_are_those_of_the_settings(frame: pd.DataFrame) -> None:
    styles = {name: style for style, name in enumerate(CHECKPOINTS)}
    (found,) = detection(frame, set(), styles, {"ood": Settings(("knn", "msp"))})
    assert list(found.boards[0].columns) == ["ID accuracy", "knn", "msp", "average"]
    assert [(panel.title, panel.detail) for panel in found.rocs] == [("knn", "near"), ("knn", "far")]
    assert [(panel.title, panel.detail) for panel in found.more_rocs] == [("scale", "near"), ("scale", "far")]


def test_a_second_row_for_one_place_and_values_without_a_sweep_stand_among_others() -> None:
    rows = [
        ood("a", "auroc/msp/near", "near", 0.9),
        ood("a", "accuracy", "id", 0.5),
        ood("a", "accuracy", "csid", 0.25),
        ood("a", "chosen/energy", "val", 1.0, 0.0, unit="count"),
        row("b", "accuracy", "x", 0.75, 0.0, bench="other"),
    ]
    used: set[Any] = set()
    (found,) = detection(pd.DataFrame(rows), used, {"a": 0, "b": 1}, {})
    assert used == {0, 1}
    assert [line.name for line in found.boards[0].rows] == ["a"]
    assert detection(pd.DataFrame(rows[1:]), used, {"a": 0, "b": 1}, {}) == []


def test_missing_and_partial_values_are_told() -> None:
    rows = [
        ood("a", "auroc/msp/near", "near", nan, 0.0),
        ood("b", "auroc/msp/near", "near", 0.5, complete=False),
        *(ood("b", f"roc/msp/near@fpr={x}", "near", x, 0.0) for x in (0.0, 0.5, 1.0)),
    ]
    page = render(pd.DataFrame(rows), {}, pd.DataFrame())
    assert re.search(r'>a</bdi></th>\s*<td class="none">–</td>', page)
    assert re.search(r'data-value="0.5"[^>]*>50.0<small class="partial">partial', page)


def test_names_of_scores_and_sets_are_text() -> None:
    hostile = "<script>x"
    rows = [
        ood("a", f"auroc/{hostile}/near", "near", 0.5),
        ood("a", f"auroc/{hostile}/{hostile}", "near", 0.5),
        ood("a", f"sweep/{hostile}@{hostile}=1", "val", 0.5),
        ood("a", f"density/{hostile}/id@s=-1e-05", "id", 1.0),
        *(ood("a", f"roc/{hostile}/{hostile}@fpr={x}", "near", x) for x in (0, 1)),
    ]
    page = render(pd.DataFrame(rows), {}, pd.DataFrame())
    assert page.count("<script") == 1
    assert 'id="others"' not in page


def path_points(svg: str, role: str) -> list[tuple[str, float]]:
    """The steps of an outline: H (to x) and V (to y) in turn."""
    path = re.search(rf'class="role-{role}" d="M0 56([^"]*)"', svg)
    assert path is not None
    return [(kind, float(number)) for kind, number in re.findall(r"([HV])([-\d.]+)", path[1])]


def test_histograms_have_their_bins_where_they_are_and_as_high_as_they_are() -> None:
    at, share = np.array([0.25, 0.75]), np.array([0.25, 0.5])
    svg = figures.histogram(at, {"id": share, "near": share[::-1].copy()}, "h", "<title>")
    assert path_points(svg, "id") == [
        ("H", 0.0), ("V", 28.0), ("H", 80.0), ("H", 80.0), ("V", 0.0), ("H", 160.0), ("V", 56.0),
    ]  # fmt: skip
    assert [y for kind, y in path_points(svg, "near") if kind == "V"] == [0.0, 28.0, 56.0]
    assert "&lt;title&gt;" in svg
    assert "id 0.75, near 0.25" in svg
    assert "nan" not in figures.histogram(at[:1], {"id": np.zeros(1)}, "h", "t")


def test_roc_curves_go_through_their_points() -> None:
    x = np.array([0.0, 0.5, 1.0])
    svg = figures.roc([figures.Line(x, y, y, y, 0) for y in (x, x**0.5)], "r", "a title", "a description")
    paths = re.findall(r'<path d="([^"]+)"[^>]*style="fill: none;[^"]*var\(--series-0\)', svg)
    plain, bent = (np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), dtype=float) for path in paths)
    assert np.allclose(plain[1], (plain[0] + plain[2]) / 2, atol=0.02)
    height = plain[0, 1] - plain[2, 1]
    assert (bent[0, 1] - bent[1, 1]) / height == pytest.approx(0.5**0.5, abs=1e-3)
    assert "OOD images flagged, %" in svg
    assert not re.search(r"#[0-9a-f]{6}|http|font-family|<style", svg)


def test_every_score_and_figure_has_its_entry(frame: pd.DataFrame) -> None:
    found = glossary.entries(frame["metric"])
    terms = [entry.term for entry in found]
    assert all(f"…/{score}/…" in terms for score in SMALL)
    assert "…/vim/…" not in terms
    assert "…/gain/…" not in terms
    explained = [entry for entry in found if entry.pattern]
    for metric in frame["metric"].unique():
        assert any(re.fullmatch(entry.pattern, metric) for entry in explained), metric
    for score in SCORES:
        (entry,) = [e for e in detection_glossary.ENTRIES if e.term == f"…/{score}/…"]
        assert entry.source is not None and entry.source.url.startswith("https://")


def test_a_gain_in_accuracy_keeps_its_entry() -> None:
    terms = [entry.term for entry in glossary.entries(["de/gain/mean"])]
    assert "…/gain/…" in terms


def test_patterns_of_figures_agree() -> None:
    assert set(detection_sections.FIGURES) == set(detection_glossary.FIGURES.split("|")) == set(FIGURES)


def test_in_a_browser_it_fits_and_is_silent(text: str, opened: Opened) -> None:
    page = opened(text)
    page.evaluate(UNFOLD)
    for width in (360, 1400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        widths = page.locator("#settings ~ .columns dd").evaluate_all("all => all.map(dd => dd.clientWidth)")
        assert widths and min(widths) > 100  # long names of settings do not squeeze their values
    assert page.locator("svg:not([aria-hidden]):not(:has(> title + desc))").count() == 0
    assert page.locator("table:not(:has(> caption))").count() == 0
    heights = page.locator(".multiples svg").evaluate_all("all => all.map(svg => svg.getBoundingClientRect().height)")
    assert len(heights) == len(AVERAGED) * len(CHECKPOINTS)
    assert min(heights) > 30


def test_the_page_names_what_a_gain_is_against(text: str) -> None:
    assert text.count("against resnet-standard</bdi>") == 4  # near and far, of the averaged scores and of every one


def test_it_says_where_all_points_of_a_curve_are(text: str) -> None:
    assert "some of the numbers, metrics.csv all" in html.unescape(text)
