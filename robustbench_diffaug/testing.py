"""Conformance: what the engine relies on, as checks that authors of plug-ins call in their own tests.

`check_evaluator(Mine(n=16))` is such a test. Give values with small settings: an evaluator is run about twenty times.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import isfinite, isnan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar, get_args, get_origin

import numpy as np
import torch
import yaml
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Batch, Columns, Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Component, Outside, Value, trusting
from robustbench_diffaug.data.base import Dataset, Images
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Sigma
from robustbench_diffaug.engine import Task, run
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.files import path_of
from robustbench_diffaug.mixture import MixtureSpec
from robustbench_diffaug.records import INDEX, Records
from robustbench_diffaug.store import Cell, Store

__all__ = ["check_checkpoint", "check_dataset", "check_denoiser", "check_evaluator"]

SAMPLES = 7
SEED = 3
WHOLE = Limits(batch=SAMPLES)
ORDER = (4, 2, 6, 0, 1, 5, 3)
C = TypeVar("C", bound=Component)
V = TypeVar("V", bound=Value)


def _require(holds: bool, sentence: str) -> None:
    """An assertion that `python -O` keeps."""
    if not holds:
        raise AssertionError(sentence)


# --- every component


def _check_value(value: Component) -> None:
    """A frozen, hashable value that YAML holds, with a fingerprint of what records depend on."""
    kind, name = type(value), type(value).__name__
    default = kind.model_fields["kind"].default
    _require(default == value.kind, f'{name} has no kind of its own; write `kind: Literal["mine"] = "mine"`')
    for field, about in kind.model_fields.items():
        sentence = f"field {field} of {name} is a dict, list or set, which cannot be hashed; use a tuple, or Options"
        _require(not _mutable(about.annotation), sentence)
    try:
        hash(value)
    except TypeError as error:
        raise AssertionError(f"{name} cannot be hashed ({error}); all of its fields must be") from error
    try:
        text = yaml.safe_dump(value.model_dump(mode="json", serialize_as_any=True))
        with trusting(True):
            again = kind.model_validate(yaml.safe_load(text))
    except (ValidationError, ValueError, yaml.YAMLError) as error:
        raise AssertionError(f"{name} cannot be written as YAML and read again: {error}") from error
    _require(again == value, f"{name} is another value after it was written as YAML and read again: {again!r}")
    stable = len({value.fingerprint, value.fingerprint, again.fingerprint}) == 1
    _require(stable, f"the fingerprint of {name} is not stable: equal values must have one and the same")
    for field, about in kind.model_fields.items():
        outside = Outside in about.metadata
        rule = "marked Outside and changes" if outside else "not marked Outside and does not change"
        try:
            same = all(other.fingerprint == value.fingerprint for other in _others(value, field))
            moved = any(other.fingerprint != value.fingerprint for other in _others(value, field))
        except (ValueError, OSError):  # the other value names a file that is not there
            continue
        _require(same if outside else moved or not _others(value, field), f"{field} of {name} is {rule} the fingerprint")


def _mutable(annotation: object) -> bool:
    origin = get_origin(annotation) or annotation
    wrong = isinstance(origin, type) and issubclass(origin, Mapping | Set | list | bytearray)
    return wrong or any(map(_mutable, get_args(annotation)))


def _others(value: C, field: str) -> list[C]:
    """The value with another value in a plain field; none where nothing comes to mind."""
    now = getattr(value, field)
    if field == "kind" or now is None or isinstance(now, Value):
        return []
    if isinstance(now, bool):
        other: object = not now
    elif isinstance(now, int | float):
        other = type(now)(now + 1 if isinstance(now, int) else now / 2 or 1.0)
    else:
        other = now + "x" if isinstance(now, str) else now[:-1]
    return [value.model_copy(update={field: other})] if other != now else []


def _check_location(value: C, load: Callable[[C], object]) -> None:
    """Files may be moved, and may not be changed."""
    name = type(value).__name__
    for fields, place in _located(value):
        dotted = ".".join(fields)
        with TemporaryDirectory() as folder:
            copy = Path(folder, place.name)
            (shutil.copytree if place.is_dir() else shutil.copy2)(place, copy)
            moved = _replaced(value, fields, str(copy))
            sentence = f"the fingerprint of {name} changes when its files lie elsewhere ({dotted}); it must not"
            _require(moved.fingerprint == value.fingerprint, sentence)
            largest = max((path for path in (copy, *copy.rglob("*")) if path.is_file()), key=lambda p: p.stat().st_size)
            content = largest.read_bytes()
            largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            try:
                noticed = moved.fingerprint != value.fingerprint or load(moved) is None
            except ValueError:
                noticed = True
            sentence = f"{name} does not notice that its files have changed ({dotted}); digest them in `contents`"
            _require(noticed, sentence)


def _located(value: Value) -> Iterator[tuple[tuple[str, ...], Path]]:
    """The fields that say where files are."""
    for name, about in type(value).model_fields.items():
        found = getattr(value, name)
        if isinstance(found, Value):
            yield from (((name, *fields), place) for fields, place in _located(found))
        elif isinstance(found, str) and found and name != "id" and Outside in about.metadata:
            if path_of(found).exists():
                yield (name,), path_of(found)


def _replaced(value: V, fields: Sequence[str], new: object) -> V:
    first, *below = fields
    return value.model_copy(update={first: _replaced(getattr(value, first), below, new) if below else new})


def _digest(tensors: Iterable[Tensor]) -> str:
    found = blake2b(digest_size=16)
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _unmoved(what: str, before: str) -> None:
    sentence = f"{what} moves a global random generator; take all randomness from Batch.noise, Batch.uniform or rng"
    _require(rng.elsewhere() == before, sentence)


def _pictures(channels: int) -> Tensor:
    dataset = Mixture(spec=MixtureSpec(channels=channels), size=SAMPLES)
    return dataset.opened().read(range(SAMPLES))[0]


# --- evaluators


class _Shuffled(Dataset):
    """The same samples at other positions."""

    kind: Literal["shuffled"] = "shuffled"
    base: Dataset

    def contents(self) -> str:
        """The base's."""
        return self.base.contents()

    def open(self) -> Images:
        """The base's images in the order of ORDER."""
        source = self.base.opened()
        return Images([source.ids[row] for row in ORDER], lambda rows: source.read([ORDER[row] for row in rows]))


