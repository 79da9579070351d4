"""What the command shows while it works and when it is done."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from robustbench_diffaug import probe, reading
from robustbench_diffaug.engine import Outcome, Task, settle, total
from robustbench_diffaug.engine import plan as tasks_of
from robustbench_diffaug.evaluators.base import Passes
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.runs import Finished, Options
from robustbench_diffaug.shards import WHOLE
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import Suite
from robustbench_diffaug.train import generate, loop, output, parallel
from robustbench_diffaug.train.generate import Generation
from robustbench_diffaug.train.loop import Step
from robustbench_diffaug.train.recipe import Recipe

__all__ = ["board", "cost", "counted", "estimated", "figures", "plan", "progress", "train", "training"]

BACKWARD = 2  # forwards that a backward pass costs about, for the bar alone
VIEWS = 3  # classifier forwards that cost about what a denoiser forward does, for the bar alone


@dataclass
class Shown:
    """A progress bar over network forwards.

    Arguments:
        bar: What is drawn.
        workers: Processes, for the estimate.
        job: Of the bar.
    """

    bar: Progress
    workers: int = 1
    job: TaskID | None = None

    def announce(self, tasks: Sequence[Task], warnings: Sequence[str]) -> None:
        """Says what is about to be done, and how long it will take if that is minutes."""
        for warning in warnings:
            self._say(f"warning: {warning}")
        self._say(f"{len(tasks)} tasks: {counted(total(tasks))}")
        if not self.bar.disable:
            try:
                if probe.worth(tasks):
                    self._say(estimated(probe.estimate(tasks, self.workers)))
            except ValueError as error:  # which the cells of that dataset will fail with
                self._say(f"how long it will take is not known: {error}")
        self.job = self.bar.add_task("evaluating", total=sum(map(_work, tasks)))

    def _say(self, line: str) -> None:
        self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def advance(self, outcome: Outcome) -> None:
        """Moves the bar."""
        if self.job is not None:
            task = outcome.task
            self.bar.update(self.job, advance=_work(task), description=f"{task.cells[0].bench} {task.dataset.name}")


def _work(task: Task) -> float:
    passes = task.passes
    return passes.denoiser + BACKWARD * passes.backward + passes.classifier / VIEWS


def counted(passes: Passes) -> str:
    """Passes through networks, in words."""
    backwards = f" and {passes.backward:,} backwards" if passes.backward else ""
    return f"{passes.denoiser:,} denoiser forwards{backwards} and {passes.classifier:,} classifier forwards"


def estimated(found: probe.Estimate) -> str:
    """What a run will take, in one line: 'about 34 min (shift 30 min, certify 4 min), 1.1 GB; probed in 6 s'."""
    parts = ", ".join(f"{bench} {duration(seconds)}" for bench, seconds in found.benches.items())
    each = f" in each of {found.workers} processes, which are taken not to slow each other" if found.workers > 1 else ""
    memory = f"{found.memory_mb / 1024:.1f} GB{each}"
    return f"about {duration(found.seconds)} ({parts}), {memory}; probed in {duration(found.probed)}"


@contextmanager
def progress(quiet: bool, workers: int = 1) -> Iterator[Shown]:
    """A bar on standard error; on a pipe only its last state is printed. Of `workers` processes is the estimate."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    clocks = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *clocks, console=Console(stderr=True, quiet=quiet), disable=quiet) as bar, _reading(bar):
        yield Shown(bar, workers)


@contextmanager
def figures(quiet: bool = False) -> Iterator[None]:
    """A line on standard error while figures are computed from records, where that takes long."""
    console = Console(stderr=True, quiet=quiet)
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar, _reading(bar):
        yield


@contextmanager
def _reading(bar: Progress) -> Iterator[None]:
    """Adds a line for the reading of heavy records, once there is any."""
    job: list[TaskID] = []
    rows = 0

    def watch(what: str, more: int) -> None:
        nonlocal rows
        rows += more
        if rows and not job:
            job.append(bar.add_task(what, total=None))
        if job:
            bar.update(job[0], description=f"{what}: {rows:,} rows read")

    with reading.watched(watch):
        yield
    for line in job:
        bar.remove_task(line)


