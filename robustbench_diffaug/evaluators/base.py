"""The family of evaluators: four pure functions; the engine owns every loop."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Component
from robustbench_diffaug.diffusion.base import Denoiser
from robustbench_diffaug.records import Metric, Records

__all__ = ["Evaluator", "Forwards"]


class Forwards(NamedTuple):
    """Network forwards per sample.

    Arguments:
        denoiser: Made once, whatever the number of checkpoints.
        classifier: Of each checkpoint.
    """

    denoiser: int
    classifier: int


class Evaluator(Component, ABC):
    """What to show to checkpoints, what to keep of their answers, and the figures that follow.

    A subclass has fields, no state, and may replace `views`, `record`, `forwards`, `denoisers` and `check`.
    """

    family: ClassVar[str] = "robustbench_diffaug.evaluators"

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

    @abstractmethod
    def metrics(self, records: Records) -> Iterable[Metric]:
        """Figures with intervals, from all records of one checkpoint on all datasets of a bench."""

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
