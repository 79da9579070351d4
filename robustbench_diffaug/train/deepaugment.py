"""DeepAugment: images that have passed through an image-to-image network with randomly perturbed weights."""

from collections.abc import Mapping
from functools import lru_cache, partial
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.component import Options, Value
from robustbench_diffaug.files import Weights
from robustbench_diffaug.state import load_state
from robustbench_diffaug.train import distortions as change
from robustbench_diffaug.train.image_networks import Distort, build_image_network

__all__ = ["FAMILIES", "DeepAugment", "Family", "ImageNetwork", "Perturbation", "deepaugment", "distort", "perturbed"]


class Perturbation(NamedTuple):
    """What one option does to the weights of a network.

    Arguments:
        first: To the only, or the first, convolution of a block.
        second: To the second one.
        blocks: Of how many blocks, drawn with replacement.
        among: The range of blocks that are drawn from, as shares of all.
        bias: Whether the biases are changed like the weights.
        either: Whether `first` is done to one of the block's convolutions, drawn each time.
    """

    first: change.Change | None = None
    second: change.Change | None = None
    blocks: int = 1
    among: tuple[float, float] = (0, 10 / 16)
    bias: bool = False
    either: bool = False


Step: TypeAlias = tuple[str, change.Feature]


class Family(NamedTuple):
    """How the networks of one architecture are perturbed.

    Arguments:
        perturbations: Of the weights, by name.
        drawn: How many of them are applied together, all different.
        groups: Of distortions of features, each a place and a function; of each group one is drawn for each image.
    """

    perturbations: Mapping[str, Perturbation]
    drawn: int
    groups: tuple[tuple[Step | None, ...], ...]


_ALL, _NEARLY_ALL = (0.0, 1.0), (0.0, 15 / 16)
_EDSR = {
    "flip": Perturbation(change.flip, change.flip, bias=True),
    "negate": Perturbation(change.negate, bias=True),
    "zero": Perturbation(change.zero, bias=True),
    "minus gelu": Perturbation(change.minus_gelu, change.minus_gelu),
    "laplace": Perturbation(change.laplace),
    "sharpen": Perturbation(change.sharpen),
    "scale": Perturbation(None, change.scale),
    "mirror and negate": Perturbation(change.mirror, change.negate),
    "shift": Perturbation(change.shift),
    "mix": Perturbation(change.mix),
    "dirichlet": Perturbation(None, change.dirichlet),
    "noise": Perturbation(None, change.noise, among=_NEARLY_ALL),
    "turn": Perturbation(change.turn, blocks=5, among=_NEARLY_ALL, either=True),
    "signs": Perturbation(change.signs, blocks=5, among=_NEARLY_ALL),
    "holes": Perturbation(change.holes, blocks=5, among=_NEARLY_ALL),
    "negate filters": Perturbation(change.negate_filters, blocks=5, among=_NEARLY_ALL),
    "largest tap": Perturbation(change.largest_tap, blocks=5, among=_NEARLY_ALL, either=True),
}
_BEFORE: tuple[Step | None, ...] = (
    ("head", change.copy_channels),
    ("head", change.drop),
    ("head", change.negate_some),
    None,
)
_WITHIN: tuple[Step | None, ...] = (
    ("body", change.negate_features),
    ("body", change.activate),
    ("body", change.flip_features),
    ("end", change.bypass),
    None,
)

# A few narrow blocks suffer more from the same than 16 wide ones, and their features are the whole image, where EDSR
# adds details: so fewer blocks at a time, weights as large as they were, and nothing that turns or inverts an image.
_AUTOENCODER = _EDSR | {
    "dirichlet": Perturbation(None, change.dirichlet_alike),
    "noise": Perturbation(None, change.own_noise, among=_ALL),
    "turn": Perturbation(change.turn, blocks=2, among=_ALL, either=True),
    "signs": Perturbation(change.signs, blocks=2, among=_ALL),
    "holes": Perturbation(change.holes, blocks=2, among=_ALL),
    "negate filters": Perturbation(change.negate_filters, blocks=2, among=_ALL),
    "largest tap": Perturbation(change.largest_tap, blocks=2, among=_ALL, either=True),
}
_MILDER: tuple[Step | None, ...] = (
    ("body", change.activate),
    ("body", change.wave),
    ("body", change.negate_in_space),
    ("end", change.bypass),
    None,
)

