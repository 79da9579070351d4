"""The conformance suite: what authors of datasets, denoisers, checkpoints and evaluators run on their own classes.

Each check raises AssertionError with a sentence that says which promise is broken.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isnan

import numpy as np
import torch
import yaml
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Batch, Columns, Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.component import Component, Outside
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.base import Denoiser
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.records import Records, from_table, to_table

__all__ = ["check_checkpoint", "check_dataset", "check_denoiser", "check_evaluator"]

Rows = dict[str, dict[str, np.ndarray]]
"""The columns of each sample by its id."""


def check_evaluator(evaluator: Evaluator, dataset: Dataset | None = None) -> None:
    """An evaluator's records depend on the samples and on the seed, and on nothing else.

    Arguments:
        evaluator: With settings that make it cheap.
        dataset: Some images that it fits; left out, those of a Gaussian mixture with four classes.
    """
    check_value(evaluator)
    source = dataset or Mixture(name="check", group="clean", size=7)
    count = len(source.rows())
    networks = [Bayes(id="a", classes=4, temperature=0.01), Bayes(id="b", classes=4, temperature=0.01, tilt=2.0)]
    with _generators_unmoved(evaluator.kind):
        whole = _evaluate(evaluator, source, networks, [range(count)])
    for name, parts, limits in (
        ("batches of 1", [range(row, row + 1) for row in range(count)], Limits()),
        ("batches of 3", [range(row, min(row + 3, count)) for row in range(0, count, 3)], Limits()),
        ("a budget of 8 images", [range(count)], Limits(budget=8)),
        ("the other order of samples", [range(count - 1, -1, -1)], Limits()),
    ):
        _same(whole, _evaluate(evaluator, source, networks, parts, limits), f"{evaluator.kind} depends on {name}")
    alone = _evaluate(evaluator, source, networks[1:], [range(count)])
    _same({"b": whole["b"]}, alone, f"{evaluator.kind} depends on the checkpoints beside")
    turned = _evaluate(evaluator, source, networks[::-1], [range(count)])
    _same(whole, turned, f"{evaluator.kind} depends on the order of the checkpoints")
    _check_forwards(evaluator, source)
    _check_metrics(evaluator, source, networks[0])


def _evaluate(
    evaluator: Evaluator,
    dataset: Dataset,
    networks: Sequence[Checkpoint],
    parts: Sequence[range],
    limits: Limits = Limits(),  # noqa: B008  (a frozen value)
) -> dict[str, Rows]:
    """Each checkpoint's rows, evaluated in the given ranges of positions."""
    found: dict[str, Rows] = {network.id: {} for network in networks}
    for part in parts:
        batch = _batch(dataset, part, limits)
        seen: dict[str, dict[str, list[Columns]]] = {network.id: defaultdict(list) for network in networks}
        with torch.no_grad():
            for view in evaluator.views(batch):
                shape = tuple(view.images.shape)
                assert view.images.ndim == 5 and shape[0] == len(part), (
                    f"view {view.name} has shape {shape}; needed is (samples, draws, channels, height, width)"
                )
                for network in networks:
                    columns = evaluator.observe(network.loaded(limits), view, batch)
                    seen[network.id][view.name].append(columns)
            for network in networks:
                columns = evaluator.record(seen[network.id], batch)
                _check_columns(evaluator, columns, len(part))
                for row, id in enumerate(batch.ids):
                    found[network.id][id] = {name: column[row].numpy() for name, column in columns.items()}
    return found


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


def _same(expected: Mapping[str, Rows], found: Mapping[str, Rows], message: str) -> None:
    for network, rows in expected.items():
        for id, columns in rows.items():
            for name, value in columns.items():
                other = found[network][id][name]
                assert value.dtype == other.dtype and np.array_equal(value, other, equal_nan=value.dtype.kind == "f"), (
                    f"{message}: column {name} of sample {id} is {other}, not {value}"
                )


def _check_forwards(evaluator: Evaluator, dataset: Dataset) -> None:
    with torch.no_grad():
        shown = sum(view.images.shape[1] for view in evaluator.views(_batch(dataset, range(1), Limits())))
    stated = evaluator.forwards().classifier
    assert shown == stated, f"{evaluator.kind} shows {shown} images a sample, and forwards() says {stated}"


