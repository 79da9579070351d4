"""A denoiser in a classifier's place, for what is analysed of denoisers themselves."""

from typing import ClassVar, Literal

from pydantic import PositiveInt
from torch import nn

from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.diffusion.base import Denoiser

__all__ = ["DenoiserCheckpoint"]


class DenoiserCheckpoint(Checkpoint):
    """A denoiser; it has no logits, so only evaluators that need a denoiser take it.

    Arguments:
        denoiser: The denoiser, with its own `microbatch`, `precision` and `clip`.
    """

    kind: Literal["denoiser"] = "denoiser"
    may_normalise: ClassVar[bool] = False
    classes: PositiveInt = 1
    denoiser: Denoiser

    def analysed(self) -> Denoiser:
        """The denoiser."""
        return self.denoiser

    def check(self) -> None:
        """Looks at its files."""
        self.denoiser.check()

    def load(self) -> nn.Module:
        """There is no classifier.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"{self.id} is a denoiser, which has no logits")