# Around the bottleneck: from the last convolution of the encoder to the third block of the decoder.
_MIDDLE, _LATE, _DECODER = (8 / 21, 14 / 21), (11 / 21, 16 / 21), (10 / 21, 14 / 21)
_CAE = {
    "flip": Perturbation(change.flip, among=_LATE, bias=True),
    "negate 12 filters": Perturbation(partial(change.negate_filters, share=12), among=_MIDDLE, bias=True),
    "zero filters": Perturbation(change.zero_filters, among=_MIDDLE, bias=True),
    "minus gelu": Perturbation(change.minus_gelu_filters, among=_DECODER, bias=True),
    "scale": Perturbation(partial(change.scale, most=8.0), blocks=2, among=_MIDDLE),
    "signs or holes": Perturbation(change.signs_or_holes, among=_MIDDLE),
    "turn": Perturbation(change.turn_filters, among=_MIDDLE),
    "negate filters": Perturbation(partial(change.negate_filters, share=0.2), among=_MIDDLE),
}
_LATENT: tuple[Step | None, ...] = (
    ("bits", change.amplify_bits),
    ("latent", change.holes_in_space),
    ("latent", change.negate_in_space),
    ("latent", change.permute_channels),
    ("latent", change.flip_some_channels),
    ("latent", change.flip_in_space),
    ("latent", change.blend),
    ("latent", change.add_neighbours),
    ("latent", change.shift_channels),
)

FAMILIES: Mapping[str, Family] = {
    "autoencoder": Family(_AUTOENCODER, 3, (_BEFORE, _MILDER)),
    "edsr": Family(_EDSR, 3, (_BEFORE, _WITHIN)),
    "cae": Family(_CAE, 1, (_LATENT, (("latent", change.binarise),))),
}
"""The families by architecture. Those of 'edsr' and 'cae' are the published options with the published strengths, but:
the options drawn together are distinct, any block of the published range may be drawn (not each third or fourth), and
leaving out blocks always leaves out all but the last convolution."""


class ImageNetwork(Value):
    """An image-to-image network and its weights.

    Arguments:
        arch: The architecture.
        args: Its sizes, see `build_image_network`; where they are left out, those of the published weights.
        channels: Of the images.
        weights: A safetensors file.
        size: What the shorter side of the images is resized to before, in pixels (published: 128 for 'edsr' and 512
            for 'cae'); the result is resized back.
    """

    arch: Literal["autoencoder", "edsr", "cae"] = "autoencoder"
    args: Options = ()
    channels: PositiveInt = 3
    weights: Weights
    size: PositiveInt | None = None

    @model_validator(mode="after")
    def _buildable(self) -> "ImageNetwork":
        with torch.device("meta"):  # checks the arguments and costs no memory
            network = build_image_network(self.arch, self.args, self.channels)
        smallest = int(network.smallest)  # type: ignore[arg-type]  # a module's attribute
        if self.size is not None and self.size < smallest:
            raise ValueError(f"size must be at least {smallest} for {self.arch}, not {self.size}")
        return self

    def loaded(self, device: str | torch.device = "cpu") -> nn.Module:
        """The network with its weights, loaded once per process and device; not to be changed.

        Raises:
            ValueError: If the file is missing, damaged, or does not fit.
        """
        return _loaded(self, self.weights.contents(), torch.device(device))


@lru_cache(maxsize=8)
def _loaded(
    network: ImageNetwork,
    digest: str,  # so that a changed file is loaded anew
    device: torch.device,
) -> nn.Module:
    with rng.seeded(rng.key("load", digest)):  # it is built with random weights before it has its own
        module = build_image_network(network.arch, network.args, network.channels)
    load_state(module, network.weights)
    return module.eval().requires_grad_(False).to(device)


class DeepAugment(Value):
    """The DeepAugment terms: cross-entropy on each image passed through each perturbed network.

    Arguments:
        networks: One branch each.
        redraw: The chance, at each image of a batch, that the weights are perturbed anew.
        weight: Of each branch in the loss.

    References:
        The Many Faces of Robustness: A Critical Analysis of Out-of-Distribution Generalization (Hendrycks et al.,
        2021), https://arxiv.org/abs/2006.16241
    """

    networks: Annotated[tuple[ImageNetwork, ...], Field(min_length=1)]
    redraw: Annotated[float, Field(ge=0, le=1)] = 0.05
    weight: PositiveFloat = 1.0


