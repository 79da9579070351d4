"""The figures of the noise evaluator, from its records alone."""

from collections.abc import Callable, Iterator
from functools import partial
from math import inf, log, nan
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped

from robustbench_diffaug import paired, stats
from robustbench_diffaug.outcomes import Basis, Deferred, Key, Outcomes, Rows
from robustbench_diffaug.records import Metric, Records, shared

__all__ = ["EARLY", "LATE", "Settings", "gains", "metrics", "outcomes"]

EARLY, LATE = 450, 500
"""The last early and the first late time: the paper's curves with and without DiffAug cross between them."""


class Settings(NamedTuple):
    """What of the evaluator its figures depend on.

    Arguments:
        look: What classifiers were shown, 'noisy' or 'denoised' images.
        times: Those recorded.
        random_time: Whether each image was also shown at a time of its own.
        bins: Of the expected calibration error.
    """

    look: Literal["noisy", "denoised"]
    times: tuple[int, ...]
    random_time: bool
    bins: int

    @property
    def front(self) -> str:
        """What stands in front of metrics; nothing for denoised images, which the shift evaluator names likewise."""
        return "noisy/" if self.look == "noisy" else ""

    def halves(self) -> Iterator[tuple[str, Bool[np.ndarray, " t"]]]:
        """The early and the late times, where there are any."""
        times = np.array(self.times)
        for name, mask in (("early", times <= EARLY), ("late", times >= LATE)):
            if mask.any():
                yield name, mask


def metrics(records: Records, settings: Settings) -> Iterator[Metric]:
    """The curves against t of each group of datasets, their early and late means, and the accuracy at random times."""
    for group, rows in records.groups():
        if settings.times:
            yield from _curves(rows, group, settings)
        if settings.random_time:
            yield _at_random(rows, group, settings)


def _curves(rows: Records, group: str, settings: Settings) -> Iterator[Metric]:
    """Accuracy, entropy, negative log-likelihood and calibration at each time; the largest entropy, and what lacks."""
    front, clusters, key = settings.front, rows.clusters(), rows.key("time", group)
    classes = _classes(rows)
    if classes is not None:
        limit = stats.Estimate(log(classes), nan, nan, len(np.unique(clusters)))
        yield rows.metric(f"{front}entropy/uniform", group, limit, better="lower", unit="nats")
    for index, t in enumerate(settings.times):
        hits = rows["t_pred"][:, index] == rows["label"]
        accuracy = stats.clustered_mean(hits, clusters, key, bounded=True)
        yield rows.metric(f"{front}accuracy@t={t}", group, accuracy)
        confidence = np.clip(rows["t_confidence"][:, index], 0, 1)
        gap = stats.ece_estimate(confidence, hits, rows.key("ece", group, t), clusters, settings.bins)
        yield rows.metric(f"{front}ece@t={t}", group, gap, better="lower")
        for name in ("entropy", "nll"):
            estimate = stats.clustered_mean(rows[f"t_{name}"][:, index], clusters, key)
            yield rows.metric(f"{front}{name}@t={t}", group, estimate, better="lower", unit="nats")
            if name == "entropy" and classes is not None:
                value, low, high, n = estimate
                lacking = stats.Estimate(log(classes) - value, log(classes) - high, log(classes) - low, n)
                yield rows.metric(f"{front}entropy_gap@t={t}", group, lacking, unit="nats")
    for name, mask in settings.halves():
        estimate = stats.clustered_mean(rows["t_entropy"][:, mask].mean(axis=1), clusters, key)
        yield rows.metric(f"{front}entropy/{name}", group, estimate, better="lower", unit="nats")


def _classes(rows: Records) -> int | None:
    """The number of classes that predictions are among, where it is one for all rows."""
    known = int(rows.constants["classes"][0]) if "classes" in rows.constants else 0
    found = {d.classes if d.classes and d.class_space == "subset" else known for d in rows.declared}
    return found.pop() or None if len(found) == 1 else None


