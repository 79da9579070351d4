"""OpenOOD's own figures are found again from its scores; what is exported reads back; bad files are one line."""

import csv
import hashlib
import io
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from robustbench_diffaug import runs
from robustbench_diffaug.exchange import openood
from robustbench_diffaug.exchange.openood_export import export_run
from robustbench_diffaug.exchange.openood_files import COLUMNS, LARGEST_ARRAY, NAMES, read_table
from robustbench_diffaug.suite import load

# Made-up scores with ties (normal draws rounded to one decimal), and the table that compute_all_metrics and the format
# of OODEvaluator._save_csv of Jingkang50/OpenOOD 3c35632 (Apache-2.0) make of them.
GOLDEN = Path(__file__).parent / "exchange" / "openood"
NEAR, FAR = ("cifar100", "tin"), ("mnist", "svhn", "texture", "places365")
ROWS = {name: row for name, *row in csv.reader(io.StringIO((GOLDEN / "ood.csv").read_text()))}

Command = Callable[..., tuple[int, str, str]]


def value(frame: pd.DataFrame, metric: str, of: str = "value") -> float:
    rows = frame[frame["metric"] == metric]
    assert len(rows) == 1, metric
    return float(rows[of].iloc[0])


def said(root: Path, id: str = "") -> tuple[tuple[str, ...], dict[str, float]]:
    """Findings and figures, without a run folder."""
    found = openood.figures_of(root, "msp", id)
    return tuple(found.findings), {figure.name: figure.value for figure in found.figures}


def copy(tmp_path: Path, **changed: dict[str, Any]) -> Path:
    """The golden folder, with some arrays of some datasets changed."""
    root = tmp_path / "net" / "msp"
    shutil.copytree(GOLDEN, root)
    for name, arrays in changed.items():
        path = root / "scores" / f"{name}.npz"
        with np.load(path) as found:
            np.savez(path, **{**found, **arrays})
    return root


def held(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "scores" / f"{name}.npz") as found:
        return dict(found)


def test_scores_give_the_figures_of_openood_and_intervals(tmp_path: Path) -> None:
    done = openood.import_run(copy(tmp_path), tmp_path / "run")
    assert done.findings == ()
    assert done.summary == "60 images of cifar10, 2 near, 4 far and 0 shifted datasets"
    frame = done.folder.metrics
    for name, row in ROWS.items():
        if name == "dataset":
            continue
        place = {"nearood": "near", "farood": "far"}.get(name, name)
        for metric, text in zip(NAMES, row, strict=True):
            found = value(frame, "accuracy" if metric == "accuracy" else f"{metric}/msp/{place}")
            assert f"{100 * found:.2f}" == text
    for metric in ("auroc/msp/near", "aupr_in/msp/far", "detection_error/msp/tin", "auoscr/msp/mnist", "accuracy"):
        low, middle, high = (value(frame, metric, of) for of in ("low", "value", "high"))
        assert low < middle < high
    assert set(frame["checkpoint"]) == {"net"}
    assert set(frame.loc[frame["headline"], "metric"]) == {"auroc/msp/near", "auroc/msp/far", "accuracy"}
    assert value(frame, "auroc/msp/near", "n") == 60 + 40 + 50


def test_a_run_folder_is_whole_and_says_what_it_is(tmp_path: Path) -> None:
    source, root = edited(copy(tmp_path), "mnist,40.00,88.75", "mnist,40.00,88.76"), tmp_path / "run"
    done = openood.import_run(source, root)
    (finding,) = done.findings
    assert list(openood.lines(done))[-1] == f"finding: {finding}"
    checked = subprocess.run(["sha256sum", "-c", "digests.txt"], cwd=root, capture_output=True, text=True, check=True)
    assert checked.stdout.count(": OK") == 5
    manifest = json.loads((root / "manifest.json").read_bytes())
    read = [path for path in source.rglob("*.*") if path.is_file()]
    digests = {str(path.relative_to(source)): hashlib.sha256(path.read_bytes()).hexdigest() for path in read}
    assert manifest["imported"] == {"format": "openood", "file": "msp", "sha256": digests}
    assert manifest["score"] == "msp"
    assert "auroc/msp/near" in (root / "leaderboard.csv").read_text()
    assert manifest["notices"][-1] == finding
    assert openood.import_run(source, root).folder.digest == done.folder.digest
    (root / "notes.txt").touch()
    with pytest.raises(ValueError, match="run is not empty and no import of msp"):
        openood.import_run(source, root)


