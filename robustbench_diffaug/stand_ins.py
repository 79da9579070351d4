"""Stand-ins for what a task names: they count what passes through them, and networks in them answer at once.

A network is called truly, in its one shape, only until that is timed. A call whose gradient may be asked for counts as
one forward and one backward.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from robustbench_diffaug.batch import Batch, Columns, Limits, View
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Outside, Value, fingerprint
from robustbench_diffaug.data.base import Dataset, Images, in_memory
from robustbench_diffaug.diffusion.base import ConditionalDenoise, Denoise, Denoiser, Posterior, Sigma
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.records import Metric, Records

__all__ = ["PATIENCE", "Call", "Meter", "Read", "first_of", "of_checkpoint", "of_dataset", "of_evaluator"]

PATIENCE = 2.0  # seconds of a pass, not counting the networks
REPEATS = 6  # calls of a network
READING = 0.1  # seconds of reading images of one dataset

Call: TypeAlias = tuple[str, tuple[int, ...], bool]
"""A network by its fingerprint, the shape of an image, and whether its gradient is taken."""


class Read(NamedTuple):
    """Some images of a dataset, and the seconds that reading one takes."""

    images: Float[Tensor, "b c h w"]
    labels: Int[Tensor, " b"]
    seconds: float


def first_of(source: Images, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """The first image that can be read, and its label; damaged ones are none of a probe's business."""
    reason: ValueError | None = None
    for row in dataset.rows()[:16]:
        try:
            images, labels = source.read([row])
            return images[0], labels[0]
        except ValueError as error:
            reason = reason or error
    raise ValueError(f"no image of {dataset.name} can be read: {reason}") from reason


