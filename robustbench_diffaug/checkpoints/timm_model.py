"""Classifiers of the library timm, by the name of the architecture, with local weights."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.conditioning import planes
from robustbench_diffaug.component import Options, suggest
from robustbench_diffaug.files import Weights

__all__ = ["Timm", "build", "fit_state", "load_state"]


class Timm(Checkpoint):
    """Any architecture of timm with weights from a safetensors file; nothing is downloaded.

    Arguments:
        arch: As in `timm.create_model`.
        args: More arguments of the architecture, such as `img_size`.
        channels: Of the input images.
        weights: The file.

    References:
        PyTorch Image Models (Wightman, 2019), https://github.com/huggingface/pytorch-image-models
    """

    kind: Literal["timm"] = "timm"
    arch: str
    args: Options = ()
    channels: PositiveInt = 3
    weights: Weights

    def check(self) -> None:
        """Looks at the file of weights."""
        self.weights.check()

    def load(self) -> nn.Module:
        """The network with its weights; every key must fit."""
        network = build(self.arch, self.args, planes(self.channels, self.wants), self.classes)
        load_state(network, self.weights)
        return network


def build(arch: str, args: Options, channels: int, classes: int) -> nn.Module:
    """A timm architecture with random weights.

    Raises:
        ValueError: If timm has none of that name, or it does not take these arguments.
    """
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
    import timm

    if not timm.is_model(arch):
        raise ValueError(f"timm has no architecture {arch!r}{suggest(arch, timm.list_models())[:200]}")
    options: dict[str, Any] = dict(args)
    try:
        network: nn.Module = timm.create_model(
            arch, pretrained=False, in_chans=channels, num_classes=classes, **options
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"timm cannot build {arch} with {options}: {error}") from error
    return network


def load_state(network: nn.Module, weights: Weights) -> None:
    """Loads a safetensors file into a network, in the network's own precision; every key and shape must fit.

    Raises:
        ValueError: If the file is damaged or a key or shape does not fit; the first few are named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = weights.check()
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{weights.uri} is damaged: {error}") from error
    fit_state(network, state, weights.uri)


def fit_state(network: nn.Module, state: Mapping[str, Any], uri: str) -> None:
    """Puts weights into a network, in the network's own precision; every key and shape must fit.

    Raises:
        ValueError: If one does not; the first few are named.
    """
    expected = network.state_dict()
    odd = [f"missing {name}" for name in expected.keys() - state.keys()]
    odd += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    for name, value in expected.items():
        if name in state and not (isinstance(state[name], Tensor) and state[name].shape == value.shape):
            odd.append(f"{name} is {tuple(getattr(state[name], 'shape', ()))}, not {tuple(value.shape)}")
    if odd:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ValueError(f"{uri} does not fit the network: {'; '.join(sorted(odd)[:3])}{more}")
    network.load_state_dict({name: value.to(expected[name].dtype) for name, value in state.items()})
