"""The grid minus what is there, and the one loop: batch, view, checkpoint."""

import resource
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa
import torch

from robustbench_diffaug.batch import Batch, Columns, Limits
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.records import to_table
from robustbench_diffaug.store import Cell, Store
from robustbench_diffaug.suite import Bench, Suite

__all__ = ["Outcome", "Task", "cells", "plan", "reason", "run", "settle"]

FORWARDS = 8192  # of a checkpoint in one file: a killed run loses no more than some seconds


@dataclass(frozen=True)
class Task:
    """The unit of work: a range of samples of one dataset, and the cells that lack it."""

    evaluator: Evaluator
    dataset: Dataset
    rows: range
    cells: tuple[Cell, ...]
    store: Store
    limits: Limits

    @property
    def denoised(self) -> int:
        """Images that the denoiser will make."""
        return len(self.rows) * self.evaluator.forwards().denoiser

    @property
    def shown(self) -> int:
        """Images that checkpoints will see, together."""
        return len(self.rows) * self.evaluator.forwards().classifier * len(self.cells)


@dataclass(frozen=True)
class Outcome:
    """What came of a task: the reason of each cell that failed, by its position in the task."""

    task: Task
    failures: Mapping[int, str]


def cells(suite: Suite, bench: Bench) -> Iterator[tuple[Dataset, tuple[Cell, ...]]]:
    """Each dataset of a bench with its cells."""
    for dataset in bench.parts():
        chosen = bench.chosen(suite.checkpoints)
        yield dataset, tuple(Cell(bench.name, entry, bench.evaluator, dataset, suite.seed) for entry in chosen)


def plan(suite: Suite, store: Store, limits: Limits) -> Iterator[Task]:
    """The tasks that are left. Ranges depend on the evaluator alone, so that files are the same however it is run."""
    for bench in suite.benches:
        per_file = max(1, min(128, FORWARDS // bench.evaluator.forwards().classifier))
        size = 1 << (per_file.bit_length() - 1)  # a power of two fills the networks' batches
        for dataset, row in cells(suite, bench):
            lacking: dict[range, list[Cell]] = defaultdict(list)
            for cell in row:
                for rows in store.missing(cell, size):
                    lacking[rows].append(cell)
            for rows, needy in sorted(lacking.items(), key=lambda item: item[0].start):
                yield Task(bench.evaluator, dataset, rows, tuple(needy), store, limits)


def settle(device: str, threads: int | None = None) -> None:
    """Sets what must not vary: deterministic kernels, full float32 precision, and the number of threads."""
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


@torch.no_grad()  # not inference_mode: evaluators may enable gradients
def run(task: Task) -> Outcome:
    """Evaluates the cells of a task and writes a file for each; one that fails stops only itself."""
    live: dict[int, Model] = {}
    failures: dict[int, str] = {}
    for index, cell in enumerate(task.cells):
        try:
            live[index] = cell.checkpoint.loaded(task.limits)
        except Exception as error:
            failures[index] = reason(error)
    tables: dict[int, list[pa.Table]] = defaultdict(list)
    seconds: dict[int, float] = defaultdict(float)
    started = time.perf_counter()
    try:
        for batch in _batches(task):
            _evaluate(task, batch, live, failures, tables, seconds)
    except Exception as error:  # of the dataset or the denoiser: all cells need them
        failures |= dict.fromkeys(live, reason(error))
        live = {}
    shared = time.perf_counter() - started - sum(seconds.values())
    for index in live:
        cost = {
            "seconds": seconds[index] + shared / len(task.cells),
            "device": task.limits.device,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        task.store.write(task.cells[index], task.rows, pa.concat_tables(tables[index]), cost)
    return Outcome(task, failures)


def _evaluate(
    task: Task,
    batch: Batch,
    live: dict[int, Model],
    failures: dict[int, str],
    tables: dict[int, list[pa.Table]],
    seconds: dict[int, float],
) -> None:
    """Makes each view of a batch once and shows it to every checkpoint."""
    seen: dict[int, dict[str, list[Columns]]] = {index: defaultdict(list) for index in live}
    for index, model in list(live.items()):
        if int(batch.labels.max()) >= model.classes:
            found = int(batch.labels.max())
            failures[index] = f"{batch.dataset} has label {found}, and {model.id} knows {model.classes} classes"
            del live[index]
    for view in task.evaluator.views(batch) if live else ():
        for index, model in list(live.items()):
            begun = time.perf_counter()
            try:
                seen[index][view.name].append(task.evaluator.observe(model, view, batch))
            except Exception as error:
                failures[index] = reason(error)
                del live[index]
            seconds[index] += time.perf_counter() - begun
        if not live:
            return
    for index in list(live):
        try:
            columns = task.evaluator.record(seen[index], batch)
            tables[index].append(to_table(batch, task.dataset.declared(), columns))
        except Exception as error:
            failures[index] = reason(error)
            del live[index]


def _batches(task: Task) -> Iterator[Batch]:
    source, rows = task.dataset.opened(), task.dataset.rows()[task.rows.start : task.rows.stop]
    for start in range(0, len(rows), task.limits.batch):
        chosen = rows[start : start + task.limits.batch]
        images, labels = source.read(chosen)
        ids = tuple(source.ids[row] for row in chosen)
        images, labels = images.to(task.limits.device), labels.to(task.limits.device)
        yield Batch(task.dataset.name, ids, images, labels, task.cells[0].seed, task.limits)


def reason(error: Exception) -> str:
    """One line for the report; the type is named unless the error is a plain complaint of ours."""
    text = " ".join(str(error).split()) or "no message"
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


def total(tasks: Iterable[Task]) -> tuple[int, int]:
    """Denoiser and classifier forwards of some tasks."""
    pairs = [(task.denoised, task.shown) for task in tasks]
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