@dataclass
class _Counter:
    """Counts what a denoiser is given."""

    denoise: Denoise
    images: int = 0

    def __call__(self, noisy: Float[Tensor, "*n c h w"], sigma: Sigma) -> Posterior:
        self.images += noisy.shape[:-3].numel()
        return self.denoise(noisy, sigma)


class _Counting(Denoiser):
    """A denoiser that counts."""

    kind: Literal["counting"] = "counting"
    base: Denoiser

    def sigmas(self) -> Float[np.ndarray, " t"]:
        """The base's."""
        return self.base.sigmas()

    def channels(self) -> int | None:
        """The base's."""
        return self.base.channels()

    def load(self, device: torch.device) -> Denoise:
        """The base's, in a counter."""
        return _Counter(self.base.load(device))


def check_evaluator(evaluator: Evaluator, spec: MixtureSpec | None = None) -> None:
    """Runs an evaluator on synthetic images and linear networks, in all the ways in which records must not differ.

    Arguments:
        evaluator: With small settings.
        spec: Of the images; left out, 8x8 pixels with the channels that its denoisers take.

    Raises:
        AssertionError: If it is not what the engine relies on; the sentence says what to change.
    """
    _check_value(evaluator)
    evaluator.check()
    channels = [found for denoiser in evaluator.denoisers() if (found := denoiser.channels())]
    spec = spec or MixtureSpec(channels=channels[0] if channels else 1)
    datasets: tuple[Dataset, ...] = (
        Mixture(name="mixture", group="clean", spec=spec, size=SAMPLES),
        Mixture(name="mixture/fog@s5", origin="mixture", group="fog", severity=5, spec=spec, size=SAMPLES, draw=1),
    )
    common = {"classes": spec.classes, "spec": spec, "temperature": spec.spread**2}
    checkpoints = (Bayes(id="bayes", **common), Bayes(id="tilted", tilt=60.0, **common))
    with rng.seeded(rng.key("testing")):
        before = rng.elsewhere()
        _check_views(evaluator, datasets[0], checkpoints)
        both = _recorded(evaluator, datasets, checkpoints)
        for records in both:
            _check_metrics(evaluator, records)
            _check_metrics(evaluator, records.of(lambda dataset: not dataset.severity))
        _unmoved(type(evaluator).__name__, before)
    _check_ways(evaluator, datasets, checkpoints, both)


