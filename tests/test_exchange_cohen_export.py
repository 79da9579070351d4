"""What is exported is what the votes prove, rounded down, as locuslab's analyze.py reads it; and it reads back."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from robustbench_diffaug import runs
from robustbench_diffaug.evaluators.certificates import certify
from robustbench_diffaug.exchange import cohen
from robustbench_diffaug.exchange.cohen_rows import COLUMNS, Protocol
from robustbench_diffaug.recorded import LOCK
from robustbench_diffaug.store import with_skipped
from robustbench_diffaug.suite import load

IMAGENET = Path(__file__).parent / "exchange" / "locuslab_imagenet.tsv"
Command = Callable[..., tuple[int, str, str]]


def analyzed(path: Path, radius: float) -> float:
    """What `ApproximateAccuracy` of locuslab's analyze.py says."""
    frame = pd.read_csv(path, delimiter="\t")
    return float((frame["correct"] & (frame["radius"] >= radius)).mean())


def value(frame: pd.DataFrame, metric: str, of: str = "value") -> float:
    rows = frame[frame["metric"] == metric]
    assert len(rows) == 1
    return float(rows[of].iloc[0])


def radius_by_core(votes: int, n: int, alpha: float, sigma: float) -> float:
    """`Smooth.certify` of locuslab's core.py."""
    return float(sigma * norm.ppf(proportion_confint(votes, n, alpha=2 * alpha, method="beta")[0]))


