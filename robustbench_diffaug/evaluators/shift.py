"""Accuracy, calibration and entropy under covariate shift, plain and with the DiffAug ensemble."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from pydantic import Field, NonNegativeInt, model_validator

from robustbench_diffaug import paired, stats
from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Outside
from robustbench_diffaug.diffusion.base import Denoiser
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.records import Declared, Metric, Records

__all__ = ["Shift"]

NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")


class Shift(Evaluator):
    """How a classifier holds on shifted images.

    Mode `default` is the plain network. Mode `de` is the DiffAug ensemble: the mean over times t of
    `p(y | E[x0 | x0 + sigma(t) eps])`, where t = 0 is the image as it is; one fresh draw of eps for each t.

    Arguments:
        modes: 'default', 'de'.
        denoiser: Of the ensemble.
        times: Of the ensemble.
        bins: Of the expected calibration error.

    References:
        DiffAug: Improving Robustness with Diffusion Denoised Augmentations (Sastry et al., NeurIPS 2024),
        https://arxiv.org/abs/2306.09192
        Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
        2019), https://arxiv.org/abs/1903.12261
    """

    kind: Literal["shift"] = "shift"
    modes: tuple[Literal["default", "de"], ...] = ("default",)
    denoiser: Denoiser | None = None
    times: tuple[NonNegativeInt, ...] = (0, 50, 100, 150, 200, 250, 300, 350, 400, 450)
    bins: Annotated[int, Field(ge=1, le=1000), Outside] = 15

    @model_validator(mode="after")
    def _whole(self) -> "Shift":
        if not self.modes:
            raise ValueError("modes is empty; give default, de or both")
        if "de" in self.modes and self.denoiser is None:
            raise ValueError("mode de needs a denoiser")
        if list(self.times) != sorted(set(self.times)) or not self.times:
            raise ValueError("times must increase, without repetition")
        return self

    def check(self) -> tuple[str, ...]:
        """Times must be the schedule's."""
        if self.denoiser and "de" in self.modes:
            self.denoiser.sigma(self.times[-1])
        return ()

    def denoisers(self) -> tuple[Denoiser, ...]:
        """The ensemble's."""
        return (self.denoiser,) if self.denoiser and "de" in self.modes else ()

    def forwards(self) -> Forwards:
        """One denoising for each time but 0, and one look at each image."""
        noisy = sum(t > 0 for t in self.times) if "de" in self.modes else 0
        return Forwards(noisy, noisy + 1)

    def views(self, batch: Batch) -> Iterator[View]:
        """The images, and for the ensemble each one diffused to every time and denoised."""
        yield View("t=0", batch.images[:, None])
        for denoiser in self.denoisers():
            denoise = denoiser.loaded(batch.limits)
            for t in filter(None, self.times):
                sigma = denoiser.sigma(t)
                (noise,) = batch.noise(f"shift/t={t}", range(1))
                yield View(f"t={t}", denoise(batch.images[:, None] + sigma * noise, sigma).mean)

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        """The probabilities, float64."""
        return {"probabilities": model.logits(view.images[:, 0]).double().softmax(dim=1)}

    def record(self, seen: Mapping[str, Sequence[Columns]], batch: Batch) -> Columns:
        """Prediction, confidence and entropy: of the image, of each time, and of the ensemble up to each time."""
        rows = _summary(seen["t=0"][0]["probabilities"])
        if not self.denoisers():
            return rows
        each = torch.stack([seen[f"t={t}"][0]["probabilities"] for t in self.times], dim=1)
        counts = torch.arange(1, len(self.times) + 1, device=each.device)
        ensemble = each.cumsum(dim=1) / counts[None, :, None]
        single = {f"t_{name}": column for name, column in _summary(each).items()}
        return {**rows, **single, **{f"de_{name}": column for name, column in _summary(ensemble).items()}}

    def metrics(self, records: Records) -> Iterable[Metric]:
        """Accuracies per dataset and their means; calibration; accuracy and entropy against t."""
        yield from self._mode(records, "", None)
        if self.denoisers():
            yield from self._mode(records, "de/", -1)
            yield from self._gain(records)
            for group, rows in _parts(records):
                yield from self._against_time(rows, group)

    def _mode(self, records: Records, prefix: str, member: int | None) -> Iterator[Metric]:
        hits = f"{prefix.replace('/', '_')}pred"
        name = f"{prefix}accuracy"
        plain = not prefix
        for dataset in records.declared:
            if rows := records.of(lambda other, dataset=dataset: other.name == dataset.name):  # type: ignore[misc]
                severity = f"@s{dataset.severity}" if dataset.severity else ""
                estimate = stats.proportion(_hit(rows, hits, member))
                headline = plain and not severity
                yield rows.metric(f"{name}/{dataset.group}{severity}", dataset.group, estimate, headline=headline)
        for group in dict.fromkeys(dataset.group for dataset in records.declared if dataset.severity):
            yield from _mean(records, f"{name}/{group}", group, hits, member, lambda d, g=group: d.group == g)  # type: ignore[misc]
        yield from _mean(records, f"{name}/mean", "corruptions", hits, member, _corrupted, headline=True)
        yield from _mean(records, f"{name}/mean-noise", "noise", hits, member, _noise)
        for group, rows in _parts(records):
            confidence = _member(rows[f"{prefix.replace('/', '_')}confidence"], member)
            key = rows.key("ece", group)
            estimate = stats.ece_estimate(confidence, _hit(rows, hits, member), key, rows.clusters(), self.bins)
            yield rows.metric(f"{prefix}ece", group, estimate, better="lower")

    def _gain(self, records: Records) -> Iterator[Metric]:
        for name, group, keep in (("mean", "corruptions", _corrupted), ("mean-noise", "noise", _noise)):
            if rows := records.of(keep):
                after, before = _hit(rows, "de_pred", -1), _hit(rows, "pred", None)
                gain = paired.paired_difference(
                    after.astype(float), before.astype(float), rows.clusters(), rows.key("gain", group)
                )
                yield rows.metric(f"de/gain/{name}", group, gain)

    def _against_time(self, rows: Records, group: str) -> Iterator[Metric]:
        clusters = rows.clusters()
        for index, t in enumerate(self.times):
            key = rows.key("time", group)
            single = stats.clustered_mean(_hit(rows, "t_pred", index), clusters, key, bounded=True)
            yield rows.metric(f"accuracy@t={t}", group, single)
            ensemble = stats.clustered_mean(_hit(rows, "de_pred", index), clusters, key, bounded=True)
            yield rows.metric(f"de/accuracy@t<={t}", group, ensemble)
            entropy = stats.clustered_mean(rows["t_entropy"][:, index], clusters, key)
            yield rows.metric(f"entropy@t={t}", group, entropy, better="lower", unit="nats")


