"""The paper's tables, filled: figures are the run's, averages those of their columns, and nothing is invented."""

from math import isnan
from statistics import fmean
from typing import Any

import pandas as pd
import pytest

from robustbench_diffaug.data.corruptions import COMMON
from robustbench_diffaug.report.layouts import Filled, filled, named
from robustbench_diffaug.report.paper_tables import LAYOUTS, Column
from robustbench_diffaug.report.published import publication
from robustbench_diffaug.report.published import rows as published_rows

Manifest = dict[str, Any]


def figure(bench: str, checkpoint: str, metric: str, value: float, **changed: object) -> dict[str, object]:
    """A row of metrics."""
    found: dict[str, object] = {
        "suite": "s", "bench": bench, "evaluator": "e", "checkpoint": checkpoint, "group": "all", "metric": metric,
        "value": value, "low": value - 0.05, "high": value + 0.05, "n": 100, "n_available": 100, "better": "higher",
        "unit": "fraction", "complete": True, "headline": False,
    }  # fmt: skip
    return found | changed


def corrupted(bench: str, severities: tuple[int, ...] = (5,), kind: str = "corrupted") -> list[dict[str, object]]:
    return [
        {"bench": bench, "kind": kind, "name": f"{c}@s{s}", "group": c, "severity": s}
        for c in COMMON
        for s in severities
    ]


def fill(name: str, rows: list[dict[str, object]], manifest: Manifest) -> Filled:
    metrics = pd.DataFrame(rows)
    return filled(name, metrics, manifest, published_rows(metrics, manifest))


def texts(found: Filled) -> dict[str, dict[str, str]]:
    """The figures of the first table as texts, by the row's name and the column's heading."""
    grid = found.grids[0]
    heads = ["".join(column) for column in grid.columns]
    return {"".join(title): dict(zip(heads, (cell[0] for cell in cells), strict=True)) for title, cells in grid.rows}


def said(found: Filled) -> str:
    return " ".join("".join(note) for note in found.grids[0].notes)


MODES = {"dda": "dda/", "dda-se": "dda-se/", "de": "de/", "default": ""}


@pytest.fixture
def shift() -> tuple[list[dict[str, object]], Manifest]:
    """Two pairs and a control, in all modes."""
    rows = []
    for place, checkpoint in enumerate(("a", "a+diffaug", "b", "b+diffaug", "control")):
        for step, prefix in enumerate(MODES.values()):
            value = 0.1 + 0.1 * place + 0.013 * step
            rows.append(figure("shift", checkpoint, f"{prefix}accuracy/mean", value))
            rows.append(figure("shift", checkpoint, f"{prefix}accuracy/clean", value + 0.3))
    return rows, {"datasets": corrupted("shift")}


def test_table_1_holds_the_runs_figures_and_their_averages(shift: tuple[list[dict[str, object]], Manifest]) -> None:
    found = fill("diffaug-table1", *shift)
    frame = found.frame.set_index("network")
    assert list(frame.index) == [
        "a", "a+diffaug", "b", "b+diffaug", "Avg", "Avg (No-DiffAug)", "Avg (DiffAug)", "control"
    ]  # fmt: skip
    at = {(str(row["checkpoint"]), str(row["metric"])): float(str(row["value"])) for row in shift[0]}
    wide = frame.T
    for sets, what in (("c", "accuracy/mean"), ("test", "accuracy/clean")):
        for name in ("a", "a+diffaug", "b", "b+diffaug", "control"):
            values = [at[name, prefix + what] for prefix in MODES.values()]
            assert [wide[name][f"{sets}_{mode}"] for mode in MODES] == values
            assert wide[name][f"{sets}_average"] == pytest.approx(fmean(values), abs=1e-15)
            assert wide[name][f"{sets}_de_low"] == values[2] - 0.05
        for mode in (*MODES, "average"):
            column = frame[f"{sets}_{mode}"]
            assert column["Avg"] == pytest.approx(fmean(column[["a", "a+diffaug", "b", "b+diffaug"]]), abs=1e-15)
            assert column["Avg (No-DiffAug)"] == pytest.approx(fmean(column[["a", "b"]]), abs=1e-15)
            assert column["Avg (DiffAug)"] == pytest.approx(fmean(column[["a+diffaug", "b+diffaug"]]), abs=1e-15)
            assert isnan(wide["Avg"][f"{sets}_{mode}_low"])
    shown = texts(found)
    assert shown["a"]["C: DE (%)"] == "12.6" and shown["a"]["C: Avg (%)"] == "12.0"
    assert "C: DDA-SE is dda-se/accuracy/mean of bench shift (n = 100, 15 corruptions)" in said(found)
    assert "Averages over rows are over the pairs alone." in said(found)


