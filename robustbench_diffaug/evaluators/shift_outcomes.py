"""What the figures of the shift evaluator are means of, so that checkpoints can be tested in pairs."""

from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from robustbench_diffaug.evaluators import shift_metrics as figures
from robustbench_diffaug.evaluators.shift_metrics import Settings
from robustbench_diffaug.outcomes import Basis, Deferred, Key, Outcomes, Rows
from robustbench_diffaug.records import Declared, Records

__all__ = ["outcomes"]

Kept = Callable[[Declared], bool]


class _Figure(NamedTuple):
    """A figure: its name and group, of which datasets it is, and what of each row it is the mean of."""

    key: Key
    keep: Kept
    values: Callable[[], NDArray[Any]]
    width: float = 1.0


def outcomes(records: Records, settings: Settings) -> Deferred:
    """The outcomes of all figures of one checkpoint that are means over rows.

    Arguments:
        records: Of one checkpoint.
        settings: Of the evaluator.
    """
    rows, made = Rows(records), dict[Key, Callable[[], Basis]]()
    for mode in figures.chosen(settings.modes):
        for figure in _mode(records, mode):
            made[figure.key] = partial(_of, rows, figure)
    if "de" in settings.modes:
        for figure in _against_time(records, settings):
            made[figure.key] = partial(_of, rows, figure)
    return Deferred(made)


def _of(rows: Rows, figure: _Figure) -> Outcomes:
    return rows.outcomes(figure.values(), rows.of(figure.keep), figure.width)


def _mode(records: Records, mode: str) -> Iterator[_Figure]:
    """Accuracies by dataset and their means, proper scores, and what the mode gains."""
    front = figures.front_of(mode)
    name, hit = f"{front}accuracy", partial(figures.hits_of, records, mode)
    present = _present(records)
    for group, severity in dict.fromkeys((dataset.group, dataset.severity) for dataset in present):
        label, keep = f"{name}/{group}" + (f"@s{severity}" if severity else ""), figures.of_group(group, severity)
        yield _Figure((label, group), keep, hit)
        for declared in sorted({dataset.class_space for dataset in present if dataset.classes and keep(dataset)}):
            other = "full" if declared == "subset" else "subset"
            yield _Figure(
                (f"{label}/classes={other}", group),
                _both(keep, figures.in_space(declared)),
                partial(figures.hits_of, records, mode, "other_pred"),
            )
    for label, group, keep in figures.means(records):
        if any(map(keep, present)):
            yield _Figure((f"{name}/{label}", group), keep, hit)
    for group, keep in _parts(present):
        for score, width in (("nll", inf), ("brier", 2.0), ("entropy", inf)):
            yield _Figure((f"{front}{score}", group), keep, partial(figures.column_of, records, mode, score), width)
    if mode != "default":
        for label, group, keep in figures.gains():
            if any(map(keep, present)):
                yield _Figure((f"{front}gain/{label}", group), keep, partial(_gain, records, mode), 2.0)


def _gain(records: Records, mode: str) -> NDArray[np.float64]:
    """How much better the mode is on each row than the plain network: 1, 0 or -1."""
    return np.asarray(figures.hits_of(records, mode).astype(float) - figures.hits_of(records, "default"))


def _against_time(records: Records, settings: Settings) -> Iterator[_Figure]:
    for group, keep in _parts(_present(records)):
        for index, t in enumerate(settings.times):
            yield _Figure((f"accuracy@t={t}", group), keep, partial(_hit_at, records, "t_pred", index))
            yield _Figure((f"de/accuracy@t<={t}", group), keep, partial(_hit_at, records, "de_pred", index))
            yield _Figure((f"entropy@t={t}", group), keep, partial(_at, records, "t_entropy", index), inf)
        for step in settings.steps:
            for index, t in enumerate(t for t in settings.times if t % step == 0):
                at = partial(_hit_at, records, f"de_step{step}_pred", index)
                yield _Figure((f"de[step={step}]/accuracy@t<={t}", group), keep, at)


def _at(records: Records, column: str, index: int) -> NDArray[Any]:
    return np.asarray(records[column][:, index])


def _hit_at(records: Records, column: str, index: int) -> NDArray[np.bool_]:
    return np.asarray(records[column][:, index] == records["label"])


def _both(one: Kept, other: Kept) -> Kept:
    return lambda dataset: one(dataset) and other(dataset)


def _present(records: Records) -> list[Declared]:
    """The datasets that there are rows of."""
    names = set(records.datasets[0]) if len(records) else set()
    return [dataset for dataset in records.declared if dataset.name in names]


def _parts(present: list[Declared]) -> Iterator[tuple[str, Kept]]:
    """The images of each group without corruption, and all corrupted ones."""
    for group in dict.fromkeys(dataset.group for dataset in present if not dataset.severity):
        yield group, figures.of_group(group, 0)
    if any(map(figures.common, present)):
        yield "corruptions", figures.common
