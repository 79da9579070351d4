"""How classifiers hold on shifted images: plain, with the DiffAug ensemble, and with diffusion-driven adaptation."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from robustbench_diffaug.baselines import BASELINES
from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Outside, suggest
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.diffusion.adaptation import Adaptation, Chain, adapt
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Sigma
from robustbench_diffaug.diffusion.samplers import ddim, dpm_solver_2
from robustbench_diffaug.evaluators import shift_metrics, shift_outcomes
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.outcomes import Basis, Key
from robustbench_diffaug.records import Metric, Records

__all__ = ["Shift"]

Mode = Literal["default", "de", "dda", "dda-se"]


class Shift(Evaluator):
    """Accuracy, calibration and entropy of a classifier on shifted images.

    Mode `default` is the plain network. Mode `de` is the DiffAug ensemble: the mean over times t of
    `p(y | E[x0 | x0 + sigma(t) eps])`, where t = 0 is the image as it is; one fresh draw of eps for each t. Mode `dda`
    is the plain network on the image that diffusion-driven adaptation has changed, and `dda-se` the mean of its
    probabilities and those of mode `default`. All checkpoints see the same images in every mode.

    Arguments:
        modes: 'default', 'de', 'dda', 'dda-se'.
        denoiser: Of all modes but the plain one.
        times: Of the ensemble.
        steps: More ensembles, of those of `times` that are multiples of each of these numbers.
        sampler: Of the ensemble's denoising: 'ddim' takes E[x0 | x_t], 'dpm-solver-2' one second-order step to `end`.
        end: Where DPM-Solver-2 stops, a continuous time in (0, 1].
        mixing: The paper's lambda, the share of the class-conditional score in the ensemble's denoising. The class is
            the image's own label, so any share but 0 is an analysis that knows the answer, and no defence.
        dda: The settings of the adaptation.
        baselines: What mCE is relative to: 'hendrycks-alexnet', 'robustbench-alexnet', or the id of a checkpoint.
        bins: Of the expected calibration error.

    References:
        DiffAug: A Diffuse-and-Denoise Augmentation for Training Robust Classifiers (Sastry et al., NeurIPS 2024),
        https://arxiv.org/abs/2306.09192
        Back to the Source: Diffusion-Driven Test-Time Adaptation (Gao et al., CVPR 2023),
        https://arxiv.org/abs/2207.03442
        Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
        2019), https://arxiv.org/abs/1903.12261
    """

    kind: Literal["shift"] = "shift"
    version = 2
    modes: tuple[Mode, ...] = ("default",)
    denoiser: Denoiser | None = None
    times: tuple[NonNegativeInt, ...] = (0, 50, 100, 150, 200, 250, 300, 350, 400, 450)
    steps: tuple[PositiveInt, ...] = ()
    sampler: Literal["ddim", "dpm-solver-2"] = "ddim"
    end: Annotated[float, Field(gt=0, le=1)] = 1e-3
    mixing: Annotated[float, Field(ge=0, le=1)] = 0.0
    dda: Adaptation = Adaptation()
    baselines: Annotated[tuple[str, ...], Outside] = ()
    bins: Annotated[int, Field(ge=1, le=1000), Outside] = 15

    @model_validator(mode="after")
    def _whole(self) -> "Shift":
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError("modes names none, or one twice; give some of default, de, dda, dda-se")
        if self.modes != ("default",) and self.denoiser is None:
            needy = next(mode for mode in self.modes if mode != "default")
            raise ValueError(f"mode {needy} needs a denoiser")
        if list(self.times) != sorted(set(self.times)) or not self.times:
            raise ValueError("times must increase, without repetition")
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError("steps must increase, without repetition")
        for step in self.steps:
            if not self.multiples(step):
                raise ValueError(f"steps has {step}, and no one of times is a multiple of it")
        return self

    def multiples(self, step: int) -> tuple[int, ...]:
        """The positions of those times that are multiples of `step`."""
        return tuple(index for index, t in enumerate(self.times) if t % step == 0)

    def check(self) -> tuple[str, ...]:
        """Times must be the schedule's, and the denoiser class-conditional where its score is to be mixed."""
        if self.denoiser is None:
            return ()
        told = self.mixing == 1 and not self._adapts()
        if self.modes != ("default",) and not (self.denoiser.unconditional() or told):
            raise ValueError("the denoiser needs the class of each image; give an unconditional one")
        if "de" in self.modes:
            self.denoiser.sigma(self.times[-1])
            if self.mixing and self.denoiser.classes() is None:
                raise ValueError("mixing needs a class-conditional denoiser, and this one is not; set mixing to 0")
        if self._adapts():
            Chain.of(self.denoiser.sigmas(), self.dda.respacing)
            if self.dda.variance == "learned" and self.denoiser.learned_variance() is False:
                raise ValueError("the denoiser has no learned variance; give dda variance: small (or large)")
        if "de" in self.modes and self.mixing:
            return (f"mixing {self.mixing:g} denoises with the true label, so mode de knows the answer",)
        return ()

    def fits(self, datasets: Sequence[Dataset], checkpoints: Sequence[str]) -> None:
        """A published baseline needs its very corruptions and severities, and another one must be a checkpoint's id."""
        measured: dict[str, set[int]] = {}
        for dataset in datasets:
            measured.setdefault(dataset.group or dataset.name, set()).add(dataset.severity)
        for name in self.baselines:
            if name in BASELINES:
                BASELINES[name].require(measured)
            elif name not in checkpoints:
                raise ValueError(f"baselines names {name!r}{suggest(name, [*BASELINES, *checkpoints])}")

    def denoisers(self) -> tuple[Denoiser, ...]:
        """That of the ensemble and the adaptation."""
        return (self.denoiser,) if self.denoiser and self.modes != ("default",) else ()

    def forwards(self) -> Forwards:
        """The denoisings and adaptations of an image, and the looks at it and at each of them."""
        noisy = sum(t > 0 for t in self.times) if "de" in self.modes else 0
        adapted = self._adapts()
        steps = self.dda.N if adapted else 0
        return Forwards(noisy * self._calls() + steps, 1 + noisy + adapted, steps)

    def costs(self) -> dict[str, tuple[int, int]]:
        """Forwards and backwards of the denoiser that an image costs, by mode."""
        noisy = sum(t > 0 for t in self.times)
        each = {"default": (0, 0), "de": (noisy * self._calls(), 0), "dda": (self.dda.N, self.dda.N)}
        return {mode: each[mode.removesuffix("-se")] for mode in self.modes}

    def _calls(self) -> int:
        """Forwards of the denoiser in one denoising."""
        return (2 if self.sampler == "dpm-solver-2" else 1) * (1 if self.mixing in (0, 1) else 2)

    def _adapts(self) -> bool:
        return bool({"dda", "dda-se"} & set(self.modes))

    def views(self, batch: Batch) -> Iterator[View]:
        """The images; each one diffused to every time and denoised; and each one adapted."""
        yield View("t=0", batch.images[:, None])
        if self.denoiser is None:
            return
        for t in filter(None, self.times if "de" in self.modes else ()):
            (noise,) = batch.noise(f"shift/t={t}", range(1))
            yield View(f"t={t}", self._denoised(batch, noise, self.denoiser.sigma(t)))
        if self._adapts():
            chain = Chain.of(self.denoiser.sigmas(), self.dda.respacing)

            def noise_of(step: int) -> Float[torch.Tensor, "b c h w"]:
                (noise,) = batch.noise("shift/dda", range(step, step + 1))
                return noise[:, 0]

            denoise = self.denoiser.loaded(batch.limits)
            yield View(
                "dda", adapt(denoise, batch.images, noise_of, self.dda, chain, self.denoiser.microbatch)[:, None]
            )

    def _denoised(self, batch: Batch, noise: Float[torch.Tensor, "b 1 c h w"], sigma: float) -> torch.Tensor:
        """The images, diffused to a noise level and denoised."""
        assert self.denoiser is not None
        noisy = batch.images[:, None] + sigma * noise
        if self.sampler == "ddim":
            return ddim(self._denoise(self.denoiser, batch), noisy, sigma)
        bare = self.denoiser.model_copy(update={"clip": False})  # the solver's noise is the network's own
        return dpm_solver_2(self._denoise(bare, batch), noisy, sigma, bare.level(self.end)).clamp(0, 1)

    def _denoise(self, denoiser: Denoiser, batch: Batch) -> Denoise:
        if not self.mixing:
            return denoiser.loaded(batch.limits)
        told = denoiser.loaded_mixed(batch.limits, self.mixing)

        def denoise(noisy: Float[torch.Tensor, "b d c h w"], sigma: Sigma) -> Posterior:
            return told(noisy, sigma, batch.labels[:, None].expand(noisy.shape[:2]))

        return denoise

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        """The logits, float64."""
        return {"logits": model.logits(view.images[:, 0]).double()}

    def record(self, seen: Mapping[str, Sequence[Columns]], batch: Batch) -> Columns:
        """Of each mode: prediction, confidence, entropy, and the proper scores; of the ensemble also up to each time.

        `other_pred` is the prediction in the class space that the dataset does not declare.
        """
        if bool((batch.labels < 0).any()):
            raise ValueError(f"{batch.dataset} has images without a label (-1), and accuracy needs one of each")
        space, other = (batch.classes, ()) if batch.class_space == "subset" else ((), batch.classes)
        declared = {name: _probabilities(view[0]["logits"], space) for name, view in seen.items()}
        beside = {name: _probabilities(view[0]["logits"], other) for name, view in seen.items()}
        rows = {**_summary(declared["t=0"]), **_scores(declared["t=0"], beside["t=0"], batch.labels)}
        if "de" in self.modes:
            rows |= self._ensembles(declared, beside, batch)
        adapted = {"dda": (0.0, 1.0), "dda-se": (0.5, 0.5)}
        for mode, (plain, changed) in adapted.items():
            if mode in self.modes:
                pair = [plain * space["t=0"] + changed * space["dda"] for space in (declared, beside)]
                found = {**_summary(pair[0]), **_scores(pair[0], pair[1], batch.labels)}
                rows |= {f"{mode.replace('-', '_')}_{name}": column for name, column in found.items()}
        return rows

    def _ensembles(
        self, declared: Mapping[str, torch.Tensor], beside: Mapping[str, torch.Tensor], batch: Batch
    ) -> dict[str, torch.Tensor]:
        """Each time alone, the ensemble up to each time, and those of other steps."""
        each, aside = (torch.stack([space[f"t={t}"] for t in self.times], dim=1) for space in (declared, beside))
        ensemble = _cumulative(each)
        rows = {f"t_{name}": column for name, column in _summary(each).items()}
        rows |= {f"de_{name}": column for name, column in _summary(ensemble).items()}
        scores = _scores(ensemble[:, -1], aside.mean(dim=1), batch.labels)
        rows |= {f"de_{name}": column for name, column in scores.items()}
        for step in self.steps:
            chosen = _cumulative(each[:, self.multiples(step)])
            rows[f"de_step{step}_pred"] = chosen.argmax(dim=-1).int()
        return rows

    def metrics(self, records: Records) -> Iterable[Metric]:
        """Accuracies per dataset and their means; calibration; accuracy and entropy against t; what the modes cost."""
        yield from shift_metrics.metrics(records, self.settings)
        yield from shift_metrics.against_published(records, self.modes, self.baselines)

    @property
    def settings(self) -> shift_metrics.Settings:
        """What figures depend on, besides records."""
        return shift_metrics.Settings(self.modes, self.times, self.steps, self.bins, self.costs())

    def outcomes(self, records: Records) -> Mapping[Key, Basis]:
        """Hits and proper scores of each image: of all figures but calibration errors, mCE and costs."""
        return shift_outcomes.outcomes(records, self.settings)

    def compare(self, checkpoints: Sequence[str], records: Callable[[str], Records]) -> Iterable[tuple[str, Metric]]:
        """The mCE of each checkpoint relative to those that are named as baselines."""
        return shift_metrics.against_checkpoints(checkpoints, records, self.modes, self.baselines)


