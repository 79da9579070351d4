"""Networks that a Python program hands over, made checkpoints by showing each an image."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustbench_diffaug.checkpoints.base import Checkpoint, Preprocess
from robustbench_diffaug.checkpoints.module import Held, Module
from robustbench_diffaug.component import Value, trusting
from robustbench_diffaug.document import Document
from robustbench_diffaug.suite import Bench

__all__ = ["Given", "Network", "entries", "named"]


@dataclass(frozen=True, eq=False)
class Network:
    """A network and what rdiff must know of it. A bare `nn.Module` is one with nothing said.

    Arguments:
        module: From images in [0, 1], shape (n, channels, h, w), behind `preprocess`, to logits, shape (n, classes).
        preprocess: A `Preprocess` or its fields, as `{"mean": [0.5], "std": [0.5]}`; or torchvision's `Normalize` or
            a preset such as `weights.transforms()`, of which mean, std, size and crop are taken.
        classes: The number of outputs; left out, it is found by showing the network an image.
        channels: Of the images; left out, likewise.
        head: The dotted name of the last layer; left out, it is found.
        microbatch: The number of images in every call; records depend on it.
    """

    module: nn.Module
    preprocess: object = None
    classes: int | None = None
    channels: int | None = None
    head: str = ""
    microbatch: int = 128


Given: TypeAlias = nn.Module | Network | Checkpoint | Mapping[str, Any]
"""A checkpoint: a network, a value, or what an entry of a suite file holds."""


def entries(
    given: Mapping[str, Given], benches: Sequence[Bench], trust: bool, held: dict[str, Held]
) -> list[Checkpoint]:
    """The checkpoints of what a caller gave.

    Arguments:
        given: By id.
        benches: Whose images networks are shown, to find their classes and channels.
        trust: Whether mappings may name code of the user's.
        held: The copies of networks are added to it, by id.

    Raises:
        ValueError: If one is none, or its network fails on an image; one line that begins with its id.
    """
    if isinstance(given, nn.Module) or not isinstance(given, Mapping):
        raise ValueError(f"checkpoints: needed is a mapping such as {{'mine': network}}, not {type(given).__name__}")
    return [_entry(id, value, benches, trust, held) for id, value in given.items()]


@contextmanager
def named(id: str) -> Iterator[None]:
    """Within it errors begin with the checkpoint that they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"checkpoint {id}: {error}") from error


def _entry(id: str, value: object, benches: Sequence[Bench], trust: bool, held: dict[str, Held]) -> Checkpoint:
    with named(id), trusting(trust):
        if isinstance(value, Checkpoint):
            return value.model_copy(update={"id": id})
        if isinstance(value, Mapping) and any(isinstance(part, Tensor) for part in value.values()):
            raise ValueError("needed is a torch.nn.Module, not its state_dict; load that into the network first")
        if isinstance(value, Mapping):
            return Document(None, {**value, "id": id}, {}).validate(Checkpoint, {"folder": Path.cwd()})
        if not isinstance(value, nn.Module | Network):
            other = "; for a file of weights give what an entry of a suite holds, a mapping with kind, arch and weights"
            told = other if isinstance(value, str | Path) else ""
            raise ValueError(f"needed is a torch.nn.Module, not {type(value).__name__}{told}")
        network = value if isinstance(value, Network) else Network(value)
        if not isinstance(network.module, nn.Module):
            raise ValueError(f"needed is a torch.nn.Module, not {type(network.module).__name__}")
        held[id] = Held(network.module)
        return _module(id, network, _first(id, benches), held[id])


def _first(id: str, benches: Sequence[Bench]) -> Float[Tensor, "1 c h w"]:
    """The first image of the first bench that is for a checkpoint."""
    for bench in benches:
        if bench.checkpoints is None or id in bench.checkpoints:
            return bench.parts()[0].first()[None]
    raise ValueError("no bench of the suite is for it; add it to the checkpoints of one")


def _module(id: str, network: Network, image: Float[Tensor, "1 c h w"], held: Held) -> Module:
    preprocess = _preprocess(network.preprocess)
    channels, outputs = _seen(network, preprocess, image, held)
    if network.classes not in (None, outputs):
        raise ValueError(f"the network has {outputs} outputs, not {network.classes}; correct its classes")
    types = {parameter.dtype for parameter in network.module.parameters()}
    fields = {
        "id": id,
        "classes": outputs,
        "channels": channels,
        "preprocess": preprocess,
        "precision": "bfloat16" if types == {torch.bfloat16} else "float32",
        "head": network.head,
        "microbatch": network.microbatch,
    }
    return Module.of(held, **fields)


def _seen(network: Network, preprocess: Preprocess, image: Float[Tensor, "1 c h w"], held: Held) -> tuple[int, int]:
    """The channels that a network takes, and how many outputs it then has."""
    shown_to = held.copied()  # a forward may leave something behind
    own = image.shape[1]
    tries = [network.channels] if network.channels else [own] if own == 3 else [own, 3]
    dtype = next((parameter.dtype for parameter in shown_to.parameters()), torch.float32)
    reasons = []
    for channels in tries:
        shown = image if channels == own else image[:, :1].expand(-1, channels, -1, -1)
        try:
            with torch.no_grad():
                outputs = shown_to(preprocess(shown).to(dtype))
        except Exception as error:  # whatever the user's network raises
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
            continue
        if not isinstance(outputs, Tensor):
            raise ValueError(f"the network returns {type(outputs).__name__}, not a tensor of logits; wrap it")
        if outputs.ndim != 2 or len(outputs) != 1:
            raise ValueError(f"the network makes {tuple(outputs.shape)} of one image; needed is (1, classes)")
        return channels, outputs.shape[1]
    shape = "x".join(map(str, image.shape[1:]))
    raise ValueError(
        f"the network fails on an image of shape {shape} ({reasons[0]}); if it takes another size, "
        "give Network(module, preprocess={'size': ...})"
    )


def _preprocess(given: object) -> Preprocess:
    """Of nothing, a value, a mapping, or torchvision's transform."""
    if isinstance(given, Preprocess):
        return given
    if given is None or isinstance(given, Mapping):
        fields = dict(given or {})
    elif getattr(given, "mean", None) is None or getattr(given, "std", None) is None:
        needed = "a Preprocess, a mapping of its fields, or a transform with mean and std, such as Normalize"
        raise ValueError(f"preprocess: needed is {needed}, not {type(given).__name__}")
    else:
        fields = _transform(given)
    return Document(None, {"preprocess": fields}, {}).validate(_Holder, {}).preprocess


class _Holder(Value):
    """So that messages name the key."""

    preprocess: Preprocess


def _transform(given: Any) -> dict[str, object]:
    """The fields of torchvision's `Normalize`, or of its presets, which resize, crop and normalise."""
    fields: dict[str, object] = {"mean": _plain(given.mean), "std": _plain(given.std)}
    for name, theirs in (("size", "resize_size"), ("crop", "crop_size")):
        if sides := getattr(given, theirs, None):
            fields[name] = sides[0] if isinstance(sides, list | tuple) else sides
    if mode := getattr(given, "interpolation", None):
        fields["interpolation"] = getattr(mode, "value", mode)
    return fields


def _plain(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in torch.as_tensor(values).flatten().tolist())
