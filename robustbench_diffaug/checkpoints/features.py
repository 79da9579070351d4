"""The last layer of a network and its features: what goes into it, and of which the logits are a linear function."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustbench_diffaug.component import suggest

__all__ = ["Last", "Layer", "capture", "last_layer", "linear"]

Layer: TypeAlias = nn.Linear | nn.Conv2d
"""A linear map of features; a convolution is one where its kernel is a single pixel."""

Network: TypeAlias = Callable[[Tensor], Tensor]
TOLERANCE = 1e-4  # of the largest logit, in float32


class Last(NamedTuple):
    """The last layer.

    Arguments:
        layer: The module.
        name: As `network.get_submodule` takes it.
    """

    layer: Layer
    name: str


def linear(layer: Layer) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
    """The weight and the bias of a last layer, float32; the bias is 0 where it has none."""
    weight = layer.weight.detach().float().flatten(1)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().float()
    return weight, bias


def last_layer(network: nn.Module, images: Float[Tensor, "n c h w"], name: str | None = None) -> Last:
    """The linear layer whose outputs are the network's logits, `W z + b`, found by running some images.

    Of all layers that are called it is the last for which that holds to 1e-4 of the largest logit (to four units of
    the last place where the network computes in less than float32). Where a layer is called on several places of an
    image, `z` is the mean over them. A layer that the user names is taken at its word: only its shape is checked.

    Arguments:
        network: From `images` to logits, in evaluation mode.
        images: One or a few, as the network takes them.
        name: The dotted name of the layer; None to find it.

    Raises:
        ValueError: If there is no such layer.
    """
    known = _layers(network)
    if name is not None and name not in known:
        raise ValueError(f"head: the network has no linear layer called {name!r}{suggest(name, list(known)[::-1])}")
    logits, features = _ran(network, images, known)
    distances = {found: _distance(known[found], features[found], logits) for found in reversed(features)}
    fitting = {found: distance for found, distance in distances.items() if distance is not None}
    if name is not None:
        if name not in fitting:
            raise ValueError(f"head: {name} has not one output an image for each logit; {_asked(list(fitting))}")
        return Last(known[name], name)
    for found, distance in fitting.items():
        if distance <= max(TOLERANCE, 4 * torch.finfo(known[found].weight.dtype).eps):
            return Last(known[found], found)
    raise ValueError(f"no linear layer of the network gives its logits as W z + b; {_asked(list(fitting))}")


def capture(
    network: Network, layer: Layer
) -> Callable[[Float[Tensor, "n ..."]], tuple[Float[Tensor, "n k"], Float[Tensor, "n d"]]]:
    """A function from images to logits and features, both float32, in one call of the network; differentiable.

    The network is left as it was, also where it raises. One that was compiled is run as it is uncompiled, since
    compiled code may not see what is asked of its layers.

    Arguments:
        network: What is called: the network itself or a function that calls it.
        layer: Its last layer.

    Raises:
        ValueError: When called, if the layer is not: the network does not use it, or not once for each image.
    """

    def captured(images: Float[Tensor, "n ..."]) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n d"]]:
        seen: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.extend(inputs[:1])

        with layer.register_forward_pre_hook(keep), torch.compiler.set_stance("force_eager"):
            logits = network(images)
        if not seen or len(seen[-1]) != len(images):
            shapes = [tuple(each.shape) for each in seen]
            raise ValueError(f"the last layer was given {shapes} for {len(images)} images, not one row for each")
        return logits.float(), _pooled(layer, seen[-1])

    return captured


def _layers(network: nn.Module) -> dict[str, Layer]:
    """All linear layers by their dotted names."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        or (
            isinstance(module, nn.Conv2d) and (module.kernel_size, module.padding, module.groups) == ((1, 1), (0, 0), 1)
        )
    }


def _ran(
    network: nn.Module, images: Tensor, known: Mapping[str, Layer]
) -> tuple[Float[Tensor, "n k"], dict[str, Tensor]]:
    """The logits, and the features of every layer that was called, in the order of their last calls."""
    features: dict[str, Tensor] = {}

    def keeping(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs and inputs[0].ndim > 1:
                features.pop(name, None)
                features[name] = _pooled(known[name], inputs[0])

        return keep

    with ExitStack() as hooks, torch.no_grad():
        for name, layer in known.items():
            hooks.enter_context(layer.register_forward_pre_hook(keeping(name)))
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        logits: Any = network(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the network gives {found} for {len(images)} images, not a row of logits for each")
    return logits.float(), features


def _pooled(layer: Layer, inputs: Tensor) -> Float[Tensor, "n d"]:
    """One row for each image: the mean over the places at which the layer is called."""
    if isinstance(layer, nn.Conv2d):
        return inputs.float().flatten(2).mean(2)
    return inputs.float().reshape(len(inputs), -1, inputs.shape[-1]).mean(1)


def _distance(layer: Layer, features: Float[Tensor, "n d"], logits: Float[Tensor, "m k"]) -> float | None:
    """The largest difference of logits from `W z + b`, in units of the largest logit; None where shapes differ."""
    weight, bias = linear(layer)
    if (len(features), len(weight)) != tuple(logits.shape):
        return None
    difference = (features @ weight.T + bias - logits).abs().max()
    return float(difference / logits.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def _asked(fitting: Sequence[str]) -> str:
    """What to do where it was not found."""
    if not fitting:
        return "no layer has, so only scores of logits can be computed"
    names = " or ".join(fitting[:8])
    return f"say by `head: NAME` which layer's inputs are the features, {names}, or take scores of logits alone"
