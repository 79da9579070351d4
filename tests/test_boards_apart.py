"""What must not be mixed on a board: refused in one line that names the field, or shown apart."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustbench_diffaug import runs
from robustbench_diffaug.boards import board
from robustbench_diffaug.folder import put
from robustbench_diffaug.protocols import Difference
from robustbench_diffaug.report import tables
from robustbench_diffaug.verify import whole
from tests.board_runs import EXACT, Edit, changed, metrics_of, refreshed, refused, said_of


def renamed(name: str) -> Edit:
    """The run of bob with another checkpoint's id."""

    def edit(lock: dict[str, Any], manifest: dict[str, Any]) -> None:
        lock["checkpoints"][0]["id"] = manifest["checkpoints"][0]["id"] = name
        for bench in manifest["keys"].values():
            for dataset in bench.values():
                dataset[name] = dataset.pop("tilted", None) or dataset.pop("bayes")

    return edit


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
        roots / "alice",
        roots / "both",
        match="the records of bayes in bench shift do not agree: pred of 12",
    )
    assert "of 12 samples, as of mixture/" in said and "--separate" in said
    board.report([roots / "alice", roots / "both"], roots / "out", separate=True, formats=["csv"])
    ids = set(metrics_of(roots / "out").index.get_level_values("checkpoint"))
    assert ids == {"bayes@alice", "bayes@both", "tilted"}


def test_of_long_values_what_differs_is_shown() -> None:
    names = [f"set-{number}" for number in range(20)]
    said = Difference("datasets", names, [*names[:12], "other", *names[12:]]).said(Path("a"), Path("b"))
    assert said.startswith("datasets is ...") and len(said) < 160
    mine, theirs = said.split(" in a and ")
    assert "'set-12'" in mine and "'other'" in theirs and "'set-11'" in mine and "'set-11'" in theirs


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
        roots / "alice",
        roots / "bob",
        match="these runs cannot share a board: benches.shift: image of 1 of 12",
    )
    assert f"{roots / 'alice'} and {roots / 'bob'}" in said
    board.report([roots / "alice", roots / "bob"], roots / "apart", separate=True, formats=["csv"])
    assert set(metrics_of(roots / "apart").index.get_level_values("bench")) == {
        "shift@alice",
        "shift@bob",
        "certify",
    }


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
    refused(
        alice,
        roots / "board",
        match="holds a board, which has no records of its own; give the runs that it is of",
    )
    assert [check.state for check in whole.verify(roots / "board")] == ["ok", "not checked"]
    changed(roots / "both", lambda lock, manifest: manifest.update(schema_version=7))
    refused(alice, roots / "both", match="both/manifest.json: schema_version is 7, and this rdiff reads 1")
    (path,) = (bob / "records/certify").rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    refused(alice, bob, match=rf"{bob} is damaged: records/.* was changed")
    (bob / "digests.txt").unlink()
    refused(alice, bob, match=r"is damaged: digests.txt is not there")
