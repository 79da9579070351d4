"""The samples of each training step: one endless order, from memory or from disk, for one process of several."""

import atexit
import itertools
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor
from torch.nn import functional
from torch.utils import data

from robustbench_diffaug import rng
from robustbench_diffaug.component import Value
from robustbench_diffaug.data.base import Dataset, Images, tensor_of
from robustbench_diffaug.train.parallel import Place
from robustbench_diffaug.train.samples import Samples

__all__ = ["Crop", "Order", "positions", "stream"]

TRIES = 10
"""After so many boxes that do not fit into the image, the crop is the largest one in its centre."""


class Crop(Value):
    """The field's training crop: a random box of the image, resized to a square, and mirrored half of the time.

    The area of the box is uniform in `scale`, as a share of the image's, and the logarithm of its width over height
    uniform in that of `ratio`. A box that does not fit is drawn again, ten times at most. Bilinear, antialiased.

    Arguments:
        size: Height and width of the result, in pixels.
        scale: The smallest and the largest area, 0 < low <= high <= 1.
        ratio: The smallest and the largest width over height, 0 < low <= high.
        flip: Whether it is mirrored left to right with a chance of one half.

    References:
        Going Deeper with Convolutions (Szegedy et al., 2015), https://arxiv.org/abs/1409.4842
    """

    size: PositiveInt
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.08, 1.0)
    ratio: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (3 / 4, 4 / 3)
    flip: bool = True

    @field_validator("scale", "ratio")
    @classmethod
    def _ordered(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if ends[0] > ends[1]:
            raise ValueError(f"needed are the smallest and the largest, in this order, not {list(ends)}")
        return ends

    def box(self, height: int, width: int, key: tuple[object, ...]) -> tuple[int, int, int, int]:
        """Top, left, height and width of the box in an image of some height and width, a function of the key."""
        for chance in rng.uniform(rng.key("crop", *key), range(TRIES), (4,)):
            area = height * width * (self.scale[0] + chance[0] * (self.scale[1] - self.scale[0]))
            low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
            ratio = math.exp(low + chance[1] * (high - low))
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                top, left = int(chance[2] * (height - down + 1)), int(chance[3] * (width - across + 1))
                return top, left, down, across
        across = min(width, max(1, round(height * self.ratio[1])))
        down = min(height, max(1, round(width / self.ratio[0])))
        return (height - down) // 2, (width - across) // 2, down, across

    def flipped(self, key: tuple[object, ...]) -> bool:
        """Whether the image is mirrored, a function of the key."""
        return self.flip and float(rng.uniform(rng.key("flip", *key), range(1), (1,))[0, 0]) < 0.5

    def of_image(self, image: Image.Image, key: tuple[object, ...]) -> Float[Tensor, "c h w"]:
        """The crop of an image as it lies on disk."""
        top, left, down, across = self.box(image.height, image.width, key)
        image = image.crop((left, top, left + across, top + down))
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return tensor_of(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped(key) else image)

    def of_tensor(self, image: Float[Tensor, "c h w"], key: tuple[object, ...]) -> Float[Tensor, "c h2 w2"]:
        """The crop of an image that is only there as a tensor."""
        top, left, down, across = self.box(image.shape[1], image.shape[2], key)
        part = image[None, :, top : top + down, left : left + across]
        size = (self.size, self.size)
        result = functional.interpolate(part, size, mode="bilinear", align_corners=False, antialias=True)[0]
        result = result.clamp(0, 1)  # the weights of a pixel add up to 1 but for rounding
        return result.flip(2) if self.flipped(key) else result


class Chosen(NamedTuple):
    """One sample of a step.

    Arguments:
        source: 0 for the data set, 1 for the extra one.
        row: Its position in the declared subset.
        key: What keys its randomness.
    """

    source: int
    row: int
    key: tuple[object, ...]


@dataclass(frozen=True)
class Order:
    """The endless sequence of samples: shuffled epochs of a data set, with a share of samples of an extra one.

    Position p is the extra data set's if floor((p + 1) share) > floor(p share), so every window of positions has that
    share of it, to within one sample. Each of the two goes through its own epochs.

    Arguments:
        seed: Of the order.
        ids: Of the images of the data set, and of the extra one where there is one.
        share: Of the extra one, 0 <= share < 1, exactly.
        name: Of the extra one; it makes the keys of its samples others than those of the data set.
    """

    seed: int
    ids: tuple[Sequence[str], ...]
    share: Fraction = Fraction(0)
    name: str = ""

    def at(self, position: int) -> Chosen:
        """The sample at a position, from 0."""
        before, after = (at * self.share.numerator // self.share.denominator for at in (position, position + 1))
        source = int(after > before)
        epoch, place = divmod(before if source else position - before, len(self.ids[source]))
        order = _shuffled("order extra" if source else "order", self.seed, epoch, len(self.ids[source]))
        row = int(order[place])
        name = (self.name,) if source else ()
        return Chosen(source, row, (self.seed, epoch, *name, self.ids[source][row]))


@lru_cache(maxsize=8)  # two data sets, and windows that reach into the next epoch
def _shuffled(stream: str, seed: int, epoch: int, size: int) -> np.ndarray:
    return rng.permutation(rng.key(stream, seed, epoch), size)


def positions(number: int, batch: int, place: Place) -> range:
    """The positions of a step, of which this process has its share: (number - 1) batch, ..., number batch - 1.

    Arguments:
        number: Of the step, from 1.
        batch: Samples in a step, over all processes.
        place: Which process this is; process r of W has the slice r of W equal ones.
    """
    size = batch // place.world
    start = (number - 1) * batch + place.rank * size
    return range(start, start + size)


def stream(
    dataset: Dataset,
    extra: Dataset | None,
    share: float,
    seed: int,
    batch: int,
    first: int,
    place: Place,
    crop: Crop | None,
    device: str,
    workers: int,
    hold: int = 2**30,
) -> Generator[Samples, None, None]:
    """The samples of the steps `first`, `first` + 1, ... without end; closing it ends its worker processes.

    They do not depend on `workers` or `hold`: images that fit are held in memory, others are read when needed.

    Arguments:
        dataset: What is trained on; its declared subset counts.
        extra: More images, or none.
        share: Of the extra images in every step, 0 < share < 1.
        seed: Of the order; with epoch and id it keys each sample's randomness.
        batch: Samples in a step, over all processes.
        first: The first step, from 1.
        place: Which process this is.
        crop: Of the ordinary branch, of the image as it lies on disk where the data set has that.
        device: 'cpu' or 'cuda[:N]'.
        workers: Processes that read images; 0 reads in this one.
        hold: The memory for images, in bytes.

    Raises:
        ValueError: If the batch has no equal parts, a data set is empty, sizes differ, or (later) an image is damaged.
    """
    if batch % place.world:
        raise ValueError(f"a batch of {batch} cannot be shared by {place.world} processes; needed is a multiple of it")
    if extra is not None and not 0 < share < 1:
        raise ValueError(f"the share of {extra.name} must be between 0 and 1, not {share:g}")
    parts = (dataset,) if extra is None else (dataset, extra)
    sources, rows = [part.opened() for part in parts], tuple(part.rows() for part in parts)
    needed = _size(parts, crop)
    ids = tuple([source.ids[row] for row in some] for source, some in zip(sources, rows, strict=True))
    # The share as it is written: 0.3 is 3/10, which no float is.
    order = Order(seed, ids, Fraction(repr(float(share))) if extra else Fraction(0), extra.name if extra else "")

    def chosen(number: int) -> list[Chosen]:
        return [order.at(position) for position in positions(number, batch, place)]

    from_disk = crop is not None and any(source.decode is not None for source in sources)
    if needed <= hold and not from_disk:
        return _held(parts, chosen, first, crop, device)
    return _streamed(Reader(parts, rows, crop), chosen, first, device, workers)


def _size(parts: tuple[Dataset, ...], crop: Crop | None) -> int:
    """The bytes of all images, after a look at the first of each data set."""
    shapes, total = [], 0
    for part in parts:
        if not len(part.rows()):
            raise ValueError(f"dataset {part.name} is empty")
        image = part.opened().read(part.rows()[:1])[0][0]
        shapes.append(tuple(image.shape))
        total += len(part.rows()) * image.nbytes
    if len(set(shapes)) > 1:
        pair = " and ".join(f"{part.name} {tuple(shape)}" for part, shape in zip(parts, shapes, strict=True))
        raise ValueError(f"images differ in (channels, height, width): {pair}; give both the same crop and mode")
    _, height, width = shapes[0]
    if crop and (height, width) != (crop.size, crop.size):
        raise ValueError(
            f"the crop gives {crop.size}x{crop.size} and images of {parts[0].name} are {width}x{height}; "
            "needed is one size, since both go through the network together"
        )
    return total


def _held(
    parts: tuple[Dataset, ...], chosen: Callable[[int], list[Chosen]], first: int, crop: Crop | None, device: str
) -> Generator[Samples, None, None]:
    """From memory: of the device, or of the host where each image must be cropped, since bits depend on the device."""
    where = device if crop is None else "cpu"
    read = [part.opened().read(part.rows()) for part in parts]
    images, labels = (torch.cat(tensors).to(where) for tensors in zip(*read, strict=True))
    starts = (0, len(parts[0].rows()))
    for number in itertools.count(first):
        some = chosen(number)
        index = torch.tensor([starts[one.source] + one.row for one in some], device=where)
        keys, found, ordinary = [one.key for one in some], images[index], None
        if crop:
            crops = [crop.of_tensor(image, key) for image, key in zip(found, keys, strict=True)]
            ordinary = torch.stack(crops).to(device)
        yield Samples(found.to(device), labels[index].to(device), keys, ordinary)


Found: TypeAlias = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"] | None, Int[Tensor, " b"]]


@dataclass(frozen=True)
class Reader(data.Dataset[Any]):
    """Reads the samples of a step, in this process or in a worker, which opens the data sets for itself.

    Arguments:
        parts: The data sets.
        rows: Of each, the positions of its declared subset.
        crop: Of the ordinary branch.
    """

    parts: tuple[Dataset, ...]
    rows: tuple[range, ...]
    crop: Crop | None

    def __getitem__(self, some: list[Chosen]) -> Found | str:
        """Images, ordinary images and labels; or what is wrong, since an error would come with a worker's traceback."""
        try:
            sources = [_opened(part) for part in self.parts]
            found = [self._one(sources[one.source], one) for one in some]
        except ValueError as error:
            return str(error)
        images, ordinary, labels = map(list, zip(*found, strict=True))
        # In a worker straight into shared memory, and nothing is copied once more.
        stack = data.default_collate
        return stack(images), stack(ordinary) if self.crop else None, stack([torch.tensor(label) for label in labels])

    def _one(self, source: Images, one: Chosen) -> tuple[Tensor, Tensor | None, int]:
        row = self.rows[one.source][one.row]
        if row >= len(source.ids) or source.ids[row] != one.key[-1]:
            name = self.parts[one.source].name
            raise ValueError(f"files of {name} were added or removed since the run began; start it again")
        if source.decode is None or source.fit is None or source.labels is None:
            images, labels = source.read([row])
            return images[0], self.crop.of_tensor(images[0], one.key) if self.crop else None, int(labels[0])
        image = source.decode(row)
        return source.fit(image), self.crop.of_image(image, one.key) if self.crop else None, source.labels[row]


def _opened(part: Dataset) -> Images:
    return part.opened() if data.get_worker_info() is None else _opened_in_a_worker(part)


@lru_cache(maxsize=2)
def _opened_in_a_worker(part: Dataset) -> Images:
    """Without the fingerprint, which looks at every file."""
    return part.open()


def _streamed(
    reader: Reader, chosen: Callable[[int], list[Chosen]], first: int, device: str, workers: int
) -> Generator[Samples, None, None]:
    cuda = torch.device(device).type == "cuda"
    loader = data.DataLoader(
        reader,
        batch_size=None,  # the reader makes batches itself
        sampler=map(chosen, itertools.count(first)),  # no list, which would have an end
        collate_fn=_as_it_is,  # by default numbers become tensors
        num_workers=workers,
        # spawn: a forked child inherits the thread pools of torch, and hangs.
        multiprocessing_context="spawn" if workers else None,
        pin_memory=cuda,
        worker_init_fn=_begin,
        generator=torch.Generator(),  # or the seeds of workers, which nothing uses, would be drawn from the global one
    )
    found = iter(loader)
    try:
        for number in itertools.count(first):
            some = _next(found)
            if isinstance(some, str):  # raised here, where the traceback does not keep the workers
                raise ValueError(some)
            images, ordinary, labels = some
            keys = [one.key for one in chosen(number)]
            moved = None if ordinary is None else ordinary.to(device, non_blocking=True)
            yield Samples(images.to(device, non_blocking=True), labels.to(device, non_blocking=True), keys, moved)
    finally:
        del found  # ends the workers now, and not when a traceback is forgotten


def _begin(worker: int) -> None:
    """What a worker does first: it sees to a quick end.

    While Python winds up, torch may still free a batch in the thread that sends it, which aborts the process aloud.
    """
    atexit.register(os._exit, 0)


def _as_it_is(found: Any) -> Any:
    return found


def _next(found: Iterator[Any]) -> Found | str:
    try:
        some: Found | str = next(found)
        return some
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError("a process that reads images died, perhaps for want of memory; give fewer workers") from error
