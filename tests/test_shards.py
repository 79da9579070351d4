"""Shards divide a plan: each task is of one of them, whatever is there already, in folders of their own or in one."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from robustbench_diffaug import runs
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.engine import Task, plan
from robustbench_diffaug.executors import local
from robustbench_diffaug.report import page
from robustbench_diffaug.shards import WHOLE, Shard
from robustbench_diffaug.shares import partial
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import load

SUITE = """
name: tiny
checkpoints: [{kind: mixture, id: a, classes: 4}, {kind: mixture, id: b, classes: 4, tilt: 120}]
benches:
  - name: plain
    evaluator: {kind: shift}
    datasets: [{kind: mixture, name: m, size: 4}]
  - name: certify
    evaluator: {kind: smoothing, denoiser: {kind: mixture}, sigmas: [0.25], n0: 16, n: 2000}
    datasets: [{kind: mixture, name: m, size: 14}]
"""
Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "s.yaml").write_text(SUITE)
    return tmp_path / "s.yaml"


@pytest.mark.parametrize(
    "text", ["0/3", "4/3", "1", "1/0", "/", "a/b", "1/3/3", "-1/3", "1/9999999", "", "1 / 3", "¹/3"]
)
def test_a_text_that_names_no_share_is_refused(text: str, suite: Path, rdiff: Shell) -> None:
    for command in ("run", "plan"):
        code, out, err = rdiff(command, str(suite), "--shard", text)
        assert (code, out) == (2, "")
        assert err == f"rdiff: --shard {text}: needed is I/N with I from 1 to N, as 1/4\n"
    assert str(Shard.parse("2/3")) == "2/3"


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_task_is_of_one_share_whatever_is_there(count: int, suite: Path, tmp_path: Path) -> None:
    found = load(str(suite)).suite
    empty, begun = Store(tmp_path / "none"), Store(tmp_path / "begun")
    shares = [list(plan(found, empty, Limits(), Shard(index, count))) for index in range(1, count + 1)]
    whole = list(plan(found, empty, Limits()))

    def key(task: Task) -> tuple[str, int]:
        return task.cells[0].bench, task.rows.start

    assert sorted((task for share in shares for task in share), key=key) == sorted(whole, key=key)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    list(local("cpu")(plan(found, begun, Limits(), Shard(1, 2))))
    for index, share in enumerate(shares, 1):
        left = {key(task) for task in plan(found, begun, Limits(), Shard(index, count))}
        done = {key(task) for task in plan(found, empty, Limits(), Shard(1, 2))}
        assert left == {key(task) for task in share} - done


def test_the_plan_of_a_share_counts_what_the_share_does(suite: Path, rdiff: Shell) -> None:
    counted = []
    for words in ([], ["--shard", "1/2"], ["--shard", "2/2"]):
        code, out, _ = rdiff("plan", str(suite), *words)
        assert code == 0
        assert "  0 of 28 samples are there; left" in out
        counted.append(int(out.splitlines()[-1].split("in all ")[1].split()[0]))
    assert "in all 2 tasks in shard 2/2, " in out
    assert counted == [5, 3, 2]
    assert rdiff("run", str(suite), "--shard", "1/2", "-q")[0] == 0
    code, out, _ = rdiff("plan", str(suite), "--shard", "1/2")
    assert "in all 0 tasks in shard 1/2, 0 denoiser forwards" in out
    code, out, _ = rdiff("plan", str(suite), "--shard", "2/2")
    assert "in all 2 tasks in shard 2/2, " in out
    assert "  12 of 28 samples are there; left in shard 2/2: " in out
    # A finished share is left alone, has no figures yet, and says so.
    before = {path: path.read_bytes() for path in Path("reports").rglob("*") if path.is_file()}
    code, out, err = rdiff("run", str(suite), "--shard", "1/2", "-q")
    assert (code, err) == (0, "nothing was left to do\n")
    said = "2 cells lack samples, first certify / a / m; here is shard 1/2: rdiff merge adds others, rdiff run makes"
    assert out.startswith(said)
    assert {path: path.read_bytes() for path in Path("reports").rglob("*") if path.is_file()} == before
    refused = (2, f"rdiff: reports/tiny has no figures yet: {said} the rest\n")
    assert rdiff("report", "reports/tiny")[0::2] == refused
    assert rdiff("compare", "reports/tiny", "--a", "a", "--b", "b")[0::2] == refused
    code, out, err = rdiff("verify", "reports/tiny")
    assert (code, err) == (0, "")
    assert f"not checked  figures       there are none yet: {said} the rest" in out.splitlines()
    assert "FAILED" not in out
    Path("reports/tiny/metrics.csv").touch()
    assert "metrics.csv is there, and samples are missing" in rdiff("verify", "reports/tiny")[1]


def test_shards_may_write_one_folder_at_the_same_time(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "render", lambda *given: "")  # which takes the longest
    runs.execute(load(str(suite)), runs.Options(tmp_path / "whole"))
    found: list[runs.Finished] = []

    def work(index: int) -> None:
        found.append(runs.execute(load(str(suite)), runs.Options(tmp_path / "one", shard=Shard(index, 2))))

    threads = [threading.Thread(target=work, args=(index,)) for index in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(bool(done.partial) for done in found) in ([False, False], [False, True])
    names = ["metrics.csv", "metrics.parquet", "leaderboard.csv"]
    names += [
        path.relative_to(tmp_path / "whole").as_posix() for path in (tmp_path / "whole/records").rglob("*.parquet")
    ]
    assert len(names) > 8
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "one/digests.txt").read_bytes() == runs.digests(tmp_path / "one")
    manifest = json.loads((tmp_path / "one/manifest.json").read_bytes())
    assert sorted(entry["shard"] for entry in manifest["runs"]) == ["1/2", "2/2"]


def test_there_are_figures_when_every_share_has_done_what_it_could() -> None:
    """A cell that failed in one share may yet get its samples from the others."""
    cell = ("b", "c", "d")
    failures = [{"bench": "b", "checkpoint": "c", "dataset": "d", "reason": "it is too large"}]

    def told(*shards: str, failed: bool = True) -> str:
        entries = [{"shard": shard} if shard else {} for shard in shards]
        return partial({"runs": entries, "failures": failures if failed else []}, {cell})

    assert "1 cell lacks samples, first b / c / d; here is shard 1/2, 1/3:" in told("1/3", "1/2")
    assert not told("1/2", "2/2")
    assert not told("1/2", "")  # a run of the whole
    assert told("1/2", "2/2", failed=False)
    assert told("1/2", "2/3")
    assert not partial({"failures": failures}, {cell})
    assert not partial({"runs": [{"shard": "1/2"}]}, set())
    assert str(WHOLE) == "1/1"