def test_a_table_alone_is_taken_as_it_is(tmp_path: Path, rdiff: Command) -> None:
    words = (str(GOLDEN / "ood.csv"), "--score", "ash", "--checkpoint", "a")
    code, out, err = rdiff("import", "openood", *words, "-o", "run")
    assert (code, err) == (0, "")
    assert "2 near and 4 far datasets, no scores" in out
    assert "auroc/ash/near" in out
    frame = pd.read_parquet("run/metrics.parquet")
    for name, row in list(ROWS.items())[1:]:
        place = {"nearood": "near", "farood": "far"}.get(name, name)
        for metric, text in zip(NAMES[:-1], row[:-1], strict=True):
            assert value(frame, f"{metric}/ash/{place}") == float(text) / 100
    assert value(frame, "accuracy") == 0.7333
    assert frame[["low", "high", "n", "n_available"]].isna().all(axis=None)
    assert "imported: no records, no intervals" in Path("run/index.html").read_text()


def test_the_scripts_table_has_means_and_deviations_over_runs(tmp_path: Path) -> None:
    path = tmp_path / "react.csv"
    path.write_text(
        ",FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC\n"
        "ninco,50.00 ± 1.25,80.00 ± 0.50,70.00 ± 0.10,60.00 ± 0.20,75.00 ± 0.00\n"
        "nearood,50.00 ± 1.25,80.00 ± 0.50,70.00 ± 0.10,60.00 ± 0.20,75.00 ± 0.00\n"
    )
    done = openood.import_run(path, tmp_path / "run")
    assert value(done.folder.metrics, "fpr95_ood_positive/react/near") == 0.5
    manifest = json.loads((tmp_path / "run/manifest.json").read_bytes())
    assert manifest["deviations"]["ninco"] == dict(zip(COLUMNS, (0.0125, 0.005, 0.001, 0.002, 0), strict=True))
    assert manifest["checkpoints"] == [{"id": tmp_path.name}]
    assert any("their standard deviations are no intervals" in notice for notice in manifest["notices"])


def edited(root: Path, old: str, new: str) -> Path:
    path = root / "ood.csv"
    text = path.read_bytes().decode()
    assert text.count(old) == 1
    path.write_bytes(text.replace(old, new).encode())
    return root


def test_a_table_that_disagrees_with_its_scores_is_found(tmp_path: Path) -> None:
    root = edited(copy(tmp_path), "mnist,40.00,88.75", "mnist,40.00,88.76")
    (finding,), _ = said(root)
    assert finding == "ood.csv: AUROC of mnist is 88.76, and the scores give 88.75"
    edited(root, "nearood,86.67", "nearood,86.70")
    wrong, same = said(root)[0]
    assert wrong.startswith("ood.csv: FPR@95 of nearood is 86.70, and the mean of its datasets 86.6")
    assert same == finding


def test_the_older_convention_of_fpr_is_recognised(tmp_path: Path) -> None:
    root = copy(tmp_path)
    figures = said(root)[1]
    for name in (*NEAR, *FAR):
        id_positive = f"{100 * figures[f'fpr95_id_positive/msp/{name}']:.2f}"
        edited(root, f"{name},{ROWS[name][0]}", f"{name},{id_positive}")
    found, _ = said(root)
    assert "ood.csv: FPR@95 has in-distribution images as the positive ones, as before OpenOOD v1.5" in found
    assert not any("the scores give" in sentence for sentence in found)


def test_reversed_scores_are_found(tmp_path: Path) -> None:
    names = ("cifar10", *NEAR, *FAR)
    root = copy(tmp_path, **{name: {"conf": -held(name)["conf"]} for name in names})
    (root / "ood.csv").unlink()
    (found,), _ = said(root)
    assert "worse than chance: is conf lower for in-distribution images here?" in found


