"""Certified l2 radii by randomized smoothing, through a diffusion denoiser or without one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from robustbench_diffaug import stats
from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Outside
from robustbench_diffaug.diffusion.base import Denoiser
from robustbench_diffaug.evaluators import smoothing_metrics
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.evaluators.certificates import reach
from robustbench_diffaug.outcomes import Basis, Key
from robustbench_diffaug.records import Metric, Records

__all__ = ["Smoothing"]


class Smoothing(Evaluator):
    """Randomized smoothing: the class that most noisy copies get, and the radius within which that cannot change.

    With a denoiser, copies are denoised before they are classified. Time t is the first of the schedule with
    `sigma(t) >= sigma`; the noise has level `sigma(t)` and the certificate is for `sigma`, which is sound. The denoiser
    sees images as the dataset gives them, the classifier its own resize and crop of what the denoiser makes.

    With more than one step the copy goes down by deterministic DDIM steps through the times `ceil(t (steps - j) /
    steps)`, j = 0, 1, ..., and the last step goes to the clean estimate.

    Arguments:
        sigmas: Noise levels to certify at, in [0, 1] pixel units.
        denoiser: The diffusion model; none for networks that were trained on noise.
        steps: Calls of the denoiser for each copy, at most t.
        n0: Draws that select the class.
        n: Draws that estimate its probability.
        alpha: The probability that a certificate is wrong. Read by metrics alone: another costs no forward.
        rho: The probability that a figure of `certified-lower` is wrong. Likewise.
        radii: At which certified accuracy is reported. Likewise.

    References:
        Certified Adversarial Robustness via Randomized Smoothing (Cohen et al., 2019),
        https://arxiv.org/abs/1902.02918
        (Certified!!) Adversarial Robustness for Free! (Carlini et al., 2022), https://arxiv.org/abs/2206.10550
    """

    kind: Literal["smoothing"] = "smoothing"
    sigmas: tuple[PositiveFloat, ...] = Field((0.25, 0.5, 1.0), min_length=1)
    denoiser: Denoiser | None = None
    steps: PositiveInt = 1
    n0: PositiveInt = 100
    n: PositiveInt = 10_000
    alpha: Annotated[float, Field(gt=0, lt=0.5), Outside] = 0.001
    rho: Annotated[float, Field(gt=0, lt=1), Outside] = 0.001
    radii: Annotated[tuple[NonNegativeFloat, ...], Outside] = tuple(step / 8 for step in range(9))

    @model_validator(mode="after")
    def _possible(self) -> "Smoothing":
        if len({f"{sigma:g}" for sigma in self.sigmas}) < len(self.sigmas):
            raise ValueError("sigmas repeats a level, to the six digits by which figures are named")
        if len(set(self.radii)) < len(self.radii):
            raise ValueError("radii repeats a radius")
        if self.steps > 1 and self.denoiser is None:
            raise ValueError(f"steps is {self.steps} and no denoiser takes them; name a denoiser, or leave steps out")
        best = float(stats.binomial_lower(np.array(self.n), self.n, self.alpha))
        if best <= 0.5:
            least = int(np.floor(np.log(self.alpha) / np.log(0.5))) + 1
            raise ValueError(
                f"with n={self.n} and alpha={self.alpha:g} even unanimous votes prove no more than p >= {best:.3f}: "
                f"nothing can be certified; n must be at least {least}"
            )
        return self

    def check(self) -> tuple[str, ...]:
        """Levels must be on the schedule of a denoiser that needs no class; warns of radii that no vote can reach."""
        if self.denoiser and not self.denoiser.unconditional():
            raise ValueError("the denoiser needs the class of each image; give an unconditional one")
        for sigma in self.sigmas:
            self.path(sigma)
        most = self.reach(max(self.sigmas))
        far = [f"{radius:g}" for radius in self.radii if radius > most]
        if not far:
            return ()
        return (
            f"radii {', '.join(far)} are out of reach: with n={self.n}, alpha={self.alpha:g} none exceeds {most:.4f}",
        )

    def reach(self, sigma: float) -> float:
        """The largest radius that n unanimous votes certify."""
        return reach(self.n, sigma, self.alpha)

    def level(self, sigma: float) -> float:
        """The level of the noise that is added to certify `sigma`."""
        return self.path(sigma)[0]

    def path(self, sigma: float) -> tuple[float, ...]:
        """The levels at which the denoiser is called, from that of the noise down; of no denoiser, `sigma` alone.

        Raises:
            ValueError: If the schedule ends below `sigma`, or has fewer times below it than there are steps.
        """
        if self.denoiser is None:
            return (sigma,)
        t = self.denoiser.time(sigma)
        if self.steps > t:
            raise ValueError(f"sigma {sigma:g} is time {t} of the schedule, which has no {self.steps} steps below it")
        return tuple(self.denoiser.sigma(-(-t * left // self.steps)) for left in range(self.steps, 0, -1))

    def denoisers(self) -> tuple[Denoiser, ...]:
        """The one there is."""
        return (self.denoiser,) if self.denoiser else ()

    def forwards(self) -> Forwards:
        """All draws at all levels."""
        draws = len(self.sigmas) * (self.n0 + self.n)
        return Forwards(draws * self.steps if self.denoiser else 0, draws)

    def views(self, batch: Batch) -> Iterator[View]:
        """The draws of all levels as one sequence, those that select before those that estimate, denoised.

        A level has no chunks of its own: what is left over at its end goes through the networks with the next one.
        """
        if bool((batch.labels < 0).any()):  # here, before anything is spent on them
            raise ValueError(f"{batch.dataset} has images without a label (-1), and certificates need one of each")
        device = batch.images.device
        paths = torch.tensor([self.path(sigma) for sigma in self.sigmas], dtype=torch.float64, device=device)
        first = 0
        for noise in self._noise(batch):
            draws = torch.arange(first, first + noise.shape[1], device=device)
            path = paths[draws // (self.n0 + self.n)]
            level = path[:, 0].to(noise.dtype)[:, None, None, None]
            yield View("draws", self._denoised(batch, batch.images[:, None] + level * noise, path), first)
            first += noise.shape[1]

    def _noise(self, batch: Batch) -> Iterator[Float[torch.Tensor, "b d c h w"]]:
        """The noise of all draws, in chunks that fill the networks' calls."""
        rounds = (("select", self.n0), ("estimate", self.n))
        streams = [(f"smoothing/{name}/{sigma!r}", count) for sigma in self.sigmas for name, count in rounds]
        shape = self.denoiser.microbatch if self.denoiser else 128
        most = max(1, batch.limits.budget // len(batch.ids))
        step = max(range(1, most + 1), key=lambda draws: (_filled(draws * len(batch.ids), shape), draws))
        return _rechunked(batch.noises((name, range(count)) for name, count in streams), step)

    def _denoised(
        self, batch: Batch, noisy: Float[torch.Tensor, "b d c h w"], path: Float[torch.Tensor, "d steps"]
    ) -> Float[torch.Tensor, "b d c h w"]:
        """Copies with noise of level `path[:, 0]`, taken down the levels of `path` to the clean estimate."""
        if self.denoiser is None:
            return noisy
        denoise = self.denoiser.loaded(batch.limits)
        for step in range(self.steps):
            mean = denoise(noisy, path[:, step].expand(noisy.shape[:2])).mean
            if step + 1 == self.steps:
                break
            kept = (path[:, step + 1] / path[:, step]).to(noisy.dtype)[:, None, None, None]
            noisy = mean + kept * (noisy - mean)
        return mean

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        """How many draws of each sample get each class, of each level and round."""
        device, count = view.images.device, view.images.shape[1]
        draws = torch.arange(view.first, view.first + count, device=device)
        level, place = draws // (self.n0 + self.n), draws % (self.n0 + self.n)
        sigma = None
        if self.denoiser is None:
            sigma = torch.tensor(self.sigmas, dtype=torch.float64, device=device)[level].expand(len(batch.ids), -1)
        classes = model.logits(view.images, sigma).argmax(dim=-1)
        slots = (2 * level + (place >= self.n0)) * model.classes + classes
        counts = torch.zeros(len(slots), len(self.sigmas) * 2 * model.classes, dtype=torch.int32, device=device)
        counts.scatter_add_(1, slots, torch.ones_like(slots, dtype=torch.int32))
        return {"votes": counts.reshape(len(slots), len(self.sigmas), 2, model.classes)}

    def record(self, seen: Mapping[str, Sequence[Columns]], batch: Batch) -> Columns:
        """Both vote vectors of each level, and the noise levels."""
        votes: Int[torch.Tensor, "b s 2 k"] = torch.stack([part["votes"] for part in seen["draws"]]).sum(0).int()
        levels = torch.tensor([self.level(sigma) for sigma in self.sigmas], dtype=torch.float64)
        return {"select": votes[:, :, 0], "estimate": votes[:, :, 1], "level": levels.expand(len(batch.ids), -1)}

    def metrics(self, records: Records) -> Iterable[Metric]:
        """Of each level certified accuracies, abstention and average radius; and certified accuracies of all levels."""
        if not len(records):
            return ()
        return smoothing_metrics.figures(records, self.sigmas, self.radii, self.alpha, self.rho)

    def outcomes(self, records: Records) -> Mapping[Key, Basis]:
        """Of each level what is certified, predicted and abstained from, and the radius of each image."""
        return smoothing_metrics.outcomes(records, self.sigmas, self.radii, self.alpha)


def _filled(images: int, shape: int) -> float:
    """The share of rows that are images, in calls of one shape."""
    return images / (-(-images // shape) * shape)


def _rechunked(
    chunks: Iterable[Float[torch.Tensor, "b _ c h w"]], step: int
) -> Iterator[Float[torch.Tensor, "b _ c h w"]]:
    """The same draws in chunks of `step`, the last one shorter."""
    held: list[torch.Tensor] = []
    count = 0
    for chunk in chunks:
        held.append(chunk)
        count += chunk.shape[1]
        while count >= step:
            joined = torch.cat(held, dim=1) if len(held) > 1 else held[0]
            yield joined[:, :step]
            held, count = [joined[:, step:]], count - step
    if count:
        yield torch.cat(held, dim=1)
