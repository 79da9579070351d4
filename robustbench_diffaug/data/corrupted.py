"""Any dataset under on-the-fly corruptions, one at a time or as a grid."""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.component import suggest
from robustbench_diffaug.data import corruptions
from robustbench_diffaug.data.base import Dataset, Images

__all__ = ["Corrupted", "Corruptions"]

Constants = Literal["imagenet-c", "cifar-c"]


def _known(name: str) -> str:
    if name not in corruptions.NAMES:
        raise ValueError(f"no corruption is called {name!r}{suggest(name, list(corruptions.NAMES))}")
    return name


class Corrupted(Dataset):
    """The images of another dataset under one corruption, each from a random stream of its own.

    Arguments:
        base: The dataset that is corrupted; its declared subset counts.
        corruption: Such as 'fog'.
        severity: 1 to 5.
        constants: The published table of strengths: 'imagenet-c' or 'cifar-c'.
        draw: Another number gives other random streams.

    References:
        Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
        2019), https://arxiv.org/abs/1903.12261
    """

    kind: Literal["corrupted"] = "corrupted"
    base: Dataset
    corruption: str
    severity: int = Field(5, ge=1, le=5)
    constants: Constants
    draw: int = 0

    _check_name = field_validator("corruption")(_known)

    def population(self) -> int:
        """The base's."""
        return self.base.population()

    def contents(self) -> str:
        """The base's."""
        return self.base.contents()

    def open(self) -> Images:
        """The base's declared subset, corrupted when it is read."""
        source, rows = self.base.opened(), self.base.rows()
        ids = [source.ids[row] for row in rows]

        def read(chosen: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
            images, labels = source.read([rows[row] for row in chosen])
            keys = [rng.key("corruption", self.draw, self.corruption, self.severity, ids[row]) for row in chosen]
            return corruptions.corrupt(images, self.corruption, self.severity, self.constants, keys), labels

        return Images(ids, read)


class Corruptions(Dataset):
    """A grid of corruptions of one dataset: one entry, a dataset for each corruption and severity.

    Arguments:
        base: The dataset that is corrupted; its declared subset counts.
        corruptions: Their names.
        severities: 1 to 5.
        constants: The published table of strengths: 'imagenet-c' or 'cifar-c'.
        draw: Another number gives other random streams.
    """

    kind: Literal["corruptions"] = "corruptions"
    name: str = ""
    base: Dataset
    corruptions: tuple[str, ...] = Field(min_length=1)
    severities: tuple[int, ...] = Field((5,), min_length=1)
    constants: Constants
    draw: int = 0

    @field_validator("corruptions")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_known, names))

    def parts(self) -> tuple[Dataset, ...]:
        """One `corrupted` dataset for each corruption and severity."""
        return tuple(
            Corrupted(
                name=f"{self.name or self.base.name}/{corruption}@s{severity}",
                origin=self.base.origin or self.base.name,
                group=corruption,
                base=self.base,
                corruption=corruption,
                severity=severity,
                constants=self.constants,
                draw=self.draw,
                every=self.every,
                limit=self.limit,
            )
            for corruption in self.corruptions
            for severity in self.severities
        )

    def contents(self) -> str:
        """The base's."""
        return self.base.contents()

    def open(self) -> Images:
        """Not itself a dataset; its parts are."""
        raise ValueError(f"{self.name or self.base.name} is a grid; open its parts")