def _summary(probabilities: Float[torch.Tensor, "b *t k"]) -> dict[str, Shaped[torch.Tensor, "b *t"]]:
    confidence, pred = probabilities.max(dim=-1)
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    return {"pred": pred.int(), "confidence": confidence, "entropy": entropy}


def _corrupted(dataset: Declared) -> bool:
    return dataset.severity > 0


def _noise(dataset: Declared) -> bool:
    return dataset.severity > 0 and dataset.group in NOISES


def _parts(records: Records) -> Iterator[tuple[str, Records]]:
    """The clean images and the corrupted ones, where there are any."""
    for group, rows in (("clean", records.of(lambda d: d.group == "clean")), ("corruptions", records.of(_corrupted))):
        if len(rows):
            yield group, rows


def _member(column: Shaped[np.ndarray, "n *t"], member: int | None) -> Shaped[np.ndarray, " n"]:
    return column if member is None else column[:, member]


def _hit(rows: Records, column: str, member: int | None) -> Bool[np.ndarray, " n"]:
    hits: np.ndarray = _member(rows[column], member) == rows["label"]
    return hits


def _mean(
    records: Records,
    name: str,
    group: str,
    column: str,
    member: int | None,
    keep: Callable[[Declared], bool],
    headline: bool = False,
) -> Iterator[Metric]:
    """The mean accuracy over several versions of the same images, its interval clustered by image."""
    if rows := records.of(keep):
        hits = _hit(rows, column, member)
        estimate = stats.clustered_mean(hits, rows.clusters(), rows.key("accuracy", group), bounded=True)
        yield rows.metric(name, group, estimate, headline=headline)