def _check_metrics(evaluator: Evaluator, dataset: Dataset, network: Checkpoint) -> None:
    batch, declared = _batch(dataset, range(len(dataset.rows())), Limits()), dataset.declared()
    seen: dict[str, list[Columns]] = defaultdict(list)
    with torch.no_grad():
        for view in evaluator.views(batch):
            seen[view.name].append(evaluator.observe(network.loaded(batch.limits), view, batch))
        table = to_table(batch, declared, evaluator.record(seen, batch))
    records = Records(from_table(table), (declared,))
    figures = list(evaluator.metrics(records))
    again = list(evaluator.metrics(records))
    assert figures, f"{evaluator.kind} has no metric"
    assert str(figures) == str(again), f"the metrics of {evaluator.kind} differ when they are computed again"
    names = [(figure.name, figure.group) for figure in figures]
    assert len(set(names)) == len(names), f"{evaluator.kind} gives two metrics of one name and group"
    for figure in figures:
        assert not isnan(figure.value), f"{figure.name} of {evaluator.kind} is NaN; leave out what cannot be computed"
        assert isnan(figure.low) == isnan(figure.high), f"{figure.name} of {evaluator.kind} has half an interval"
        inside = isnan(figure.low) or figure.low <= figure.value <= figure.high
        assert inside, f"{figure.name} of {evaluator.kind} is {figure.value}, outside [{figure.low}, {figure.high}]"
    short = Records(records.columns, (replace(declared, n=declared.n + 1),))
    for figure in evaluator.metrics(short):
        assert not figure.complete, f"{figure.name} of {evaluator.kind} calls itself complete with a sample missing"
    assert not list(evaluator.metrics(Records({}, (declared,)))), f"{evaluator.kind} has metrics of no records"


