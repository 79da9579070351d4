"""Figures of out-of-distribution detection, from records: the protocol's means, gains, curves, and remarks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from robustbench_diffaug.detection.curves import roc
from robustbench_diffaug.detection.intervals import Placements, Replicates, average, placements, replicates
from robustbench_diffaug.detection.scores import SCORES, score_of
from robustbench_diffaug.evaluators.ood_scored import Protocol, Scored, scored
from robustbench_diffaug.outcomes import Areas, Basis, Deferred, Key, Rows
from robustbench_diffaug.records import Better, Metric, Records, shared
from robustbench_diffaug.stats import Estimate, proportion

__all__ = ["gains", "metrics", "notices", "outcomes"]

FALSE = tuple(float(rate) for rate in (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1))
BINS = 32
SHOWN = 3  # images that a notice names
MEANS = ("near", "far", "near-fs", "far-fs")  # of which the scores are averaged
LOWER = ("fpr95_ood_positive", "fpr95_id_positive", "detection_error")


@dataclass(frozen=True, eq=False)
class Set:
    """Test sets that a figure is the unweighted mean over.

    Arguments:
        name: 'near', 'far', or the name of a dataset; with '-fs' where the ID images are the full spectrum.
        inside: The roles of its ID images.
        outside: Names of its datasets.
    """

    name: str
    inside: tuple[str, ...]
    outside: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Sheet:
    """The scores of one checkpoint, and the figures of each score and set.

    Arguments:
        records: Of the checkpoint, or of the images that it shares with another.
        scores: By name, one of each row.
        resamples: Of the bootstrap.
        parts: The records of each set, once they were asked for.
        resampled: The figures of each dataset by score, ID roles and name, likewise.
    """

    records: Records
    scores: Mapping[str, NDArray[np.float64]]
    resamples: int
    parts: dict[str, Records] = field(default_factory=dict)
    resampled: dict[tuple[str, tuple[str, ...], str], dict[str, Replicates]] = field(default_factory=dict)

    def sets(self, parts: bool = True) -> list[Set]:
        """The sets there are images of: near and far, these with the full spectrum, and each dataset."""
        groups = self.records["group"]
        if not (groups == "id").any():
            return []
        present = dict(zip(self.records["dataset"].tolist(), groups.tolist(), strict=True))
        spectra: list[tuple[str, tuple[str, ...]]] = [("", ("id",))]
        spectra += [("-fs", ("id", "csid"))] if (groups == "csid").any() else []
        found = []
        for mark, inside in spectra:
            for role in ("near", "far"):
                names = tuple(name for name, group in present.items() if group == role)
                found += [Set(f"{role}{mark}", inside, names)] if names else []
                found += [Set(name, inside, (name,)) for name in names] if parts and not mark else []
        return found

    def rows(self, names: Sequence[str], column: Literal["group", "dataset"]) -> NDArray[np.bool_]:
        """Which rows are of some groups, or of some datasets."""
        return np.isin(self.records[column], names)

    def pair(self, score: str, inside: Sequence[str], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The scores of ID images and of a dataset."""
        column = self.scores[score]
        return column[self.rows(inside, "group")], column[self.rows([name], "dataset")]

    def clusters(self, inside: Sequence[str]) -> NDArray[Any] | None:
        """The images behind ID rows, where some of these may be versions of others."""
        return self._clusters[self.rows(inside, "group")] if len(inside) > 1 else None

    @cached_property
    def _clusters(self) -> NDArray[Any]:
        return self.records.clusters()

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each prediction is the label."""
        return np.asarray(self.records["pred"] == self.records["label"])

    def area(self, score: str, chosen: Set, oscr: bool = False) -> Placements:
        """AUROC, or AUOSCR, with its placements."""
        clusters = self.clusters(chosen.inside)
        right = self.correct[self.rows(chosen.inside, "group")] if oscr else None
        return average(
            [placements(*self.pair(score, chosen.inside, name), name, right, clusters) for name in chosen.outside]
        )

    def rates(self, score: str, chosen: Set) -> dict[str, Replicates]:
        """The other figures, with resamples that every score and checkpoint shares."""
        each = [self._resampled(score, chosen.inside, name) for name in chosen.outside]
        return {name: average([part[name] for part in each]) for name in each[0] if name != "auroc"}

    def _resampled(self, score: str, inside: tuple[str, ...], name: str) -> dict[str, Replicates]:
        """The figures of one dataset, which counts alone and in its mean."""
        place = (score, inside, name)
        if place not in self.resampled:
            key, clusters = self.records.key("ood"), self.clusters(inside)
            pair = self.pair(score, inside, name)
            self.resampled[place] = replicates(*pair, name, key, clusters, resamples=self.resamples)
        return self.resampled[place]

    def of(self, chosen: Set) -> Records:
        """The records that a figure rests on."""
        if chosen.name not in self.parts:
            found = self.records.of(lambda d: d.group in chosen.inside or d.name in chosen.outside)
            self.parts[chosen.name] = found
        return self.parts[chosen.name]


def metrics(records: Records, protocol: Protocol, averaged: Sequence[str], resamples: int) -> Iterator[Metric]:
    """All figures of one checkpoint."""
    found = scored(records, protocol)
    sheet = Sheet(records, found.scores, resamples)
    yield from _accuracies(sheet)
    yield from _choices(records, found)
    whole = [score for score in averaged if score in sheet.scores]
    complete = whole == list(averaged)
    for chosen in sheet.sets():
        areas, rates = dict[str, Placements](), dict[str, dict[str, Replicates]]()
        for score in sheet.scores:
            areas[score] = sheet.area(score, chosen)
            rates[score] = sheet.rates(score, chosen)
            yield from _figures(sheet, score, chosen, areas[score], rates[score])
        if complete and whole and len(chosen.outside) and chosen.name in MEANS:
            yield from _averages(sheet, chosen, [areas[s] for s in whole], [rates[s] for s in whole])
    for score in whole:
        yield from _drawn(sheet, score)


def _metric(
    part: Records, name: str, group: str, estimate: Estimate, better: Better = "higher", headline: bool = False
) -> Metric:
    return part.metric(name, group, estimate, better, headline=headline)


def _better(name: str) -> Better:
    return "lower" if name in LOWER else "higher"


def _accuracies(sheet: Sheet) -> Iterator[Metric]:
    for role, name in (("id", "accuracy"), ("csid", "accuracy/csid")):
        mask = sheet.rows([role], "group")
        if mask.any():
            yield _metric(sheet.records.group(role), name, role, proportion(sheet.correct[mask]))


def _choices(records: Records, found: Scored) -> Iterator[Metric]:
    """The trace of each sweep, and the value that was taken."""
    tuned = records.group("val", "ood-val")
    for score, trace in found.traces.items():
        parameter = "temperature" if score == "odin" else score_of(score).parameter
        for value, area in trace:
            estimate = Estimate(area, np.nan, np.nan, len(tuned))
            yield _metric(tuned, f"sweep/{score}@{parameter}={value:g}", "val", estimate)
        taken = Estimate(found.chosen[score], np.nan, np.nan, len(tuned))
        yield tuned.metric(f"chosen/{score}", "val", taken, unit="value")


def _figures(
    sheet: Sheet, score: str, chosen: Set, area: Placements, rates: Mapping[str, Replicates]
) -> Iterator[Metric]:
    part = sheet.of(chosen)
    yield _metric(part, f"auroc/{score}/{chosen.name}", chosen.name, area.estimate())
    for name, figure in rates.items():
        yield _metric(part, f"{name}/{score}/{chosen.name}", chosen.name, figure.estimate(), _better(name))
    oscr = sheet.area(score, chosen, oscr=True).estimate()
    yield _metric(part, f"auoscr/{score}/{chosen.name}", chosen.name, oscr)


def _averages(
    sheet: Sheet, chosen: Set, areas: Sequence[Placements], rates: Sequence[Mapping[str, Replicates]]
) -> Iterator[Metric]:
    """The means over the scores that a suite averages; near and far AUROC are for the leaderboard."""
    part, headline = sheet.of(chosen), chosen.name in ("near", "far")
    name = f"auroc/average/{chosen.name}"
    yield _metric(part, name, chosen.name, average(areas).estimate(), headline=headline)
    for figure in LOWER[:2]:
        mean = average([rate[figure] for rate in rates]).estimate()
        yield _metric(part, f"{figure}/average/{chosen.name}", chosen.name, mean, "lower")


def _drawn(sheet: Sheet, score: str) -> Iterator[Metric]:
    """ROC curves and histograms."""
    column = sheet.scores[score]
    for chosen in sheet.sets(parts=False):
        if chosen.name not in ("near", "far"):
            continue
        inside = column[sheet.rows(chosen.inside, "group")]
        outside = [column[sheet.rows([name], "dataset")] for name in chosen.outside]
        for rate, estimate in zip(FALSE, roc(inside, outside, FALSE), strict=True):
            yield _metric(sheet.of(chosen), f"roc/{score}/{chosen.name}@fpr={rate:g}", chosen.name, estimate)
    low, high = np.nanpercentile(column, (0.5, 99.5))
    width = (high - low) or 1.0
    for role in ("id", "csid", "near", "far"):
        mask = sheet.rows([role], "group")
        if not mask.any():
            continue
        places = np.clip(((column[mask] - low) / width * BINS).astype(np.int64), 0, BINS - 1)
        part = sheet.records.group(role)
        for place in range(BINS):
            name = f"density/{score}/{role}@s={(place + 0.5) / BINS:g}"
            yield _metric(part, name, role, proportion(places == place))


def outcomes(records: Records, protocol: Protocol, averaged: Sequence[str]) -> Deferred:
    """What accuracies are means of, and what areas are made of; rates at a threshold are no means over pairs.

    Arguments:
        records: Of one checkpoint.
        protocol: What scores depend on.
        averaged: The scores that are averaged.
    """
    found = scored(records, protocol).scores
    sheet, rows, made = Sheet(records, found, 0), Rows(records), dict[Key, Callable[[], Basis]]()

    def areas(scores: Sequence[str], chosen: Set, oscr: bool = False) -> Areas:
        inside, right = sheet.rows(chosen.inside, "group"), sheet.correct if oscr else None
        columns = [found[score] for score in scores]
        return rows.areas(columns, inside, chosen.outside, right, len(chosen.inside) > 1)

    for role, name in (("id", "accuracy"), ("csid", "accuracy/csid")):
        if (mask := sheet.rows([role], "group")).any():
            made[name, role] = partial(rows.outcomes, sheet.correct, mask)
    for chosen in sheet.sets():
        for score in found:
            made[f"auroc/{score}/{chosen.name}", chosen.name] = partial(areas, (score,), chosen)
            made[f"auoscr/{score}/{chosen.name}", chosen.name] = partial(areas, (score,), chosen, True)
        if averaged and all(score in found for score in averaged) and chosen.name in MEANS:
            made[f"auroc/average/{chosen.name}", chosen.name] = partial(areas, averaged, chosen)
    return Deferred(made)


def gains(
    records: Records, base: Records, protocol: Protocol, averaged: Sequence[str], resamples: int
) -> Iterator[Metric]:
    """What a checkpoint gains over another on the images that both have seen, score by score and on average."""
    one, other = (
        Sheet(whole.take(rows), {n: column[rows] for n, column in scored(whole, protocol).scores.items()}, resamples)
        for whole, rows in zip((records, base), shared(records, base), strict=True)
    )
    alike = [score for score in one.scores if score in other.scores]
    whole = [score for score in averaged if score in alike]
    for chosen in one.sets(parts=False):
        part, found = one.of(chosen), {s: one.area(s, chosen) - other.area(s, chosen) for s in alike}
        for score, gain in found.items():
            yield _metric(part, f"gain/auroc/{score}/{chosen.name}", chosen.name, gain.estimate())
        if not whole or whole != list(averaged):
            continue
        mean = average([found[score] for score in whole]).estimate()
        yield _metric(part, f"gain/auroc/average/{chosen.name}", chosen.name, mean)
        figure = LOWER[0]
        rate = average([one.rates(s, chosen)[figure] - other.rates(s, chosen)[figure] for s in whole]).estimate()
        yield _metric(part, f"gain/{figure}/average/{chosen.name}", chosen.name, rate, "lower")


def notices(records: Records, protocol: Protocol) -> Iterator[str]:
    """Images that are in two sets, and features that a score does not presume."""
    yield from _overlaps(records)
    found = scored(records, protocol)
    for score, why in found.refused.items():
        yield f"score {score} is left out: {why}"
    shaped = [score for score in found.scores if score in SCORES and SCORES[score].nonnegative]
    if shaped and "weight" in records.constants:
        share = _negative(records)
        if share:
            named = ", ".join(shaped)
            yield f"{share:.0%} of the features are negative, and {named} are made for features after a ReLU"


def _overlaps(records: Records) -> Iterator[str]:
    """ID images that are among the others too, by the digest of their pixels."""
    group, image = records["group"], records["image"]
    inside = np.isin(group, ("id", "csid"))
    for role in ("near", "far"):
        outside = group == role
        both = np.intersect1d(image[inside], image[outside])
        if len(both):
            rows = [int(np.flatnonzero(outside & (image == name))[0]) for name in both[:SHOWN]]
            named = ", ".join(f"{records['dataset'][row]}/{records['sample'][row]}" for row in rows)
            more = f" and {len(both) - SHOWN} more" if len(both) > SHOWN else ""
            yield f"{len(both)} images of role {role} are in-distribution test images too: {named}{more}"


def _negative(records: Records) -> float:
    """The share of features of ID test images that are below 0."""
    below, count = 0, 0
    for part in records.group("id").chunks(["features"]):
        below += int((part["features"] < 0).sum())
        count += part["features"].size
    return below / count if count else 0.0
