"""What DeepAugment does to networks: pure functions `(tensor, key) -> tensor` of weights and of features, by name.

All randomness is `rng`'s, a function of the key. Weights are (out, in, height, width) and biases (out,). Features are
those of one image, (channels, height, width), with the features before the body as the last argument.

References:
    The Many Faces of Robustness: A Critical Analysis of Out-of-Distribution Generalization (Hendrycks et al., 2021),
    https://arxiv.org/abs/2006.16241
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from scipy.special import gammaincinv
from torch import Tensor
from torch.nn import functional

from robustbench_diffaug import rng

__all__ = [
    "Change",
    "Feature",
    "activate",
    "add_neighbours",
    "amplify_bits",
    "binarise",
    "blend",
    "bypass",
    "copy_channels",
    "dirichlet",
    "dirichlet_alike",
    "drop",
    "flip",
    "flip_features",
    "flip_in_space",
    "flip_some_channels",
    "holes",
    "holes_in_space",
    "laplace",
    "largest_tap",
    "minus_gelu",
    "minus_gelu_filters",
    "mirror",
    "mix",
    "negate",
    "negate_features",
    "negate_filters",
    "negate_in_space",
    "negate_some",
    "noise",
    "own_noise",
    "permute_channels",
    "scale",
    "sharpen",
    "shift",
    "shift_channels",
    "signs",
    "signs_or_holes",
    "turn",
    "turn_filters",
    "wave",
    "zero",
    "zero_filters",
]

Change: TypeAlias = Callable[[Tensor, int], Tensor]
"""From a weight (or bias) and a key to the perturbed one."""
Feature: TypeAlias = Callable[[Tensor, int, Tensor], Tensor]
"""From one image's features, a key, and its features before the body, to the distorted ones."""


def _uniform(key: int, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    values = rng.uniform(rng.key(key, name), range(1), shape)[0]
    return torch.as_tensor(values).to(like)


def _whole(key: int, name: str, below: int, count: int = 1) -> list[int]:
    """`count` whole numbers from 0 to `below - 1`, with replacement."""
    return [int(value) for value in rng.uniform(rng.key(key, name), range(1), (count,))[0] * below]


def _rows(tensor: Tensor, key: int, share: float | int) -> list[int]:
    """Some filters, drawn with replacement: so many, or that share of all there are."""
    count = share if isinstance(share, int) else max(1, int(share * len(tensor)))
    return sorted(set(_whole(key, "filters", len(tensor), count)))


# Of weights ---------------------------------------------------------------------------------------------------------


def flip(weight: Tensor, key: int) -> Tensor:
    """The filters in reverse order."""
    return weight.flip(0)


def mirror(weight: Tensor, key: int) -> Tensor:
    """Each filter mirrored along its width."""
    return weight.flip(-1)


def negate(weight: Tensor, key: int) -> Tensor:
    """`-w`."""
    return -weight


def zero(weight: Tensor, key: int) -> Tensor:
    """Zeros."""
    return torch.zeros_like(weight)


def minus_gelu(weight: Tensor, key: int) -> Tensor:
    """`-gelu(w)`."""
    return -functional.gelu(weight)


def laplace(weight: Tensor, key: int) -> Tensor:
    """The taps of 3x3 filters times those of the Laplacian: corners 0, sides 1, middle -4."""
    return weight * weight.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])


def sharpen(weight: Tensor, key: int) -> Tensor:
    """The taps of 3x3 filters times those of the edge detector: middle 8, all others -1."""
    return weight * weight.new_tensor([[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]])


def scale(weight: Tensor, key: int, most: float = 4.0) -> Tensor:
    """`w (1 + most u r)`, with one uniform `u`, and one `r` of each element."""
    strength = _uniform(key, "strength", (), weight)
    return weight * (1 + most * strength * _uniform(key, "element", tuple(weight.shape), weight))


def noise(weight: Tensor, key: int) -> Tensor:
    """`w + r - 1/2`, with a uniform `r` of each element."""
    return weight + _uniform(key, "noise", tuple(weight.shape), weight) - 0.5


def own_noise(weight: Tensor, key: int) -> Tensor:
    """`w + s (2 r - 1)`, with the root of the mean of `w^2` as `s`, and a uniform `r` of each element."""
    return weight + weight.square().mean().sqrt() * (2 * _uniform(key, "noise", tuple(weight.shape), weight) - 1)


def turn(weight: Tensor, key: int) -> Tensor:
    """Filters turned by 90, 180 or 270 degrees; or, one time in two where the weight is square, its channels."""
    quarters = 1 + _whole(key, "quarters", 3)[0]
    channels = _whole(key, "dims", 2)[0] == 1 and weight.shape[0] == weight.shape[1]
    return torch.rot90(weight, quarters, (0, 1) if channels else (2, 3))


