"""What an evaluator promises: records and figures that depend on the samples and the seed alone."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isclose, isfinite, isnan
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from robustbench_diffaug.batch import Batch, Columns, Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.checkpoints.denoiser import DenoiserCheckpoint
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Sigma
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.mixture import MixtureSpec
from robustbench_diffaug.records import INDEX, Metric, Records, from_table, to_table
from robustbench_diffaug.testing.values import changed, check_value, generators_unmoved

__all__ = ["check_evaluator"]

Rows = dict[str, dict[str, np.ndarray]]
"""The columns of each sample by its id."""
KEPT = {torch.bool, torch.float16, torch.float32, torch.float64, torch.uint8}
KEPT |= {torch.int8, torch.int16, torch.int32, torch.int64}
"""What Parquet and numpy both have."""


def check_evaluator(evaluator: Evaluator, dataset: Dataset | None = None) -> None:
    """An evaluator's records depend on the samples and on the seed alone, and its figures on the records alone.

    Checked are, besides what every component promises (`check_value`): the same records when run again, in batches of 1
    and 3, with a budget of 8 images, in other orders of samples and checkpoints, without the checkpoints beside, and
    with other values of fields marked `Outside`; no draw from a global generator; nothing changed in place, whether
    images, labels or networks; the same columns for every batch, which a file can hold; as many forwards as
    `forwards()` says. Of figures: the same when computed again, after another checkpoint was looked at, and from
    records that were written and read; finite, within their intervals, one of each name and group; incomplete where a
    sample is missing; none of no records; each equal to the mean of what `outcomes` says it rests on.

    Arguments:
        evaluator: With settings that make it cheap.
        dataset: Some images that it fits; left out, those of a Gaussian mixture with four classes. Where it analyses
            denoisers, one-channel images of 8 x 8 pixels.

    Raises:
        AssertionError: With the promise that is broken.
    """
    check_value(evaluator)
    evaluator.check()
    source = dataset or Mixture(name="check", group="clean", size=7)
    count = len(source.rows())
    networks = _networks(evaluator)
    with generators_unmoved(evaluator.kind):
        whole = _evaluate(evaluator, source, networks, [range(count)])
    for name, parts, limits in (
        ("when it is run", [range(count)], Limits()),
        ("batches of 1", [range(row, row + 1) for row in range(count)], Limits()),
        ("batches of 3", [range(row, min(row + 3, count)) for row in range(0, count, 3)], Limits()),
        ("a budget of 8 images", [range(count)], Limits(budget=8)),
        ("the order of ranges", [range(count // 2, count), range(count // 2)], Limits()),
        ("the other order of samples", [range(count - 1, -1, -1)], Limits()),
    ):
        _same(whole, _evaluate(evaluator, source, networks, parts, limits), f"{evaluator.kind} depends on {name}")
    alone = _evaluate(evaluator, source, networks[1:], [range(count)])
    _same({"b": whole["b"]}, alone, f"{evaluator.kind} depends on the checkpoints beside")
    turned = _evaluate(evaluator, source, networks[::-1], [range(count)])
    _same(whole, turned, f"{evaluator.kind} depends on the order of the checkpoints")
    for name, other in changed(evaluator, outside=True):
        found = _evaluate(other, source, networks, [range(count)])
        _same(whole, found, f"{evaluator.kind} depends on {name}, which is marked Outside")
    _check_forwards(evaluator, source, networks[0])
    _check_metrics(evaluator, source, networks)


def _networks(evaluator: Evaluator) -> list[Checkpoint]:
    """Two classifiers of the mixture, or two denoisers where the evaluator analyses such."""
    if evaluator.needs == "classifier":
        return [Bayes(id="a", classes=4, temperature=0.01), Bayes(id="b", classes=4, temperature=0.01, tilt=2.0)]
    specs = {"a": MixtureSpec(), "b": MixtureSpec(spread=0.05)}
    return [
        DenoiserCheckpoint(id=id, denoiser=MixtureDenoiser(spec=spec, clip=False), microbatch=16)
        for id, spec in specs.items()
    ]


def _evaluate(
    evaluator: Evaluator,
    dataset: Dataset,
    networks: Sequence[Checkpoint],
    parts: Sequence[range],
    limits: Limits = Limits(),  # noqa: B008  (a frozen value)
) -> dict[str, Rows]:
    """Each checkpoint's rows, evaluated in the given ranges of positions."""
    found: dict[str, Rows] = {network.id: {} for network in networks}
    weights = {network.id: _weights(network, limits) for network in networks}
    for part in parts:
        batch = _batch(dataset, part, limits)
        seen: dict[str, dict[str, list[Columns]]] = {network.id: defaultdict(list) for network in networks}
        with torch.no_grad():
            kept = batch.images.clone(), batch.labels.clone()
            for view in evaluator.views(batch):
                shape = tuple(view.images.shape)
                assert view.images.ndim == 5 and shape[0] == len(part), (
                    f"view {view.name} has shape {shape}; needed is (samples, draws, channels, height, width)"
                )
                given = view.images.clone()
                for network in networks:
                    columns = evaluator.observe(network.loaded(limits), view, batch)
                    _check_columns(evaluator, columns, len(part))
                    seen[network.id][view.name].append(columns)
                assert torch.equal(given, view.images), (
                    f"{evaluator.kind} changes the images of view {view.name} in place; all checkpoints are shown them"
                )
            same = torch.equal(kept[0], batch.images) and torch.equal(kept[1], batch.labels)
            assert same, f"{evaluator.kind} changes the images or labels of the batch in place"
            for network in networks:
                columns = evaluator.record(seen[network.id], batch)
                _check_columns(evaluator, columns, len(part))
                taken = columns.keys() & set(INDEX)
                assert not taken, f"{evaluator.kind} records {sorted(taken)[0]}, which every record has; rename it"
                for row, id in enumerate(batch.ids):
                    found[network.id][id] = {name: column[row].numpy() for name, column in columns.items()}
    for network in networks:
        assert _same_weights(weights[network.id], _weights(network, limits)), (
            f"{evaluator.kind} changes the weights, buffers or mode of a network, which others are shown after it"
        )
    return found


