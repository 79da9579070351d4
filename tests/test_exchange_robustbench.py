"""RobustBench's published rows give its published aggregates; what is written reads back; bad files are one line."""

import csv
import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from io import StringIO
from math import isnan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_diffaug.baselines import BASELINES, mce
from robustbench_diffaug.exchange import robustbench
from robustbench_diffaug.report import tables
from robustbench_diffaug.summary import COLUMNS

# Rows of model_info/{imagenet,cifar10}/corruptions/unaggregated_results.csv of RobustBench/robustbench 78fcc9e (MIT).
FOLDER = Path(__file__).parent / "exchange"
IMAGENET, CIFAR10 = FOLDER / "robustbench_imagenet.csv", FOLDER / "robustbench_cifar10.csv"

# corruptions_acc and corruptions_mce of the JSON file of each model, beside the tables, at the same commit.
PUBLISHED = {
    "AlexNet": (21.12, 100.0),
    "Standard_R50": (39.48, 76.38),
    "Hendrycks2020AugMix": (49.33, 64.17),
    "Hendrycks2020Many": (52.9, 60.04),
}
PUBLISHED_CIFAR10 = {"Standard": 73.46, "Hendrycks2020AugMixWRN": 88.82, "Hendrycks2020AugMixResNeXt": 89.09}

Command = Callable[..., tuple[int, str, str]]


def value(frame: pd.DataFrame, checkpoint: str, metric: str) -> float:
    rows = frame[(frame["checkpoint"] == checkpoint) & (frame["metric"] == metric)]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


def test_imagenet_gives_the_published_aggregates(tmp_path: Path) -> None:
    frame = robustbench.import_run(IMAGENET, tmp_path / "run").metrics
    for model, (accuracy, error) in PUBLISHED.items():
        assert round(100 * value(frame, model, "accuracy/mean"), 2) == accuracy
        assert round(100 * value(frame, model, "mce/robustbench-alexnet"), 2) == error


def test_cifar10_gives_the_published_accuracies_and_no_mce(tmp_path: Path) -> None:
    frame = robustbench.import_run(CIFAR10, tmp_path / "run").metrics
    for model, accuracy in PUBLISHED_CIFAR10.items():
        assert round(100 * value(frame, model, "accuracy/mean"), 2) == accuracy
    assert not frame["metric"].str.startswith("mce/").any()


def test_the_aggregates_are_those_of_robustbenchs_own_reader() -> None:
    """Its `corruptions_evaluation` takes the means over a table that pandas read so."""
    table = pd.read_csv(IMAGENET, header=[0, 1], index_col=0)
    results = robustbench.read(IMAGENET)
    frame = robustbench.metrics(results, "s", results.baselines())
    errors = 1 - table.T.groupby(level=0).mean().T
    for model in table.index:
        whole = table.loc[model].to_numpy().mean()
        assert value(frame, model, "accuracy/mean") == pytest.approx(whole, abs=1e-14)
        expected = (errors.loc[model] / errors.loc["AlexNet"]).mean()
        assert value(frame, model, "mce/robustbench-alexnet") == pytest.approx(expected, abs=1e-14)
        for corruption in errors.columns:
            assert value(frame, model, f"accuracy/{corruption}") == pytest.approx(1 - errors.loc[model, corruption])
    fifth = table.xs("5", axis=1, level=1).to_numpy().mean(axis=1)
    for model, mean in zip(table.index, fifth, strict=True):
        assert value(frame, model, "accuracy/mean@s5") == pytest.approx(mean, abs=1e-14)
    assert value(frame, "AlexNet", "accuracy/fog@s3") == 0.157


def test_the_published_mce_of_a_resnet_50_is_near(tmp_path: Path) -> None:
    """76.7 for the ResNet-50 baseline in the README of hendrycks/robustness 8190fe3, of ten times as many images."""
    results = robustbench.read(IMAGENET)
    assert 100 * mce(results.errors("Standard_R50"), BASELINES["hendrycks-alexnet"]) == pytest.approx(76.7, abs=0.5)


def test_a_baseline_is_a_column_of_its_own(tmp_path: Path) -> None:
    names = ("hendrycks-alexnet", "robustbench-alexnet", "Standard_R50", "Standard_R50")
    done = robustbench.import_run(IMAGENET, tmp_path / "run", names)
    assert {f"mce/{name}" for name in names} <= set(done.leaderboard.columns)
    assert done.metrics["metric"].str.startswith("mce/").sum() == 3 * len(PUBLISHED)
    assert value(done.metrics, "Standard_R50", "mce/Standard_R50") == pytest.approx(1, abs=1e-13)
    assert value(done.metrics, "AlexNet", "mce/robustbench-alexnet") == pytest.approx(1, abs=1e-13)
    assert value(done.metrics, "AlexNet", "mce/hendrycks-alexnet") != pytest.approx(1, abs=1e-5)


