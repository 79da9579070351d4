"""Boards of several runs: what is joined, what is refused and why, what is shown apart, and how rows are marked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from robustbench_diffaug import runs, verdict
from robustbench_diffaug.boards import board
from robustbench_diffaug.component import digest_of
from robustbench_diffaug.exchange import robustbench
from robustbench_diffaug.files import sha256
from robustbench_diffaug.folder import put
from robustbench_diffaug.recorded import LOCK, open_run
from robustbench_diffaug.report import tables
from robustbench_diffaug.suite import load
from robustbench_diffaug.verify import notes, whole
from robustbench_diffaug.verify.check import Check
from robustbench_diffaug.verify.recheck import Again

Edit = Callable[[dict[str, Any], dict[str, Any]], None]

EXACT = {"kind": "mixture"}
NAMES = ("<script>alert(1)</script>", "=cmd()", "../../outside", "a\u202eb \U0001f600")
CIFAR10 = Path(__file__).parent / "exchange/robustbench_cifar10.csv"
KEYS = ["bench", "checkpoint", "group", "metric"]


def entry(id: str, tilt: int = 0) -> dict[str, Any]:
    return {"kind": "mixture", "id": id, "classes": 4, "temperature": 0.0016, "tilt": tilt}


def suite_of(name: str, *entries: dict[str, Any]) -> dict[str, Any]:
    clean = {"kind": "mixture", "name": "mixture", "group": "clean", "size": 12}
    return {
        "name": name,
        "checkpoints": list(entries),
        "benches": [
            {"name": "shift", "evaluator": {"kind": "shift"}, "datasets": [clean]},
            {
                "name": "certify",
                "evaluator": {
                    "kind": "smoothing",
                    "denoiser": EXACT,
                    "sigmas": [0.25],
                    "n0": 8,
                    "n": 40,
                    "alpha": 0.01,
                },
                "datasets": [clean | {"size": 8}],
            },
        ],
    }


def execute(folder: Path, name: str, suite: dict[str, Any]) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(suite, sort_keys=False))
    done = runs.execute(load(str(file)), runs.Options(folder / name))
    assert not done.failures
    return done.root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one checkpoint, one of another, and one of both."""
    folder = tmp_path_factory.mktemp("made")
    execute(folder, "alice", suite_of("one", entry("bayes")))
    execute(folder, "bob", suite_of("two", entry("tilted", 120)))
    execute(folder, "both", suite_of("both", entry("bayes"), entry("tilted", 120)))
    return folder


@pytest.fixture
def roots(tmp_path: Path, made: Path) -> Path:
    """Copies of them."""
    for name in ("alice", "bob", "both"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def changed(root: Path, edit: Edit) -> Path:
    """A run of which the lock and the manifest say otherwise, its digests made anew."""
    lock, manifest = yaml.safe_load((root / LOCK).read_text()), json.loads((root / "manifest.json").read_text())
    edit(lock, manifest)
    manifest["suite"]["digest"] = digest_of(lock, 16)
    put(root, {LOCK: yaml.safe_dump(lock, sort_keys=False).encode(), "manifest.json": json.dumps(manifest).encode()})
    return root


def renamed(name: str) -> Edit:
    """The run of bob with another checkpoint's id."""

    def edit(lock: dict[str, Any], manifest: dict[str, Any]) -> None:
        lock["checkpoints"][0]["id"] = manifest["checkpoints"][0]["id"] = name
        for bench in manifest["keys"].values():
            for dataset in bench.values():
                dataset[name] = dataset.pop("tilted", None) or dataset.pop("bayes")

    return edit


def refreshed(root: Path) -> None:
    """The tables of a run anew, after its records or settings were changed; not its page."""
    run = open_run(root)
    put(root, runs.results(run.bare, run.archive, run.manifest, (), drawn=False).files)


def metrics_of(root: Path) -> pd.DataFrame:
    return pd.read_parquet(root / "metrics.parquet").set_index(KEYS).sort_index()


def said_of(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "board.json").read_text())
    return found