def _weights(network: Checkpoint, limits: Limits) -> dict[str, Tensor]:
    """The weights and buffers of a loaded network, and whether each module of it is in training mode."""
    loaded = network.loaded(limits).network
    modes = {f"{name} trains": torch.tensor(module.training) for name, module in loaded.named_modules()}
    return modes | {name: value.clone() for name, value in loaded.state_dict().items()}


def _same_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _batch(dataset: Dataset, part: range, limits: Limits) -> Batch:
    source, rows = dataset.opened(), dataset.rows()
    images, labels = source.read([rows[row] for row in part])
    return Batch(dataset.name, tuple(source.ids[rows[row]] for row in part), images, labels, 0, limits)


def _check_columns(evaluator: Evaluator, columns: Columns, count: int) -> None:
    assert columns, f"{evaluator.kind} records no column"
    for name, column in columns.items():
        assert isinstance(column, Tensor), f"column {name} of {evaluator.kind} is no tensor"
        assert column.ndim > 0 and len(column) == count, (
            f"column {name} of {evaluator.kind} has shape {tuple(column.shape)} for {count} samples; "
            "the sample is the first axis"
        )
        assert column.dtype in KEPT, (
            f"column {name} of {evaluator.kind} is of {column.dtype}, which a record cannot hold; make it float32, "
            "int32 or bool"
        )


def _same(expected: Mapping[str, Rows], found: Mapping[str, Rows], message: str) -> None:
    for network, rows in expected.items():
        for id, columns in rows.items():
            others = found[network][id].keys()
            assert columns.keys() == others, (
                f"{message}: the columns of sample {id} are {', '.join(others)}, not {', '.join(columns)}"
            )
            for name, value in columns.items():
                other = found[network][id][name]
                assert value.dtype == other.dtype and np.array_equal(value, other, equal_nan=value.dtype.kind == "f"), (
                    f"{message}: column {name} of sample {id} is {other}, not {value}"
                )


