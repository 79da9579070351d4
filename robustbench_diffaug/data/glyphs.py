"""Drawn images of no digit: printed letters in the fonts that matplotlib carries, and noise."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field, PositiveInt, field_validator
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.data.base import Dataset, Images, in_memory, tensor_of

__all__ = ["FONTS", "LETTERS", "Letters", "Noise"]

FONTS = (
    *(
        f"DejaVu{family}{style}"
        for family in ("Sans", "SansMono")
        for style in ("", "-Bold", "-Oblique", "-BoldOblique")
    ),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmti10", "cmss10", "cmtt10"),
)
"""The files of matplotlib that hold letters; its others hold symbols, or boxes."""
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
"""Capitals without I and O, which in many fonts are the digits 1 and 0."""

EM = 128  # pixels: glyphs are drawn once so large, then turned and shrunk
SIDE, FINER = 28, 4  # pixels of an image, and how many times finer it is drawn
LONGEST = (16.0, 20.0)  # pixels: the longer side of a letter; MNIST's digits have 20
TURN, SHIFT = np.pi / 18, 2.0  # radians, pixels: at most, either way; so much never cuts a letter off

Form: TypeAlias = Literal["uniform", "gaussian", "blobs"]


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


@lru_cache(maxsize=len(FONTS) * len(LETTERS))
def _glyph(font: str, letter: str) -> Image.Image:
    """A letter in white, its bounding box alone."""
    from matplotlib import get_data_path

    path = Path(get_data_path(), "fonts/ttf", f"{font}.ttf")
    if not path.is_file():
        raise ValueError(f"the installed matplotlib has no font {path.name}; letters are drawn with it")
    face = ImageFont.truetype(str(path), EM, layout_engine=ImageFont.Layout.BASIC)
    sheet = Image.new("L", (3 * EM, 3 * EM))
    ImageDraw.Draw(sheet).text((EM, EM), letter, fill=255, font=face)
    return sheet.crop(sheet.getbbox())  # the font's own box has the margins of a line of text


def _placed(glyph: Image.Image, draws: np.ndarray) -> Float[Tensor, "1 32 32"]:
    """A glyph shrunk, turned and shifted by four uniforms, and padded with black."""
    longest = LONGEST[0] + (LONGEST[1] - LONGEST[0]) * draws[0]
    turn, right, down = np.array([TURN, SHIFT, SHIFT]) * (2 * draws[1:] - 1)
    step = max(glyph.size) / (longest * FINER)  # pixels of the glyph in one of the finer image
    cosine, sine = step * np.cos(turn), step * np.sin(turn)
    across, along = (FINER * (SIDE / 2 + shift) for shift in (right, down))  # the letter's centre
    x, y = glyph.width / 2, glyph.height / 2
    matrix = (cosine, sine, x - cosine * across - sine * along, -sine, cosine, y + sine * across - cosine * along)
    fine = glyph.transform((SIDE * FINER,) * 2, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return functional.pad(tensor_of(fine.reduce(FINER)), (2, 2, 2, 2))


@lru_cache(maxsize=8)
def _letters(letters: str, count: int, draw: int) -> Float[Tensor, "n 1 32 32"]:
    images = []
    for row in range(count):
        letter, font = letters[row % len(letters)], FONTS[row // len(letters) % len(FONTS)]
        draws = rng.uniform(rng.key("letters", draw, row, letter), range(1), (4,))[0]
        images.append(_placed(_glyph(font, letter), draws))
    return torch.stack(images)


class Letters(Dataset):
    """Printed capitals, white on black, 28x28 and padded to 32x32 as MNIST's digits are; every label is -1.

    Letters come in turn, then the 21 fonts, so that any first part is as even as can be. Size (the longer side has 16
    to 20 pixels), place (up to 2 pixels off) and angle (up to 10 degrees) are drawn for each image. Images of one
    letter in one font are versions of one outline, which no interval knows: it is about other sizes, places and angles.

    Arguments:
        letters: Which capitals; I and O look like digits and are refused. Default: A to J without I, as in notMNIST.
        count: The number of images. Fewer are the first of more.
        draw: Another number gives other sizes, places and angles.

    References:
        notMNIST dataset (Bulatov, 2011), http://yaroslavvb.blogspot.com/2011/09/notmnist-dataset.html
    """

    kind: Literal["letters"] = "letters"
    name: str = "letters"
    letters: str = Field("ABCDEFGHJ", min_length=1)
    count: PositiveInt = Field(1000, le=10_000)
    draw: int = 0

    @field_validator("letters")
    @classmethod
    def _capitals(cls, letters: str) -> str:
        for place, letter in enumerate(letters):
            if letter not in LETTERS:
                why = "in many fonts it is a digit" if letter in "IO" else f"there are {LETTERS}"
                raise ValueError(f"{letter!r} is no letter to draw: {why}")
            if letter in letters[:place]:
                raise ValueError(f"{letter!r} stands there more than once")
        return letters

    def contents(self) -> str:
        """SHA-256 of all pixels: other versions of the fonts or of the library that draws them may give others."""
        return _digest(_letters(self.letters, self.count, self.draw))

    def open(self) -> Images:
        """All images; an id is a position and the letter."""
        images = _letters(self.letters, self.count, self.draw)
        ids = [f"{row:05d}-{self.letters[row % len(self.letters)]}" for row in range(self.count)]
        return in_memory(ids, images, torch.full((self.count,), -1))


@lru_cache(maxsize=8)
def _noise(form: Form, channels: int, count: int, draw: int) -> Float[Tensor, "n c 32 32"]:
    shape = (channels, 32, 32)
    images = np.empty((count, *shape), np.float32)
    for row in range(count):
        key = rng.key("noise", form, draw, row)
        if form == "uniform":
            images[row] = rng.uniform(key, range(1), shape)[0]
        elif form == "gaussian":
            images[row] = np.clip(0.5 + 0.25 * rng.normal(key, range(1), shape)[0], 0, 1)
        else:
            smooth = gaussian_filter(rng.normal(key, range(1), (32, 32))[0].astype(np.float64), 2.0, mode="wrap")
            images[row] = smooth > np.median(smooth)
    return torch.from_numpy(images)


class Noise(Dataset):
    """Images that show nothing, 32x32; every label is -1.

    Arguments:
        form: 'uniform' on [0, 1]; 'gaussian', of mean 0.5 and standard deviation 0.25, clamped to [0, 1]; or 'blobs',
            black and white: blurred noise (Gaussian, 2 pixels, periodic) above its median.
        mode: 'L' for one channel, 'RGB' for three (in which blobs are equal).
        count: The number of images. Fewer are the first of more.
        draw: Another number gives other images.
    """

    kind: Literal["noise"] = "noise"
    name: str = "noise"
    form: Form
    mode: Literal["L", "RGB"] = "L"
    count: PositiveInt = Field(1000, le=10_000)
    draw: int = 0

    def contents(self) -> str:
        """SHA-256 of all pixels."""
        return _digest(self._images())

    def open(self) -> Images:
        """All images; an id is a position."""
        ids = [f"{row:05d}" for row in range(self.count)]
        return in_memory(ids, self._images(), torch.full((self.count,), -1))

    def _images(self) -> Float[Tensor, "n c 32 32"]:
        return _noise(self.form, len(self.mode), self.count, self.draw)