def refused(*folders: Path, match: str, separate: bool = False) -> str:
    """The one line with which a board is refused; nothing was written."""
    output = folders[0].parent / "out"
    with pytest.raises(ValueError, match=match) as caught:
        board.report(folders, output, separate, formats=["csv"])
    assert not output.exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_board_of_two_runs_is_the_run_of_all(roots: Path) -> None:
    done = board.report([roots / "alice", roots / "bob"], roots / "out", formats=["csv"])
    whole = pd.read_parquet(roots / "both/metrics.parquet")
    found = pd.read_parquet(roots / "out/metrics.parquet")
    pd.testing.assert_frame_equal(found.drop(columns="suite"), whole.drop(columns="suite"))
    assert found.groupby("checkpoint")["suite"].unique().map(list).to_dict() == {"bayes": ["one"], "tilted": ["two"]}
    for name in ("pairs.csv", "leaderboard.csv"):
        assert (roots / "out" / name).read_bytes() == (roots / "both" / name).read_bytes()
    assert len(tables.pairs_of((roots / "out/pairs.csv").read_bytes())) >= 2  # they were tested across the runs
    assert done.digest == sha256(roots / "out/digests.txt")


def test_the_page_says_of_which_run_each_row_is_and_the_order_does_not_matter(roots: Path) -> None:
    one, two = roots / "alice", roots / "bob"
    board.report([one, two], roots / "out")
    board.report([two, one], roots / "again")
    files = {path.name: path.read_bytes() for path in (roots / "out").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (roots / "again").iterdir()}
    wanted = {"index.html", "leaderboard.csv", "metrics.csv", "metrics.parquet", "pairs.csv", "board.json"}
    assert wanted | {"digests.txt"} <= set(files)
    page = files["index.html"].decode()
    for name in ("alice", "bob"):
        assert f'href="./../{name}"' in page and f'href="./../{name}/manifest.json"' in page
        assert sha256(roots / name / "digests.txt") in page
    said = said_of(roots / "out")["board"]
    assert [run["label"] for run in said["runs"]] == ["alice", "bob"]
    assert {(row["checkpoint"], row["run"], row["mark"]) for row in said["rows"]} == {
        ("bayes", "alice", "verified"),
        ("tilted", "bob", "verified"),
    }


def alpha(lock: dict[str, Any], manifest: dict[str, Any]) -> None:
    lock["benches"][1]["evaluator"]["alpha"] = manifest["benches"][1]["evaluator"]["alpha"] = 0.05


def seed(lock: dict[str, Any], manifest: dict[str, Any]) -> None:
    lock["seed"] = manifest["suite"]["seed"] = 7


def subset(lock: dict[str, Any], manifest: dict[str, Any]) -> None:
    lock["benches"][0]["datasets"][0]["limit"] = 11
    manifest["datasets"][0]["n"] = 11


def space(lock: dict[str, Any], manifest: dict[str, Any]) -> None:
    lock["benches"][0]["datasets"][0]["class_space"] = manifest["datasets"][0]["class_space"] = "full"


def fact(key: str, value: object) -> Edit:
    return lambda lock, manifest: manifest["datasets"][0].update({key: value})


def version(lock: dict[str, Any], manifest: dict[str, Any]) -> None:
    manifest["benches"][0]["version"] += 1


def kind(lock: dict[str, Any], manifest: dict[str, Any]) -> None:
    lock["benches"][0]["evaluator"] = {"kind": "noise", "denoiser": EXACT}


def denoiser(lock: dict[str, Any], manifest: dict[str, Any]) -> None:
    manifest["denoisers"][0]["contents"] = "another"


def datasets(lock: dict[str, Any], manifest: dict[str, Any]) -> None:
    lock["benches"][0]["datasets"][0]["name"] = manifest["datasets"][0]["name"] = "other"


@pytest.mark.parametrize(
    ("edit", "place", "here", "there"),
    [
        (alpha, "benches.certify.evaluator.alpha", "0.01", "0.05"),
        (seed, "seed", "0", "7"),
        (subset, "benches.shift.datasets.mixture.n", "12", "11"),
        (space, "benches.shift.datasets.mixture.class_space", "subset", "full"),
        (fact("digest", "ff"), "benches.shift.datasets.mixture.digest", "", "ff"),
        (fact("n_available", 99), "benches.shift.datasets.mixture.n_available", "12", "99"),
        (version, "benches.shift.evaluator.version", "2", "3"),
        (kind, "benches.shift.evaluator.kind", "shift", "noise"),
        (denoiser, "benches.certify.denoisers.contents", "", "another"),
        (datasets, "benches.shift.datasets", "mixture", "other"),
    ],
)
def test_what_must_not_be_mixed_is_refused_by_name(roots: Path, edit: Edit, place: str, here: str, there: str) -> None:
    other = changed(roots / "bob", edit)
    said = refused(roots / "alice", other, match="these runs cannot share a board")
    assert f"board: {place} is " in said and f"{here}" in said and there in said
    assert f"in {roots / 'alice'}" in said and f"in {other}; --separate" in said


