"""In a real browser: columns can be chosen, published rows stay beneath, names lead to cards, and paper holds all."""

import re
from typing import Literal

import pandas as pd
import pytest

from robustbench_diffaug.report.page import render
from tests.report.conftest import CHECKPOINTS, Opened, made_costs, made_manifest, made_metrics
from tests.report.test_overview import MARKS, published

LANDMARKS: tuple[Literal["main", "banner", "navigation", "contentinfo"], ...] = (
    "main",
    "banner",
    "navigation",
    "contentinfo",
)
PAPER = 1032  # CSS pixels of A4 across, less its margins


@pytest.fixture(scope="module")
def text() -> str:
    """A page with marks and published rows."""
    rows = [published(f"paper {n}", "accuracy/clean", "clean", value) for n, value in enumerate((0.2, 0.99, 0.5))]
    frame = made_metrics().query("headline")
    return render(frame, made_manifest(), made_costs(), published=pd.DataFrame(rows), marks=MARKS)


@pytest.fixture(scope="module")
def wide() -> str:
    """A page whose tables are wider than any paper."""
    frame = made_metrics()
    parts = [
        frame.assign(metric=frame["metric"].str.replace("accuracy/", f"accuracy/{n}-"), bench=f"b{n}") for n in "xyz"
    ]
    rows = pd.concat([frame, *parts], ignore_index=True)
    return render(rows.loc[rows["metric"].str.contains("/")], {}, pd.DataFrame())


def test_columns_are_chosen_by_mouse_and_by_key(opened: Opened, text: str) -> None:
    page = opened(text)
    heads = page.locator("table.sortable thead tr:last-child th:visible")
    everything = heads.count()
    box = page.get_by_label("Certified", exact=True)
    box.click()
    assert [h for h in heads.all_inner_texts() if "certified" in h or "acr" in h] == []
    widths = page.locator("table.sortable tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].filter(cell => !cell.hidden).length)"
    )
    assert set(widths) == {heads.count()} and heads.count() < everything
    spans = page.locator("table.sortable thead tr:first-child th:visible")
    assert sum(int(str(span.get_attribute("colspan"))) for span in spans.all()) == heads.count() - 1
    box.focus()
    page.keyboard.press("Space")
    assert heads.count() == everything


def test_published_rows_are_sorted_and_filtered_beneath_the_measured_ones(opened: Opened, text: str) -> None:
    page = opened(text)
    names = page.locator("table.sortable tbody tr:visible th")

    def shown() -> list[str]:
        return [str(name) for name in names.evaluate_all("cells => cells.map(cell => cell.dataset.name)")]

    assert shown()[4:] == ["paper 0", "paper 1", "paper 2"]
    page.locator("table.sortable thead tr:last-child th").nth(1).locator("button").press("Enter")
    assert shown()[4:] == ["paper 0", "paper 2", "paper 1"]  # ascending, as it was descending at first
    page.get_by_label("Checkpoints with").fill("paper")
    assert shown() == ["paper 0", "paper 2", "paper 1"]
    assert page.locator("#filter-count").inner_text() == "3 of 7"


def test_a_name_leads_to_its_card_and_opens_it(opened: Opened, text: str) -> None:
    page = opened(text)
    page.evaluate("for (const card of document.querySelectorAll('.card')) card.open = false")
    page.locator("table.sortable tbody th a").filter(has_text=re.compile(f"^{re.escape(CHECKPOINTS[2])}$")).press(
        "Enter"
    )
    assert page.locator(".card[open]").count() == 1
    assert page.locator(".card[open] summary").inner_text().startswith(CHECKPOINTS[2])


def test_landmarks_and_names_are_there_for_a_screen_reader(opened: Opened, text: str) -> None:
    page = opened(text)
    landmarks = [page.get_by_role(role) for role in LANDMARKS]
    assert [landmark.count() for landmark in landmarks] == [1, 1, 1, 1]
    assert page.get_by_role("group", name="Columns").get_by_role("checkbox").count() == 4
    for unnamed in (
        "section:not([aria-label], [aria-labelledby])",
        "[role=region]:not([aria-label])",
        "input:not([id], label *)",
    ):
        assert page.locator(unnamed).count() == 0
    for link in page.locator("nav a").all():
        assert page.locator(str(link.get_attribute("href"))).count() == 1


def test_on_paper_no_table_is_cut_off_and_no_number_lost(opened: Opened, wide: str) -> None:
    page = opened(wide)
    cells = "all => all.map(cell => cell.dataset.value).sort()"
    before = page.locator("#overview ~ .scroll [data-value]").evaluate_all(cells)
    assert page.locator("table.sortable").evaluate("table => table.offsetWidth") > 2 * PAPER
    page.set_viewport_size({"width": PAPER, "height": 800})
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    right = page.locator("table:visible").evaluate_all("all => all.map(table => table.getBoundingClientRect().right)")
    assert len(right) > 4 and max(right) <= PAPER
    inner = "all => all.map(node => node.querySelector('table:not([hidden])').offsetWidth - node.offsetWidth)"
    assert max(page.locator("figure .scroll").evaluate_all(inner)) <= 0
    after = page.locator("#overview ~ .scroll table:visible [data-value]").evaluate_all(cells)
    assert after == before
    for piece in page.locator("#overview ~ .scroll .piece").all():
        spanned, named = (piece.locator(f"thead tr:{at}-child > *") for at in ("first", "last"))
        assert sum(int(cell.get_attribute("colspan") or 1) for cell in spanned.all()) == named.count()
        assert named.first.inner_text() == "checkpoint"
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator(".piece").count() == 0
    assert page.locator("table.sortable").is_visible()


def test_it_is_printed(opened: Opened, text: str) -> None:
    page = opened(text)
    content = page.pdf(prefer_css_page_size=True)
    assert content.startswith(b"%PDF")
    assert re.search(rb"/MediaBox \[0 0 84\d", content)  # A4 across
    assert page.locator(".piece").count() == 0  # as before


def test_what_is_far_from_the_window_is_laid_out_when_it_comes_near(opened: Opened, text: str) -> None:
    page = opened(text)
    page.locator("nav a").last.press("Enter")
    assert page.locator("#glossary").evaluate("node => node.getBoundingClientRect().top") < 700
    assert page.locator("dl.glossary").is_visible()
