"""The figures of the shift evaluator, from its records alone."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Shaped

from robustbench_diffaug import paired, stats
from robustbench_diffaug.baselines import BASELINES
from robustbench_diffaug.data.corruptions import NOISES, VALIDATION
from robustbench_diffaug.records import Declared, Metric, Records

__all__ = ["Settings", "against_checkpoints", "against_published", "chosen", "column_of", "common", "front_of", "gains"]
__all__ += ["hits_of", "in_space", "means", "metrics", "of_group"]


class Settings(NamedTuple):
    """What of the evaluator its figures depend on.

    Arguments:
        modes: Of the evaluator; the plain network is reported in any case.
        times: Of the ensemble.
        steps: Of more ensembles.
        bins: Of the expected calibration error.
        costs: Forwards and backwards of the denoiser that an image costs, by mode.
    """

    modes: tuple[str, ...]
    times: tuple[int, ...]
    steps: tuple[int, ...]
    bins: int
    costs: Mapping[str, tuple[int, int]]


def metrics(records: Records, settings: Settings) -> Iterator[Metric]:
    """Accuracies per dataset and their means; calibration and proper scores; gains; curves against t; costs."""
    if len(records):
        records.images  # noqa: B018  # told once, for all that is cut out
    for mode in chosen(settings.modes):
        yield from _mode(records, mode, settings.bins)
        if mode != "default":
            yield from _gain(records, mode)
    if "de" in settings.modes:
        for group, rows in _parts(records):
            yield from _against_time(rows, group, settings)
    whole = len(records) == sum(dataset.n for dataset in records.declared)
    for mode, (forwards, backwards) in settings.costs.items() if len(records) else ():
        for name, count in (("forwards", forwards), ("backwards", backwards)):
            if count:
                label = f"{front_of(mode)}{name}-per-image/denoiser"
                yield Metric(label, "cost", float(count), n=len(records), complete=whole, better="lower", unit="count")


def front_of(mode: str) -> str:
    """What stands in front of a mode's metrics."""
    return "" if mode == "default" else f"{mode}/"


def column_of(rows: Records, mode: str, name: str) -> Shaped[np.ndarray, " n"]:
    """A column of a mode; of the ensemble that of all times."""
    column = rows[name if mode == "default" else f"{mode.replace('-', '_')}_{name}"]
    whole: np.ndarray = column[:, -1] if column.ndim == 2 else column
    return whole


def hits_of(rows: Records, mode: str, name: str = "pred") -> Bool[np.ndarray, " n"]:
    """Whether the prediction of a mode is the label."""
    hits: np.ndarray = column_of(rows, mode, name) == rows["label"]
    return hits


def _corrupted(dataset: Declared) -> bool:
    return dataset.severity > 0


def common(dataset: Declared) -> bool:
    """Of the corruptions that a mean is taken over: all but ImageNet-C's validation ones."""
    return dataset.severity > 0 and dataset.group not in VALIDATION


def _validation(dataset: Declared) -> bool:
    return dataset.severity > 0 and dataset.group in VALIDATION


def _noise(dataset: Declared) -> bool:
    return dataset.severity > 0 and dataset.group in NOISES


def of_group(group: str, severity: int | None = None) -> Callable[[Declared], bool]:
    """Datasets of a group, of one severity where it is given, else of any above 0."""
    if severity is None:
        return lambda dataset: dataset.group == group and dataset.severity > 0
    return lambda dataset: dataset.group == group and dataset.severity == severity


def common_at(severity: int) -> Callable[[Declared], bool]:
    """Datasets of the common corruptions at one severity."""
    return lambda dataset: common(dataset) and dataset.severity == severity


def in_space(space: str) -> Callable[[Declared], bool]:
    """Datasets of all classes, and those of some that declare such a class space."""
    return lambda dataset: not dataset.classes or dataset.class_space == space


def _severities(records: Records) -> list[int]:
    return sorted({dataset.severity for dataset in records.declared if dataset.severity})


def _parts(records: Records) -> Iterator[tuple[str, Records]]:
    """The images of each group without corruption, and all corrupted ones."""
    for group in dict.fromkeys(dataset.group for dataset in records.declared if not dataset.severity):
        if rows := records.of(of_group(group, 0)):
            yield group, rows
    if rows := records.of(common):
        yield "corruptions", rows


def _mode(records: Records, mode: str, bins: int) -> Iterator[Metric]:
    name = f"{front_of(mode)}accuracy"
    for group, severity in dict.fromkeys((dataset.group, dataset.severity) for dataset in records.declared):
        if rows := records.of(of_group(group, severity)):
            headline = mode == "default" and not severity
            label = f"{name}/{group}" + (f"@s{severity}" if severity else "")
            yield rows.metric(label, group, stats.proportion(hits_of(rows, mode)), headline=headline)
            for declared in sorted({d.class_space for d in rows.declared if d.classes}):
                other = "full" if declared == "subset" else "subset"
                alike = rows.of(in_space(declared))
                if len(alike):
                    estimate = stats.proportion(hits_of(alike, mode, "other_pred"))
                    yield alike.metric(f"{label}/classes={other}", group, estimate)
    for label, group, keep in means(records):
        yield from _mean(records, f"{name}/{label}", group, mode, keep, headline=label == "mean")
    for group, rows in _parts(records):
        yield from _calibration(rows, group, mode, bins)


