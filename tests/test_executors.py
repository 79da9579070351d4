"""Worker processes end with the command that started them, and what killed runs left is cleaned up."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from robustbench_diffaug import runs
from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.engine import plan
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.executors import processes, threads
from robustbench_diffaug.records import Declared, to_table
from robustbench_diffaug.report import page
from robustbench_diffaug.store import Cell, Store
from robustbench_diffaug.suite import Bench, Suite, load

LONG = """
name: long
checkpoints: [{kind: mixture, id: a, classes: 4}]
benches:
  - name: certify
    evaluator: {kind: smoothing, denoiser: {kind: mixture}, sigmas: [0.25], n0: 96, n: 8000}
    datasets: [{kind: mixture, name: m, size: 4000}]
"""


def started(folder: Path, size: int = 4000) -> subprocess.Popen[str]:
    """A long run with two workers, in a process group of its own, when it has written its first files."""
    path = folder / "suite.yaml"
    path.write_text(LONG.replace("size: 4000", f"size: {size}"))
    arguments = [
        sys.executable,
        "-m",
        "robustbench_diffaug",
        "run",
        str(path),
        "-o",
        str(folder / "run"),
        "--workers",
        "2",
    ]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    # Shells start what runs in the background with Ctrl-C ignored, and children inherit that.
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "start_new_session": True}
    process = subprocess.Popen(arguments, text=True, **heed, **pipes)  # type: ignore[call-overload]
    while process.poll() is None and not list(folder.rglob("*.parquet")):
        time.sleep(0.05)
    assert process.poll() is None
    return process  # type: ignore[no-any-return]


def group_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes of its group that are still running."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == process.pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def left_of(process: subprocess.Popen[str]) -> list[int]:
    """Those that are still running when all have had time to end."""
    until = time.monotonic() + 30
    while (found := group_of(process)) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def test_ctrl_c_stops_all_processes_without_a_traceback(tmp_path: Path) -> None:
    process = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.strip().endswith("run again to continue")
    assert left_of(process) == []
    assert list(tmp_path.rglob("*.parquet"))


def test_workers_do_not_outlive_a_command_that_is_killed_and_what_is_finished_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "render", lambda *given: "")  # which takes the longest
    process = started(tmp_path, 40)
    assert len(group_of(process)) >= 3
    process.kill()
    process.communicate(timeout=240)
    assert left_of(process) == []
    finished = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet") if not path.name.startswith(".")}
    assert 0 < len(finished) < 40
    loaded = load(str(tmp_path / "suite.yaml"))
    assert runs.execute(loaded, runs.Options(tmp_path / "run")).computed == 40 - len(finished)
    runs.execute(loaded, runs.Options(tmp_path / "whole"))
    names = ["metrics.csv", "metrics.parquet", "leaderboard.csv"]
    names += [
        path.relative_to(tmp_path / "whole").as_posix() for path in (tmp_path / "whole/records").rglob("*.parquet")
    ]
    assert len(names) == 43
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_outcomes_come_as_they_are_finished_and_closing_stops(tmp_path: Path) -> None:
    evaluator = Smoothing(sigmas=(0.25,), n0=96, n=8000)
    bench = Bench(name="b", evaluator=evaluator, datasets=(Mixture(size=500),))
    tasks = list(
        plan(Suite(name="s", checkpoints=(Bayes(id="a", classes=4),), benches=(bench,)), Store(tmp_path), Limits())
    )
    assert len(tasks) == 500
    outcomes = processes("cpu", 2)(tasks)
    assert not next(outcomes).failures
    outcomes.close()
    assert len(list(tmp_path.rglob("*.parquet"))) < 500


def test_workers_share_the_threads() -> None:
    assert threads(1) == torch.get_num_threads()
    assert threads(1000) == 1


def small(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(LONG.replace("size: 4000", "size: 3").replace("n: 8000", "n: 20"))
    return path


def test_what_killed_runs_left_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    root = tmp_path / "run"
    (root / "records/deep").mkdir(parents=True)
    (root / "suite.lock.yaml").write_bytes(runs.lock(load(str(small(tmp_path))).suite))
    old, new, other = root / "records/deep/.a.parquet.x.part", root / ".b.part", root / "records/.kept"
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    runs.execute(load(str(small(tmp_path))), runs.Options(root))
    assert [path.exists() for path in (old, new, other)] == [False, True, True]
    assert ".part" not in (root / "digests.txt").read_text()


def test_a_run_killed_before_its_first_file_can_be_started_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / ".suite.lock.yaml.x.part").touch()
    (root / ".lock").touch()
    assert runs.execute(load(str(small(tmp_path))), runs.Options(root)).computed == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    with pytest.raises(ValueError, match="no run folder"):
        runs.execute(load(str(small(tmp_path))), runs.Options(tmp_path / "other"))


def test_a_damaged_digest_is_written_anew(tmp_path: Path) -> None:
    loaded, options = load(str(small(tmp_path))), runs.Options(tmp_path / "run")
    first = runs.execute(loaded, options)
    expected = (tmp_path / "run/metrics.csv").read_bytes()
    (tmp_path / "run/digests.txt").write_text("nonsense\n")
    second = runs.execute(loaded, options)
    assert (first.computed, second.computed) == (1, 0)
    assert (tmp_path / "run/metrics.csv").read_bytes() == expected
    check = subprocess.run(["sha256sum", "--quiet", "-c", "digests.txt"], cwd=tmp_path / "run", check=False)
    assert check.returncode == 0


def test_names_with_an_equals_sign_make_no_column_and_short_files_are_named(tmp_path: Path) -> None:
    found = Cell("b", Bayes(id="a=b", classes=4), Smoothing(), Mixture(name="x=1", size=4), 0)
    batch = Batch("x=1", ("0", "1"), torch.zeros(2, 1, 2, 2), torch.zeros(2).long(), 0, Limits())
    rows = to_table(batch, Declared("x=1", "x=1", "g", 0, 4, 4), {"y": torch.zeros(2)})
    store = Store(tmp_path)
    store.write(found, range(2), rows, {})
    assert set(store.read([found]).columns) == {*rows.column_names}
    store.write(found, range(2, 4), rows.slice(0, 1), {})
    with pytest.raises(ValueError, match=r"0000002-0000003.parquet is damaged \(it holds 1 samples\)"):
        store.read([found])
    for beside in tmp_path.rglob("*.json"):
        beside.write_text("{")
    with pytest.raises(ValueError, match="json is damaged"):
        store.costs(found)
