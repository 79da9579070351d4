"""Checks of a run folder: what is sound passes, and whatever is changed is named."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from robustbench_diffaug import cli, rng, runs
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.evaluators.certificates import certify
from robustbench_diffaug.files import sha256
from robustbench_diffaug.recorded import Recorded, open_run
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import load
from robustbench_diffaug.verify import certificates, files, recheck, tables, whole
from robustbench_diffaug.verify.check import Check, lines

IMAGES, DRAWS = 12, 60
SUITE = {
    "name": "small",
    "checkpoints": [
        {"kind": "local", "id": "net", "arch": "tiny_network:make", "classes": 4, "weights": {"uri": "w.safetensors"}},
        {"kind": "mixture", "id": "bayes", "classes": 4, "temperature": 0.0016},
    ],
    "benches": [
        {
            "name": "shift",
            "evaluator": {"kind": "shift"},
            "datasets": [{"kind": "arrays", "name": "a", "file": "a.npz"}],
        },
        {
            "name": "certify",
            "evaluator": {"kind": "smoothing", "sigmas": [0.25], "n0": 8, "n": DRAWS, "radii": [0, 0.1, 0.2, 0.3]},
            "datasets": [{"kind": "arrays", "name": "a", "file": "a.npz"}],
        },
    ],
}
NETWORK = """
from torch import nn
def make():
    return nn.Sequential(nn.Flatten(), nn.Linear({features}, 4))
"""


def write_suite(folder: Path) -> Path:
    """A suite of a network of weights in a file, and of images in one."""
    images, labels = Mixture(size=IMAGES).opened().read(range(IMAGES))
    np.savez(folder / "a.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    features = images[0].numel()
    (folder / "tiny_network.py").write_text(NETWORK.format(features=features))
    weight = torch.from_numpy(rng.normal(rng.key("tiny"), range(1), (4, features))[0])
    bias = torch.zeros(4)
    save_file({"1.weight": weight, "1.bias": bias}, folder / "w.safetensors")
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SUITE, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the suite's files and a run of it."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        path = write_suite(folder)
        done = runs.execute(load(str(path), trust=True), runs.Options(folder / "run", trust=True))
        assert not done.failures
        yield folder


@pytest.fixture
def root(tmp_path: Path, made: Path) -> Path:
    """A copy of the run, to tamper with."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def opened(root: Path) -> Recorded:
    return open_run(root, trust=True)


def failed(check: Check | Sequence[Check]) -> str:
    """What is wrong, as text; there must be something."""
    wrong = [one for one in ([check] if isinstance(check, Check) else check) if one.state == "FAILED"]
    assert wrong
    return "\n".join(line for one in wrong for line in lines(one))


def record(root: Path, bench: str, checkpoint: str) -> Path:
    (path,) = (root / "records" / bench / checkpoint).rglob("*.parquet")
    return path


def alter(path: Path, column: str, change: Callable[[list[Any]], None]) -> None:
    """Changes the rows of one column of a record in place."""
    table = pq.ParquetFile(path).read()
    values = table[column].to_pylist()
    change(values)
    index = table.schema.get_field_index(column)
    pq.write_table(table.set_column(index, table.schema.field(index), pa.array(values, table[column].type)), path)


def forge(root: Path, rows: Sequence[int], votes: int = 20) -> None:
    """Moves votes to the first class in some rows of a record, and makes everything that follows anew."""

    def move(values: list[list[int]]) -> None:
        for row in rows:
            largest = int(np.argmax(values[row]))
            values[row][largest] -= votes
            values[row][(largest + 1) % 4] += votes

    alter(record(root, "certify", "bayes"), "estimate", move)
    runs.report(root, trust=True)


def test_a_sound_run_passes_every_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(root), "--recheck", "100%", "--seed", "1", "--trust", "-q"])
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    found = dict(line.split(maxsplit=2)[1::-1] for line in out.splitlines()[:-1])
    names = "digests suite weights denoisers data keys records certificates figures manifest page recheck"
    assert found == dict.fromkeys(names.split(), "ok")
    assert sha256(root / "digests.txt") in out
    assert f"{4 * IMAGES} rows evaluated again with seed 1, all columns equal" in out
    assert "0 % if 1 % are forged" in out