@contextmanager
def training(recipe: Recipe | Generation, quiet: bool) -> Iterator[Callable[[Step | tuple[int, int]], None]]:
    """A bar over training steps, or over images that are made."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    clocks = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *clocks, console=Console(stderr=True, quiet=quiet), disable=quiet) as bar:
        job = bar.add_task(recipe.name, total=None)

        def show(step: Step | tuple[int, int]) -> None:
            if isinstance(recipe, Generation) or isinstance(step, tuple):
                assert isinstance(step, tuple)
                bar.update(job, completed=step[0], total=step[1])
                return
            losses = ", ".join(f"{name} {value:.3f}" for name, value in step.losses.items())
            right = "" if step.right is None else f", right {100 * step.right:.0f} %"
            described = f"{recipe.name}: {losses}{right}"
            bar.update(job, completed=step.number, total=recipe.steps, description=described)

        yield show


def cost(recipe: Recipe, seconds: float, done: int, world: int) -> str:
    """What training will cost, in one line.

    Arguments:
        recipe: What is trained.
        seconds: A step takes.
        done: Steps that an earlier run has done.
        world: Processes.
    """
    left = max(0, recipe.steps - done)
    counts = f"{left:,} of {recipe.steps:,} steps left, of {recipe.batch} images"
    shared = f" in {world} processes" if world > 1 else ""
    saved = f"state saved every {recipe.save_every} steps ({recipe.save_every * seconds:.0f} s)"
    return f"{recipe.name}: {counts}{shared}; about {duration(left * seconds)} at {seconds:.3f} s a step; {saved}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it: '40 s', '12 min', '3.5 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def train(
    recipe: output.AnyRecipe | Generation, folder: Path, device: str, quiet: bool, tensorboard: bool
) -> Iterator[str]:
    """Trains or generates with a bar, and says where the results are; of several processes the first one speaks."""
    if isinstance(recipe, Generation):
        settle(device)
        with training(recipe, quiet) as show:
            for made in generate.run(recipe, folder, device):
                show(made)
        yield f"images   {folder}"
        return
    with parallel.joined(device) as (place, own):
        settle(own)
        silent, done = quiet or place.rank > 0, loop.done(recipe, folder / "state.pt")
        if not silent and done < recipe.steps:
            part = recipe.model_copy(update={"batch": max(recipe.accumulate, recipe.batch // place.world)})
            line = cost(recipe, loop.seconds_per_step(part, own), done, place.world)
            Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)
        with training(recipe, silent) as show:
            for step in output.run(recipe, folder, own, place, tensorboard):
                show(step)
    if place.rank == 0:
        yield f"weights  {folder}"
        yield f"entry    {folder / (recipe.name + '.yaml')}"


def plan(suite: Suite, tasks: Sequence[Task], options: Options, probing: bool = False) -> Iterator[str]:
    """What a run would do, as lines; with `probing` also how long that will take."""
    shard = "" if options.shard == WHOLE else f" in shard {options.shard}"
    every = tasks if options.shard == WHOLE else list(tasks_of(suite, Store(options.root), options.limits))
    yield f"suite {suite.name}, seed {suite.seed}, into {Path(options.root)}"
    for bench in suite.benches:
        mine = [task for task in tasks if task.cells[0].bench == bench.name]
        parts, chosen = bench.parts(), bench.chosen(suite.checkpoints)
        rows = sum(len(dataset.rows()) for dataset in parts) * len(chosen)
        left = sum(len(task.rows) * len(task.cells) for task in every if task.cells[0].bench == bench.name)
        passes, each = total(mine), bench.evaluator.forwards()
        counts = f"{len(parts)} datasets x {len(chosen)} checkpoints"
        yield f"bench {bench.name}: {counts} = {len(parts) * len(chosen)} cells"
        how = f"{each.denoiser} a sample shared, {each.own} of each checkpoint" if each.own else "shared"
        there = f"{rows - left:,} of {rows:,} samples are there"
        yield f"  {there}; left{shard}: {passes.denoiser:,} denoiser forwards ({how})"
        backwards = f"{passes.backward:,} denoiser backwards and " if passes.backward else ""
        yield f"  and {backwards}{passes.classifier:,} classifier forwards"
        if isinstance(bench.evaluator, Smoothing):
            for sigma in bench.evaluator.sigmas:
                yield f"  sigma {sigma:g}: largest reachable radius {bench.evaluator.reach(sigma):.4f}"
    yield f"in all {len(tasks)} tasks{shard}, {counted(total(tasks))}"
    if probing and tasks:
        yield estimated(probe.estimate(tasks, options.workers))


def board(done: Finished) -> Iterator[str]:
    """The leaderboard as lines of text: percent with the interval's ends, lengths as they are."""
    if done.leaderboard.empty:
        return
    heads = [name for name in done.leaderboard.columns if f"{name}_low" in done.leaderboard.columns]
    units = dict(zip(done.metrics["metric"], done.metrics["unit"], strict=True))
    width = max(len(str(name)) for name in done.leaderboard["checkpoint"])
    for head in heads:
        percent = units.get(head.partition("[")[0].rpartition(":")[2]) == "fraction"
        yield f"{head}" + (" (%)" if percent else "")
        for _, row in done.leaderboard.iterrows():
            if pd.notna(row[head]):
                scale, digits = (100, 1) if percent else (1, 3)
                low, high = (f"{row[head + end] * scale:.{digits}f}" for end in ("_low", "_high"))
                yield f"  {row['checkpoint']!s:<{width}}  {row[head] * scale:.{digits}f}  [{low}, {high}]"
