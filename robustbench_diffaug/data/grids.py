"""A grid of corruptions: one entry of a suite that stands for a dataset of each corruption and severity."""

from abc import abstractmethod
from typing import Annotated, final

from pydantic import Field, field_validator

from robustbench_diffaug.data.base import Dataset, Images
from robustbench_diffaug.data.corruptions import COMMON, known

__all__ = ["Grid", "Severity"]

Severity = Annotated[int, Field(ge=1, le=5)]


class Grid(Dataset):
    """Versions of the same images, a dataset for each corruption and severity.

    Arguments:
        corruptions: Their names; the 15 of ImageNet-C where they are left out.
        severities: 1 to 5.
    """

    corruptions: tuple[str, ...] = Field(COMMON, min_length=1)
    severities: tuple[Severity, ...] = Field((1, 2, 3, 4, 5), min_length=1)

    @field_validator("corruptions")
    @classmethod
    def _check_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(known, names))

    @abstractmethod
    def part(self, corruption: str, severity: int) -> Dataset:
        """The dataset of one corruption at one severity, with the fields of `common`."""

    @final
    def parts(self) -> tuple[Dataset, ...]:
        """A dataset of each corruption at each severity."""
        return tuple(self.part(corruption, severity) for corruption in self.corruptions for severity in self.severities)

    @final
    def common(self, corruption: str, severity: int, whole: str, origin: str) -> dict[str, object]:
        """The fields that parts of every grid have: name, group, origin, and those of the grid itself.

        Arguments:
            corruption: Of the part; its group.
            severity: Of the part.
            whole: The name of the grid, in front of the part's.
            origin: The dataset whose images the parts are versions of.
        """
        kept = ("every", "limit", "on_bad_image", "class_space")
        named = {"name": f"{whole}/{corruption}@s{severity}", "group": corruption, "origin": origin}
        return {**named, "severity": severity, **{field: getattr(self, field) for field in kept}}

    def covers(self) -> tuple[int, ...]:
        """Those of any of its parts."""
        return self.part(self.corruptions[0], self.severities[0]).covers()

    def open(self) -> Images:
        """Not itself a dataset; its parts are.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{self.name or self.kind} is a grid; open its parts")
