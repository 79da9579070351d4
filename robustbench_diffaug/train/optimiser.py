"""Optimisers and learning-rate schedules, by the names that timm and torch give them."""

from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import nn

from robustbench_diffaug.component import Options, Value, suggest

__all__ = ["Optimiser", "build_optimiser", "build_schedule"]

SCHEDULES = ["constant", "cosine", "multistep", "poly", "rsqrt", "step", "tanh", "wsd"]  # timm's, but for `plateau`


class Optimiser(Value):
    """How the weights are updated.

    Arguments:
        name: As in `timm.optim.create_optimizer_v2`: 'adamw', 'sgd' (with Nesterov momentum), 'momentum', 'lamb', ...
        lr: The largest learning rate.
        weight_decay: Of the weights.
        decay_vectors: Whether biases and norms are decayed too.
        args: More arguments of the optimiser, such as `momentum` or `betas`.
        schedule: As in `timm.scheduler.create_scheduler_v2`: 'cosine', 'step', 'multistep', 'poly', 'constant', ...
        schedule_args: More arguments of the schedule, such as `decay_rate` or `min_lr`; what timm calls epochs are
            steps here, so `decay_epochs: 150000` decays each 150,000 steps.
        warmup: The share of the steps in which the rate rises linearly.
        clip: The largest norm of the gradient; null for none.
    """

    name: str = "adamw"
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    decay_vectors: bool = False
    args: Options = ()
    schedule: str = "cosine"
    schedule_args: Options = ()
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip: PositiveFloat | None = 1.0

    @model_validator(mode="after")
    def _known(self) -> "Optimiser":
        if self.schedule not in SCHEDULES:
            raise ValueError(f"no schedule is called {self.schedule!r}{suggest(self.schedule, SCHEDULES)}")
        return self


def build_optimiser(optimiser: Optimiser, network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a network's parameters.

    Raises:
        ValueError: If timm has none of that name, or it does not take these arguments.
    """
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
    import timm.optim

    names = [str(name) for name in timm.optim.list_optimizers()]  # type: ignore[attr-defined]  # not re-exported
    if optimiser.name not in names:
        raise ValueError(f"timm has no optimiser {optimiser.name!r}{suggest(optimiser.name, names)[:200]}")
    options: dict[str, Any] = dict(optimiser.args)
    try:
        built: torch.optim.Optimizer = timm.optim.create_optimizer_v2(  # type: ignore[attr-defined]  # not re-exported
            network,
            opt=optimiser.name,
            lr=optimiser.lr,
            weight_decay=optimiser.weight_decay,
            filter_bias_and_bn=not optimiser.decay_vectors,
            **options,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"timm cannot build optimiser {optimiser.name} with {options}: {error}") from error
    return built


def build_schedule(optimiser: Optimiser, built: torch.optim.Optimizer, steps: int) -> Any:
    """Timm's scheduler, whose `step_update(n)` sets the rate of step `n`, from 1, a function of `n` alone.

    Raises:
        ValueError: If the schedule does not take these arguments.
    """
    import timm.scheduler

    rising = round(steps * optimiser.warmup)
    options: dict[str, Any] = dict(optimiser.schedule_args)
    try:
        schedule, _ = timm.scheduler.create_scheduler_v2(  # type: ignore[attr-defined]  # not re-exported
            built,
            sched=optimiser.schedule,
            num_epochs=steps - rising,
            warmup_epochs=rising,
            warmup_lr=0.0,
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=1,
            **options,
        )
    except (TypeError, ValueError, AssertionError) as error:
        message = f"timm cannot build schedule {optimiser.schedule} with {options}: {error}"
        raise ValueError(message) from error
    return schedule
