"""Gradients of a classifier to clean, noisy and denoised images: their size, and how much they look like images."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator
from torch import Tensor
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Options, Outside
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.diffusion.base import Denoiser
from robustbench_diffaug.evaluators import gains, gradients_metrics
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.evaluators.differentiable import Pulled, Shown, Through, pulled, rising
from robustbench_diffaug.evaluators.gradients_likeness import ascended, class_means, cosine, hoyer, roughness, tiles
from robustbench_diffaug.outcomes import Basis, Key
from robustbench_diffaug.records import Metric, Picture, Records

__all__ = ["Gradients"]


class Gradients(Evaluator):
    """Gradients of log p(y | x), y the label, on images diffused to times t: x_t = x + sigma(t) eps, t = 0 the image.

    They are taken to what `through` names: 'image' is the gradient at x_t to x_t; 'denoised' that at D(x_t) to D(x_t),
    as if it were a given image; 'chain' that of what the classifier makes of x_t by way of D, to x_t: J^T times the
    former, J = dD/dx_t. The denoiser is not clamped, since clamping zeroes rows of J. At t = 0 nothing is denoised, and
    only 'image' is taken. A network that wants the noise level is told that of t, and at t = 0 the schedule's lowest;
    see `differentiable.pulled` for what it sees.

    Of each gradient there are its norm, that of the Jacobian of the logits, its cosines with D(x_t) - x_t and with the
    difference of two class means, its sparsity and its roughness. With a `judge` each image also goes some steps of l2
    length `step` along the gradient of another class, drawn for the image, and the judge says whether it is of that
    class now: the generative check.

    Arguments:
        denoiser: D; needed for all times above 0.
        times: t, increasing; 0 alone where there is no denoiser.
        through: 'image', 'denoised', 'chain'; 'image' alone where there is no denoiser.
        draws: Of the noise, at each time; figures of an image are means over them.
        probes: Random signs r that estimate the squared Frobenius norm of the Jacobian, as |J^T r|^2 (Hutchinson);
            0 is exact, by as many backward passes as there are classes.
        reference: Labelled images whose class means are taken, such as training images.
        judge: A classifier that is none of those it judges.
        judge_times: Those of `times` from which steps are taken.
        steps: Their number.
        step: The length of each in pixels of [0, 1].
        gallery: Whether images and gradients are recorded as pictures: for a bench of a few samples.
        gains: Checkpoints and the one each is compared with, as `resnet+diffaug: resnet`, over the same images.

    References:
        DiffAug: A Diffuse-and-Denoise Augmentation for Training Robust Classifiers (Sastry et al., NeurIPS 2024),
            https://arxiv.org/abs/2306.09192
        Are Perceptually-Aligned Gradients a General Property of Robust Classifiers? (Kaur, Cohen and Lipton, 2019),
            https://arxiv.org/abs/1910.08640
        Do Perceptually Aligned Gradients Imply Adversarial Robustness? (Ganz, Kawar and Elad, 2023),
            https://arxiv.org/abs/2207.11378
        Which Models have Perceptually-Aligned Gradients? An Explanation via Off-Manifold Robustness (Srinivas, Bordt
            and Lakkaraju, 2023), https://arxiv.org/abs/2305.19101
        Robust Learning with Jacobian Regularization (Hoffman, Roberts and Yaida, 2019),
            https://arxiv.org/abs/1908.02729
    """

    kind: Literal["gradients"] = "gradients"
    denoiser: Denoiser | None = None
    times: tuple[NonNegativeInt, ...] = (0, 100, 200, 300, 400, 500)
    through: tuple[Through, ...] = ("image", "denoised", "chain")
    draws: Annotated[int, Field(ge=1, le=1000)] = 1
    probes: Annotated[int, Field(ge=0, le=1000)] = 1
    reference: Dataset | None = None
    judge: Checkpoint | None = None
    judge_times: tuple[NonNegativeInt, ...] = (0, 300)
    steps: PositiveInt = 4
    step: Annotated[float, Field(gt=0)] = 1.0
    gallery: bool = False
    gains: Annotated[Options, Outside] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_denoiser(cls, data: object) -> object:
        """Left out, `times` and `through` are what can be had without a denoiser, and `judge_times` some of `times`."""
        if not isinstance(data, Mapping):
            return data
        bare = {} if data.get("denoiser") is not None else {"times": (0,), "through": ("image",)}
        known = data.get("times", bare.get("times", cls.model_fields["times"].default))
        judged = [t for t in cls.model_fields["judge_times"].default if isinstance(known, list | tuple) and t in known]
        return {**bare, "judge_times": judged, **data}

    @field_validator("denoiser")
    @classmethod
    def _unclamped(cls, denoiser: Denoiser | None) -> Denoiser | None:
        if denoiser is None or not denoiser.clip:
            return denoiser
        if "clip" in denoiser.model_fields_set:
            raise ValueError("clip: true zeroes rows of the denoiser's Jacobian; leave it out, it is off for gradients")
        return denoiser.model_copy(update={"clip": False})

    @model_validator(mode="after")
    def _consistent(self) -> "Gradients":
        if list(self.times) != sorted(set(self.times)) or not self.times:
            raise ValueError("times must increase, without repetition")
        if not self.through or len(set(self.through)) < len(self.through):
            raise ValueError("through names none, or one twice; give some of image, denoised, chain")
        if self.denoiser is None and (self.times != (0,) or self.through != ("image",)):
            raise ValueError("times above 0, and through denoised and chain, need a denoiser")
        if 0 in self.times and "image" not in self.through:
            raise ValueError("times has 0, where nothing is denoised; add image to through, or take 0 out")
        if self.judge is None:
            return self
        for t in self.judge_times:
            if t not in self.times:
                raise ValueError(f"judge_times has {t}, which is none of times")
        if not self.judge_times:
            raise ValueError("judge needs judge_times, some of times")
        if self.judge.wants or self.judge.analysed() is not None:
            raise ValueError(f"judge {self.judge.id} is no classifier of plain images; name one")
        return self

    def check(self) -> tuple[str, ...]:
        """Times must be the schedule's, the denoiser unconditional, and the files of the judge there."""
        if self.denoiser is not None:
            self.denoiser.sigma(self.times[-1])
            if not self.denoiser.unconditional():
                raise ValueError("the denoiser needs the class of each image; give an unconditional one")
        if self.judge is not None:
            self.judge.check()
        if self.reference is not None and not len(self.reference.rows()):
            raise ValueError(f"reference {self.reference.name} is empty; give it images, or take it out")
        return ()

    def fits(self, datasets: Sequence[Dataset], checkpoints: Sequence[str]) -> None:
        """The checkpoints that gains compares must be there."""
        gains.require(self.gains, checkpoints)

    def denoisers(self) -> tuple[Denoiser, ...]:
        """D."""
        return (self.denoiser,) if self.denoiser is not None else ()

    def _looks(self) -> list[tuple[int, Through]]:
        """Every time with what gradients are taken to."""
        return [(t, through) for t in self.times for through in self.through if t or through == "image"]

    def _draws(self, t: int) -> int:
        return self.draws if t else 1

    @property
    def needs_gradient(self) -> bool:
        """It does."""
        return True

    def forwards(self) -> Forwards:
        """The views, and of a plain checkpoint its looks at them, steps, and backward passes through D.

        A look through D denoises again, with a graph, which each checkpoint does for itself; so does each step.
        """
        looks, judged = self._looks(), self.judge_times if self.judge else ()
        views, seen, own, back = sum(self._draws(t) for t in self.times if t), 0, 0, 0
        for t, through in looks:
            draws, steps = self._draws(t), self.steps if t in judged else 0
            seen += draws * (1 + steps)
            if through == "chain":
                own += draws * (1 + 2 * steps)
                back += draws * (1 + (self.probes or 1) + steps)
            elif through == "image" and t and steps:
                own += draws
        return Forwards(views, seen, own=own, own_backward=back)

    def views(self, batch: Batch) -> Iterator[View]:
        """The images, and each one diffused to every time, beside its denoised twin."""
        for t in self.times:
            if not t:
                known = self.denoiser is not None and self.denoiser.sigma(0)
                sigma = torch.full((len(batch.ids), 1), known, dtype=torch.float64) if known else None
                images = batch.images[:, None]
                yield View("t=0", images, 0, sigma, None if sigma is None else images)
                continue
            assert self.denoiser is not None
            level, first, denoise = self.denoiser.sigma(t), 0, self.denoiser.loaded(batch.limits)
            for noise in batch.noise(f"gradients/t={t}", range(self.draws)):
                noisy = batch.images[:, None] + level * noise
                sigma = torch.full(noisy.shape[:2], level, dtype=torch.float64)
                yield View(f"t={t}", noisy, first, sigma, denoise(noisy, level).mean)
                first += noise.shape[1]

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        """The figures of each gradient, of every draw of the view."""
        if bool((batch.labels < 0).any()):
            raise ValueError(f"{batch.dataset} has images without a label (-1), and gradients are of its log p")
        count, t = view.images.shape[1], int(view.name.removeprefix("t="))
        shown = self._shown(view, batch, t)
        columns: dict[str, Tensor] = {}
        for through in (through for time, through in self._looks() if time == t):
            if through == "denoised" and model.wants == ("sigma",) and len(self.through) > 1:
                continue  # it sees no denoised image
            found = self._figures(model, shown, through, batch, view)
            if self.judge is not None and t in self.judge_times:
                found |= self._judged(model, shown, through, batch)
            columns |= {f"{through}_{name}": column for name, column in found.items()}
        if self.gallery:
            twins = shown.images if shown.denoised is None else shown.denoised
            clean = batch.images.repeat_interleave(count, dim=0)
            seen = {"clean": clean, "noisy": shown.images, "twin": twins}
            columns |= {f"{name}_picture": _eight_bits(images) for name, images in seen.items()}
        return {name: column.reshape(len(batch.ids), count, *column.shape[1:]) for name, column in columns.items()}

    def _shown(self, view: View, batch: Batch, t: int) -> Shown:
        """The view as one row of images."""
        images = view.images.flatten(0, 1)
        if self.denoiser is None:
            return Shown(images)
        denoised = images if view.denoised is None else view.denoised.flatten(0, 1)
        denoise = self.denoiser.loaded(batch.limits) if t else None
        return Shown(images, self.denoiser.sigma(t), denoised, denoise, self.denoiser.microbatch)

    def _figures(
        self, model: Model, shown: Shown, through: Through, batch: Batch, view: View
    ) -> dict[str, Shaped[Tensor, "n ..."]]:
        """Of one gradient: norms, cosines, sparsity, roughness, and its picture."""
        count = view.images.shape[1]
        labels = batch.labels.repeat_interleave(count)
        signs = self._signs(batch, view, model.classes)

        def vectors(logits: Float[Tensor, "m k"], rows: slice) -> Iterator[Float[Tensor, "m k"]]:
            yield rising(logits, labels[rows]).direction
            yield from signs[rows].unbind(dim=1)

        found = pulled(model, shown, through, vectors)
        gradient = found.gradients[0]
        squares = [part.double().flatten(1).square().sum(dim=1) for part in found.gradients[1:]]
        length = rising(found.logits, labels).length
        rough = roughness(batch.images).repeat_interleave(count)
        figures = {
            "gradient_norm": length * gradient.double().flatten(1).norm(dim=1),
            "jacobian_square": torch.stack(squares).sum(dim=0) / (self.probes or 1),
            "gradient_sparsity": hoyer(gradient),
            "gradient_variation": roughness(gradient) / rough,
        }
        if shown.denoise is not None and shown.denoised is not None:
            figures["pag_cosine"] = cosine(gradient, shown.denoised - shown.images)
        if self.reference is not None:
            figures["pag_class_cosine"] = self._towards_class(found, labels, batch)
        rounded: dict[str, Tensor] = {name: column.float() for name, column in figures.items()}
        return {**rounded, "picture": tiles(gradient)} if self.gallery else rounded

    def _signs(self, batch: Batch, view: View, classes: int) -> Float[Tensor, "n p k"]:
        """What the rows of the Jacobian are summed with: random signs of each image, or each class alone."""
        count = view.images.shape[1]
        if not self.probes:
            return torch.eye(classes, device=batch.images.device).expand(len(batch.ids) * count, -1, -1)
        draws = range(view.first * self.probes, (view.first + count) * self.probes)
        keys = [rng.key(batch.seed, f"gradients/probes/{view.name}", batch.dataset, id) for id in batch.ids]
        drawn = torch.stack([torch.from_numpy(rng.uniform(key, draws, (classes,))) for key in keys])
        return torch.where(drawn < 0.5, -1.0, 1.0).reshape(-1, self.probes, classes).to(batch.images)

    def _towards_class(self, found: Pulled, labels: Int[Tensor, " n"], batch: Batch) -> Float[Tensor, " n"]:
        """The cosine with the mean image of the label's class less that of the other class with the highest logit."""
        assert self.reference is not None
        means = class_means(self.reference, found.logits.shape[1]).to(batch.images)
        if means.shape[1:] != batch.images.shape[1:]:
            sizes = ["x".join(map(str, images.shape[1:])) for images in (means, batch.images)]
            raise ValueError(f"reference {self.reference.name} has images of {sizes[0]}, {batch.dataset} of {sizes[1]}")
        own = functional.one_hot(labels.long(), found.logits.shape[1]).bool()
        rival = found.logits.masked_fill(own, -torch.inf).argmax(dim=1)
        return cosine(found.gradients[0], means[labels] - means[rival])

    def _judged(self, model: Model, shown: Shown, through: Through, batch: Batch) -> dict[str, Float[Tensor, " n"]]:
        """Whether the judge takes an image for the class whose gradient it followed, and its probability."""
        assert self.judge is not None
        judge = self.judge.loaded(batch.limits)
        known = torch.tensor(batch.classes or range(model.classes), device=batch.labels.device)
        if len(known) < 2 or judge.classes != model.classes:
            raise ValueError(
                f"judge {judge.id} knows {judge.classes} classes and {model.id} {model.classes}; needed are "
                "two or more, the same"
            )
        place = torch.searchsorted(known, batch.labels)  # of another class: some places beyond one's own
        beyond = 1 + (batch.uniform("gradients/target") * (len(known) - 1)).long().clamp(max=len(known) - 2)
        targets = known[(place + beyond) % len(known)].repeat_interleave(len(shown.images) // len(batch.ids))
        ended = ascended(model, shown, through, targets, self.steps, self.step)
        logits = judge.logits(ended).double()
        confidence = logits.softmax(dim=1).gather(1, targets[:, None])[:, 0]
        return {"generated": (logits.argmax(dim=1) == targets).float(), "generated_confidence": confidence.float()}

    def record(self, seen: Mapping[str, Sequence[Columns]], batch: Batch) -> Columns:
        """Each figure by time, the mean over draws, NaN where there is none; pictures of the first draw."""
        held = {t: seen[f"t={t}"] for t in self.times}
        names = dict.fromkeys(name for parts in held.values() for part in parts for name in part)
        columns: dict[str, Tensor] = {}
        for name in names:
            given = {t: torch.cat([part[name] for part in parts], 1) for t, parts in held.items() if name in parts[0]}
            if name.endswith("_picture"):
                first = {t: column[:, 0] for t, column in given.items()}
                empty = torch.zeros_like(next(iter(first.values())))
            else:
                first = {t: column.double().mean(dim=1).float() for t, column in given.items()}
                empty = torch.full_like(next(iter(first.values())), torch.nan)
            columns[name] = torch.stack([first.get(t, empty) for t in self.times], dim=1)
        return columns

    def metrics(self, records: Records) -> Iterable[Metric]:
        """Every figure against t, with intervals."""
        return gradients_metrics.metrics(records, self.times)

    def outcomes(self, records: Records) -> Mapping[Key, Basis]:
        """The figures of each image's gradients at each time, but those that are roots of means."""
        return gradients_metrics.outcomes(records, self.times)

    def compare(self, checkpoints: Sequence[str], records: Callable[[str], Records]) -> Iterable[tuple[str, Metric]]:
        """The paired differences of the checkpoints that `gains` names."""
        return gains.compared(self.gains, records, lambda one, base: gradients_metrics.gains(one, base, self.times))

    def notices(self, records: Records) -> Iterable[str]:
        """Gradients that are 0, of which there is no cosine."""
        return gradients_metrics.notices(records, self.times)

    def pictures(self, records: Records) -> Iterable[Picture]:
        """At each time the images, x_t, D(x_t) and the gradients."""
        return gradients_metrics.pictures(records, self.times) if self.gallery else ()


def _eight_bits(images: Float[Tensor, "n c h w"]) -> Shaped[Tensor, "n c h w"]:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
