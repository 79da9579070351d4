"""The overview, cards, marks and published rows: what they take from metrics, and what they make of the rest."""

import html
import re
import runpy
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from robustbench_diffaug.report import tables
from robustbench_diffaug.report.axes import AXES, ORDER, axis_of, measures
from robustbench_diffaug.report.marks import KINDS, Mark, legend, origins
from robustbench_diffaug.report.notices import notices
from robustbench_diffaug.report.overview import board, printed
from robustbench_diffaug.report.page import render
from robustbench_diffaug.report.profiles import profiles
from robustbench_diffaug.report.scatter import Point, Scatter
from tests.report.conftest import CHECKPOINTS, row

NOTHING = pd.DataFrame()


def published(name: str, metric: str, group: str, value: float, **fields: object) -> dict[str, object]:
    """A row of a publication."""
    said = {"source": "A paper, 2019, Table 1", "link": "https://example.org/paper", "note": "top-1"}
    return row(name, metric, group, value, 0.0, n=nan, n_available=nan) | said | fields


def text_of(page: str) -> str:
    """What a page says, without its style and script."""
    return html.unescape(re.sub(r"<(style|script)>.*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL))


@pytest.mark.parametrize(
    ("metric", "axis"),
    [
        ("accuracy/clean", "Clean"),
        ("accuracy", "Clean"),
        ("accuracy/mean", "Shift"),
        ("mce/alexnet", "Shift"),
        ("accuracy/fog@s5", "Shift"),
        ("de/accuracy/mean", "Ensemble and adaptation"),
        ("dda-se/accuracy/mean", "Ensemble and adaptation"),
        ("de[step=100]/gain/mean", "Ensemble and adaptation"),
        ("certified@0.50", "Certified"),
        ("certified-band@0.50", "Certified"),
        ("acr", "Certified"),
        ("smoothed/accuracy", "Certified"),
        ("auroc/average/near", "OOD detection"),
        ("gain/auroc/msp/far", "OOD detection"),
        ("chain/pag_cosine@t=300", "Alignment"),
        ("jacobian_norm@t=0", "Alignment"),
        ("noisy/accuracy@t=100", "Diffused images"),
        ("entropy/late", "Diffused images"),
        ("noisy/random-time/accuracy/clean", "Diffused images"),
        ("agreement@scale=3", "Generation"),
        ("jacobian_asymmetry@t=100", "Denoisers"),
        ("unheard of", "Other"),
    ],
)
def test_a_metric_is_on_its_axis(metric: str, axis: str) -> None:
    assert axis_of(metric) == axis


def test_every_axis_has_its_place() -> None:
    assert {axis.title for axis in AXES} | {"Other"} == set(ORDER)


def test_headlines_keep_name_and_rank_and_other_axes_follow_without_rank(metrics: pd.DataFrame) -> None:
    found = measures(metrics)
    ranks = tables.leaderboard(metrics).set_index("checkpoint")
    assert [m.name for m in found if m.ranks] == sorted(
        (name for name, _ in tables.headlines(metrics)), key=[m.name for m in found].index
    )
    for measure in found:
        assert measure.ranks == ({} if not measure.ranks else ranks[f"{measure.name}_rank"].to_dict())
        assert len(measure.rows) == len(CHECKPOINTS)
    more = [measure.name for measure in found if not measure.ranks]
    assert more == ["certified@1.00[sigma=0.50]", "certified@1.50[sigma=0.50]"]  # at 0.25 they are 0
    axes = [measure.axis for measure in found]
    assert axes == sorted(axes, key=ORDER.index)


def test_of_figures_against_t_the_one_nearest_to_300_is_taken() -> None:
    rows = [row("a", f"pag_cosine@t={t}", "clean", 0.1, 0.01) for t in (0, 200, 250, 350, 999)]
    assert [measure.name for measure in measures(pd.DataFrame(rows))] == ["pag_cosine@t=250"]


def test_names_that_two_benches_share_are_told_apart() -> None:
    rows = [row("a", "de/gain/mean", "corruptions", 0.1, 0.01, bench=bench, headline=False) for bench in ("x", "y")]
    assert [measure.name for measure in measures(pd.DataFrame(rows))] == ["x:de/gain/mean", "y:de/gain/mean"]


def test_published_rows_stand_beneath_and_change_no_rank_and_no_order(metrics: pd.DataFrame) -> None:
    rows = [
        published("Best", "accuracy/clean", "clean", 0.999),
        published("Best", "accuracy/mean", "corruptions", 0.75),
        published("Best", "accuracy/clean", "elsewhere", 0.5),
    ]
    found = measures(metrics)
    plain = board(found, CHECKPOINTS, {}, [])
    with_rows = board(found, CHECKPOINTS, {}, printed(pd.DataFrame(rows)))
    assert plain is not None and with_rows is not None
    assert with_rows._replace(published=[]) == plain
    (line,) = with_rows.published
    shown = {h.name: p.cell.value for h, p in zip(with_rows.headings, line.places, strict=True) if p.cell}
    assert shown == {"accuracy/clean": 0.999, "accuracy/mean": 0.75}
    assert not any(place.rank for place in line.places)
    page = render(metrics.query("headline"), {}, NOTHING, published=pd.DataFrame(rows))
    assert re.findall(r'data-published="([^"]+)"', page) == ["0.999", "0.75", "0.999", "0.75", "0.5"]
    assert 'data-value="0.999"' not in page
    assert "A paper, 2019, Table 1 (3)" in " ".join(text_of(page).split())
    assert '<a href="https://example.org/paper" rel="noreferrer">' in page


@pytest.mark.parametrize("link", ["javascript:alert(1)", "data:text/html,x", "//host/x", "file:///etc/passwd", "", nan])
def test_only_addresses_of_the_web_are_linked(link: object) -> None:
    rows = pd.DataFrame([published("<script>alert(1)</script>", "accuracy/clean", "clean", 0.9, link=link)])
    (entry,) = printed(rows)
    assert entry.source.href == ""
    page = render(pd.DataFrame([row("a", "accuracy/clean", "clean", 0.9, 0.01)]), {}, NOTHING, published=rows)
    assert page.count("<script") == 1
    assert not re.search(r'href="(?!#|\./|https://|data:,)', page)


def test_an_address_may_be_called_url_and_a_missing_figure_is_left_out() -> None:
    frame = pd.DataFrame([published("a", "acr", "g", nan), published("a", "acr", "g", 0.5)]).drop(columns=["link"])
    (entry,) = printed(frame.assign(url="https://example.org/"))
    assert (entry.source.href, entry.cell.value) == ("https://example.org/", 0.5)
    assert printed(None) == printed(frame.head(0)) == []


MARKS = {
    ("shift", CHECKPOINTS[0]): Mark("verified", "../shift", "../shift/manifest.json", "ab" * 32),
    ("certificates", CHECKPOINTS[0]): Mark("imported", "../cohen run", "", "cd" * 32),
    ("shift", CHECKPOINTS[1]): Mark("rechecked", "/machine/run"),
}


def test_marks_stand_in_their_rows_and_lead_to_run_manifest_and_digest(metrics: pd.DataFrame) -> None:
    found = board(measures(metrics), CHECKPOINTS, MARKS, [])
    assert found is not None
    signs = {line.checkpoint: [sign.kind for sign in line.signs] for line in found.rows}
    assert signs == {name: [] for name in CHECKPOINTS} | {
        CHECKPOINTS[0]: ["verified", "imported"], CHECKPOINTS[1]: ["rechecked"],
    }  # fmt: skip
    line = next(line for line in found.rows if line.checkpoint == CHECKPOINTS[0])
    of = {h.name: p.sign.kind for h, p in zip(found.headings, line.places, strict=True) if p.sign}
    assert of["accuracy/clean"] == "verified"
    assert of["acr[sigma=0.25]"] == "imported"
    page = render(metrics.query("headline"), {}, NOTHING, marks=MARKS)
    assert '<a href="./../shift/manifest.json">' in page
    assert '<a href="./../cohen%20run">' in page
    assert "/machine/run" in page and 'href=".//machine' not in page
    assert "abababababab…" in page
    assert all(KINDS[kind].words in text_of(page) for kind in ("verified", "rechecked", "imported"))
    assert KINDS["published"].words not in text_of(page)
    assert render(metrics.query("headline"), {}, NOTHING, marks=MARKS) == page


def test_a_mark_of_no_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="the mark of net in shift is 'sure', expected one of verified, rechecked"):
        legend({("shift", "net"): Mark("sure")}, False)
    assert origins({}) is None


def test_hostile_marks_lead_nowhere(metrics: pd.DataFrame) -> None:
    marks = {("shift", CHECKPOINTS[0]): Mark("verified", "javascript:alert(1)", "\\\\host\\x", "<b>")}
    page = render(metrics.query("headline"), {}, NOTHING, marks=marks)
    assert 'href="./javascript%3Aalert%281%29"' in page
    assert 'href="./%5C' not in page
    assert "<b>&lt;" not in page and "&lt;b&gt;" in page


def test_cards_tell_what_is_traded_with_each_point_where_it_is(metrics: pd.DataFrame) -> None:
    found = profiles(measures(metrics), CHECKPOINTS, {"checkpoints": [{"id": CHECKPOINTS[0], "kind": "timm"}]})
    assert [card.checkpoint for card in found.cards] == list(CHECKPOINTS)
    assert [card.about for card in found.cards] == ["timm", "", "", ""]
    assert [(trade.up, trade.across) for trade in found.cards[0].trades][:2] == [
        ("accuracy/mean, %", "accuracy/clean, %"), ("certified@0.50[sigma=0.25], %", "accuracy/clean, %"),
    ]  # fmt: skip
    values = metrics.set_index(["checkpoint", "metric"])["value"]
    for card in found.cards:
        said = html.unescape(card.trades[0].svg)
        told = f"{100 * values[card.checkpoint, 'accuracy/mean']:.1f} against "
        assert told + f"{100 * values[card.checkpoint, 'accuracy/clean']:.1f}" in said
    assert found.shared.count("<circle") == len(found.cards[0].trades) * len(CHECKPOINTS)


def test_points_of_a_chart_are_where_their_values_are() -> None:
    points = [Point(x, y, (nan, nan), (y - 0.05, y + 0.05)) for x, y in ((0.2, 0.1), (0.4, 0.3), (0.6, 0.5))]
    chart = Scatter(points, (100.0, 100.0), "trade-0")
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart.symbol)
    (x0, y0), (x1, y1), (x2, y2) = [(float(x), float(y)) for x, y in circles]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert x1 > x0 and y1 < y0
    numbers = {text: float(at) for at, text in re.findall(r'<text x="([\d.]+)" y="144">(\d+)<', chart.symbol)}
    assert numbers["40"] == pytest.approx(x1, abs=0.11)
    marked = chart.marking(points[1], 7, "<title>", "a & b")
    assert f"M{x1} " in marked and "&lt;title&gt;" in marked and 'id="trade-0-7"' in marked


