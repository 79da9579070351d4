"""The grid minus what is there, and the one loop: batch, view, checkpoint."""

import resource
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from robustbench_diffaug.batch import Batch, Columns, Limits, View
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.data.base import BadImage, Dataset, undecodable
from robustbench_diffaug.evaluators.base import Evaluator, Passes
from robustbench_diffaug.files import Missing
from robustbench_diffaug.records import to_table
from robustbench_diffaug.shards import WHOLE, Shard
from robustbench_diffaug.store import Cell, Store, of_nothing, with_skipped
from robustbench_diffaug.suite import Bench, Suite

__all__ = ["Outcome", "Task", "cells", "hardware", "lacking", "plan", "reason", "run", "settle", "total"]

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
    def passes(self) -> Passes:
        """What the networks will do."""
        return self.evaluator.forwards().of(len(self.rows), len(self.cells))


@dataclass(frozen=True)
class Outcome:
    """What came of a task: the reason of each cell that failed, by its position in the task."""

    task: Task
    failures: Mapping[int, str]


@dataclass
class _Work:
    """What a task in progress has made and spent; cells by their position in the task.

    Arguments:
        live: The networks of the cells that have not failed.
        constants: Of each network.
        failures: Why the others have.
        tables: The rows of each cell, batch by batch.
        views: Seconds that views took to make, by their name.
        observing: Seconds of each cell's own.
        skipped: The images that were left out, and why.
    """

    live: dict[int, Model] = field(default_factory=dict)
    constants: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    tables: dict[int, list[pa.Table]] = field(default_factory=lambda: defaultdict(list))
    views: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    observing: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    skipped: list[tuple[str, str]] = field(default_factory=list)


def cells(suite: Suite, bench: Bench) -> Iterator[tuple[Dataset, tuple[Cell, ...]]]:
    """Each dataset of a bench with its cells."""
    for dataset in bench.parts():
        chosen = bench.chosen(suite.checkpoints)
        yield dataset, tuple(Cell(bench.name, entry, bench.evaluator, dataset, suite.seed) for entry in chosen)


