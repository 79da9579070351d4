"""The engine: one denoiser pass for all checkpoints, failures that stay where they are, and ranges."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Schedule, Sigma
from robustbench_diffaug.engine import plan, run
from robustbench_diffaug.evaluators.shift import Shift
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import Bench, Suite

CALLS: list[int] = []


class Counting(Denoiser):
    """Notes how many images it is shown."""

    kind: Literal["counting"] = "counting"

    def sigmas(self) -> Any:
        return Schedule().sigmas()

    def load(self, device: torch.device) -> Denoise:
        def denoise(noisy: torch.Tensor, sigma: Sigma) -> Posterior:
            CALLS.append(noisy[..., 0, 0, 0].numel())
            return Posterior(noisy.clamp(0, 1))

        return denoise


class Faulty(Checkpoint):
    """Fails when it is loaded, or when it is shown an image."""

    kind: Literal["faulty"] = "faulty"
    loads: bool

    def load(self) -> torch.nn.Module:
        if not self.loads:
            raise ValueError("no such weights")
        return torch.nn.Linear(3, 3)  # of another shape than the images


def network(name: str, tilt: float = 0.0) -> Bayes:
    return Bayes(id=name, classes=4, temperature=0.01, tilt=tilt)


def suite(*checkpoints: Checkpoint) -> Suite:
    data = (Mixture(name="m", group="clean", size=20),)
    certify = Smoothing(sigmas=(0.25,), denoiser=Counting(), n0=6, n=30)
    ensemble = Shift(modes=("default", "de"), denoiser=Counting(), times=(0, 50, 100))
    benches = (
        Bench(name="certify", evaluator=certify, datasets=data),
        Bench(name="shift", evaluator=ensemble, datasets=data),
    )
    return Suite(name="counted", checkpoints=checkpoints, benches=benches)


def evaluate(root: Path, *checkpoints: Checkpoint, limits: Limits | None = None) -> dict[str, bytes]:
    """Runs a suite; the bytes of all record files."""
    for task in plan(suite(*checkpoints), Store(root), limits or Limits()):
        run(task)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.parquet")}


def test_one_denoiser_pass_serves_all_checkpoints(tmp_path: Path) -> None:
    counts, found = [], {}
    for number in (1, 2, 4):
        CALLS.clear()
        found[number] = evaluate(tmp_path / str(number), *[network(f"n{i}", i) for i in range(number)])
        counts.append((sum(CALLS), len(CALLS)))
    images = 20 * (6 + 30 + 2)
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][0] == images
    for number in (1, 2):  # and nobody's records depend on who else is there
        assert found[number].items() <= found[4].items()


def test_a_checkpoint_that_is_added_later_gets_the_same_records(tmp_path: Path) -> None:
    together = evaluate(tmp_path / "a", network("x"), network("y", 3.0))
    evaluate(tmp_path / "b", network("x"))
    assert evaluate(tmp_path / "b", network("x"), network("y", 3.0)) == together


@pytest.mark.parametrize("loads", [False, True])
def test_a_checkpoint_that_fails_stops_only_itself(loads: bool, tmp_path: Path) -> None:
    alone = evaluate(tmp_path / "a", network("x"))
    broken = Faulty(id="broken", classes=4, loads=loads)
    outcomes = [run(task) for task in plan(suite(network("x"), broken), Store(tmp_path / "b"), Limits())]
    for outcome in outcomes:
        (index,) = outcome.failures
        assert outcome.task.cells[index].checkpoint.id == "broken"
        assert "no such weights" in outcome.failures[index] or loads
    found = {
        path.relative_to(tmp_path / "b").as_posix(): path.read_bytes() for path in tmp_path.rglob("b/**/*.parquet")
    }
    assert found == alone
    left = list(plan(suite(network("x"), broken), Store(tmp_path / "b"), Limits()))
    assert {cell.checkpoint.id for task in left for cell in task.cells} == {"broken"}


def test_limits_change_no_byte(tmp_path: Path) -> None:
    expected = evaluate(tmp_path / "0", network("x"))
    for number, limits in enumerate((Limits(batch=1), Limits(batch=3, budget=8), Limits(batch=64, budget=1)), start=1):
        assert evaluate(tmp_path / str(number), network("x"), limits=limits) == expected


def test_files_hold_no_more_than_some_seconds_of_work(tmp_path: Path) -> None:
    big = Smoothing(sigmas=(0.25, 0.5), n0=100, n=100_000)
    bench = Bench(name="b", evaluator=big, datasets=(Mixture(size=5),))
    tasks = list(plan(Suite(name="s", checkpoints=(network("x"),), benches=(bench,)), Store(tmp_path), Limits()))
    assert [len(task.rows) for task in tasks] == [1] * 5
    assert [(task.denoised, task.shown) for task in tasks] == [(0, 200_200)] * 5


class Nan(Checkpoint):
    """Gives NaN for every image."""

    kind: Literal["nan"] = "nan"

    def load(self) -> torch.nn.Module:
        layer = torch.nn.Linear(64, 4)
        torch.nn.init.constant_(layer.weight, float("nan"))
        return torch.nn.Sequential(torch.nn.Flatten(), layer)


def test_nan_logits_fail_their_checkpoint_and_leave_no_file(tmp_path: Path) -> None:
    alone = evaluate(tmp_path / "a", network("x"))
    outcomes = [
        run(task) for task in plan(suite(Nan(id="n", classes=4), network("x")), Store(tmp_path / "b"), Limits())
    ]
    for outcome in outcomes:
        assert list(outcome.failures) == [0]
        assert "n gives NaN or infinite logits for" in outcome.failures[0]
    root = tmp_path / "b"
    assert {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.parquet")} == alone
