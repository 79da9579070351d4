"""The files of a report: the same figures in each, the same bytes each time, and none where something is wrong."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from robustbench_diffaug import cli, runs
from robustbench_diffaug.report import formats, json_report, tables
from robustbench_diffaug.report import published as publications
from robustbench_diffaug.report.wide import wide
from tests.small_runs import certified

ALL = ("html", "csv", "md", "latex", "json")
IDS = ("<script>alert(1)</script>|`x`", "=cmd()+diffaug", "\u202eevil😀", "=cmd()")


def renamed(metrics: pd.DataFrame) -> pd.DataFrame:
    names = dict(zip(metrics["checkpoint"].unique(), IDS, strict=True))
    return metrics.assign(checkpoint=metrics["checkpoint"].map(names))


def test_wide_has_every_figure_once(metrics: pd.DataFrame, manifest: dict[str, Any]) -> None:
    found = wide(metrics, publications.rows(metrics, manifest))
    assert found["checkpoint"].tolist() == list(metrics["checkpoint"].unique())
    assert set(found["source"]) == {"measured"}
    at = found.set_index("checkpoint")
    counted = 0
    for record in metrics.to_dict("records"):
        names = [str(record["metric"]), f"{record['metric']}[{record['group']}]"]
        (name,) = [name for name in names if name in at.columns]
        assert at.loc[record["checkpoint"], name] == record["value"]
        counted += 1
    assert counted == at.drop(columns="source").notna().to_numpy().sum() == len(metrics)


def test_wide_tells_benches_and_published_rows_apart() -> None:
    columns = ["bench", "metric", "group", "checkpoint", "value"]
    made = [("a", "accuracy", "x", "n", 0.1), ("b", "accuracy", "x", "n", 0.2), ("b", "ece", "x", "m", 0.3)]
    rows = pd.DataFrame(made, columns=columns)
    others = pd.DataFrame([("b", "accuracy", "x", "n", 0.9)], columns=columns).assign(published="table")
    found = wide(rows, others)
    assert list(found.columns) == ["checkpoint", "source", "a:accuracy", "b:accuracy", "ece"]
    assert found["source"].tolist() == ["measured", "measured", "published, table"]
    assert found["b:accuracy"].tolist()[0::2] == [0.2, 0.9] and found["ece"].isna().tolist() == [True, False, True]


def test_cells_that_begin_as_formulas_are_neutralised(metrics: pd.DataFrame, manifest: dict[str, Any]) -> None:
    changed = renamed(metrics)
    files = formats.written(changed, tables.leaderboard(changed), manifest, ALL, ["diffaug-table1"])
    for name in ("wide.csv", "diffaug-table1.csv"):
        for line in files[name].decode().splitlines()[1:]:
            assert not line.startswith(("=", "+", "-", "@"))
        assert "'=cmd()" in files[name].decode()


def test_json_has_the_numbers_of_metrics_csv(metrics: pd.DataFrame, manifest: dict[str, Any]) -> None:
    changed = renamed(metrics)
    changed.loc[changed.index[0], "low"], changed.loc[changed.index[1], "high"] = -np.inf, np.nan
    board = tables.leaderboard(changed)
    told = manifest | {"remarks": ["one"]}
    text = json_report.document(changed, board, told, publications.rows(changed, told)).decode()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(text, parse_constant=refuse)
    assert list(found) == [
        "schema_version",
        "suite",
        "failures",
        "notices",
        "remarks",
        "leaderboard",
        "metrics",
        "published",
    ]
    csv = pd.read_csv(io.BytesIO(tables.to_csv(changed)), dtype=str, keep_default_na=False)
    assert len(csv) == len(found["metrics"])
    for line, record in zip(csv.to_dict("records"), found["metrics"], strict=True):
        assert list(record) == list(line)
        for key in ("value", "low", "high"):
            assert line[key] == ("" if record[key] is None else str(record[key]))
        assert str(line["checkpoint"]).removeprefix("'") == record["checkpoint"].encode("utf-8", "replace").decode()
        assert (str(line["n"]), str(line["complete"])) == (str(record["n"]), str(record["complete"]))
    assert found["metrics"][0]["low"] == "-inf" and found["metrics"][1]["high"] is None
    for row, record in zip(board.to_dict("records"), found["leaderboard"], strict=True):
        assert record["checkpoint"] == row["checkpoint"]
        for name, _ in tables.headlines(changed):
            assert record["headlines"][name]["value"] == row[name]
            assert record["headlines"][name]["rank"] == row[f"{name}_rank"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    return certified(tmp_path_factory.mktemp("made"), 6, "bayes+diffaug", (0, 0.5))


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *map(str, words)])
    shown = capsys.readouterr()
    return int(str(ended.value.code)), shown.out, shown.err


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


def test_a_report_in_every_format(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--format", "csv,md,latex,json", "--layout", "table13", "--layout", "diffaug-table13")
    code, out, _ = command(capsys, run, "-o", tmp_path / "one", *words)
    assert not set(contents(run)) & formats.NAMES  # the run's own report has none of them
    assert code == 0 and f"report  {tmp_path / 'one/metrics.csv'}" in out
    assert out.count(f"layout  {tmp_path / 'one/diffaug-table13'}.md, .tex, .csv") == 1
    layout = {f"diffaug-table13.{ending}" for ending in ("md", "tex", "csv")}
    written = contents(tmp_path / "one")
    assert {*layout, "report.md", "report.tex", "report.json", "wide.csv", "metrics.csv", "leaderboard.csv"} <= set(
        written
    )
    assert "index.html" not in written
    listed = {line.split("  ")[1] for line in written["digests.txt"].decode().splitlines()}
    assert listed == set(written) - {"digests.txt"}
    metrics = pd.read_csv(run / "metrics.csv").set_index(["checkpoint", "metric"])["value"]
    frame = pd.read_csv(tmp_path / "one/diffaug-table13.csv").set_index("network")
    assert frame["r0.50"].to_dict() == {
        name: metrics[name, "certified-envelope@0.50"] for name in ("bayes", "bayes+diffaug")
    }
    runs.report(run, tmp_path / "two", formats=("csv", "md", "latex", "json"), layouts=["diffaug-table13"])
    assert contents(tmp_path / "two") == written
    assert command(capsys, run, "-o", tmp_path / "one", "--format", "md")[0] == 0  # what it does not have goes
    assert set(contents(tmp_path / "one")) == {"manifest.json", "digests.txt", "report.md"}


def test_bad_usage_writes_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for words, said in (
        ((run, "-o", out, "--layout", "tabel13"), "no layout is called so; did you mean diffaug-table13?"),
        (
            (run, "-o", out, "--layout", "table3"),
            "layout diffaug-table3: the run has measured none of ASH, MSP, ReAct, SCALE",
        ),
        ((run, "-o", out, "--format", "tex"), "no format is called 'tex'"),
        ((run, "-o", out, "--format", "jsn"), "did you mean json?"),
        ((run, "--layout", "table13"), "a report with --layout is not the run's own; say where it goes with --output"),
        ((run, "--format", "latex"), "say where it goes with --output"),
    ):
        code, printed, err = command(capsys, *words)
        assert (code, printed) == (2, "") and said in err and err.count("\n") == 1, err
        assert not out.exists()