def test_numbers_that_are_none_cost_their_dataset_and_its_mean(tmp_path: Path) -> None:
    conf = held("tin")["conf"]
    conf[[3, 7]] = np.nan, np.inf
    found, figures = said(copy(tmp_path, tin={"conf": conf}))
    assert found == ("tin.npz: conf is nan at row 3, and no number in 2 rows in all",)
    assert {"auroc/msp/cifar100", "auroc/msp/far"} <= figures.keys()
    assert not {"auroc/msp/tin", "auroc/msp/near"} & figures.keys()
    conf = held("cifar10")["conf"]
    conf[5] = -np.inf
    with pytest.raises(ValueError, match=r"cifar10.npz: conf is -inf at row 5, .*; without them there is no figure"):
        said(copy(tmp_path / "b", cifar10={"conf": conf}))


def test_odd_types_and_labels_are_found(tmp_path: Path) -> None:
    found = held("tin")
    changed: dict[str, dict[str, Any]] = {
        "tin": {"label": found["label"].astype(np.uint8), "pred": found["pred"].astype(np.float32)},
        "mnist": {"label": np.full(30, 3)},
        "svhn": {"conf": held("svhn")["conf"].astype(">f8")},
    }
    assert said(copy(tmp_path, **changed))[0] == (
        "tin.npz: pred is float32, where OpenOOD has int64",
        "tin.npz: label is uint8, where OpenOOD has int64",
        "mnist.npz: 30 labels are not -1, as OpenOOD has them",
    )


def test_without_a_table_openoods_benchmarks_say_what_is_near(tmp_path: Path) -> None:
    root = copy(tmp_path)
    (root / "ood.csv").unlink()
    (root / "scores/svhn.npz").rename(root / "scores/unheard-of.npz")
    found, figures = said(root)
    assert set(found) == {
        "unheard-of.npz is left out: no table here says whether it is near or far",
        "svhn is far and has no scores: there is no mean of these",
    }
    assert f"{100 * figures['auroc/msp/near']:.2f}" == ROWS["nearood"][1]
    assert "auroc/msp/far" not in figures
    (root / "scores/cifar10.npz").rename(root / "scores/mine.npz")
    with pytest.raises(ValueError, match=r"has no scores of a dataset that is near or far; add its ood\.csv"):
        said(root)


def test_the_full_spectrum_pools_images_of_another_look(tmp_path: Path) -> None:
    root = copy(tmp_path)
    shutil.copy(root / "scores/cifar10.npz", root / "scores/cifar10c.npz")  # so that no figure moves
    shutil.copy(root / "ood.csv", root / "fsood.csv")
    found, figures = said(root)
    assert found == ()
    for place in ("near", "far"):
        assert figures[f"auroc/msp/{place}-fs"] == pytest.approx(figures[f"auroc/msp/{place}"], abs=1e-12)
    assert figures["accuracy/csid"] == figures["accuracy"]
    (root / "scores/cifar10c.npz").rename(root / "scores/shifted.npz")
    with pytest.raises(ValueError, match=r"which is the in-distribution test set.*labelled are cifar10, shifted"):
        said(root)
    assert said(root, "cifar10")[1] == figures


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy(array: np.ndarray, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


GOOD = {"pred.npy": npy(np.zeros(3, int)), "conf.npy": npy(np.zeros(3)), "label.npy": npy(np.full(3, -1))}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"pred.npy": GOOD["pred.npy"]}, "it has pred.npy; needed are pred, conf and label"),
        ({**GOOD, "../more.npy": b""}, "needed are pred, conf and label"),
        ({**GOOD, "conf.npy": npy(np.array([print] * 3, object), True)}, "conf holds object; needed are numbers"),
        ({**GOOD, "conf.npy": npy(np.array(["a"] * 3))}, "conf holds <U1; needed are numbers"),
        ({**GOOD, "conf.npy": npy(np.zeros((3, 1)))}, r"conf says it has the shape \(3, 1\)"),
        ({**GOOD, "conf.npy": GOOD["conf.npy"][:-8]}, r"conf says it has the shape \(3,\) of float64, and holds 16"),
        ({**GOOD, "conf.npy": npy(np.zeros(2))}, "it has 3 pred, 2 conf, 3 label"),
        ({**GOOD, "conf.npy": b"no array"}, "is no file of scores"),
        ({**GOOD, "conf.npy": GOOD["conf.npy"].replace(b"(3,)", b"(9e)")}, "is no file of scores"),
        ({**GOOD, "pred.npy": npy(np.array([0.5, 1, 2]))}, "pred has what is no class"),
        ({**GOOD, "label.npy": npy(np.array([-2, 1, 2]))}, "a label is -2"),
        ({**GOOD, "conf.npy": bytes(LARGEST_ARRAY + 1)}, "conf would have 67,108,865 bytes unpacked; at most"),
        ({name: npy(np.zeros(0)) for name in GOOD}, "it has 0 pred, 0 conf, 0 label"),
        (None, "is no file of scores: File is not a zip file"),
    ],
)
def test_hostile_arrays_are_one_line(tmp_path: Path, members: dict[str, bytes] | None, message: str) -> None:
    path = tmp_path / "scores/a.npz"
    path.parent.mkdir()
    path.write_bytes(b"PK\x03\x04 no zip")
    if members is not None:
        zipped(path, members)
    with pytest.raises(ValueError, match=message) as caught:
        openood.import_run(tmp_path, tmp_path / "run", "msp", "net")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_mixed_labels_and_empty_folders_are_one_line(tmp_path: Path) -> None:
    label = held("cifar10")["label"]
    label[:4] = -1
    with pytest.raises(ValueError, match=r"cifar10\.npz has 4 labels of -1 among 60; needed is all or none"):
        said(copy(tmp_path, cifar10={"label": label}))
    (tmp_path / "empty/scores").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"empty/scores holds no npz file; run OpenOOD with --recorder.save_scores"):
        said(tmp_path / "empty")
    assert not (tmp_path / "run").exists()


