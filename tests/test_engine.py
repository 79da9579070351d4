"""The engine: one denoiser pass for all checkpoints, failures that stay where they are, and ranges."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.data.base import BadImage, Dataset, Images
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Schedule, Sigma
from robustbench_diffaug.engine import Outcome, plan, run, total
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.evaluators.shift import Shift
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.store import Cell, Store
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
    assert [task.passes for task in tasks] == [(0, 200_200, 0)] * 5


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


class Damaged(Dataset):
    """A mixture some of whose images cannot be decoded."""

    kind: Literal["damaged"] = "damaged"
    name: str = "m"
    size: int = 20
    bad: tuple[int, ...] = ()

    def contents(self) -> str:
        return f"{self.size}"

    def covers(self) -> tuple[int, ...]:
        return (0, 1, 3)

    def open(self) -> Images:
        whole = Mixture(name=self.name, size=self.size).open()

        def read(rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            for row in rows:
                if row in self.bad:
                    raise BadImage(f"image {row} is cut off")
            return whole.read(rows)

        return Images(whole.ids, read)


def damaged(root: Path, dataset: Dataset, evaluator: Evaluator, batch: int = 64) -> tuple[Store, list[Cell], Outcome]:
    """Runs one evaluator with two checkpoints on a dataset of one file."""
    bench = Bench(name="b", evaluator=evaluator, datasets=(dataset,))
    suite = Suite(name="s", checkpoints=(network("x"), network("y", 3.0)), benches=(bench,))
    store = Store(root)
    (task,) = plan(suite, store, Limits(batch=batch))
    return store, list(task.cells), run(task)


ENSEMBLE = Shift(modes=("default", "de"), denoiser=Counting(), times=(0, 50))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_damaged_images_are_left_out_and_recorded(batch: int, tmp_path: Path) -> None:
    bad = (0, 4, 5, 19)
    dataset = Damaged(bad=bad, on_bad_image="skip")
    store, cells, outcome = damaged(tmp_path / "bad", dataset, ENSEMBLE, batch)
    whole, others, _ = damaged(tmp_path / "good", Damaged(), ENSEMBLE)
    assert not outcome.failures
    kept = [row for row in range(20) if row not in bad]
    for cell, other in zip(cells, others, strict=True):
        found, expected = store.read([cell]), whole.read([other])
        assert found.columns.keys() == expected.columns.keys()
        for name, column in found.columns.items():
            assert (column == expected[name][kept]).all(), name
        reasons = [(f"{row:05d}", f"image {row} is cut off") for row in bad]
        assert [reason for _, reason in store.skipped(cell)] == [reason for _, reason in reasons]
        assert list(store.missing(cell, 8)) == []  # the range is done
        metric = next(metric for metric in ENSEMBLE.metrics(found) if metric.name.startswith("accuracy"))
        assert (metric.n, metric.n_available, metric.complete) == (16, 20, False)
    bytes_of = [path.read_bytes() for path in sorted((tmp_path / "bad").rglob("*.parquet"))]
    damaged(tmp_path / "again", dataset, ENSEMBLE)
    assert [path.read_bytes() for path in sorted((tmp_path / "again").rglob("*.parquet"))] == bytes_of


def test_a_damaged_image_fails_its_cells_where_it_is_not_to_be_skipped(tmp_path: Path) -> None:
    _, _, outcome = damaged(tmp_path, Damaged(bad=(4, 5, 19)), ENSEMBLE, batch=10)
    message = "image 4 is cut off (2 of the 10 images read together cannot be decoded; on_bad_image: skip leaves"
    assert list(outcome.failures) == [0, 1]
    assert all(reason.startswith(message) for reason in outcome.failures.values())
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_range_of_nothing_but_damaged_images_is_done_and_empty(tmp_path: Path) -> None:
    dataset = Damaged(bad=tuple(range(20)), on_bad_image="skip")
    store, cells, outcome = damaged(tmp_path, dataset, ENSEMBLE)
    assert not outcome.failures
    assert list(store.missing(cells[0], 8)) == []
    assert len(store.skipped(cells[0])) == 20
    records = store.read(cells[:1])
    assert len(records) == 0
    assert list(Shift().metrics(records)) == []
    # Beside a file with rows, the empty one is none.
    bench = Bench(
        name="b", evaluator=ENSEMBLE, datasets=(Damaged(bad=tuple(range(128)), size=200, on_bad_image="skip"),)
    )
    more = Store(tmp_path / "more")
    for task in plan(Suite(name="s", checkpoints=(network("x"),), benches=(bench,)), more, Limits()):
        assert not run(task).failures
        (cell,) = task.cells
    assert len(more.read([cell])) == 72
    assert len(more.skipped(cell)) == 128


class Curious(Shift):
    """Looks at what a batch says of its classes."""

    kind: Literal["shift"] = "shift"

    def views(self, batch: Any) -> Any:
        SEEN.append((batch.classes, batch.class_space))
        return iter(())

    def record(self, seen: Any, batch: Any) -> Any:
        return {}


SEEN: list[tuple[tuple[int, ...], str]] = []


def test_batches_know_the_classes_of_their_dataset(tmp_path: Path) -> None:
    for space in ("subset", "full"):
        damaged(tmp_path / space, Damaged(class_space=space), Curious())
    assert SEEN == [((0, 1, 3), "subset"), ((0, 1, 3), "full")]


def test_costs_say_what_each_view_took(tmp_path: Path) -> None:
    store, cells, _ = damaged(tmp_path, Damaged(bad=(1,), on_bad_image="skip"), ENSEMBLE)
    ((first,), (second,)) = (store.costs(cell) for cell in cells)
    assert set(first["views"]) == {"t=0", "t=50"}
    assert first["views"] == second["views"]
    assert (first["shared_by"], first["samples"], first["skipped"]) == (2, 20, 1)
    for cost in (first, second):
        assert 0 < cost["classifying_seconds"] < cost["seconds"]
        assert sum(cost["views"].values()) / 2 + cost["classifying_seconds"] < cost["seconds"]
    assert json.loads(next(tmp_path.rglob("*.json")).read_bytes())["views"]


def test_backward_passes_are_counted(tmp_path: Path) -> None:
    class Both(Smoothing):
        def forwards(self) -> Forwards:
            return Forwards(50, 3, 40, own=2, own_backward=1)

    bench = Bench(name="b", evaluator=Both(), datasets=(Mixture(size=10),))
    suite = Suite(name="s", checkpoints=(network("x"), network("y")), benches=(bench,))
    assert total(plan(suite, Store(tmp_path), Limits())) == (500 + 2 * 20, 60, 400 + 20)
    assert total([]) == (0, 0, 0)
