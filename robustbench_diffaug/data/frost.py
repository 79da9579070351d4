"""Frost: a texture of crystals over the image, drawn here or from the user's folder of the official textures.

References:
    Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
    ICLR 2019), https://arxiv.org/abs/1903.12261
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256 as digest_of_text
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from robustbench_diffaug.data.blurs import Levels, Number
from robustbench_diffaug.files import sha256
from robustbench_diffaug.rng import key, normal, uniform

__all__ = ["FILES", "digest", "draw", "frost", "texture"]

FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
"""The official textures that are used: the published code draws from the first five of its six."""

SIDE = 640
"""Height and width of the textures that are drawn here, in px."""

# Of each of them: mean red, green and blue, about those of the official ones, so that the corruption is as strong;
# standard deviation in levels; length of the longest crystals in px; how many there are.
LOOKS = (
    ((78, 149, 166), 20, 75, 3600),
    ((201, 205, 214), 22, 150, 1500),
    ((201, 205, 214), 22, 95, 2100),
    ((138, 153, 165), 29, 55, 5400),
    ((112, 123, 135), 43, 125, 1500),
)


def crystal(place: NDArray[np.float64], length: float, tint: int) -> Iterator[tuple[list[float], int]]:
    """The strokes of one crystal, a bent feather: shadows, barbs and spine; columns and rows in turn, and a grey level.

    Arguments:
        place: Column and row of its root as shares of the side; its direction as a share of the circle; its bend, of
            [-1, 1] mapped to [0, 1].
        length: In px.
        tint: Its grey level.
    """
    along = np.arange(0.0, length, 2.2)
    angles = 2 * np.pi * place[2] + (place[3] - 0.5) * along / length
    spine = SIDE * (1.2 * place[:2] - 0.1) + 2.2 * np.cumsum(np.stack([np.cos(angles), np.sin(angles)], axis=1), axis=0)
    # Barbs leave the spine at 60 degrees, as in hexagonal ice, and grow uneven: by the golden ratio, never in step.
    share, uneven = along / length, 0.4 + (np.arange(len(along)) * 0.618 + place[4]) % 1
    reach = (0.17 * length * np.minimum(5 * share, (1 - share) ** 0.7) * uneven)[:, None]
    for side in (-np.pi / 3, np.pi / 3):
        tips = spine + reach * np.stack([np.cos(angles + side), np.sin(angles + side)], axis=1)
        for level, shift in ((tint - 60, 1.2), (tint - 10, 0.0)):
            there_and_back = np.stack([spine, tips, spine], axis=1).reshape(-1, 2)
            yield (there_and_back + shift).ravel().tolist(), level
    yield spine.ravel().tolist(), tint + 15


@lru_cache(maxsize=len(FILES))
def draw(index: int) -> Levels:
    """One of five textures that look like frost on glass, the same at every call; (3, SIDE, SIDE).

    Crystals lie over each other as feathers with shadows, six from one root, the small ones last, on a cloudy pane.

    Arguments:
        index: 0 to 4.
    """
    mean, deviation, longest, count = LOOKS[index]
    picture = Image.new("L", (SIDE, SIDE), 110)
    pen = ImageDraw.Draw(picture)
    places = uniform(key("frost", index), range(count), (6,))
    places[:, :2] = places[::6, :2].repeat(6, axis=0)[:count]
    lengths = longest * np.geomspace(1, 0.2, count) * (0.4 + 1.2 * places[:, 4])
    for place, length in zip(places, lengths.tolist(), strict=True):
        for points, level in crystal(place, length, int(110 + 130 * place[5])):
            pen.line(points, fill=max(0, min(255, level)))
    crystals = gaussian_filter(np.asarray(picture, dtype=np.float64), 0.6)
    clouds = gaussian_filter(normal(key("frost", index, "clouds"), range(1), (SIDE, SIDE))[0].astype(np.float64), 48)
    relief = crystals / crystals.std() + 0.6 * clouds / clouds.std()
    relief = deviation * (relief - relief.mean()) / relief.std()
    pane: Levels = np.clip(relief + np.array(mean).reshape(3, 1, 1), 0, 255).astype(np.uint8)
    pane.flags.writeable = False
    return pane


def digest(folder: Path) -> str:
    """A digest of the textures of a folder.

    Arguments:
        folder: Holds `FILES`.

    Raises:
        ValueError: If one is missing.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}; textures is a folder of the official frost1.png ... frost5.jpg (in "
                "hendrycks/robustness, ImageNet-C/imagenet_c/imagenet_c/frost), or leave it out"
            )
    return digest_of_text("".join(sha256(folder / name) for name in FILES).encode()).hexdigest()