HEAD = "dataset,FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r":1: no header of OpenOOD's, dataset,FPR@95,AUROC"),
        ("dataset,AUROC\n", r":1: no header of OpenOOD's"),
        (HEAD, "has no row of a dataset"),
        (HEAD + "tin,1,2,3,4\n", ":2: tin has 4 figures; needed are FPR@95"),
        (HEAD + "tin,1,nan,3,4,5\n", ":2: AUROC of tin is 'nan'; needed is a percentage"),
        (HEAD + "tin,1,101,3,4,5\n", ":2: AUROC of tin is '101'"),
        (HEAD + "tin,1,2,3,4,5\n", "ends with tin, without the mean after it; let OpenOOD run to its end"),
        (HEAD + "nearood,1,2,3,4,5\n", ":2: nearood is a mean over the datasets before it, and there are none"),
        (HEAD + 2 * "tin,1,2,3,4,5\nnearood,1,2,3,4,5\n", ":4: names tin a second time, as where a run was repeated"),
        (HEAD + "=tin(),1,2,3,4,5\n", ":2: '=tin.*' is no name of a dataset"),
        (HEAD + "a/b,1,2,3,4,5\n", ":2: 'a/b' has / or @"),
        (HEAD + "far,1,2,3,4,5\n", ":2: far is what means are called"),
        (HEAD + '"tin,1,2,3,4,5\n', ":2: no CSV: unexpected end of data"),
        ("\udcff", "is no text file: byte 0 is not UTF-8"),
    ],
)
def test_bad_tables_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ood.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        openood.import_run(path, tmp_path / "run", "msp", "net")
    assert str(caught.value).startswith(str(path))
    assert not (tmp_path / "run").exists()


def test_bad_words_are_one_line(tmp_path: Path, rdiff: Command) -> None:
    table = str(GOLDEN / "ood.csv")
    for words, message in (
        ([table, "--score", "a/b"], "'a/b' is no name of a score"),
        ([table, "--checkpoint", "=a"], "'=a' is no name of a checkpoint; give --checkpoint"),
        ([table, "--id", "cifar10"], "--id is for a folder with scores"),
        ([table, "--sigma", "1"], "--sigma is for cohen, not for openood"),
        (["nowhere.csv"], "there is no file nowhere.csv; give OpenOOD's ood.csv, or the folder"),
    ):
        code, out, err = rdiff("import", "openood", *words, "-o", "run")
        assert (code, out) == (2, "")
        assert message in err
    assert not Path("run").exists()