def test_another_alexnet_is_not_called_the_published_one(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text(IMAGENET.read_text().replace("AlexNet,0.2944", "AlexNet,0.2945"))
    found = robustbench.import_run(path, tmp_path / "run").leaderboard
    assert "mce/AlexNet" in found
    assert "mce/robustbench-alexnet" not in found


def test_a_run_folder_is_whole_and_says_what_it_is(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    done = robustbench.import_run(IMAGENET, root)
    names = ["digests.txt", "index.html", "leaderboard.csv", "manifest.json", "metrics.csv", "metrics.parquet"]
    assert sorted(path.name for path in root.iterdir()) == names
    checked = subprocess.run(["sha256sum", "-c", "digests.txt"], cwd=root, capture_output=True, text=True, check=True)
    assert checked.stdout.count(": OK") == len(names) - 1
    assert done.digest == hashlib.sha256((root / "digests.txt").read_bytes()).hexdigest()
    manifest = json.loads((root / "manifest.json").read_bytes())
    digest = hashlib.sha256(IMAGENET.read_bytes()).hexdigest()
    assert manifest["schema_version"] == 1
    assert manifest["imported"] == {"format": "robustbench", "file": IMAGENET.name, "sha256": digest}
    assert manifest["notices"][0].startswith("imported: no records, no intervals")
    assert list(manifest["baselines"]) == ["robustbench-alexnet"]
    page = (root / "index.html").read_text()
    assert "imported: no records, no intervals" in page
    assert "Hendrycks2020AugMix" in page
    assert not re.search(r"\bnan\b", page.lower())
    frame = pd.read_parquet(root / "metrics.parquet")
    assert list(frame.columns) == COLUMNS
    assert frame[["low", "high", "n", "n_available"]].isna().all(axis=None)
    assert set(frame["suite"]) == {"imagenet"}
    pd.testing.assert_frame_equal(pd.read_csv(root / "metrics.csv"), frame, check_dtype=False, check_exact=True)


def test_again_is_the_same_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "run"
    first = robustbench.import_run(IMAGENET, root)
    assert robustbench.import_run(IMAGENET, root).digest == first.digest
    before = {path: path.read_bytes() for path in root.iterdir()}
    with pytest.raises(ValueError, match=r"run is not empty and no import of robustbench_cifar10\.csv"):
        robustbench.import_run(CIFAR10, root)
    (root / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty"):
        robustbench.import_run(IMAGENET, root)
    (root / "notes.txt").unlink()
    (root / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="is not empty"):
        robustbench.import_run(IMAGENET, root)
    assert {path: path.read_bytes() for path in root.iterdir() if path.name != "manifest.json"} == {
        path: content for path, content in before.items() if path.name != "manifest.json"
    }
    with pytest.raises(ValueError, match="is not empty"):
        robustbench.import_run(IMAGENET, root / "metrics.csv")


@pytest.mark.parametrize("source", [IMAGENET, CIFAR10], ids=lambda path: path.stem)
def test_export_writes_the_file_that_was_imported(source: Path, rdiff: Command) -> None:
    code, out, err = rdiff("import", "robustbench", str(source), "-o", "run")
    assert (code, err) == (0, "")
    assert "accuracy/mean (%)" in out
    assert out.splitlines()[-2] == f"report  {Path('run/index.html')}"
    assert rdiff("export", "robustbench", "run", "-o", "out/table.csv")[0] == 0
    assert Path("out/table.csv").read_bytes() == source.read_bytes()


def made(values: dict[str, float], **changed: object) -> pd.DataFrame:
    row = {
        "suite": "s", "bench": "shift", "evaluator": "shift", "checkpoint": "net", "group": "g", "low": 0.0,
        "high": 1.0, "n": 10, "n_available": 10, "better": "higher", "unit": "fraction", "complete": True,
        "headline": False,
    }  # fmt: skip
    return pd.DataFrame([row | {"metric": metric, "value": value} | changed for metric, value in values.items()])


def saved(root: Path, frame: pd.DataFrame) -> Path:
    root.mkdir(exist_ok=True)
    (root / "metrics.parquet").write_bytes(tables.to_parquet(frame))
    return root


def test_a_run_of_ours_is_exported_without_its_modes(tmp_path: Path) -> None:
    own = made({"accuracy/clean": 0.9, "accuracy/fog@s5": 0.25, "accuracy/snow@s5": 0.5, "accuracy/fog": 0.3})
    modes = made({"de/accuracy/fog@s5": 0.75, "accuracy/mean@s5": 0.1, "accuracy@t=5": 0.2, "ece": 0.1})
    root = saved(tmp_path / "run", pd.concat([own, modes]))
    assert robustbench.export_run(root, tmp_path / "t.csv") == ["net"]
    assert (tmp_path / "t.csv").read_text() == ",fog,snow\n,5,5\nnet,0.25,0.5\n"


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    own = made({"accuracy/fog@s5": 0.25, "accuracy/snow@s5": 0.5})
    two = pd.concat([own, own.assign(bench="other")])
    cases = [
        (two, "", "has several benches of corruptions; name one with --bench: shift, other"),
        (two, "third", "has no accuracies under corruptions in bench third"),
        (own.assign(metric="ece"), "", "has no accuracies under corruptions"),
        (pd.concat([own, own[:1].assign(checkpoint="b")]), "", r"b has no complete accuracy under snow@s5; run"),
        (own.assign(complete=False), "", r"net has no complete accuracy under fog@s5; run"),
        (own.drop(columns="metric"), "", "cannot be read as metrics"),
    ]
    for frame, bench, message in cases:
        with pytest.raises(ValueError, match=message):
            robustbench.export_run(saved(tmp_path / "run", frame), out, bench)
    assert robustbench.export_run(saved(tmp_path / "run", two), tmp_path / "other.csv", "other") == ["net"]
    (tmp_path / "run/metrics.parquet").write_bytes(b"PAR1 and no more PAR1")
    with pytest.raises(ValueError, match="cannot be read as metrics"):
        robustbench.export_run(tmp_path / "run", out)
    with pytest.raises(ValueError, match=r"there is no .*nowhere/metrics\.parquet; give the folder of a run"):
        robustbench.export_run(tmp_path / "nowhere", out)
    assert not out.exists()
    with pytest.raises(ValueError, match="lies in the run folder"):
        robustbench.export_run(saved(tmp_path / "run", own), tmp_path / "run/metrics.csv")


HEADERS = ",fog,fog,snow,snow\n,1,2,1,2\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needed are two rows of headers"),
        (HEADERS, "needed are two rows of headers"),
        (HEADERS + "a,0.1,0.2,0.3\n", "t.csv:3: there are 4 cells, and the headers have 5"),
        (HEADERS + "a,0.1,0.2,0.3,\n", "t.csv:3: a, snow@s2: '' is no accuracy"),
        (HEADERS + "a,0.1,nan,0.3,0.4\n", "t.csv:3: a, fog@s2: 'nan' is no accuracy"),
        (HEADERS + "a,0.1,inf,0.3,0.4\n", "t.csv:3: a, fog@s2: 'inf' is no accuracy"),
        (HEADERS + "a,0.1,1_0,0.3,0.4\n", "t.csv:3: a, fog@s2: '1_0' is no accuracy"),
        (HEADERS + "a,0.1,=1+1,0.3,0.4\n", "t.csv:3: a, fog@s2: '=1+1' is no accuracy"),
        (HEADERS + "\na,58.3,0.1,0.3,0.4\n", "t.csv:4: a, fog@s1: 58.3 is no fraction in [0, 1]; divide percentages"),
        (HEADERS + "a,-0.1,0.1,0.3,0.4\n", "t.csv:3: a, fog@s1: -0.1 is no fraction"),
        (HEADERS + "a,1e999,0.1,0.3,0.4\n", "t.csv:3: a, fog@s1: inf is no fraction"),
        (HEADERS + "a,0.1,0.2,0.3,0.4\na,0.1,0.2,0.3,0.4\n", "t.csv:4: there are two rows of model a; remove one"),
        (HEADERS + "=cmd|'/C calc'!A0,0.1,0.2,0.3,0.4\n", "t.csv:3: \"=cmd|'/C calc'!A0\" is no name of a model"),
        (HEADERS + '"a\nb",0.1,0.2,0.3,0.4\n', "t.csv:4: 'a\\nb' is no name of a model"),
        (HEADERS + ",0.1,0.2,0.3,0.4\n", "t.csv:3: '' is no name of a model"),
        (HEADERS + f"{'a' * 121},0.1,0.2,0.3,0.4\n", "is no name of a model"),
        (HEADERS + 'a,0.1,0.2,"0.3,0.4\n', "t.csv:3: no CSV: unexpected end of data"),
        (HEADERS + f"a,{'1' * 200000},0.2,0.3,0.4\n", "t.csv:3: no CSV: field larger than field limit"),
        ("model,fog,snow\n,1,1\na,0.1,0.2\n", "t.csv:1: no headers of RobustBench's"),
        (",fog,snow\na,0.1,0.2\nb,0.1,0.2\n", "t.csv:1: no headers of RobustBench's"),
        (",fog,snow\n,1\na,0.1,0.2\n", "t.csv:1: no headers of RobustBench's"),
        (",fog,../snow\n,1,1\na,0.1,0.2\n", "t.csv:1: '../snow' is no name of a corruption"),
        (",fog,mean\n,1,1\na,0.1,0.2\n", "t.csv:1: 'mean' is no name of a corruption"),
        (",fog,snow\n,1,6\na,0.1,0.2\n", "t.csv:2: '6' is no severity, 1 to 5, of snow"),
        (",fog,fog\n,1,1\na,0.1,0.2\n", "t.csv:2: fog has severity 1 twice"),
        (",fog,snow\n,1,2\na,0.1,0.2\n", "t.csv:2: fog lacks severity 2, which other corruptions have"),
        ("<!doctype html><html></html>\n\n\n", "needed are two rows of headers"),
        ("\x00" * 100, "needed are two rows of headers"),
        (HEADERS + "a,0.1,0.2,0.3,0.4\n" * 70000, "bytes, too many for a file of RobustBench's"),
        (HEADERS + "AlexNet,1,1,0.3,0.4\n", "the baseline AlexNet makes no error under fog"),
    ],
)
def test_bad_files_are_one_line_and_leave_nothing(text: str, message: str, rdiff: Command) -> None:
    Path("t.csv").write_text(text)
    code, out, err = rdiff("import", "robustbench", "t.csv", "-o", "run")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not Path("run").exists()


