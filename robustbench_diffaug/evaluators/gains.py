"""Gains: what a checkpoint has more than another over the same images, as the field `gains` of a suite names them."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from robustbench_diffaug.component import Options, suggest
from robustbench_diffaug.records import Metric, Records

__all__ = ["compared", "require"]


def require(gains: Options, checkpoints: Sequence[str]) -> None:
    """Finds that all that gains compare are checkpoints of the bench.

    Arguments:
        gains: Checkpoints and the one each is compared with, `resnet+diffaug: resnet`.
        checkpoints: The ids of the bench's.

    Raises:
        ValueError: If one is not.
    """
    for id in (str(id) for pair in gains for id in pair):
        if id not in checkpoints:
            raise ValueError(f"gains names checkpoint {id!r}{suggest(id, list(checkpoints))}")


def compared(
    gains: Options, records: Callable[[str], Records], figures: Callable[[Records, Records], Iterable[Metric]]
) -> Iterator[tuple[str, Metric]]:
    """The figures of each pair, by the id of the first: what `Evaluator.compare` gives.

    Arguments:
        gains: As in `require`.
        records: Reads those of one checkpoint.
        figures: Of the records of a checkpoint and of the one it is compared with.
    """
    for id, base in gains:
        for figure in figures(records(str(id)), records(str(base))):
            yield str(id), figure
