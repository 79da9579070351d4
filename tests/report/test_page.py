"""The page says what metrics say, whatever names say; and in a real browser it sorts, filters, fits and is silent."""

import html
import re
from html.parser import HTMLParser
from math import isnan, nan
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import Page

from robustbench_diffaug.report import tables
from robustbench_diffaug.report.page import render
from tests.report.conftest import CHECKPOINTS, UNFOLD, Opened, made_costs, made_manifest, made_metrics, row

HOSTILE = (
    "<script>alert(1)</script>",
    "'\"><img src=http://x.invalid/ onerror=alert(2)>\u202egnp.exe",
    "😀 {{ 7*7 }} $\\frac{1}{0}$ " + "w" * 300,
    "</style></title><svg onload=alert(3)>",
)


CARDS = re.compile(r'<div id="profile-(\d+)">(.*?)</table>', re.DOTALL)


class Numbers(HTMLParser):
    """Every cell with a number: its table's caption, its row's and column's header, and what it shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[tuple[str, str, str, float, str]] = []
        self.caption, self.headers, self.row, self.column = "", [""], "", 0
        self.inside, self.text, self.value, self.head = "", "", "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin what has a text."""
        if tag in ("caption", "th", "td"):
            self.inside, self.text, self.value = tag, "", dict(attrs).get("data-value") or ""
        elif tag == "tr":
            self.column = 0
            self.headers = [] if self.head else self.headers  # the last row of a head names the columns
        elif tag in ("thead", "tbody"):
            self.head = tag == "thead"
        elif tag == "small" and self.inside:
            self.text += "|"

    def handle_data(self, data: str) -> None:
        """Collect it."""
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        """Keep it."""
        if tag != self.inside:
            return
        text, self.inside = " ".join(self.text.split()), ""
        if tag == "caption":
            self.caption = text
        elif tag == "th" and self.column == 0 and self.headers and len(self.headers) > 1:
            self.row = text
        elif tag == "th":
            self.headers.append(text)
        if tag == "td" and self.value:
            self.cells.append((self.caption, self.row, self.headers[self.column], float(self.value), text))
        self.column += tag in ("th", "td")


def shown(value: float, unit: str, signed: bool = False) -> str:
    """A number as a reader is to see it."""
    scaled = 100 * value if unit == "fraction" else value
    digits = {"fraction": 1, "nats": 2, "pixels": 3, "count": 0}[unit]
    text = f"{scaled:{'+' if signed else ''},.{digits}f}" if round(scaled, digits) else f"{0:.{digits}f}"
    return text.replace("-", "−")


@pytest.fixture(scope="module")
def text(metrics: pd.DataFrame, manifest: dict[str, Any], costs: pd.DataFrame) -> str:
    """The page of the made-up run."""
    return render(metrics, manifest, costs)


def test_the_same_input_gives_the_same_page(text: str) -> None:
    assert render(made_metrics(), made_manifest(), made_costs()) == text
    assert len(text) < 400_000


def test_every_number_is_one_of_metrics_and_every_metric_is_shown(text: str, metrics: pd.DataFrame) -> None:
    cells = Numbers(text).cells
    assert len(cells) > 600
    known = {(record["checkpoint"], record["value"]): record for record in metrics.to_dict("records")}
    for caption, name, header, value, printed in cells:
        said = caption.removeprefix("Measures of ") + name + header  # of a card, a row or a column
        checkpoint = next(c for c in sorted(CHECKPOINTS, key=len, reverse=True) if c in said)
        record = known[checkpoint, value]
        expected = shown(value, record["unit"], "gain" in record["metric"])
        assert re.search(rf"(?<![\d.,]){re.escape(expected)}(?![\d])", printed), (name, header, printed, expected)
    found = {(value, name) for _, name, header, value, _ in cells for name in (name, header)}
    for (checkpoint, value), record in known.items():
        assert any(value == number and checkpoint in name for number, name in found), record["metric"]


def test_cells_stand_under_their_header_and_beside_their_checkpoint(text: str, metrics: pd.DataFrame) -> None:
    values = {(r["checkpoint"], r["metric"], r["group"]): r["value"] for r in metrics.to_dict("records")}
    checked = 0
    for caption, name, header, value, _ in Numbers(text).cells:
        checkpoint, _, mode = name.partition(" |")
        if caption.startswith("corruptions at severity 5"):
            prefix = f"{mode}/" if mode else ""
            assert values[checkpoint, f"{prefix}accuracy/{header}@s5", header] == value
        elif caption == "certificates":
            assert values[checkpoint, header, mode] == value
        elif caption.startswith("Accuracy on images diffused"):
            assert values[name, f"accuracy@t={header}", caption.rpartition(": ")[2]] == value
        elif caption.startswith("Rank") and header.startswith("accuracy/"):
            metric = header.partition("|")[0].strip()
            assert values[name, metric, {"mean": "corruptions"}.get(metric[9:], metric[9:])] == value
        else:
            continue
        checked += 1
    assert checked == 80 + 120 + 80 + 12


