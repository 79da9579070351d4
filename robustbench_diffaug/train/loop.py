"""The training loop: a generator that yields after every step, so that its caller owns logging and stopping."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robustbench_diffaug import rng
from robustbench_diffaug.checkpoints.timm_model import build
from robustbench_diffaug.files import atomic
from robustbench_diffaug.train.losses import Loss, classifier_loss, denoiser_loss
from robustbench_diffaug.train.recipe import ClassifierRecipe, DenoiserRecipe, Recipe
from robustbench_diffaug.train.samples import Samples

__all__ = ["Step", "network_of", "train"]


@dataclass(frozen=True)
class Step:
    """One update.

    Arguments:
        number: From 1.
        losses: The weighted terms by name.
        kept: The network whose weights would be kept now: the average where the recipe has one.
    """

    number: int
    losses: dict[str, float]
    kept: nn.Module


def network_of(recipe: Recipe) -> nn.Module:
    """The recipe's network with its initial weights, a function of the recipe alone."""
    with rng.seeded(rng.key("initial weights", recipe.seed)):
        if isinstance(recipe, ClassifierRecipe):
            return build(recipe.arch, recipe.args, recipe.channels, recipe.classes)
        assert isinstance(recipe, DenoiserRecipe)
        import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
        from diffusers import UNet2DModel

        network: nn.Module = UNet2DModel(in_channels=recipe.channels, out_channels=recipe.channels, **dict(recipe.unet))
        return network


def train(recipe: Recipe, state: Path, device: str = "cpu") -> Iterator[Step]:
    """Trains, yielding after every step; continues from `state` if a run was stopped there.

    An unbroken run and a continued one give the same weights, bitwise on one device.

    Arguments:
        recipe: What to train.
        state: A file for the state of the run, written whole every `save_every` steps and at the end.
        device: 'cpu' or 'cuda[:N]'.

    Raises:
        ValueError: If the images do not fit the recipe, the state is another recipe's, or the loss is not finite.
    """
    source = recipe.dataset.opened()
    rows = recipe.dataset.rows()
    images, labels = source.read(rows)
    ids = [source.ids[row] for row in rows]
    _check(recipe, images, labels)
    images, labels = images.to(device), labels.to(device)
    network = network_of(recipe).to(device).train()
    average = network_of(recipe).to(device).eval() if recipe.ema else network
    for module in (network, average):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks the keyword
    optimiser = _optimiser(recipe, network)
    loss = _loss(recipe)
    done = _resume(state, recipe, network, average, optimiser)
    for number in range(done + 1, recipe.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = recipe.optimiser.lr * _rate(number / recipe.steps, recipe.optimiser.warmup)
        with rng.seeded(rng.key("step", recipe.seed, number)):
            terms = loss(network, _samples(recipe, number, images, labels, ids))
        total = torch.stack(list(terms.values())).sum()
        if not bool(torch.isfinite(total)):
            named = ", ".join(f"{name} {float(value.detach()):g}" for name, value in terms.items())
            raise ValueError(f"the loss is not finite at step {number} ({named}); the last good state is {state}")
        optimiser.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(network.parameters(), recipe.optimiser.clip)
        optimiser.step()
        if recipe.ema:
            _average(average, network, min(recipe.ema, (1 + number) / (10 + number)))
        if number % recipe.save_every == 0 or number == recipe.steps:
            saved = {"recipe": recipe.digest, "step": number, "network": network.state_dict()}
            saved |= {"average": average.state_dict(), "optimiser": optimiser.state_dict()}
            with atomic(state) as file:
                torch.save(saved, file)
        yield Step(number, {name: float(value.detach()) for name, value in terms.items()}, average)


def _check(recipe: Recipe, images: Tensor, labels: Tensor) -> None:
    if len(images) == 0:
        raise ValueError(f"dataset {recipe.dataset.name} is empty")
    if images.shape[1] != recipe.channels:
        raise ValueError(f"dataset {recipe.dataset.name} has {images.shape[1]} channels, the recipe {recipe.channels}")
    if isinstance(recipe, ClassifierRecipe):
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= recipe.classes:
            raise ValueError(
                f"labels of {recipe.dataset.name} go from {low} to {high}, the recipe has {recipe.classes}"
            )
        if recipe.diffaug and recipe.diffaug.denoiser.channels() not in (None, recipe.channels):
            found = recipe.diffaug.denoiser.channels()
            raise ValueError(f"the denoiser is for {found} channels, the recipe's images have {recipe.channels}")


def _loss(recipe: Recipe) -> Loss:
    if isinstance(recipe, ClassifierRecipe):
        return classifier_loss(recipe)
    assert isinstance(recipe, DenoiserRecipe)
    return denoiser_loss(recipe)


def _optimiser(recipe: Recipe, network: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.optimiser.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.optimiser.lr)


def _rate(share: float, warmup: float) -> float:
    """The learning rate as a share of the largest, after a share of the steps."""
    return share / warmup if share < warmup else (1 + math.cos(math.pi * (share - warmup) / (1 - warmup))) / 2


def _samples(recipe: Recipe, number: int, images: Tensor, labels: Tensor, ids: list[str]) -> Samples:
    """The samples of a step: a window of the endless sequence of shuffled epochs."""
    positions = range((number - 1) * recipe.batch, number * recipe.batch)
    places = [divmod(position, len(ids)) for position in positions]
    orders = {
        epoch: rng.permutation(rng.key("order", recipe.seed, epoch), len(ids))
        for epoch in {epoch for epoch, _ in places}
    }
    chosen = [(epoch, int(orders[epoch][place])) for epoch, place in places]
    index = torch.tensor([row for _, row in chosen], device=images.device)
    keys = [(recipe.seed, epoch, ids[row]) for epoch, row in chosen]
    return Samples(images[index], labels[index], keys)


@torch.no_grad()
def _average(average: nn.Module, network: nn.Module, decay: float) -> None:
    for kept, value in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(value, 1 - decay)
        else:
            kept.copy_(value)


def _resume(
    state: Path, recipe: Recipe, network: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer
) -> int:
    """Loads the state of a stopped run, if there is one; the number of steps that it has done."""
    if not state.exists():
        if recipe.ema:
            average.load_state_dict(network.state_dict())
        return 0
    saved = torch.load(state, map_location="cpu", weights_only=True)
    if saved["recipe"] != recipe.digest:
        raise ValueError(f"{state} is the state of another recipe; train into another folder or delete it")
    network.load_state_dict(saved["network"])
    average.load_state_dict(saved["average"])
    optimiser.load_state_dict(saved["optimiser"])
    return int(saved["step"])
