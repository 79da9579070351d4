"""Certified l2 radii by randomized smoothing, through a diffusion denoiser or without one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from scipy.special import ndtri

from robustbench_diffaug import stats
from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Outside
from robustbench_diffaug.diffusion.base import Denoiser
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.records import Metric, Records

__all__ = ["Certificates", "Smoothing", "certify", "radius_of"]


class Certificates(NamedTuple):
    """What votes prove.

    Arguments:
        prediction: The class certified, -1 where it abstains.
        radius: The certified l2 radius in [0, 1] pixel units, 0 where it abstains.
    """

    prediction: Int[np.ndarray, " n"]
    radius: Float[np.ndarray, " n"]


def radius_of(p_low: Float[np.ndarray, "*n"], sigma: float) -> Float[np.ndarray, "*n"]:
    """`sigma * Phi^-1(p_low)`, rounded down, and 0 where `p_low` is at most 1/2.

    The inverse normal CDF is good to a few units in the last place; what is taken off is far more than that, and far
    less than anybody prints.
    """
    exact = np.asarray(ndtri(np.maximum(p_low, 0.5)))
    return np.asarray(sigma * np.maximum(exact * (1 - 1e-12) - 1e-13, 0))


def certify(
    select: Int[np.ndarray, "n k"], estimate: Int[np.ndarray, "n k"], sigma: float, alpha: float
) -> Certificates:
    """Certificates from the votes of two independent sets of draws; each fails with probability at most alpha.

    The class with most votes in `select` is the candidate (the first, among equals); its votes in `estimate` bound its
    probability from below by Clopper and Pearson. It abstains where the bound is below 1/2.

    Arguments:
        select: Votes of the n0 draws.
        estimate: Votes of the n draws; every row must have the same sum.
        sigma: The noise level that is certified.
        alpha: The probability of failure, in (0, 1/2).

    References:
        Certified Adversarial Robustness via Randomized Smoothing (Cohen et al., 2019),
        https://arxiv.org/abs/1902.02918
    """
    candidate = select.argmax(axis=1)
    votes = np.take_along_axis(estimate, candidate[:, None], axis=1)[:, 0]
    (draws,) = set(estimate.sum(axis=1).tolist())
    p_low = stats.binomial_lower(votes, int(draws), alpha)
    certain = p_low >= 0.5
    return Certificates(np.where(certain, candidate, -1), np.where(certain, radius_of(p_low, sigma), 0.0))


class Smoothing(Evaluator):
    """Randomized smoothing: the class that most noisy copies get, and the radius within which that cannot change.

    With a denoiser, copies are denoised in one step before they are classified. Time t is the first of the schedule
    with `sigma(t) >= sigma`; the noise has level `sigma(t)` and the certificate is for `sigma`, which is sound.

    Arguments:
        sigmas: Noise levels to certify at, in [0, 1] pixel units.
        denoiser: The diffusion model; none for networks that were trained on noise.
        n0: Draws that select the class.
        n: Draws that estimate its probability.
        alpha: The probability that a certificate is wrong. Read by metrics alone: another costs no forward.
        radii: At which certified accuracy is reported. Likewise.

    References:
        Certified Adversarial Robustness via Randomized Smoothing (Cohen et al., 2019),
        https://arxiv.org/abs/1902.02918
        (Certified!!) Adversarial Robustness for Free! (Carlini et al., 2022), https://arxiv.org/abs/2206.10550
    """

    kind: Literal["smoothing"] = "smoothing"
    sigmas: tuple[PositiveFloat, ...] = Field((0.25, 0.5, 1.0), min_length=1)
    denoiser: Denoiser | None = None
    n0: PositiveInt = 100
    n: PositiveInt = 10_000
    alpha: Annotated[float, Field(gt=0, lt=0.5), Outside] = 0.001
    radii: Annotated[tuple[NonNegativeFloat, ...], Outside] = tuple(step / 8 for step in range(9))

    @model_validator(mode="after")
    def _possible(self) -> "Smoothing":
        if len(set(self.sigmas)) < len(self.sigmas):
            raise ValueError("sigmas repeats a level")
        best = float(stats.binomial_lower(np.array(self.n), self.n, self.alpha))
        if best <= 0.5:
            least = int(np.floor(np.log(self.alpha) / np.log(0.5))) + 1
            raise ValueError(
                f"with n={self.n} and alpha={self.alpha:g} even unanimous votes prove no more than p >= {best:.3f}: "
                f"nothing can be certified; n must be at least {least}"
            )
        return self

    def check(self) -> tuple[str, ...]:
        """Levels must be on the schedule; warns of radii that no vote can reach."""
        for sigma in self.sigmas:
            self.level(sigma)
        reach = self.reach(max(self.sigmas))
        far = [f"{radius:g}" for radius in self.radii if radius > reach]
        if not far:
            return ()
        return (
            f"radii {', '.join(far)} are out of reach: with n={self.n}, alpha={self.alpha:g} none exceeds {reach:.4f}",
        )

    def reach(self, sigma: float) -> float:
        """The largest radius that n unanimous votes certify."""
        return float(radius_of(stats.binomial_lower(np.array(self.n), self.n, self.alpha), sigma))

    def level(self, sigma: float) -> float:
        """The level of the noise that is added to certify `sigma`."""
        return self.denoiser.sigma(self.denoiser.time(sigma)) if self.denoiser else sigma

    def denoisers(self) -> tuple[Denoiser, ...]:
        """The one there is."""
        return (self.denoiser,) if self.denoiser else ()

    def forwards(self) -> Forwards:
        """All draws at all levels."""
        draws = len(self.sigmas) * (self.n0 + self.n)
        return Forwards(draws if self.denoiser else 0, draws)

    def views(self, batch: Batch) -> Iterator[View]:
        """For each level the n0 and the n draws, denoised."""
        for sigma in self.sigmas:
            level = self.level(sigma)
            for name, draws in (("select", self.n0), ("estimate", self.n)):
                for noise in batch.noise(f"smoothing/{name}/{sigma!r}", range(draws)):
                    noisy = batch.images[:, None] + level * noise
                    for denoiser in self.denoisers():
                        noisy = denoiser.loaded(batch.limits)(noisy, level).mean
                    yield View(f"{name}@{sigma!r}", noisy)

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        """How many draws of each sample get each class."""
        votes = model.logits(view.images).argmax(dim=-1)
        counts = torch.zeros(len(votes), model.classes, dtype=torch.int32, device=votes.device)
        return {"votes": counts.scatter_add_(1, votes, torch.ones_like(votes, dtype=torch.int32))}

    def record(self, seen: Mapping[str, Sequence[Columns]], batch: Batch) -> Columns:
        """Both vote vectors of each level, and the noise levels."""

        def votes(name: str) -> Int[torch.Tensor, "b s k"]:
            sums = [torch.stack([part["votes"] for part in seen[f"{name}@{sigma!r}"]]).sum(0) for sigma in self.sigmas]
            return torch.stack(sums, dim=1).int()

        levels = torch.tensor([self.level(sigma) for sigma in self.sigmas], dtype=torch.float64)
        return {"select": votes("select"), "estimate": votes("estimate"), "level": levels.expand(len(batch.ids), -1)}

    def metrics(self, records: Records) -> Iterable[Metric]:
        """Certified accuracy at each radius, average certified radius and abstention, for each level."""
        if not len(records):
            return
        for index, sigma in enumerate(self.sigmas):
            group = f"sigma={sigma:g}"
            found = certify(records["select"][:, index], records["estimate"][:, index], sigma, self.alpha)
            correct: Bool[np.ndarray, " n"] = found.prediction == records["label"]
            for radius in self.radii:
                estimate = stats.exact_proportion(correct & (found.radius >= radius))
                yield records.metric(f"certified@{_radius(radius)}", group, estimate, headline=radius == sigma)
            yield records.metric("abstain", group, stats.exact_proportion(found.prediction < 0), better="lower")
            reach = self.reach(sigma)
            share = stats.mean(np.minimum(correct * found.radius / reach, 1.0), records.key("acr", group), bounded=True)
            mean = stats.Estimate(share.value * reach, share.low * reach, share.high * reach, share.n)
            yield records.metric("acr", group, mean, unit="pixels", headline=True)


def _radius(radius: float) -> str:
    """At least two decimals: 0.50, 0.125."""
    text = f"{radius:g}"
    decimals = len(text.partition(".")[2])
    return text if decimals >= 2 and "e" not in text else f"{radius:.2f}"