def _at_random(rows: Records, group: str, settings: Settings) -> Metric:
    """The accuracy where each image is at one random time, with Wilson's interval where no image counts twice."""
    hits, clusters = rows["random_pred"] == rows["label"], rows.clusters()
    if len(np.unique(clusters)) == len(rows):
        estimate = stats.proportion(hits)
    else:
        estimate = stats.clustered_mean(hits, clusters, rows.key("random", group), bounded=True)
    return rows.metric(f"{settings.front}random-time/accuracy/{group}", group, estimate, headline=True)


def outcomes(records: Records, settings: Settings) -> Deferred:
    """What the curves, the early and late entropies, and the accuracy at random times are means of.

    Arguments:
        records: Of one checkpoint.
        settings: Of the evaluator.
    """
    rows, front, made = Rows(records), settings.front, dict[Key, Callable[[], Basis]]()

    def hits(column: str, place: int | None, group: str) -> Outcomes:
        predicted = records[column] if place is None else records[column][:, place]
        return rows.outcomes(predicted == records["label"], rows.of(lambda dataset: dataset.group == group))

    def mean(name: str, times: int | Bool[np.ndarray, " t"], group: str) -> Outcomes:
        found = records[f"t_{name}"][:, times]
        values = found if found.ndim == 1 else found.mean(axis=1)
        return rows.outcomes(values, rows.of(lambda dataset: dataset.group == group), inf)

    for group, _ in records.groups():
        for index, t in enumerate(settings.times):
            made[f"{front}accuracy@t={t}", group] = partial(hits, "t_pred", index, group)
            for name in ("entropy", "nll"):
                made[f"{front}{name}@t={t}", group] = partial(mean, name, index, group)
        for name, mask in settings.halves() if settings.times else ():
            made[f"{front}entropy/{name}", group] = partial(mean, "entropy", mask, group)
        if settings.random_time:
            made[f"{front}random-time/accuracy/{group}", group] = partial(hits, "random_pred", None, group)
    return Deferred(made)


def gains(records: Records, base: Records, settings: Settings) -> Iterator[Metric]:
    """What a checkpoint has more than another on the images that both have seen, at the same noise.

    Differences of accuracy and entropy at each time, of the early and late entropy, and of the accuracy at random
    times, with intervals paired by image.
    """
    if not len(records) or not len(base):
        return
    first, second = shared(records, base)
    others = dict(base.take(second).groups())
    for group, rows in records.take(first).groups():
        yield from _gains(rows, others[group], group, settings)


def _gains(rows: Records, base: Records, group: str, settings: Settings) -> Iterator[Metric]:
    front, clusters, key = f"{settings.front}gain/", rows.clusters(), rows.key("gain", group)

    def entropy(name: str, one: Shaped[np.ndarray, " n"], other: Shaped[np.ndarray, " n"]) -> Metric:
        found = paired.paired_difference(one, other, clusters, key, bounded=False)
        return rows.metric(f"{front}entropy{name}", group, found, better="lower", unit="nats")

    def accuracy(name: str, column: tuple[Shaped[np.ndarray, " n"], Shaped[np.ndarray, " n"]]) -> Metric:
        one, other = (pred == part["label"] for pred, part in zip(column, (rows, base), strict=True))
        return rows.metric(f"{front}{name}", group, paired.paired_difference(one, other, clusters, key))

    for index, t in enumerate(settings.times):
        yield accuracy(f"accuracy@t={t}", (rows["t_pred"][:, index], base["t_pred"][:, index]))
        yield entropy(f"@t={t}", rows["t_entropy"][:, index], base["t_entropy"][:, index])
    for name, mask in settings.halves():
        one, other = (part["t_entropy"][:, mask].mean(axis=1) for part in (rows, base))
        yield entropy(f"/{name}", one, other)
    if settings.random_time:
        yield accuracy(f"random-time/{group}", (rows["random_pred"], base["random_pred"]))