def plan(suite: Suite, store: Store, limits: Limits, shard: Shard = WHOLE) -> Iterator[Task]:
    """The tasks that are left. Ranges depend on the evaluator alone, so that files are the same however it is run.

    Arguments:
        suite: What is run.
        store: What is there.
        limits: How much at a time and where.
        shard: Which of the tasks; they are numbered as in an empty store, so that shares never depend on what is there.
    """
    dealt = 0
    for bench in suite.benches:
        per_file = max(1, min(128, FORWARDS // bench.evaluator.forwards().classifier))
        size = 1 << (per_file.bit_length() - 1)  # a power of two fills the networks' batches
        for dataset, row in cells(suite, bench):
            lacking: dict[range, list[Cell]] = defaultdict(list)
            for cell in row:
                for rows in store.missing(cell, size):
                    if shard.holds(dealt + rows.start // size):
                        lacking[rows].append(cell)
            for rows, needy in sorted(lacking.items(), key=lambda item: item[0].start):
                yield Task(bench.evaluator, dataset, rows, tuple(needy), store, limits)
            dealt += -(-len(dataset.rows()) // size)


def lacking(suite: Suite, store: Store) -> set[tuple[str, str, str]]:
    """The cells of which samples are not there: bench, checkpoint and dataset."""
    return {
        (cell.bench, cell.checkpoint.id, cell.dataset.name)
        for bench in suite.benches
        for dataset, row in cells(suite, bench)
        for cell in row
        if any(store.missing(cell, max(1, len(dataset.rows()))))
    }


def settle(device: str, threads: int | None = None) -> None:
    """Sets what must not vary: deterministic kernels, full float32 precision, and the number of threads."""
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # oneDNN's kernels of bfloat16 multiply padding by 0 unread; filled with NaN, as this would be, it spreads.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.startswith("cuda:"):  # 'cuda' alone is the current one
        torch.cuda.set_device(device)


def hardware(device: str) -> str:
    """What decides which kernels run: the name of a GPU, or the instructions of the CPU, such as 'AVX512'."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()


@torch.no_grad()  # not inference_mode: evaluators may enable gradients
def run(task: Task) -> Outcome:
    """Evaluates the cells of a task and writes a file for each; one that fails stops only itself."""
    work = _Work()
    for index, cell in enumerate(task.cells):
        try:
            work.live[index] = cell.checkpoint.loaded(task.limits)
        except Exception as error:
            work.failures[index] = reason(error)
    started = time.perf_counter()
    try:
        for batch in _batches(task, work.skipped):
            _evaluate(task, batch, work)
        for index, model in work.live.items():
            work.constants[index] = task.evaluator.constants(model)
    except Exception as error:  # of the dataset, the denoiser or the evaluator: all cells need them
        work.failures |= dict.fromkeys(work.live, reason(error))
        work.live.clear()
    shared = time.perf_counter() - started - sum(work.observing.values())
    for index in work.live:
        table = pa.concat_tables(work.tables[index]) if work.tables[index] else of_nothing()
        cost = {
            "seconds": work.observing[index] + shared / len(task.cells),
            "classifying_seconds": work.observing[index],
            "views": dict(work.views),
            "shared_by": len(task.cells),
            "skipped": len(work.skipped),
            "device": task.limits.device,
            "hardware": hardware(task.limits.device),
            "noise": task.limits.noise,
            "compile": task.limits.compile,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        task.store.keep(task.cells[index], work.constants[index])
        task.store.write(task.cells[index], task.rows, with_skipped(table, work.skipped), cost)
    return Outcome(task, work.failures)


def _evaluate(task: Task, batch: Batch, work: _Work) -> None:
    """Makes each view of a batch once and shows it to every checkpoint."""
    live, failures = work.live, work.failures
    seen: dict[int, dict[str, list[Columns]]] = {index: defaultdict(list) for index in live}
    for index, model in list(live.items()):
        if model.denoise is None and int(batch.labels.max()) >= model.classes:
            found = int(batch.labels.max())
            failures[index] = f"{batch.dataset} has label {found}, and {model.id} knows {model.classes} classes"
            del live[index]
    for view in _timed(task.evaluator.views(batch), work.views, task.limits.device) if live else ():
        for index, model in list(live.items()):
            begun = time.perf_counter()
            try:
                seen[index][view.name].append(task.evaluator.observe(model, view, batch))
            except Exception as error:
                failures[index] = reason(error)
                del live[index]
            work.observing[index] += time.perf_counter() - begun
        if not live:
            return
    for index in list(live):
        try:
            columns = task.evaluator.record(seen[index], batch)
            work.tables[index].append(to_table(batch, task.dataset.declared(), columns))
        except Exception as error:
            failures[index] = reason(error)
            del live[index]


def _timed(views: Iterable[View], seconds: dict[str, float], device: str) -> Iterator[View]:
    """Hands views on, and adds to the seconds of their names what making them took."""
    begun = time.perf_counter()
    for view in views:
        if device.startswith("cuda"):
            torch.cuda.synchronize()  # kernels run on after their calls: they would count as the classifier's
        seconds[view.name] += time.perf_counter() - begun
        yield view
        begun = time.perf_counter()


def _batches(task: Task, skipped: list[tuple[str, str]]) -> Iterator[Batch]:
    """The images of a task; to the list are added those that cannot be decoded, where the dataset leaves them out."""
    dataset, device = task.dataset, task.limits.device
    source, rows = dataset.opened(), dataset.rows()[task.rows.start : task.rows.stop]
    for start in range(0, len(rows), task.limits.batch):
        chosen: Sequence[int] = rows[start : start + task.limits.batch]
        try:
            images, labels = source.read(chosen)
        except BadImage as error:
            bad = undecodable(source, chosen)
            if dataset.on_bad_image == "fail" or not bad:
                count = f"{max(1, len(bad))} of the {len(chosen)} images read together cannot be decoded"
                first = next(iter(bad.values()), str(error))
                raise ValueError(f"{first} ({count}; on_bad_image: skip leaves such images out)") from error
            skipped += [(source.ids[row], reason) for row, reason in bad.items()]
            chosen = [row for row in chosen if row not in bad]
            if not chosen:
                continue
            images, labels = source.read(chosen)
        ids = tuple(source.ids[row] for row in chosen)
        held = images.to(device), labels.to(device)
        seed = task.cells[0].seed
        yield Batch(dataset.name, ids, *held, seed, task.limits, dataset.covers(), dataset.class_space)


def reason(error: Exception) -> str:
    """One line for the report; the type is named unless the error is a plain complaint of ours."""
    text = " ".join(str(error).split()) or "no message"
    return text if type(error) in (ValueError, Missing) else f"{type(error).__name__}: {text}"


def total(tasks: Iterable[Task]) -> Passes:
    """The passes of some tasks together."""
    counts = [task.passes for task in tasks]
    return Passes(*map(sum, zip(*counts, strict=True))) if counts else Passes(0, 0, 0)