def _probabilities(logits: Float[torch.Tensor, "b k"], classes: tuple[int, ...]) -> Float[torch.Tensor, "b k"]:
    """Softmax among some classes, 0 for the others; among all where none are named."""
    if not classes:
        return logits.softmax(dim=1)
    chosen = logits[:, list(classes)].softmax(dim=1)
    return torch.zeros_like(logits).index_copy_(1, torch.tensor(classes, device=logits.device), chosen)


def _cumulative(each: Float[torch.Tensor, "b t k"]) -> Float[torch.Tensor, "b t k"]:
    """The mean over the first 1, 2, ... times."""
    counts = torch.arange(1, each.shape[1] + 1, device=each.device)
    return each.cumsum(dim=1) / counts[None, :, None]


def _summary(probabilities: Float[torch.Tensor, "b *t k"]) -> dict[str, Shaped[torch.Tensor, "b *t"]]:
    confidence, pred = probabilities.max(dim=-1)
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    return {"pred": pred.int(), "confidence": confidence, "entropy": entropy}


def _scores(
    probabilities: Float[torch.Tensor, "b k"], other: Float[torch.Tensor, "b k"], labels: Int[torch.Tensor, " b"]
) -> dict[str, Shaped[torch.Tensor, " b"]]:
    """The negative log-likelihood, the Brier score, and the prediction in the other class space.

    References:
        Verification of forecasts expressed in terms of probability (Brier, 1950), with the sum over classes
    """
    right = probabilities.gather(1, labels[:, None])[:, 0]
    brier = (probabilities**2).sum(dim=1) - 2 * right + 1
    # The smallest number keeps the logarithm of a probability that has underflown finite.
    nll = -right.clamp_min(torch.finfo(right.dtype).tiny).log()
    return {"nll": nll, "brier": brier.clamp_min(0), "other_pred": other.argmax(dim=1).int()}
