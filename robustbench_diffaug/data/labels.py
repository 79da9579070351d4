"""Labels without images, for evaluators that make the images themselves."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor

from robustbench_diffaug.data.base import Dataset, Images

__all__ = ["Labels"]


class Labels(Dataset):
    """So many labels of each class, in turn; the images are blank (black), since there are none.

    Row `index` of class `label` has the id `<label>-<index>`, whatever the number of rows and classes, so that noise of
    a row is its own. The blank images say of what size images are to be.

    Arguments:
        classes: The number of classes.
        each: Rows of each class.
        size: Height and width of the images.
        channels: Of the images.
    """

    kind: Literal["labels"] = "labels"
    name: str = Field("labels", min_length=1)
    classes: PositiveInt = Field(le=100_000)
    each: PositiveInt = Field(le=100_000)
    size: PositiveInt = Field(le=4096)
    channels: PositiveInt = Field(1, le=16)

    def contents(self) -> str:
        """Nothing but the fields."""
        return "labels"

    def open(self) -> Images:
        """Blank images, made as they are read."""

        def read(rows: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
            blank = torch.zeros(len(rows), self.channels, self.size, self.size)
            return blank, torch.as_tensor(list(rows)) % self.classes

        pairs = (divmod(row, self.classes) for row in range(self.classes * self.each))
        return Images([f"{label}-{index}" for index, label in pairs], read)