def test_any_flipped_bit_is_named(root: Path) -> None:
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    assert files.listing(root).state == "ok"
    clock = iter(range(10**9, 2 * 10**9))

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(paths), st.integers(0, 10**6), st.integers(0, 7))
    def flip(path: Path, place: int, bit: int) -> None:
        content = path.read_bytes()
        changed = bytearray(content)
        changed[place % len(content)] ^= 1 << bit
        try:
            path.write_bytes(changed)
            os.utime(path, (next(clock),) * 2)
            assert path.relative_to(root).as_posix() in failed(files.listing(root)) or path.name == "digests.txt"
        finally:
            path.write_bytes(content)
            os.utime(path, (next(clock),) * 2)

    flip()
    assert files.listing(root).state == "ok"


def test_files_that_come_and_go_are_named(root: Path) -> None:
    (root / "costs.csv").unlink()
    (root / "records/more.txt").write_text("more")
    (root / "link").symlink_to("/")
    text = failed(files.listing(root))
    assert "costs.csv is listed and not there" in text
    assert "records/more.txt is not listed" in text
    assert "link is a link" in text
    (root / "digests.txt").write_text("nothing\n")
    assert "digests.txt line 1 is not a digest and a name: 'nothing'" in failed(files.listing(root))
    (root / "digests.txt").unlink()
    assert "digests.txt is not there" in failed(files.listing(root))


def test_every_damaged_folder_ends_in_checks(root: Path) -> None:
    """Whatever one file is replaced by, there is a line for it and never a traceback."""
    for name, contents in (
        ("manifest.json", (b"", b"\xff", b"[]", b"{}")),
        ("suite.lock.yaml", (b"", b"\xff", b"[]", b"a: [1")),
        ("metrics.parquet", (b"\xff",)),
        ("costs.csv", (b"\xff",)),
    ):
        before = (root / name).read_bytes()
        for content in contents:
            (root / name).write_bytes(content)
            found = list(whole.verify(root, trust=True))
            assert name in failed(found[0])
            assert len([check for check in found if check.state == "FAILED"]) > 1, (name, content)
        (root / name).write_bytes(before)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m["suite"].update(seed=1), "suite.seed is 1, that of suite.lock.yaml is 0"),
        (lambda m: m["suite"].update(digest="0" * 32), "suite.digest"),
        (lambda m: m["checkpoints"][1].update(temperature=1.0), "checkpoints.1.temperature is 1.0"),
        (lambda m: m["benches"][1]["evaluator"].update(alpha=0.01), "benches.1.evaluator"),
        (lambda m: m["benches"].pop(), "benches lists 1, suite.lock.yaml 2"),
        (lambda m: m["datasets"][0].update(severity=3), "datasets.0.severity is 3"),
    ],
)
def test_manifest_against_lock(root: Path, change: Callable[[Any], None], named: str) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert named in failed(files.suite(opened(root)))


def test_a_changed_lock_is_not_the_manifests(root: Path) -> None:
    text = (root / "suite.lock.yaml").read_text()
    (root / "suite.lock.yaml").write_text(text.replace("alpha: 0.001", "alpha: 0.01"))
    assert "suite.digest" in failed(files.suite(opened(root)))


def test_weights_and_data_where_they_are(root: Path, made: Path, tmp_path: Path) -> None:
    assert [check.state for check in files.contents(opened(root))] == ["ok"] * 4
    (tmp_path / "moved").mkdir()
    hidden = [(made / name, tmp_path / "moved" / name) for name in ("w.safetensors", "a.npz")]
    for here, there in hidden:
        here.rename(there)
    try:
        states = {check.name: check for check in files.contents(opened(root))}
        assert states["weights"].state == states["data"].state == states["keys"].state == "not checked"
        assert "no file" in states["weights"].said and "w.safetensors" in states["weights"].said
        elsewhere = open_run(root, trust=True, data_dir=tmp_path / "moved")
        assert [check.state for check in files.contents(elsewhere)] == ["ok"] * 4
        assert [check.state for check in tables.figures(opened(root))] == ["ok"] * 3
        content = bytearray(hidden[0][1].read_bytes())
        content[-1] ^= 1
        hidden[0][0].write_bytes(content)
        assert "net: " in failed(files.contents(opened(root)))
        assert "w.safetensors has sha256" in failed(files.contents(opened(root)))
    finally:
        for here, there in hidden:
            there.rename(here)


