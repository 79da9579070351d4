"""Boards of several runs: what is joined, how rows are marked, and what is written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from robustbench_diffaug import verdict
from robustbench_diffaug.boards import board
from robustbench_diffaug.exchange import robustbench
from robustbench_diffaug.files import sha256
from robustbench_diffaug.folder import put
from robustbench_diffaug.report import tables
from robustbench_diffaug.verify import notes
from robustbench_diffaug.verify.check import Check
from robustbench_diffaug.verify.recheck import Again
from tests.board_runs import changed, entry, execute, metrics_of, refreshed, said_of, suite_of

CIFAR10 = Path(__file__).parent / "exchange/robustbench_cifar10.csv"
NAMES = ("<script>alert(1)</script>", "=cmd()", "../../outside", "a\u202eb \U0001f600")


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


def test_hostile_names_are_harmless(tmp_path: Path, board_runs: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(2)>"
    folder.mkdir()
    entries = [entry(name, 10 * number) for number, name in enumerate(NAMES, 1)]
    suite = suite_of("hostile", *entries)
    suite["benches"] = suite["benches"][:1]
    hostile = execute(folder, "=run", suite)
    shutil.copytree(board_runs / "bob", folder / "bob")
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
