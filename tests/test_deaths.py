"""A worker that dies costs nobody a record: its tasks are run again, and what kills every worker is a failed cell."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pandas as pd
import pytest
import torch

from robustbench_diffaug import executors, runs
from robustbench_diffaug.attempts import Attempt, after_death, cause_of
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.engine import Outcome, Task, plan
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.executors import devices, processes
from robustbench_diffaug.flags import workers_of
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import Bench, Suite, load

NETWORKS = """
import os, signal
from pathlib import Path
import torch
from torch import nn

HERE = Path(__file__).parent

def network():
    layer = nn.Linear(8 * 8, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(layer.weight.numel()).reshape(layer.weight.shape) % 7 - 3.0)
        layer.bias.zero_()
    return nn.Sequential(nn.Flatten(), layer)

def die():
    if os.getpid() != int((HERE / "driver").read_text()):
        os.kill(os.getpid(), signal.SIGKILL)

def once():
    if (HERE / "left").exists():
        (HERE / "left").unlink()
        die()
    return network()

def always():
    die()
    return network()
"""
SUITE = """
name: deaths
checkpoints:
  - {kind: mixture, id: fine, classes: 4}
  - {kind: local, id: once, arch: 'deadly.py:once', classes: 4}
  - {kind: local, id: always, arch: 'deadly.py:always', classes: 4}
benches:
  - name: certify
    evaluator: {kind: smoothing, denoiser: {kind: mixture}, sigmas: [0.25], n0: 8, n: 64}
    datasets: [{kind: mixture, name: m, size: 4}]
