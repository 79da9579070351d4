"""What is found out about a checkpoint by loading it and showing it some images, for `rdiff check`."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float
from rich.console import Console
from rich.text import Text
from torch import Tensor

from robustbench_diffaug import document, rng, suite
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.checkpoints.outputs import odd
from robustbench_diffaug.component import Value, look_again
from robustbench_diffaug.data.embedded import Mnist5k
from robustbench_diffaug.diffusion.base import Denoiser
from robustbench_diffaug.files import Weights, sha256
from robustbench_diffaug.gate import CAUSES, no_better_than_chance
from robustbench_diffaug.notes import noting
from robustbench_diffaug.weight_files import examine

__all__ = ["Found", "Shown", "entries", "entry_of", "images_for", "look", "show"]

NOISE = 16  # images of noise, where there are no better ones
MNIST = 64
SIZE = 32  # of these images, where nothing says another


@dataclass(frozen=True)
class Shown:
    """Images that a network is tried on.

    Arguments:
        name: What they are.
        images: In [0, 1].
        labels: Their classes, where they are known.
    """

    name: str
    images: Float[Tensor, "n c h w"]
    labels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Found:
    """What was found out about an entry.

    Arguments:
        id: Of the entry.
        facts: A word and a text each, in the order of reading.
        warnings: What is odd, though it can be used.
        entry: YAML to paste, with all that was read or found written out.
    """

    id: str
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    entry: str


def entries(file: Path, trust: bool = False) -> dict[str, Checkpoint]:
    """The checkpoints of a file of one entry, a list of them, or a suite, by where they stand.

    Arguments:
        file: Of YAML.
        trust: Whether it may name code of the user's.

    Raises:
        ValueError: If something is wrong with it; one line with file, line and key.
    """
    data = document.read(file).data
    if not (isinstance(data, dict) and "checkpoints" in data):
        return suite.entries(file, trust)
    loaded = suite.load(str(file), trust=trust)
    return {loaded.places["checkpoint", entry.id]: entry for entry in loaded.suite.checkpoints}


def look(entry: Checkpoint, folder: Path, device: str = "cpu") -> Found:
    """Loads a checkpoint and shows it images.

    Arguments:
        entry: Any, a denoiser too.
        folder: Where relative paths of the entry to paste start.
        device: Where the network is.

    Raises:
        ValueError: If it cannot be used; the message says why, and what to type.
    """
    look_again()
    entry.check()
    facts, warnings = [*_entry_facts(entry)], list(entry.warnings())
    denoiser = entry.analysed()
    if denoiser is not None:
        facts += _denoiser_facts(entry, denoiser, device)
    else:
        with noting() as notes:
            model = entry.loaded(Limits(device=device), keep=False)
        told = [text.removeprefix(f"{getattr(getattr(entry, 'weights', None), 'uri', '')}: ") for text in notes]
        facts += [("loading", text) for text in told or ["every name and shape fits as it is"]]
        facts += [*_network_facts(entry, model), *entry.about()]
        more, odd_ones = _outputs(entry, model, device)
        facts, warnings = facts + more, warnings + odd_ones
    return Found(entry.id, tuple(facts), tuple(warnings), entry_of(entry, folder))


def _entry_facts(entry: Checkpoint) -> Iterator[tuple[str, str]]:
    """What can be said before the network is loaded."""
    fields = entry.model_dump(mode="json", serialize_as_any=True)
    args = " ".join(f"{key}={value}" for key, value in dict(fields.get("args") or ()).items())
    yield "kind", " ".join(filter(None, (entry.kind, fields.get("arch"), args)))
    weights = getattr(entry, "weights", None)
    if not isinstance(weights, Weights):
        return
    path = weights.pinned()
    yield "file", f"{weights.uri}, {_form(path)}, {_size(path.stat().st_size)}"
    digest = sha256(path)
    yield "sha256", f"{digest}, as pinned" if weights.sha256 else f"{digest}; the entry below pins it"


def _form(path: Path) -> str:
    """What a file of weights is; files of other kinds go by their suffix."""
    try:
        return {"safetensors": "safetensors", "torch": "torch.save"}[examine(path, path.name).form]
    except ValueError:
        return path.suffix.removeprefix(".") or "a file"


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"


def _network_facts(entry: Checkpoint, model: Model) -> Iterator[tuple[str, str]]:
    count = sum(parameter.numel() for parameter in model.network.parameters())
    yield "parameters", f"{count:,}, computed in {entry.precision}"
    channels = entry.takes()
    words = {None: "channels unknown", 1: "1 channel", 3: "3 channels (grey images are shown three times over)"}
    pre = entry.preprocess
    size = pre.crop or pre.size
    resized = f"{size}x{size} after preprocess" if size else "as large as the images"
    yield "input", f"{words.get(channels, f'{channels} channels')}, {resized}"
    yield "classes", str(entry.classes)
    if entry.wants:
        yield "wants", " and ".join(entry.wants)
        return
    low = min((0 - mean) / std for mean, std in zip(pre.mean, pre.std, strict=True))
    high = max((1 - mean) / std for mean, std in zip(pre.mean, pre.std, strict=True))
    how = f"mean {list(pre.mean)}, std {list(pre.std)}" if pre.normalises else "no normalisation"
    yield "values", f"images in [0, 1] reach the network in [{low:.4g}, {high:.4g}] ({how})"


def images_for(entry: Checkpoint) -> Iterator[Shown]:
    """Images to try a network on, the likeliest first; the same always.

    MNIST's test images for a network of ten classes that takes them, else noise in [0, 1]. Where it is not known how
    many channels a network takes, grey images are followed by coloured ones.
    """
    known = entry.takes()
    if entry.classes == 10 and known in (None, 1, 3):
        dataset = Mnist5k(limit=MNIST)
        images, labels = dataset.opened().read(dataset.rows())
        if _takes(entry, *images.shape[-2:]):
            for channels in (1, 3) if known is None else (1,):  # a model shows grey images to three channels itself
                yield Shown("MNIST test images", images.expand(-1, channels, -1, -1), tuple(labels.tolist()))
    sizes = [size for size in (SIZE, 224, 299, 384, 448, 512, 160, 240, 256, 320) if _takes(entry, size, size)]
    for size in (sizes[:2] if known is None else sizes[:1]) or [SIZE]:
        for channels in (3, 1) if known is None else (known,):
            noise = rng.uniform(rng.key("check", "noise"), range(NOISE), (channels, size, size))
            yield Shown("images of uniform noise", torch.from_numpy(noise.astype(np.float32)))


def _takes(entry: Checkpoint, height: int, width: int) -> bool:
    try:
        entry.fits(height, width)
    except ValueError:
        return False
    return min(height, width) >= (0 if entry.preprocess.size else entry.preprocess.crop or 0)


def _tried(entry: Checkpoint, model: Model, device: str) -> tuple[Shown, Float[Tensor, "n k"], float]:
    """The first images that the network takes, what it makes of them, and the seconds that took.

    Raises:
        ValueError: If it takes none; or as of `Model.logits`.
    """
    refused = []
    for shown in images_for(entry):
        images = shown.images.to(device)
        try:
            begun = time.perf_counter()
            logits = model.logits(images)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            return shown, logits, time.perf_counter() - begun
        except RuntimeError as error:
            refused.append((f"{shown.name} of {_shape(images)}", " ".join(str(error).split())[:200]))
    named = ", ".join(dict.fromkeys(what for what, _ in refused))
    raise ValueError(f"{entry.id} cannot take {named}: {refused[0][1]}; preprocess: {{size: N}} gives it another size")


def _shape(images: Float[Tensor, "n c h w"]) -> str:
    return "x".join(map(str, images.shape[1:]))


@torch.no_grad()
def _outputs(entry: Checkpoint, model: Model, device: str) -> tuple[list[tuple[str, str]], list[str]]:
    """What the network makes of images: facts and warnings.

    Raises:
        ValueError: If its outputs are no logits of its classes.
    """
    if entry.wants:
        return [("outputs", "not tried: the network wants more than an image")], []
    shown, logits, seconds = _tried(entry, model, device)
    warnings = list(odd(logits, model.dtype))
    count, calls = len(logits), -(-len(logits) // entry.microbatch)
    facts = [("shown", f"{count} {shown.name} of {_shape(shown.images)}")]
    facts += [_of_image(place, row, shown) for place, row in enumerate(logits[:2].cpu())]
    predicted = logits.argmax(dim=1).tolist()
    counts = ", ".join(f"class {each} {times}" for each, times in Counter(predicted).most_common(5))
    facts += [("logits", f"{float(logits.min()):.4g} to {float(logits.max()):.4g}")]
    facts += [("predicted", f"{counts}{', ...' if len(set(predicted)) > 5 else ''}")]
    if shown.labels:
        right = sum(map(int.__eq__, predicted, shown.labels))
        chance = no_better_than_chance(right, count, entry.classes)
        worth = f", which chance might give; if it knows digits: {CAUSES}" if chance else ""
        facts += [("right", f"{right} of {count} {shown.name}{worth}")]
    facts += [("speed", f"{seconds / (calls * entry.microbatch):.2g} s an image, {entry.microbatch} at a time")]
    return facts, warnings


def _of_image(place: int, logits: Float[Tensor, " k"], shown: Shown) -> tuple[str, str]:
    """The likeliest classes of one image."""
    top = logits.double().softmax(dim=0).topk(min(3, len(logits)))
    classes = ", ".join(
        f"class {c} {100 * p:.1f} %" for p, c in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    )
    return f"image {place + 1}", classes + (f" (a {shown.labels[place]})" if shown.labels else "")


@torch.no_grad()
def _denoiser_facts(entry: Checkpoint, denoiser: Denoiser, device: str) -> Iterator[tuple[str, str]]:
    """What a denoiser is, and how far it is off at one noise level."""
    yield "denoiser", denoiser.kind
    sigmas = denoiser.sigmas()
    yield "sigma", f"{float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g} in {len(sigmas)} times, of images in [0, 1]"
    size, channels = denoiser.size() or SIZE, denoiser.channels() or 1
    yield "images", f"{denoiser.channels() or 'any'} channels, {denoiser.size() or 'any'} pixels high and wide"
    if denoiser.classes():
        yield "classes", f"{denoiser.classes()}, as conditions"
    shape = (channels, size, size)
    dataset = Mnist5k(limit=NOISE)
    name, clean = "MNIST test images", dataset.opened().read(dataset.rows())[0]
    if tuple(clean.shape[1:]) != shape:
        noise = rng.uniform(rng.key("check", "noise"), range(NOISE), shape)
        name, clean = "images of uniform noise", torch.from_numpy(noise.astype(np.float32))
    sigma = float(sigmas[np.abs(sigmas - 0.5).argmin()])
    normal = torch.from_numpy(rng.normal(rng.key("check", "sigma"), range(len(clean)), shape))
    denoise = denoiser.loaded(Limits(device=device))
    mean = denoise((clean + sigma * normal).to(device), sigma).mean.cpu()
    if not bool(torch.isfinite(mean).all()):
        raise ValueError(f"{entry.id} gives NaN or infinite images at sigma {sigma:.4g}")
    error = float((mean - clean).square().mean().sqrt())
    yield "error", f"{error:.3g} (root mean square) at sigma {sigma:.3g} on {len(clean)} {name}"


def entry_of(entry: Checkpoint, folder: Path) -> str:
    """An entry as YAML to paste: what differs from the defaults, and all that its weights said; their digest is pinned.

    Arguments:
        entry: Any.
        folder: Where relative paths start.
    """
    read = ("classes", "channels") if entry.analysed() is None else ()
    inside = f"{folder.resolve()}{os.sep}"  # paths were made absolute when the entry was read
    fields = {"kind": entry.kind, "id": entry.id, **_kept(entry, read)}
    fields = {key: value.removeprefix(inside) if isinstance(value, str) else value for key, value in fields.items()}
    weights = getattr(entry, "weights", None)
    if isinstance(weights, Weights):
        named = {"entry": weights.entry} if weights.entry else {}
        fields["weights"] = {"uri": weights.uri.removeprefix(inside), "sha256": weights.contents(), **named}
    return "".join(_line(key, fields[key]) for key in sorted(fields, key=_place))


FIRST = ("kind", "id", "arch", "args", "weights", "classes", "channels", "preprocess")


def _place(key: str) -> int:
    return FIRST.index(key) if key in FIRST else len(FIRST)


def _kept(value: Value, always: Sequence[str] = ()) -> dict[str, Any]:
    """The fields that differ from their defaults, the kinds, and some more; parts of it likewise."""
    dumped = value.model_dump(mode="json")
    return {
        name: _plain(getattr(value, name), dumped[name])
        for name, field in type(value).model_fields.items()
        if name == "kind" or name in always or getattr(value, name) != field.default
    }


def _plain(part: object, dumped: object) -> object:
    """A field as it is written, given as it is dumped."""
    if isinstance(part, Value):
        return _kept(part)
    if isinstance(part, tuple) and any(isinstance(each, Value) for each in part):
        return [_plain(each, each) for each in part]
    return dumped


def _line(key: str, value: object) -> str:
    """A key of YAML on one line."""
    text = yaml.dump(value, Dumper=document.Dumper, default_flow_style=True, sort_keys=False, width=10**6)
    return f"{key}: {text.removesuffix('...' + chr(10)).strip()}\n"


def show(found: Found, console: Console) -> None:
    """Prints what was found: in colours on a terminal, in plain lines elsewhere.

    Arguments:
        found: About one entry.
        console: Where to.
    """

    def line(text: Text) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    width = max(len(word) for word, _ in found.facts)
    line(Text(found.id, "bold"))
    before = ""
    for word, text in found.facts:
        line(Text.assemble("  ", ("" if word == before else word).ljust(width), "  ", text))
        before = word
    for warning in found.warnings:
        line(Text.assemble(("  warning: ", "yellow"), warning))
    line(Text("  entry"))
    for text in found.entry.splitlines():
        line(Text(f"    {text}", "cyan"))