def _check_views(evaluator: Evaluator, dataset: Dataset, checkpoints: Sequence[Checkpoint]) -> None:
    """Views are the same whoever looks, and as many as `forwards` says."""
    images, labels = dataset.opened().read(range(SAMPLES))
    batch = Batch(dataset.name, tuple(dataset.opened().ids), images, labels, SEED, WHOLE)
    first, second = (checkpoint.loaded(WHOLE) for checkpoint in checkpoints)
    shown = _shown(evaluator, batch, [first])
    for models in ([second], [first, second], [second, first]):
        sentence = "views differ with the checkpoints that are run, or their order; they may depend on the batch alone"
        _require(_shown(evaluator, batch, models) == shown, sentence)
    draws, promised = sum(view[1] for view in shown), evaluator.forwards()
    sentence = f"forwards() promises {promised.classifier} images a sample to a checkpoint, and views yields {draws}"
    _require(draws == promised.classifier, sentence)
    counting = evaluator.model_copy(update={name: _counted(getattr(evaluator, name)) for name in _denoising(evaluator)})
    counters = [denoiser.loaded(WHOLE) for denoiser in counting.denoisers()]
    earlier = sum(counter.images for counter in counters if isinstance(counter, _Counter))
    _shown(counting, batch, [first])
    made = sum(counter.images for counter in counters if isinstance(counter, _Counter)) - earlier
    sentence = f"forwards() promises {promised.denoiser} denoised images a sample, and {made / SAMPLES:g} are made"
    _require(made == promised.denoiser * SAMPLES, sentence)


def _denoising(evaluator: Evaluator) -> list[str]:
    return [name for name in type(evaluator).model_fields if isinstance(getattr(evaluator, name), Denoiser)]


def _counted(denoiser: Denoiser) -> Denoiser:
    return _Counting(base=denoiser, precision=denoiser.precision, clip=denoiser.clip, microbatch=denoiser.microbatch)


@torch.no_grad()
def _shown(evaluator: Evaluator, batch: Batch, models: Sequence[Model]) -> list[tuple[str, int, str]]:
    """The name, the draws and the digest of each view while these models look at it."""
    shown = []
    seen: dict[str, dict[str, list[Columns]]] = {model.id: defaultdict(list) for model in models}
    for view in evaluator.views(batch):
        sentence = f"view {view.name} has shape {tuple(view.images.shape)}; needed is (sample, draw, c, h, w)"
        _require(view.images.ndim == 5 and len(view.images) == len(batch.ids), sentence)
        before = _digest([view.images])
        for model in models:
            columns = evaluator.observe(model, view, batch)
            _check_columns("observe", columns, batch)
            seen[model.id][view.name].append(columns)
        sentence = f"observe changes the images of view {view.name} in place; other checkpoints are shown the same tensor"
        _require(_digest([view.images]) == before, sentence)
        shown.append((view.name, view.images.shape[1], before))
    for model in models:
        _check_columns("record", evaluator.record(seen[model.id], batch), batch)
    return shown


def _check_columns(method: str, columns: Columns, batch: Batch) -> None:
    for name, column in columns.items():
        sentence = f"{method} gives column {name} of {type(column).__name__}; needed is a tensor, the sample on axis 0"
        _require(isinstance(column, Tensor), sentence)
        sentence = f"{method} gives column {name} of shape {tuple(column.shape)} for {len(batch.ids)} samples; the sample is axis 0"
        _require(column.ndim > 0 and len(column) == len(batch.ids), sentence)
        _require(method != "record" or name not in INDEX, f"column {name} is one that every record has; rename it")