def means(records: Records) -> Iterator[tuple[str, str, Callable[[Declared], bool]]]:
    """The means over versions of images: what stands behind 'accuracy/', the group, and of which datasets they are."""
    for group in dict.fromkeys(dataset.group for dataset in records.declared if dataset.severity):
        yield group, group, of_group(group)
    yield "mean", "corruptions", common
    severities = _severities(records)
    for severity in severities if len(severities) > 1 else ():
        yield f"mean@s{severity}", "corruptions", common_at(severity)
    yield "mean-noise", "noise", _noise
    yield "mean-validation", "validation", _validation


def gains() -> Iterator[tuple[str, str, Callable[[Declared], bool]]]:
    """The means in which a mode is compared with the plain network, as `means` gives them."""
    yield "mean", "corruptions", common
    yield "mean-noise", "noise", _noise


def _calibration(rows: Records, group: str, mode: str, bins: int) -> Iterator[Metric]:
    front, clusters = front_of(mode), rows.images
    confidence = np.clip(column_of(rows, mode, "confidence"), 0, 1)  # a mean of ones may round to a little more
    estimate = stats.ece_estimate(confidence, hits_of(rows, mode), rows.key("ece", group), clusters, bins)
    yield rows.metric(f"{front}ece", group, estimate, better="lower")
    for name, unit in (("nll", "nats"), ("brier", "score"), ("entropy", "nats")):
        estimate = stats.clustered_mean(column_of(rows, mode, name), clusters, rows.key(name, group))
        yield rows.metric(f"{front}{name}", group, estimate, better="lower", unit=unit)


def _gain(records: Records, mode: str) -> Iterator[Metric]:
    for name, group, keep in gains():
        if rows := records.of(keep):
            after, before = hits_of(rows, mode).astype(float), hits_of(rows, "default").astype(float)
            gain = paired.paired_difference(after, before, rows.images, rows.key("gain", group))
            yield rows.metric(f"{front_of(mode)}gain/{name}", group, gain)


def _against_time(rows: Records, group: str, settings: Settings) -> Iterator[Metric]:
    clusters, key = rows.images, rows.key("time", group)

    def share(column: str, index: int) -> stats.Estimate:
        return stats.clustered_mean(rows[column][:, index] == rows["label"], clusters, key, bounded=True)

    for index, t in enumerate(settings.times):
        yield rows.metric(f"accuracy@t={t}", group, share("t_pred", index))
        yield rows.metric(f"de/accuracy@t<={t}", group, share("de_pred", index))
        entropy = stats.clustered_mean(rows["t_entropy"][:, index], clusters, key)
        yield rows.metric(f"entropy@t={t}", group, entropy, better="lower", unit="nats")
    for step in settings.steps:
        for index, t in enumerate(t for t in settings.times if t % step == 0):
            yield rows.metric(f"de[step={step}]/accuracy@t<={t}", group, share(f"de_step{step}_pred", index))


def _mean(
    records: Records, name: str, group: str, mode: str, keep: Callable[[Declared], bool], headline: bool = False
) -> Iterator[Metric]:
    """The mean accuracy over several versions of the same images, its interval clustered by image."""
    if rows := records.of(keep):
        key = rows.key("accuracy", group)
        estimate = stats.clustered_mean(hits_of(rows, mode), rows.images, key, bounded=True)
        yield rows.metric(name, group, estimate, headline=headline)


def _errors(records: Records, mode: str, corruptions: Collection[str] | None = None) -> pd.DataFrame:
    """The mean error over severities: a row for each image that has all of them, a column for each corruption.

    Arguments:
        records: Of one checkpoint.
        mode: Of the evaluator.
        corruptions: Which; None for all common ones.
    """
    rows = records.of(lambda d: common(d) and (corruptions is None or d.group in corruptions))
    if not len(rows):
        return pd.DataFrame()
    versions = {group: count for (_, group), count in Counter((d.origin, d.group) for d in rows.declared).items()}
    frame = pd.DataFrame({"image": rows.clusters(), "group": rows["group"], "error": ~hits_of(rows, mode)})
    found = frame.groupby(["image", "group"])["error"].agg(["mean", "size"])
    whole = found["size"] == found.index.get_level_values("group").map(versions)
    table: pd.DataFrame = found["mean"].where(whole).unstack("group").dropna()
    return table


def _clean_errors(records: Records, mode: str) -> "pd.Series[float]":
    """The error on each image as it was before it was corrupted, where the bench has it."""
    origins = {dataset.origin for dataset in records.declared if common(dataset)}
    rows = records.of(lambda dataset: not dataset.severity and dataset.name in origins)
    if not len(rows):
        return pd.Series(dtype=float)
    return pd.Series(~hits_of(rows, mode), index=rows.clusters(), dtype=float)


