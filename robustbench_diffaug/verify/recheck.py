"""A share of the samples of a run, evaluated again and compared with what was recorded.

Which samples follows from a number that whoever made the run did not know; so records that were changed together with
all that follows from them are found with a probability that can be said.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, comb
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.data.base import Dataset, Images
from robustbench_diffaug.engine import Outcome, Task, cells, hardware
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.executors import local
from robustbench_diffaug.recorded import Recorded
from robustbench_diffaug.records import INDEX
from robustbench_diffaug.store import Cell, Store
from robustbench_diffaug.suite import Bench
from robustbench_diffaug.verify.check import Check, judged
from robustbench_diffaug.verify.tables import same_versions

__all__ = ["DRAWS", "FLOATS", "Again", "Chosen", "Part", "missed", "parts", "recheck", "share_of"]

DRAWS = 0.01  # of a sample's votes that may fall on other classes on other hardware or versions
FLOATS = 1e-3  # what a float of a record may differ by there
CLASSES = 0.01  # of all recorded classes that may be others there
LEVELS = 2  # of 256, that a picture may differ by there
LONG = 16  # numbers in a column's row, beyond which they are not written out
VOTES = ("select", "estimate")  # columns of `Smoothing`
FORGED = (0.01, 0.05, 0.2)  # shares of a cell's samples for which the probability of being missed is told


class Chosen(Dataset):
    """Some samples of a dataset, under its name, so that their noise is the same.

    Arguments:
        base: The dataset.
        positions: In its declared subset.
    """

    kind: Literal["chosen"] = "chosen"
    base: Dataset
    positions: tuple[int, ...]

    def covers(self) -> tuple[int, ...]:
        """The base's."""
        return self.base.covers()

    def population(self) -> int:
        """The base's."""
        return self.base.population()

    def contents(self) -> str:
        """The base's."""
        return self.base.contents()

    def open(self) -> Images:
        """The samples as the base reads them."""
        source, rows = self.base.opened(), self.base.rows()
        chosen = [rows[position] for position in self.positions]

        def read(wanted: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
            return source.read([chosen[row] for row in wanted])

        return Images([source.ids[row] for row in chosen], read)


@dataclass(frozen=True)
class Again:
    """How much is evaluated again, and where.

    Arguments:
        share: Of each cell's samples, in (0, 1]; at least one sample.
        seed: Of the choice.
        device: 'cpu' or 'cuda[:N]'.
    """

    share: float
    seed: int
    device: str = "cpu"


@dataclass(frozen=True)
class Part:
    """Samples of one dataset to evaluate again.

    Arguments:
        task: Their evaluation.
        recorded: The cells as they were recorded, in the order of the task's.
        total: How many samples of these cells are recorded.
        seconds: What the share took when it was recorded.
    """

    task: Task
    recorded: tuple[Cell, ...]
    total: int
    seconds: float


def share_of(text: str) -> float:
    """A share as it is typed: '1%' or '0.01'.

    Raises:
        ValueError: If it is none.
    """
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"--recheck {text}: needed is a share above 0 and up to 100%, such as 1% or 0.01")
    return share


def missed(total: int, rechecked: int, forged: int) -> float:
    """The probability that none of some forged samples is among those that are evaluated again.

    `C(total - forged, rechecked) / C(total, rechecked)`: the hypergeometric distribution at 0.
    """
    return comb(total - forged, rechecked) / comb(total, rechecked)


def parts(run: Recorded, again: Again, store: Store) -> tuple[list[Part], list[str]]:
    """What to evaluate again, and the datasets that are not at hand, with the reason."""
    found, unseen = list[Part](), list[str]()
    for bench, bare in zip(run.suite.benches, run.bare.benches, strict=True):
        datasets = zip(bench.parts(), cells(run.bare, bare), strict=True)
        for dataset, (_, row) in datasets:
            try:
                dataset.rows()
            except (ValueError, OSError) as error:
                unseen.append(f"{bench.name} / {dataset.name}: {error}")
                continue
            for cell in row:
                if reason := _unfit(_held(run, cell), dataset):
                    unseen.append(f"{bench.name} / {cell.checkpoint.id} / {dataset.name}: {reason}")
            found += _parts(run, bench, dataset, row, again, store)
    return found, unseen


def _held(run: Recorded, cell: Cell) -> tuple[int, ...]:
    """The positions in its dataset that a cell has records of."""
    return tuple(position for first, last, _ in run.archive.files(cell) for position in range(first, last + 1))


def _unfit(held: Sequence[int], dataset: Dataset) -> str:
    """Why records at some positions cannot be evaluated again; empty where they can."""
    if not held:
        return "it has no records"
    size = len(dataset.rows())
    return "" if held[-1] < size else f"it has records beyond the {size} samples that there are"


