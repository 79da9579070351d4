"""Metrics that cannot be computed cost no more than themselves: a failed cell, and the report is there."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from robustbench_diffaug import cli, recorded, runs, summary
from robustbench_diffaug.document import dump
from robustbench_diffaug.evaluators.shift import Shift
from robustbench_diffaug.records import Metric
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import load

MODULE = """
from typing import Literal

from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.records import Metric
from robustbench_diffaug.stats import proportion

FAULT = "raises"


class Brittle(Evaluator):
    kind: Literal["brittle:Brittle"] = "brittle:Brittle"
    only: str = "tilted"

    def observe(self, model, view, batch):
        hit = model.logits(view.images[:, 0]).argmax(1) == batch.labels
        return {"hit": hit, "mine": hit | True if model.id == self.only or not self.only else hit & False}

    def metrics(self, records):
        if not len(records):
            return
        yield records.metric("hit", "all", proportion(records["hit"]), headline=True)
        if records["mine"].any():
            if FAULT == "raises":
                raise ZeroDivisionError("of a sum\\nby nothing <b>")
            if FAULT == "twice":
                yield records.metric("hit", "all", proportion(records["hit"]), headline=True)
            if FAULT == "number":
                yield 0.5
"""
SHIFT = {"name": "shift", "evaluator": {"kind": "shift"}, "datasets": [{"kind": "mixture", "size": 9}]}
CHECKPOINTS = [
    {"kind": "mixture", "id": "bayes", "classes": 4, "temperature": 0.0016},
    {"kind": "mixture", "id": "tilted", "classes": 4, "temperature": 0.0016, "tilt": 120},
]


@pytest.fixture
def brittle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of an evaluator whose metrics raise; its attribute FAULT says how."""
    (tmp_path / "brittle.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "brittle", raising=False)
    yield __import__("brittle")
    sys.modules.pop("brittle", None)


def write_suite(folder: Path, **settings: str) -> Path:
    bench = {"name": "mine", "evaluator": {"kind": "brittle:Brittle", **settings}, "datasets": SHIFT["datasets"]}
    path = folder / "suite.yaml"
    path.write_bytes(dump({"name": "small", "checkpoints": CHECKPOINTS, "benches": [bench, SHIFT]}))
    return path


def figures(root: Path) -> set[tuple[str, str]]:
    """Bench and checkpoint of each figure."""
    with (root / "metrics.csv").open(newline="") as file:
        return {(row["bench"], row["checkpoint"]) for row in csv.DictReader(file)}


def records(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*.parquet") if path.parent != root}


OTHERS = {("mine", "bayes"), ("shift", "bayes"), ("shift", "tilted")}
REASONS = {
    "raises": "its metrics cannot be computed: ZeroDivisionError: of a sum by nothing <b>",
    "twice": "its metrics cannot be computed: the evaluator brittle:Brittle gives two metrics hit of the group all",
    "number": "its metrics cannot be computed: TypeError: the evaluator brittle:Brittle yields a float, "
    "which is no Metric",
}


@pytest.mark.parametrize("fault", REASONS)
def test_the_others_keep_their_figures(fault: str, brittle: Any, tmp_path: Path) -> None:
    brittle.FAULT = fault
    loaded, options = load(str(write_suite(tmp_path)), trust=True), runs.Options(tmp_path / "run", trust=True)
    done = runs.execute(loaded, options)
    failure = {"bench": "mine", "checkpoint": "tilted", "dataset": "all", "reason": REASONS[fault]}
    assert done.failures == [failure]
    assert figures(done.root) == OTHERS == set(zip(done.metrics["bench"], done.metrics["checkpoint"], strict=True))
    assert json.loads((done.root / "manifest.json").read_text())["failures"] == [failure]
    shown = REASONS[fault].replace("<", "&lt;").replace(">", "&gt;")
    assert f"mine · tilted · all · {shown}" in (done.root / "index.html").read_text()
    assert list(done.leaderboard["checkpoint"]) == ["bayes", "tilted"]
    check = subprocess.run(["sha256sum", "--quiet", "-c", "digests.txt"], cwd=done.root, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout
    # As long as it fails, each run tries again, and computes no record for it.
    kept = records(done.root)
    again = runs.execute(loaded, options)
    assert (again.failures, again.computed, records(done.root)) == ([failure], 0, kept)
    brittle.FAULT = ""
    mended = runs.execute(loaded, options)
    assert (mended.failures, mended.computed, records(done.root)) == ([], 0, kept)
    assert figures(done.root) == {*OTHERS, ("mine", "tilted")}
    assert json.loads((done.root / "manifest.json").read_text())["failures"] == []
    before = {path: path.stat().st_mtime_ns for path in done.root.rglob("*")}
    assert runs.execute(loaded, options).digest == mended.digest  # and now there is nothing to do
    assert {path: path.stat().st_mtime_ns for path in done.root.rglob("*")} == before


def test_comparisons_that_came_before_a_failure_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = Metric("first", "all", 1.0)

    def compare(*_: object) -> Iterator[tuple[str, Metric]]:
        yield "bayes", first
        raise ValueError("there is no second")

    monkeypatch.setattr(Shift, "compare", compare)
    bench = load("smoke").suite.benches[0]
    read = summary._reader(bench, Store(tmp_path), {})
    assert summary._compared(bench, read, ()) == ({"bayes": [first]}, "there is no second")


def test_a_run_without_any_figure_has_a_report(brittle: Any, tmp_path: Path) -> None:
    suite = write_suite(tmp_path, only="")
    loaded = load(
        str(suite),
        trust=True,
        settings=["benches.shift.evaluator.kind=brittle:Brittle", "benches.shift.evaluator.only=''"],
    )
    done = runs.execute(loaded, runs.Options(tmp_path / "run", trust=True))
    assert [(failure["bench"], failure["checkpoint"]) for failure in done.failures] == [
        (bench, checkpoint) for bench in ("mine", "shift") for checkpoint in ("bayes", "tilted")
    ]
    assert len(done.metrics) == len(done.leaderboard) == 0
    assert "This run has no metrics yet." in (tmp_path / "run/index.html").read_text()


def test_damaged_records_are_no_fault_of_an_evaluator(brittle: Any, tmp_path: Path) -> None:
    loaded, options = load(str(write_suite(tmp_path)), trust=True), runs.Options(tmp_path / "run", trust=True)
    runs.execute(loaded, options)
    path = sorted((tmp_path / "run/records/mine").rglob("*.parquet"))[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        runs.execute(loaded, options)


def test_the_command_names_it_and_exits_with_1(
    brittle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_suite(tmp_path)
    monkeypatch.chdir(tmp_path)

    def rdiff() -> tuple[object, str, list[str]]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["run", "suite.yaml", "-o", "run", "-q", "--trust"])
        shown = capsys.readouterr()
        return caught.value.code, shown.out, shown.err.splitlines()

    line = f"failed: mine / tilted / all: {REASONS['raises']}"
    code, out, errors = rdiff()
    assert (code, errors) == (1, [line])
    assert "report  run/index.html" in out
    assert "hit (%)\n  bayes  " in out
    kept = records(Path("run"))
    code, out, errors = rdiff()
    assert (code, errors) == (1, [line])
    assert figures(Path("run")) == OTHERS
    brittle.FAULT = ""
    code, _, errors = rdiff()
    assert (code, [error for error in errors if error.startswith("failed")]) == (0, [])
    assert figures(Path("run")) == {*OTHERS, ("mine", "tilted")}
    assert records(Path("run")) == kept


@pytest.mark.parametrize("name", ["1e-3", "0o7", "no", "0x10", "1_000", "12", "true"])
def test_a_lock_keeps_names_that_look_like_something_else(name: str, tmp_path: Path) -> None:
    data = {"name": name, "checkpoints": [CHECKPOINTS[0] | {"id": name}], "benches": [SHIFT | {"name": name}]}
    (tmp_path / "suite.yaml").write_bytes(dump(data))
    loaded = load(str(tmp_path / "suite.yaml"))
    (tmp_path / recorded.LOCK).write_bytes(runs.lock(loaded.suite))
    assert load(str(tmp_path / recorded.LOCK)).suite == loaded.suite
    runs.own(tmp_path, loaded.suite)  # it is found to be its folder
