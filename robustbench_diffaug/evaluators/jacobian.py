"""What a denoiser does to the neighbourhood of a noisy image: its Jacobian, and how near it is to a covariance."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from robustbench_diffaug import paired, stats
from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Options, Outside
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.diffusion import jacobian as linear
from robustbench_diffaug.diffusion.base import Schedule
from robustbench_diffaug.evaluators import gains
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.outcomes import Basis, Deferred, Key, Outcomes, Rows
from robustbench_diffaug.records import Metric, Picture, Records, shared

__all__ = ["Jacobian"]

EXACT = 1024
"""The most numbers of an image whose Jacobian is computed whole."""
SHOWN = 4
"""Images in a picture."""
FAMILIES: Mapping[str, tuple[Literal["higher", "lower"], str]] = {
    "jacobian_trace": ("higher", "directions"),
    "denoising_error": ("lower", "directions"),
    "jacobian_asymmetry": ("lower", "ratio"),
    "jacobian_smallest": ("higher", "eigenvalue"),
    "jacobian_largest": ("lower", "singular value"),
    "effective_rank": ("lower", "directions"),
}
"""Recorded per image and time: which way is better, and in what unit."""


class Jacobian(Evaluator):
    """The Jacobian J = dD(x_t, sigma_t)/dx of denoisers, at one draw x_t = x + sigma_t eps of each image and time.

    For the best denoiser J is Cov[x | x_t] / sigma_t^2 (Theorem 1 of DiffAug): symmetric, no eigenvalue below zero, and
    the mean of its trace is that of the normalised error |x - D|^2 / sigma_t^2. Recorded is how far a network is from
    that, and how many directions survive.

    A denoiser needs `clip: false`. It is fastest with a `microbatch` of about `vectors + oversampling`.

    Arguments:
        times: Of `schedule`, whose noise levels all denoisers are shown.
        schedule: The grid of times; another one of a denoiser's own does not count.
        exact: Whether the whole matrix is computed, for images of at most 1,024 numbers; else all is estimated without.
        vectors: Leading singular values recorded, and with `gallery` singular vectors; of smaller images all.
        oversampling: More vectors of the randomised singular value decomposition, of which nothing is kept.
        iterations: Of it.
        probes: Random signs for traces and Frobenius norms.
        steps: Of block Lanczos, for the smallest eigenvalue of (J + J^T) / 2.
        gallery: Whether left singular vectors are recorded as pictures: for a handful of images.
        gains: Checkpoints and the one each is compared with, over the same images.

    References:
        DiffAug: a diffuse-and-denoise augmentation for training robust classifiers (Sastry, Dumpala and Oore, 2024),
            Theorem 1 and figure 17, https://arxiv.org/abs/2306.09192
    """

    kind: Literal["jacobian"] = "jacobian"
    needs: ClassVar[Literal["classifier", "denoiser"]] = "denoiser"
    unclamped: ClassVar[bool] = True
    heavy: ClassVar[tuple[str, ...]] = ("tiles",)
    times: tuple[NonNegativeInt, ...] = Field((100, 200, 300, 400, 500, 600), min_length=1)
    schedule: Schedule = Schedule()
    exact: bool = False
    vectors: PositiveInt = 15
    oversampling: NonNegativeInt = 10
    iterations: NonNegativeInt = 2
    probes: Annotated[int, Field(ge=2)] = 16
    steps: PositiveInt = 6
    gallery: bool = False
    gains: Annotated[Options, Outside] = ()

    def check(self) -> tuple[str, ...]:
        """Times must be of the schedule, each once."""
        for t in self.times:
            if t >= self.schedule.steps:
                raise ValueError(f"time {t} is outside the schedule, 0 to {self.schedule.steps - 1}")
        if len(set(self.times)) < len(self.times):
            raise ValueError("times names one twice")
        return ()

    def fits(self, datasets: Sequence[Dataset], checkpoints: Sequence[str]) -> None:
        """Whole matrices are for small images, and gains are between checkpoints of the bench."""
        for dataset in datasets if self.exact else ():
            if (count := dataset.first().numel()) > EXACT:
                raise ValueError(
                    f"images of {dataset.name} have {count} numbers, more than the {EXACT} of which a whole Jacobian "
                    "is computed; set exact: false"
                )
        gains.require(self.gains, checkpoints)

    def forwards(self) -> Forwards:
        """Images in each pass, forwards or back: one a product; a whole matrix is as many as images have numbers."""
        products = (2 * (1 + self.iterations) + 2 * self.steps) * (self.vectors + self.oversampling) + 2 * self.probes
        return Forwards(0, len(self.times) * (1 + (EXACT if self.exact else products)))

    def views(self, batch: Batch) -> Iterator[View]:
        """One draw of each image at each time, and its noise level."""
        sigmas = self.schedule.sigmas()
        for t in self.times:
            (noise,) = batch.noise(f"jacobian/t={t}", range(1))
            levels = torch.full((len(batch.ids), 1), float(sigmas[t]), dtype=torch.float64, device=noise.device)
            yield View(f"t={t}", batch.images[:, None] + float(sigmas[t]) * noise, sigma=levels)

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        """The figures of one time, one image at a time, so that none depends on the images beside.

        Raises:
            ValueError: If the denoiser clamps its estimate, or is not differentiable.
        """
        assert view.sigma is not None
        noisy, sigma = view.images[:, 0].double(), float(view.sigma[0, 0])
        found = [
            self._looked(model, _alone(batch, row), noisy[[row]], sigma, view.name) for row in range(len(batch.ids))
        ]
        return {name: torch.cat([columns[name] for columns in found]) for name in found[0]}

    def _looked(
        self, model: Model, batch: Batch, noisy: Float[Tensor, "1 c h w"], sigma: float, time: str
    ) -> dict[str, Tensor]:
        """The figures of the one image of a batch."""
        assert model.denoise is not None
        size = noisy.numel()
        copies = min(model.microbatch, size if self.exact else min(size, self.vectors + self.oversampling))
        try:
            jacobian = linear.Jacobian(model.denoise, noisy, sigma, copies)
        except ValueError as error:
            raise ValueError(f"{model.id}: {error}") from error
        _unclamped(model.id, jacobian.mean)
        columns, spectrum = self._whole(jacobian) if self.exact else self._estimated(jacobian, batch, time)
        clean = batch.images.double()
        columns["denoising_error"] = (clean - jacobian.mean).square().sum(dim=(1, 2, 3)) / sigma**2
        columns |= {"singular_values": spectrum.values, "jacobian_largest": spectrum.values[:, 0]}
        if self.gallery:
            columns["tiles"] = _tiles(clean, noisy, jacobian.mean, spectrum.left)
        return columns

    def _whole(self, jacobian: linear.Jacobian) -> tuple[dict[str, Tensor], linear.Svd]:
        """The figures of matrices that are formed."""
        if jacobian.size > EXACT:
            raise ValueError(f"images have {jacobian.size} numbers, and exact is for at most {EXACT}; set exact: false")
        matrix = linear.exact(jacobian)
        figures = linear.summary(matrix)
        lowest = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[:, 0]
        return _named(figures, lowest), linear.whole_svd(matrix, min(self.vectors, jacobian.size))

    def _estimated(self, jacobian: linear.Jacobian, batch: Batch, time: str) -> tuple[dict[str, Tensor], linear.Svd]:
        """The figures from products with random vectors."""
        count = min(jacobian.size, self.vectors + self.oversampling)
        probes = _drawn(batch, f"jacobian/probes/{time}", self.probes).sign()
        figures = linear.sketch(jacobian, probes)
        begin = _drawn(batch, f"jacobian/lanczos/{time}", count)
        lowest = linear.smallest(jacobian, begin, self.steps)
        begin = _drawn(batch, f"jacobian/svd/{time}", count)
        leading = linear.svd(jacobian, begin, min(self.vectors, jacobian.size), self.iterations)
        return _named(figures, lowest), leading

    def record(self, seen: Mapping[str, Sequence[Columns]], batch: Batch) -> Columns:
        """The figures of all times, in their order."""
        times = [seen[f"t={t}"][0] for t in self.times]
        return {name: torch.stack([columns[name] for columns in times], dim=1) for name in times[0]}

    def metrics(self, records: Records) -> Iterable[Metric]:
        """Means against t, and how far the trace is from the error that it should equal."""
        for group, rows in records.groups():
            clusters, key = rows.clusters(), rows.key("jacobian", group)
            for index, t in enumerate(self.times):
                for name, (better, unit) in FAMILIES.items():
                    estimate = stats.clustered_mean(rows[name][:, index], clusters, key)
                    yield rows.metric(f"{name}@t={t}", group, estimate, better, unit)
                pair = rows["jacobian_trace"][:, index], rows["denoising_error"][:, index]
                gap = paired.paired_difference(*pair, clusters, key, bounded=False)
                yield rows.metric(f"trace_gap@t={t}", group, gap, "lower", "directions")

    def outcomes(self, records: Records) -> Mapping[Key, Basis]:
        """The figures of each image at each time."""
        rows, made = Rows(records), dict[Key, Callable[[], Basis]]()

        def mean(values: Shaped[np.ndarray, " n"], group: str) -> Outcomes:
            return rows.outcomes(values, rows.of(lambda dataset: dataset.group == group), inf)

        for group, _ in records.groups():
            for index, t in enumerate(self.times):
                for name in FAMILIES:
                    made[f"{name}@t={t}", group] = partial(mean, records[name][:, index], group)
                gap = records["jacobian_trace"][:, index] - records["denoising_error"][:, index]
                made[f"trace_gap@t={t}", group] = partial(mean, gap, group)
        return Deferred(made)

    def compare(self, checkpoints: Sequence[str], records: Callable[[str], Records]) -> Iterable[tuple[str, Metric]]:
        """What the checkpoints that `gains` names have more than others, over the same images and noise."""
        return gains.compared(self.gains, records, lambda one, base: _gains(one, base, self.times))

    def pictures(self, records: Records) -> Iterable[Picture]:
        """At each time the left singular vectors of some images, as figure 17 of the paper."""
        if not self.gallery or not len(records):
            return
        tiles = np.concatenate([part["tiles"] for part in _first(records, SHOWN)])[:SHOWN]
        names = tuple(str(name) for name in records["sample"][: len(tiles)])
        for index, t in enumerate(self.times):
            values = records["singular_values"][:, index].mean(axis=0)
            across = ("x", "x_t", "D(x_t)", *(f"{rank}: {value:.2f}" for rank, value in enumerate(values, 1)))
            title = f"Columns of U at t = {t}: what the denoiser keeps of a change of its input"
            caption = (
                "An image, the same diffused, what the denoiser makes of it, and the left singular vectors of its "
                "Jacobian, zero as mid-grey. Above each stand its rank and its singular value, the mean of "
                f"{len(records)} images."
            )
            yield Picture(f"columns-of-u-t{t}", title, caption, tiles[:, index], names, across)


def _named(figures: linear.Sketch, lowest: Tensor) -> dict[str, Tensor]:
    """Figures by the names of their columns."""
    return {
        "jacobian_trace": figures.trace,
        "jacobian_asymmetry": figures.asymmetry,
        "effective_rank": figures.rank,
        "jacobian_smallest": lowest,
    }


def _alone(batch: Batch, row: int) -> Batch:
    """One image of a batch."""
    return replace(batch, ids=batch.ids[row : row + 1], images=batch.images[[row]], labels=batch.labels[[row]])


def _drawn(batch: Batch, stream: str, count: int) -> Float[Tensor, "b p d"]:
    """Normals of each image, as rows."""
    return torch.cat(list(batch.noise(stream, range(count))), dim=1).flatten(2).double()


def _unclamped(id: str, mean: Float[Tensor, "n c h w"]) -> None:
    """Refuses estimates that end exactly where images do: clamping zeroes rows of the Jacobian."""
    inside = bool(((mean >= 0) & (mean <= 1)).all())
    if inside and bool(((mean == 0) | (mean == 1)).any()):
        raise ValueError(f"{id} clamps its estimate to [0, 1], which zeroes rows of its Jacobian; give it clip: false")


def _tiles(
    clean: Float[Tensor, "n c h w"],
    noisy: Float[Tensor, "n c h w"],
    mean: Float[Tensor, "n c h w"],
    left: Float[Tensor, "n k d"],
) -> UInt8[Tensor, "n m h w c"]:
    """Images, and vectors stretched to the whole range with zero in its middle, of 8 bits."""
    scale = left.abs().amax(dim=2, keepdim=True).clamp_min(torch.finfo(left.dtype).tiny)
    columns = (0.5 + left / scale / 2).reshape(len(left), -1, *clean.shape[1:])
    shown = torch.cat([torch.stack([clean, noisy, mean], dim=1), columns], dim=1)
    return (255 * shown.clamp(0, 1)).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


def _first(records: Records, count: int) -> Iterator[Mapping[str, Shaped[np.ndarray, "n ..."]]]:
    """The pictures of the first images, and no more of them than have to be read."""
    for part in records.chunks(["tiles"], size=count):
        yield part
        count -= len(part["tiles"])
        if count <= 0:
            return


def _gains(one: Records, other: Records, times: Sequence[int]) -> Iterator[Metric]:
    """Paired differences over the images that both have seen."""
    if not len(one) or not len(other):
        return
    first, second = shared(one, other)
    bases = dict(other.take(second).groups())
    for group, rows in one.take(first).groups():
        clusters, key = rows.clusters(), rows.key("jacobian/gain", group)
        for index, t in enumerate(times):
            for name, (better, unit) in FAMILIES.items():
                pair = rows[name][:, index], bases[group][name][:, index]
                estimate = paired.paired_difference(*pair, clusters, key, bounded=False)
                yield rows.metric(f"gain/{name}@t={t}", group, estimate, better, unit)