SUITE = """
name: small
checkpoints:
  - {kind: mixture, id: bayes, classes: 4, temperature: 0.0016}
  - {kind: mixture, id: ..tilted, classes: 4, temperature: 0.0016, tilt: 120}
benches:
  - name: ood
    evaluator: {kind: ood, features: false, scores: [msp, energy], average: [msp]}
    datasets:
      - {kind: mixture, name: inside, group: id, size: 40}
      - {kind: mixture, name: shifted, group: csid, size: 24, draw: 1}
      - {kind: mixture, name: distant, group: far, size: 16, draw: 2}
      - {kind: mixture, name: a b, group: near, size: 20, draw: 3, every: 2}
      - {kind: mixture, name: close, group: near, size: 12, draw: 4}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    (folder / "suite.yaml").write_text(SUITE)
    assert not runs.execute(load(str(folder / "suite.yaml")), runs.Options(folder / "run")).failures
    return folder / "run"


def test_an_export_is_openoods_and_reads_back(run: Path, tmp_path: Path, rdiff: Command) -> None:
    code, out, err = rdiff("export", "openood", str(run), "-o", "out")
    assert (code, out, err) == (0, "wrote   out, 8 tables\n", "")
    figures = pd.read_parquet(run / "metrics.parquet")
    for place, checkpoint in (("bayes", "bayes"), ("%2E.tilted", "..tilted")):
        frame = figures[figures["checkpoint"] == checkpoint]
        for score in ("msp", "energy"):
            folder = Path("out", place, score)
            files = sorted(path.name for path in (folder / "scores").iterdir())
            assert files == ["a%20b.npz", "close.npz", "distant.npz", "inside.npz", "shifted.npz"]
            text = (folder / "ood.csv").read_bytes().decode()
            assert [line.split(",")[0] for line in text.split("\r\n")] == [
                "dataset", "a b", "close", "nearood", "distant", "farood", "",
            ]  # fmt: skip
            table = read_table(folder / "ood.csv")
            for name, line in table.lines.items():
                shown = {"nearood": "near", "farood": "far"}.get(name, name)
                expected = [value(frame, f"{metric}/{score}/{shown}") for metric in NAMES[:-1]]
                np.testing.assert_allclose(line.figures[:-1], expected, atol=0.51e-4)
            found = openood.figures_of(folder, score, "inside")
            assert found.findings == []
            for figure in found.figures:
                # Resamples are keyed by the run's seed; DeLong's intervals and Wilson's are not.
                exact = figure.name.startswith(("au", "acc")) and not figure.name.startswith("aupr")
                for of in ("value", "low", "high") if exact else ("value",):
                    assert getattr(figure, of) == pytest.approx(value(frame, figure.name, of), abs=1e-12)
    with np.load("out/bayes/msp/scores/shifted.npz", allow_pickle=False) as found:
        types = [found[name].dtype.name for name in ("pred", "conf", "label")]
        assert types == ["int64", "float64", "int64"]
        assert found["label"].tolist() == [row % 4 for row in range(24)]
    with np.load("out/bayes/msp/scores/close.npz", allow_pickle=False) as found:
        assert set(found["label"].tolist()) == {-1}
    about = json.loads(Path("out/parameters.json").read_bytes())
    assert about["datasets"]["shifted"] == "csid"
    for name, digest in about["files"].items():
        assert hashlib.sha256(Path("out", name).read_bytes()).hexdigest() == digest
    again = {path: path.read_bytes() for path in Path("out").rglob("*.*") if path.is_file()}
    export_run(run, Path("out"))
    assert {path: path.read_bytes() for path in again} == again


def test_what_cannot_be_exported_is_said(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="lies in the run folder"):
        export_run(run, run / "out")
    with pytest.raises(ValueError, match="has no bench of kind ood called 'odd'"):
        export_run(run, out, "odd")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(ValueError, match=r"other holds other files, such as notes\.txt; give another folder"):
        export_run(run, tmp_path / "other")
    assert [path.parts[-3:] for path in export_run(run, out, settings=["benches.ood.evaluator.scores=[msp]"])] == [
        (place, "msp", name) for place in ("bayes", "%2E.tilted") for name in ("ood.csv", "fsood.csv")
    ]
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    next(iter((damaged / "records/ood/bayes/close").rglob("*.parquet"))).unlink()
    with pytest.raises(ValueError, match="bayes on close has records of 0 of 12 images; run the suite to its end"):
        export_run(damaged, tmp_path / "none")
    assert not (tmp_path / "none").exists()
