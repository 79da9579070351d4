"""What a classifier is worth as a guide: images that it leads a denoiser to, compared with real ones."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Options, Outside, suggest
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.diffusion.adaptation import Chain
from robustbench_diffaug.diffusion.base import Denoiser
from robustbench_diffaug.diffusion.guidance import Guide, LogLikelihood, Sampler, guided, in_groups, sample
from robustbench_diffaug.evaluators import gains
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.evaluators.differentiable import gradient_of, logits_of
from robustbench_diffaug.outcomes import Basis, Deferred, Key, Rows
from robustbench_diffaug.paired import paired_difference
from robustbench_diffaug.records import Better, Metric, Picture, Records, shared
from robustbench_diffaug.samples import (
    frechet_difference,
    frechet_estimate,
    neighbourhoods,
    score_estimate,
)
from robustbench_diffaug.stats import Estimate, mean, proportion

__all__ = ["Generation"]

CLASSES, EACH = 10, 8  # of a picture


class _Compared(NamedTuple):
    """A figure of made and real samples.

    Arguments:
        name: Of the metric.
        of: The set that its rows are.
        values: One number of each row, whose mean it is.
    """

    name: str
    of: Literal["made", "real"]
    values: Shaped[np.ndarray, " n"]


class Generation(Evaluator):
    """Guided generation: each checkpoint leads a denoiser to the class of each label, from the same noise.

    The bench has a dataset of labels, whose images are made here (kind `labels`), and may have one of real images that
    made ones are compared with. A checkpoint that wants sigma sees the noisy image; one that wants the denoised image
    too is differentiated through the denoiser; one of clean images is refused unless `through` allows it to look at the
    denoised image alone. Made images are clamped and rounded to 8 bits before any network looks at them.

    Figures of features have the feature network's id as their group, since they are about its features.

    Arguments:
        denoiser: What draws.
        scales: Of the guidance; 0 is without, 1 draws from the classifier's own p(x | y), more is further.
        sampler: 'ancestral', or 'ddim', which is deterministic once it has begun.
        steps: From `start` down, evenly.
        start: The time that images begin at; left out, the last. Small denoisers know the overall grey of an image
            badly where there is little but noise, so that beginning lower, from noise around `mean`, can be better.
        mean: The grey that images begin around, in [0, 1].
        variance: Of ancestral steps: 'learned' by the network, or fixed: 'small' is the posterior's, 'large' beta.
        through: 'denoised' lets classifiers of clean images guide: they are shown D(x_t), and the gradient goes through
            the denoiser.
        features: The network whose features (the input of its last layer) are compared.
        judge: The classifier that says what a made image shows; one that guides nothing here is an independent one.
        real: The name of the dataset of real images, of the size of those that are made; left out, there is none.
        keep_images: Whether images are kept, which pictures need.
        neighbours: k of precision, recall, density and coverage; published are 3 for the first two, 5 for the others.
        gains: Checkpoints and the one each is compared with, as `resnet-denoise-assisted: resnet-noisy`.
        resamples: Of the bootstrap.

    References:
        Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), https://arxiv.org/abs/2105.05233
        DiffAug: A Diffuse-and-Denoise Augmentation for Training Robust Classifiers (Sastry, Dumpala and Oore, 2024),
            https://arxiv.org/abs/2306.09192
    """

    kind: Literal["generation"] = "generation"
    heavy: ClassVar[tuple[str, ...]] = ("made",)
    denoiser: Denoiser
    scales: tuple[Annotated[float, Field(ge=0, le=1000)], ...] = Field((1.0,), min_length=1, max_length=20)
    sampler: Literal["ancestral", "ddim"] = "ancestral"
    steps: Annotated[int, Field(ge=2, le=100_000)] = 50
    start: PositiveInt | None = None
    mean: Annotated[float, Field(ge=0, le=1)] = 0.5
    variance: Literal["learned", "small", "large"] = "small"
    through: Literal["denoised"] | None = None
    features: Checkpoint
    judge: Checkpoint
    real: str | None = None
    keep_images: bool = True
    neighbours: Annotated[PositiveInt, Outside] = 5
    gains: Annotated[Options, Outside] = ()
    resamples: Annotated[int, Field(ge=100, le=100_000), Outside] = 200

    @model_validator(mode="after")
    def _consistent(self) -> "Generation":
        named = [f"{scale:g}" for scale in self.scales]
        if len(set(named)) < len(named) or any("e" in name for name in named):
            raise ValueError(f"scales are {', '.join(named)}; give each once, of at most four decimals")
        if not any(self.scales):
            raise ValueError("scales has nothing but 0, which asks no classifier; give one above it beside")
        for role in ("features", "judge"):
            if getattr(self, role).wants:
                raise ValueError(f"{role} looks at made images, which have no noise; name a network without wants")
            if getattr(self, role).analysed() is not None:
                raise ValueError(f"{role} is a denoiser; name a classifier")
        return self

    def check(self) -> tuple[str, ...]:
        """The times must be the denoiser's, its variance must be known, and the two networks' files there."""
        times = len(self.denoiser.sigmas())
        if self.start is not None and self.start >= times:
            raise ValueError(f"start is {self.start}; the denoiser's last time is {times - 1}")
        if self.steps > self._top() + 1:
            raise ValueError(f"steps is {self.steps}; there are {self._top() + 1} times to step through")
        if not self.denoiser.unconditional():
            raise ValueError("the denoiser needs a class itself; guidance takes one that does not")
        if self.variance == "learned" and self.denoiser.learned_variance() is False:
            raise ValueError("the denoiser has no learned variance; give variance: small (or large)")
        self.features.check()
        self.judge.check()
        return ()

    def fits(self, datasets: Sequence[Dataset], checkpoints: Sequence[str]) -> None:
        """There must be one dataset of labels, the real images that are named, and the checkpoints of gains."""
        names = [dataset.name for dataset in datasets]
        if self.real is not None and self.real not in names:
            raise ValueError(f"real names dataset {self.real!r}{suggest(self.real, names)}")
        labels = [dataset for dataset in datasets if dataset.name != self.real]
        if len(labels) != 1:
            raise ValueError(
                f"needed are one dataset of labels and the one that real names, not {', '.join(names)}; "
                "make a bench of each dataset of labels"
            )
        shapes = {dataset.name: tuple(dataset.first().shape) for dataset in datasets}
        if len(set(shapes.values())) > 1:
            sizes = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise ValueError(f"made and real images have different shapes ({sizes}); correct size and channels")
        if self.denoiser.size() not in (None, labels[0].first().shape[-1]):
            raise ValueError(f"the denoiser makes images of size {self.denoiser.size()}; correct that of {names[0]}")
        gains.require(self.gains, checkpoints)

    def denoisers(self) -> tuple[Denoiser, ...]:
        """The one that draws."""
        return (self.denoiser,)

    @property
    def needs_gradient(self) -> bool:
        """It does."""
        return True

    def forwards(self) -> Forwards:
        """A pass of denoiser and guide, and a pass back, in each step at each scale, anew for each checkpoint.

        Not counted are two looks at what was made. A guide that sees no denoised image saves the denoiser's way back.
        """
        passes = self.steps * len(self.scales)
        return Forwards(0, passes, own=passes, own_backward=passes)

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        """What the feature network and the judge make of images that the checkpoint led to, or of real ones."""
        images = view.images if batch.dataset == self.real else self._made(model, batch)
        pixels = (images.clamp(0, 1) * 255).round()
        flat = pixels.flatten(0, 1) / 255
        _, features = self.features.loaded(batch.limits).features(flat)
        probabilities = torch.softmax(self.judge.loaded(batch.limits).logits(flat).float(), dim=1)
        columns = {"features": features.float(), "probabilities": probabilities}
        found = {name: column.unflatten(0, images.shape[:2]) for name, column in columns.items()}
        if self.keep_images:
            found["made"] = pixels.to(torch.uint8)
        # Columns have one shape in all files: a real image is the same at each scale.
        return {name: column.expand(-1, len(self.scales), *column.shape[2:]) for name, column in found.items()}

    def metrics(self, records: Records) -> Iterable[Metric]:
        """The judge's agreement and score, and the figures of features where there are real images."""
        real, made = self._split(records)
        for index, scale in enumerate(self.scales) if len(made) else ():
            headline = scale == next((value for value in self.scales if value), 0)
            yield from self._judged(made, index, f"@scale={scale:g}", headline)
            yield from self._against(records, index, headline) if self._enough(real, made) else ()
        if len(real) and len(made):
            yield from self._judged(real, 0, "/real", False)

    def outcomes(self, records: Records) -> Mapping[Key, Basis]:
        """The agreement of the judge with the class asked for, of each image that was made."""
        rows, made = Rows(records), dict[Key, Callable[[], Basis]]()
        known = rows.of(lambda found: found.name != self.real) & (records["label"] >= 0)
        for index, scale in enumerate(self.scales) if known.any() else ():
            right = records["probabilities"][:, index].argmax(axis=1) == records["label"]
            made[f"agreement@scale={scale:g}", self.judge.id] = partial(rows.outcomes, right, known)
        return Deferred(made)

    def compare(self, checkpoints: Sequence[str], records: Callable[[str], Records]) -> Iterable[tuple[str, Metric]]:
        """The gains of the checkpoints that `gains` names, over the same labels and noise."""
        return gains.compared(self.gains, records, self._compared)

    def _compared(self, one: Records, other: Records) -> Iterator[Metric]:
        """The gains at every scale but 0, at which the images are the same."""
        rows = shared(one, other)
        pair = one.take(rows[0]), other.take(rows[1])
        if not len(self._split(pair[0])[1]):
            return
        for index, scale in enumerate(self.scales):
            for figure in self._gains(pair, index) if scale else ():
                yield replace(figure, name=f"gain/{figure.name}@scale={scale:g}")

    def notices(self, records: Records) -> Iterable[str]:
        """How many samples the figures of features rest on, and what they are not."""
        real, made = self._split(records)
        if self._enough(real, made):
            width = made["features"].shape[-1]
            yield (
                f"frechet is of the {width} features of {self.features.id}, {len(made)} made and {len(real)} real "
                "samples: it is too large by an amount that depends on these numbers, and no FID unless that is the "
                "Inception network"
            )
        elif len(real) and len(made):
            yield (f"{len(made)} made and {len(real)} real samples are too few for {self.neighbours} neighbours")

    def pictures(self, records: Records) -> Iterable[Picture]:
        """Made images, a row for each of the first classes, at each scale; and real ones."""
        if not self.keep_images or not len(records):
            return
        real, made = self._split(records)
        for index, scale in enumerate(self.scales) if len(made) else ():
            how = "without guidance" if scale == 0 else f"guided at scale {scale:g}"
            yield from _grid(made, index, f"made.scale-{scale:g}", f"Images drawn {how}, by the class asked for")
        if len(real):
            yield from _grid(real, 0, "real", "Real images, by class")

    def _top(self) -> int:
        """The time that images begin at."""
        return len(self.denoiser.sigmas()) - 1 if self.start is None else self.start

    def _split(self, records: Records) -> tuple[Records, Records]:
        """The rows of real and of made images."""
        return records.of(lambda found: found.name == self.real), records.of(lambda found: found.name != self.real)

    def _enough(self, real: Records, made: Records) -> bool:
        """Whether there are samples enough for figures of features."""
        return min(len(real), len(made)) > self.neighbours

    def _made(self, model: Model, batch: Batch) -> Float[Tensor, "b s c h w"]:
        """The images of a batch of labels, at each scale from the same noise."""
        count, size = len(self.scales), self.denoiser.microbatch
        if int(batch.labels.min()) < 0 or int(batch.labels.max()) >= self.judge.classes:
            ends = f"{int(batch.labels.min())} to {int(batch.labels.max())}"
            raise ValueError(
                f"labels of {batch.dataset} go from {ends}, and the judge knows {self.judge.classes} classes"
            )
        if not model.wants and self.through is None:
            raise ValueError(
                f"{model.id} classifies images without noise; give through: denoised to let it guide by denoised ones"
            )

        def noise(number: int) -> Float[Tensor, "n c h w"]:
            (drawn,) = batch.noise("generation", range(number, number + 1))
            return drawn[:, 0].repeat_interleave(count, dim=0)

        labels = batch.labels.repeat_interleave(count)
        guide = in_groups([self._guide(model, part, batch) for part in labels.split(size)], size)
        chain = Chain.of(self.denoiser.sigmas()[: self._top() + 1], self.steps)
        scale = torch.tensor(self.scales, dtype=torch.float64, device=labels.device).repeat(len(batch.ids))
        how = Sampler(self.sampler, self.variance, self.mean)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # as all gradients are taken
            drawn = sample(guide, noise, chain, scale, how)
        return drawn.reshape(-1, count, *drawn.shape[1:])

    def _guide(self, model: Model, labels: Int[Tensor, " n"], batch: Batch) -> Guide:
        """The slope of a checkpoint's log p(y | x) at some labels."""
        through = "denoised" in model.wants or not model.wants
        denoise, likelihood = self.denoiser.loaded(batch.limits), _log_likelihood(model, labels)
        return guided(denoise, likelihood, through, partial(gradient_of, model))

    def _judged(self, records: Records, index: int, suffix: str, headline: bool) -> Iterator[Metric]:
        """What the judge makes of some images."""
        probabilities, group = records["probabilities"][:, index], self.judge.id
        known = records["label"] >= 0
        if known.any():
            right = probabilities[known].argmax(axis=1) == records["label"][known]
            yield records.metric(f"agreement{suffix}", group, proportion(right), headline=headline)
        found = score_estimate(probabilities, records.key("score"), resamples=self.resamples)
        yield records.metric(f"score{suffix}", group, found, unit="classes")

    def _against(self, records: Records, index: int, headline: bool) -> Iterator[Metric]:
        """How near made images are to real ones; shares are over one set, with the other as it is."""
        real, made = self._split(records)
        suffix, group = f"@scale={self.scales[index]:g}", self.features.id
        complete = len(records) == sum(declared.n for declared in records.declared)
        features = real["features"][:, 0], made["features"][:, index]
        distance = frechet_estimate(*features, records.key("frechet"), resamples=self.resamples)
        found = made.metric(f"frechet{suffix}", group, distance, "lower", "squared features", headline)
        yield replace(found, complete=complete)
        for figure in self._shares(*features):
            rows = made if figure.of == "made" else real
            share = (
                mean(figure.values, records.key(figure.name)) if figure.name == "density" else proportion(figure.values)
            )
            unit = "balls" if figure.name == "density" else "fraction"
            yield replace(rows.metric(f"{figure.name}{suffix}", group, share, unit=unit), complete=complete)

    def _shares(self, real: Shaped[np.ndarray, "n d"], made: Shaped[np.ndarray, "m d"]) -> list[_Compared]:
        found = neighbourhoods(real, made, self.neighbours)
        of: dict[str, Literal["made", "real"]] = {"precision": "made", "density": "made"}
        return [_Compared(name, of.get(name, "real"), values) for name, values in found._asdict().items()]

    def _gains(self, pair: tuple[Records, Records], index: int) -> Iterator[Metric]:
        """Differences of two checkpoints' figures, without the suffix of their names."""
        (real, made), (_, other) = self._split(pair[0]), self._split(pair[1])
        right = [rows["probabilities"][:, index].argmax(axis=1) == rows["label"] for rows in (made, other)]
        found = paired_difference(right[0], right[1], None, made.key("gain", "agreement"), resamples=self.resamples)
        yield made.metric("agreement", self.judge.id, found)
        if not self._enough(real, made):
            return
        fixed, sets = real["features"][:, 0], (made["features"][:, index], other["features"][:, index])
        key, complete = pair[0].key("gain"), len(pair[0]) == sum(declared.n for declared in pair[0].declared)

        def metric(name: str, rows: Records, found: Estimate, better: Better, unit: str) -> Metric:
            return replace(rows.metric(name, self.features.id, found, better, unit), complete=complete)

        distance = frechet_difference(fixed, sets, key, resamples=self.resamples)
        yield metric("frechet", made, distance, "lower", "squared features")
        for first, second in zip(*(self._shares(fixed, part) for part in sets), strict=True):
            dense = first.name == "density"
            settings: dict[str, Any] = {"resamples": self.resamples, "bounded": not dense}
            found = paired_difference(first.values, second.values, None, pair[0].key("gain", first.name), **settings)
            unit = "balls" if dense else "fraction"
            yield metric(first.name, made if first.of == "made" else real, found, "higher", unit)