def test_what_is_no_text_or_no_file(rdiff: Command) -> None:
    Path("t.csv").write_bytes(HEADERS.encode() + b"\xff\xfe")
    assert "t.csv is no text file: byte 28 is not UTF-8" in rdiff("import", "robustbench", "t.csv", "-o", "run")[2]
    for name in ("none.csv", "."):
        code, _, err = rdiff("import", "robustbench", name, "-o", "run")
        assert code == 2
        assert err.startswith(f"rdiff: there is no file {name}; give the path of RobustBench's")
    code, _, err = rdiff("import", "robustbench", str(IMAGENET), "-o", "run", "--baseline", "hendrycks-alexnt")
    assert code == 2
    assert "no baseline and no model is called 'hendrycks-alexnt'; did you mean hendrycks-alexnet?" in err
    Path("t.csv").write_text(HEADERS + "a,0.1,0.2,0.3,0.4\n")
    code, _, err = rdiff("import", "robustbench", "t.csv", "-o", "run", "--baseline", "robustbench-alexnet")
    assert code == 2
    assert "relative to robustbench-alexnet is a mean over 75 accuracies, and 71 are missing" in err
    assert not Path("run").exists()


def test_the_marks_of_windows_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf" + IMAGENET.read_bytes().replace(b"\n", b"\r\n"))
    assert robustbench.read(path) == robustbench.read(IMAGENET)


