"""Corrupted copies of a dataset on disk, in the folders of ImageNet-C or the arrays of CIFAR-10-C.

A copy holds the pixels that the dataset `corrupted` gives on the fly, in JPEG of quality 85 for ImageNet-C's layout.
Every file appears whole or not at all, so that a copy that was stopped is continued by doing it again.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from robustbench_diffaug import document
from robustbench_diffaug.component import digest_of, trusting
from robustbench_diffaug.data.base import BadImage, Dataset, Images, undecodable
from robustbench_diffaug.data.corrupted import Constants, keys
from robustbench_diffaug.data.corruptions import COMMON, NAMES, corrupt, known
from robustbench_diffaug.data.frost import digest
from robustbench_diffaug.files import atomic

__all__ = ["Copy", "Cost", "Done", "estimate", "load", "ordered", "write"]

QUALITY = 85
"""Of the JPEG files, as ImageNet-C was made."""

VALUES = 2**22
"""About how many values of images are held at once; no result depends on it."""

SUFFIX = re.compile(r"\.(jpe?g|png|webp|bmp|tiff?|ppm|pgm)$", re.IGNORECASE)


@dataclass(frozen=True)
class Copy:
    """What is copied, how and where.

    Arguments:
        dataset: Whose declared subset is copied.
        folder: Where it goes.
        form: The layout: 'imagenet-c' is `<corruption>/<severity>/<class>/<name>.JPEG`, 'cifar-c' is
            `<corruption>.npy` of shape (5 n, height, width, channels), severity after severity, and `labels.npy`.
        corruptions: Their names.
        severities: 1 to 5; all five for 'cifar-c'.
        constants: The published table of strengths.
        draw: Another number gives other random streams.
        textures: The folder of the official textures of frost; None for those that are drawn.

    Raises:
        ValueError: If there is no such corruption, or the layout needs other severities.
    """

    dataset: Dataset
    folder: Path
    form: Literal["imagenet-c", "cifar-c"]
    corruptions: tuple[str, ...]
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    constants: Constants = "imagenet-c"
    draw: int = 0
    textures: Path | None = None

    def __post_init__(self) -> None:
        ordered(self.corruptions)
        if self.form == "cifar-c" and self.severities != (1, 2, 3, 4, 5):
            raise ValueError("arrays of cifar-c hold the severities 1 to 5; leave --severity out, or use imagenet-c")

    @cached_property
    def rows(self) -> range:
        """The positions of the images."""
        return self.dataset.rows()

    @cached_property
    def source(self) -> Images:
        """The opened dataset."""
        return self.dataset.opened()

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Of the images."""
        return tuple(self.source.ids[row] for row in self.rows)

    @property
    def versions(self) -> tuple[tuple[str, int], ...]:
        """Each corruption at each severity."""
        return tuple((name, severity) for name in self.corruptions for severity in self.severities)

    def array(self, corruption: str) -> Path:
        """The file of a corruption in the layout of CIFAR-10-C."""
        return self.folder / f"{corruption}.npy"

    def corrupted(
        self, images: Float[Tensor, "b c h w"], ids: Sequence[str], version: tuple[str, int]
    ) -> NDArray[np.uint8]:
        """Images under one corruption, as levels (b, h, w, c)."""
        streams = keys(self.draw, *version, ids)
        result = corrupt(images, *version, self.constants, streams, self.textures)
        return (result * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


@dataclass(frozen=True)
class Cost:
    """What a copy will cost.

    Arguments:
        images: How many are left to be made.
        seconds: About how long it takes.
        bytes: About how large they are.
        timed: On how many images this was measured.
    """

    images: int
    seconds: float
    bytes: float
    timed: int


@dataclass(frozen=True)
class Done:
    """A step of the work.

    Arguments:
        images: Corrupted images that were dealt with: they are there now, or were skipped.
        skipped: Messages about images that cannot be decoded, where the dataset skips such.
    """

    images: int
    skipped: tuple[str, ...] = ()


def ordered(names: Sequence[str]) -> tuple[str, ...]:
    """Names of corruptions, each once and in the order of ImageNet-C; the 15 common ones where there is none.

    Raises:
        ValueError: If there is no such corruption.
    """
    chosen = set(map(known, names))
    return tuple(name for name in NAMES if name in chosen) or COMMON


def load(path: Path, *, trust: bool = False, data_dir: Path | None = None) -> Dataset:
    """The dataset of a YAML file that holds one entry, as a suite does.

    Arguments:
        path: Of the file.
        trust: Whether it may name code of the user's.
        data_dir: Where relative paths start; the file's folder where it is left out.

    Raises:
        ValueError: If something is wrong; one line with file, line and key.
    """
    found = document.read(path)
    if not isinstance(found.data, dict):
        raise ValueError(f"{path}:1: needed is one dataset entry, a mapping with a kind and a name")
    context = {"folder": path.resolve().parent, "data": data_dir.resolve() if data_dir else None}
    with trusting(trust):
        dataset = found.validate(Dataset, context)
    if dataset.parts() != (dataset,):
        raise ValueError(f"{path}:1: kind {dataset.kind} stands for several datasets; name the one that is its base")
    return dataset


def estimate(copy: Copy) -> Cost:
    """Times all versions of the first images, and multiplies by what is left.

    Raises:
        ValueError: If the dataset is empty, an image that is needed cannot be decoded, or the folder is taken.
    """
    if not copy.rows:
        raise ValueError(f"dataset {copy.dataset.name} is empty; there is nothing to copy")
    start = perf_counter()
    _claim(copy)
    saving, left = (perf_counter() - start) * (copy.form == "imagenet-c"), _left(copy)
    if not left:
        return Cost(0, 0.0, 0.0, 0)
    one = copy.dataset.first()[None]
    for version in copy.versions:  # what is made once, such as textures, is no part of the cost of an image
        copy.corrupted(one, copy.ids[:1], version)
    start, size = perf_counter(), 0
    images, _, ids, _ = _read(copy, range(min(max(2, VALUES // 16 // one.numel()), len(copy.rows))))
    images, ids = (images, ids) if ids else (one, list(copy.ids[:1]))  # all of them may be skipped
    for version in copy.versions:
        levels = copy.corrupted(images, ids, version)
        size += levels.nbytes if copy.form == "cifar-c" else sum(len(_encoded(level)) for level in levels)
    made = len(ids) * len(copy.versions)
    return Cost(left, left * ((perf_counter() - start) / made + saving), left * size / made, len(ids))


def write(copy: Copy) -> Iterator[Done]:
    """Writes what is missing of a copy; what it yields adds up to all images in all versions.

    Raises:
        ValueError: If the folder holds something else, an image has no label or, where the dataset does not skip such,
            cannot be decoded.
    """
    _claim(copy)
    yield from _arrays(copy) if copy.form == "cifar-c" else _folders(copy)


def _claim(copy: Copy) -> None:
    """Sees to it that a folder never holds parts of two different copies."""
    said = {
        "dataset": {"name": copy.dataset.name, "fingerprint": copy.dataset.fingerprint},
        "format": copy.form,
        "constants": copy.constants,
        "draw": copy.draw,
        "textures": digest(copy.textures) if copy.textures else "drawn",
    }
    path = copy.folder / "copy.json"
    if path.is_file():
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; remove its folder, or choose another -o") from error
        other = [key for key, value in said.items() if not isinstance(found, dict) or found.get(key) != value]
        if other:
            raise ValueError(f"{copy.folder} holds a copy with another {other[0]}; choose another -o")
    elif copy.folder.exists() and (not copy.folder.is_dir() or any(copy.folder.iterdir())):
        raise ValueError(f"{copy.folder} is there and is no copy that could be continued; choose another -o")
    with atomic(path) as file:
        file.write(json.dumps(said, indent=2).encode() + b"\n")


def _left(copy: Copy) -> int:
    """Images that are not there yet."""
    total = len(copy.rows) * len(copy.versions)
    if copy.form == "cifar-c":
        return total - 5 * len(copy.rows) * sum(copy.array(name).is_file() for name in copy.corruptions)
    places = (copy.folder / name / str(severity) for name, severity in copy.versions)
    return max(0, total - sum(1 for place in places for _ in place.glob("*/*.JPEG")))


def _chunks(copy: Copy) -> Iterator[range]:
    """Positions among the copy's images that are worked on together."""
    size = max(1, min(256, VALUES // copy.dataset.first().numel())) if len(copy.rows) else 1
    for start in range(0, len(copy.rows), size):
        yield range(start, min(start + size, len(copy.rows)))


def _read(
    copy: Copy, places: Sequence[int]
) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"], list[str], tuple[str, ...]]:
    """Images, labels and ids at some places, without those that are skipped, and messages about these."""
    rows = [copy.rows[place] for place in places]
    ids = [copy.ids[place] for place in places]
    try:
        return *copy.source.read(rows), ids, ()
    except BadImage:
        if copy.dataset.on_bad_image == "fail" or copy.form == "cifar-c":
            raise
    bad = undecodable(copy.source, rows)
    kept = [place for place, row in enumerate(rows) if row not in bad]
    if not kept:
        return torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64), [], tuple(bad.values())
    return *copy.source.read([rows[place] for place in kept]), [ids[place] for place in kept], tuple(bad.values())


def _encoded(level: NDArray[np.uint8]) -> bytes:
    """An image as a JPEG file."""
    file = BytesIO()
    picture = Image.fromarray(level.squeeze(2) if level.shape[2] == 1 else level)
    picture.save(file, "JPEG", quality=QUALITY, optimize=True)
    return file.getvalue()


def _safe(text: str) -> str:
    """A name that is one on every file system, leads nowhere else and is not hidden."""
    return re.sub(r"[^\w.,+ -]", "_", text).strip(". ")[:120] or "_"


def _class_folders(copy: Copy) -> dict[int, str]:
    """The folder of each class by label, where the dataset has folders that are one to a class; else nothing."""
    labels, ids = copy.source.labels, copy.source.ids
    if labels is None:
        return {}
    pairs = {(int(label), id.split("/")[-2] if "/" in id else "") for label, id in zip(labels, ids, strict=True)}
    folders = {label: _safe(folder) for label, folder in pairs}
    distinct = len(pairs) == len(folders) == len({folder.casefold() for folder in folders.values()})
    return folders if distinct and all(folder for _, folder in pairs) else {}


def _names(ids: Sequence[str], inside: bool) -> list[str]:
    """The name of each image's file; with a digest of the id where two names would be one in a folder.

    Arguments:
        ids: Of the images.
        inside: Whether an id's last folder is the class's.
    """
    parts = [SUFFIX.sub("", id).split("/") for id in ids]
    names = [_safe(part[-1] if inside else "_".join(part)) for part in parts]
    places = [(part[-2] if inside else "", name.casefold()) for part, name in zip(parts, names, strict=True)]
    count = Counter(places)
    return [
        f"{name}-{digest_of(id)}.JPEG" if count[place] > 1 else f"{name}.JPEG"
        for id, name, place in zip(ids, names, places, strict=True)
    ]


def _folders(copy: Copy) -> Iterator[Done]:
    """The layout of ImageNet-C; each image is read once for all its versions, and not at all if they are there."""
    classes, known = _class_folders(copy), copy.source.labels
    names = dict(zip(copy.ids, _names(copy.ids, bool(classes)), strict=True))
    most = max(known, default=0) if known is not None else 0
    roots = {version: copy.folder / version[0] / str(version[1]) for version in copy.versions}

    def places(ids: Sequence[str], labels: Sequence[int]) -> dict[str, str]:
        if min(labels, default=0) < 0:
            raise ValueError(f"{copy.dataset.name} has images without a label, so no folder for them; use cifar-c")
        return {id: f"{classes.get(label, f'{label:05d}')}/{names[id]}" for id, label in zip(ids, labels, strict=True)}

    for chunk in _chunks(copy):
        ids = [copy.ids[place] for place in chunk]
        if known is not None:
            here = places(ids, [known[copy.rows[place]] for place in chunk])
            if all((root / place).is_file() for root in roots.values() for place in here.values()):
                yield Done(len(chunk) * len(roots))
                continue
        images, labels, ids, skipped = _read(copy, chunk)
        here = places(ids, labels.tolist())
        most = max(most, *labels.tolist(), 0)
        for version, root in roots.items():
            _save(copy, version, images, {id: root / here[id] for id in ids})
            yield Done(len(chunk), skipped)
            skipped = ()
    # A class without images keeps its place in the order of the folders.
    for root in roots.values():
        for folder in classes.values() or (f"{label:05d}" for label in range(most + 1)):
            (root / folder).mkdir(parents=True, exist_ok=True)


def _save(copy: Copy, version: tuple[str, int], images: Float[Tensor, "b c h w"], paths: Mapping[str, Path]) -> None:
    """Writes those of the files of some images, named by their ids in order, that are not there."""
    missing = [(index, id) for index, id in enumerate(paths) if not paths[id].is_file()]
    if missing:
        levels = copy.corrupted(images[[index for index, _ in missing]], [id for _, id in missing], version)
        for (_, id), level in zip(missing, levels, strict=True):
            with atomic(paths[id]) as file:
                file.write(_encoded(level))


def _arrays(copy: Copy) -> Iterator[Done]:
    """The layout of CIFAR-10-C; one corruption after the other, each written as it is made."""
    count = len(copy.rows)
    labels = copy.folder / "labels.npy"
    if not labels.is_file():
        known = copy.source.labels
        chosen = (
            np.array([known[row] for row in copy.rows])
            if known is not None
            else np.concatenate([_read(copy, chunk)[1].numpy() for chunk in _chunks(copy)])
        )
        small = chosen.min() >= 0 and chosen.max() < 256
        with atomic(labels) as file:
            np.save(file, np.tile(chosen.astype(np.uint8 if small else np.int64), 5), allow_pickle=False)
    shape = tuple(copy.dataset.first().permute(1, 2, 0).shape)
    for name in copy.corruptions:
        if copy.array(name).is_file():
            yield Done(5 * count)
            continue
        with atomic(copy.array(name)) as file:
            header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": (5 * count, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            start, size = file.tell(), int(np.prod(shape))
            for chunk in _chunks(copy):
                images, _, ids, _ = _read(copy, chunk)
                for severity in copy.severities:
                    levels = copy.corrupted(images, ids, (name, severity))
                    if levels.shape != (len(chunk), *shape):
                        raise ValueError(f"images of {copy.dataset.name} differ in size; an array holds one size")
                    file.seek(start + ((severity - 1) * count + chunk.start) * size)
                    file.write(levels.tobytes())
                    yield Done(len(chunk))
