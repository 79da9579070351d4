"""Crops of the photographs and textures that scikit-image and scikit-learn carry."""

import hashlib
from functools import cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.data.base import Dataset, Images, in_memory, tensor_of

__all__ = ["SOURCES", "Patches"]

Source: TypeAlias = Literal["photographs", "textures"]
Mode: TypeAlias = Literal["L", "RGB"]

SOURCES: dict[Source, tuple[str, ...]] = {
    "photographs": (
        *("skimage/data/astronaut.png", "skimage/data/camera.png", "skimage/data/chelsea.png"),
        *("sklearn/datasets/images/china.jpg", "skimage/data/clock_motion.png", "skimage/data/coffee.png"),
        *("skimage/data/coins.png", "sklearn/datasets/images/flower.jpg", "skimage/data/hubble_deep_field.jpg"),
        *("skimage/data/moon.png", "skimage/data/motorcycle_left.png", "skimage/data/retina.jpg"),
        "skimage/data/rocket.jpg",
    ),
    "textures": ("skimage/data/brick.png", "skimage/data/grass.png", "skimage/data/gravel.png"),
}
"""What crops are taken of; scans of text and drawings are left out, since they show characters or strokes."""

SIDE = 32  # pixels
LEAST = 0.05  # standard deviation of a crop's grey levels in [0, 1]: flatter ones show nothing


def _photograph(place: str) -> Image.Image:
    """One image of the packages, whole; read from its file, since the packages' own readers may download."""
    package, _, inner = place.partition("/")
    found = find_spec(package)
    file = Path(found.origin).parent / inner if found and found.origin else None
    if file is None or not file.is_file():
        name = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise ValueError(f"the installed {name} has no {inner}; patches are cut from it: pip install {name}")
    with Image.open(file) as image:
        return image.convert("RGB")


def _corners(grey: Float[Tensor, "h w"], name: str, draw: int) -> list[tuple[int, int]]:
    """The upper left corners of disjoint crops that are not flat, in a random order."""
    height, width = grey.shape
    rows, columns = height // SIDE, width // SIDE
    start = rng.uniform(rng.key("patches", draw, name, "start"), range(1), (2,))[0]
    # The grid may start anywhere where as many crops fit.
    top, left = (int(place) for place in start * (height % SIDE + 1, width % SIDE + 1))
    cells = grey[top : top + rows * SIDE, left : left + columns * SIDE].unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE)
    spread = cells.std((2, 3), correction=0).flatten()
    order = rng.permutation(rng.key("patches", draw, name, "order"), rows * columns)
    return [
        (top + SIDE * (int(cell) // columns), left + SIDE * (int(cell) % columns))
        for cell in order
        if spread[cell] >= LEAST
    ]


@cache
def _crops(source: Source, mode: Mode, draw: int) -> tuple[tuple[str, ...], Float[Tensor, "n c 32 32"]]:
    """Ids and pixels, one crop of each image in turn while it has any."""
    taken = []
    for place in SOURCES[source]:
        image, name = _photograph(place), PurePosixPath(place).stem
        pixels = tensor_of(image.convert(mode))
        corners = _corners(tensor_of(image.convert("L"))[0], name, draw)  # the same in both modes
        taken.append([(f"{name}-{y}-{x}", pixels[:, y : y + SIDE, x : x + SIDE]) for y, x in corners])
    turns = [crop for turn in zip_longest(*taken) for crop in turn if crop is not None]
    return tuple(id for id, _ in turns), torch.stack([crop for _, crop in turns])


class Patches(Dataset):
    """Crops of 32x32 pixels of photographs or textures in installed packages, as they lie there; every label is -1.

    No two overlap: they are cells of a grid whose start is drawn for each photograph, in a drawn order, one of each
    photograph in turn, so that `limit` takes as many of each while there are as many. Cells that are nearly flat
    (grey levels whose standard deviation is below 0.05) are left out. Crops of one photograph are counted as
    independent, which they are not quite: an interval is about more crops of these photographs, not about others.

    Arguments:
        source: 'photographs', thirteen of things, people and places; or 'textures': brick, grass and gravel.
        mode: 'L' for grey levels, 'RGB' for colours.
        draw: Another number gives other grids and another order.

    References:
        scikit-image: image processing in Python (van der Walt et al., 2014), https://doi.org/10.7717/peerj.453
        Scikit-learn: Machine Learning in Python (Pedregosa et al., 2011), https://jmlr.org/papers/v12/pedregosa11a.html
    """

    kind: Literal["patches"] = "patches"
    name: str = "patches"
    source: Source
    mode: Mode = "L"
    draw: int = 0

    def contents(self) -> str:
        """SHA-256 of the pixels of all crops."""
        return hashlib.sha256(_crops(self.source, self.mode, self.draw)[1].numpy().tobytes()).hexdigest()

    def open(self) -> Images:
        """All crops; an id is the photograph and the crop's upper left corner, row and column."""
        ids, images = _crops(self.source, self.mode, self.draw)
        return in_memory(ids, images, torch.full((len(ids),), -1))
