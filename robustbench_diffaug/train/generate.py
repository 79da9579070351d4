"""Labelled images drawn from a class-conditional denoiser, as a folder of PNG files or an npz file."""

import hashlib
import shutil
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import yaml
from jaxtyping import Float, Int, UInt8
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from robustbench_diffaug import document, rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.component import Outside, Value, digest_of
from robustbench_diffaug.diffusion.base import ConditionalDenoise, Denoiser, Posterior, Sigma
from robustbench_diffaug.diffusion.samplers import ddim
from robustbench_diffaug.files import atomic

__all__ = ["Generation", "card", "run", "sample"]


class Generation(Value):
    """Draws images of every class by DDIM.

    An image is a function of the denoiser, seed, steps, mixing, size, class and index alone.

    Arguments:
        name: Of the folder or file, without its ending; not one that begins with a dot.
        seed: Of the noise that images begin as.
        denoiser: A class-conditional one.
        per_class: Images of each class.
        steps: Of DDIM, evenly over the schedule from its last time.
        eta: 0 is deterministic; 1 adds the noise of ancestral sampling in each step, which forgives a denoiser more.
        start: The time that images begin at; left out, the last. Small denoisers know the overall grey of an image
            badly where there is little but noise, so that beginning lower, from noise around `mean`, can be better.
        mean: The grey that images begin around, in [0, 1].
        mixing: `D = (1 - mixing) D(x) + mixing D(x | y)`: 1 is conditional, above it is classifier-free guidance.
        size: Height and width of the images; left out, what the denoiser is made for.
        channels: Of the images; left out, the denoiser's.
        form: 'folder' of `<class>/<index>.png`, or 'arrays' in an uncompressed npz file.
        batch: Images drawn together; no result depends on it.

    References:
        Denoising Diffusion Implicit Models (Song et al., 2020), https://arxiv.org/abs/2010.02502
        Classifier-Free Diffusion Guidance (Ho and Salimans, 2022), https://arxiv.org/abs/2207.12598
    """

    kind: Literal["generation"]
    name: str = Field(pattern=r"^[^./\\][^/\\]*$", max_length=50)
    seed: NonNegativeInt = 0
    denoiser: Denoiser
    per_class: PositiveInt
    steps: PositiveInt = 50
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    start: PositiveInt | None = None
    mean: Annotated[float, Field(ge=0, le=1)] = 0.5
    mixing: float = 1.0
    size: PositiveInt | None = None
    channels: PositiveInt | None = None
    form: Literal["folder", "arrays"] = "folder"
    batch: Annotated[PositiveInt, Outside] = 128

    @model_validator(mode="after")
    def _possible(self) -> "Generation":
        if self.denoiser.classes() is None:
            raise ValueError("this denoiser knows no classes; give a class-conditional one")
        times = len(self.denoiser.sigmas())
        if self.start is not None and self.start >= times:
            raise ValueError(f"start is {self.start}; the denoiser's last time is {times - 1}")
        if self.steps > self.top + 1:
            raise ValueError(f"steps is {self.steps}; there are {self.top + 1} times to step through")
        for name, fixed in (("channels", self.denoiser.channels()), ("size", self.denoiser.size())):
            given = getattr(self, name)
            if given is None and fixed is None:
                raise ValueError(f"the denoiser takes any {name}; give {name}")
            if name == "channels" and fixed is not None and given not in (None, fixed):
                raise ValueError(f"channels is {given}, the denoiser is for {fixed}; leave channels out")
        if self.form == "folder" and self.shape[0] not in (1, 3):
            raise ValueError(f"a PNG file has 1 or 3 channels, not {self.shape[0]}; write form: arrays")
        return self

    @property
    def top(self) -> int:
        """The time that images begin at."""
        return len(self.denoiser.sigmas()) - 1 if self.start is None else self.start

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image: channels, height, width."""
        channels, size = self.channels or self.denoiser.channels(), self.size or self.denoiser.size()
        assert channels is not None and size is not None  # _possible has looked
        return channels, size, size

    @property
    def classes(self) -> int:
        """The number of classes, all of which are drawn."""
        classes = self.denoiser.classes()
        assert classes is not None  # _possible has looked
        return classes

    @property
    def digest(self) -> str:
        """32 hexadecimal digits of all that the images depend on, the denoiser's weights included."""
        return digest_of(self.identity(), 16)

    @property
    def output(self) -> str:
        """The name of what is written."""
        return self.name if self.form == "folder" else f"{self.name}.npz"


