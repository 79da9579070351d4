"""Images from files of the user's: a folder of images by class, and arrays of numpy."""

import hashlib
import mmap
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from robustbench_diffaug.component import Outside
from robustbench_diffaug.data.base import Dataset, Images, tensor_of
from robustbench_diffaug.files import DataLocation, existing, sha256

__all__ = ["Arrays", "Folder"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


class Folder(Dataset):
    """Images in one folder per class.

    Arguments:
        root: The folder; its sub-folders are the classes, in the order of their names.
        folders: The names of the sub-folders in the order of the classes, where it is another.
        mode: 'RGB' or 'L' (grey).
        resize: The shorter side, in pixels, before the crop; bilinear, as the field's evaluation transform.
        crop: Height and width of the crop from the centre; left out, all images must be of one size.
    """

    kind: Literal["folder"] = "folder"
    root: DataLocation
    folders: tuple[str, ...] = ()
    mode: Literal["RGB", "L"] = "RGB"
    resize: PositiveInt | None = None
    crop: PositiveInt | None = None
    threads: Annotated[int, Field(ge=1), Outside] = 4

    def contents(self) -> str:
        """SHA-256 over the name and size of every file; the pixels of each image are digested in its record."""
        digest = hashlib.sha256()
        root = existing(self.root)
        for path, label in self._files():
            digest.update(f"{path.relative_to(root)}\x1f{path.stat().st_size}\x1f{label}\n".encode())
        return digest.hexdigest()

    def open(self) -> Images:
        """The images, read when they are needed; an id is the path below the root."""
        files, root = self._files(), existing(self.root)
        first = self._fitted(self._decoded(files[0][0]).size)

        def decode(row: int) -> Image.Image:
            path = files[row][0]
            image = self._decoded(path)
            if self._fitted(image.size) != first:
                pair = " and ".join(f"{width}x{height}" for width, height in (first, self._fitted(image.size)))
                raise ValueError(f"images of {self.name} differ in size, {pair} at {path}; give crop")
            return image

        def read(rows: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
            with ThreadPoolExecutor(self.threads) as pool:
                images = list(pool.map(lambda row: self._fit(decode(row)), rows))
            return torch.stack(images), torch.tensor([files[row][1] for row in rows])

        ids = [path.relative_to(root).as_posix() for path, _ in files]
        return Images(ids, read, decode, self._fit, [label for _, label in files])

    def _files(self) -> list[tuple[Path, int]]:
        root = existing(self.root)
        if not root.is_dir():
            raise ValueError(f"{self.root} is not a folder")
        there = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
        names = self.folders or tuple(there)
        if len(set(names)) < len(names):
            raise ValueError(f"folders of {self.name} names one twice; name each once, in the order of the classes")
        found = []
        for label, name in enumerate(names):
            folder = root / name
            if not folder.is_dir() or folder.resolve().parent != root.resolve():
                raise ValueError(f"{self.root} has no folder of class {name}")
            found += [(path, label) for path in sorted(folder.iterdir()) if _is_image(path)]
        if not found:
            raise ValueError(f"{self.root} is empty: it holds no image in a folder of a class")
        return found

    def _decoded(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as file:
                deep, image = file.mode[0] in "IF", file.convert(self.mode)
        except Exception as error:  # whatever a damaged file makes the decoder raise
            raise ValueError(f"{path} is not a readable image: {error}") from error
        if deep:
            raise ValueError(f"{path} has more than 8 bits a channel, which would be cut off; convert it to 8 bits")
        width, height = self._resized(image.size)
        if self.crop and min(width, height) < self.crop:
            raise ValueError(f"{path} is {width}x{height}, too small for a crop of {self.crop}")
        return image

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        if not self.resize:
            return size
        width, height = (int(self.resize * side / min(size)) for side in size)
        return width, height

    def _fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        return (self.crop, self.crop) if self.crop else self._resized(size)

    def _fit(self, image: Image.Image) -> Float[Tensor, "c h w"]:
        if self.resize:
            image = image.resize(self._resized(image.size), Image.Resampling.BILINEAR)
        if self.crop:
            left, top = (round((side - self.crop) / 2) for side in image.size)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        return tensor_of(image)


class Arrays(Dataset):
    """Images and labels in numpy files, mapped into memory and never read whole.

    Arguments:
        file: An npz file with arrays `images` and `labels`; or
        images: an npy file of shape (n, h, w), (n, h, w, c) or (n, c, h, w), uint8 or floats in [0, 1], and
        labels: an npy file of integers, of shape (n,).
        layout: Where the channels are.
    """

    kind: Literal["arrays"] = "arrays"
    file: DataLocation | None = None
    images: DataLocation | None = None
    labels: DataLocation | None = None
    layout: Literal["nhwc", "nchw"] = "nhwc"

    @model_validator(mode="after")
    def _either(self) -> "Arrays":
        if bool(self.file) == bool(self.images) or bool(self.images) != bool(self.labels):
            raise ValueError("give either file (an npz) or both images and labels (npy)")
        return self

    def contents(self) -> str:
        """SHA-256 of the files."""
        named = [name for name in (self.file, self.images, self.labels) if name]
        return ":".join(sha256(existing(name)) for name in named)

    def open(self) -> Images:
        """The arrays; an id is the position."""
        if self.file:
            images, labels = (_member(existing(self.file), name) for name in ("images", "labels"))
        else:
            images, labels = (_mapped(existing(name)) for name in (self.images or "", self.labels or ""))
        name = self.file or self.images
        if images.ndim not in (3, 4) or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{name}: images of shape {images.shape} and labels of shape {labels.shape}, {labels.dtype}; "
                "needed are (n, h, w[, c]) and n integers"
            )
        if images.dtype != np.uint8 and (images.dtype.kind != "f" or images.dtype.itemsize > 8):
            raise ValueError(f"{name}: images are {images.dtype}; needed are uint8, or floats in [0, 1]")
        if labels.size and not (labels.min() >= -1 and labels.max() < 2**31):
            ends = f"{labels.min()} to {labels.max()}"
            raise ValueError(f"{name}: labels go from {ends}; needed are 0, 1, ... and -1 for none")

        def read(rows: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
            chosen = np.stack([images[row] for row in rows]).astype(images.dtype.newbyteorder("="), copy=False)
            pixels = torch.from_numpy(chosen[..., None] if chosen.ndim == 3 else chosen)
            pixels = pixels if self.layout == "nchw" and chosen.ndim == 4 else pixels.permute(0, 3, 1, 2)
            scaled = _scaled(pixels)
            if not bool(((scaled >= 0) & (scaled <= 1)).all()):
                raise ValueError(f"{name}: pixels are outside [0, 1], as in image {rows[0]} or after it; rescale them")
            return scaled, torch.from_numpy(np.array([int(labels[row]) for row in rows]))

        return Images([f"{row:06d}" for row in range(len(images))], read, labels=labels.tolist())


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.name[0] != "."


def _scaled(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], float32."""
    scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    return scaled.contiguous()


def _mapped(path: Path) -> np.ndarray:
    """An npy file, mapped; no pickle is ever run."""
    if not path.is_file() or zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an npy file; an npz goes under file:")
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not an npy file that can be mapped: {error}") from error
    return array


def _member(path: Path, name: str) -> np.ndarray:
    """An array of an npz file: mapped where it is stored as it is, else read."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                with np.load(path, allow_pickle=False) as arrays:
                    found: np.ndarray = arrays[name]
                return found
            file.seek(member.header_offset + 26)
            lengths = file.read(4)  # of the name and the extra field of the local header
            file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), 1)
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(file)
            if dtype.hasobject:
                raise ValueError(f"{name} holds Python objects")
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            order: Literal["F", "C"] = "F" if fortran else "C"
            return np.ndarray(shape, dtype, buffer=whole, offset=file.tell(), order=order)
    except KeyError:
        raise ValueError(f"{path} has no array {name!r}") from None
    except Exception as error:  # whatever a damaged file makes zipfile and numpy raise
        raise ValueError(f"{path} is not a readable npz file: {error}") from error