def test_what_was_not_measured_is_a_dash(shift: tuple[list[dict[str, object]], Manifest]) -> None:
    rows = [
        r
        for r in shift[0]
        if "dda" not in str(r["metric"]) and (r["checkpoint"], r["metric"]) != ("b", "de/accuracy/mean")
    ]
    found = fill("diffaug-table1", rows, shift[1])
    shown = texts(found)
    assert shown["a"]["C: DDA"] == shown["a"]["C: Avg"] == shown["Avg"]["C: Avg"] == "–"
    assert shown["b"]["C: DE (%)"] == shown["Avg"]["C: DE (%)"] == shown["Avg (No-DiffAug)"]["C: DE (%)"] == "–"
    assert shown["Avg (DiffAug)"]["C: DE (%)"] == "32.6"
    assert "Not measured: C: DDA, C: DDA-SE, Test: DDA, Test: DDA-SE." in said(found)


def test_modes_of_different_images_have_no_average(shift: tuple[list[dict[str, object]], Manifest]) -> None:
    rows = [r | {"bench": "adaptation", "n": 32} if "dda" in str(r["metric"]) else r for r in shift[0]]
    found = fill("diffaug-table1", rows, {"datasets": [*corrupted("shift"), *corrupted("adaptation")]})
    shown = texts(found)
    assert shown["a"]["C: DDA (%)"] == "10.0" and shown["a"]["C: Avg"] == "–"
    assert "C: Avg is left out where its columns are of different numbers of images." in said(found)
    assert "of bench adaptation (n = 32, 15 corruptions)" in said(found)


def test_the_bench_that_fills_most_of_a_table_fills_it(shift: tuple[list[dict[str, object]], Manifest]) -> None:
    """Of two benches the later one has all modes, so that its columns are of the same images."""
    large = [r | {"n": 5000, "value": 0.9} for r in shift[0] if "dda" not in str(r["metric"])]
    rows = large + [r | {"bench": "adaptation", "n": 32} for r in shift[0]]
    found = fill("diffaug-table1", rows, {"datasets": [*corrupted("shift"), *corrupted("adaptation")]})
    assert texts(found)["a"]["C: Default (%)"] == "13.9" and texts(found)["a"]["C: Avg (%)"] == "12.0"
    assert "those of shift" in said(found)


def test_a_mean_over_severities_is_not_that_of_severity_5(shift: tuple[list[dict[str, object]], Manifest]) -> None:
    manifest = {"datasets": corrupted("shift", (1, 3, 5))}
    more = [figure("shift", "a", "accuracy/mean@s5", 0.77)]
    shown = texts(fill("diffaug-table1", [*shift[0], *more], manifest))
    assert shown["a"]["C: Default (%)"] == "77.0" and shown["b"]["C: Default (%)"] == "–"
    assert shown["a"]["C: DE"] == "–" and shown["a"]["Test: DE (%)"] == "42.6"


def test_figures_of_a_part_are_marked(shift: tuple[list[dict[str, object]], Manifest]) -> None:
    rows = [r | {"complete": r["checkpoint"] != "a"} for r in shift[0]]
    found = fill("diffaug-table1", rows, shift[1])
    shown = texts(found)
    assert shown["a"]["C: DE (%)"] == "12.6*" and shown["Avg"]["C: DE (%)"].endswith("*")
    assert not shown["b"]["C: DE (%)"].endswith("*") and "part of the declared samples" in said(found)


def test_table_2_is_of_the_plain_network_and_the_ensemble() -> None:
    sets = ("r", "s", "sketch", "a", "d")
    rows = []
    for checkpoint, more in (("net", 0.0), ("net+diffaug", 0.05)):
        for prefix, mode in (("", 0.0), ("de/", 0.02)):
            rows.append(figure("b", checkpoint, f"{prefix}accuracy/mean", 0.2 + more + mode))
            rows += [figure("b", checkpoint, f"{prefix}accuracy/imagenet-{s}", 0.3 + more + mode) for s in sets]
    found = fill("diffaug-table2", rows, {"datasets": corrupted("b")})
    shown = texts(found)
    assert list(shown) == ["net", "net+diffaug, DE", "difference"]
    assert [shown[row]["R (%)"] for row in shown] == ["30.0", "37.0", "+7.0"]
    assert shown["net"]["Avg (%)"] == f"{100 * (0.2 + 5 * 0.3) / 6:.1f}"
    assert found.frame["mode"].tolist() == ["", "de", ""]
    assert "R with DE is de/accuracy/imagenet-r of bench b" in said(found)


