"""Classifiers of the library timm, by the name of the architecture, with local weights."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.conditioning import planes
from robustbench_diffaug.component import Options, suggest
from robustbench_diffaug.files import Weights

__all__ = ["Timm", "build", "fit_state", "load_state", "stated"]


class Timm(Checkpoint):
    """Any architecture of timm with weights from a safetensors file; nothing is downloaded.

    `preprocess` may be the word `timm`, for the input size, interpolation, mean and std that timm states for the
    architecture; they are written out in the value, and so in `suite.lock.yaml`.

    Arguments:
        arch: As in `timm.create_model`; a tag, as in 'vit_base_patch16_224.augreg_in1k', says whose preprocessing.
        args: More arguments of the architecture, such as `img_size`.
        channels: Of the input images.
        weights: The file.

    References:
        PyTorch Image Models (Wightman, 2019), https://github.com/huggingface/pytorch-image-models
    """

    kind: Literal["timm"] = "timm"
    may_normalise: ClassVar[bool] = False
    arch: str
    args: Options = ()
    channels: PositiveInt = 3
    weights: Weights

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        """Puts numbers in place of the word."""
        if not isinstance(data, Mapping) or data.get("preprocess") != "timm":
            return data
        arguments = data.get("args")
        size = dict(arguments).get("img_size") if isinstance(arguments, Mapping | tuple) else None
        if data.get("channels", 3) != 3:
            raise ValueError("preprocess: timm is for images of 3 channels; write size, mean and std out")
        return {**data, "preprocess": stated(str(data.get("arch")), size)}

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
    timm = _known(arch)
    options: dict[str, Any] = dict(args)
    try:
        network: nn.Module = timm.create_model(
            arch, pretrained=False, in_chans=channels, num_classes=classes, **options
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"timm cannot build {arch} with {options}: {error}") from error
    return network


def _known(arch: str) -> Any:
    """The module timm, once it is clear that it has an architecture."""
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
    import timm

    if not timm.is_model(arch):
        raise ValueError(f"timm has no architecture {arch!r}{suggest(arch, timm.list_models())[:200]}")
    return timm


def stated(arch: str, size: int | None = None) -> dict[str, Any]:
    """What timm states for the images of an architecture (its `pretrained_cfg`), as the fields of `Preprocess`.

    Arguments:
        arch: With or without the tag of some weights; timm's first weights count where it is left out.
        size: In pixels, in place of the stated input size.

    Raises:
        ValueError: If timm has no such architecture or tag, or states a size of unequal height and width.
    """
    models = _known(arch).models
    try:
        config = models.get_pretrained_cfg(arch, allow_unregistered=False)
    except RuntimeError as error:
        tags = ", ".join(models.list_pretrained(f"{arch.partition('.')[0]}.*")[:12])
        raise ValueError(f"timm has no weights {arch!r}; there are {tags}") from error
    if config is None:
        raise ValueError(f"timm states no preprocessing for {arch}; write size, mean and std out")
    height, width = config.input_size[1:]
    if size is None and height != width:
        raise ValueError(f"timm's input of {arch} is {width}x{height}, not square; write the preprocessing out")
    return {
        "size": size or height,
        "interpolation": config.interpolation,
        "mean": config.mean,
        "std": config.std,
    }


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