def turn_filters(weight: Tensor, key: int) -> Tensor:
    """Filters turned by 90, 180 or 270 degrees."""
    return torch.rot90(weight, 1 + _whole(key, "quarters", 3)[0], (2, 3))


def signs(weight: Tensor, key: int) -> Tensor:
    """Each element negated with chance 1/2."""
    return weight * torch.where(_uniform(key, "mask", tuple(weight.shape), weight) < 0.5, -1.0, 1.0).to(weight)


def holes(weight: Tensor, key: int) -> Tensor:
    """Each element zeroed with chance 1/2."""
    return weight * (_uniform(key, "mask", tuple(weight.shape), weight) < 0.5)


def signs_or_holes(weight: Tensor, key: int) -> Tensor:
    """`signs` or `holes`, with equal chance."""
    return signs(weight, key) if _whole(key, "which", 2)[0] else holes(weight, key)


def negate_filters(weight: Tensor, key: int, share: float | int = 0.5) -> Tensor:
    """Some filters negated; `share` of them (or so many) are drawn, with replacement."""
    factor = torch.ones_like(weight)
    factor[_rows(weight, key, share)] = -1
    return weight * factor


def zero_filters(weight: Tensor, key: int, share: float | int = 25) -> Tensor:
    """Some filters zeroed; `share` of them (or so many) are drawn, with replacement."""
    factor = torch.ones_like(weight)
    factor[_rows(weight, key, share)] = 0
    return weight * factor


def minus_gelu_filters(weight: Tensor, key: int, share: float | int = 25) -> Tensor:
    """`-gelu` of some filters; `share` of them (or so many) are drawn, with replacement."""
    rows, changed = _rows(weight, key, share), weight.clone()
    changed[rows] = -functional.gelu(weight[rows])
    return changed


def largest_tap(weight: Tensor, key: int) -> Tensor:
    """Of each 2-D filter the largest tap alone, zeros elsewhere."""
    flat = weight.flatten(2)
    largest = flat.argmax(2, keepdim=True)
    return torch.zeros_like(flat).scatter(2, largest, flat.gather(2, largest)).view_as(weight)


def _mixed(weight: Tensor, kernel: Tensor) -> Tensor:
    """The filters convolved with (out, in, 3, 3), which mixes what they say of the input channels."""
    return functional.conv2d(weight, kernel, padding=1)


def shift(weight: Tensor, key: int) -> Tensor:
    """The sum over input channels, each shifted by up to one tap and of random sign, in place of every channel."""
    inputs = weight.shape[1]
    taps, negative = _whole(key, "tap", 9, inputs), _whole(key, "sign", 2, inputs)
    kernel = weight.new_zeros(inputs, inputs, 9)
    for channel in range(inputs):
        kernel[:, channel, taps[channel]] = 1 - 2 * negative[channel]
    return _mixed(weight, kernel.view(inputs, inputs, 3, 3))


def mix(weight: Tensor, key: int) -> Tensor:
    """Filters convolved with `(2 u r - 1) / 6`, with one uniform `u`, and one `r` of each element."""
    shape = (weight.shape[1], weight.shape[1], 3, 3)
    strength = _uniform(key, "strength", (), weight)
    return _mixed(weight, (2 * strength * _uniform(key, "element", shape, weight) - 1) / 6)


def dirichlet(weight: Tensor, key: int, concentration: float = 0.1) -> Tensor:
    """Filters convolved with kernels whose nine taps are Dirichlet(concentration) for each pair of channels."""
    chance = rng.uniform(rng.key(key, "dirichlet"), range(1), (weight.shape[1], weight.shape[1], 9))[0]
    # Gamma variates by the inverse of their distribution; below the floor all nine could vanish together.
    gamma = np.maximum(gammaincinv(concentration, chance), 1e-300)
    kernel = torch.from_numpy(gamma / gamma.sum(2, keepdims=True)).to(weight)
    return _mixed(weight, kernel.view(*kernel.shape[:2], 3, 3))


def dirichlet_alike(weight: Tensor, key: int) -> Tensor:
    """`dirichlet`, scaled to the norm that the weight had."""
    mixed = dirichlet(weight, key)
    ratio: Tensor = weight.norm() / mixed.norm().clamp(min=1e-12)
    return mixed * ratio


# Of features --------------------------------------------------------------------------------------------------------


def copy_channels(features: Tensor, key: int, start: Tensor) -> Tensor:
    """Five times (of 64 channels, less often of fewer), a channel takes the place of another."""
    changed, count = features.clone(), len(features)
    times = max(1, round(count * 5 / 64))
    for kept, lost in zip(_whole(key, "kept", count, times), _whole(key, "lost", count, times), strict=True):
        changed[lost] = changed[kept]
    return changed


def drop(features: Tensor, key: int, start: Tensor) -> Tensor:
    """Each element zeroed with chance 0.05."""
    return features * (_uniform(key, "mask", tuple(features.shape), features) > 0.05)