def test_table_3_takes_the_runs_average_where_it_is_of_the_same_scores() -> None:
    values = {"ash": 0.8, "msp": 0.7, "react": 0.75, "scale": 0.83}
    mean = fmean(values.values())
    rows = [figure("ood", "net", f"auroc/{score}/near", value) for score, value in values.items()]
    same = fill("diffaug-table3", [*rows, figure("ood", "net", "auroc/average/near", mean)], {}).frame.iloc[0]
    assert (same["average"], same["average_low"]) == (mean, mean - 0.05)
    other = fill("diffaug-table3", [*rows, figure("ood", "net", "auroc/average/near", 0.9)], {}).frame.iloc[0]
    assert other["average"] == pytest.approx(mean) and isnan(other["average_low"])
    more = fill("diffaug-table3", [*rows, figure("held-out", "six", "auroc/msp/near", 0.6)], {})
    assert "six" not in texts(more) and "taken of one bench alone: those of held-out." in said(more)


def test_table_4_takes_the_first_scale_with_guidance() -> None:
    rows = [figure("generation", "noisy", f"frechet@scale={s}", v, unit="squared features", better="lower", group="f")
            for s, v in ((0, 9.0), (1, 4.0), (3, 5.0))]  # fmt: skip
    rows.append(figure("noise", "noisy", "noisy/random-time/accuracy/clean", 0.62, group="clean"))
    shown = texts(fill("diffaug-table4", rows, {}))["noisy"]
    assert shown["Frechet distance (squared features)"] == "4" and shown["accuracy (%)"] == "62.0"


def test_table_13_is_the_best_level_or_the_only_one() -> None:
    levels = [figure("c", "net", "certified@0.50", v, group=f"sigma={s}") for s, v in ((0.25, 0.3), (0.5, 0.4))]
    best = figure("c", "net", "certified-envelope@0.50", 0.4, group="all sigmas")
    assert texts(fill("diffaug-table13", [*levels, best], {}))["net"]["r = 0.5 (%)"] == "40.0"
    assert texts(fill("diffaug-table13", levels[:1], {}))["net"]["r = 0.5 (%)"] == "30.0"
    assert texts(fill("diffaug-table13", levels[:1], {}))["net"]["r = 3.0"] == "–"
    with pytest.raises(ValueError, match=r"has measured none of r = 0.5, .*; the suite certify does some"):
        fill("diffaug-table13", levels, {})  # two levels, and nothing says which is best


def test_published_rows_stand_apart_where_the_benchmark_is_the_papers(
    shift: tuple[list[dict[str, object]], Manifest],
) -> None:
    here = fill("diffaug-table1", *shift)
    assert len(here.grids) == 1 and set(here.frame["source"]) == {"measured"}
    clean = {"bench": "shift", "kind": "imagenet", "name": "clean", "group": "clean", "severity": 0}
    found = fill("diffaug-table1", shift[0], {"datasets": [*corrupted("shift", kind="imagenet"), clean]})
    assert "".join(found.grids[1].title).endswith("Published.")
    rows = found.frame[found.frame["source"] == "published, diffaug-table1"].set_index("network")
    known = publication("diffaug-table1")
    for line, row in known.rows.items():
        assert rows.T[line][list(known.columns)].tolist() == pytest.approx([v / 100 for v in row.values if v])
    printed = {"".join(title): [cell[0] for cell in cells] for title, cells in found.grids[1].rows}
    assert printed["ViT-B/16"] == ["43.6", "52.9", "48.25", "50.75", "67.4", "81.72", "80.43", "83.71"]


def test_layouts_have_the_columns_of_the_published_tables() -> None:
    for name in ("diffaug-table1", "diffaug-table2", "diffaug-table3", "diffaug-table13"):
        known = publication(name)
        columns = [column.key for column in LAYOUTS[name].columns]
        assert [key for key in columns if key in known.columns] == list(known.columns)
        assert set(columns) - set(known.columns) == set(known.averages)
        heads = {c.key: c.head for c in LAYOUTS[name].columns if isinstance(c, Column)}
        assert heads == {key: column.head for key, column in known.columns.items()}


def test_names_with_and_without_the_prefix() -> None:
    assert named("table13") == named("diffaug-table13") == "diffaug-table13"
    with pytest.raises(ValueError, match="--layout table5: no layout is called so; did you mean diffaug-table"):
        named("table5")
