"""What a run will take, told before it starts: each network is called a few times, and the rest is counted.

The engine itself runs one short task of each group (an evaluator, its checkpoints, a shape of images) into a folder
that is thrown away. There, stand-ins take the place of the networks and of the dataset: they count calls and answer at
once, so that what is left is all the rest of the work, of noise, views, observations, records and files. A network is
called truly, in its one shape, only until that is timed. So, of a task of `r` samples,

    seconds = r * (reading + rest) + sum over networks of calls(r) * seconds of a call.

A call whose gradient may be asked for counts as one forward and one backward.
"""

import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch

from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.engine import Task, run, settle, total
from robustbench_diffaug.executors import threads
from robustbench_diffaug.stand_ins import PATIENCE, Call, Meter, first_of, of_checkpoint, of_dataset, of_evaluator
from robustbench_diffaug.store import Store

__all__ = ["Estimate", "estimate", "worth"]

FEW = 4  # samples of the first try
WORTH = 2e7  # numbers that pass through networks, above which a run takes minutes: 20,000 forwards of 32x32 pixels


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Arguments:
        benches: Seconds of each bench.
        loading: Seconds until the networks are loaded.
        memory_mb: Peak resident memory of a process. Nothing in it grows with the dataset while samples are evaluated.
        workers: Processes; they are taken not to slow each other, but to share a GPU.
        probed: Seconds that finding out took.
    """

    benches: Mapping[str, float]
    loading: float
    memory_mb: float
    workers: int
    probed: float

    @property
    def seconds(self) -> float:
        """Of the whole run, but for its report."""
        return self.loading + sum(self.benches.values())


def worth(tasks: Sequence[Task]) -> bool:
    """Whether a run is so long that its length should be told: by its forwards and the size of its images alone."""
    sizes: dict[Dataset, int] = {}
    work = 0.0
    for task in tasks:
        if task.dataset not in sizes:
            source = task.dataset.opened()
            sizes[task.dataset] = first_of(source, task.dataset)[0].numel()
        counts = total([task])
        work += (counts.denoiser + 2 * counts.backward + counts.classifier / 3) * sizes[task.dataset]
        if work > WORTH:
            return True
    return False


def estimate(tasks: Sequence[Task], workers: int = 1, clock: Callable[[], float] = time.perf_counter) -> Estimate:
    """Times a little of some tasks and extrapolates; leaves no file and changes no record.

    Arguments:
        tasks: What will be run.
        workers: Processes that will share them.
        clock: Seconds since any moment.

    Raises:
        ValueError: If no image of a dataset can be read.
    """
    begun, before = clock(), torch.get_num_threads()
    device = tasks[0].limits.device if tasks else "cpu"
    meter = Meter(clock, device)
    seconds: dict[str, float] = defaultdict(float)
    settle(device, threads(workers))
    try:
        profiles: dict[object, _Profile] = {}
        with tempfile.TemporaryDirectory(prefix="rdiff-probe-") as folder:
            for task in sorted(tasks, key=lambda task: -len(task.rows)):
                found = meter.read(task.dataset)
                group = (task.evaluator, found.images.shape[1:], tuple(cell.checkpoint for cell in task.cells))
                if group not in profiles:
                    profiles[group] = _profile(task, meter, Path(folder))
                count = len(task.rows)
                seconds[task.cells[0].bench] += profiles[group].seconds(count) + count * found.seconds
    finally:
        torch.set_num_threads(before)
    at_once = 1 if device.startswith("cuda") else workers
    benches = {task.cells[0].bench: seconds[task.cells[0].bench] / at_once for task in tasks}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Estimate(benches, meter.loading, memory, workers, clock() - begun)


@dataclass(frozen=True)
class _Profile:
    """What a batch of one group took.

    Arguments:
        rows: Samples of the batch.
        batch: Samples of a batch of the run.
        share: How much of the batch's work was done.
        rest: Seconds of it that no network took.
        calls: How often each network was given images, by their number and that of its shape.
        each: Seconds of a call.
    """

    rows: int
    batch: int
    share: float
    rest: float
    calls: Mapping[tuple[Call, int, int], float]
    each: Mapping[Call, float]

    def seconds(self, count: int) -> float:
        """Of a task of so many samples, but for reading them."""
        whole, left = divmod(count, self.batch)
        return whole * self._together(self.batch) + (self._together(left) if left else 0.0)

    def _together(self, count: int) -> float:
        """Of one batch: networks are called in one shape, so few images cost as much as that many."""
        scale = count / self.rows
        called = sum(
            times * ceil(images * scale / shape - 1e-9) * self.each[call]
            for (call, images, shape), times in self.calls.items()
        )
        return (self.rest * scale + called) / self.share


def _profile(task: Task, meter: Meter, folder: Path) -> _Profile:
    """Runs a few samples of a task with stand-ins, and then as many as there is time for."""
    most = min(len(task.rows), task.limits.batch)
    found = _pass(task, min(FEW, most), meter, folder)
    if found.share < 1:
        return found
    each = found.rest / found.rows
    return _pass(task, most if each * most < PATIENCE else max(found.rows, int(PATIENCE / each)), meter, folder)


def _pass(task: Task, rows: int, meter: Meter, folder: Path) -> _Profile:
    dataset, evaluator = of_dataset(task.dataset, rows, meter), of_evaluator(task.evaluator, meter)
    cells = tuple(
        replace(cell, checkpoint=of_checkpoint(cell.checkpoint, meter), evaluator=evaluator, dataset=dataset)
        for cell in task.cells
    )
    dataset.opened()
    short = Task(evaluator, dataset, range(rows), cells, Store(folder), task.limits)
    meter.begin()
    begun = meter.now()
    run(short)  # what fails here will fail there, and takes no time
    rest = max(0.0, meter.now() - begun - meter.apart)
    expected = rows * max(1, task.evaluator.forwards().classifier)
    share = min(1.0, meter.shown / expected) if meter.shown and meter.cut else 1.0
    return _Profile(rows, task.limits.batch, share, rest, dict(meter.calls), dict(meter.seconds))
