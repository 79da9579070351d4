"""Denoisers `D(x, sigma) = E[x0 | x0 + sigma eps = x]`, and the schedules of discrete diffusion models."""

from abc import ABC, abstractmethod
from functools import lru_cache
from types import FunctionType
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from robustbench_diffaug.batch import Limits
from robustbench_diffaug.component import Component, Value, fingerprint

__all__ = ["ConditionalDenoise", "Denoise", "Denoiser", "Posterior", "Schedule", "Sigma", "check_labels", "mixed"]

Sigma = float | Float[Tensor, "*n"]
"""A noise level in [0, 1] pixel units: one for all images, or one of each image."""


class Posterior(NamedTuple):
    """What a denoiser knows of the clean image.

    Arguments:
        mean: E[x0 | x], in [0, 1] where the denoiser clips.
        spread: The learned variance of one reverse step, where the network has one.
    """

    mean: Float[Tensor, "*n c h w"]
    spread: Float[Tensor, "*n c h w"] | None = None


@runtime_checkable
class Denoise(Protocol):
    """A loaded denoiser: variance exploding, differentiable in `noisy`."""

    def __call__(self, noisy: Float[Tensor, "*n c h w"], sigma: Sigma) -> Posterior:
        """The posterior of the clean image given `noisy = x0 + sigma * eps`."""
        ...


@runtime_checkable
class ConditionalDenoise(Protocol):
    """A loaded denoiser that knows classes: as `Denoise`, and a label of each image, -1 for no class."""

    def __call__(self, noisy: Float[Tensor, "*n c h w"], sigma: Sigma, labels: Int[Tensor, "*n"]) -> Posterior:
        """The posterior of the clean image given `noisy = x0 + sigma * eps` and its class."""
        ...


def check_labels(labels: Int[Tensor, "*n"], classes: int) -> None:
    """Labels are -1, for none, or one of the classes; `load_conditional`'s denoisers call it.

    Raises:
        ValueError: If one is not.
    """
    if labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < classes:
        ends = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels go from {ends}, the denoiser has the classes 0 to {classes - 1}, and -1 for none")


def mixed(
    denoise: Denoise | None, conditional: ConditionalDenoise, mixing: float, clip: bool = False
) -> ConditionalDenoise:
    """The denoiser of the mixed score `s = (1 - mixing) s(x) + mixing s(x | y)`.

    `D(x) = x + sigma^2 s(x)` is affine in the score, so `D = (1 - mixing) D(x) + mixing D(x | y)`: the unconditional
    denoiser at 0, the conditional one at 1, classifier-free guidance of scale `mixing` beyond. At 0 and 1 one network
    is called, else two. The learned variance is that of the conditional network, or at 0 the unconditional one's.

    Arguments:
        denoise: `D(x)`; None takes `conditional` with the label -1.
        conditional: `D(x | y)`. Beyond 1 both should be unclamped, since clamping first is another mix.
        mixing: The share of the conditional score, any number.
        clip: Whether the mixed estimate is clamped to [0, 1].

    References:
        Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), https://arxiv.org/abs/2207.12598
    """

    def plain(noisy: Float[Tensor, "*n c h w"], sigma: Sigma) -> Posterior:
        if denoise is not None:
            return denoise(noisy, sigma)
        none = torch.full(noisy.shape[:-3], -1, dtype=torch.long, device=noisy.device)
        return conditional(noisy, sigma, none)

    def denoise_mixed(noisy: Float[Tensor, "*n c h w"], sigma: Sigma, labels: Int[Tensor, "*n"]) -> Posterior:
        found = plain(noisy, sigma) if mixing == 0 else conditional(noisy, sigma, labels)
        mean = found.mean
        if mixing not in (0, 1):
            mean = (1 - mixing) * plain(noisy, sigma).mean + mixing * mean
        return Posterior(mean.clamp(0, 1) if clip else mean, found.spread)

    return denoise_mixed


