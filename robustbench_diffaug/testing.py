"""The conformance suite: what authors of datasets, denoisers, checkpoints and evaluators run on their own classes.

Each check raises AssertionError with a sentence that says which promise is broken.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite, isnan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar, get_args, get_origin

import numpy as np
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Batch, Columns, Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.component import Component, Outside, Value, trusting
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Sigma
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.files import path_of
from robustbench_diffaug.records import INDEX, Records, from_table, to_table

__all__ = ["check_checkpoint", "check_dataset", "check_denoiser", "check_evaluator"]

Rows = dict[str, dict[str, np.ndarray]]
"""The columns of each sample by its id."""
V = TypeVar("V", bound=Value)


def check_evaluator(evaluator: Evaluator, dataset: Dataset | None = None) -> None:
    """An evaluator's records depend on the samples and on the seed, and on nothing else.

    Arguments:
        evaluator: With settings that make it cheap.
        dataset: Some images that it fits; left out, those of a Gaussian mixture with four classes.
    """
    check_value(evaluator)
    evaluator.check()
    source = dataset or Mixture(name="check", group="clean", size=7)
    count = len(source.rows())
    networks = [Bayes(id="a", classes=4, temperature=0.01), Bayes(id="b", classes=4, temperature=0.01, tilt=2.0)]
    with _generators_unmoved(evaluator.kind):
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
    for name, other in _changed(evaluator, outside=True):
        found = _evaluate(other, source, networks, [range(count)])
        _same(whole, found, f"{evaluator.kind} depends on {name}, which is marked Outside")
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
                given = view.images.clone()
                for network in networks:
                    columns = evaluator.observe(network.loaded(limits), view, batch)
                    _check_columns(evaluator, columns, len(part))
                    seen[network.id][view.name].append(columns)
                assert torch.equal(given, view.images), (
                    f"{evaluator.kind} changes the images of view {view.name} in place; all checkpoints are shown them"
                )
            for network in networks:
                columns = evaluator.record(seen[network.id], batch)
                _check_columns(evaluator, columns, len(part))
                taken = columns.keys() & set(INDEX)
                assert not taken, f"{evaluator.kind} records {sorted(taken)[0]}, which every record has; rename it"
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
    fields = {name: getattr(evaluator, name) for name in type(evaluator).model_fields}
    counting = {name: _Counting(base=found) for name, found in fields.items() if isinstance(found, Denoiser)}
    watched = evaluator.model_copy(update=counting)
    loaded = [denoiser.loaded(Limits()) for denoiser in counting.values()]
    counters = {id(found): found for found in loaded if isinstance(found, _Counter)}.values()
    before = sum(counter.images for counter in counters)
    with torch.no_grad():
        shown = sum(view.images.shape[1] for view in watched.views(_batch(dataset, range(1), Limits())))
    made, stated = sum(counter.images for counter in counters) - before, evaluator.forwards()
    assert shown == stated.classifier, (
        f"{evaluator.kind} shows {shown} images a sample, and forwards() says {stated.classifier}"
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
        assert isfinite(figure.value), (
            f"{figure.name} of {evaluator.kind} is {figure.value}; leave out what cannot be computed"
        )
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
    assert np.isfinite(sigmas).all() and (np.diff(sigmas) > 0).all() and sigmas[0] > 0, (
        f"the levels of {denoiser.kind} do not increase"
    )
    for t in {1, len(sigmas) // 2, len(sigmas) - 1}:
        assert denoiser.time(denoiser.sigma(t)) == t, f"time and sigma of {denoiser.kind} are not inverse at {t}"
    assert denoiser.channels() in (None, shape[0]), f"{denoiser.kind} takes {denoiser.channels()} channels"
    denoise, unclipped = (made.loaded(Limits()) for made in (denoiser, denoiser.model_copy(update={"clip": False})))
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
        assert torch.equal(noisy, images + levels[:, None, None, None].float() * noise), (
            f"{denoiser.kind} changes its input in place"
        )
        assert torch.equal(unclipped(noisy, levels).mean.clamp(0, 1), together.clamp(0, 1)), (
            f"clip of {denoiser.kind} does more than clamp the estimate to [0, 1]"
        )
        stacked = denoise(noisy[:, None].expand(-1, 2, -1, -1, -1), float(levels[2])).mean
        assert stacked.shape == (5, 2, *shape) and torch.equal(stacked[2, 1], together[2]), (
            f"{denoiser.kind} must take any leading axes, such as (sample, draw, channels, height, width)"
        )
    _check_files(denoiser, lambda moved: moved.load(torch.device("cpu")))


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
    first, second = (checkpoint.load().state_dict() for _ in range(2))
    assert _equal(first, second), f"{checkpoint.id} loads other weights each time"
    images = rng.uniform(rng.key("check", "images"), range(5), shape).astype(np.float32)
    batch = torch.from_numpy(images)
    model = checkpoint.loaded(Limits())
    state = {name: value.clone() for name, value in model.network.state_dict().items()}
    with _generators_unmoved(checkpoint.kind), torch.no_grad():
        logits = model.logits(batch)
        assert logits.shape == (5, checkpoint.classes), f"{checkpoint.id} gives logits of shape {tuple(logits.shape)}"
        assert torch.equal(model.logits(batch), logits), f"{checkpoint.id} gives other logits the second time"
        turned = model.logits(batch.flip(0)).flip(0)
        assert torch.equal(turned, logits), f"the logits of {checkpoint.id} depend on the order of the images"
        alone = torch.cat([model.logits(image[None]) for image in batch])
        assert torch.equal(alone, logits), f"the logits of {checkpoint.id} depend on the images beside"
    assert _equal(model.network.state_dict(), state), f"{checkpoint.id} changes its own weights or buffers in use"
    _check_files(checkpoint, lambda moved: moved.load())


def _equal(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


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
            kept = images.clone()
            images.fill_(0.5)
            assert torch.equal(source.read(rows)[0], kept), (
                f"images of {part.name} change when they are read again, or with what was made of them"
            )
        thinned = part.model_copy(update={"every": 2, "limit": 2})
        found = [thinned.opened().ids[row] for row in thinned.rows()]
        assert found == list(source.ids)[:4:2], f"every 2nd image of {part.name}, at most 2, are {found}"


def check_value(component: Component) -> None:
    """A component is hashable, survives YAML, and its fingerprint covers all but what is marked `Outside`."""
    fields = type(component).model_fields
    for name, field in fields.items():
        assert not _mutable(field.annotation), (
            f"field {name} of {component.kind} is a dict, list or set, which has no hash; use a tuple, or Options"
        )
    try:
        hash(component)
        dumped = component.model_dump(mode="json", serialize_as_any=True)
        text = yaml.safe_dump(json.loads(json.dumps(dumped)))
        with trusting(True):
            again = type(component).model_validate(yaml.safe_load(text))
    except (TypeError, ValidationError) as error:
        raise AssertionError(
            f"{component.kind} cannot be hashed, or written as YAML and read again: {error}"
        ) from error
    assert again == component, f"{component.kind} is another value after a round trip through YAML"
    assert again.fingerprint == component.fingerprint, f"the fingerprint of {component.kind} changes through YAML"
    assert component.kind == fields["kind"].default, f"{component.kind} has no fixed kind"
    identity = component.identity()
    for name, field in fields.items():
        inside = Outside not in field.metadata
        assert (name in identity) == inside, f"field {name} of {component.kind} is not where its marker says"
    for outside in (True, False):
        for name, other in _changed(component, outside):
            same = other.fingerprint == component.fingerprint
            assert same == outside, f"the fingerprint of {component.kind} and its field {name} disagree with its marker"


def _mutable(annotation: object) -> bool:
    origin = get_origin(annotation) or annotation
    wrong = isinstance(origin, type) and issubclass(origin, Mapping | Set | list | bytearray)
    return wrong or any(map(_mutable, get_args(annotation)))


def _changed(value: V, outside: bool) -> Iterator[tuple[str, V]]:
    """The value with another number or tuple in a field, where that is a valid one."""
    for name, field in type(value).model_fields.items():
        now = getattr(value, name)
        if (Outside in field.metadata) != outside or isinstance(now, bool) or not isinstance(now, int | float | tuple):
            continue
        other = now[:-1] if isinstance(now, tuple) else now + 1 if isinstance(now, int) else now / 2
        try:
            changed = type(value).model_validate({**dict(value), name: other})
        except ValidationError:
            continue
        if changed != value:
            yield name, changed


def _check_files(component: V, load: Callable[[V], object]) -> None:
    """Where its files lie changes no fingerprint; what they hold does, or is refused."""
    for fields, place in _located(component):
        with TemporaryDirectory() as folder:
            copy = Path(folder, place.name)
            (shutil.copytree if place.is_dir() else shutil.copy2)(place, copy)
            moved = _replaced(component, fields, str(copy))
            assert moved.identity() == component.identity(), f"the fingerprint depends on where {place.name} lies"
            files = [path for path in (copy, *copy.rglob("*")) if path.is_file()]
            largest = max(files, key=lambda path: path.stat().st_size)
            content = largest.read_bytes()
            largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            try:
                noticed = moved.identity() != component.identity() or load(moved) is None
            except ValueError:
                noticed = True
            assert noticed, f"another {largest.name} goes unnoticed; its digest belongs to contents()"


def _located(value: Value) -> Iterator[tuple[tuple[str, ...], Path]]:
    """The fields that say where files are."""
    for name, field in type(value).model_fields.items():
        found = getattr(value, name)
        if isinstance(found, Value):
            yield from (((name, *fields), place) for fields, place in _located(found))
        elif isinstance(found, str) and found and name != "id" and Outside in field.metadata:
            yield from [((name,), path_of(found))] if path_of(found).exists() else []


def _replaced(value: V, fields: Sequence[str], new: str) -> V:
    first, *below = fields
    return value.model_copy(update={first: _replaced(getattr(value, first), below, new) if below else new})


@contextmanager
def _generators_unmoved(kind: str) -> Iterator[None]:
    """The global generators of torch and numpy must be where they were: noise comes from the batch."""
    before = rng.global_states()
    yield
    assert rng.global_states() == before, f"{kind} draws from a global random generator; use Batch.noise or rng"
