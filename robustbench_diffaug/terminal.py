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

from robustbench_diffaug.engine import Outcome, Task, total
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.runs import Finished, Options
from robustbench_diffaug.suite import Suite
from robustbench_diffaug.train.loop import Step
from robustbench_diffaug.train.recipe import Recipe

__all__ = ["board", "plan", "progress", "training"]

VIEWS = 3  # classifier forwards that cost about what a denoiser forward does, for the bar alone


@dataclass
class Shown:
    """A progress bar over network forwards."""

    bar: Progress
    job: TaskID | None = None

    def announce(self, tasks: Sequence[Task], warnings: Sequence[str]) -> None:
        """Says what is about to be done."""
        for warning in warnings:
            self.bar.console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
        denoised, shown = total(tasks)
        self.bar.console.print(
            f"{len(tasks)} tasks: {denoised:,} denoiser forwards and {shown:,} classifier forwards", highlight=False
        )
        self.job = self.bar.add_task("evaluating", total=sum(map(_work, tasks)))

    def advance(self, outcome: Outcome) -> None:
        """Moves the bar."""
        if self.job is not None:
            task = outcome.task
            self.bar.update(self.job, advance=_work(task), description=f"{task.cells[0].bench} {task.dataset.name}")


def _work(task: Task) -> float:
    return task.denoised + task.shown / VIEWS


@contextmanager
def progress(quiet: bool) -> Iterator[Shown]:
    """A bar on standard error; on a pipe only its last state is printed."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    clocks = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *clocks, console=Console(stderr=True, quiet=quiet), disable=quiet) as bar:
        yield Shown(bar)


@contextmanager
def training(recipe: Recipe, quiet: bool) -> Iterator[Callable[[Step], None]]:
    """A bar over training steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    clocks = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *clocks, console=Console(stderr=True, quiet=quiet), disable=quiet) as bar:
        job = bar.add_task(recipe.name, total=recipe.steps)

        def show(step: Step) -> None:
            losses = ", ".join(f"{name} {value:.3f}" for name, value in step.losses.items())
            bar.update(job, completed=step.number, description=f"{recipe.name}: {losses}")

        yield show


def plan(suite: Suite, tasks: Sequence[Task], options: Options) -> Iterator[str]:
    """What a run would do, as lines."""
    yield f"suite {suite.name}, seed {suite.seed}, into {Path(options.root)}"
    for bench in suite.benches:
        mine = [task for task in tasks if task.cells[0].bench == bench.name]
        parts, chosen = bench.parts(), bench.chosen(suite.checkpoints)
        rows = sum(len(dataset.rows()) for dataset in parts) * len(chosen)
        left = sum(len(task.rows) * len(task.cells) for task in mine)
        denoised, shown = total(mine)
        counts = f"{len(parts)} datasets x {len(chosen)} checkpoints"
        yield f"bench {bench.name}: {counts} = {len(parts) * len(chosen)} cells"
        yield f"  {rows - left:,} of {rows:,} samples are there; left: {denoised:,} denoiser forwards (shared)"
        yield f"  and {shown:,} classifier forwards"
        if isinstance(bench.evaluator, Smoothing):
            for sigma in bench.evaluator.sigmas:
                yield f"  sigma {sigma:g}: largest reachable radius {bench.evaluator.reach(sigma):.4f}"
        for warning in bench.evaluator.check():
            yield f"  warning: {warning}"
    denoised, shown = total(tasks)
    yield f"in all {len(tasks)} tasks, {denoised:,} denoiser forwards and {shown:,} classifier forwards"


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
