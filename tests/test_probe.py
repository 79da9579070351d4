"""Estimates: exact where the clock is ours, and nothing is left of a probe."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from robustbench_diffaug import probe, terminal
from robustbench_diffaug.batch import Batch, Limits, View
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.data.base import BadImage, Dataset, Images
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.adaptation import Adaptation
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Schedule, Sigma
from robustbench_diffaug.engine import Task, plan, run
from robustbench_diffaug.evaluators.base import Evaluator, Forwards, Passes
from robustbench_diffaug.evaluators.shift import Shift
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import Bench, Suite, load

NOW = [0.0]


def clock() -> float:
    return NOW[0]


class Slow(torch.nn.Module):
    """A linear classifier of which a call takes a quarter of a second."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        NOW[0] += 0.25
        return images.flatten(1)[:, : self.classes]


class Classifier(Checkpoint):
    kind: Literal["slow"] = "slow"
    microbatch: int = 16

    def load(self) -> torch.nn.Module:
        NOW[0] += 7
        return Slow(self.classes)


class Unhurried(Denoiser):
    """A call of 16 images takes one second, and two more with the gradient."""

    kind: Literal["unhurried"] = "unhurried"
    microbatch: int = 16

    def sigmas(self) -> Any:
        return Schedule().sigmas()

    def load(self, device: torch.device) -> Denoise:
        def denoise(noisy: torch.Tensor, sigma: Sigma) -> Posterior:
            calls = -(-noisy[..., 0, 0, 0].numel() // self.microbatch)
            NOW[0] += calls * (3 if torch.is_grad_enabled() and noisy.requires_grad else 1)
            return Posterior(noisy.clamp(0, 1))

        return denoise


class Reading(Dataset):
    """Images that take 10 ms each to read; some cannot be."""

    kind: Literal["reading"] = "reading"
    name: str = "r"
    size: int = 40
    bad: tuple[int, ...] = ()
    channels: int = 1

    def contents(self) -> str:
        return f"{self.size}"

    def open(self) -> Images:
        def read(rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            NOW[0] += 0.01 * len(rows)
            for row in rows:
                if row in self.bad:
                    raise BadImage(f"image {row} is cut off")
            return torch.full((len(rows), self.channels, 8, 8), 0.5), torch.zeros(len(rows), dtype=torch.long)

        return Images([f"{row}" for row in range(self.size)], read)


def classifiers(count: int) -> tuple[Checkpoint, ...]:
    return tuple(Classifier(id=f"c{number}", classes=4) for number in range(count))


def tasks_of(root: Path, evaluator: Evaluator, dataset: Dataset, count: int = 2, batch: int = 64) -> list[Task]:
    bench = Bench(name="b", evaluator=evaluator, datasets=(dataset,))
    suite = Suite(name="s", checkpoints=classifiers(count), benches=(bench,))
    return list(plan(suite, Store(root), Limits(batch=batch)))


def spent(tasks: Sequence[Task]) -> float:
    """Seconds of our clock that the engine takes, networks loaded."""
    for task in tasks:
        for cell in task.cells:
            cell.checkpoint.loaded(task.limits)
    begun = NOW[0]
    for task in tasks:
        assert not run(task).failures
    return NOW[0] - begun


EVALUATORS: dict[str, Evaluator] = {
    "plain": Shift(),
    "ensemble": Shift(modes=("default", "de"), denoiser=Unhurried(), times=(0, 50, 100, 150)),
    "adaptation": Shift(modes=("dda",), denoiser=Unhurried(), dda=Adaptation(N=5, D=2, variance="small")),
    "two calls": Shift(modes=("de",), denoiser=Unhurried(), times=(0, 50), sampler="dpm-solver-2"),
    "four modes": Shift(
        modes=("default", "de", "dda", "dda-se"),
        denoiser=Unhurried(),
        times=(0, 100),
        dda=Adaptation(N=3, D=2, variance="small"),
    ),
}


@given(
    st.sampled_from(sorted(EVALUATORS)),
    st.integers(1, 130),
    st.sampled_from([7, 16, 40, 64, 128]),
    st.integers(1, 3),
)
@settings(max_examples=8, deadline=None)
def test_the_arithmetic_is_that_of_the_engine(name: str, size: int, batch: int, count: int) -> None:
    # Where DDA cuts a batch by itself, what is left at the end is not a share of it.
    assume(name not in ("adaptation", "four modes") or batch <= 16 or size % batch == 0 or size < batch)
    with tempfile.TemporaryDirectory() as folder:
        tasks = tasks_of(Path(folder), EVALUATORS[name], Reading(size=size), count, batch)
        found = probe.estimate(tasks, clock=clock)
        real = spent(tasks)
    assert found.seconds == found.loading + sum(found.benches.values())
    assert sum(found.benches.values()) == pytest.approx(real)


def test_certificates_are_counted_by_what_they_show(tmp_path: Path) -> None:
    certify = Smoothing(sigmas=(0.25,), denoiser=Unhurried(), n0=32, n=224)
    tasks = tasks_of(tmp_path, certify, Reading(size=16))
    assert len(tasks) == 1
    found = probe.estimate(tasks, clock=clock)
    expected = 16 * 256 / 16 * (1 + 2 * 0.25) + 0.16
    assert sum(found.benches.values()) == pytest.approx(spent(tasks)) == pytest.approx(expected)


def test_networks_are_loaded_once_and_told_apart(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, Shift(), Reading(size=256, channels=3), count=3)
    found = probe.estimate([*tasks, *tasks], clock=clock)
    assert found.loading in (0, 7, 14, 21)  # other tests may have loaded some
    assert found.benches == {"b": pytest.approx(2 * (2 * 3 * 8 * 0.25 + 2.56))}


class Unending(Evaluator):
    """Ten views of each batch, each of which takes a second to make."""

    kind: Literal["unending"] = "unending"

    def views(self, batch: Batch) -> Iterator[View]:
        for number in range(10):
            NOW[0] += 1
            yield View(f"{number}", batch.images[:, None])

    def observe(self, model: Any, view: View, batch: Batch) -> Any:
        return {"top": model.logits(view.images[:, 0]).argmax(dim=1)}

    def record(self, seen: Any, batch: Batch) -> Any:
        return seen["9"][0]  # which is not there when the views end early

    def metrics(self, records: Any) -> Any:
        return ()

    def forwards(self) -> Forwards:
        return Forwards(0, 10)


def test_what_would_take_long_is_cut_and_the_rest_taken_to_be_alike(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, Unending(), Reading(size=4), count=1)
    begun = NOW[0]
    found = probe.estimate(tasks, clock=clock)
    assert NOW[0] - begun < 10  # three views and some calls
    assert sum(found.benches.values()) == pytest.approx(spent(tasks)) == 10 + 10 * 0.25 + 0.04


class Gradients(Evaluator):
    """Asks each classifier for a gradient."""

    kind: Literal["gradients"] = "gradients"

    def observe(self, model: Any, view: View, batch: Batch) -> Any:
        with torch.enable_grad():
            images = view.images[:, 0].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model.logits(images).sum(), images)
        return {"length": gradient.flatten(1).norm(dim=1)}

    def metrics(self, records: Any) -> Any:
        return ()


def test_gradients_of_classifiers_are_calls_too(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, Gradients(), Reading(size=40))
    found = sum(probe.estimate(tasks, clock=clock).benches.values())
    assert found == pytest.approx(spent(tasks)) == pytest.approx(2 * 3 * 0.25 + 0.4)


def test_a_second_checkpoint_set_is_a_group_of_its_own(tmp_path: Path) -> None:
    ensemble = EVALUATORS["ensemble"]
    for task in tasks_of(tmp_path, ensemble, Reading(size=256), count=1)[:1]:
        run(task)
    tasks = tasks_of(tmp_path, ensemble, Reading(size=256), count=2)
    assert sorted(len(task.cells) for task in tasks) == [1, 2]
    assert sum(probe.estimate(tasks, clock=clock).benches.values()) == pytest.approx(spent(tasks))


def test_a_probe_leaves_no_file_and_changes_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def records(root: Path, probing: bool) -> dict[str, bytes]:
        loaded = load("smoke")
        tasks = list(plan(loaded.suite, Store(root), Limits()))
        before = torch.get_num_threads(), torch.random.get_rng_state().tolist()
        if probing:
            probe.estimate(tasks, workers=2)
        assert (torch.get_num_threads(), torch.random.get_rng_state().tolist()) == before
        assert not root.exists()
        for task in tasks:
            assert not run(task).failures
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.parquet")}

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert records(tmp_path / "probed", True) == records(tmp_path / "plain", False)
    assert list(temporary.iterdir()) == []


def test_damaged_images_do_not_stop_a_probe(tmp_path: Path) -> None:
    whole = probe.estimate(tasks_of(tmp_path, Shift(), Reading(size=16)), clock=clock).benches
    some = tasks_of(tmp_path, Shift(), Reading(size=16, bad=(0, 3), on_bad_image="skip"))
    assert probe.estimate(some, clock=clock).benches["b"] == pytest.approx(whole["b"], abs=0.3)
    none = tasks_of(tmp_path, Shift(), Reading(size=16, bad=tuple(range(16))))
    with pytest.raises(ValueError, match="no image of r can be read: image 0 is cut off"):
        probe.estimate(none, clock=clock)


def test_workers_share_the_work(tmp_path: Path) -> None:
    tasks = tasks_of(tmp_path, EVALUATORS["ensemble"], Reading(size=256))
    one, two = (probe.estimate(tasks, workers, clock) for workers in (1, 2))
    assert two.benches["b"] == pytest.approx(one.benches["b"] / 2)
    assert probe.estimate([], clock=clock).seconds == 0


def test_short_runs_are_not_probed(tmp_path: Path) -> None:
    assert not probe.worth(list(plan(load("smoke").suite, Store(tmp_path), Limits())))
    ensemble = EVALUATORS["four modes"]
    assert not probe.worth(tasks_of(tmp_path, ensemble, Reading(size=100)))
    assert probe.worth(tasks_of(tmp_path, Smoothing(n=400_000), Reading(size=2)))


def test_what_is_said() -> None:
    found = probe.Estimate({"shift": 1800.0, "certify": 260.0}, 2.0, 1126.4, 1, 6.2)
    assert terminal.estimated(found) == "about 34 min (shift 30 min, certify 4 min), 1.1 GB; probed in 6 s"
    shared = probe.Estimate({"shift": 30.0}, 2.0, 1024.0, 2, 1.0)
    assert terminal.estimated(shared) == (
        "about 32 s (shift 30 s), 1.0 GB in each of 2 processes, which are taken not to slow each other; probed in 1 s"
    )
    assert terminal.counted(Passes(1200, 34, 0)) == "1,200 denoiser forwards and 34 classifier forwards"
    assert terminal.counted(Passes(50, 3, 50)) == ("50 denoiser forwards and 50 backwards and 3 classifier forwards")


def test_a_network_that_cannot_be_loaded_costs_nothing(tmp_path: Path) -> None:
    class Broken(Classifier):
        def load(self) -> torch.nn.Module:
            raise ValueError("no such weights")

    bench = Bench(name="b", evaluator=Shift(), datasets=(Mixture(size=8),))
    checkpoints = (Broken(id="x", classes=4), Bayes(id="y", classes=4))
    tasks = list(plan(Suite(name="s", checkpoints=checkpoints, benches=(bench,)), Store(tmp_path), Limits()))
    assert probe.estimate(tasks).benches["b"] < 60