"""


def deadly(folder: Path) -> Path:
    """A suite of a network that kills the first worker that builds it, and one that kills all; not this process."""
    (folder / "driver").write_text(str(os.getpid()))
    (folder / "left").touch()
    (folder / "deadly.py").write_text(NETWORKS)
    (folder / "deaths.yaml").write_text(SUITE)
    return folder / "deaths.yaml"


def records(root: Path, checkpoint: str) -> list[tuple[str, bytes]]:
    paths = sorted((root / "records/certify" / checkpoint).rglob("*.parquet"))
    return [(path.relative_to(root).as_posix(), path.read_bytes()) for path in paths]


def test_the_tasks_of_a_killed_worker_are_run_again_and_what_kills_them_all_is_a_failed_cell(
    tmp_path: Path, rdiff: Callable[..., tuple[int, str, str]]
) -> None:
    path = deadly(tmp_path)
    code, _, err = rdiff("run", str(path), "-o", "many", "--trust", "--workers", "2", "-q")
    assert code == 1
    assert not (tmp_path / "left").exists()
    (failed,) = [line for line in err.splitlines() if line.startswith("failed")]
    assert failed.startswith("failed: certify / always / m: the worker process died of it (signal 9; out of memory?)")
    assert not [outcome.failures for outcome in alone(path, tmp_path / "one") if outcome.failures]
    for name in ("fine", "once"):
        assert records(tmp_path / "many", name) == records(tmp_path / "one", name) != []
    assert records(tmp_path / "many", "always") == []
    board = pd.read_csv(tmp_path / "many/leaderboard.csv")
    assert set(board["checkpoint"]) == {"fine", "once"}
    assert {task.cells for task in left(path, tmp_path / "many")} == {left(path, tmp_path / "none")[0].cells[2:]}


def left(path: Path, root: Path) -> list[Task]:
    return runs.tasks_of(load(str(path), trust=True), runs.Options(root))


def alone(path: Path, root: Path) -> list[Outcome]:
    return list(executors.local("cpu")(left(path, root)))


def tasks(folder: Path, size: int, checkpoints: int = 1) -> list[Task]:
    """As many tasks as samples."""
    networks = tuple(Bayes(id=f"c{number}", classes=4, tilt=number) for number in range(checkpoints))
    bench = Bench(name="b", evaluator=Smoothing(sigmas=(0.25,), n0=96, n=8000), datasets=(Mixture(size=size),))
    return list(plan(Suite(name="s", checkpoints=networks, benches=(bench,)), Store(folder), Limits()))


def test_after_a_death_each_cell_is_run_alone_and_after_two_it_has_failed(tmp_path: Path) -> None:
    (task,) = tasks(tmp_path, 1, 3)
    again, decided = after_death(Attempt(task), "signal 9")
    assert decided == []
    assert [attempt.task.cells for attempt in again] == [(cell,) for cell in task.cells]
    assert {attempt.deaths for attempt in again} == {1}
    again, (outcome,) = after_death(again[1], "signal 9")
    assert again == []
    assert outcome.task.cells == task.cells[1:2]
    assert "signal 9" in outcome.failures[0]


def test_causes_of_death() -> None:
    assert cause_of(-9) == "signal 9; out of memory?"
    assert cause_of(-11) == "signal 11"
    assert cause_of(3) == "exit code 3"


class Scripted:
    """A worker that is a thread of this process, and does with each task what a script says.

    Arguments:
        script: Is given the position of the first sample and how often it came; says what the worker answers, or
            'die', 'wait' (until another has died), or 'dead' (it ends before its first task).
    """

    def __init__(self, script: Callable[[int, int], object]) -> None:
        self.script, self.devices, self.came = script, list[str](), dict[int, int]()
        self.died, self.lock = threading.Event(), threading.Lock()

    def start(self, device: str, count: int) -> executors._Worker:
        self.devices.append(device)
        line, theirs = multiprocessing.Pipe()
        threading.Thread(target=self.work, args=(theirs,), daemon=True).start()
        return executors._Worker(Ended(), line, device)

    def work(self, line: Connection) -> None:
        with line:
            if self.script(-1, 0) == "dead":
                return
            line.send(None)
            while True:
                try:
                    first = line.recv().rows.start
                except (EOFError, OSError):
                    return
                with self.lock:
                    self.came[first] = self.came.get(first, 0) + 1
                answer = self.script(first, self.came[first])
                if answer == "wait":
                    assert self.died.wait(20)
                    answer = {}
                if answer == "die":
                    self.died.set()
                    return
                with suppress(OSError):  # nobody waits for it any more
                    line.send(answer)


class Ended(BaseProcess):
    exitcode = -9

    def __init__(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...

    def kill(self) -> None: ...


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], object]], Scripted]:
    def make(script: Callable[[int, int], object]) -> Scripted:
        found = Scripted(script)
        monkeypatch.setattr(executors._Worker, "start", found.start)
        return found

    return make


def mapped(found: Iterator[Outcome]) -> dict[int, dict[int, str]]:
    outcomes = list(found)
    assert len(outcomes) == len({outcome.task.rows.start for outcome in outcomes})
    return {outcome.task.rows.start: dict(outcome.failures) for outcome in outcomes}


def test_every_task_is_decided_once_whoever_dies(
    tmp_path: Path, crew: Callable[[Callable[[int, int], object]], Scripted]
) -> None:
    found = crew(lambda first, times: "die" if first == 2 or (first == 4 and times == 1) else {})
    outcomes = mapped(processes("cpu", 3)(tasks(tmp_path, 9)))
    assert set(outcomes) == set(range(9))
    assert [first for first, failures in outcomes.items() if failures] == [2]
    assert found.came == {first: 2 if first in (2, 4) else 1 for first in range(9)}


def test_a_worker_that_is_idle_takes_the_task_of_one_that_died(
    tmp_path: Path, crew: Callable[[Callable[[int, int], object]], Scripted]
) -> None:
    """The first worker has nothing left to do when the second one dies."""
    idle = threading.Event()

    def script(first: int, times: int) -> object:
        if first == 0:
            idle.set()
            return {}
        if first == 1 and times == 1:
            assert idle.wait(20)
            time.sleep(0.1)  # its answer is on the line
            return "die"
        return {}

    found = crew(script)
    assert mapped(processes("cpu", 2)(tasks(tmp_path, 2))) == {0: {}, 1: {}}
    assert found.came == {0: 1, 1: 2}


def test_a_worker_that_died_between_two_tasks_costs_none_of_them(tmp_path: Path) -> None:
    (task,) = tasks(tmp_path, 1)
    line, theirs = multiprocessing.Pipe()
    theirs.close()
    worker = executors._Worker(Ended(), line, "cpu", ready=True)
    queue = deque([Attempt(task)])
    worker.take(queue)
    assert list(queue) == [Attempt(task)]
    assert worker.heard() == ([], [])
    assert worker.ended


def test_what_is_no_failure_of_a_cell_ends_the_run(
    tmp_path: Path, crew: Callable[[Callable[[int, int], object]], Scripted]
) -> None:
    crew(lambda first, times: OSError(28, "No space left on device") if first == 1 else {})
    with pytest.raises(OSError, match="No space left"):
        list(processes("cpu", 2)(tasks(tmp_path, 4)))
    crew(lambda first, times: "dead")
    with pytest.raises(ValueError, match=r"cannot be started on cpu \(signal 9; out of memory\?\)"):
        list(processes("cpu", 2)(tasks(tmp_path, 4)))


def test_each_worker_has_its_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crew: Callable[[Callable[[int, int], object]], Scripted],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices("cuda", 3) == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices("cuda", 5) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    assert devices("cuda:1", 2) == ["cuda:1", "cuda:1"]
    assert devices("cpu", 2) == ["cpu", "cpu"]
    # One that dies is replaced on the same GPU.
    found = crew(lambda first, times: "die" if first == 1 and times == 1 else "wait" if times == 1 else {})
    mapped(processes("cuda", 3)(tasks(tmp_path, 4)))
    assert sorted(found.devices[:3]) == ["cuda:0", "cuda:1", "cuda:2"]
    assert len(found.devices) <= 4


def test_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert workers_of(None, None, "cuda") == workers_of("local", None, "cuda") == 1
    assert workers_of("processes", None, "cuda") == workers_of("ray", None, "cuda") == 8
    assert workers_of("processes", None, "cuda:3") == workers_of("processes", None, "cpu") == 2
    assert workers_of("processes", 3, "cuda") == workers_of(None, 3, "cpu") == 3
    assert workers_of("ray", 1, "cpu") == 1
    for executor, asked in (("local", 2), ("processes", 1)):
        with pytest.raises(ValueError, match=f"--executor {executor} has"):
            workers_of(executor, asked, "cpu")


def test_ctrl_c_waits_for_the_end_of_what_must_not_be_interrupted() -> None:
    done = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit another
    try:
        with pytest.raises(KeyboardInterrupt), executors._uninterrupted():
            signal.raise_signal(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            done.append(1)
        assert done
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with executors._uninterrupted():
            pass
    finally:
        signal.signal(signal.SIGINT, before)