def test_one_checkpoint_has_a_card_without_a_chart() -> None:
    rows = [row("a", "accuracy/clean", "clean", 0.9, 0.01), row("a", "accuracy/mean", "corruptions", 0.5, 0.01)]
    (card,) = profiles(measures(pd.DataFrame(rows)), ["a"], {}).cards
    assert card.trades == []
    assert card.said == "No other is shown to be better in 2 of 2 ranked measures."


@pytest.mark.parametrize(
    ("kinds", "sentence"),
    [
        (["timm"], "How robust 1 image classifier is: 1 measurement on 1 bench (shift)."),
        (["timm", "local"], "How robust 2 image classifiers are: 2 measurements on 1 bench (shift)."),
        (["denoiser"], "What 1 denoiser does: 1 measurement on 1 bench (shift)."),
        (["timm", "denoiser", "denoiser"], "How robust 1 image classifier is, and what 2 denoisers do: 3"),
        ([], "How robust 1 checkpoint is"),
    ],
)
def test_the_first_sentence_takes_no_denoiser_for_a_classifier(kinds: list[str], sentence: str) -> None:
    rows = [row(f"c{number}", "unheard of", "g", 0.5, 0.01) for number in range(len(kinds) or 1)]
    manifest: dict[str, Any] = {"checkpoints": [{"id": f"c{n}", "kind": kind} for n, kind in enumerate(kinds)]}
    assert sentence in text_of(render(pd.DataFrame(rows), manifest, NOTHING))


def test_notices_of_many_checkpoints_are_one_and_abstentions_are_told() -> None:
    rows = [row(f"c{n}", "accuracy/clean", "clean", 0.9, 0.01, complete=False) for n in range(9)]
    rows += [row(f"c{n}", "abstain", "sigma=0.50", 0.01 * n, 0.005) for n in range(4)]
    told = [f"{notice.label} {notice.text}" for notice in notices(pd.DataFrame(rows), {})]
    assert told == [
        "partial 9 checkpoints, shift: 1 metric each from a part of the declared samples; not ranked.",
        "abstains certificates, sigma=0.50: c1, c2, c3, on 1.0 to 3.0 % of the samples, which count as not certified.",
    ]


def test_a_page_of_fifty_checkpoints_has_room_in_five_megabytes() -> None:
    """What a checkpoint of 200 metrics adds decides, as all that is shared is counted once; measured on few."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/page.py"))
    few, more = (len(render(script["made_up"](count, 200), {}, NOTHING).encode()) for count in (2, 4))
    assert few + 48 * (more - few) / 2 < 5_000_000
