"""What a denoiser's training step minimises: the error of the predicted noise, and the bound of a learned variance."""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from robustbench_diffaug.diffusion.base import Schedule
from robustbench_diffaug.train.samples import Samples

__all__ = ["bound", "noise_loss", "told_classes"]


def noise_loss(
    network: nn.Module, samples: Samples, schedule: Schedule, *, classes: int | None, drop: float, learned_sigma: bool
) -> dict[str, Tensor]:
    """The weighted terms by name, at a uniformly random time `t` of each image.

    `noise`: E ||eps - eps_theta(x_t, t)||^2 / d with x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps, x in [-1, 1].
    `vlb`, of a learned variance: steps / 1000 times the mean of `bound`, whose gradient leaves the predicted noise
    alone. That is 0.001 of the variational bound: the hybrid loss.

    Arguments:
        network: Called as `network(images, times)`, with `class_labels=` where there are classes; gives `.sample`.
        samples: Images in [0, 1] and labels; the streams are 'time', 'noise' and 'drop'.
        schedule: The noise levels.
        classes: The number K of classes of a network with K + 1 labels, the last for no class; None for none.
        drop: The chance that an image's label is replaced by that of no class, for classifier-free guidance.
        learned_sigma: Whether the network gives two numbers of each pixel, the second the range of the variance.

    Raises:
        ValueError: If the network's outputs are not of that shape.

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), https://arxiv.org/abs/2102.09672
        Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), https://arxiv.org/abs/2207.12598
    """
    times = (samples.uniform("time", 1)[:, 0] * schedule.steps).long()
    noise = samples.normal("noise")
    share = _tables(schedule, samples.images.device).kept[times][:, None, None, None]
    noisy = share.sqrt() * (2 * samples.images - 1) + (1 - share).sqrt() * noise
    told = {} if classes is None else {"class_labels": told_classes(samples, classes, drop)}
    output = network(noisy.contiguous(memory_format=torch.channels_last), times, **told).sample
    channels = noise.shape[1]
    needed = 2 * channels if learned_sigma else channels
    if output.shape[1] != needed:
        kind = "a learned variance" if learned_sigma else "no learned variance"
        raise ValueError(
            f"the network gives {output.shape[1]} channels; images of {channels} with {kind} need {needed}: "
            f"write out_channels: {needed} under unet"
        )
    if not learned_sigma:
        return {"noise": functional.mse_loss(output, noise)}
    predicted, values = output.chunk(2, dim=1)
    bits = bound(predicted.detach(), values, samples.images, noise, times, schedule)
    return {"noise": functional.mse_loss(predicted, noise), "vlb": schedule.steps / 1000 * bits.mean()}


def told_classes(samples: Samples, classes: int, drop: float) -> Int[Tensor, " b"]:
    """What the network is told: the label, or `classes`, which means none, with chance `drop` and for the label -1."""
    dropped = samples.uniform("drop", 1)[:, 0] < drop
    return torch.where(dropped | (samples.labels < 0), classes, samples.labels)


def bound(
    predicted: Float[Tensor, "b c h w"],
    values: Float[Tensor, "b c h w"],
    images: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    times: Int[Tensor, " b"],
    schedule: Schedule,
) -> Float[Tensor, " b"]:
    """The term of the variational bound at each image's time, in bits per pixel and channel.

    `KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))` after time 0, and `-log p(x_0 | x_1)` of 8-bit pixels at time 0. The
    log variance of p is `f log beta_t + (1 - f) log beta~_t` with `f = (value + 1) / 2`, where beta~ is the variance of
    q, at time 0 replaced by that at time 1. The means differ by `c (x_0 - x^_0)`, and
    `x_0 - x^_0 = sqrt(1 / abar_t - 1) (eps_theta - eps)`, so no large numbers are subtracted.

    Arguments:
        predicted: The predicted noise.
        values: The learned range, -1 for the smallest variance and 1 for the largest; not clamped.
        images: In [0, 1].
        noise: The noise that was added.
        times: 0 to steps - 1.
        schedule: The noise levels.

    References:
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), section 3.1,
        https://arxiv.org/abs/2102.09672
    """
    tables = _tables(schedule, images.device)
    gain, ratio, smallest, largest = (
        table[times][:, None, None, None] for table in (tables.gain, tables.ratio, tables.smallest, tables.largest)
    )
    share = (values + 1) / 2
    variance = share * largest + (1 - share) * smallest  # its logarithm
    missed = ratio * (predicted - noise)  # x_0 minus its estimate
    change = smallest - variance
    divergence = (change.expm1() - change + (gain * missed) ** 2 * (-variance).exp()) / 2
    surprise = -_pixel_log_likelihood(2 * images - 1, missed, variance / 2)
    nats = torch.where((times == 0)[:, None, None, None], surprise, divergence)
    return nats.flatten(1).mean(1) / math.log(2)


def _pixel_log_likelihood(signed: Tensor, missed: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of 8-bit pixels, bins of width 2/255 whose outer ones reach to infinity, at least log 1e-12.

    Arguments:
        signed: The pixels in [-1, 1].
        missed: The pixels minus the mean.
        log_scale: Of the standard deviation.
    """
    scale, half = (-log_scale).exp(), 1 / 255
    # The bin is symmetric about the pixel: its mirror image on the left tail, where the CDF keeps its digits.
    left = -missed.abs()
    inside = torch.special.ndtr(scale * (left + half)) - torch.special.ndtr(scale * (left - half))
    below = torch.special.ndtr(scale * (missed + half))
    above = torch.special.ndtr(scale * (half - missed))
    chance = torch.where(signed < -0.999, below, torch.where(signed > 0.999, above, inside))
    return chance.clamp(min=1e-12).log()


class _Tables(NamedTuple):
    """Of each time, float32: abar; the factor of x_0 in q's mean; sqrt(1/abar - 1); log beta~ and log beta."""

    kept: Tensor
    gain: Tensor
    ratio: Tensor
    smallest: Tensor
    largest: Tensor


@lru_cache(maxsize=8)
def _tables(schedule: Schedule, device: torch.device) -> _Tables:
    beta = schedule.beta()
    kept = np.cumprod(1 - beta)
    before = np.concatenate([[1.0], kept[:-1]])
    posterior = beta * (1 - before) / (1 - kept)
    posterior[0] = posterior[1]  # it is 0, whose logarithm is not finite
    gain = beta * np.sqrt(before) / (1 - kept)
    tables = (kept, gain, np.sqrt(1 / kept - 1), np.log(posterior), np.log(beta))
    return _Tables(*(torch.from_numpy(table).float().to(device) for table in tables))