def _recorded(
    evaluator: Evaluator,
    datasets: Sequence[Dataset],
    checkpoints: Sequence[Checkpoint],
    limits: Limits = WHOLE,
    ranges: Sequence[range] = (range(SAMPLES),),
) -> list[Records]:
    """The records of each checkpoint."""
    cells = [[Cell("check", entry, evaluator, dataset, SEED) for dataset in datasets] for entry in checkpoints]
    with TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for dataset, column in zip(datasets, zip(*cells, strict=True), strict=True):
            for rows in ranges:
                done = run(Task(evaluator, dataset, rows, column, store, limits))
                for reason in done.failures.values():
                    raise AssertionError(f"{type(evaluator).__name__} fails on images of a mixture: {reason}")
        return [store.read(row) for row in cells]


def _check_ways(
    evaluator: Evaluator, datasets: Sequence[Dataset], checkpoints: Sequence[Checkpoint], expected: Sequence[Records]
) -> None:
    """Records depend on the sample, the checkpoint and the fields that are not outside; not on how they are made."""
    ways: dict[str, dict[str, Any]] = {
        "a second run": {},
        "batches of 1": {"limits": replace(WHOLE, batch=1)},
        "batches of 3": {"limits": replace(WHOLE, batch=3)},
        "a budget of 8 images": {"limits": replace(WHOLE, budget=8)},
        "other ranges in another order": {"ranges": (range(3, SAMPLES), range(0, 1), range(1, 3))},
    }
    for way, settings in ways.items():
        _same(expected, _recorded(evaluator, datasets, checkpoints, **settings), way)
    moved = [_Shuffled(base=d, name=d.name, group=d.group, origin=d.origin, severity=d.severity) for d in datasets]
    _same(expected, _recorded(evaluator, moved, checkpoints), "the samples in another order")
    _same(expected[::-1], _recorded(evaluator, datasets, checkpoints[::-1]), "the checkpoints in another order")
    for records, checkpoint in zip(expected, checkpoints, strict=True):
        _same([records], _recorded(evaluator, datasets, [checkpoint]), "one checkpoint alone")
    for name, about in type(evaluator).model_fields.items():
        for other in _others(evaluator, name) if Outside in about.metadata else ():
            try:
                valid = type(evaluator).model_validate(dict(other))
            except ValidationError:
                continue
            _same(expected, _recorded(valid, datasets, checkpoints), f"another {name}, which is marked Outside")


def _same(expected: Sequence[Records], found: Sequence[Records], way: str) -> None:
    for before, after in zip(expected, found, strict=True):
        sentence = f"the columns are others with {way}: {sorted(before.columns)} and {sorted(after.columns)}"
        _require(before.columns.keys() == after.columns.keys(), sentence)
        orders = [np.lexsort((records["sample"], records["dataset"])) for records in (before, after)]
        for name in before.columns:
            for left, right in zip(before[name][orders[0]], after[name][orders[1]], strict=True):
                sentence = (
                    f"records differ with {way}, first in column {name}: {left} and {right}. A row may depend on its "
                    "sample alone: take noise from Batch.noise, call networks through Model and Denoiser.loaded"
                )
                equal = left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
                _require(equal, sentence)


def _check_metrics(evaluator: Evaluator, records: Records) -> None:
    try:
        found, again = list(evaluator.metrics(records)), list(evaluator.metrics(records))
    except ValueError as error:  # metrics may refuse what it cannot measure
        _require("read-only" not in str(error), "metrics changes the records in place; they are read-only")
        return
    _require(str(found) == str(again), "metrics gives other figures for the same records; key resampling by Records.key")
    names = [(metric.name, metric.group) for metric in found]
    for name, group in names:
        _require(names.count((name, group)) == 1, f"metrics yields {name} of {group} twice; a name and group is unique")
    for metric in found:
        where = f"metric {metric.name} of {metric.group}"
        _require(isfinite(metric.value), f"{where} is {metric.value}; raise ValueError where there is no figure")
        bare = isnan(metric.low) and isnan(metric.high)
        sentence = f"{where} is {metric.value} in [{metric.low}, {metric.high}]; low <= value <= high, or both NaN"
        _require(bare or metric.low <= metric.value <= metric.high, sentence)


# --- the other families