def negate_some(features: Tensor, key: int, start: Tensor) -> Tensor:
    """Each element negated with chance 0.025."""
    return torch.where(_uniform(key, "mask", tuple(features.shape), features) > 0.025, features, -features)


def negate_features(features: Tensor, key: int, start: Tensor) -> Tensor:
    """`-h`."""
    return -features


def activate(features: Tensor, key: int, start: Tensor) -> Tensor:
    """`relu(h)` one time in three, else `gelu(h)`."""
    function = functional.relu if _whole(key, "which", 3)[0] == 1 else functional.gelu
    activated: Tensor = function(features)
    return activated


def flip_features(features: Tensor, key: int, start: Tensor) -> Tensor:
    """The channels in reverse order, and the image upside down one time in three, else mirrored."""
    return features.flip((0, 1) if _whole(key, "which", 3)[0] == 1 else (0, 2))


def wave(features: Tensor, key: int, start: Tensor) -> Tensor:
    """`sin(h)`."""
    return features.sin()


def bypass(features: Tensor, key: int, start: Tensor) -> Tensor:
    """The features before the body, so that its blocks are left out."""
    return start


def holes_in_space(features: Tensor, key: int, start: Tensor) -> Tensor:
    """Each position zeroed in all channels with chance 0.2."""
    return features * (_uniform(key, "mask", tuple(features.shape[1:]), features) > 0.2)


def negate_in_space(features: Tensor, key: int, start: Tensor) -> Tensor:
    """Each position negated in all channels with chance 0.1."""
    return torch.where(_uniform(key, "mask", tuple(features.shape[1:]), features) > 0.1, features, -features)


def permute_channels(features: Tensor, key: int, start: Tensor) -> Tensor:
    """The first ten channels in a random order."""
    order = rng.permutation(rng.key(key, "order"), min(10, len(features)))
    return torch.cat([features[torch.from_numpy(order)], features[10:]])


def flip_some_channels(features: Tensor, key: int, start: Tensor) -> Tensor:
    """Five times, a channel is flipped along its height, its width or both, the same in all."""
    dims = [(0,), (1,), (0, 1)][_whole(key, "dims", 3)[0]]
    changed = features.clone()
    for channel in _whole(key, "channels", len(features), 5):
        changed[channel] = changed[channel].flip(dims)
    return changed


def flip_in_space(features: Tensor, key: int, start: Tensor) -> Tensor:
    """All channels flipped along their height, their width or both."""
    return features.flip([(1,), (2,), (1, 2)][_whole(key, "dims", 3)[0]])


def _filtered(features: Tensor, kernel: Tensor) -> Tensor:
    """The features convolved with the identity plus a kernel (out, in, 3, 3)."""
    return features + functional.conv2d(features[None], kernel, padding=1)[0]


def blend(features: Tensor, key: int, start: Tensor) -> Tensor:
    """Convolved with the identity plus uniform noise on (-0.1, 0.1), between all channels."""
    shape = (len(features), len(features), 3, 3)
    return _filtered(features, (_uniform(key, "kernel", shape, features) - 0.5) * 0.2)


def add_neighbours(features: Tensor, key: int, start: Tensor) -> Tensor:
    """To one channel in two, another is added, shifted by up to one position."""
    count = len(features)
    others, taps = _whole(key, "other", count, count), _whole(key, "tap", 9, count)
    kernel = features.new_zeros(count, count, 9)
    for channel, chosen in enumerate(_whole(key, "chosen", 2, count)):
        kernel[channel, others[channel], taps[channel]] = chosen
    return _filtered(features, kernel.view(count, count, 3, 3))


def shift_channels(features: Tensor, key: int, start: Tensor) -> Tensor:
    """Each channel shifted by up to one position; the next is shifted like it four times in five."""
    count = len(features)
    kernel = features.new_zeros(count, 1, 9)
    taps, anew, tap = _whole(key, "tap", 9, count), _whole(key, "anew", 5, count), _whole(key, "first", 9)[0]
    for channel in range(count):
        tap = taps[channel] if anew[channel] == 0 else tap
        kernel[channel, 0, tap] = 1
    return functional.conv2d(features[None], kernel.view(count, 1, 3, 3), padding=1, groups=count)[0]


def binarise(features: Tensor, key: int, start: Tensor) -> Tensor:
    """`+1` with chance `(1 + h) / 2`, else `-1`."""
    high = _uniform(key, "bits", tuple(features.shape), features) <= (1 + features) / 2
    return torch.where(high, 1.0, -1.0).to(features)


def amplify_bits(features: Tensor, key: int, start: Tensor) -> Tensor:
    """Bits `b = (h + 1) / 2` as `b (3 + 4 u r)`, with one uniform `u`, and one `r` of each element."""
    strength = _uniform(key, "strength", (), features)
    factor = 3 + 4 * strength * _uniform(key, "element", tuple(features.shape), features)
    return (features + 1) * factor - 1
