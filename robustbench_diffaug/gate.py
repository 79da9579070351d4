"""Before hours of work: a look at what each classifier makes of a few clean images.

A classifier is looked at where records of it are missing, unless it is one of the bundled networks without
`expect_accuracy`, or wants more than an image. What it cannot be shown is left to the run itself, whose cell says so.

The images are `SHOWN` of the first clean labelled dataset of its benches (of all its images, not of the declared subset
alone), drawn without replacement by a key of the dataset's name. With k right of n:

- `expect_accuracy` p is contradicted where P(Binomial(n, p) <= k) < `ALPHA`. More right than expected never is.
- Without it, k is no better than chance where P(Binomial(n, 1/K) >= k) > `ALPHA`, K being the classes that a prediction
  can be of. Where even k = n would be (n too small), nothing is said.

So a sound checkpoint is stopped with a probability of at most `ALPHA`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from scipy.special import bdtr, bdtrc
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.outputs import odd
from robustbench_diffaug.data.base import BadImage, Dataset, undecodable
from robustbench_diffaug.engine import Task
from robustbench_diffaug.files import BUNDLED, Weights
from robustbench_diffaug.suite import Suite

__all__ = ["ALPHA", "CAUSES", "SHOWN", "contradicted", "gate", "no_better_than_chance", "samples"]

SHOWN = 64
ALPHA = 1e-3
CAUSES = "wrong weights, normalisation (preprocess) or order of classes?"


def contradicted(right: int, shown: int, expected: float) -> bool:
    """Whether so few are right that an accuracy is contradicted: `P(Binomial(n, p) <= k) < ALPHA`.

    Arguments:
        right: k, in [0, n].
        shown: n, at least 1.
        expected: p, in ]0, 1].
    """
    return bool(bdtr(right, shown, expected) < ALPHA)


def no_better_than_chance(right: int, shown: int, classes: int) -> bool:
    """Whether a guess does as well: `P(Binomial(n, 1 / K) >= k) > ALPHA`, if n images could tell at all.

    Arguments:
        right: k, in [0, n].
        shown: n, at least 1.
        classes: K.
    """
    could_tell = float(classes) ** -shown <= ALPHA
    return could_tell and (right == 0 or bool(bdtrc(right - 1, shown, 1 / classes) > ALPHA))


def samples(dataset: Dataset) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
    """Up to `SHOWN` images and labels of a whole dataset, the same each time; damaged ones are left out.

    Raises:
        ValueError: If none can be read.
    """
    source = dataset.opened()
    order = rng.permutation(rng.key("gate", dataset.name), dataset.available())
    chosen: Sequence[int] = sorted(order[:SHOWN].tolist())
    try:
        return source.read(chosen)
    except BadImage as error:
        bad = undecodable(source, chosen)
        if len(bad) == len(chosen):
            raise BadImage(str(error)) from error
        return source.read([row for row in chosen if row not in bad])


def gate(suite: Suite, tasks: Sequence[Task], limits: Limits, keep: bool = True) -> tuple[str, ...]:
    """Looks at the classifiers that some tasks are of; returns warnings.

    Arguments:
        suite: Whose checkpoints they are.
        tasks: What is left to do; nothing is looked at where there are none.
        limits: Where networks are.
        keep: Whether they stay in memory, for a run in this process.

    Raises:
        ValueError: If one contradicts its `expect_accuracy`, or its outputs are no logits.
    """
    needed = {cell.checkpoint.id for task in tasks for cell in task.cells}
    warnings: list[str] = []
    for entry in suite.checkpoints:
        if entry.id in needed and _gated(entry):
            warnings += [f"checkpoint {entry.id}: {warning}" for warning in _looked_at(suite, entry, limits, keep)]
    return tuple(warnings)


def _gated(entry: Checkpoint) -> bool:
    """Whether a checkpoint is looked at."""
    weights = getattr(entry, "weights", None)
    bundled = isinstance(weights, Weights) and weights.uri.startswith(BUNDLED)
    return entry.analysed() is None and not entry.wants and (entry.expect_accuracy is not None or not bundled)


def _clean(suite: Suite, entry: Checkpoint) -> Iterator[Dataset]:
    """The datasets of a checkpoint's benches that are no corruptions, those of group clean first."""
    every = [
        dataset
        for bench in suite.benches
        if entry in bench.chosen(suite.checkpoints)
        for dataset in bench.parts()
        if not dataset.severity and dataset.origin in ("", dataset.name)
    ]
    yield from sorted(every, key=lambda dataset: dataset.group != "clean")


@torch.no_grad()
def _looked_at(suite: Suite, entry: Checkpoint, limits: Limits, keep: bool) -> tuple[str, ...]:
    for dataset in _clean(suite, entry):
        try:
            images, labels = samples(dataset)
            known = (labels >= 0) & (labels < entry.classes)
            if not bool(known.all()) or _alike(images):
                continue
            model = entry.loaded(limits, keep)
            logits = model.logits(images.to(limits.device)).cpu()
        except Exception:  # the run says so, of its cell alone
            return ()
        try:
            found = odd(logits, model.dtype)
        except ValueError as error:
            raise ValueError(f"checkpoint {entry.id}: {error}") from error
        return (*found, *_judged(entry, dataset, logits, labels))
    return ()


def _alike(images: Float[Tensor, "n c h w"]) -> bool:
    """Whether all are one image, as the blank ones of a dataset of labels are, of which a network says one thing."""
    return len(images) > 1 and bool((images == images[:1]).all())


def _judged(
    entry: Checkpoint, dataset: Dataset, logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]
) -> tuple[str, ...]:
    """What the predictions of some images say.

    Raises:
        ValueError: If they contradict the accuracy that is expected.
    """
    classes = list(dataset.covers()) if dataset.class_space == "subset" else []
    classes = [each for each in classes if each < entry.classes] or list(range(entry.classes))
    predicted = torch.tensor(classes)[logits[:, classes].argmax(dim=1)]
    right, shown = int((predicted == labels).sum()), len(labels)
    most, times = Counter(predicted.tolist()).most_common(1)[0]
    score = f"{right} of {shown} images of {dataset.name} right"
    if entry.expect_accuracy is not None:
        if contradicted(right, shown, entry.expect_accuracy):
            raise ValueError(
                f"checkpoint {entry.id}: {score} where expect_accuracy is {entry.expect_accuracy:g}, and class {most} "
                f"predicted for {times}: {CAUSES}"
            )
        return ()
    if no_better_than_chance(right, shown, len(classes)):
        return (f"{score}, which chance might give, and class {most} predicted for {times}: {CAUSES}",)
    return ()
