"""Any dataset under on-the-fly corruptions, one at a time or as a grid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from jaxtyping import Float, Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.component import Outside
from robustbench_diffaug.data import corruptions, frost
from robustbench_diffaug.data.base import Dataset, Images
from robustbench_diffaug.data.grids import Grid, Severity
from robustbench_diffaug.files import DataLocation, existing

__all__ = ["Constants", "Corrupted", "Corruptions", "keys"]

Constants = Literal["imagenet-c", "cifar-c"]


def keys(draw: int, corruption: str, severity: int, ids: Sequence[str]) -> list[int]:
    """The key of each image's random stream.

    Arguments:
        draw: Another number gives other streams.
        corruption: Its name.
        severity: 1 to 5.
        ids: Of the images.
    """
    return [rng.key("corruption", draw, corruption, severity, id) for id in ids]


def _agree(base: Dataset, on_bad_image: str, class_space: str) -> None:
    """Refuses a base that says otherwise of what is decided for the whole: only the outer entry is looked at."""
    for key, inner, outer, usual in (
        ("on_bad_image", base.on_bad_image, on_bad_image, "fail"),
        ("class_space", base.class_space, class_space, "subset"),
    ):
        if inner not in (outer, usual):
            raise ValueError(f"base says {key}: {inner}, which has no effect there; write it beside base")


class Corrupted(Dataset):
    """The images of another dataset under one corruption, each from a random stream of its own.

    Arguments:
        base: The dataset that is corrupted; its declared subset counts.
        corruption: Such as 'fog'.
        severity: 1 to 5.
        constants: The published table of strengths: 'imagenet-c' or 'cifar-c'.
        draw: Another number gives other random streams.
        textures: The folder of the official textures of frost, frost1.png to frost5.jpg; without it they are drawn.
            Records depend on it where the corruption is frost.

    References:
        Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
        2019), https://arxiv.org/abs/1903.12261
    """

    kind: Literal["corrupted"] = "corrupted"
    base: Dataset
    corruption: str
    severity: Severity = 5
    constants: Constants
    draw: int = 0
    textures: Annotated[DataLocation | None, Outside] = None

    _check_name = field_validator("corruption")(corruptions.known)

    @model_validator(mode="after")
    def _agreed(self) -> "Corrupted":
        _agree(self.base, self.on_bad_image, self.class_space)
        return self

    def covers(self) -> tuple[int, ...]:
        """The base's."""
        return self.base.covers()

    def population(self) -> int:
        """The base's."""
        return self.base.population()

    def contents(self) -> str:
        """The base's; with that of the textures, where they are used."""
        folder = self._textures()
        return self.base.contents() + (f":{frost.digest(folder)}" if folder else "")

    def open(self) -> Images:
        """The base's declared subset, corrupted when it is read."""
        source, rows = self.base.opened(), self.base.rows()
        ids = [source.ids[row] for row in rows]

        def read(chosen: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
            images, labels = source.read([rows[row] for row in chosen])
            streams = keys(self.draw, self.corruption, self.severity, [ids[row] for row in chosen])
            strength = (self.corruption, self.severity, self.constants)
            return corruptions.corrupt(images, *strength, streams, self._textures()), labels

        return Images(ids, read)

    def _textures(self) -> Path | None:
        return existing(self.textures) if self.textures and self.corruption == "frost" else None


class Corruptions(Grid):
    """A grid of corruptions of one dataset: one entry, a dataset for each corruption and severity.

    Arguments:
        base: The dataset that is corrupted; its declared subset counts.
        corruptions: Their names.
        severities: 1 to 5.
        constants: The published table of strengths: 'imagenet-c' or 'cifar-c'.
        draw: Another number gives other random streams.
        textures: The folder of the official textures of frost; without it they are drawn.
    """

    kind: Literal["corruptions"] = "corruptions"
    name: str = ""
    base: Dataset
    corruptions: tuple[str, ...] = Field(min_length=1)
    severities: tuple[Severity, ...] = Field((5,), min_length=1)
    constants: Constants
    draw: int = 0
    textures: Annotated[DataLocation | None, Outside] = None

    @model_validator(mode="after")
    def _agreed(self) -> "Corruptions":
        _agree(self.base, self.on_bad_image, self.class_space)
        return self

    def part(self, corruption: str, severity: int) -> Corrupted:
        """One `corrupted` dataset."""
        origin = self.base.origin or self.base.name
        return Corrupted.model_validate(
            self.common(corruption, severity, self.name or self.base.name, origin)
            | {name: getattr(self, name) for name in ("base", "constants", "draw", "textures")}
            | {"corruption": corruption}
        )

    def contents(self) -> str:
        """The base's; with that of the textures, where they are used."""
        folder = existing(self.textures) if self.textures and "frost" in self.corruptions else None
        return self.base.contents() + (f":{frost.digest(folder)}" if folder else "")
