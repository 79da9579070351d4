"""The family of evaluators: four pure functions; the engine owns every loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Shaped

from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Component
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.diffusion.base import Denoiser
from robustbench_diffaug.outcomes import Basis, Key
from robustbench_diffaug.records import Metric, Picture, Records

__all__ = ["Evaluator", "Forwards"]


class Forwards(NamedTuple):
    """Network forwards per sample.

    Arguments:
        denoiser: Made once, whatever the number of checkpoints.
        classifier: Of each checkpoint.
        backward: Backward passes through the denoiser, made once.
        own: Forwards of the denoiser that each checkpoint makes anew.
        own_backward: Backward passes through the denoiser of each checkpoint.
    """

    denoiser: int
    classifier: int
    backward: int = 0
    own: int = 0
    own_backward: int = 0

    def of(self, samples: int, checkpoints: int) -> "Passes":
        """All passes of some samples."""
        return Passes(
            samples * (self.denoiser + self.own * checkpoints),
            samples * self.classifier * checkpoints,
            samples * (self.backward + self.own_backward * checkpoints),
        )


class Passes(NamedTuple):
    """Passes through networks, of all samples and checkpoints together.

    Arguments:
        denoiser: Forwards.
        classifier: Forwards.
        backward: Backward passes through the denoiser.
    """

    denoiser: int
    classifier: int
    backward: int


class Evaluator(Component, ABC):
    """What to show to checkpoints, what to keep of their answers, and the figures that follow.

    A subclass has fields, no state, and may replace `views`, `record`, `constants`, `compare`, `outcomes`, `notices`,
    `pictures`, `forwards`, `denoisers`, `check`, `fits`, `needs_gradient` and `needs_layers`.
    """

    family: ClassVar[str] = "robustbench_diffaug.evaluators"
    needs: ClassVar[Literal["classifier", "denoiser"]] = "classifier"
    """What it analyses: checkpoints that classify, or those of kind `denoiser`."""
    unclamped: ClassVar[bool] = False
    """Whether the denoisers that it analyses must not clamp their output, which would zero rows of a Jacobian."""
    heavy: ClassVar[tuple[str, ...]] = ()
    """Columns that are too large to be held: `metrics` reads them by `Records.chunks`."""

    @property
    def needs_gradient(self) -> bool:
        """Whether it takes gradients of classifiers. Default: it does not."""
        return False

    @property
    def needs_layers(self) -> bool:
        """Whether it looks at the last layer of classifiers. Default: it does not."""
        return False

    def views(self, batch: Batch) -> Iterator[View]:
        """Images to show, the same for every checkpoint. Default: the batch itself."""
        yield View("clean", batch.images[:, None])

    @abstractmethod
    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        """What one checkpoint makes of one view; gradients may be enabled inside."""

    def record(self, seen: Mapping[str, Sequence[Columns]], batch: Batch) -> Columns:
        """The rows to keep, from all observations of a batch by view name. Default: the only observation."""
        ((only,),) = seen.values()
        return only

    def constants(self, model: Model) -> Mapping[str, Shaped[np.ndarray, "..."]]:
        """Arrays of the checkpoint itself that `metrics` needs, kept beside its records. Default: none.

        It is asked for after the network has looked at images.
        """
        return {}

    @abstractmethod
    def metrics(self, records: Records) -> Iterable[Metric]:
        """Figures with intervals, from all records of one checkpoint on all datasets of a bench."""

    def compare(self, checkpoints: Sequence[str], records: Callable[[str], Records]) -> Iterable[tuple[str, Metric]]:
        """Figures of a checkpoint that need the records of another, as (id, metric). Default: there are none.

        Arguments:
            checkpoints: The ids of the bench's.
            records: Reads those of one checkpoint.
        """
        return ()

    def outcomes(self, records: Records) -> Mapping[Key, Basis]:
        """What figures rest on, by metric and group, so that checkpoints can be tested in pairs. Default: nothing.

        The mean of each is the value that `metrics` gives.

        Arguments:
            records: All of one checkpoint, of at least one row.
        """
        return {}

    def notices(self, records: Records) -> Iterable[str]:
        """What a reader must know of one checkpoint's figures. Default: nothing."""
        return ()

    def pictures(self, records: Records) -> Iterable[Picture]:
        """What there is to see in one checkpoint's records. Default: nothing."""
        return ()

    def forwards(self) -> Forwards:
        """What a sample costs. Default: one forward of each checkpoint."""
        return Forwards(0, 1)

    def denoisers(self) -> tuple[Denoiser, ...]:
        """The denoisers it uses. Default: none."""
        return ()

    def check(self) -> tuple[str, ...]:
        """Looks at settings that need files or other fields; returns warnings. Default: nothing to look at.

        Raises:
            ValueError: If the evaluator cannot run so.
        """
        return ()

    def fits(self, datasets: Sequence[Dataset], checkpoints: Sequence[str]) -> None:
        """Looks at whether a bench's datasets (grids expanded) and checkpoint ids are what it needs. Default: they are.

        Raises:
            ValueError: If they are not.
        """
        return