def check_dataset(dataset: Dataset) -> None:
    """Reads the first images of a dataset (of each part of a grid) in several orders.

    Arguments:
        dataset: Its files must be there.

    Raises:
        AssertionError: If it is not what the engine relies on; the sentence says what to change.
    """
    _check_value(dataset)
    for part in dataset.parts():
        before = rng.elsewhere()
        source, again = part.open(), part.open()
        ids = list(source.ids)
        _require(len(ids) > 0, f"{part.name} is empty")
        _require(all(isinstance(id, str) and id for id in ids), f"{part.name}: ids are texts, and not empty")
        _require(len(set(ids)) == len(ids), f"{part.name}: two images have one id; ids key noise and records")
        _require(list(again.ids) == ids, f"{part.name}: ids change when it is opened again; they key noise and records")
        stable = bool(part.contents()) and part.contents() == part.contents()
        _require(stable, f"{part.name}: contents() is empty or changes; it is the digest of the data")
        _check_read(part, source, again)
        _unmoved(part.name, before)
        subset = part.model_copy(update={"every": 2, "limit": 3})
        expected = ids[:6:2]
        found = [subset.opened().ids[row] for row in subset.rows()]
        _require(found == expected, f"{part.name}: every 2nd, at most 3, are {found} and not {expected}")


def _check_read(part: Dataset, source: Images, again: Images) -> None:
    rows = list(range(min(SAMPLES, len(source.ids))))
    images, labels = source.read(rows)
    sentence = f"{part.name}: images are {images.dtype} of shape {tuple(images.shape)}; needed is float32 (n, c, h, w)"
    _require(images.dtype == torch.float32 and images.ndim == 4 and len(images) == len(rows), sentence)
    _require(bool(((images >= 0) & (images <= 1)).all()), f"{part.name}: pixels are outside [0, 1], or NaN")
    whole = not labels.is_floating_point() and not labels.is_complex() and labels.shape == (len(rows),)
    _require(whole and int(labels.min()) >= -1, f"{part.name}: labels are one integer an image, -1 for no class")
    kept, answers = images.clone(), labels.clone()
    images.fill_(0.5)  # a reader must hand out copies
    for opened, order in ((source, rows), (again, rows), (source, rows[::-1]), *((source, [row]) for row in rows)):
        found, named = opened.read(order)
        equal = torch.equal(found, kept[order]) and torch.equal(named, answers[order])
        sentence = f"{part.name}: reading {order} gives other images or labels than reading {rows} did; an image is fixed"
        _require(equal, sentence)


def check_checkpoint(checkpoint: Checkpoint, images: Float[Tensor, "n c h w"] | None = None) -> None:
    """Loads a checkpoint and shows it images alone, together and in another order.

    Arguments:
        checkpoint: Its files must be there.
        images: At least 3, in [0, 1], that it is for; left out, 8x8 pixels with the channels that it takes.

    Raises:
        AssertionError: If it is not what the engine relies on; the sentence says what to change.
    """
    _check_value(checkpoint)
    name = type(checkpoint).__name__
    images = _pictures(getattr(checkpoint, "channels", 1)) if images is None else images
    checkpoint.check()
    states = [_digest(checkpoint.load().state_dict().values()) for _ in range(2)]
    _require(states[0] == states[1], f"{name} loads other weights each time; `load` must be deterministic")
    with rng.seeded(rng.key("testing")), torch.no_grad():
        before = rng.elsewhere()
        model = checkpoint.loaded(WHOLE)
        state = _digest(model.network.state_dict().values())
        logits = model.logits(images)
        sentence = f"{name} gives logits of shape {tuple(logits.shape)}, needed is ({len(images)}, {checkpoint.classes})"
        _require(logits.shape == (len(images), checkpoint.classes), sentence)
        _require(torch.equal(model.logits(images), logits), f"{name} is random: it gives other logits each time")
        order = list(range(len(images)))[::-1]
        alone = torch.cat([model.logits(image[None]) for image in images])
        equal = torch.equal(model.logits(images[order]), logits[order]) and torch.equal(alone, logits)
        _require(equal, f"the logits that {name} gives for an image depend on the images beside it, or on its position")
        sentence = f"{name} changes its weights or buffers while it is used; `load` gives a network that only infers"
        _require(_digest(model.network.state_dict().values()) == state, sentence)
        _unmoved(name, before)
    _check_location(checkpoint, lambda moved: moved.load())