def test_a_changed_digest_of_data_is_named(root: Path) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["datasets"][0]["digest"] = "0" * 64
    manifest["keys"]["certify"]["a"]["bayes"] = "0" * 16
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert "shift / a: digest is" in failed(files.contents(opened(root)))
    manifest["datasets"][0]["digest"] = manifest["datasets"][1]["digest"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert "certify / bayes / a: its records have key 0000000000000000" in failed(files.contents(opened(root)))


def test_votes_that_do_not_add_up(root: Path) -> None:
    def add(values: list[list[int]]) -> None:
        values[3][0] += 1

    alter(record(root, "certify", "bayes"), "estimate", add)
    text = failed(certificates.certificates(opened(root)))
    assert f"certify / bayes: a, sample 000003, sigma 0.25: the votes of estimate add up to {DRAWS + 1}, not" in text


def test_noise_that_is_too_weak(root: Path) -> None:
    alter(record(root, "certify", "net"), "level", lambda values: values.__setitem__(2, [0.1]))
    text = failed(certificates.certificates(opened(root)))
    assert "certify / net: a, sample 000002: noise of 0.1 certifies no sigma of 0.25" in text


def test_levels_of_noise_must_be_there(root: Path) -> None:
    path = record(root, "certify", "net")
    pq.write_table(pq.ParquetFile(path).read().drop_columns("level"), path)
    assert "certify / net: column level holds no noise of 1 levels" in failed(certificates.certificates(opened(root)))


@pytest.mark.parametrize(("column", "value"), [("label", 1), ("image", "0" * 16), ("group", "b")])
def test_rows_that_disagree(root: Path, column: str, value: object) -> None:
    alter(record(root, "certify", "bayes"), column, lambda values: values.__setitem__(4, value))
    text = failed(tables.records(opened(root)))
    assert "certify / bayes / a: sample 000004 has" in text
    assert column in text or column == "image"


def test_every_changed_figure_is_named(root: Path) -> None:
    metrics = pd.read_csv(root / "metrics.csv", keep_default_na=False)
    (row,) = metrics.index[(metrics["metric"] == "certified@0.10") & (metrics["checkpoint"] == "bayes")]
    value = float(metrics.loc[row, "value"])
    lines_of = (root / "metrics.csv").read_text().splitlines(keepends=True)
    lines_of[row + 1] = lines_of[row + 1].replace(f"certified@0.10,{value},", "certified@0.10,0.5,")
    (root / "metrics.csv").write_text("".join(lines_of))
    frame = pd.read_parquet(root / "metrics.parquet")
    frame["low"] = [np.nextafter(low, 0) if row == 0 else low for row, low in enumerate(frame["low"])]
    frame.to_parquet(root / "metrics.parquet", index=False)
    board = (root / "leaderboard.csv").read_text()
    (root / "leaderboard.csv").write_text(board.replace("bayes", "bayesian"))
    page = (root / "index.html").read_text()
    (root / "index.html").write_text(page.replace("bayes", "Bayes", 1))
    run = opened(root)
    text = failed(tables.figures(run))
    where = "certify / bayes / sigma=0.25 / certified@0.10"
    assert f"metrics.csv line {row + 2}: {where}: value is 0.5, the records give {value}" in text
    assert f"metrics.parquet line 2: shift / net / {frame['group'][0]} / {frame['metric'][0]}: low is" in text
    assert "leaderboard.csv: bayes is not there" in text
    assert "leaderboard.csv line 3: bayesian is no row that the records give" in text
    assert "index.html line" in text
    assert f"certify / bayes: sigma 0.25: certified@0.1 is 0.5, the votes prove {value}" in failed(
        certificates.certificates(run)
    )


def test_failures_and_seconds_of_the_manifest(root: Path) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    reason = f"{runs.UNCOMPUTED}: no"
    manifest["failures"] = [{"bench": "shift", "checkpoint": "net", "dataset": "all", "reason": reason}]
    manifest["seconds"]["cells"] += 1
    (root / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    text = failed(tables.figures(opened(root)))
    assert "it has 1 failures; there are 0 failures" in text
    assert "seconds.cells is" in text


def test_a_radius_too_large_is_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check must not lean on the code that it checks."""
    honest = certify

    def generous(*given: Any) -> Any:
        found = honest(*given)
        return found._replace(radius=found.radius * (1 + 1e-9))

    run = opened(root)
    assert certificates.certificates(run).state == "ok"
    monkeypatch.setattr(certificates, "certify", generous)
    assert "is more than" in failed(certificates.certificates(run))


def test_a_consistent_forgery_passes_all_but_the_recheck(root: Path) -> None:
    forge(root, [2, 7])
    assert {check.state for check in whole.verify(root, trust=True)} == {"ok"}
    found = whole.verify_again(root, recheck.Again(1.0, 3), trust=True)
    text = failed(found)
    assert text.count("votes on other classes") == 2
    for sample in ("000002", "000007"):
        assert f"certify / bayes / a: sample {sample}: estimate has 20 of {DRAWS} votes on other classes" in text


def test_a_forgery_is_missed_as_often_as_is_said(root: Path, tmp_path: Path) -> None:
    run, forged, seeds = opened(root), {2, 7}, 600
    caught = 0
    for seed in range(seeds):
        found, unseen = recheck.parts(run, recheck.Again(0.25, seed), Store(tmp_path / "none"))
        assert not unseen and [len(part.task.rows) for part in found] == [3, 3]
        dataset = found[1].task.dataset
        assert isinstance(dataset, recheck.Chosen)
        caught += bool(forged & set(dataset.positions))
    odds = recheck.missed(IMAGES, 3, 2)
    assert odds == pytest.approx(9 * 8 * 7 / (12 * 11 * 10) * 12 / 12 * (10 * 9 * 8) / (9 * 8 * 7))
    assert abs(caught / seeds - (1 - odds)) < 4 * np.sqrt(odds * (1 - odds) / seeds)


@pytest.mark.parametrize(("votes", "state"), [(1, "ok"), (2, "FAILED")])
def test_other_hardware_has_a_tolerance(root: Path, votes: int, state: str) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["hardware"] = "another"
    (root / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    forge(root, [5], votes)
    found = whole.verify_again(root, recheck.Again(1.0, 0), trust=True)
    assert found.state == state
    if state == "ok":
        assert f"{votes} of {2 * IMAGES * (DRAWS + 8):,} votes moved (1% a sample may)" in found.said


def test_a_run_that_was_continued_elsewhere_has_a_tolerance(root: Path) -> None:
    path = record(root, "certify", "bayes").with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hardware": "another"}))
    forge(root, [5], 1)
    found = whole.verify_again(root, recheck.Again(1.0, 0), trust=True)
    assert found.state == "ok"
    assert "other hardware or versions: 1 of" in found.said


def test_no_records_are_not_said_to_be_equal(root: Path) -> None:
    shutil.rmtree(root / "records")
    found = whole.verify_again(root, recheck.Again(1.0, 0), trust=True)
    assert (found.state, found.said) == ("not checked", "shift / net / a: it has no records")


def test_what_is_not_at_hand_is_not_evaluated_again(root: Path, made: Path) -> None:
    (made / "w.safetensors").rename(made / "gone")
    try:
        found = whole.verify_again(root, recheck.Again(0.1, 0), trust=True)
    finally:
        (made / "gone").rename(made / "w.safetensors")
    assert found.state == "ok"
    assert any("certify / net / a: " in line and "w.safetensors" in line for line in found.details)


def test_the_command_fails_with_1(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "manifest.json").write_text("{")
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(root)])
    out = capsys.readouterr().out
    assert ended.value.code == 1
    assert "FAILED       digests" in out and "manifest.json was changed" in out and "2 checks failed" in out