@dataclass(frozen=True)
class _Counted(Model):
    """A model that notes how many images it is given."""

    seen: list[int] = field(default_factory=list)

    def logits(
        self,
        images: Float[Tensor, "*n c h w"],
        sigma: Float[Tensor, "*n"] | None = None,
        denoised: Float[Tensor, "*n c h w"] | None = None,
    ) -> Float[Tensor, "*n k"]:
        self.seen.append(images.shape[:-3].numel())
        return super().logits(images, sigma, denoised)

    def features(self, images: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n d"]]:
        self.seen.append(len(images))
        return super().features(images)


def _counted(network: Checkpoint) -> _Counted:
    loaded = network.loaded(Limits())
    return _Counted(**{entry.name: getattr(loaded, entry.name) for entry in fields(loaded)})


def _check_forwards(evaluator: Evaluator, dataset: Dataset, network: Checkpoint) -> None:
    named = {name: getattr(evaluator, name) for name in type(evaluator).model_fields}
    counting = {name: _Counting(base=found) for name, found in named.items() if isinstance(found, Denoiser)}
    watched = evaluator.model_copy(update=counting)
    loaded = [denoiser.loaded(Limits()) for denoiser in counting.values()]
    counters = {id(found): found for found in loaded if isinstance(found, _Counter)}.values()
    before = sum(counter.images for counter in counters)
    batch, model = _batch(dataset, range(1), Limits()), _counted(network)
    with torch.no_grad():
        for view in watched.views(batch):
            watched.observe(model, view, batch)
    made, stated = sum(counter.images for counter in counters) - before, evaluator.forwards().of(1, 1)
    # What a denoiser is given to multiply with its Jacobian depends on the size of images.
    assert evaluator.needs == "denoiser" or sum(model.seen) == stated.classifier, (
        f"{evaluator.kind} shows a network {sum(model.seen)} images a sample, and forwards() says {stated.classifier}"
    )
    assert made == stated.denoiser, (
        f"{evaluator.kind} denoises {made} images a sample, and forwards() says {stated.denoiser}"
    )


@dataclass
class _Counter:
    """Counts the images that a denoiser is given."""

    denoise: Denoise
    images: int = 0

    def __call__(self, noisy: Tensor, sigma: Sigma) -> Posterior:
        self.images += noisy.shape[:-3].numel()
        return self.denoise(noisy, sigma)


class _Counting(Denoiser):
    """A denoiser that counts."""

    kind: Literal["counting"] = "counting"
    base: Denoiser

    def sigmas(self) -> np.ndarray:
        """The base's."""
        return self.base.sigmas()

    def load(self, device: torch.device) -> Denoise:
        """The base's, in a counter."""
        return _Counter(self.base.load(device))


def _check_metrics(evaluator: Evaluator, dataset: Dataset, networks: Sequence[Checkpoint]) -> None:
    records = _records(evaluator, dataset, networks[0])
    figures = list(evaluator.metrics(records))
    assert figures, f"{evaluator.kind} has no metric"
    again = list(evaluator.metrics(records))
    assert str(figures) == str(again), f"the metrics of {evaluator.kind} differ when they are computed again"
    _records(evaluator, dataset, networks[1])
    later = list(evaluator.metrics(records))
    assert str(figures) == str(later), (
        f"the metrics of {evaluator.kind} differ after another checkpoint was looked at; they are of records alone"
    )
    _check_figures(evaluator, figures)
    (declared,) = records.declared
    short = replace(records, declared=(replace(declared, n=declared.n + 1),))
    for figure in evaluator.metrics(short):
        assert not figure.complete, f"{figure.name} of {evaluator.kind} calls itself complete with a sample missing"
    try:
        nothing = list(evaluator.metrics(Records({}, (declared,))))
    except Exception as error:
        raise AssertionError(f"{evaluator.kind} fails on no records, of which there are no metrics: {error}") from error
    assert not nothing, f"{evaluator.kind} has metrics of no records"
    values = {(figure.name, figure.group): figure.value for figure in figures}
    for (name, group), basis in evaluator.outcomes(records).items():
        value = values.get((name, group))
        assert value is not None, f"{evaluator.kind} says what {name} of {group} rests on, and has no such metric"
        assert isclose(basis.mean, value, rel_tol=1e-9, abs_tol=1e-12), (
            f"{name} of {evaluator.kind} is {value}, and what it rests on (outcomes) has the mean {basis.mean}"
        )


def _records(evaluator: Evaluator, dataset: Dataset, network: Checkpoint) -> Records:
    """Records of one checkpoint, written and read."""
    batch, declared = _batch(dataset, range(len(dataset.rows())), Limits()), dataset.declared()
    seen: dict[str, list[Columns]] = defaultdict(list)
    model = network.loaded(batch.limits)
    with torch.no_grad():
        for view in evaluator.views(batch):
            seen[view.name].append(evaluator.observe(model, view, batch))
        table = to_table(batch, declared, evaluator.record(seen, batch))
    return Records(from_table(table), (declared,), constants=evaluator.constants(model))


def _check_figures(evaluator: Evaluator, figures: Sequence[Metric]) -> None:
    names = [(figure.name, figure.group) for figure in figures]
    assert len(set(names)) == len(names), f"{evaluator.kind} gives two metrics of one name and group"
    for figure in figures:
        assert isfinite(figure.value), (
            f"{figure.name} of {evaluator.kind} is {figure.value}; leave out what cannot be computed"
        )
        assert isnan(figure.low) == isnan(figure.high), f"{figure.name} of {evaluator.kind} has half an interval"
        inside = isnan(figure.low) or figure.low <= figure.value <= figure.high
        assert inside, f"{figure.name} of {evaluator.kind} is {figure.value}, outside [{figure.low}, {figure.high}]"