def check_denoiser(denoiser: Denoiser, images: Float[Tensor, "n c h w"] | None = None) -> None:
    """Calls a denoiser at several levels, on images alone, together and in another order.

    Arguments:
        denoiser: Its files must be there.
        images: At least 3, in [0, 1], that it is for; left out, 8x8 pixels with the channels that it takes.

    Raises:
        AssertionError: If it is not what the engine relies on; the sentence says what to change.
    """
    _check_value(denoiser)
    name = type(denoiser).__name__
    sigmas = denoiser.sigmas()
    increasing = sigmas.ndim == 1 and len(sigmas) > 1 and bool((np.diff(sigmas) > 0).all())
    sentence = f"sigmas of {name} must be finite, positive and increasing, one of each time"
    _require(increasing and bool((np.isfinite(sigmas) & (sigmas > 0)).all()), sentence)
    for t in range(1, len(sigmas), max(1, len(sigmas) // 50)):
        _require(denoiser.time(denoiser.sigma(t)) == t, f"time(sigma({t})) of {name} is {denoiser.time(denoiser.sigma(t))}")
    images = _pictures(denoiser.channels() or 1) if images is None else images
    noise = torch.from_numpy(rng.normal(rng.key("testing"), range(len(images)), tuple(images.shape[1:])))
    with rng.seeded(rng.key("testing")), torch.no_grad():
        before = rng.elsewhere()
        for t in (0, 1, len(sigmas) // 4, len(sigmas) // 2, len(sigmas) - 1):
            _check_level(denoiser, images + denoiser.sigma(t) * noise, denoiser.sigma(t))
        _check_levels(denoiser, images, noise)
        _unmoved(name, before)
    _check_location(denoiser, lambda moved: moved.load(torch.device("cpu")))


def _check_level(denoiser: Denoiser, noisy: Float[Tensor, "n c h w"], sigma: float) -> None:
    name, denoise = type(denoiser).__name__, denoiser.loaded(WHOLE)
    given, where = noisy.clone(), f"at sigma {sigma:g}"
    mean = denoise(noisy, sigma).mean
    _require(torch.equal(noisy, given), f"{name} changes its input in place")
    sentence = f"{name} gives {mean.dtype} of shape {tuple(mean.shape)} for {noisy.dtype} of shape {tuple(noisy.shape)}"
    _require(mean.shape == noisy.shape and mean.dtype == noisy.dtype, sentence)
    _require(bool(torch.isfinite(mean).all()), f"{name} gives NaN or infinite pixels {where}")
    inside = not denoiser.clip or bool(((mean >= 0) & (mean <= 1)).all())
    _require(inside, f"{name} gives pixels outside [0, 1] {where} although clip is on")
    free = denoiser.model_copy(update={"clip": False}).loaded(WHOLE)(noisy, sigma).mean
    sentence = f"{name} {where}: clip must do no more than clamp the estimate to [0, 1]"
    _require(torch.equal(free.clamp(0, 1), mean.clamp(0, 1)), sentence)
    order = list(range(len(noisy)))[::-1]
    alone = torch.cat([denoise(image[None], sigma).mean for image in noisy])
    equal = torch.equal(denoise(noisy[order], sigma).mean, mean[order]) and torch.equal(alone, mean)
    _require(equal, f"what {name} gives for an image {where} depends on the images beside it, or on its position")
    stacked = denoise(noisy[:2, None].expand(-1, 3, -1, -1, -1), sigma).mean
    equal = stacked.shape == (2, 3, *noisy.shape[1:]) and torch.equal(stacked[:, 1], mean[:2])
    _require(equal, f"{name} must take any leading axes, such as (sample, draw, c, h, w)")


def _check_levels(denoiser: Denoiser, images: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"]) -> None:
    """A level of each image gives what that level alone gives."""
    denoise, sigmas = denoiser.loaded(WHOLE), denoiser.sigmas()
    chosen = np.linspace(1, len(sigmas) - 1, len(images)).astype(int)
    levels = torch.tensor([denoiser.sigma(int(t)) for t in chosen], dtype=torch.float64)
    noisy = (images + levels[:, None, None, None] * noise).to(images.dtype)
    alone = torch.cat([denoise(image[None], float(level)).mean for image, level in zip(noisy, levels, strict=True)])
    sentence = f"{type(denoiser).__name__} gives another estimate for a level of each image than for one level of all"
    _require(torch.equal(denoise(noisy, levels).mean, alone), sentence)
