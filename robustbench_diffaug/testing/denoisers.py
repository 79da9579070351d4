"""What a denoiser promises: increasing levels, and estimates that depend on image, level and class alone."""

import numpy as np
import torch
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.diffusion.base import ConditionalDenoise, Denoise, Denoiser
from robustbench_diffaug.testing.values import check_files, check_value, generators_unmoved

__all__ = ["check_denoiser"]


def check_denoiser(denoiser: Denoiser, shape: tuple[int, int, int] = (1, 8, 8)) -> None:
    """A denoiser's levels increase, and each image is denoised as if it were alone, with its class or without.

    Checked are, besides what every component promises (`check_value`): a fingerprint that depends on what its files
    hold, and not on where they lie; levels that increase and agree with `time`, `sigma` and `level`; `channels` and
    `size` that fit; estimates of the images' shape, finite, in [0, 1] where it clips, the same in another order, alone
    and with more leading axes; no input changed in place, no draw from a global generator; and, where it knows classes,
    all of that with labels, -1 being none of them and others refused.

    Arguments:
        denoiser: Whose files are there.
        shape: Of an image that it takes: channels, height, width.

    Raises:
        AssertionError: With the promise that is broken.
    """
    check_value(denoiser)
    _check_times(denoiser)
    assert denoiser.channels() in (None, shape[0]), f"{denoiser.kind} takes {denoiser.channels()} channels"
    size = denoiser.size()
    assert size is None or shape[1:] == (size, size), (
        f"{denoiser.kind} says that images are {size} pixels high and wide, not {shape[1]} and {shape[2]}"
    )
    sigmas = denoiser.sigmas()
    levels = torch.from_numpy(sigmas[[0, 1, len(sigmas) // 4, len(sigmas) // 2, len(sigmas) - 1]].copy())
    images, noise = (
        torch.from_numpy(rng.normal(rng.key("check", name), range(5), shape)) for name in ("images", "noise")
    )
    noisy = 0.5 + 0.2 * images + levels[:, None, None, None].float() * noise
    denoise, unclipped = (made.loaded(Limits()) for made in (denoiser, denoiser.model_copy(update={"clip": False})))
    told = _told(denoiser)
    with generators_unmoved(denoiser.kind), torch.no_grad():  # not loading, which may initialise before it reads
        _check_estimates(denoiser, denoise, unclipped, noisy, levels)
        if told is not None:
            _check_classes(denoiser, told, noisy, levels)
    check_files(denoiser, lambda moved: moved.load(torch.device("cpu")))


def _check_times(denoiser: Denoiser) -> None:
    """Discrete times have increasing levels and are found by them; so have continuous ones, through the same levels."""
    sigmas = denoiser.sigmas()
    last = len(sigmas) - 1
    assert np.isfinite(sigmas).all() and (np.diff(sigmas) > 0).all() and sigmas[0] > 0, (
        f"the levels of {denoiser.kind} do not increase"
    )
    for t in {1, len(sigmas) // 2, last}:
        assert denoiser.time(denoiser.sigma(t)) == t, f"time and sigma of {denoiser.kind} are not inverse at {t}"
    for t in {0, 1, len(sigmas) // 3, len(sigmas) // 2, last}:
        found, time = denoiser.level((t + 1) / len(sigmas)), (t + 1) / len(sigmas)
        assert found == denoiser.sigma(t), (
            f"level({time:g}) of {denoiser.kind} is {found}, and its sigma({t}), which is the same time, is not"
        )
    # Between the first discrete times, below the first, and from end to end.
    times = np.unique(np.concatenate([np.arange(1, 16) / (4 * len(sigmas)), np.arange(1, 200) / 199]))
    between = np.array([denoiser.level(float(time)) for time in times])
    assert (np.diff(between) > 0).all() and between[0] > 0, f"level of {denoiser.kind} does not increase with time"


def _check_estimates(denoiser: Denoiser, denoise: Denoise, unclipped: Denoise, noisy: Tensor, levels: Tensor) -> None:
    """Each estimate is that of the image alone, of the image's shape, and clamped where it says so."""
    kept = noisy.clone()
    together = denoise(noisy, levels).mean
    assert together.shape == noisy.shape and together.dtype == noisy.dtype, (
        f"{denoiser.kind} gives {tuple(together.shape)}, {together.dtype} for {tuple(noisy.shape)}, {noisy.dtype}"
    )
    assert bool(torch.isfinite(together).all()), f"{denoiser.kind} gives NaN or infinite pixels"
    if denoiser.clip:
        assert float(together.min()) >= 0 and float(together.max()) <= 1, f"{denoiser.kind} does not clip to [0, 1]"
    turned = denoise(noisy.flip(0), levels.flip(0)).mean.flip(0)
    assert torch.equal(turned, together), f"{denoiser.kind} depends on the order of the images"
    for row in range(len(noisy)):
        alone = denoise(noisy[row], float(levels[row])).mean
        assert torch.equal(alone, together[row]), f"{denoiser.kind} depends on the images beside, as at row {row}"
    assert torch.equal(noisy, kept), f"{denoiser.kind} changes its input in place"
    assert torch.equal(unclipped(noisy, levels).mean.clamp(0, 1), together.clamp(0, 1)), (
        f"clip of {denoiser.kind} does more than clamp the estimate to [0, 1]"
    )
    stacked = denoise(noisy[:, None].expand(-1, 2, -1, -1, -1), float(levels[2])).mean
    assert stacked.shape == (len(noisy), 2, *noisy.shape[1:]) and torch.equal(stacked[2, 1], together[2]), (
        f"{denoiser.kind} must take any leading axes, such as (sample, draw, channels, height, width)"
    )


def _told(denoiser: Denoiser) -> ConditionalDenoise | None:
    """The network that is told classes, where it knows some; one that knows none says so."""
    classes = denoiser.classes()
    if classes is not None:
        assert classes > 0, f"{denoiser.kind} has {classes} classes; where it knows none, classes() is None"
        return denoiser.loaded_conditional(Limits())
    try:
        denoiser.load_conditional(torch.device("cpu"))
    except ValueError:
        return None
    raise AssertionError(f"{denoiser.kind} has no classes() and yet load_conditional, which must raise ValueError")


def _check_classes(denoiser: Denoiser, told: ConditionalDenoise, noisy: Tensor, levels: Tensor) -> None:
    """Classes matter, -1 is none of them, and other labels are refused."""
    classes = denoiser.classes() or 0
    none = torch.full((len(noisy),), -1)
    found, expected = told(noisy, levels, none).mean, denoiser.loaded(Limits())(noisy, levels).mean
    assert found.dtype == expected.dtype and torch.equal(found, expected), (
        f"{denoiser.kind} gives another estimate for the label -1 than without classes"
    )
    if classes > 1:
        first, last = (told(noisy, levels, torch.full_like(none, label)).mean for label in (0, classes - 1))
        assert not torch.equal(first, last), f"{denoiser.kind} gives the same estimate for class 0 and {classes - 1}"
    _check_labels(denoiser, told, noisy, levels, torch.tensor([0, -1, classes - 1, -1, classes // 2]))
    for wrong in (classes, -2):
        try:
            told(noisy, levels, torch.tensor([0, wrong, -1, 0, 0]))
        except ValueError:
            continue
        raise AssertionError(
            f"{denoiser.kind} takes the label {wrong}; beyond -1 to {classes - 1} it must raise ValueError "
            "(check_labels does)"
        )


def _check_labels(denoiser: Denoiser, told: ConditionalDenoise, noisy: Tensor, levels: Tensor, labels: Tensor) -> None:
    """With a label of its own each image is denoised as if it were alone."""
    kept = noisy.clone(), labels.clone()
    together = told(noisy, levels, labels).mean
    assert torch.equal(noisy, kept[0]) and torch.equal(labels, kept[1]), (
        f"told classes, {denoiser.kind} changes its input in place"
    )
    assert bool(torch.isfinite(together).all()), f"told classes, {denoiser.kind} gives NaN or infinite pixels"
    inside = float(together.min()) >= 0 and float(together.max()) <= 1
    assert inside or not denoiser.clip, f"told classes, {denoiser.kind} does not clip to [0, 1]"
    for row in range(len(noisy)):
        alone = told(noisy[row], float(levels[row]), labels[row]).mean
        assert torch.equal(alone, together[row]), (
            f"told classes, {denoiser.kind} depends on the images or the labels beside, as at row {row}"
        )
    turned = told(noisy.flip(0), levels.flip(0), labels.flip(0)).mean.flip(0)
    assert torch.equal(turned, together), f"told classes, {denoiser.kind} depends on the order of the images"
    # Two draws of each image with labels of their own: the mixed ones, and the same reversed.
    axes = noisy[:, None].expand(-1, 2, -1, -1, -1), levels[:, None].expand(-1, 2)
    stacked = told(*axes, torch.stack([labels, labels.flip(0)], dim=1)).mean
    assert stacked.shape == axes[0].shape and torch.equal(stacked[:, 0], together), (
        f"told classes, {denoiser.kind} must take any leading axes, such as (sample, draw, channels, height, width)"
    )
    assert torch.equal(stacked[:, 1], told(noisy, levels, labels.flip(0)).mean), (
        f"told classes, {denoiser.kind} gives draws of an image each other's labels"
    )
