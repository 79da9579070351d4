"""Image-to-image networks that DeepAugment perturbs: a small autoencoder, EDSR and a compressive autoencoder.

Each takes images in [0, 1] to images in about [0, 1], and calls `distort` at named places of its middle. `blocks` names
its convolutions, for `distortions` to choose from. Module names are those of the published weights.
"""

from collections.abc import Callable
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from robustbench_diffaug.component import Options, suggest

__all__ = ["CAE", "EDSR", "Autoencoder", "Distort", "build_image_network", "undistorted"]

Distort: TypeAlias = Callable[[str, Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]], Float[Tensor, "b c h w"]]
"""From the name of a place, the features there and the features before the body, to the features that go on."""


def undistorted(
    place: str, features: Float[Tensor, "b c h w"], start: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """The features as they are."""
    return features


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class _Residual(nn.Module):
    """`x + conv(relu(conv(x)))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(width, width), nn.ReLU(), _convolution(width, width))

    def forward(self, features: Tensor) -> Tensor:
        inner: Tensor = self.body(features)
        return features + inner


class _Body(nn.Sequential):
    """Residual blocks and a last convolution, with places to distort: after 5 of 16 blocks, and before the last."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__(*[_Residual(width) for _ in range(blocks)], _convolution(width, width))

    def forward(self, start: Tensor, distort: Distort = undistorted) -> Tensor:
        """The features `start + body(start)`, distorted on the way."""
        middle, features = (len(self) - 1) * 5 // 16, start
        for number, layer in enumerate(self):
            if number == middle:
                features = distort("body", features, start)
            if number == len(self) - 1:
                features = distort("end", features, start)
            features = layer(features)
        return start + features


def _pairs(blocks: int) -> tuple[tuple[str, ...], ...]:
    return tuple((f"body.{number}.body.0", f"body.{number}.body.2") for number in range(blocks))


class Autoencoder(nn.Module):
    """A small residual autoencoder at a fraction of the resolution; images are padded to whole patches and cropped.

    Arguments:
        channels: Of the images.
        width: Channels of the features.
        blocks: Residual blocks.
        patch: Height and width of the squares of pixels that become one position of the features.
    """

    smallest: ClassVar[int] = 1

    def __init__(self, channels: int = 3, width: int = 24, blocks: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.blocks, self.patch = _pairs(blocks), patch
        self.head = nn.Sequential(nn.PixelUnshuffle(patch), _convolution(patch**2 * channels, width))
        self.body = _Body(width, blocks)
        self.tail = nn.Sequential(_convolution(width, patch**2 * channels), nn.PixelShuffle(patch))

    def forward(self, images: Float[Tensor, "b c h w"], distort: Distort = undistorted) -> Float[Tensor, "b c h w"]:
        """The reconstruction, not clamped."""
        height, width = images.shape[-2:]
        padded = functional.pad(images, (0, -width % self.patch, 0, -height % self.patch), mode="replicate")
        features = self.head(padded)
        features = distort("head", features, features)
        result: Tensor = self.tail(self.body(features, distort))
        return result[..., :height, :width]


class EDSR(nn.Module):
    """Enhanced deep residual network for super-resolution; works on 0 to 255 less the mean colour of DIV2K.

    Arguments:
        channels: Of the images; where they are not 3, the mean is that of the three colours.
        width: Channels of the features.
        blocks: Residual blocks.
        scale: How many times larger the result is: 1, 2, 4 or 8.

    References:
        Enhanced Deep Residual Networks for Single Image Super-Resolution (Lim et al., 2017),
        https://arxiv.org/abs/1707.02921
    """

    smallest: ClassVar[int] = 1
    mean: ClassVar[tuple[float, float, float]] = (0.4488, 0.4371, 0.4040)

    def __init__(self, channels: int = 3, width: int = 64, blocks: int = 16, scale: int = 4) -> None:
        super().__init__()
        self.blocks = _pairs(blocks)
        self.sub_mean, self.add_mean = _shift(channels, -1), _shift(channels, 1)
        self.head = nn.Sequential(_convolution(channels, width))
        self.body = _Body(width, blocks)
        doublings = [(_convolution(width, 4 * width), nn.PixelShuffle(2)) for _ in range(scale.bit_length() - 1)]
        larger = nn.Sequential(*[layer for doubling in doublings for layer in doubling])
        self.tail = nn.Sequential(larger, _convolution(width, channels))

    def forward(self, images: Float[Tensor, "b c h w"], distort: Distort = undistorted) -> Float[Tensor, "b c h2 w2"]:
        """The images enlarged `scale` times, not clamped."""
        features = self.head(self.sub_mean(255 * images))
        features = distort("head", features, features)
        result: Tensor = self.add_mean(self.tail(self.body(features, distort)))
        return result / 255


def _shift(channels: int, sign: int) -> nn.Conv2d:
    """The 1x1 convolution that adds or subtracts the mean colour; a convolution since the published weights have it."""
    layer = nn.Conv2d(channels, channels, 1)
    mean = torch.tensor(EDSR.mean)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(channels)[:, :, None, None])
        layer.bias.copy_(sign * 255 * (mean if channels == 3 else mean.mean().expand(channels)))  # type: ignore[union-attr]  # it has a bias
    return layer


class CAE(nn.Module):
    """A compressive autoencoder: to a quarter of the resolution, to bits, and back.

    Arguments:
        channels: Of the images.
        width: Channels after the first convolution, a multiple of 4; all others scale with it.

    References:
        Lossy Image Compression with Compressive Autoencoders (Theis et al., 2017), https://arxiv.org/abs/1703.00395
    """

    smallest: ClassVar[int] = 12
    blocks: ClassVar[tuple[tuple[str, ...], ...]] = tuple(
        (name,)
        for name in (
            "e_conv_1.1 e_conv_2.1 e_block_1.1 e_block_1.4 e_block_2.1 e_block_2.4 e_block_3.1 e_block_3.4 e_conv_3.0 "
            "d_up_conv_1.0 d_up_conv_1.3 d_block_1.1 d_block_1.4 d_block_2.1 d_block_2.4 d_block_3.1 d_block_3.4 "
            "d_up_conv_2.0 d_up_conv_2.3 d_up_conv_3.0 d_up_conv_3.3"
        ).split()
    )

    def __init__(self, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        half, double = width // 2, 2 * width
        pad, narrow = nn.ZeroPad2d((1, 2, 1, 2)), nn.ZeroPad2d(1)
        self.e_conv_1 = nn.Sequential(pad, nn.Conv2d(channels, width, 5, 2), nn.LeakyReLU())
        self.e_conv_2 = nn.Sequential(pad, nn.Conv2d(width, double, 5, 2), nn.LeakyReLU())
        self.e_block_1, self.e_block_2, self.e_block_3 = (_cae_block(double) for _ in range(3))
        self.e_conv_3 = nn.Sequential(nn.Conv2d(double, half, 5, padding=2), nn.Tanh())
        rise = nn.ConvTranspose2d(width, double, 2, 2)
        self.d_up_conv_1 = nn.Sequential(nn.Conv2d(half, width, 3), nn.LeakyReLU(), narrow, rise)
        self.d_block_1, self.d_block_2, self.d_block_3 = (_cae_block(double) for _ in range(3))
        rise = nn.ConvTranspose2d(half, 4 * width, 2, 2)
        self.d_up_conv_2 = nn.Sequential(nn.Conv2d(double, half, 3), nn.LeakyReLU(), narrow, rise)
        last = [nn.ReflectionPad2d(2), nn.Conv2d(width // 4, channels, 3), nn.Tanh()]
        self.d_up_conv_3 = nn.Sequential(nn.Conv2d(4 * width, width // 4, 3), nn.LeakyReLU(), *last)

    def forward(self, images: Float[Tensor, "b c h w"], distort: Distort = undistorted) -> Float[Tensor, "b c h2 w2"]:
        """The reconstruction, in [-1, 1]; its sides are the largest multiples of 4 that fit the image."""
        features = self.e_conv_2(self.e_conv_1(images))
        for block in (self.e_block_1, self.e_block_2, self.e_block_3):
            features = features + block(features)
        latent = self.e_conv_3(features)
        bits = distort("latent", latent, latent).sign()
        features = self.d_up_conv_1(distort("bits", bits, bits))
        for block in (self.d_block_1, self.d_block_2, self.d_block_3):
            features = features + block(features)
        result: Tensor = self.d_up_conv_3(self.d_up_conv_2(features))
        return result


def _cae_block(width: int) -> nn.Sequential:
    inner = [nn.Conv2d(width, width, 3), nn.LeakyReLU(), nn.ZeroPad2d(1), nn.Conv2d(width, width, 3)]
    return nn.Sequential(nn.ZeroPad2d(1), *inner)


_ARCHITECTURES: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "autoencoder": (Autoencoder, ("width", "blocks", "patch")),
    "edsr": (EDSR, ("width", "blocks", "scale")),
    "cae": (CAE, ("width",)),
}


def build_image_network(arch: str, args: Options, channels: int) -> nn.Module:
    """An image-to-image network with random weights, drawn from torch's global generator (see `rng.seeded`).

    Arguments:
        arch: 'autoencoder', 'edsr' or 'cae'.
        args: Its sizes: `width` of all, `blocks` of 'autoencoder' and 'edsr', `patch` of 'autoencoder', `scale` of
            'edsr'.
        channels: Of the images.

    Raises:
        ValueError: If there is no such architecture, or it does not take these arguments.
    """
    if arch not in _ARCHITECTURES:
        raise ValueError(f"no image network is called {arch!r}{suggest(arch, list(_ARCHITECTURES))}")
    network, known = _ARCHITECTURES[arch]
    for name, value in args:
        if name not in known:
            raise ValueError(f"{arch} has no argument {name!r}{suggest(name, list(known))}")
        if not (type(value) is int and 1 <= value <= 4096):
            raise ValueError(f"{name} of {arch} must be a whole number from 1 to 4096, not {value!r}")
        if name == "scale" and value not in (1, 2, 4, 8):
            raise ValueError(f"scale of {arch} must be 1, 2, 4 or 8, not {value}")
        if arch == "cae" and value % 4:
            raise ValueError(f"width of cae must be a multiple of 4, not {value}")
    return network(channels, **dict(args))