def test_a_card_has_the_measures_of_its_checkpoint_with_the_ranks_of_the_leaderboard(
    text: str, metrics: pd.DataFrame
) -> None:
    board = tables.leaderboard(metrics).set_index("checkpoint")
    values = {(r["checkpoint"], r["metric"], r["group"]): r["value"] for r in metrics.to_dict("records")}
    cards = [cell for cell in Numbers(text).cells if cell[0].startswith("Measures of ")]
    assert len(cards) == 4 * (len(tables.headlines(metrics)) + 2)  # certified at 1.0 and 1.5 is no headline
    ranks = {card: re.findall(r'class="rank".*?</span>([^<]+)<', part) for card, part in CARDS.findall(text)}
    for caption, name, header, value, _ in cards:
        found = re.search(r"(\S+?)(?:\[([^\]]+)\])? \|", name)
        assert found is not None and header == "value", name
        groups = {group: v for (c, m, group), v in values.items() if (c, m) == (caption[12:], found[1])}
        assert value == (groups[found[2]] if found[2] else next(iter(groups.values())))
    for number, checkpoint in enumerate(CHECKPOINTS):
        expected = [str(board.loc[checkpoint, f"{name}_rank"]) for name, _ in tables.headlines(metrics)]
        assert sorted(ranks[str(number)]) == sorted(text.replace("-", "–") for text in expected)


def test_intervals_ranks_and_partial_values_are_told(costs: pd.DataFrame) -> None:
    rows = [
        row("a", "accuracy/clean", "clean", 0.9, 0.01),
        row("b", "accuracy/clean", "clean", 0.895, 0.01),
        row("c", "accuracy/clean", "clean", 0.99, 0.01, complete=False, n=700),
        row("d", "ece", "clean", 0.1, 0.05, better="lower", headline=True),
    ]
    cells = {name: printed for caption, name, _, _, printed in Numbers(render(pd.DataFrame(rows), {}, costs)).cells
             if caption.startswith("Rank")}  # fmt: skip
    assert cells["a"] == "#1–2 90.0|89.0–91.0|n = 1,500"
    assert cells["c"] == "99.0|98.0–100.0|n = 700 of 1,500|partial"
    assert "c, shift: 1 metric from a part of the declared samples; not ranked." in html.unescape(
        re.sub(r"<[^>]+>", "", render(pd.DataFrame(rows), {}, costs))
    )


def test_notices_name_failures_devices_and_unequal_samples(costs: pd.DataFrame) -> None:
    rows = [row("a", "accuracy/clean", "clean", 0.9, 0.01), row("b", "accuracy/clean", "clean", 0.8, 0.01, n=1000)]
    told = {
        "failures": [{"bench": "shift", "checkpoint": "b", "reason": "out of memory"}],
        "device": ["cpu", "cuda:0"],
        "notices": ["be careful"],
    }
    page = html.unescape(re.sub(r"<[^>]+>", "", render(pd.DataFrame(rows), told, costs)))
    assert "shift · b · out of memory" in page
    assert "measured on several devices: cpu, cuda:0" in page
    assert "measured on 1,000 and 1,500 samples" in page
    assert "be careful" in page


def test_sections_without_metrics_disappear_and_unknown_metrics_appear(metrics: pd.DataFrame) -> None:
    nothing = render(metrics.head(0), {}, pd.DataFrame())
    assert "<section" not in nothing
    assert "no metrics yet" in nothing
    foreign = [row("a", "x:y/unheard of", "g", 1.5, 0.0, unit="parsecs", bench="b")]
    page = render(
        pd.DataFrame(foreign), {"benches": [{}], "checkpoints": [{"arch": "r"}], "datasets": "?"}, pd.DataFrame()
    )
    assert 'id="others"' in page
    assert 'id="leaderboard"' not in page
    assert ("metric", "parsecs") and 'data-value="1.5"' in page and "parsecs" in page


@pytest.mark.parametrize("value", [nan, float("inf"), -0.0, 1e-300, 123456789.125])
def test_odd_numbers_are_printed_as_what_they_are(value: float) -> None:
    frame = pd.DataFrame([row("a", "odd", "g", value, 0.0, unit="things", headline=True)])
    cells = Numbers(render(frame, {}, pd.DataFrame())).cells
    assert not cells if isnan(value) else all(number == value for *_, number, _ in cells)


@pytest.fixture(scope="module")
def hostile() -> str:
    """The page of a run whose names are no names."""
    manifest = made_manifest(HOSTILE) | {"notices": list(HOSTILE), "suite": {"name": HOSTILE[0]}, HOSTILE[1]: "x"}
    return render(made_metrics(HOSTILE), manifest, made_costs(HOSTILE))


