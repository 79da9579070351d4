"""The digest of a network in memory: what changes it, and what does not."""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbench_diffaug import rng
from robustbench_diffaug.checkpoints.structure import digest


class Table:
    """An object that is no module."""

    def __init__(self, scale: float) -> None:
        self.scale, self.me = scale, self

    def __call__(self, images: Tensor) -> Tensor:
        return images * self.scale


class Own(nn.Module):
    """Holds one of everything."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        with rng.seeded(0):
            self.layer, self.hidden = nn.Linear(4, 3), [nn.Linear(3, 3)]
        self.register_buffer("mean", torch.tensor([0.5]))
        self.scale, self.table, self.array = 2.0, Table(3.0), np.array([1.0, 2.0])
        self.whole, self.names = [self], {"b", "a", "c"}
        self.function: Callable[[Tensor], Tensor] = partial(torch.mul, other=2)
        self.options = SimpleNamespace(depth=3, inner={"a": (1, "x")})

    def forward(self, images: Tensor) -> Tensor:
        def scaled(values: Tensor) -> Tensor:
            return values * self.scale

        hidden: Tensor = self.hidden[0](self.layer(scaled(self.table(images - self.mean))))
        return hidden


def changed(change: Callable[[Any], object], network: nn.Module | None = None) -> bool:
    """Whether a change to a copy changes the digest."""
    before = network or Own()
    after = copy.deepcopy(before)
    assert digest(after) == digest(before)
    with torch.no_grad():
        change(after)
    return digest(after) != digest(before)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.layer.weight[0, 0].add_(1e-6),
        lambda net: net.mean.add_(1),
        lambda net: net.hidden[0].weight[0, 0].add_(1e-6),
        lambda net: setattr(net, "scale", 2.5),
        lambda net: setattr(net.table, "scale", 3.5),
        lambda net: net.array.__setitem__(0, 7),
        lambda net: setattr(net.options, "depth", 4),
        lambda net: net.options.inner.update(a=(1, "y")),
        lambda net: setattr(net, "function", partial(torch.mul, other=3)),
        lambda net: setattr(net, "function", lambda images: images + 1),
        lambda net: setattr(net, "forward", lambda images: images),
        lambda net: net.register_forward_hook(lambda module, images, outputs: outputs + 1),
        lambda net: net.layer.register_forward_pre_hook(lambda module, images: None),
        lambda net: net.add_module("more", nn.ReLU()),
        lambda net: net.names.add("d"),
        lambda net: net.double(),
    ],
)
def test_what_changes_it(change: Callable[[Any], object]) -> None:
    assert changed(change)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.train(),
        lambda net: net.requires_grad_(False),
        lambda net: setattr(net.layer.weight, "grad", torch.ones(3, 4)),
        lambda net: setattr(net, "names", {"c", "b", "a"}),
        lambda net: setattr(net.layer, "weight", nn.Parameter(net.layer.weight.t().contiguous().t())),
    ],
)
def test_what_does_not(change: Callable[[Any], object]) -> None:
    assert not changed(change)


def of_source(forward: str) -> nn.Module:
    """A network of a class that has one line of code."""
    names: dict[str, Any] = {"nn": nn}
    source = f"class Own(nn.Module):\n    def forward(self, images):\n        {forward}\n"
    exec(source, names)
    made: nn.Module = names["Own"]()
    return made


def test_code_counts_and_how_it_is_written_does_not() -> None:
    assert digest(of_source("return images * 2")) != digest(of_source("return images * 3"))
    assert digest(of_source("return images * 2")) != digest(of_source("return images + 2"))
    assert digest(of_source("return images * 2")) == digest(of_source("return images*2  # twice"))
    assert digest(nn.ReLU()) != digest(nn.GELU())
    first, second = (nn.Sequential(nn.Linear(1, 1), part, nn.ReLU()) for part in (nn.Identity(), nn.Flatten()))
    assert digest(first) != digest(second)


def test_graphs_are_told_by_their_code() -> None:
    def graph(factor: int) -> nn.Module:
        made = torch.fx.Graph()
        made.output(made.call_function(torch.mul, (made.placeholder("images"), factor)))
        return torch.fx.GraphModule({}, made)

    assert digest(graph(2)) == digest(graph(2)) != digest(graph(3))


def test_weights_without_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"its weights 1\.weight have no numbers yet; load or initialise them"):
        digest(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="its weights weight have no numbers yet"):
        digest(nn.Linear(3, 3, device="meta"))
