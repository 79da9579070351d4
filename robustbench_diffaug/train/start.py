"""Where a training run starts from, if not from scratch."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import model_validator
from torch import nn

from robustbench_diffaug.component import Value
from robustbench_diffaug.files import Digest, Location, Weights
from robustbench_diffaug.state import load_state
from robustbench_diffaug.weight_files import examine

__all__ = ["Start", "begin"]

OPTIMISERS = ("optimiser", "optimizer")
"""Where files keep the optimiser's state."""


class Start(Value):
    """The weights that training starts from.

    Arguments:
        uri: A safetensors file; or a file of `torch.save` that holds tensors and plain values only, such as the
            `state.pt` of an earlier run or the published AugMix and DeepAugment checkpoints. No code in it is run.
        sha256: The digest that the file must have; where it is left out, that of the file as it is counts.
        optimiser: Whether the optimiser's state is taken from the file too.
        rate: Whether its learning rate is taken with it, in place of the recipe's.
    """

    uri: Location
    sha256: Digest = ""
    optimiser: bool = False
    rate: bool = False

    @model_validator(mode="after")
    def _whole(self) -> "Start":
        if self.rate and not self.optimiser:
            raise ValueError("a learning rate comes with the optimiser's state; set optimiser of start to true")
        return self

    def contents(self) -> str:
        """The digest: the weights depend on the file, not on where it lies."""
        return Weights(uri=self.uri, sha256=self.sha256).contents()


def begin(start: Start, network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Loads the weights, and the optimiser's state if it is asked for.

    Raises:
        ValueError: If the file is missing, damaged, has another digest, would run code, or does not fit.
    """
    weights = Weights(uri=start.uri, sha256=start.sha256)
    load_state(network, weights)
    if start.optimiser:
        state = next((value for name, value in _saved(weights).items() if name in OPTIMISERS), None)
        if not isinstance(state, Mapping):
            raise ValueError(f"{start.uri} holds no state of an optimiser; set optimiser of start to false")
        _resume_optimiser(optimiser, state, start)


def _saved(weights: Weights) -> Mapping[str, Any]:
    """All that a file of torch.save holds, once it was looked at; of another file nothing."""
    path = weights.check()
    if examine(path, weights.uri).form == "safetensors":
        return {}
    saved: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return saved


def _resume_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, Any], start: Start) -> None:
    own = [dict(group) for group in optimiser.param_groups]
    try:
        optimiser.load_state_dict(dict(state))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{start.uri}: the optimiser's state does not fit this optimiser: {error}") from error
    for group, settings in zip(optimiser.param_groups, own, strict=True):  # the recipe's count, not the file's
        kept = ("params", "lr") if start.rate else ("params",)
        group.update({name: value for name, value in settings.items() if name not in kept})