def chosen(modes: Iterable[str]) -> tuple[str, ...]:
    """The plain network, which is reported in any case, and the other modes."""
    return ("default", *(mode for mode in modes if mode != "default"))


def against_published(records: Records, modes: Sequence[str], names: Sequence[str]) -> Iterator[Metric]:
    """MCE and relative mCE relative to published errors of AlexNet, `BASELINES`.

    mCE = mean_c (mean_s E_cs / mean_s E^base_cs), a mean over images of weighted errors, and so is the relative mCE,
    mean_c ((mean_s E_cs - E_clean) / (mean_s E^base_cs - E^base_clean)), where the clean images are in the bench and
    the baseline's clean error is published.
    """
    rows = records.of(common)
    for name in (name for name in names if name in BASELINES):
        baseline = BASELINES[name]
        for mode in chosen(modes):
            errors = _errors(records, mode, baseline.corruptions)
            if not len(errors) or set(errors.columns) != set(baseline.corruptions):
                continue  # not yet measured: `fits` has seen to the rest
            errors = errors[list(baseline.corruptions)]
            base = np.array([baseline.error(corruption) for corruption in baseline.corruptions])
            values = (errors / base).mean(axis=1)
            yield _mean_metric(rows, f"{front_of(mode)}mce/{name}", values.to_numpy())
            clean = _clean_errors(records, mode)
            both = errors.join(clean.rename("clean"), how="inner")
            if baseline.clean is not None and len(both):
                excess = both[errors.columns].sub(both["clean"], axis=0)
                values = (excess / (base - baseline.clean)).mean(axis=1)
                yield _mean_metric(rows, f"{front_of(mode)}relative-mce/{name}", values.to_numpy())


def _mean_metric(rows: Records, name: str, values: Float[np.ndarray, " n"]) -> Metric:
    estimate = stats.clustered_mean(values, None, rows.key("mce"))
    return rows.metric(name, "corruptions", estimate, better="lower")


def against_checkpoints(
    checkpoints: Sequence[str], records: Callable[[str], Records], modes: Sequence[str], names: Sequence[str]
) -> Iterator[tuple[str, Metric]]:
    """MCE and relative mCE relative to the plain network of a checkpoint, over the images that both have.

    Both are ratios of means, so the bootstrap draws images and takes the ratios anew. The relative ones come last: they
    may be undefined where the others are not.

    Raises:
        ValueError: If the baseline makes no error under a corruption, or no more than on clean images: the ratio is
            not defined.
    """
    relative: list[tuple[str, Records, str, pd.DataFrame, pd.DataFrame]] = []
    for name in (name for name in names if name not in BASELINES and name in checkpoints):
        other = records(name)
        base, base_clean = _errors(other, "default"), _clean_errors(other, "default")
        for checkpoint in checkpoints:
            own = records(checkpoint)
            for mode in chosen(modes):
                errors, clean = _errors(own, mode), _clean_errors(own, mode)
                images = errors.index.intersection(base.index)
                if not len(images) or set(errors.columns) != set(base.columns):
                    continue  # one of them was not yet measured
                yield checkpoint, _ratio(own, f"{front_of(mode)}mce/{name}", errors.loc[images], base.loc[images])
                images = images.intersection(clean.index).intersection(base_clean.index)
                if len(images):
                    excess = errors.loc[images].sub(clean.loc[images], axis=0)
                    against = base.loc[images].sub(base_clean.loc[images], axis=0)
                    relative.append((checkpoint, own, f"{front_of(mode)}relative-mce/{name}", excess, against))
    for checkpoint, own, label, excess, against in relative:
        yield checkpoint, _ratio(own, label, excess, against)


def _ratio(records: Records, name: str, own: pd.DataFrame, other: pd.DataFrame) -> Metric:
    """mean_c (sum_i E_ic / sum_i B_ic), with its bootstrap over images."""
    corruptions = list(own.columns)
    errors, base = own.to_numpy(), other[corruptions].to_numpy()
    lacking = [corruption for corruption, total in zip(corruptions, base.sum(axis=0), strict=True) if total <= 0]
    if lacking:
        raise ValueError(
            f"{name} is not defined: under {', '.join(lacking)} the baseline makes no error, or no more than on clean "
            "images; name another one, or leave it out of baselines"
        )

    def statistic(weights: Float[np.ndarray, " n"]) -> float:
        above, below = (weights[:, None] * errors).sum(axis=0), (weights[:, None] * base).sum(axis=0)
        return float((above / below).mean()) if (below > 0).all() else float("nan")

    rows = records.of(common)
    value = statistic(np.ones(len(errors)))
    low, high = stats.bootstrap(statistic, np.arange(len(errors)), rows.key("mce"))
    estimate = stats.Estimate(value, min(low, value), max(high, value), len(errors))
    return rows.metric(name, "corruptions", estimate, better="lower")