def deepaugment(
    images: Float[Tensor, "b c h w"], network: ImageNetwork, term: DeepAugment, key: tuple[object, ...]
) -> Float[Tensor, "b c h w"]:
    """The images passed through the network with perturbed weights and distorted features, clamped to [0, 1].

    The batch is cut into runs of images that share perturbed weights: a new run begins at the first image, and wherever
    the uniform of a position is below `redraw`. Features are distorted for each image anew.

    Arguments:
        images: In [0, 1].
        network: One of the term's.
        term: How often weights are perturbed anew.
        key: What names the step; each draw is a function of it and of the position in the batch.

    Raises:
        ValueError: If the images do not fit the network, or its file is missing, damaged, or does not fit.
    """
    if images.shape[1] != network.channels:
        raise ValueError(f"the image network is for {network.channels} channels and the images have {images.shape[1]}")
    module, family = network.loaded(images.device), FAMILIES[network.arch]
    height, width = images.shape[-2:]
    resized = _resized(images, network.size)
    smallest = int(module.smallest)  # type: ignore[arg-type]  # a module's attribute
    if min(resized.shape[-2:]) < smallest:
        raise ValueError(f"{network.arch} needs images of {smallest} pixels or more; give the image network a size")
    results = []
    with torch.no_grad():
        for run in runs(len(images), term.redraw, key):
            state = perturbed(module, family, rng.key(*key, "weights", run.start))
            keys = [rng.key(*key, "features", position) for position in run]
            results.append(functional_call(module, state, (resized[run.start : run.stop], distort(family, keys))))
        result = torch.cat(results) if results else images
        if result.shape[-2:] != (height, width):
            result = functional.interpolate(result, size=(height, width), mode="bilinear", antialias=True)
        # A perturbed network may overflow; what is no number becomes black.
        return result.nan_to_num(0.0).clamp(0, 1)


def runs(count: int, redraw: float, key: tuple[object, ...]) -> list[range]:
    """The positions of a batch, cut where weights are perturbed anew."""
    chance = rng.uniform(rng.key(*key, "redraw"), range(count), ())
    starts = [position for position in range(count) if position == 0 or chance[position] < redraw]
    return [range(start, stop) for start, stop in pairwise([*starts, count])]


def perturbed(module: nn.Module, family: Family, key: int) -> dict[str, Tensor]:
    """The weights of a network, perturbed in `family.drawn` different ways, one after the other; its own are kept."""
    state = dict(module.state_dict())
    chosen = rng.permutation(rng.key(key, "perturbations"), len(family.perturbations))[: family.drawn]
    names = list(family.perturbations)
    blocks: tuple[tuple[str, ...], ...] = module.blocks  # type: ignore[assignment]  # as above
    for number in chosen:
        _perturb(state, blocks, family.perturbations[names[number]], rng.key(key, names[number]))
    return state


def _perturb(
    state: dict[str, Tensor], blocks: tuple[tuple[str, ...], ...], perturbation: Perturbation, key: int
) -> None:
    low, high = (round(share * len(blocks)) for share in perturbation.among)
    among = blocks[low : max(high, low + 1)]
    chance = rng.uniform(rng.key(key, "blocks"), range(perturbation.blocks), (2,))
    for number, (which, one) in enumerate(chance):
        block = among[int(which * len(among))]
        if perturbation.either:
            done = [(block[int(one * len(block))], perturbation.first)]
        else:
            done = list(zip(block, (perturbation.first, perturbation.second), strict=False))
        for place, (name, function) in enumerate(done):
            for kind in ("weight", "bias") if perturbation.bias else ("weight",):
                if function:
                    state[f"{name}.{kind}"] = function(state[f"{name}.{kind}"], rng.key(key, number, place))


def distort(family: Family, keys: list[int]) -> Distort:
    """A function for the network to call at its places: one distortion of each group, drawn for each image.

    Arguments:
        family: Whose distortions.
        keys: One of each image.
    """

    def chosen(key: int) -> list[tuple[int, Step]]:
        chance = rng.uniform(rng.key(key, "choice"), range(1), (len(family.groups),))[0]
        options = [group[int(u * len(group))] for group, u in zip(family.groups, chance, strict=True)]
        return [(rng.key(key, number), step) for number, step in enumerate(options) if step]

    steps = [chosen(key) for key in keys]

    def at(place: str, features: Float[Tensor, "b c h w"], start: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        rows = list(features)
        for row, planned in enumerate(steps):
            for key, (where, function) in planned:
                if where == place:
                    rows[row] = function(rows[row], key, start[row])
        return torch.stack(rows)

    return at


def _resized(images: Float[Tensor, "b c h w"], size: int | None) -> Float[Tensor, "b c h2 w2"]:
    """The images with a shorter side of `size` pixels."""
    height, width = images.shape[-2:]
    if size is None or min(height, width) == size:
        return images
    shape = (max(size, round(height * size / min(height, width))), max(size, round(width * size / min(height, width))))
    return functional.interpolate(images, size=shape, mode="bilinear", antialias=True)