def test_separate_shows_two_boards(roots: Path) -> None:
    other = changed(roots / "bob", alpha)
    refreshed(other)
    board.report([roots / "alice", other], roots / "out", separate=True, formats=["csv"])
    found = pd.read_parquet(roots / "out/metrics.parquet")
    assert set(found["bench"]) == {"shift", "certify@alice", "certify@bob"}
    for name, id in (("alice", "bayes"), ("bob", "tilted")):
        theirs = pd.read_parquet(roots / name / "metrics.parquet")
        theirs = theirs[theirs["bench"] == "certify"].assign(bench=f"certify@{name}").reset_index(drop=True)
        mine = found[found["bench"] == f"certify@{name}"].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, theirs)
        assert set(theirs["checkpoint"]) == {id}
    pairs = tables.pairs_of((roots / "out/pairs.csv").read_bytes())
    assert set(pairs["bench"]) == {"shift"}  # nothing is tested across boards
    assert {row["mark"] for row in said_of(roots / "out")["board"]["rows"]} == {"verified"}


def test_one_setting_for_all_makes_them_alike(roots: Path) -> None:
    other = changed(roots / "bob", alpha)
    setting = "benches.certify.evaluator.alpha=0.05"
    board.report([roots / "alice", other], roots / "out", settings=[setting], formats=["csv"])
    runs.report(roots / "both", roots / "whole", [setting], ["csv"])
    for name in ("leaderboard.csv", "pairs.csv"):
        assert (roots / "out" / name).read_bytes() == (roots / "whole" / name).read_bytes()
    said = said_of(roots / "out")
    assert {row["mark"] for row in said["board"]["rows"]} == {"unverified"}
    assert said["notices"][0].startswith("alice: not verified: the figures are of other settings than its own")


def test_a_bench_of_one_protocol_shares_columns_under_another_name(roots: Path) -> None:
    def edit(lock: dict[str, Any], manifest: dict[str, Any]) -> None:
        lock["benches"][0]["name"] = manifest["benches"][0]["name"] = "plain"
        manifest["datasets"][0]["bench"] = "plain"
        manifest["keys"]["plain"] = manifest["keys"].pop("shift")

    other = changed(roots / "bob", edit)
    (other / "records/shift").rename(other / "records/plain")
    refreshed(other)
    board.report([roots / "alice", other], roots / "out", formats=["csv"])
    assert (roots / "out/leaderboard.csv").read_bytes() == (roots / "both/leaderboard.csv").read_bytes()
    assert "shift: bob calls this bench plain" in said_of(roots / "out")["notices"]


def test_a_network_of_two_runs_has_one_row(roots: Path) -> None:
    board.report([roots / "alice", roots / "both"], roots / "out", formats=["csv"])
    assert (roots / "out/leaderboard.csv").read_bytes() == (roots / "both/leaderboard.csv").read_bytes()
    rows = said_of(roots / "out")["board"]["rows"]
    assert {(row["checkpoint"], row["run"], row["mark"]) for row in rows} == {
        ("bayes", "alice", "verified"),
        ("tilted", "both", "verified"),
    }


def test_another_network_of_the_same_id_is_refused_or_told_apart(roots: Path) -> None:
    other = changed(roots / "bob", renamed("bayes"))
    for bench in ("shift", "certify"):
        (other / "records" / bench / "tilted").rename(other / "records" / bench / "bayes")
    refreshed(other)
    said = refused(roots / "alice", other, match="one id, two networks: checkpoints.bayes.tilt is ")
    assert "--separate" in said and str(other) in said
    board.report([roots / "alice", other], roots / "out", separate=True, formats=["csv"])
    found = metrics_of(roots / "out").index.get_level_values("checkpoint").unique()
    assert list(found) == ["bayes@alice", "bayes@bob"]
    pairs = tables.pairs_of((roots / "out/pairs.csv").read_bytes())
    assert set(zip(pairs["a"], pairs["b"], strict=True)) == {("bayes@alice", "bayes@bob")}


def rewritten(root: Path, bench: str, column: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    """Other records of the checkpoint bayes in a bench, with the report and the digests that follow from them."""
    (path,) = (root / "records" / bench / "bayes").rglob("*.parquet")
    table = pq.ParquetFile(path).read()
    place = table.schema.get_field_index(column)
    values = edit(table[column].combine_chunks().to_numpy(zero_copy_only=False).copy())
    new = table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type))
    pq.write_table(new, path)
    refreshed(root)


