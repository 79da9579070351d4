"""How classifiers do on diffused images, by noise level: as they are, or denoised in one step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor

from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Options, Outside
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.diffusion.base import Denoiser, Sigma
from robustbench_diffaug.evaluators import gains, noise_metrics
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.outcomes import Basis, Key
from robustbench_diffaug.records import Metric, Records

__all__ = ["Noise"]

RANDOM = "random-time"


class Noise(Evaluator):
    """Accuracy, entropy and likelihood of a classifier on images diffused to times t, `x_t = x + sigma(t) eps`.

    Look `noisy` shows x_t itself, in the units of [0, 1] and not clamped, to every network; those that want it are told
    sigma(t), and those that want it are given the denoised twin D(x_t, sigma(t)). Look `denoised` shows the twin alone,
    and at t = 0 the image as it is; the noise is that of the shift evaluator's ensemble, so both agree. Networks of
    noisy images have no place there. All checkpoints see the same images.

    Arguments:
        look: 'noisy' or 'denoised'.
        denoiser: Whose noise levels these are, and which denoises.
        times: Of its schedule, increasing.
        random_time: Whether each image is also shown at one time of its own, uniform over the schedule.
        gains: Checkpoints and the one each is compared with, as `resnet+diffaug: resnet`, over the same images.
        bins: Of the expected calibration error.

    References:
        DiffAug: A Diffuse-and-Denoise Augmentation for Training Robust Classifiers (Sastry et al., NeurIPS 2024),
        figures 2 and 19, table 4, https://arxiv.org/abs/2306.09192
    """

    kind: Literal["noise"] = "noise"
    look: Literal["noisy", "denoised"] = "noisy"
    denoiser: Denoiser
    times: tuple[NonNegativeInt, ...] = tuple(range(0, 951, 50))
    random_time: bool = False
    gains: Annotated[Options, Outside] = ()
    bins: Annotated[int, Field(ge=1, le=1000), Outside] = 15

    @model_validator(mode="after")
    def _whole(self) -> "Noise":
        if list(self.times) != sorted(set(self.times)):
            raise ValueError("times must increase, without repetition")
        if not self.times and not self.random_time:
            raise ValueError("times is empty; give some, or set random_time: true")
        return self

    def check(self) -> tuple[str, ...]:
        """Times must be the schedule's, and the denoiser one that needs no class."""
        if self.times:
            self.denoiser.sigma(self.times[-1])
        if not self.denoiser.unconditional():
            raise ValueError("the denoiser needs the class of each image; give an unconditional one")
        return ()

    def fits(self, datasets: Sequence[Dataset], checkpoints: Sequence[str]) -> None:
        """What gains compare must be checkpoints of the bench."""
        gains.require(self.gains, checkpoints)

    def denoisers(self) -> tuple[Denoiser, ...]:
        """The one."""
        return (self.denoiser,)

    def forwards(self) -> Forwards:
        """A denoising and a look for each time, but no denoising of the image as it is."""
        shown = len(self.times) + self.random_time
        plain = self.look == "denoised" and 0 in self.times
        return Forwards(shown - plain, shown)

    def views(self, batch: Batch) -> Iterator[View]:
        """The images at each time, and each at a time of its own."""
        for t in self.times:
            if t == 0 and self.look == "denoised":
                yield View("t=0", batch.images[:, None])
                continue
            (noise,) = batch.noise(f"shift/t={t}", range(1))  # the ensemble's: entropy@t is one figure, not two
            yield self._view(f"t={t}", batch, noise, self.denoiser.sigma(t))
        if self.random_time:
            (noise,) = batch.noise("noise/random", range(1))
            levels = torch.from_numpy(self.denoiser.sigmas().copy()).to(batch.images)
            yield self._view(RANDOM, batch, noise, levels[self._random(batch).long()][:, None])

    def _random(self, batch: Batch) -> Int[Tensor, " b"]:
        """The time of each image, uniform over the schedule."""
        steps = len(self.denoiser.sigmas())
        return (batch.uniform("noise/random-time") * steps).to(torch.int32)

    def _view(self, name: str, batch: Batch, noise: Float[Tensor, "b 1 c h w"], sigma: Sigma) -> View:
        """The images at noise levels, or what the denoiser makes of them."""
        level = torch.as_tensor(sigma).to(batch.images).expand(noise.shape[:2])
        noisy = batch.images[:, None] + (sigma if isinstance(sigma, float) else sigma[..., None, None, None]) * noise
        denoised = self.denoiser.loaded(batch.limits)(noisy, sigma).mean
        return View(name, denoised) if self.look == "denoised" else View(name, noisy, sigma=level, denoised=denoised)

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        """The logits, float64."""
        if model.wants and self.look == "denoised":
            raise ValueError(
                f"{model.id} classifies noisy images, and look: denoised shows none; give look: noisy, or leave "
                f"{model.id} out of the bench's checkpoints"
            )
        return {"logits": model.logits(view.images, view.sigma, view.denoised)[:, 0].double()}

    def record(self, seen: Mapping[str, Sequence[Columns]], batch: Batch) -> Columns:
        """Prediction, confidence, entropy and negative log-likelihood of each time, among the dataset's classes."""
        if bool((batch.labels < 0).any()):
            raise ValueError(f"{batch.dataset} has images without a label (-1), and accuracy needs one of each")
        space = batch.classes if batch.class_space == "subset" else ()
        rows: dict[str, Tensor] = {}
        if self.times:
            logits = torch.stack([seen[f"t={t}"][0]["logits"] for t in self.times], dim=1)
            rows |= {f"t_{name}": column for name, column in _summary(logits, batch.labels, space).items()}
        if self.random_time:
            found = _summary(seen[RANDOM][0]["logits"][:, None], batch.labels, space)
            rows |= {f"random_{name}": column[:, 0] for name, column in found.items()}
            rows["random_t"] = self._random(batch)
        return rows

    def constants(self, model: Model) -> Mapping[str, Shaped[np.ndarray, "..."]]:
        """The number of classes, whose logarithm is the largest entropy."""
        return {"classes": np.array([model.classes])}

    @property
    def settings(self) -> noise_metrics.Settings:
        """What figures depend on, besides records."""
        return noise_metrics.Settings(self.look, self.times, self.random_time, self.bins)

    def metrics(self, records: Records) -> Iterable[Metric]:
        """Accuracy, entropy, likelihood and calibration by time, early and late entropy, and the random times'."""
        return noise_metrics.metrics(records, self.settings)

    def outcomes(self, records: Records) -> Mapping[Key, Basis]:
        """Hits, entropies and likelihoods of each image at each time."""
        return noise_metrics.outcomes(records, self.settings)

    def compare(self, checkpoints: Sequence[str], records: Callable[[str], Records]) -> Iterable[tuple[str, Metric]]:
        """The gains of the checkpoints that `gains` names."""
        return gains.compared(self.gains, records, lambda one, base: noise_metrics.gains(one, base, self.settings))


def _summary(
    logits: Float[Tensor, "b t k"], labels: Int[Tensor, " b"], space: tuple[int, ...]
) -> dict[str, Shaped[Tensor, "b t"]]:
    """What is kept of logits, among some classes or, where none are named, among all."""
    if space:
        outside = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        outside[list(space)] = False
        logits = logits.masked_fill(outside, -torch.inf)
    logs = logits.log_softmax(dim=-1)
    probabilities = logs.exp()
    confidence, pred = probabilities.max(dim=-1)
    right = logs.gather(-1, labels[:, None, None].expand(*logs.shape[:2], 1))[..., 0]
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    return {"pred": pred.int(), "confidence": confidence, "entropy": entropy, "nll": -right}