def sample(
    recipe: Generation, denoise: ConditionalDenoise, labels: Int[Tensor, " n"], indices: Int[Tensor, " n"]
) -> Float[Tensor, "n c h w"]:
    """The images of some classes and indices, before rounding to 8 bits, on the device of the labels.

    At the first of its times an image is taken for standard normal noise, as `x_T` of a model of images in [-1, 1] is;
    for images in [0, 1] at the level sigma that is `mean + sqrt(1/4 + sigma^2) eps`. Steps go through the times
    `T - i (T + 1) / steps`, rounded, and end at the denoiser's estimate. A step from the level s to e goes down to
    `sqrt(e^2 - n^2)`, and noise of `n = eta e sqrt(1 - e^2 / s^2)` is added.
    """
    pairs = zip(labels.tolist(), indices.tolist(), strict=True)
    keys = [rng.key("generation", recipe.seed, label, index) for label, index in pairs]

    def noise(draw: int) -> Float[Tensor, "n c h w"]:
        drawn = [rng.normal(key, range(draw, draw + 1), recipe.shape) for key in keys]
        return torch.from_numpy(np.concatenate(drawn)).to(labels.device)

    def told(noisy: Float[Tensor, "n c h w"], sigma: Sigma) -> Posterior:
        return denoise(noisy, sigma, labels)

    times = np.round((recipe.top + 1) * (1 - np.arange(recipe.steps) / recipe.steps)).astype(np.int64) - 1
    levels = [*map(float, recipe.denoiser.sigmas()[times]), 0.0]
    images: Tensor = recipe.mean + (0.25 + levels[0] ** 2) ** 0.5 * noise(0)
    with torch.no_grad():
        for step, (level, following) in enumerate(pairwise(levels), 1):
            added = recipe.eta * following * (1 - (following / level) ** 2) ** 0.5
            images = ddim(told, images, level, (following**2 - added**2) ** 0.5)
            images = images + added * noise(step) if added else images
    return images