@lru_cache(maxsize=len(FILES))
def _read(path: Path, digest: str) -> Levels:  # digest: changed files are read anew
    try:
        with Image.open(path, formats=["PNG", "JPEG"]) as file:
            pixels = np.asarray(file.convert("RGB"))
    except Exception as error:  # whatever a damaged file makes the decoder raise
        raise ValueError(f"{path} is not a readable PNG or JPEG image: {error}") from error
    return pixels.transpose(2, 0, 1)


@lru_cache(maxsize=4 * len(FILES))
def texture(index: int, folder: Path | None, digest: str, scale: Number, shape: tuple[int, int, int]) -> Levels:
    """A texture as it is laid over images of one shape.

    Arguments:
        index: 0 to 4.
        folder: Of the official textures; None for those drawn here.
        digest: Of the folder's textures.
        scale: Of its sides, 1 or less.
        shape: Channels (1 or 3), height and width of the images; the texture is at least 1 px higher and wider.
    """
    pane = draw(index) if folder is None else _read(folder / FILES[index], digest)
    if scale != 1:
        # What the reference's linear interpolation comes to at one fifth: each fifth pixel.
        height, width = (int(side * scale + 0.5) for side in pane.shape[1:])
        rows, columns = (((np.arange(size) + 0.5) / scale).astype(np.intp) for size in (height, width))
        pane = pane.take(rows, axis=1).take(columns, axis=2)
    channels, *sides = shape
    growth = max((side + 1) / size for side, size in zip(sides, pane.shape[1:], strict=True))
    if growth > 1:
        height, width = (ceil(size * growth) for size in pane.shape[1:])
        grown = Image.fromarray(pane.transpose(1, 2, 0)).resize((width, height), Image.Resampling.BICUBIC)
        pane = np.asarray(grown).transpose(2, 0, 1)
    if channels == 1:
        grey = np.tensordot([0.299, 0.587, 0.114], pane, axes=1)
        pane = (grey + 0.5).astype(np.uint8)[None]
    return np.ascontiguousarray(pane)


def frost(
    levels: Levels, constants: tuple[Number, Number, Number], keys: Sequence[int], folder: Path | None = None
) -> Levels:
    """Gives share x + weight f, where f is a random piece of a random one of five textures.

    Arguments:
        levels: 8-bit images, (batch, 1 or 3 channels, height, width).
        constants: Share of the image, weight of the texture, scale of the texture.
        keys: One key per image.
        folder: Of the official textures; None for those drawn here. Images that are greater than a texture get it
            enlarged.

    Raises:
        ValueError: If the folder lacks a texture, or one is not readable.
    """
    share, weight, scale = constants
    named = "" if folder is None else digest(folder)
    output = np.empty_like(levels)
    channels, height, width = levels.shape[1:]
    table, glaze = share * np.arange(256.0), weight * np.arange(256.0)
    for image, result, image_key in zip(levels, output, keys, strict=True):
        which, down, right = uniform(image_key, range(1), (3,))[0].tolist()
        pane = texture(int(which * len(FILES)), folder, named, scale, (channels, height, width))
        top, left = int(down * (pane.shape[1] - height)), int(right * (pane.shape[2] - width))
        values = table.take(image)
        values += glaze.take(pane[:, top : top + height, left : left + width])
        result[:] = np.minimum(values, 255, out=values)
    return output