def _parts(
    run: Recorded, bench: Bench, dataset: Dataset, row: Sequence[Cell], again: Again, store: Store
) -> Iterator[Part]:
    """One part for the cells of a dataset; several where they hold different ranges."""
    alike: dict[tuple[int, ...], list[Cell]] = defaultdict(list)
    for cell in row:
        if not _unfit(held := _held(run, cell), dataset):
            alike[held].append(cell)
    for held, some in alike.items():
        order = rng.permutation(rng.key("recheck", again.seed, bench.name, dataset.name), len(held))
        chosen = sorted(held[place] for place in order[: max(1, ceil(again.share * len(held) - 1e-9))])
        fields = {name: getattr(dataset, name) for name in ("name", "severity", "on_bad_image", "class_space")}
        about = dataset.declared()
        subset = Chosen(base=dataset, positions=tuple(chosen), origin=about.origin, group=about.group, **fields)
        new = tuple(Cell(bench.name, cell.checkpoint, bench.evaluator, subset, cell.seed) for cell in some)
        limits = Limits(device=again.device, compile=bool(run.manifest.get("compile", False)))
        task = Task(bench.evaluator, subset, range(len(chosen)), new, store, limits)
        costs = [cost for cell in some for cost in run.archive.costs(cell)]
        seconds = sum(float(cost.get("seconds", 0.0)) for cost in costs) * len(chosen) / len(held)
        yield Part(task, tuple(some), len(held), seconds)


@dataclass
class _Found:
    """What comparisons came to.

    Arguments:
        wrong: Samples whose records are others, a line each.
        unseen: Cells that could not be evaluated, and why.
        same: Whether all compared cells were made on the hardware and versions that are here.
        draws: Votes compared.
        moved: Of them, those that fell on another class.
        classes: Whole numbers compared that are no votes.
        changed: Of them, those that differ.
        largest: The largest difference of two floats.
        rows: Samples of cells compared.
    """

    wrong: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    same: bool = True
    draws: int = 0
    moved: int = 0
    classes: int = 0
    changed: int = 0
    largest: float = 0.0
    rows: int = 0