class Schedule(Value):
    """The noise levels of a discrete diffusion model, as VE-equivalent sigma in [0, 1] pixel units.

    `sigma(t) = sqrt((1 - abar_t) / abar_t) / 2`: the model sees images in [-1, 1], hence the half.

    Arguments:
        betas: 'linear' (1e-4 to 0.02 over 1,000 steps, scaled to another number of them) or 'cosine'.
        steps: The number of times, `t = 0 .. steps - 1`.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), https://arxiv.org/abs/2102.09672
    """

    betas: Literal["linear", "cosine"] = "linear"
    steps: Annotated[int, Field(ge=25, le=100_000)] = 1000

    def beta(self) -> Float[np.ndarray, " t"]:
        """The variance added in each step, float64."""
        if self.betas == "linear":
            scale = 1000 / self.steps
            return np.linspace(scale * 1e-4, scale * 0.02, self.steps)
        edges = np.cos((np.arange(self.steps + 1) / self.steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas: np.ndarray = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
        return betas

    def sigmas(self) -> Float[np.ndarray, " t"]:
        """The noise level of each time, float64, increasing."""
        return _sigmas(self)


@lru_cache(maxsize=64)
def _sigmas(schedule: Schedule) -> Float[np.ndarray, " t"]:
    kept = np.cumprod(1 - schedule.beta())
    sigmas: np.ndarray = np.sqrt((1 - kept) / kept) / 2
    sigmas.setflags(write=False)
    return sigmas


class Denoiser(Component, ABC):
    """A denoiser with a grid of times.

    Arguments:
        precision: Of the network's arithmetic.
        clip: Whether the estimate is clamped to [0, 1], as published; off for Jacobians, whose rows clamping zeroes.
        microbatch: The number of images in every call of the network, part of the identity (see `fixed_shape`).
    """

    family: ClassVar[str] = "robustbench_diffaug.denoisers"
    precision: Literal["float64", "float32", "bfloat16"] = "float32"
    clip: bool = True
    microbatch: Annotated[int, Field(ge=1)] = 128

    @abstractmethod
    def sigmas(self) -> Float[np.ndarray, " t"]:
        """The noise level of each time in [0, 1] units, increasing; needs no weights."""

    def check(self) -> None:
        """Looks at the files without loading the network. Default: `contents`, which must not fail.

        Raises:
            ValueError: As `load`.
        """
        self.contents()

    @abstractmethod
    def load(self, device: torch.device) -> Denoise:
        """The network.

        Raises:
            ValueError: If its files are missing or damaged.
        """

    def channels(self) -> int | None:
        """The number of image channels, where it is bound to one; needs no weights. Default: any."""
        return None

    def size(self) -> int | None:
        """Height and width of the images, where it is made for one size; needs no weights. Default: any."""
        return None

    def classes(self) -> int | None:
        """The number of classes that it can be told; needs no weights. Default: it is not class-conditional."""
        return None

    def unconditional(self) -> bool:
        """Whether `load` gives a denoiser, one that needs no class; needs no weights. Default: it does."""
        return True

    def learned_variance(self) -> bool | None:
        """Whether the network has a learned variance; needs no weights. Default: None, only a call would tell."""
        return None

    def load_conditional(self, device: torch.device) -> ConditionalDenoise:
        """The network that is told the class. Default: there is none.

        Raises:
            ValueError: If it is not class-conditional, or its files are missing or damaged.
        """
        raise ValueError(
            f"the denoiser {self.kind} knows no classes; give a class-conditional one, such as a unet whose "
            "config.json has num_class_embeds"
        )

    @final
    def sigma(self, t: int) -> float:
        """The noise level of time `t`, which must be one of the schedule's."""
        sigmas = self.sigmas()
        if not 0 <= t < len(sigmas):
            raise ValueError(f"time {t} is outside the schedule, 0 to {len(sigmas) - 1}")
        return float(sigmas[t])

    @final
    def time(self, sigma: float) -> int:
        """The smallest `t >= 1` with `sigma(t) >= sigma`: the rule of diffusion denoised smoothing.

        Raises:
            ValueError: If the schedule ends below `sigma`.

        References:
            (Certified!!) Adversarial Robustness for Free! (Carlini et al., 2022), https://arxiv.org/abs/2206.10550
        """
        sigmas = self.sigmas()
        t = max(1, int(np.searchsorted(sigmas, sigma)))
        if t >= len(sigmas):
            raise ValueError(f"sigma {sigma:g} is beyond the schedule, which ends at {sigmas[-1]:.4g}")
        return t

    @final
    def level(self, time: float) -> float:
        """The noise level of a continuous time, between those of the discrete times `t_i = (i + 1) / N`.

        `log alpha = -log(1 + (2 sigma)^2) / 2` is linear in t between them, and below `t_0` goes to 0 at time 0.
        `level(1e-3)`, the usual end of solvers, is `sigma(0)` of a schedule with 1,000 steps. The authors' cut of times
        whose log signal-to-noise ratio is below -5.1 is not made.

        Arguments:
            time: In (0, 1].

        Raises:
            ValueError: If it is not.

        References:
            DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling (Lu et al., 2022), section 3.4,
            https://arxiv.org/abs/2206.00927
        """
        if not 0 < time <= 1:
            raise ValueError(f"time {time:g} is outside (0, 1]; the last time of the schedule is 1, its first 1/steps")
        sigmas = self.sigmas()
        position = time * len(sigmas)
        if abs(position - round(position)) < 1e-9 and position > 0.5:
            return float(sigmas[round(position) - 1])  # discrete times keep their levels to the bit
        doubled_log_alpha = np.concatenate([[0.0], -np.log1p(4 * sigmas**2)])
        found = np.interp(position, np.arange(len(sigmas) + 1), doubled_log_alpha)
        return float(np.sqrt(np.expm1(-found)) / 2)

    @final
    def loaded(self, limits: Limits) -> Denoise:
        """What `load` gives, loaded once per process and device, its networks compiled if that is asked."""
        return _loaded(self, fingerprint(self), limits.device, limits.compile)

    @final
    def loaded_conditional(self, limits: Limits) -> ConditionalDenoise:
        """What `load_conditional` gives, loaded once per process and device, its networks compiled if that is asked."""
        return _loaded_conditional(self, fingerprint(self), limits.device, limits.compile)

    @final
    def loaded_mixed(self, limits: Limits, mixing: float) -> ConditionalDenoise:
        """`mixed` of this one denoiser's two estimates, both unclamped, the mix clamped where `clip` says so.

        At 0 any denoiser will do, and labels are ignored.

        Raises:
            ValueError: If it is not class-conditional and `mixing` is not 0.
        """
        if mixing == 0:
            denoise = self.loaded(limits)
            return lambda noisy, sigma, labels: denoise(noisy, sigma)
        if mixing == 1:
            return self.loaded_conditional(limits)
        plain = self.model_copy(update={"clip": False})
        return mixed(None, plain.loaded_conditional(limits), mixing, self.clip)


@lru_cache(maxsize=8)
def _loaded(
    denoiser: Denoiser,
    identity: str,  # so that changed files are loaded anew
    device: str,
    compiled: bool,
) -> Denoise:
    denoise = denoiser.load(torch.device(device))
    if compiled:
        _compile(denoise)
    return denoise


@lru_cache(maxsize=8)
def _loaded_conditional(denoiser: Denoiser, identity: str, device: str, compiled: bool) -> ConditionalDenoise:
    denoise = denoiser.load_conditional(torch.device(device))
    if compiled:
        _compile(denoise)
    return denoise


def _compile(denoise: object) -> None:
    """Compiles the networks that a loaded denoiser holds, in the closures of its functions or as its attributes.

    The function as a whole cannot be: it is called with any number of images, its network in one shape.
    """
    seen, waiting = set(), [denoise]
    while waiting:
        held = waiting.pop()
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, nn.Module):
            held.compile(dynamic=False)
        elif isinstance(held, FunctionType):
            waiting += [cell.cell_contents for cell in held.__closure__ or ()]
        elif held is denoise:
            waiting += vars(held).values()