def test_names_are_text_everywhere(hostile: str) -> None:
    page = hostile
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "onload=" not in re.sub(r"&lt;.*?&gt;", "", page)
    assert "{{ 7*7 }}" in page
    assert not re.search(r"\u202e[^<]*</(?!bdi)", re.sub(r'="[^"]*"|<(title|desc)[^>]*>.*?</\1>', "", page, flags=re.S))
    render(made_metrics(HOSTILE).head(1), {"suite": {"name": "\ud800"}}, pd.DataFrame()).encode()


def column(page: Page, number: int) -> list[str]:
    """The values of a column of the leaderboard, from the top."""
    cells = page.locator(f"table.sortable tbody tr > :nth-child({number})")
    read = "cells => cells.map(cell => cell.dataset.name ?? cell.dataset.value ?? '')"
    return [str(value) for value in cells.evaluate_all(read)]


def test_it_sorts_by_click_and_by_key_with_unranked_rows_last(opened: Opened) -> None:
    frame = made_metrics().query("headline")
    clean = (frame["metric"] == "accuracy/clean") & (frame["checkpoint"] == CHECKPOINTS[0])
    frame.loc[clean, "complete"] = False
    frame = frame[(frame["metric"] != "accuracy/clean") | (frame["checkpoint"] != CHECKPOINTS[3])]
    page = opened(render(frame, {}, pd.DataFrame()))
    headers = page.locator("table.sortable thead tr:last-child th")
    assert headers.nth(1).get_attribute("aria-sort") == "descending"
    assert column(page, 1) == [CHECKPOINTS[1], CHECKPOINTS[2], CHECKPOINTS[0], CHECKPOINTS[3]]
    headers.nth(1).locator("button").click()
    assert headers.nth(1).get_attribute("aria-sort") == "ascending"
    assert column(page, 1) == [CHECKPOINTS[2], CHECKPOINTS[1], CHECKPOINTS[0], CHECKPOINTS[3]]
    for key, number, direction in (("Enter", 2, "descending"), ("Space", 2, "ascending"), ("Enter", 0, "ascending")):
        headers.nth(number).locator("button").focus()
        page.keyboard.press(key)
        assert headers.nth(number).get_attribute("aria-sort") == direction
        assert page.locator("table.sortable [aria-sort]").count() == 1
        values = column(page, number + 1)
        assert values == sorted(values, key=float if number else str, reverse=direction == "descending")


def test_it_filters(opened: Opened, text: str) -> None:
    page = opened(text)
    page.get_by_label("Checkpoints with").fill("DiffAug")
    visible = page.locator("table.sortable tbody tr:visible")
    assert visible.count() == 2
    assert page.locator("#filter-count").inner_text() == "2 of 4"
    page.get_by_label("Checkpoints with").fill("")
    assert visible.count() == 4


@pytest.mark.parametrize("names", ["text", "hostile"])
def test_it_fits_every_width_and_is_silent(opened: Opened, names: str, request: pytest.FixtureRequest) -> None:
    page = opened(request.getfixturevalue(names))
    page.evaluate(UNFOLD)
    for width in (360, 768, 1280, 2560):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


CONTRAST = """() => {
  const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
    .getContext("2d", {willReadFrequently: true});
  const light = (colour) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    const linear = (x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    return a ? 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) : null;
  };
  const behind = (node) => node ? light(getComputedStyle(node).backgroundColor) ?? behind(node.parentElement) : 1;
  const speaks = (node) => !node.closest("svg, script, style, bdi:empty") &&
    [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  return [...document.querySelectorAll("body *")].filter(speaks).map((node) => {
    const [x, y] = [light(getComputedStyle(node).color), behind(node)].sort((a, b) => b - a);
    return [(x + 0.05) / (y + 0.05), node.outerHTML.slice(0, 200)];
  }).sort(([a], [b]) => a - b)[0];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(opened: Any, text: str, scheme: str) -> None:
    least, node = opened(text, scheme).evaluate(CONTRAST)
    assert least >= 4.5, node


def test_a_screen_reader_finds_names_for_tables_charts_and_headers(opened: Opened, text: str) -> None:
    page = opened(text)
    assert page.locator("table:not(:has(> caption))").count() == 0
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("svg:not([aria-hidden]):not(:has(> title + desc))").count() == 0
    assert page.get_by_role("img", name="Certified accuracy, %, against l2 radius: sigma=0.25").count() == 1
    assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == page.evaluate(
        "document.querySelectorAll('[id]').length"
    )


def test_on_paper_what_was_folded_is_open(opened: Opened, text: str) -> None:
    page = opened(text)
    opened_before = page.locator("details[open]").count()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details[open]").count() == page.locator("details").count() > opened_before
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == opened_before
