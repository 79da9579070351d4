"""Images from files of the user's: a folder of images by class, and arrays of numpy."""

import mmap
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from robustbench_diffaug.component import Outside
from robustbench_diffaug.data.base import Dataset, Images
from robustbench_diffaug.data.image_files import Geometry, Listing, class_folders, listed, opened
from robustbench_diffaug.files import DataLocation, existing, sha256

__all__ = ["Arrays", "Folder"]


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
        return self._listing().digest()

    def open(self) -> Images:
        """The images, read when they are needed; an id is the path below the root."""
        return opened(self.name, self._listing(), Geometry(self.mode, self.resize, self.crop), self.threads)

    def _listing(self) -> Listing:
        root = existing(self.root)
        names = self.folders or class_folders(root, self.root)
        if len(set(names)) < len(names):
            raise ValueError(f"folders of {self.name} names one twice; name each once, in the order of the classes")
        found = [(path, label) for label, name in enumerate(names) for path in listed(root, name)]
        if not found:
            raise ValueError(f"{self.root} is empty: it holds no image in a folder of a class")
        paths = [path for path, _ in found]
        return Listing(root, paths, [label for _, label in found], paths)


class Arrays(Dataset):
    """Images and labels in numpy files, mapped into memory and never read whole.

    Arguments:
        file: An npz file with arrays `images` and `labels`; or
        images: an npy file of shape (n, h, w), (n, h, w, c) or (n, c, h, w), uint8 or floats in [0, 1], and
        labels: an npy file of integers, of shape (n,).
        layout: Where the channels are.
    """

    kind: Literal["arrays"] = "arrays"
    file: Annotated[DataLocation | None, Outside] = None
    images: Annotated[DataLocation | None, Outside] = None
    labels: Annotated[DataLocation | None, Outside] = None
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
    except Exception as error:  # whatever a damaged or hostile header makes numpy raise
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