names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_pandas_writes_as_robustbench_does_reads_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    corruptions = data.draw(st.lists(st.from_regex(r"[a-ln-z][a-z_]{0,8}", fullmatch=True), min_size=1, unique=True))
    severities = data.draw(st.lists(st.integers(1, 5), min_size=1, unique=True))
    models = data.draw(st.lists(names.filter(lambda name: name[0] not in "=+-@"), min_size=1, max_size=4, unique=True))
    shape = (len(models), len(corruptions) * len(severities))
    values = data.draw(st.lists(st.floats(0, 1), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    table = pd.DataFrame(
        np.array(values).reshape(shape), index=models, columns=pd.MultiIndex.from_product([corruptions, severities])
    )
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    table.to_csv(path)
    found = robustbench.read(path).models
    assert {m: {(c, s): v for c, row in rows.items() for s, v in row.items()} for m, rows in found.items()} == {
        model: row.to_dict() for model, row in table.iterrows()
    }


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=4)), min_size=1, max_size=4).map(
            lambda edits: _edited(IMAGENET.read_bytes(), edits)
        ),
    )
)
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(content)
    try:
        found = robustbench.read(path)
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        rows = list(csv.reader(StringIO(content.decode("utf-8-sig"), newline="")))
        assert len(found.models) == sum(map(bool, rows)) - 2
        assert all(0 <= v <= 1 for rows in found.models.values() for row in rows.values() for v in row.values())


def _edited(content: bytes, edits: list[tuple[int, bytes]]) -> bytes:
    for at, new in edits:
        content = content[:at] + new + content[at + len(new) + 1 :]
    return content


def test_the_lines_on_the_terminal_have_no_intervals() -> None:
    results = robustbench.read(IMAGENET)
    board = tables.leaderboard(robustbench.metrics(results, "s", results.baselines()))
    shown = list(robustbench.lines(board))
    assert shown[0] == "accuracy/mean (%)"
    assert shown[2] == "  Standard_R50         39.48"
    assert shown[5] == "mce/robustbench-alexnet (%)"
    assert shown[7] == "  Standard_R50         76.38"
    assert all(isnan(x) for x in board["accuracy/mean_low"])
