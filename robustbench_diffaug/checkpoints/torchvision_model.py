"""Classifiers of the library torchvision, by the name of the architecture, with local weights."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from torch import nn

from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.component import Options, suggest
from robustbench_diffaug.files import Weights
from robustbench_diffaug.notes import note
from robustbench_diffaug.state import State, fit_state, read_state

__all__ = ["Torchvision", "stated"]

OLD_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
"""Names of layers in the published files of DenseNet, which are older than the networks' names."""
ONE_SIZE = {"vit_": ("image_size", 224), "maxvit_": ("input_size", (224, 224))}
"""By the beginnings of names: architectures that take one size alone, the argument that says it, and its default."""


class Torchvision(Checkpoint):
    """Any classifier of torchvision with weights from a file; nothing is downloaded.

    `preprocess` may be the word `torchvision`, for the resizing, crop, mean and std that torchvision states for the
    architecture's default weights; they are written out in the value.

    Arguments:
        arch: As in `torchvision.models.get_model`.
        args: More arguments of the architecture, such as `dropout`.
        weights: The file.

    References:
        TorchVision: PyTorch's Computer Vision library (TorchVision maintainers, 2016), https://github.com/pytorch/vision
    """

    kind: Literal["torchvision"] = "torchvision"
    may_normalise: ClassVar[bool] = False
    arch: str
    args: Options = ()
    weights: Weights

    def takes(self) -> int:
        """All of torchvision's take 3 channels."""
        return 3

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        """Puts numbers in place of the word."""
        if not isinstance(data, Mapping) or data.get("preprocess") != "torchvision":
            return data
        return {**data, "preprocess": stated(str(data.get("arch")))}

    def check(self) -> None:
        """Looks at the name of the architecture and at the file of weights."""
        _known(self.arch)
        self.weights.check()

    def fits(self, height: int, width: int) -> None:
        """Finds that images have the one size that the architecture takes, where it takes one."""
        name, default = next((ONE_SIZE[start] for start in ONE_SIZE if self.arch.startswith(start)), ("", 0))
        size = dict(self.args).get(name, default)
        needed = size if isinstance(size, tuple) else (size, size)
        given = self.preprocess.sized(height, width)
        if name and given != needed:
            raise ValueError(
                f"{self.arch} takes images of {needed[1]}x{needed[0]} alone, and is given {given[1]}x{given[0]}; write "
                f"preprocess: {{size: {needed[0]}}}, or build it for others by args: {{{name}: {given[0]}}}"
            )

    def load(self) -> nn.Module:
        """The network with its weights; every key must fit."""
        network = _built(self.arch, self.classes, dict(self.args))
        fit_state(network, _renamed(read_state(self.weights), self.weights.uri), self.weights.uri)
        return network


def _renamed(state: State, uri: str) -> State:
    """Weights by the names of today's torchvision."""
    tensors = {OLD_LAYER.sub(r"\1\2.", name): value for name, value in state.tensors.items()}
    if tensors.keys() != state.tensors.keys():
        note(f"{uri}: has the old names of DenseNet's layers, such as norm.1 for norm1")
    return State(tensors, state.notes)


def _known(arch: str) -> Any:
    """The module torchvision.models, once it is clear that it has a classifier of that name."""
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
    from torchvision import models

    names = models.list_models(module=models)
    if arch not in names:
        raise ValueError(f"torchvision has no classifier {arch!r}{suggest(arch, names)[:200]}")
    return models


def _built(arch: str, classes: int, args: Mapping[str, Any]) -> nn.Module:
    auxiliary = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}  # else they warn
    try:
        network: nn.Module = _known(arch).get_model(arch, weights=None, **{"num_classes": classes, **auxiliary, **args})
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"torchvision cannot build {arch} with {dict(args)}: {error}") from error
    return network


def stated(arch: str) -> dict[str, Any]:
    """What torchvision states for the images of an architecture's default weights, as the fields of `Preprocess`.

    Raises:
        ValueError: If torchvision has no such classifier, or resizes in a way that `Preprocess` has no word for.
    """
    weights = _known(arch).get_model_weights(arch).DEFAULT
    found = weights.transforms()
    interpolation = found.interpolation.value
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"torchvision resizes images of {arch} by {interpolation}; write the preprocessing out")
    return {
        "size": found.resize_size[0],
        "crop": found.crop_size[0],
        "interpolation": interpolation,
        "mean": tuple(found.mean),
        "std": tuple(found.std),
    }
