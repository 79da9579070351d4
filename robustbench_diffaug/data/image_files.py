"""Image files in folders: which there are, how one is decoded and fitted, and batches of them read by threads."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from robustbench_diffaug.data.base import BadImage, Images, tensor_of

__all__ = ["Encoded", "Geometry", "Listing", "class_folders", "listed", "opened"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG2000")
"""Which are decoded, by what a file holds, whatever its name: PIL would hand others, such as EPS, to programs."""


@dataclass(frozen=True)
class Geometry:
    """What becomes of an image from its file to the tensor, as torchvision's transforms do it on PIL images.

    Arguments:
        mode: 'RGB' or 'L' (grey).
        resize: The shorter side in pixels, the longer one in proportion; or height and width; None to leave it.
        crop: Height and width of the crop from the centre, after the resizing; None for the whole.
        interpolation: Of the resizing, antialiased.
    """

    mode: Literal["RGB", "L"] = "RGB"
    resize: int | tuple[int, int] | None = None
    crop: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    def decode(self, file: Path | bytes, name: object) -> Image.Image:
        """The image as it lies in the file, in the mode.

        Arguments:
            file: Its path, or its bytes.
            name: What messages call it.

        Raises:
            BadImage: If it cannot be decoded.
            ValueError: If it has more than 8 bits a channel, or is too small for the crop.
        """
        try:
            with Image.open(BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as encoded:
                deep, image = encoded.mode[0] in "IF", encoded.convert(self.mode)
        except Exception as error:  # whatever a damaged file makes the decoder raise
            raise BadImage(f"{name} is not a readable image: {error}") from error
        if deep:
            raise ValueError(f"{name} has more than 8 bits a channel, which would be cut off; convert it to 8 bits")
        width, height = self.resized(image.size)
        if self.crop and min(width, height) < self.crop:
            raise ValueError(f"{name} is {width}x{height}, too small for a crop of {self.crop}")
        return image

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height after the resizing of an image of such a width and height."""
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        if self.resize is None:
            return size
        width, height = (int(self.resize * side / min(size)) for side in size)
        return width, height

    def fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of what is made of an image of such a width and height."""
        return (self.crop, self.crop) if self.crop else self.resized(size)

    @property
    def constant(self) -> tuple[int, int] | None:
        """Width and height of what is made of every image, where they do not depend on the image."""
        return self.fitted((0, 0)) if self.crop or isinstance(self.resize, tuple) else None

    def fit(self, image: Image.Image) -> Float[Tensor, "c h w"]:
        """The image, resized and cropped, as a tensor in [0, 1]."""
        if self.resize is not None:
            image = image.resize(self.resized(image.size), Image.Resampling[self.interpolation.upper()])
        if self.crop:
            left, top = (round((side - self.crop) / 2) for side in image.size)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        return tensor_of(image)


@runtime_checkable
class Encoded(Protocol):
    """Encoded images by position, and what is known of them without decoding any."""

    @property
    def labels(self) -> Sequence[int]:
        """Of each image."""
        ...

    @property
    def ids(self) -> Sequence[str]:
        """A stable name of each image."""
        ...

    def __getitem__(self, row: int) -> tuple[Path | bytes, object]:
        """An image's file, or its bytes, and what messages call it.

        Raises:
            BadImage: If there is none at that position.
        """
        ...


@dataclass(frozen=True, eq=False)
class Listing:
    """Image files below a folder; only texts and numbers, some 100 bytes a file, so that a million can be listed.

    Arguments:
        root: The folder.
        paths: Of each file, below the root.
        labels: Of each file.
        ids: A stable name of each file.
    """

    root: Path
    paths: Sequence[str]
    labels: Sequence[int]
    ids: Sequence[str]

    def __getitem__(self, row: int) -> tuple[Path, Path]:
        """The path of a file, which is also what messages call it."""
        path = self.root / self.paths[row]
        return path, path

    def digest(self) -> str:
        """SHA-256 over the path below the root, size and label of every file, in hexadecimal."""
        digest, root = hashlib.sha256(), str(self.root)
        for path, label in zip(self.paths, self.labels, strict=True):
            size = os.stat(f"{root}/{path}").st_size  # noqa: PTH116  # ImageNet-C is millions of files: no Path of each
            digest.update(f"{path}\x1f{size}\x1f{label}\n".encode())
        return digest.hexdigest()


def class_folders(root: Path, uri: str) -> list[str]:
    """The names of the folders below a root, hidden ones left out, sorted as texts.

    Raises:
        ValueError: If the root is no folder.
    """
    if not root.is_dir():
        raise ValueError(f"{uri} is not a folder")
    return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def listed(root: Path, folder: str) -> list[str]:
    """The paths below the root of the images in one of its folders, sorted; hidden files are none.

    Raises:
        ValueError: If there is no such folder, or it is a link to elsewhere.
    """
    path, inside = root / folder, Path(f"{root.resolve()}/{folder}")
    if not path.is_dir() or path.resolve() != inside or inside == root.resolve():
        link = "; a link that leads elsewhere is none" if path.is_dir() else ""
        raise ValueError(f"{root} has no folder of class {folder}{link}")
    names = sorted(file.name for file in path.iterdir())
    return [f"{folder}/{name}" for name in names if name[0] != "." and name.lower().endswith(SUFFIXES)]


def opened(name: str, images: Encoded, geometry: Geometry, threads: int) -> Images:
    """Encoded images, read when they are needed.

    Arguments:
        name: Of the dataset, for messages.
        images: Which; at least one.
        geometry: What becomes of each.
        threads: How many decode at once; no result depends on it.

    Raises:
        BadImage: If their size depends on the first one and none can be decoded.
    """
    first = geometry.constant or _first(images, geometry)

    def decode(row: int) -> Image.Image:
        file, called = images[row]
        image = geometry.decode(file, called)
        if geometry.fitted(image.size) != first:
            pair = " and ".join(f"{width}x{height}" for width, height in (first, geometry.fitted(image.size)))
            raise ValueError(f"images of {name} differ in size, {pair} at {called}; give crop")
        return image

    def attempt(row: int) -> Float[Tensor, "c h w"] | BadImage:
        try:
            return geometry.fit(decode(row))
        except BadImage as error:
            return error

    def read(rows: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
        with ThreadPoolExecutor(threads) as pool:
            found = _together(list(pool.map(attempt, rows)))
        return torch.stack(found), torch.tensor([images.labels[row] for row in rows])

    return Images(images.ids, read, decode, geometry.fit, images.labels)


def _together(found: Sequence[Float[Tensor, "c h w"] | BadImage]) -> list[Float[Tensor, "c h w"]]:
    """The images of a batch.

    Raises:
        BadImage: If some could not be decoded; it counts them and says what is wrong with the first.
    """
    bad = [result for result in found if isinstance(result, BadImage)]
    if bad and len(found) == 1:
        raise bad[0]
    if bad:
        raise BadImage(f"{len(bad)} of {len(found)} images of this batch cannot be read, first {bad[0]}") from bad[0]
    return [result for result in found if isinstance(result, Tensor)]


def _first(images: Encoded, geometry: Geometry) -> tuple[int, int]:
    """Width and height of what is made of the first image that can be decoded; all others must be of that size."""
    reason: BadImage | None = None
    for row in range(len(images.ids)):
        try:
            return geometry.fitted(geometry.decode(*images[row]).size)
        except BadImage as error:
            reason = reason or error
    raise reason or ValueError("there is no image")
