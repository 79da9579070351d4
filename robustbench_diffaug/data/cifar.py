"""CIFAR-10 and CIFAR-100 as they are published, and CIFAR-10-C and CIFAR-100-C."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt8
from pydantic import field_validator
from torch import Tensor

from robustbench_diffaug.data import plain_pickle
from robustbench_diffaug.data.base import Dataset, Images
from robustbench_diffaug.data.corruptions import known
from robustbench_diffaug.data.grids import Grid, Severity
from robustbench_diffaug.files import DataLocation, existing, sha256

__all__ = ["Cifar", "CifarC", "CifarCPart"]

PIXELS = 3 * 32 * 32
ARCHIVES = {10: ("cifar-10-batches-bin", "cifar-10-batches-py"), 100: ("cifar-100-binary", "cifar-100-python")}
"""The folders in the published archives, by the number of classes: of the binary and of the Python version."""

Records = tuple[UInt8[np.ndarray, "n 3 32 32"], Integer[np.ndarray, " n"]]


class Cifar(Dataset):
    """CIFAR-10 or CIFAR-100, in the binary or the Python version, whichever is there.

    Arguments:
        root: The unpacked folder, or the one above it. Where both versions are there, the binary one is read.
        classes: 10, or 100 (the fine classes).
        split: 'train' or 'test'.

    References:
        Learning Multiple Layers of Features from Tiny Images (Krizhevsky, 2009),
        https://www.cs.toronto.edu/~kriz/cifar.html
    """

    kind: Literal["cifar"] = "cifar"
    root: DataLocation
    classes: Literal[10, 100] = 10
    split: Literal["train", "test"] = "test"

    def contents(self) -> str:
        """SHA-256 of the files."""
        return ":".join(sha256(path) for path in self._files())

    def open(self) -> Images:
        """The images; an id is the position in the published order, through all the batches.

        Raises:
            ValueError: If files are not there, or not of the published form; no pickle is ever run.
        """
        read = _binary if self._files()[0].suffix else _python
        batches = [read(path, self.classes) for path in self._files()]
        for path, (pixels, labels) in zip(self._files(), batches, strict=True):
            if len(pixels) != len(batches[0][0]):
                counts = f"{len(batches[0][0])} and {len(pixels)} images"
                raise ValueError(f"{self._files()[0]} and {path} have {counts}, where batches are equal; get it anew")
            if labels.size and not 0 <= labels.min() <= labels.max() < self.classes:
                ends = f"{labels.min()} to {labels.max()}"
                raise ValueError(f"{path}: labels go from {ends}, of {self.classes} classes; it is damaged")
        return _images([pixels for pixels, _ in batches], np.concatenate([labels for _, labels in batches]))

    def _files(self) -> list[Path]:
        """The files of the split, in the published order."""
        root = existing(self.root)
        ten = [f"data_batch_{number}" for number in range(1, 6)] if self.split == "train" else ["test_batch"]
        names = ten if self.classes == 10 else [self.split]
        for suffix, folder in zip((".bin", ""), ARCHIVES[self.classes], strict=True):
            for place in (root, root / folder):
                paths = [place / f"{name}{suffix}" for name in names]
                there = [path for path in paths if path.is_file()]
                if there == paths:
                    return paths
                if there:
                    missing = next(path for path in paths if path not in there)
                    raise ValueError(f"there is no {missing}, but {there[0].name} is; unpack the archive again")
        archives = " or ".join(ARCHIVES[self.classes])
        raise ValueError(
            f"{self.root} holds no {self.split} split of CIFAR-{self.classes}: needed is {names[0]}.bin or {names[0]}, "
            f"there or in {archives}; unpack the archive, or change classes"
        )


def _binary(path: Path, classes: int) -> Records:
    """A batch of the binary version, mapped: records of one label (two, coarse and fine, of 100 classes) and pixels."""
    head = 1 if classes == 10 else 2
    size = path.stat().st_size
    if not size or size % (head + PIXELS):
        raise ValueError(
            f"{path} has {size} bytes, which are no whole records of {head + PIXELS}; it is cut off, or not of "
            f"CIFAR-{classes}"
        )
    records = np.memmap(path, np.uint8, "r").reshape(-1, head + PIXELS)
    return records[:, head:].reshape(-1, 3, 32, 32), records[:, head - 1].astype(np.int64)


def _python(path: Path, classes: int) -> Records:
    """A batch of the Python version, mapped, by a reader that cannot run code."""
    found = plain_pickle.read(path)
    key = "labels" if classes == 10 else "fine_labels"
    pixels, labels = found.get("data"), found.get(key)
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list):
        raise ValueError(
            f"{path} has no data and {key}; it has {', '.join(repr(name[:40]) for name in sorted(found)[:9])}"
        )
    if pixels.shape != (len(labels), PIXELS) or not labels:
        raise ValueError(f"{path}: data of shape {pixels.shape} and {len(labels)} labels; needed are (n, 3072) and n")
    if not all(type(label) is int and -1 <= label < 2**31 for label in labels):
        raise ValueError(f"{path}: {key} are not all integers of 0 and more")
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _images(batches: Sequence[np.ndarray], labels: Integer[np.ndarray, " n"]) -> Images:
    """Images of 8 bits in arrays (n, c, h, w) of equal length."""
    size = len(batches[0])

    def read(rows: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
        levels = np.stack([batches[row // size][row % size] for row in rows])
        return torch.from_numpy(levels).float() / 255, torch.from_numpy(labels[list(rows)].astype(np.int64))

    return Images([f"{row:06d}" for row in range(len(labels))], read, labels=labels.tolist())


class CifarCPart(Dataset):
    """One corruption at one severity of CIFAR-10-C, CIFAR-100-C or a copy in their form; `cifar-c` is the whole grid.

    Arguments:
        root: The folder of `<corruption>.npy` and `labels.npy`.
        corruption: Such as 'fog'.
        severity: 1 to 5.
    """

    kind: Literal["cifar-c-part"] = "cifar-c-part"
    root: DataLocation
    corruption: str
    severity: Severity = 5

    @field_validator("corruption")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return known(name)

    def contents(self) -> str:
        """SHA-256 of the file of the corruption, whatever the severity, and of the labels."""
        return ":".join(sha256(existing(f"{self.root}/{name}.npy")) for name in (self.corruption, "labels"))

    def open(self) -> Images:
        """The images of the severity, mapped; an id is the position in the test set.

        Raises:
            ValueError: If the arrays are not there, or not of the published form.
        """
        images, labels = (_mapped(existing(f"{self.root}/{name}.npy")) for name in (self.corruption, "labels"))
        place, beside = f"{self.root}/{self.corruption}.npy", f"{self.root}/labels.npy"
        if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8:
            raise ValueError(f"{place} has shape {images.shape}, {images.dtype}; needed is (5 n, 32, 32, 3), uint8")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"{beside} has shape {labels.shape}, {labels.dtype}; needed are 5 n integers")
        count = len(labels) // 5
        if not count or len(labels) % 5 or not (labels.reshape(5, -1) == labels[:count]).all():
            raise ValueError(f"{beside} has {len(labels)} labels; needed are the same n, 5 times over")
        if len(images) != len(labels):
            raise ValueError(
                f"{place} has {len(images)} images and labels.npy {len(labels)} labels; needed are 5 n each"
            )
        if not -1 <= labels.min() <= labels.max() < 2**31:
            raise ValueError(f"{beside} goes from {labels.min()} to {labels.max()}; needed are classes")
        block = slice((self.severity - 1) * count, self.severity * count)
        return _images([images[block].transpose(0, 3, 1, 2)], np.array(labels[block], np.int64))


class CifarC(Grid):
    """CIFAR-10-C or CIFAR-100-C: one entry, a dataset for each corruption and severity.

    Arguments:
        root: The unpacked folder, of `<corruption>.npy` and `labels.npy`.
        corruptions: Their names; the 15 common ones where they are left out.
        severities: 1 to 5.
        origin: Write the name of the `cifar` test dataset where a bench has both, so that all versions of an image
            count as one; the name of the grid where it is left out.

    References:
        Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
        2019), https://arxiv.org/abs/1903.12261; the arrays: https://zenodo.org/records/2535967
    """

    kind: Literal["cifar-c"] = "cifar-c"
    root: DataLocation

    def part(self, corruption: str, severity: int) -> CifarCPart:
        """One `cifar-c-part`."""
        fields = self.common(corruption, severity, self.name, self.origin or self.name)
        return CifarCPart.model_validate(fields | {"root": self.root, "corruption": corruption})

    def contents(self) -> str:
        """SHA-256 of the files of the corruptions and of the labels."""
        return ":".join(sha256(existing(f"{self.root}/{name}.npy")) for name in (*self.corruptions, "labels"))


def _mapped(path: Path) -> np.ndarray:
    """An npy file, mapped once per process while it does not change."""
    status = path.stat()
    return _mapping(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _mapping(path: Path, modified: int, size: int) -> np.ndarray:
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":  # numpy would take it for an archive or a pickle
            raise ValueError(f"{path} is not an npy file")
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever a damaged or hostile header makes numpy raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a whole npy file that can be mapped: {reason}") from error
    return array
