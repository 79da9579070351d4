"""Where a training run starts from, if not from scratch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator
from torch import nn

from robustbench_diffaug.checkpoints.timm_model import fit_state
from robustbench_diffaug.component import Value
from robustbench_diffaug.files import Digest, Location, existing, sha256

__all__ = ["Start", "begin"]

NETWORKS = ("average", "network", "state_dict", "model")
"""Where files keep the weights: our own state, AugMix's and DeepAugment's, DeiT's."""
OPTIMISERS = ("optimiser", "optimizer")
PREFIXES = ("module.", "_orig_mod.")
"""Put before every name by DataParallel and by torch.compile."""


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
        return self.sha256 or sha256(existing(self.uri))


def begin(start: Start, network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Loads the weights, and the optimiser's state if it is asked for.

    Raises:
        ValueError: If the file is missing, damaged, has another digest, would run code, or does not fit.
    """
    path = existing(start.uri)
    if start.sha256 and sha256(path) != start.sha256:
        raise ValueError(f"{start.uri} has sha256 {sha256(path)}, not {start.sha256}: another or a damaged file")
    saved = _read(path, start.uri)
    found = next((saved[name] for name in NETWORKS if isinstance(saved.get(name), Mapping)), saved)
    fit_state(network, {_bare(str(name)): value for name, value in found.items()}, start.uri)
    if start.optimiser:
        state = next((saved[name] for name in OPTIMISERS if isinstance(saved.get(name), Mapping)), None)
        if state is None:
            raise ValueError(f"{start.uri} holds no state of an optimiser; set optimiser of start to false")
        _resume_optimiser(optimiser, state, start)


def _read(path: Path, uri: str) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{uri} is damaged: {error}") from error
    except Exception as error:  # whatever a damaged or hostile pickle makes torch raise
        reason = str(error).partition("\n")[0][:160]
        raise ValueError(f"{uri} cannot be read as tensors alone ({reason}); convert it to safetensors") from error
    if not isinstance(saved, Mapping):
        raise ValueError(f"{uri} holds a {type(saved).__name__}, not weights by name")
    return saved


def _bare(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _resume_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, Any], start: Start) -> None:
    own = [dict(group) for group in optimiser.param_groups]
    try:
        optimiser.load_state_dict(dict(state))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{start.uri}: the optimiser's state does not fit this optimiser: {error}") from error
    for group, settings in zip(optimiser.param_groups, own, strict=True):  # the recipe's count, not the file's
        kept = ("params", "lr") if start.rate else ("params",)
        group.update({name: value for name, value in settings.items() if name not in kept})