def recheck(
    run: Recorded,
    again: Again,
    announce: Callable[[Sequence[Part]], None] = lambda found: None,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Check:
    """Evaluates a share of the samples of every cell again and compares all columns.

    On the hardware and versions of the run they must be equal. On others at most `DRAWS` of a sample's votes (at least
    one) may differ, floats by `FLOATS`, and `CLASSES` of the other whole numbers (at least one); all are counted.

    Arguments:
        run: The run folder.
        again: How much, and where.
        announce: Told what will be evaluated, before it is.
        progress: Told each outcome.
    """
    with TemporaryDirectory() as folder:
        store, found = Store(Path(folder)), _Found()
        chosen, found.unseen = parts(run, again, store)
        announce(chosen)
        outcomes = local(again.device)(part.task for part in chosen)
        for part, outcome in zip(chosen, outcomes, strict=True):
            for index, (new, old) in enumerate(zip(part.task.cells, part.recorded, strict=True)):
                where = f"{old.bench} / {old.checkpoint.id} / {old.dataset.name}"
                if index in outcome.failures:
                    found.unseen.append(f"{where}: {outcome.failures[index]}")
                else:
                    same = _here(run, old, again.device)
                    found.same &= same
                    _compare(run, store, new, old, same, found)
            progress(outcome)
    if not found.same and found.changed > max(1, CLASSES * found.classes):
        found.wrong.append(f"{found.changed} of {found.classes} recorded classes are others")
    return judged("recheck", _said(again, chosen, found), found.wrong, found.unseen, found.rows)


def _said(again: Again, chosen: Sequence[Part], found: _Found) -> str:
    """What was compared, how, and how likely a forgery of some samples would have been missed."""
    text = f"{found.rows:,} rows evaluated again with seed {again.seed}"
    if found.same:
        text += ", all columns equal"
    else:
        text += (
            f", other hardware or versions: {found.moved:,} of {found.draws:,} votes moved ({DRAWS:.0%} a sample may)"
        )
        text += (
            f", {found.changed:,} of {found.classes:,} classes differ, floats by {found.largest:.2g} ({FLOATS:g} may)"
        )
    odds = [
        max((missed(p.total, len(p.task.rows), max(1, ceil(share * p.total - 1e-9))) for p in chosen), default=1.0)
        for share in FORGED
    ]
    told = ", ".join(
        f"{_percent(each)} if {100 * share:g} % are forged" for share, each in zip(FORGED, odds, strict=True)
    )
    return f"{text}; probability of missing a forgery of a cell's samples: {told}"


def _percent(probability: float) -> str:
    """At least one digit that is not zero, and rounded up: it is a bound."""
    if probability <= 0:
        return "0 %"
    digits = max(0, 1 - int(np.floor(np.log10(100 * probability))))
    return f"{ceil(probability * 100 * 10**digits - 1e-9) / 10**digits:g} %"


def _here(run: Recorded, old: Cell, device: str) -> bool:
    """Whether the records of a cell were made on the hardware and versions that are here."""
    compiled, last = bool(run.manifest.get("compile", False)), run.manifest.get("hardware")
    made = {
        (
            str(cost.get("device")).partition(":")[0],
            cost.get("torch"),
            bool(cost.get("compile", False)),
            cost.get("hardware", last),  # a run that was continued elsewhere has records of both machines
        )
        for cost in run.archive.costs(old)
    }
    here = {(device.partition(":")[0], str(torch.__version__), compiled, hardware(device))}
    return made == here and last == hardware(device) and same_versions(run)[0]


def _compare(run: Recorded, store: Store, new: Cell, old: Cell, same: bool, found: _Found) -> None:
    """Adds what differs between two sets of rows of the same samples."""
    made, recorded = (read((cell,), whole=True).columns for read, cell in ((store.read, new), (run.archive.read, old)))
    where = f"{old.bench} / {old.checkpoint.id} / {old.dataset.name}"
    votes = VOTES if isinstance(old.evaluator, Smoothing) else ()
    rows, again = _places(recorded), _places(made)
    for id in new.dataset.opened().ids:  # an image that cannot be decoded has no row in either
        if (id in rows) != (id in again):
            what = "recorded, and evaluated again it has no row" if id in rows else "not recorded"
            found.wrong.append(f"{where}: sample {id} is {what}")
    if not again:
        found.unseen.append(f"{where}: none of the chosen images can be decoded")
    if not rows or not again:
        return
    if list(made) != list(recorded):
        found.wrong.append(f"{where}: its columns are {', '.join(recorded)}, evaluated again {', '.join(made)}")
        return
    for id, row in again.items():
        if id not in rows:
            continue
        found.rows += 1
        for name in made:
            pair = np.asarray(recorded[name][rows[id]]), np.asarray(made[name][row])
            difference = _votes(*pair, same, found) if name in votes else _difference(name, *pair, same, found)
            if difference:
                found.wrong.append(f"{where}: sample {id}: {name} {difference}")


def _places(columns: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The row of each sample."""
    return {id: row for row, id in enumerate(columns["sample"].tolist())} if columns else {}


def _difference(name: str, before: np.ndarray, after: np.ndarray, same: bool, found: _Found) -> str:
    """How a value differs by more than it may; empty where it does not."""
    if before.dtype != after.dtype or before.shape != after.shape:
        return "is of another type or shape"
    if name in INDEX or before.dtype.kind not in "iubf":
        return "" if (before == after).all() else f"is {before}, evaluated again {after}"
    if before.dtype == np.uint8 and not same:  # a picture's tiles
        moved = int(np.abs(before.astype(np.int64) - after).max(initial=0))
        return f"differs by {moved} grey levels" if moved > LEVELS else ""
    if before.dtype.kind in "iub":
        found.classes += before.size
        found.changed += int((before != after).sum())
        return f"is {before}, evaluated again {after}" if same and (before != after).any() else ""
    gaps = np.where(np.isnan(before) & np.isnan(after), 0.0, np.abs(before.astype(np.float64) - after))
    gap = float(np.nan_to_num(gaps, nan=np.inf).max(initial=0.0))
    if same and before.size > LONG and gap:
        return f"differs in {np.count_nonzero(gaps)} of {gaps.size} numbers, by up to {gap:.3g}"
    if same:
        return "" if np.array_equal(before, after, equal_nan=True) else f"is {before}, evaluated again {after}"
    found.largest = max(found.largest, gap)
    return f"differs by {gap:.3g}" if gap > FLOATS else ""


def _votes(before: np.ndarray, after: np.ndarray, same: bool, found: _Found) -> str:
    """How many votes of a sample are on other classes, where these are more than may be."""
    if before.dtype != after.dtype or before.shape != after.shape:
        return "is of another type or shape"
    draws = after.astype(np.int64).sum(axis=-1)
    moved = np.abs(before.astype(np.int64) - after).sum(axis=-1) / 2
    found.draws += int(draws.sum())
    found.moved += int(np.ceil(moved.sum()))
    allowed = np.zeros_like(moved) if same else np.maximum(1, np.floor(DRAWS * draws))
    if (moved <= allowed).all():
        return ""
    return f"has {ceil(float(moved.sum()))} of {int(draws.sum())} votes on other classes, evaluated again"