@dataclass(eq=False)
class Meter:
    """What was timed and what is being counted.

    Arguments:
        clock: Seconds since any moment.
        device: Where networks are.
        seconds: Of a call of a network in its one shape.
        answers: What a network once gave.
        known: What was read of each dataset.
        loading: Seconds of loading networks.
        apart: Seconds of this pass that its stand-ins spent on true calls.
        shown: Images of the views of this pass.
        view: Images of the view that is shown now.
        calls: How often a network was given images, by their number and that of its shape.
        until: When this pass is to end.
        cut: Whether it ended before it had shown all views.
    """

    clock: Callable[[], float]
    device: str
    seconds: dict[Call, float] = field(default_factory=dict)
    answers: dict[Call, Any] = field(default_factory=dict)
    known: dict[Dataset, Read] = field(default_factory=dict)
    loading: float = 0.0
    apart: float = 0.0
    shown: int = 0
    view: int = 0
    calls: dict[tuple[Call, int, int], float] = field(default_factory=lambda: defaultdict(float))
    until: float = 0.0
    cut: bool = False

    def begin(self) -> None:
        """Starts a pass."""
        self.apart, self.shown, self.until, self.cut = 0.0, 0, self.clock() + PATIENCE, False
        self.calls = defaultdict(float)

    def late(self) -> bool:
        """Whether the pass has had its time."""
        return self.clock() - self.apart > self.until

    def now(self) -> float:
        """The time when all that was asked of the device is done."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return self.clock()

    def read(self, dataset: Dataset) -> Read:
        """Some images of a dataset, read once."""
        if dataset not in self.known:
            source, rows = dataset.opened(), dataset.rows()
            begun = self.clock()
            image, label = first_of(source, dataset)
            count = int(np.clip(READING / max(1e-6, self.clock() - begun), 1, 16))
            images, labels, begun = image[None], label[None], self.clock()
            chosen = rows[1 : 1 + count] or rows[:1]  # others, since what was just read is quick to read again
            try:
                images, labels = source.read(chosen)
            except ValueError:  # a damaged one among them
                chosen, begun = rows[:1], self.clock()
                first_of(source, dataset)
            self.known[dataset] = Read(images, labels, (self.clock() - begun) / len(chosen))
        return self.known[dataset]

    def load(self, load: Callable[[], Any]) -> Any:
        """Loads a network, which is not the work of a sample."""
        begun = self.now()
        found = load()
        spent = self.now() - begun
        self.loading += spent
        self.apart += spent
        return found

    def answer(self, call: Call, true: Callable[[], Any]) -> Any:
        """What a network gives, after a call was timed: the median of some, or the only one where it is a long one.

        The first call chooses kernels, so of two or more it does not count.
        """
        if call not in self.seconds:
            ends = [self.now()]
            while len(ends) == 1 or (len(ends) <= REPEATS and ends[-1] - ends[0] < PATIENCE / 2):
                self.answers[call] = true()
                ends.append(self.now())
            took = [end - begun for begun, end in pairwise(ends)]
            self.seconds[call] = median(took[1:] or took)
            self.apart += ends[-1] - ends[0]
        return self.answers[call]


class _Evaluator(Evaluator):
    """An evaluator that notes how many images it shows, and ends when it is time."""

    kind: Literal["probe"] = "probe"
    real: Evaluator
    meter: Annotated[Any, Outside]

    def views(self, batch: Batch) -> Iterator[View]:
        views = iter(self.real.views(batch))
        for view in views:
            self.meter.view = view.images.shape[0] * view.images.shape[1]
            self.meter.shown += self.meter.view
            yield view
            if self.meter.late():
                begun = self.meter.now()
                self.meter.cut = next(views, None) is not None
                self.meter.apart += self.meter.now() - begun  # only to know whether there are more
                return

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        return self.real.observe(model, view, batch)

    def record(self, seen: Mapping[str, Sequence[Columns]], batch: Batch) -> Columns:
        return {} if self.meter.cut else self.real.record(seen, batch)

    def metrics(self, records: Records) -> tuple[Metric, ...]:
        return ()

    def forwards(self) -> Forwards:
        return self.real.forwards()


class _Dataset(Dataset):
    """Some images of a dataset, over and over, held in memory."""

    kind: Literal["probe"] = "probe"
    real: Dataset
    size: int
    meter: Annotated[Any, Outside]

    def contents(self) -> str:
        return ""

    def covers(self) -> tuple[int, ...]:
        return self.real.covers()

    def open(self) -> Images:
        found: Read = self.meter.read(self.real)
        index = torch.arange(self.size) % len(found.images)
        return in_memory([f"{row}" for row in range(self.size)], found.images[index], found.labels[index])


class _Denoiser(Denoiser):
    """A denoiser that answers at once."""

    kind: Literal["probe"] = "probe"
    real: Denoiser
    meter: Annotated[Any, Outside]

    def sigmas(self) -> Float[np.ndarray, " t"]:
        return self.real.sigmas()

    def channels(self) -> int | None:
        return self.real.channels()

    def size(self) -> int | None:
        return self.real.size()

    def classes(self) -> int | None:
        return self.real.classes()

    def load(self, device: torch.device) -> Denoise:
        true = self.meter.load(lambda: self.real.loaded(Limits(device=str(device))))
        return lambda noisy, sigma: self._answer(noisy, sigma, true)

    def load_conditional(self, device: torch.device) -> ConditionalDenoise:
        true = self.meter.load(lambda: self.real.loaded_conditional(Limits(device=str(device))))

        def denoise(noisy: Float[Tensor, "*n c h w"], sigma: Sigma, labels: Int[Tensor, "*n"]) -> Posterior:
            label = labels.reshape(-1)[:1].expand(self.microbatch)
            return self._answer(noisy, sigma, lambda images, level: true(images, level, label))

        return denoise

    def _answer(self, noisy: Tensor, sigma: Sigma, true: Callable[[Tensor, float], Posterior]) -> Posterior:
        shape = tuple(noisy.shape[-3:])
        call = (fingerprint(self.real), shape, torch.is_grad_enabled() and noisy.requires_grad)
        level = float(torch.as_tensor(sigma).reshape(-1)[0])
        images = noisy.detach().reshape(-1, *shape)[:1].expand(self.microbatch, *shape).contiguous()
        found: Posterior = self.meter.answer(call, lambda: _passed(images, lambda given: true(given, level), call[2]))
        self.meter.calls[call, noisy[..., 0, 0, 0].numel(), self.microbatch] += 1
        mean = noisy.clamp(0, 1) if self.clip else 1 * noisy
        return Posterior(mean, None if found.spread is None else torch.zeros_like(noisy))


def _passed(images: Tensor, network: Callable[[Tensor], Any], backward: bool) -> Any:
    """What a network gives, after its gradient was taken where that is asked for."""
    if not backward:
        with torch.no_grad():
            return network(images)
    with torch.enable_grad():
        given = images.requires_grad_()
        found = network(given)
        output = found.mean if isinstance(found, Posterior) else found
        torch.autograd.grad(output.sum(), given)
    if isinstance(found, Posterior):
        return Posterior(found.mean.detach(), None if found.spread is None else found.spread.detach())
    return found.detach()


class _Checkpoint(Checkpoint):
    """A checkpoint whose network answers at once."""

    kind: Literal["probe"] = "probe"
    real: Checkpoint
    meter: Annotated[Any, Outside]

    def analysed(self) -> Denoiser | None:
        real = self.real.analysed()
        found: Denoiser | None = _metered(real, self.meter) if real is not None else None
        return found

    def takes(self) -> int | None:
        return self.real.takes()

    def load(self) -> nn.Module:
        model = self.meter.load(lambda: self.real.loaded(Limits(device=self.meter.device)))
        return _Network(self.real, model.network, self.meter)


class _Network(nn.Module):
    """A network that answers at once: zeros, as a linear function of one feature."""

    def __init__(self, real: Checkpoint, network: nn.Module, meter: Meter) -> None:
        super().__init__()
        self.name, self.size, self.meter = fingerprint(real), real.microbatch, meter
        self.true = (network,)  # no part of this network
        self.last = nn.Linear(1, real.classes)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, images: Tensor) -> Tensor:
        call = (self.name, tuple(images.shape[1:]), torch.is_grad_enabled() and images.requires_grad)
        if len(images) == self.size:  # fewer are shown only to look for the last layer
            given = images.detach().clone()
            self.meter.answer(call, lambda: _passed(given, self.true[0], call[2]))
            # All the calls that show a view to it once count as one, since with more samples they are more.
            self.meter.calls[call, self.meter.view, len(images)] += 1 / ceil(self.meter.view / len(images))
        found: Tensor = self.last(0 * images.flatten(1).mean(dim=1, keepdim=True))
        return found


def of_checkpoint(checkpoint: Checkpoint, meter: Meter) -> Checkpoint:
    """A stand-in for a checkpoint: its network answers at once."""
    names = ("id", "classes", "preprocess", "precision", "wants", "head", "microbatch")
    return _Checkpoint(real=checkpoint, meter=meter, **{name: getattr(checkpoint, name) for name in names})


def of_evaluator(evaluator: Evaluator, meter: Meter) -> Evaluator:
    """A stand-in for an evaluator: it notes what it shows, ends when it is time, and its denoisers answer at once."""
    return _Evaluator(real=_metered(evaluator, meter), meter=meter)


def of_dataset(dataset: Dataset, size: int, meter: Meter) -> Dataset:
    """A stand-in for a dataset: so many images, some of its own over and over, held in memory."""
    return _Dataset(name=dataset.name, real=dataset, size=size, meter=meter)


def _metered(value: Any, meter: Meter) -> Any:
    """A value with stand-ins for the denoisers and checkpoints in it."""
    if isinstance(value, Checkpoint):
        return of_checkpoint(value, meter)
    if isinstance(value, Denoiser):
        fields = {name: getattr(value, name) for name in ("precision", "clip", "microbatch")}
        return _Denoiser(real=value, meter=meter, **fields)
    if isinstance(value, tuple):
        return tuple(_metered(part, meter) for part in value)
    if isinstance(value, Value):
        parts = {name: getattr(value, name) for name in type(value).model_fields}
        changed = {name: _metered(part, meter) for name, part in parts.items()}
        return value.model_copy(update={name: part for name, part in changed.items() if part is not parts[name]})
    return value
