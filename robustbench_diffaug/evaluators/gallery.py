"""Galleries of a denoiser: what it makes of a few images, as the paper's figures show it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Outside
from robustbench_diffaug.diffusion.adaptation import Adaptation, Chain, adapt
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Schedule, Sigma
from robustbench_diffaug.diffusion.samplers import ddim, dpm_solver_2
from robustbench_diffaug.diffusion.toy import Toy
from robustbench_diffaug.evaluators import gallery_pictures
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.records import Metric, Picture, Records
from robustbench_diffaug.stats import clustered_mean

__all__ = ["Gallery"]

Panel = Literal["times", "solvers", "mixing", "adaptation", "toy"]


class Gallery(Evaluator):
    """What a denoiser makes of a few images, drawn, and the root mean square of what it changes.

    Panel `times` shows D(x0 + sigma(t) eps, sigma(t)) at each t (the paper's Fig. 1), `solvers` one reverse step with
    DDIM and with DPM-Solver-2 from one noisy image (Fig. 9), `mixing` the share lambda of the class-conditional score
    (Fig. 14), `adaptation` the steps of diffusion-driven adaptation, and `toy` points in the plane under their exact
    score (Figs. 5 and 6), which depend on no denoiser. Noise levels are those of `schedule`, so that all denoisers of a
    bench see the same noisy images; estimates are clamped to [0, 1] before they are shown or compared.

    Arguments:
        panels: Which are made.
        schedule: The noise level of each time.
        times: Of panel `times`.
        solver_time: Of panel `solvers`; DPM-Solver-2 is the published one where the denoiser has clip: false.
        mixing: The shares lambda of panel `mixing`; beyond 1 is classifier-free guidance.
        mixing_time: The time of panel `mixing`.
        conditional: The class-conditional denoiser of panel `mixing`; the class is the image's own label.
        dda: The settings of panel `adaptation`.
        steps: How many steps of the adaptation are shown.
        toy: The settings of panel `toy`.
        shown: The most samples of a dataset that pictures show.

    References:
        DiffAug: A Diffuse-and-Denoise Augmentation for Training Robust Classifiers (Sastry et al., NeurIPS 2024),
        https://arxiv.org/abs/2306.09192
        Back to the Source: Diffusion-Driven Test-Time Adaptation (Gao et al., CVPR 2023),
        https://arxiv.org/abs/2207.03442
    """

    kind: Literal["gallery"] = "gallery"
    needs: ClassVar[Literal["classifier", "denoiser"]] = "denoiser"
    panels: Annotated[tuple[Panel, ...], Field(min_length=1)] = ("times", "solvers", "toy")
    schedule: Schedule = Schedule()
    times: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (350, 400, 450, 500, 550, 600, 650, 700)
    solver_time: PositiveInt = 500
    mixing: Annotated[tuple[float, ...], Field(min_length=1)] = (0.0, 0.25, 0.5, 0.75, 1.0)
    mixing_time: NonNegativeInt = 600
    conditional: Denoiser | None = None
    dda: Adaptation = Adaptation()
    steps: Annotated[int, Field(ge=1, le=100)] = 7
    toy: Toy = Toy()
    shown: Annotated[PositiveInt, Outside] = 4

    @model_validator(mode="after")
    def _whole(self) -> "Gallery":
        if len(set(self.panels)) < len(self.panels):
            raise ValueError("panels names one twice; leave one of them out")
        for name in ("times", "mixing"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name} must increase, without repetition")
        named = {"times": max(self.times), "solver_time": self.solver_time, "mixing_time": self.mixing_time}
        for name, time in named.items():
            if time >= self.schedule.steps:
                last = self.schedule.steps - 1
                raise ValueError(f"{name} has {time}, and the schedule has the times 0 to {last}; give an earlier one")
        if "mixing" in self.panels and self.conditional is None:
            raise ValueError("panel mixing needs a class-conditional denoiser; give conditional")
        return self

    def check(self) -> tuple[str, ...]:
        """The denoiser of panel `mixing` must know classes, and the chain of the adaptation must fit the schedule."""
        if "mixing" in self.panels and self.conditional is not None and self.conditional.classes() is None:
            raise ValueError("panel mixing needs a class-conditional denoiser, and conditional is not one")
        if "adaptation" in self.panels:
            self._chain()
        return ()

    def denoisers(self) -> tuple[Denoiser, ...]:
        """That of panel `mixing`; the others are of the checkpoint."""
        return (self.conditional,) if "mixing" in self.panels and self.conditional is not None else ()

    def forwards(self) -> Forwards:
        """The denoisings of the mixed scores, and the checkpoint's own; at least one, as of every evaluator."""
        steps = self.dda.N if "adaptation" in self.panels else 0
        own = {"times": len(self.times), "solvers": 3, "adaptation": steps}
        mixed = sum(1 if share in (0, 1) else 2 for share in self.mixing) if "mixing" in self.panels else 0
        return Forwards(mixed, max(1, sum(own.get(panel, 0) for panel in self.panels)), own_backward=steps)

    def views(self, batch: Batch) -> Iterator[View]:
        """The images; their noisy versions of each panel; and those that the mixed scores denoise."""
        yield View("clean", batch.images[:, None])
        if "times" in self.panels:
            yield self._noisy(batch, "times", self.times)
        if "solvers" in self.panels:
            yield self._noisy(batch, "solvers", (self.solver_time,))
        if "mixing" in self.panels:
            yield self._mixed(batch)

    def _sigma(self, t: int) -> float:
        return float(self.schedule.sigmas()[t])

    def _noisy(self, batch: Batch, name: str, times: Sequence[int]) -> View:
        """Images diffused to some times; one time has the same noise in all panels."""
        levels = torch.tensor([self._sigma(t) for t in times], dtype=torch.float64, device=batch.images.device)
        noise = [draws for t in times for draws in batch.noise(f"gallery/t={t}", range(1))]
        scaled = [self._sigma(t) * draws for t, draws in zip(times, noise, strict=True)]
        images = batch.images[:, None] + torch.cat(scaled, dim=1)
        return View(name, images, sigma=levels.expand(len(batch.ids), -1))

    def _mixed(self, batch: Batch) -> View:
        """The noisy images of panel `mixing`, and what each mixture of scores makes of them."""
        assert self.conditional is not None
        if any(self.mixing) and bool((batch.labels < 0).any()):
            raise ValueError(f"{batch.dataset} has images without a label (-1), and panel mixing needs one of each")
        noisy, sigma = self._noisy(batch, "mixing", (self.mixing_time,)).images[:, 0], self._sigma(self.mixing_time)
        means = [
            self.conditional.loaded_mixed(batch.limits, share)(noisy, sigma, batch.labels).mean for share in self.mixing
        ]
        return View("mixing", torch.stack([_unit(noisy, sigma), *means], dim=1))

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        """Of each panel its tiles, uint8, and the root mean square of their difference to the image."""
        if model.denoise is None:
            raise ValueError(f"{model.id} is a classifier, and a gallery is of a denoiser")
        denoise, images = _clamped(model.denoise), view.images
        if view.name == "clean":
            adapted = self._adapted(denoise, batch, model.microbatch) if "adaptation" in self.panels else {}
            return {"clean": _tiles(images[:, 0]), **adapted}
        if view.name == "mixing":
            return {"mixing": _tiles(images), "mixing_rms": _rms(images[:, 1:], batch.images)}
        assert view.sigma is not None
        if view.name == "times":
            means = denoise(images, view.sigma).mean
            both = torch.stack([_unit(images, view.sigma), means], dim=1)
            return {"times": _tiles(both), "times_rms": _rms(means, batch.images)}
        made = [
            ddim(denoise, images, view.sigma),
            dpm_solver_2(model.denoise, images, view.sigma, self._sigma(0)).clamp(0, 1),
        ]
        steps = torch.cat(made, dim=1)
        shown = torch.cat([_unit(images, view.sigma), steps], dim=1)
        return {"solvers": _tiles(shown), "solvers_rms": _rms(steps, batch.images)}

    def _chain(self) -> Chain:
        return Chain.of(self.schedule.sigmas(), self.dda.respacing)

    def _at(self) -> list[int]:
        """The steps of the adaptation that are shown, from the first to the last."""
        return sorted({round(step) for step in np.linspace(0, self.dda.N - 1, self.steps).tolist()}, reverse=True)

    def _adapted(self, denoise: Denoise, batch: Batch, group: int) -> Columns:
        """The state and the estimate of the clean image at some steps of the adaptation, and what comes of it."""
        chain, parts = self._chain(), dict[float, list[tuple[Tensor, Tensor]]]()

        def watched(noisy: Float[Tensor, "*n c h w"], sigma: Sigma) -> Posterior:
            found = denoise(noisy, sigma)
            level = float(torch.as_tensor(sigma, dtype=torch.float64))
            parts.setdefault(level, []).append((_unit(noisy.detach(), level), found.mean.detach()))
            return found

        def noise_of(step: int) -> Float[Tensor, "b c h w"]:
            (noise,) = batch.noise("gallery/dda", range(step, step + 1))
            return noise[:, 0]

        adapted = adapt(watched, batch.images, noise_of, self.dda, chain, group)
        levels = [float(chain.sigma[step]) for step in self._at()]
        states, means = (
            torch.stack([torch.cat([part[which] for part in parts[level]]) for level in levels], dim=1)
            for which in (0, 1)
        )
        ends = torch.stack([batch.images, adapted], dim=1)
        return {
            "adaptation": _tiles(torch.stack([states, means], dim=1)),
            "adapted": _tiles(ends),
            "adaptation_rms": _rms(adapted, batch.images),
        }

    def record(self, seen: Mapping[str, Sequence[Columns]], batch: Batch) -> Columns:
        """All columns, and the points of each sample in the plane: as they are, noisy and denoised."""
        columns = {name: column for views in seen.values() for view in views for name, column in view.items()}
        if "toy" in self.panels:
            drawn = [self.toy.drawn(batch.seed, batch.dataset, id) for id in batch.ids]
            columns["toy"] = torch.from_numpy(np.stack([np.stack(points, axis=1) for points in drawn]))
        return columns

    def metrics(self, records: Records) -> Iterable[Metric]:
        """Root mean square differences to the image, by group; of the toy, distances to the curve of its data."""
        for group, rows in records.groups():
            for name, values, unit in self._figures(rows):
                estimate = clustered_mean(values, rows.clusters(), rows.key(name))
                yield rows.metric(name, group, estimate, better="lower", unit=unit)

    def _figures(self, records: Records) -> Iterator[tuple[str, Float64[np.ndarray, " n"], str]]:
        """Name, value of each sample, and unit."""
        names = {
            "times": [f"denoised-rms@t={t}" for t in self.times],
            "solvers": [f"{solver}-rms@t={self.solver_time}" for solver in ("ddim", "dpm-solver-2")],
            "mixing": [f"mixed-rms@lambda={share:g}" for share in self.mixing],
            "adaptation": ["adapted-rms"],
        }
        for panel in (panel for panel in self.panels if panel in names):
            values = records[f"{panel}_rms"].reshape(len(records), -1)
            yield from ((name, column, "rms of pixels") for name, column in zip(names[panel], values.T, strict=True))
        if "toy" in self.panels:
            distances = self.toy.distance(records["toy"]).mean(axis=1)
            kinds = ("clean", "noisy", "denoised")
            yield from ((f"toy-distance/{kind}", distances[:, at], "radii") for at, kind in enumerate(kinds))

    def pictures(self, records: Records) -> Iterable[Picture]:
        """A grid of each panel, and drawings of the toy."""
        if not len(records):
            return
        labels = gallery_pictures.Labels(self.times, self.solver_time, self.mixing, self.mixing_time, tuple(self._at()))
        for panel in self.panels:
            yield from gallery_pictures.DRAWN[panel](records, labels, self.shown) if panel != "toy" else ()
        if "toy" in self.panels:
            yield from gallery_pictures.toy(records, self.toy)


def _clamped(denoise: Denoise) -> Denoise:
    """A denoiser whose estimates are in [0, 1], as published, whether it clamps itself or not."""

    def clamped(noisy: Float[Tensor, "*n c h w"], sigma: Sigma) -> Posterior:
        found = denoise(noisy, sigma)
        return Posterior(found.mean.clamp(0, 1), found.spread)

    return clamped


def _unit(noisy: Float[Tensor, "*n c h w"], sigma: Sigma) -> Float[Tensor, "*n c h w"]:
    """A noisy image to look at: as a diffusion model sees it, of unit variance, from -2 to 2 around mid-grey."""
    level = torch.as_tensor(sigma, dtype=torch.float64, device=noisy.device)[..., None, None, None]
    return 0.5 + (2 * noisy - 1) / (4 * (1 + 4 * level**2).sqrt()).to(noisy.dtype)


def _tiles(images: Float[Tensor, "*n c h w"]) -> UInt8[Tensor, "*n h w c"]:
    """Images as pictures of 8 bits; what is beyond [0, 1] is cut."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1)


def _rms(made: Float[Tensor, "b *n c h w"], images: Float[Tensor, "b c h w"]) -> Float64[Tensor, "b *n"]:
    """The root mean square difference of pixels to the images."""
    reference = images.double().reshape(len(images), *[1] * (made.ndim - images.ndim), *images.shape[1:])
    return (made.double().clamp(0, 1) - reference).square().mean(dim=(-3, -2, -1)).sqrt()