def test_records_that_do_not_agree_are_refused_or_told_apart(roots: Path) -> None:
    rewritten(roots / "both", "shift", "pred", lambda found: (found + 1) % 4)
    said = refused(
        roots / "alice", roots / "both", match="the records of bayes in bench shift do not agree: pred of 12"
    )
    assert "of 12 samples, as of mixture/" in said and "--separate" in said
    board.report([roots / "alice", roots / "both"], roots / "out", separate=True, formats=["csv"])
    ids = set(metrics_of(roots / "out").index.get_level_values("checkpoint"))
    assert ids == {"bayes@alice", "bayes@both", "tilted"}


def test_last_digits_of_another_device_are_said(roots: Path) -> None:
    rewritten(roots / "both", "shift", "entropy", lambda found: found + 1e-5)
    board.report([roots / "alice", roots / "both"], roots / "out", formats=["csv"])
    said = "shift: the records of bayes in alice and both differ in entropy of 12 of 12 samples"
    assert said in said_of(roots / "out")["notices"]


def test_other_pixels_under_the_same_names_are_refused(roots: Path) -> None:
    (path,) = (roots / "bob/records/shift").rglob("*.parquet")
    table = pq.ParquetFile(path).read()
    words = ["0" * 16, *table["image"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.schema.get_field_index("image"), "image", [words]), path)
    put(roots / "bob", {})
    said = refused(
        roots / "alice", roots / "bob", match="these runs cannot share a board: benches.shift: image of 1 of 12"
    )
    assert f"{roots / 'alice'} and {roots / 'bob'}" in said
    board.report([roots / "alice", roots / "bob"], roots / "apart", separate=True, formats=["csv"])
    assert set(metrics_of(roots / "apart").index.get_level_values("bench")) == {"shift@alice", "shift@bob", "certify"}


def test_a_folder_that_cannot_be_joined_is_said_in_one_line(roots: Path) -> None:
    alice, bob = roots / "alice", roots / "bob"
    refused(alice, bob, alice, match=f"{alice} is given twice")
    (roots / "link").symlink_to(alice)
    refused(alice, roots / "link", match=f"link is the folder {alice} once more")
    shutil.copytree(alice, roots / "copy")
    refused(alice, roots / "copy", match="are copies of one run")
    refused(alice, roots / "nowhere", match="there is no folder")
    (roots / "empty").mkdir()
    refused(alice, roots / "empty", match="is no finished run folder")
    runs.report(bob, roots / "report", formats=["csv"])
    refused(alice, roots / "report", match="holds a report without its records")
    board.report([alice, bob], roots / "board", formats=["csv"])
    refused(alice, roots / "board", match="holds a board, which has no records of its own; give the runs that it is of")
    assert [check.state for check in whole.verify(roots / "board")] == ["ok", "not checked"]
    changed(roots / "both", lambda lock, manifest: manifest.update(schema_version=7))
    refused(alice, roots / "both", match="both/manifest.json: schema_version is 7, and this rdiff reads 1")
    (path,) = (bob / "records/certify").rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    refused(alice, bob, match=rf"{bob} is damaged: records/.* was changed")
    (bob / "digests.txt").unlink()
    refused(alice, bob, match=r"is damaged: digests.txt is not there")


def test_the_output_is_a_folder_of_its_own(roots: Path) -> None:
    alice, bob = roots / "alice", roots / "bob"
    with pytest.raises(ValueError, match="a board of 2 runs is none of them; say where it goes with --output"):
        board.report([alice, bob], None)
    with pytest.raises(ValueError, match="lies in the run folder"):
        board.report([alice, bob], alice / "board")
    (roots / "mine").mkdir()
    (roots / "mine/thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and holds no board"):
        board.report([alice, bob], roots / "mine")
    board.report([alice, bob], roots / "out", formats=["csv", "md"])
    assert (roots / "out/report.md").read_text().count("tilted")
    board.report([alice, bob], roots / "out", formats=["json"])
    assert {path.name for path in (roots / "out").iterdir()} == {"board.json", "report.json", "digests.txt"}


def test_marks_of_rows(roots: Path) -> None:
    alice, bob = roots / "alice", roots / "bob"
    text = (bob / "metrics.csv").read_text()
    line = next(line for line in text.splitlines() if ",accuracy/clean," in line)
    cells = line.split(",")
    cells[6] = "0.123"
    (bob / "metrics.csv").write_text(text.replace(line, ",".join(cells)))
    put(bob, {})
    notes.write(alice, 0.01, 5)
    board.report([alice, bob], roots / "out", formats=["csv"])
    said = said_of(roots / "out")
    assert {row["run"]: row["mark"] for row in said["board"]["rows"]} == {"alice": "rechecked", "bob": "unverified"}
    assert said["notices"][0].startswith("bob: not verified: metrics.csv has value 0.123 of shift / tilted / clean / ")
    assert "0.123" not in (roots / "out/metrics.csv").read_text()  # what is shown follows from the records
    put(alice, {"costs.csv": b"another,file\n"})  # the note is of the run as it was
    board.report([alice, bob], roots / "out", formats=["csv"])
    assert said_of(roots / "out")["board"]["rows"][0]["mark"] == "verified"
    (alice / notes.NOTE).write_text("{}")
    with pytest.raises(ValueError, match=r"\.rechecked\.json is damaged: it names no digest"):
        board.report([alice, bob], roots / "out", formats=["csv"])