SUITE = """
name: small
checkpoints:
  - {kind: mixture, id: bayes, classes: 4, temperature: 0.0016}
  - {kind: mixture, id: ..tilted, classes: 4, temperature: 0.0016, tilt: 120}
benches:
  - name: certify
    evaluator:
      {kind: smoothing, denoiser: {kind: mixture}, sigmas: [0.25, 0.5], n0: 8, n: 64, alpha: 0.05,
       radii: [0, 0.1, 0.25, 0.33]}
    datasets: [{kind: mixture, name: mixture, size: 40, every: 3}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    (folder / "suite.yaml").write_text(SUITE)
    assert not runs.execute(load(str(folder / "suite.yaml")), runs.Options(folder / "run")).failures
    return folder / "run"


def votes_of(run: Path, checkpoint: str) -> pd.DataFrame:
    """The records of a checkpoint, read without the package."""
    (folder,) = (run / "records/certify").glob(f"*{checkpoint}")
    return pd.concat([pd.read_parquet(path) for path in sorted(folder.rglob("*.parquet"))])


def test_what_is_exported_is_what_the_votes_prove(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = cohen.export_run(run, out)
    names = [f"{checkpoint}/noise_{sigma}.tsv" for checkpoint in ("bayes", "%2E.tilted") for sigma in ("0.25", "0.50")]
    assert [path.relative_to(out).as_posix() for path in files] == names
    figures = pd.read_parquet(run / "metrics.parquet")
    for path in files:
        checkpoint, sigma = path.parent.name.replace("%2E", "."), float(path.stem.removeprefix("noise_"))
        frame, records = pd.read_csv(path, delimiter="\t"), votes_of(run, path.parent.name.replace("%2E", ""))
        assert list(frame.columns) == list(COLUMNS)
        assert frame["idx"].tolist() == list(range(0, 40, 3)) == [int(sample) for sample in records["sample"]]
        index = [0.25, 0.5].index(sigma)
        select = np.stack(records["select"].to_list()).reshape(len(frame), 2, 4)[:, index]
        estimate = np.stack(records["estimate"].to_list()).reshape(len(frame), 2, 4)[:, index]
        outcomes = frame["predict"].tolist(), frame["radius"].tolist()
        for predict, shown, first, second in zip(*outcomes, select, estimate, strict=True):
            radius = radius_by_core(int(second[first.argmax()]), 64, 0.05, sigma)
            assert predict == (first.argmax() if radius >= 0 else -1)
            assert 0 <= max(radius, 0) - shown < 1.0001e-4
        exact = certify(select, estimate, sigma, 0.05).radius
        assert (frame["radius"].to_numpy() <= exact).all()
        assert frame["correct"].tolist() == (frame["predict"] == frame["label"]).astype(int).tolist()
        assert all(re.fullmatch(r"0:\d\d:\d\d(\.\d{6})?", time) for time in frame["time"])
        own = figures[(figures["checkpoint"] == checkpoint) & (figures["group"] == f"sigma={sigma:g}")]
        for radius, name in ((0, "0.00"), (0.1, "0.10"), (0.25, "0.25"), (0.33, "0.33")):  # four decimals hold them
            assert analyzed(path, radius) == value(own, f"certified@{name}")
        right = (frame["correct"] == 1).to_numpy()
        for radius in np.arange(0, 1, 0.00731):
            assert analyzed(path, float(radius)) <= (right & (exact >= radius)).mean()


def test_an_export_reads_back(run: Path, tmp_path: Path) -> None:
    figures = pd.read_parquet(run / "metrics.parquet")
    (path, *_) = cohen.export_run(run, tmp_path / "out")
    done = cohen.import_run(path, tmp_path / "back", Protocol(0.25, 64, 0.05, 8), (0.0, 0.1, 0.25, 0.33), "bayes")
    assert not [line for line in done.findings if "digit" not in line]
    own = figures[(figures["checkpoint"] == "bayes") & (figures["group"] == "sigma=0.25")].set_index("metric")
    back = done.folder.metrics.set_index("metric")
    shares = [name for name in back.index if name != "acr"]
    assert len(shares) == 5
    columns = ["value", "low", "high", "n", "better", "unit", "headline"]
    pd.testing.assert_frame_equal(back.loc[shares, columns], own.loc[shares, columns], check_exact=True)
    mean = value(own.reset_index(), "acr")
    assert mean - 1e-4 < value(done.folder.metrics, "acr") <= mean


def test_an_export_says_how_it_was_made_and_can_be_repeated(run: Path, rdiff: Command) -> None:
    assert rdiff("export", "cohen", str(run), "-o", "out") == (0, "wrote   out, 4 files of certificates\n", "")
    about = json.loads(Path("out/parameters.json").read_bytes())
    assert {name: about[name] for name in ("sigmas", "n0", "n", "alpha")} == {
        "sigmas": [0.25, 0.5], "n0": 8, "n": 64, "alpha": 0.05,
    }  # fmt: skip
    assert about["digest"] == hashlib.sha256((run / "digests.txt").read_bytes()).hexdigest()
    for name, digest in about["files"].items():
        assert hashlib.sha256(Path("out", name).read_bytes()).hexdigest() == digest
    before = {path: path.read_bytes() for path in Path("out").rglob("*.[tj]s*")}
    assert rdiff("export", "cohen", str(run), "-o", "out")[0] == 0
    assert {path: path.read_bytes() for path in Path("out").rglob("*.[tj]s*")} == before
    Path("out/notes.txt").touch()
    assert (
        "out holds other files, such as notes.txt; give another folder"
        in rdiff("export", "cohen", str(run), "-o", "out")[2]
    )
    Path("file").touch()
    assert "file is a file; give a folder with --output" in rdiff("export", "cohen", str(run), "-o", "file")[2]
    assert "lies in the run folder" in rdiff("export", "cohen", str(run), "-o", str(run / "tsv"))[2]
    assert not (run / "tsv").exists()


def changed(run: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A run folder with another suite and the same records."""
    shutil.copytree(run, folder)
    data, manifest = yaml.safe_load((run / LOCK).read_text()), json.loads((run / "manifest.json").read_bytes())
    change(data)
    manifest["datasets"] += [entry | {"bench": "again"} for entry in manifest["datasets"]]
    (folder / LOCK).write_text(yaml.safe_dump(data, sort_keys=False))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def none(data: dict[str, Any]) -> None:
    data["benches"][0]["evaluator"] = {"kind": "shift", "modes": ["default"]}


