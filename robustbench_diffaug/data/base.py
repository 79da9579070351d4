"""The family of datasets: named images with labels, of which a suite may declare a subset."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from robustbench_diffaug.component import Component, fingerprint
from robustbench_diffaug.records import Declared

__all__ = ["BadImage", "Dataset", "Images", "in_memory", "tensor_of", "undecodable"]

Read = Callable[[Sequence[int]], tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]]
Decode = Callable[[int], Image]
Fit = Callable[[Image], Float[Tensor, "c h w"]]


class BadImage(ValueError):
    """One image that cannot be decoded; the message names its file or its position."""


@dataclass(frozen=True)
class Images:
    """An opened dataset, whole.

    Arguments:
        ids: A stable name of each image.
        read: Images in [0, 1] and labels at some positions.
        decode: The image at a position as it lies on disk, for crops of a trainer's own. It refuses, by the name of
            the file, all that cannot be read or fitted.
        fit: The dataset's own resize and crop of it; `read` is `fit(decode(row))`. Given where `decode` is.
        labels: Of all images, where they are known without reading any. Given where `decode` is.
    """

    ids: Sequence[str]
    read: Read
    decode: Decode | None = None
    fit: Fit | None = None
    labels: Sequence[int] | None = None


def undecodable(source: Images, rows: Sequence[int]) -> dict[int, str]:
    """Those of some images that cannot be decoded alone, by position, and why."""
    found = {}
    for row in rows:
        try:
            source.read([row])
        except BadImage as error:
            found[row] = " ".join(str(error).split())
    return found


def tensor_of(image: Image) -> Float[Tensor, "c h w"]:
    """An image of 8 bits a channel as a tensor in [0, 1]."""
    pixels = torch.from_numpy(np.array(image).reshape(image.height, image.width, -1)).permute(2, 0, 1)
    return (pixels.float() / 255).contiguous()


def in_memory(ids: Sequence[str], images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> Images:
    """Images that are held as tensors."""

    def read(rows: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
        index = torch.as_tensor(list(rows))
        return images[index], labels[index]

    return Images(ids, read, labels=labels.tolist())


class Dataset(Component, ABC):
    """Named images with labels.

    Arguments:
        name: Shown in reports, and part of the key of every noise draw.
        group: What metrics group by; the name where it is left out.
        origin: The dataset whose images these are versions of, so that intervals count an image once.
        severity: Of a corruption, 1 to 5; 0 for none.
        every: Takes each `every`-th image, from the first.
        limit: At most so many of them.
        on_bad_image: What becomes of an image that cannot be decoded: 'fail' makes the cell fail, 'skip' leaves the
            image out and records that.
        class_space: Whether predictions are among the classes that `covers` names ('subset') or all ('full').
    """

    family: ClassVar[str] = "robustbench_diffaug.datasets"
    name: str = Field(min_length=1)
    group: str = ""
    origin: str = ""
    severity: NonNegativeInt = Field(0, le=5)
    every: PositiveInt = 1
    limit: PositiveInt | None = None
    on_bad_image: Literal["fail", "skip"] = "fail"
    class_space: Literal["subset", "full"] = "subset"

    def covers(self) -> tuple[int, ...]:
        """The classes that its images can be of, increasing, where they are not all. Default: all, named by ()."""
        return ()

    def parts(self) -> tuple["Dataset", ...]:
        """The datasets that an entry stands for. Default: itself; a grid of corruptions has many."""
        return (self,)

    def population(self) -> int:
        """The number of images that the subset is one of. Default: all that `open` gives."""
        return self.available()

    @abstractmethod
    def contents(self) -> str:
        """A digest of the data."""

    @abstractmethod
    def open(self) -> Images:
        """The whole dataset, before the subset is taken.

        Raises:
            ValueError: If the files are not there or not of the right form.
        """

    @final
    def opened(self) -> Images:
        """What `open` gives, opened once per process."""
        return _opened(self, fingerprint(self))

    @final
    def available(self) -> int:
        """The number of images before the subset is taken."""
        return len(self.opened().ids)

    @final
    def rows(self) -> range:
        """The positions of the declared subset."""
        rows = range(0, self.available(), self.every)
        return rows if self.limit is None else rows[: self.limit]

    @final
    def first(self) -> Float[Tensor, "c h w"]:
        """The first image of the declared subset; where damaged ones are left out, the first that is not.

        Raises:
            ValueError: If there is none; a `BadImage` that names the first damaged one where there are only such.
        """
        damaged: BadImage | None = None
        for row in self.rows():
            try:
                return self.opened().read([row])[0][0]
            except BadImage as error:
                if self.on_bad_image == "fail":
                    raise
                damaged = damaged or error
        raise BadImage(f"no image of {self.name} can be decoded: {damaged or 'it has none'}")

    @final
    def declared(self) -> Declared:
        """What records say of it."""
        origin, group = self.origin or self.name, self.group or self.name
        counts = len(self.rows()), self.population()
        return Declared(self.name, origin, group, self.severity, *counts, len(self.covers()), self.class_space)


@lru_cache(maxsize=32)
def _opened(dataset: Dataset, identity: str) -> Images:  # identity: changed files are opened anew
    return dataset.open()
