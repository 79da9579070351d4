"""The training loop: a generator that yields after every step, so that its caller owns logging and stopping."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustbench_diffaug import rng
from robustbench_diffaug.files import atomic, sweep
from robustbench_diffaug.train.losses import Loss, Terms, loss_of
from robustbench_diffaug.train.networks import network_of
from robustbench_diffaug.train.optimiser import build_optimiser, build_schedule
from robustbench_diffaug.train.parallel import Place, agreed, averaged, wrapped
from robustbench_diffaug.train.recipe import ClassifierRecipe, Extra, Recipe
from robustbench_diffaug.train.samples import Samples
from robustbench_diffaug.train.start import begin
from robustbench_diffaug.train.stream import stream

__all__ = ["Step", "check", "done", "seconds_per_step", "train"]


@dataclass(frozen=True)
class Step:
    """One update.

    Arguments:
        number: From 1.
        losses: The weighted terms by name, means over all processes.
        right: The share of the ordinary branch that was classified right, where there is one.
        lr: The learning rate.
        kept: The network whose weights would be kept now: the average where the recipe has one.
    """

    number: int
    losses: dict[str, float]
    right: float | None
    lr: float
    kept: nn.Module


@dataclass
class Run:
    """What changes while a recipe is trained."""

    recipe: Recipe
    place: Place
    network: nn.Module
    forward: nn.Module
    average: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: Any
    loss: Loss


def train(recipe: Recipe, state: Path, device: str = "cpu", place: Place | None = None) -> Iterator[Step]:
    """Trains, yielding after every step; continues from `state` if a run was stopped there.

    An unbroken run and a continued one give the same weights, bitwise on one device.

    Arguments:
        recipe: What to train.
        state: A file for the state of the run, written whole every `save_every` steps and at the end.
        device: 'cpu' or 'cuda[:N]'.
        place: Which of several processes this is; each trains on its share of every batch.

    Raises:
        ValueError: If the images do not fit the recipe, the state is another recipe's, or the loss is not finite.
    """
    place = place or Place()
    check(recipe)
    if recipe.batch % (recipe.accumulate * place.world):
        shares = f"{place.world} processes" + (f" in {recipe.accumulate} parts" if recipe.accumulate > 1 else "")
        raise ValueError(f"a batch of {recipe.batch} cannot be shared by {shares}; needed is a multiple of both")
    run = _begin(recipe, device, place, start=not state.exists())
    if place.rank == 0:
        sweep(state)
    before = _resume(state, run) if state.exists() else 0
    numbers = range(before + 1, recipe.steps + 1)  # first in the zip: the last step asks for no samples after it
    for number, samples in zip(numbers, _samples(recipe, before + 1, place, device), strict=False):
        try:
            terms = _update(run, number, samples, state)
        except (RuntimeError, AssertionError) as error:  # of torch, timm and diffusers
            if number > before + 1:
                raise
            raise ValueError(_unfit(samples, error)) from error
        if place.rank == 0 and (number % recipe.save_every == 0 or number == recipe.steps):
            _save(state, run, number)
        right = terms.pop("right", None)
        yield Step(number, terms, right, run.optimiser.param_groups[0]["lr"], run.average)


def _unfit(samples: Samples, error: Exception) -> str:
    """What to say when the first step fails."""
    size = "x".join(map(str, samples.images.shape[1:]))
    reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    hint = "they must fit the network, the denoiser and the memory"
    return f"the first step failed on {len(samples.keys)} images of {size} ({reason}); {hint}"


def seconds_per_step(recipe: Recipe, device: str = "cpu", trials: int = 3) -> float:
    """How long a step takes here, from a few steps whose result is thrown away."""
    check(recipe)
    run = _begin(recipe, device, Place(), start=False)
    clock = 0.0
    for number, samples in enumerate(_samples(recipe, 1, Place(), device), 1):
        if number == 2:  # the first one loads networks and chooses kernels
            clock = time.perf_counter()
        if number == trials + 2:
            break
        try:
            _update(run, number, samples, Path("none"))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(_unfit(samples, error)) from error
    return (time.perf_counter() - clock) / trials


def check(recipe: Recipe) -> None:
    """Finds out whether the first images fit the recipe.

    Raises:
        ValueError: If they do not.
    """
    extra = _extra(recipe)
    for dataset in (recipe.dataset, *([extra.dataset] if extra else [])):
        if not len(dataset.rows()):
            raise ValueError(f"dataset {dataset.name} is empty")
        images, _ = dataset.opened().read(dataset.rows()[:1])
        if images.shape[1] != recipe.channels:
            raise ValueError(f"dataset {dataset.name} has {images.shape[1]} channels, the recipe {recipe.channels}")
    named = {"diffaug": getattr(recipe, "diffaug", None), "guidance": recipe}
    for term in named.values():
        denoiser = getattr(term, "denoiser", None)
        if denoiser and denoiser.channels() not in (None, recipe.channels):
            found = denoiser.channels()
            raise ValueError(f"the denoiser is for {found} channels, the recipe's images have {recipe.channels}")


def _extra(recipe: Recipe) -> Extra | None:
    return recipe.extra if isinstance(recipe, ClassifierRecipe) else None


def _samples(recipe: Recipe, first: int, place: Place, device: str) -> Iterator[Samples]:
    """The samples of this process, step by step, their labels checked."""
    extra = _extra(recipe)
    found = stream(
        recipe.dataset,
        extra.dataset if extra else None,
        extra.share if extra else 0.0,
        recipe.seed,
        recipe.batch,
        first,
        place,
        recipe.crop if isinstance(recipe, ClassifierRecipe) else None,
        device,
        recipe.workers,
    )
    classes = getattr(recipe, "classes", None)
    for samples in found:
        if classes is not None:
            low, high = int(samples.labels.min()), int(samples.labels.max())
            if low < 0 or high >= classes:
                raise ValueError(f"labels of {recipe.dataset.name} go from {low} to {high}, the recipe has {classes}")
        yield samples


def _begin(recipe: Recipe, device: str, place: Place, start: bool) -> Run:
    network = network_of(recipe).to(device).train()
    average = network_of(recipe).to(device).eval() if recipe.ema else network
    if recipe.channels_last:
        for module in (network, average):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks the keyword
    optimiser = build_optimiser(recipe.optimiser, network)
    if start and recipe.start:
        begin(recipe.start, network, optimiser)
    if recipe.ema:
        average.load_state_dict(network.state_dict())
    schedule = build_schedule(recipe.optimiser, optimiser, recipe.steps)
    forward = wrapped(network, place, device)
    if recipe.compile:
        forward = torch.compile(forward)  # type: ignore[assignment]  # a module gives a module
    return Run(recipe, place, network, forward, average, optimiser, schedule, loss_of(recipe))


def _update(run: Run, number: int, samples: Samples, state: Path) -> dict[str, float]:
    """One step; the means of its terms over parts and processes."""
    recipe = run.recipe
    run.schedule.step_update(number)
    run.optimiser.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    device = samples.images.device.type
    with rng.seeded(rng.key("step", recipe.seed, number, run.place.rank)), _kernels(recipe, device):
        for index, part in enumerate(_parts(samples, recipe.accumulate)):
            with _local(run, last=index == recipe.accumulate - 1), _precision(recipe, device):
                terms = run.loss(run.forward, part)
                total = torch.stack(list(terms.losses.values())).sum() / recipe.accumulate
            total.backward()
            for name, value in _named(terms).items():
                sums[name] = sums.get(name, 0) + value.detach().float() / recipe.accumulate
    means = averaged(sums, run.place)
    finite = all(bool(torch.isfinite(value)) for value in sums.values())
    if not agreed(finite, run.place):
        named = ", ".join(f"{name} {value:g}" for name, value in means.items() if name != "right")
        last = state if state.exists() else "none"
        raise ValueError(f"the loss is not finite at step {number} ({named}); the last good state is {last}")
    if recipe.optimiser.clip:
        nn.utils.clip_grad_norm_(run.network.parameters(), recipe.optimiser.clip)
    run.optimiser.step()
    if recipe.ema:
        _average(run.average, run.network, min(recipe.ema, (1 + number) / (10 + number)))
    return means


def _named(terms: Terms) -> dict[str, Tensor]:
    return terms.losses if terms.right is None else {**terms.losses, "right": terms.right}


def _parts(samples: Samples, count: int) -> Iterator[Samples]:
    """The samples in so many parts of equal size."""
    size = len(samples.keys) // count
    for first in range(0, len(samples.keys), size):
        some = slice(first, first + size)
        ordinary = None if samples.ordinary is None else samples.ordinary[some]
        yield Samples(samples.images[some], samples.labels[some], samples.keys[some], ordinary)


def _local(run: Run, last: bool) -> AbstractContextManager[None]:
    """Gradients are exchanged with other processes once, after the last part."""
    return nullcontext() if last or run.place.world == 1 else run.forward.no_sync()  # type: ignore[operator]  # of DDP


def _precision(recipe: Recipe, device: str) -> AbstractContextManager[None]:
    return torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bfloat16")


@contextmanager
def _kernels(recipe: Recipe, device: str) -> Iterator[None]:
    """Those of torch itself, for bfloat16 on a CPU.

    oneDNN's multiply what lies unset behind a row by 0, which is NaN at times ("[CPU][AMX] brg_matmul bf16 kernel leaks
    NaN/garbage data", 2026, https://github.com/uxlfoundation/oneDNN/issues/5717).
    """
    onednn: Any = torch.backends.mkldnn  # its stub has the property's class for its value
    before = onednn.enabled
    if device == "cpu" and recipe.precision == "bfloat16":
        onednn.enabled = False  # its `flags` warn of hardware that is not there
    try:
        yield
    finally:
        onednn.enabled = before


@torch.no_grad()
def _average(average: nn.Module, network: nn.Module, decay: float) -> None:
    for kept, value in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if kept.is_floating_point():
            kept.lerp_(value, 1 - decay)
        else:
            kept.copy_(value)


def _save(state: Path, run: Run, number: int) -> None:
    saved = {"recipe": run.recipe.digest, "step": number, "network": run.network.state_dict()}
    saved |= {"average": run.average.state_dict(), "optimiser": run.optimiser.state_dict()}
    with atomic(state) as file:
        torch.save(saved, file)


def done(recipe: Recipe, state: Path) -> int:
    """The number of steps that a stopped run of the recipe has done.

    Raises:
        ValueError: If the state is damaged, or another recipe's.
    """
    return int(_read(state, recipe)["step"]) if state.exists() else 0


def _read(state: Path, recipe: Recipe) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(state, map_location="cpu", weights_only=True)
        digest, _ = saved["recipe"], int(saved["step"])
    except Exception as error:  # whatever a damaged file makes torch raise
        raise ValueError(f"{state} is damaged; delete it to begin anew, or train into another folder") from error
    if digest != recipe.digest:
        raise ValueError(f"{state} is the state of another recipe; train into another folder or delete it")
    return saved


def _resume(state: Path, run: Run) -> int:
    """Loads the state of a stopped run; the number of steps that it has done."""
    saved = _read(state, run.recipe)
    run.network.load_state_dict(saved["network"])
    run.average.load_state_dict(saved["average"])
    run.optimiser.load_state_dict(saved["optimiser"])
    for group in run.optimiser.param_groups:  # the largest rate, which may have come from a file that it started from
        group["lr"] = group["initial_lr"]
    run.schedule = build_schedule(run.recipe.optimiser, run.optimiser, run.recipe.steps)
    return int(saved["step"])