def run(recipe: Generation, folder: Path, device: str = "cpu") -> Iterator[tuple[int, int]]:
    """Draws the images, yielding (done, total) after every batch, and last once the output is in its place.

    The output appears whole or not at all, with a card and an entry to paste into a suite or a recipe beside it.
    Finished classes are kept in a hidden folder, from which a stopped run continues. If the output is there already,
    (total, total) is all that is yielded.

    Arguments:
        recipe: What to draw.
        folder: Where.
        device: 'cpu' or 'cuda[:N]'.

    Raises:
        ValueError: If there is another recipe's output of that name, or the denoiser's files are missing or damaged.
    """
    total = recipe.classes * recipe.per_class
    if (folder / recipe.output).exists():
        _refuse_another(recipe, folder)
        yield total, total
        return
    work = folder / f".{recipe.name}.{recipe.digest}.part"
    work.mkdir(parents=True, exist_ok=True)
    pending = [label for label in range(recipe.classes) if not _part(recipe, work, label).exists()]
    done = total - len(pending) * recipe.per_class
    denoise = recipe.denoiser.loaded_mixed(Limits(device=device), recipe.mixing)
    together = max(1, recipe.batch // recipe.per_class)  # classes that fit a batch
    for start in range(0, len(pending), together):
        group = pending[start : start + together]
        pairs = torch.tensor(list(product(group, range(recipe.per_class))), device=device)
        drawn = []
        for chunk in pairs.split(recipe.batch):
            drawn.append(_eight_bits(sample(recipe, denoise, chunk[:, 0], chunk[:, 1])))
            done += len(chunk)
            if done < total:
                yield done, total
        for label, images in zip(group, np.split(np.concatenate(drawn), len(group)), strict=True):
            _write_class(recipe, work, label, images)
    _publish(recipe, folder, work)
    yield total, total


def card(recipe: Generation, digest: str) -> dict[str, Any]:
    """Where the images come from, for people and programs.

    Arguments:
        recipe: What drew them.
        digest: SHA-256 of the npz file, or of the PNG files one after the other.
    """
    return {
        "name": recipe.name,
        "recipe": recipe.digest,
        "denoiser": {"kind": recipe.denoiser.kind, "fingerprint": recipe.denoiser.fingerprint},
        "seed": recipe.seed,
        "sampler": {
            "kind": "ddim",
            "steps": recipe.steps,
            "eta": recipe.eta,
            "start": recipe.top,
            "mixing": recipe.mixing,
        },
        "images": {"classes": recipe.classes, "per_class": recipe.per_class, "shape": list(recipe.shape)},
        "sha256": digest,
        "versions": {name: version(name) for name in ("torch", "diffusers", "robustbench-diffaug")},
    }


def _eight_bits(images: Float[Tensor, "n c h w"]) -> UInt8[np.ndarray, "n h w c"]:
    pixels: np.ndarray = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def _part(recipe: Generation, work: Path, label: int) -> Path:
    """Where a finished class lies; names are as long as each other, so that their order is that of the classes."""
    name = f"{label:0{len(str(recipe.classes - 1))}d}"
    return work / (name if recipe.form == "folder" else f"{name}.npy")


def _write_class(recipe: Generation, work: Path, label: int, images: np.ndarray) -> None:
    """Writes a class whole or not at all."""
    pixels, path = images[..., 0] if images.shape[-1] == 1 else images, _part(recipe, work, label)
    if recipe.form == "arrays":
        with atomic(path) as file:
            np.save(file, pixels)
        return
    from PIL import Image

    unfinished = path.with_name(f".{path.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was stopped
    unfinished.mkdir()
    width = len(str(recipe.per_class - 1))
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(unfinished / f"{index:0{width}d}.png")
    unfinished.rename(path)


def _publish(recipe: Generation, folder: Path, work: Path) -> None:
    """Puts the card and the entry into place, and then the output, so that an output is never without its card."""
    parts = [_part(recipe, work, label) for label in range(recipe.classes)]
    entry: dict[str, Any] = {"kind": recipe.form, "name": recipe.name}
    if recipe.form == "folder":
        for stopped in work.glob(".*"):  # a class that a stopped run had not finished
            shutil.rmtree(stopped)
        ready, files = work, [path for part in parts for path in sorted(part.iterdir())]
        entry |= {"root": recipe.output, "mode": "L" if recipe.shape[0] == 1 else "RGB"}
    else:
        ready = work / recipe.output
        _write_npz(ready, parts)
        files = [ready]
        entry |= {"file": recipe.output}
    _write_yaml(folder / f"{recipe.name}.card.yaml", card(recipe, _digest(files)))
    _write_yaml(folder / f"{recipe.name}.yaml", entry)
    ready.replace(folder / recipe.output)
    shutil.rmtree(work, ignore_errors=True)


def _write_npz(path: Path, parts: list[Path]) -> None:
    """Joins the classes, one in memory at a time, as `images` and `labels`, uncompressed so that they can be mapped."""
    mapped = [np.load(part, mmap_mode="r") for part in parts]
    shape = (sum(map(len, mapped)), *mapped[0].shape[1:])
    labels = np.repeat(np.arange(len(parts)), [len(part) for part in mapped])
    with atomic(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for part in mapped:
                member.write(part.tobytes())
        with archive.open("labels.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, labels, version=(1, 0))


def _digest(files: list[Path]) -> str:
    """SHA-256 of a file, or of several one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _refuse_another(recipe: Generation, folder: Path) -> None:
    path = folder / f"{recipe.name}.card.yaml"
    found = yaml.safe_load(path.read_text()) if path.exists() else None
    if not (isinstance(found, dict) and found.get("recipe") == recipe.digest):
        raise ValueError(
            f"{folder / recipe.output} is there already and not of this recipe; delete it or choose another name"
        )


def _write_yaml(path: Path, content: object) -> None:
    with atomic(path) as file:
        file.write(document.dump(content))