def two(data: dict[str, Any]) -> None:
    data["benches"].append(data["benches"][0] | {"name": "again"})


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (none, (), "has no bench of kind smoothing"),
        (two, (), "has several benches of kind smoothing; name one with --bench: certify, again"),
        (two, ("--bench", "agin"), "has no bench of kind smoothing called 'agin'; did you mean again?"),
        (two, ("--bench", "again"), "bayes on mixture has certificates of 0 of 14 images; run the suite to its end"),
        (two, ("--set", "benches.0.evaluator.n=65"), "--set changes benches.0.evaluator.n, on which records depend"),
    ],
)
def test_what_cannot_be_exported_is_said(
    change: Callable[[dict[str, Any]], None], words: tuple[str, ...], message: str, run: Path, rdiff: Command
) -> None:
    code, out, err = rdiff("export", "cohen", str(changed(run, Path("run"), change)), "-o", "out", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not Path("out").exists()


def test_the_bench_that_is_meant_is_exported(run: Path, tmp_path: Path) -> None:
    root = changed(run, tmp_path / "two", two)
    assert len(cohen.export_run(root, tmp_path / "out", "certify")) == 4
    next((root / "records/certify/bayes").rglob("*.parquet")).unlink()
    with pytest.raises(ValueError, match="bayes on mixture has certificates of 0 of 14 images; run the suite"):
        cohen.export_run(root, tmp_path / "other", "certify")
    with pytest.raises(ValueError, match="there is no folder nowhere; give the folder of a run"):
        cohen.export_run(Path("nowhere"), tmp_path / "other")
    cohen.import_run(IMAGENET, tmp_path / "imported", Protocol(1.0))
    with pytest.raises(ValueError, match="imported holds figures of another tool: there are no records"):
        cohen.export_run(tmp_path / "imported", tmp_path / "other")


def test_another_alpha_needs_no_forward(run: Path, tmp_path: Path) -> None:
    setting = "benches.certify.evaluator.alpha=0.2"
    pairs = zip(
        cohen.export_run(run, tmp_path / "a"), cohen.export_run(run, tmp_path / "b", "", (setting,)), strict=True
    )
    for first, second in pairs:
        strict, loose = (pd.read_csv(path, delimiter="\t") for path in (first, second))
        some = (strict["predict"] >= 0).to_numpy()
        assert some.any()
        assert (loose["radius"].to_numpy() > strict["radius"].to_numpy())[some].all()
    assert json.loads((tmp_path / "b/parameters.json").read_bytes())["settings"] == [f"{setting} (the suite says 0.05)"]


def test_images_that_were_left_out_have_no_row(run: Path, tmp_path: Path) -> None:
    """The positions of the others stay what they are."""
    root = tmp_path / "run"
    shutil.copytree(run, root)
    for path in (root / "records").rglob("*.parquet"):
        table = pq.read_table(path)
        keep = pc.not_equal(table["sample"], "00006")
        pq.write_table(
            with_skipped(table.filter(keep), [("00006", "cut off")] if not pc.all(keep).as_py() else []), path
        )
    whole, fewer = (cohen.export_run(folder, tmp_path / f"{name}")[0] for name, folder in (("a", run), ("b", root)))
    before, after = (pd.read_csv(path, delimiter="\t").drop(columns="time") for path in (whole, fewer))
    expected = before[before["idx"] != 6].reset_index(drop=True)
    assert len(expected) == 13
    pd.testing.assert_frame_equal(after, expected)


def test_several_datasets_have_folders_of_their_own(tmp_path: Path) -> None:
    data = yaml.safe_load(SUITE)
    base = {"kind": "mixture", "name": "../x", "size": 6}
    data["benches"][0]["datasets"] = [base, base | {"name": "y", "draw": 1}]
    data["checkpoints"] = data["checkpoints"][:1]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(data))
    assert not runs.execute(load(str(tmp_path / "suite.yaml")), runs.Options(tmp_path / "run")).failures
    files = cohen.export_run(tmp_path / "run", tmp_path / "out")
    assert {path.relative_to(tmp_path / "out").parts[1] for path in files} == {"%2E.%2Fx", "y"}
    assert len({path.read_bytes() for path in files}) == 4
