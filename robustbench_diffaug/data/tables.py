"""Images in tables: Parquet shards, and data sets that Hugging Face's `datasets` saved to disk."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, PositiveInt

from robustbench_diffaug.component import Outside
from robustbench_diffaug.data.base import BadImage, Dataset, Images
from robustbench_diffaug.data.image_files import Geometry, opened
from robustbench_diffaug.data.lists import Below
from robustbench_diffaug.data.shards import Columns, Group, files, groups
from robustbench_diffaug.files import DataLocation, existing

__all__ = ["Table"]

HELD = 2**28
"""About how many bytes of images are held, encoded; at least one group of rows is. No result depends on it."""

ENDS = 2**16
"""Bytes at either end of a file that its digest covers; they hold the schema and a Parquet file's index."""


class Table(Dataset):
    """Encoded images and labels in Parquet files, or in a folder that `datasets` wrote by `save_to_disk`.

    Arguments:
        root: A Parquet file, a folder of them, or a folder of `save_to_disk`.
        split: Such as 'test', where the root holds several.
        image: The column of images: binary, or structs of `bytes` and of `path` (below the root) where these are null.
        label: The column of labels, integers; null for images without labels.
        mode: 'RGB' or 'L' (grey).
        resize: The shorter side, in pixels, before the crop; bilinear.
        crop: Height and width of the crop from the centre; left out, all images must be of one size.

    References:
        Datasets: A Community Library for Natural Language Processing (Lhoest et al., 2021),
        https://arxiv.org/abs/2109.02846; the folders: https://huggingface.co/docs/datasets/process#save
    """

    kind: Literal["table"] = "table"
    root: DataLocation
    split: str = ""
    image: str = "image"
    label: str | None = "label"
    mode: Literal["RGB", "L"] = "RGB"
    resize: PositiveInt | None = None
    crop: PositiveInt | None = None
    threads: Annotated[int, Field(ge=1), Outside] = 4

    def contents(self) -> str:
        """SHA-256 over the labels and each file's name, size and ends, 64 KiB at either; the whole may be 150 GB.

        The pixels of each image are digested in its record.
        """
        digest = hashlib.sha256()
        for path in files(existing(self.root), self.split):
            digest.update(f"{path.name}\x1f{path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(ENDS))
                file.seek(max(0, path.stat().st_size - ENDS))
                digest.update(file.read(ENDS))
            for group in groups(path, Columns(self.image, self.label)):
                digest.update(group.labels.tobytes())
        return digest.hexdigest()

    def open(self) -> Images:
        """The images, read when they are needed; an id is the position in the files, in the order of their names.

        Raises:
            ValueError: If files are missing or damaged, or have no such columns.
        """
        found = files(existing(self.root), self.split)
        parts = [group for path in found for group in groups(path, Columns(self.image, self.label))]
        cells = _Cells(self.name, parts, existing(self.root))
        if not cells.labels:
            raise ValueError(f"{self.root} is empty")
        return opened(self.name, cells, Geometry(self.mode, self.resize, self.crop), self.threads)


class _Cells:
    """The encoded images by position, some groups of rows held."""

    def __init__(self, name: str, parts: Sequence[Group], root: Path) -> None:
        self.name, self.below = name, Below(root if root.is_dir() else root.parent)
        self.labels = [label for part in parts for label in part.labels.tolist()]
        self.ids = [f"{row:06d}" for row in range(len(self.labels))]
        self.starts = np.cumsum([0, *(len(part.labels) for part in parts)])
        largest = max((part.size for part in parts), default=0)
        held = max(1, min(64, HELD // max(1, largest)))
        self.column = lru_cache(held)(lambda number: parts[number].load())
        self.reading = Lock()  # one thread at a time: several would each load the same group

    def __getitem__(self, row: int) -> tuple[Path | bytes, str]:
        """The bytes of an image, or the file that they are in, and what messages call it."""
        number = int(np.searchsorted(self.starts, row, "right")) - 1
        try:
            with self.reading:
                value = self.column(number)[row - int(self.starts[number])].as_py()
        except UnicodeDecodeError as error:
            raise BadImage(f"image {row:06d} of {self.name} has a path that is no text") from error
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        called = f"image {row:06d} of {self.name}" + (f" ({path[:200]!r})" if path else "")
        if content is not None:
            return content, called
        if not path:
            raise BadImage(f"{called} is null")
        try:
            with self.reading:  # `Below` remembers folders
                return self.below[path], called
        except ValueError as error:
            raise ValueError(f"{called} {error}") from error