def test_verify_notes_a_recheck_that_passed(roots: Path, rdiff: Callable[..., tuple[int, str, str]]) -> None:
    root = roots / "alice"
    digest = sha256(root / "digests.txt")
    code, out, _ = rdiff("verify", str(root), "--recheck", "10%", "--note", "-q")
    assert code == 0 and "boards mark this run as rechecked" in out
    assert notes.holds(root, digest) and sha256(root / "digests.txt") == digest
    assert not notes.holds(roots / "bob", sha256(roots / "bob/digests.txt"))
    code, _, err = rdiff("verify", str(root), "--note")
    assert code == 2 and "--note notes a recheck" in err


@pytest.mark.parametrize(
    ("checks", "why"),
    [
        ([Check("digests", "FAILED", "x"), Check("recheck", "ok", "y")], "a check failed"),
        ([Check("recheck", "ok", "y", ("shift / a / b: the images are not at hand",))], "not every cell"),
        ([Check("recheck", "not checked", "there are no records")], "not every cell"),
    ],
)
def test_what_has_not_passed_is_not_noted(tmp_path: Path, checks: list[Check], why: str) -> None:
    *_, last = verdict.noted(tmp_path, Again(0.1, 0), iter(checks))
    assert last.state == "not checked" and why in last.said
    assert not any(tmp_path.iterdir())


def test_an_import_has_columns_of_its_own(roots: Path) -> None:
    robustbench.import_run(CIFAR10, roots / "theirs")
    board.report([roots / "alice", roots / "theirs"], roots / "out")
    found = metrics_of(roots / "out")
    theirs = metrics_of(roots / "theirs")
    pd.testing.assert_frame_equal(found.loc[theirs.index], theirs, check_dtype=False)
    rows = {(row["run"], row["mark"]) for row in said_of(roots / "out")["board"]["rows"]}
    assert rows == {("alice", "verified"), ("theirs", "imported")}
    assert "figures of another program" in (roots / "out/index.html").read_text()
    frame = pd.read_parquet(roots / "theirs/metrics.parquet")
    for bad in (frame.drop(columns="low"), frame.assign(value="1"), frame.assign(better="best"), frame[:0]):
        put(roots / "theirs", {"metrics.parquet": tables.to_parquet(bad)})
        with pytest.raises(ValueError, match=r"theirs/metrics.parquet is damaged: "):
            board.report([roots / "alice", roots / "theirs"], roots / "new", formats=["csv"])
    assert not (roots / "new").exists()


def test_hostile_names_are_harmless(tmp_path: Path, made: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(2)>"
    folder.mkdir()
    entries = [entry(name, 10 * number) for number, name in enumerate(NAMES, 1)]
    suite = suite_of("hostile", *entries)
    suite["benches"] = suite["benches"][:1]
    hostile = execute(folder, "=run", suite)
    shutil.copytree(made / "bob", folder / "bob")
    board.report([hostile, folder / "bob"], folder / "out")
    assert {path.name for path in tmp_path.iterdir()} == {folder.name}
    page = (folder / "out/index.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and "&lt;script&gt;alert(1)" in page
    cells = [line.split(",")[0] for line in (folder / "out/leaderboard.csv").read_text().splitlines()]
    assert "'=cmd()" in cells and "=cmd()" not in cells
    said = said_of(folder / "out")["board"]
    assert [run["label"] for run in said["runs"]] == ["_run", "bob"]
    assert {row["mark"] for row in said["rows"]} == {"verified"}


def test_the_command(roots: Path, rdiff: Callable[..., tuple[int, str, str]]) -> None:
    alice, bob = str(roots / "alice"), str(roots / "bob")
    code, out, err = rdiff("report", alice, bob)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "--output" in err
    code, _, err = rdiff("report", alice, "--separate")
    assert code == 2 and "--separate is of several runs" in err
    code, out, _ = rdiff("report", alice, bob, "-o", "out", "--format", "csv")
    assert code == 0 and "tilted" in out and sha256(Path("out/digests.txt")) in out