def _log_likelihood(model: Model, labels: Int[Tensor, " n"]) -> LogLikelihood:
    """The log-likelihood of some labels: of noisy images, both images, or denoised ones, as the checkpoint wants."""

    def found(noisy: Float[Tensor, "n c h w"], sigma: float, denoised: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
        logits = logits_of(model, noisy, sigma, denoised) if model.wants else logits_of(model, denoised)
        return torch.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]

    return found


def _grid(records: Records, index: int, name: str, title: str) -> Iterator[Picture]:
    """The first images of the first classes, of those that have enough of them."""
    found: dict[int, list[np.ndarray]] = defaultdict(list)
    for chunk in records.chunks(("label", "made"), 256):
        for label, made in zip(chunk["label"].tolist(), chunk["made"], strict=True):
            if 0 <= label < CLASSES and len(found[label]) < EACH:
                found[label].append(made[index].transpose(1, 2, 0))
        if len(found) == CLASSES and all(len(images) == EACH for images in found.values()):
            break
    across = min(map(len, found.values()), default=0)
    if across and next(iter(found.values()))[0].shape[-1] in (1, 3):
        labels = sorted(found)
        tiles = np.stack([np.stack(found[label][:across]) for label in labels])
        caption = "Images of one column begin as other noise in each row; each checkpoint and scale has the same noise."
        yield Picture(name, title, caption, tiles, tuple(f"class {label}" for label in labels))
