"""A Ray cluster of two workers does what one process does. Needs the extra `ray`; `tox -e ray`, or `pytest --ray`."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import ray

from robustbench_diffaug import executors, runs
from robustbench_diffaug.engine import Task
from robustbench_diffaug.ray_executor import ray as executor
from robustbench_diffaug.suite import load
from tests.test_deaths import deadly
from tests.test_merge import SUITE, contents

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that is there already."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


def tasks(path: Path, root: Path) -> list[Task]:
    return runs.tasks_of(load(str(path), trust=True), runs.Options(root))


def test_a_local_cluster_of_two_workers_makes_the_bytes_of_one_process(tmp_path: Path, rdiff: Shell) -> None:
    (tmp_path / "s.yaml").write_text(SUITE)
    assert rdiff("run", "s.yaml", "-o", "one", "-q")[0] == 0
    code, _, err = rdiff("run", "s.yaml", "-o", "many", "--executor", "ray", "--workers", "2", "-q")
    assert (code, err) == (0, "")
    assert not ray.is_initialized()
    assert contents(Path("many")) == contents(Path("one"))
    assert not list(Path("many").glob(".ray-*"))
    code, _, err = rdiff("run", "s.yaml", "-o", "many", "--executor", "ray", "-q")
    assert (code, err) == (0, "nothing was left to do\n")


@pytest.mark.usefixtures("cluster")
def test_the_tasks_of_a_killed_worker_are_run_again_and_what_kills_them_all_is_a_failed_cell(
    tmp_path: Path, rdiff: Shell
) -> None:
    path = deadly(tmp_path)
    code, _, err = rdiff("run", str(path), "-o", "many", "--trust", "--executor", "ray", "-q")
    assert code == 1
    assert not (tmp_path / "left").exists()
    (failed,) = [line for line in err.splitlines() if line.startswith("failed")]
    assert failed.startswith("failed: certify / always / m: the worker process died of it (WorkerCrashedError)")
    assert ray.is_initialized()  # it was there before, and is left alone
    list(executors.local("cpu")(tasks(path, tmp_path / "one")))
    for name in ("fine", "once"):
        (many,), (one,) = ((tmp_path / root / "records/certify" / name).rglob("*.parquet") for root in ("many", "one"))
        assert many.read_bytes() == one.read_bytes()
    assert set(pd.read_csv(tmp_path / "many/leaderboard.csv")["checkpoint"]) == {"fine", "once"}


@pytest.mark.usefixtures("cluster")
def test_what_a_cluster_cannot_do_is_said_in_one_line(
    tmp_path: Path, rdiff: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.yaml").write_text(SUITE)
    root = tmp_path / "run"
    with pytest.raises(ValueError, match="the Ray cluster has no GPU"):
        list(executor("cuda", 2, root)(tasks(tmp_path / "s.yaml", root)))
    with pytest.raises(ValueError, match="Ray chooses the GPU"):
        executor("cuda:0", 2, root)
    outcomes = executor("cpu", 1, root)(tasks(tmp_path / "s.yaml", root))
    assert not next(outcomes).failures
    shutil.rmtree(root)  # as if the nodes saw another folder under that name
    with pytest.raises(ValueError, match=r"a node \(.*\) does not see .*run; all nodes must share the run folder"):
        list(outcomes)