def check_denoiser(denoiser: Denoiser, shape: tuple[int, int, int] = (1, 8, 8)) -> None:
    """A denoiser's levels increase, and each image is denoised as if it were alone.

    Arguments:
        denoiser: Whose files are there.
        shape: Of an image that it takes: channels, height, width.
    """
    check_value(denoiser)
    sigmas = denoiser.sigmas()
    assert bool((np.diff(sigmas) > 0).all()) and sigmas[0] > 0, f"the levels of {denoiser.kind} do not increase"
    for t in {1, len(sigmas) // 2, len(sigmas) - 1}:
        assert denoiser.time(denoiser.sigma(t)) == t, f"time and sigma of {denoiser.kind} are not inverse at {t}"
    assert denoiser.channels() in (None, shape[0]), f"{denoiser.kind} takes {denoiser.channels()} channels"
    denoise = denoiser.loaded(Limits())
    images = 0.5 + 0.2 * torch.from_numpy(rng.normal(rng.key("check", "images"), range(5), shape))
    levels = torch.from_numpy(sigmas[[0, 1, len(sigmas) // 4, len(sigmas) // 2, len(sigmas) - 1]].copy())
    noise = torch.from_numpy(rng.normal(rng.key("check", "noise"), range(5), shape))
    noisy = images + levels[:, None, None, None].float() * noise
    with _generators_unmoved(denoiser.kind), torch.no_grad():
        together = denoise(noisy, levels).mean
        assert together.shape == noisy.shape and together.dtype == noisy.dtype, (
            f"{denoiser.kind} gives {tuple(together.shape)}, {together.dtype} for {tuple(noisy.shape)}, {noisy.dtype}"
        )
        assert bool(torch.isfinite(together).all()), f"{denoiser.kind} gives NaN or infinite pixels"
        if denoiser.clip:
            assert float(together.min()) >= 0 and float(together.max()) <= 1, f"{denoiser.kind} does not clip to [0, 1]"
        turned = denoise(noisy.flip(0), levels.flip(0)).mean.flip(0)
        assert torch.equal(turned, together), f"{denoiser.kind} depends on the order of the images"
        for row in range(5):
            alone = denoise(noisy[row], float(levels[row])).mean
            assert torch.equal(alone, together[row]), f"{denoiser.kind} depends on the images beside, as at row {row}"


def check_checkpoint(checkpoint: Checkpoint, shape: tuple[int, int, int] = (1, 8, 8)) -> None:
    """A checkpoint's logits of an image do not depend on the images beside it.

    Arguments:
        checkpoint: Whose files are there.
        shape: Of an image that it takes: channels, height, width.
    """
    check_value(checkpoint)
    renamed = checkpoint.model_copy(update={"id": f"{checkpoint.id}-renamed"})
    assert renamed.fingerprint == checkpoint.fingerprint, "the fingerprint depends on the id"
    checkpoint.check()
    images = rng.uniform(rng.key("check", "images"), range(5), shape).astype(np.float32)
    batch = torch.from_numpy(images)
    model = checkpoint.loaded(Limits())
    with _generators_unmoved(checkpoint.kind), torch.no_grad():
        logits = model.logits(batch)
        assert logits.shape == (5, checkpoint.classes), f"{checkpoint.id} gives logits of shape {tuple(logits.shape)}"
        assert torch.equal(model.logits(batch), logits), f"{checkpoint.id} gives other logits the second time"
        turned = model.logits(batch.flip(0)).flip(0)
        assert torch.equal(turned, logits), f"the logits of {checkpoint.id} depend on the order of the images"
        alone = torch.cat([model.logits(image[None]) for image in batch])
        assert torch.equal(alone, logits), f"the logits of {checkpoint.id} depend on the images beside"


def check_dataset(dataset: Dataset) -> None:
    """A dataset's images are named, in [0, 1], and the same whenever and in whatever order they are read.

    Arguments:
        dataset: Whose files are there; a grid is checked part by part.
    """
    check_value(dataset)
    for part in dataset.parts():
        source, rows = part.open(), list(part.rows())[:6]
        assert rows, f"{part.name} is empty"
        assert len(set(source.ids)) == len(source.ids), f"{part.name} has two images of one id"
        assert list(part.open().ids) == list(source.ids), f"the ids of {part.name} change when it is opened again"
        assert part.contents() and part.contents() == part.contents(), f"the digest of {part.name} is empty or changes"
        with _generators_unmoved(part.kind):
            images, labels = source.read(rows)
            assert images.dtype == torch.float32 and images.ndim == 4 and len(images) == len(rows), (
                f"{part.name} gives images of {images.dtype} and shape {tuple(images.shape)}; "
                "needed is float32 and (images, channels, height, width)"
            )
            assert float(images.min()) >= 0 and float(images.max()) <= 1, f"pixels of {part.name} are outside [0, 1]"
            assert labels.shape == (len(rows),) and not labels.is_floating_point(), (
                f"{part.name} gives labels of {labels.dtype} and shape {tuple(labels.shape)}; needed are integers"
            )
            turned_images, turned_labels = source.read(rows[::-1])
            same = torch.equal(turned_images.flip(0), images) and torch.equal(turned_labels.flip(0), labels)
            assert same, f"images of {part.name} depend on the order in which they are read"
            for position, row in enumerate(rows):
                alone = source.read([row])[0][0]
                assert torch.equal(alone, images[position]), f"images of {part.name} depend on those read beside"


def check_value(component: Component) -> None:
    """A component is hashable, survives YAML, and its fingerprint covers all but what is marked `Outside`."""
    hash(component)
    dumped = component.model_dump(mode="json", serialize_as_any=True)
    text = yaml.safe_dump(json.loads(json.dumps(dumped)))
    again = type(component).model_validate(yaml.safe_load(text))
    assert again == component, f"{component.kind} is another value after a round trip through YAML"
    assert again.fingerprint == component.fingerprint, f"the fingerprint of {component.kind} changes through YAML"
    assert component.kind == type(component).model_fields["kind"].default, f"{component.kind} has no fixed kind"
    identity = component.identity()
    for name, field in type(component).model_fields.items():
        inside = Outside not in field.metadata
        assert (name in identity) == inside, f"field {name} of {component.kind} is not where its marker says"


@contextmanager
def _generators_unmoved(kind: str) -> Iterator[None]:
    """The global generators of torch and numpy must be where they were: noise comes from the batch."""
    before = rng.global_states()
    yield
    assert rng.global_states() == before, f"{kind} draws from a global random generator; use Batch.noise or rng"
