"""Diffusion models saved by diffusers (`UNet2DModel` and a DDPM schedule) as `D(x, sigma)`."""

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from robustbench_diffaug.batch import fixed_shape
from robustbench_diffaug.diffusion.base import (
    ConditionalDenoise,
    Denoise,
    Denoiser,
    Posterior,
    Schedule,
    Sigma,
    check_labels,
)
from robustbench_diffaug.files import Digest, Location, Missing, Weights, existing

__all__ = ["UNet", "as_conditional", "as_denoise", "save"]

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONFIG = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
Predicts: TypeAlias = Literal["epsilon", "sample", "v_prediction"]
"""What a network of a diffusion model gives: the noise, the image, or v, in diffusers' words."""


class UNet(Denoiser):
    """A folder written by diffusers: `unet/` (config and safetensors) and `scheduler/`.

    Such is a saved DDPMPipeline, too. The network may predict the noise, the image ('sample') or v ('v_prediction').
    One of K classes has `num_class_embeds` = K + 1 in its configuration; the last embedding is that of no class.

    Arguments:
        folder: Its path.
        sha256: The digest that the weights must have; where it is left out, that of the file as it is counts.
    """

    kind: Literal["unet"] = "unet"
    folder: Location
    sha256: Digest = ""

    def contents(self) -> str:
        """SHA-256 over the digest of the weights and the two configurations."""
        root = existing(self.folder)
        digest = hashlib.sha256(self._weights().contents().encode())
        for name in (CONFIG, SCHEDULER):
            digest.update(_read(root, name))
        return digest.hexdigest()

    def check(self) -> None:
        """Looks at the weights and the two configurations.

        Raises:
            ValueError: If one is missing, or the weights are damaged or have another digest.
        """
        self.contents()
        self._weights().check()

    def sigmas(self) -> Float[np.ndarray, " t"]:
        """The noise levels of the scheduler's configuration."""
        return schedule_of(existing(self.folder)).sigmas()

    def channels(self) -> int | None:
        """The number of channels in the network's configuration."""
        return int(self._config()["in_channels"])

    def size(self) -> int | None:
        """The `sample_size` in the network's configuration, where it has one and images are square."""
        found = self._config().get("sample_size")
        sides = {found} if isinstance(found, int) else set(found or ())
        return int(sides.pop()) if len(sides) == 1 else None

    def learned_variance(self) -> bool:
        """Whether the network's configuration has twice as many outputs as inputs."""
        config = self._config()
        return bool(config["out_channels"] == 2 * config["in_channels"])

    def classes(self) -> int | None:
        """One less than the `num_class_embeds` of the network's configuration."""
        config = self._config()
        if config.get("class_embed_type"):
            raise ValueError(
                f"{self.folder}: class_embed_type {config['class_embed_type']} is not supported; "
                "needed is num_class_embeds: the number of classes and one for none"
            )
        count = config.get("num_class_embeds")
        if count is not None and count < 2:
            raise ValueError(f"{self.folder}: num_class_embeds is {count}; needed is the number of classes and one")
        return None if count is None else int(count) - 1

    def load(self, device: torch.device) -> Denoise:
        """The network, in evaluation mode, without going through any hub; a class-conditional one is told no class."""
        schedule, classes = schedule_of(existing(self.folder)), self.classes()
        return as_denoise(
            self._network(device), schedule, self.precision, self.clip, self.microbatch, classes, self._predicts()
        )

    def load_conditional(self, device: torch.device) -> ConditionalDenoise:
        """The network that is told the class.

        Raises:
            ValueError: If its configuration has no `num_class_embeds`.
        """
        schedule, classes = schedule_of(existing(self.folder)), self.classes()
        if classes is None:
            raise ValueError(
                f"{self.folder} knows no classes: unet/config.json has no num_class_embeds; "
                "give a denoiser that was trained with classes"
            )
        return as_conditional(
            self._network(device), schedule, classes, self.precision, self.clip, self.microbatch, self._predicts()
        )

    def _network(self, device: torch.device) -> nn.Module:
        import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
        from diffusers import UNet2DModel
        from safetensors.torch import load_file

        network: nn.Module = UNet2DModel.from_config(self._config())
        state = load_file(self._weights().check())
        state = {name: value.float() for name, value in state.items()}
        wrong = network.load_state_dict(state, strict=False)
        if wrong.missing_keys or wrong.unexpected_keys:
            named = (wrong.missing_keys + wrong.unexpected_keys)[0]
            raise ValueError(f"{self.folder}: the weights do not fit unet/config.json, first at {named}")
        return network.to(device)

    def _config(self) -> dict[str, Any]:
        config = _json(existing(self.folder), CONFIG)
        if (kind := config.get("_class_name", "UNet2DModel")) != "UNet2DModel":
            raise ValueError(f"{self.folder}/{CONFIG} is a {kind}; needed is a UNet2DModel, of images and no text")
        return config

    def _predicts(self) -> Predicts:
        return predicted(existing(self.folder))

    def _weights(self) -> Weights:
        return Weights(uri=f"{self.folder}/{WEIGHTS}", sha256=self.sha256)


def schedule_of(root: Path) -> Schedule:
    """The schedule that diffusers' scheduler configuration describes.

    Raises:
        ValueError: If it is one that rdiff has no formula for.
    """
    config = _json(root, SCHEDULER)
    lacking = [
        name for name in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end") if name not in config
    ]
    if lacking:
        kind = config.get("_class_name", "this scheduler")
        raise ValueError(f"{root / SCHEDULER} has no {lacking[0]}: {kind} is not supported; needed is one as of DDPM")
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        raise ValueError(f"{root / SCHEDULER}: trained_betas and rescale_betas_zero_snr are not supported")
    predicted(root)
    steps, betas = int(config["num_train_timesteps"]), config["beta_schedule"]
    ends = (config["beta_start"] * steps, config["beta_end"] * steps)
    if betas == "linear" and np.allclose(ends, (0.1, 20.0)):
        return Schedule(betas="linear", steps=steps)
    if betas == "squaredcos_cap_v2":
        return Schedule(betas="cosine", steps=steps)
    raise ValueError(
        f"{root / SCHEDULER}: beta_schedule {betas} with these ends is not supported; use linear or cosine"
    )


def predicted(root: Path) -> Predicts:
    """What the network predicts, by diffusers' scheduler configuration.

    Raises:
        ValueError: If it is something else.
    """
    found = _json(root, SCHEDULER).get("prediction_type", "epsilon")
    if found not in get_args(Predicts):
        raise ValueError(f"{root / SCHEDULER}: prediction_type {found} is not one of {', '.join(get_args(Predicts))}")
    kind: Predicts = found
    return kind


def _read(root: Path, name: str) -> bytes:
    return existing(str(root / name)).read_bytes()


def _json(root: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(_read(root, name))
    except (ValueError, RecursionError) as error:
        if isinstance(error, Missing):
            raise
        raise ValueError(f"{root / name} is no JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{root / name} is no mapping")
    return config


@lru_cache(maxsize=16)
def _tables(schedule: Schedule, device: torch.device) -> Float[Tensor, " t"]:
    return torch.from_numpy(schedule.sigmas().copy()).to(device)


def as_denoise(
    network: nn.Module,
    schedule: Schedule,
    precision: str = "float32",
    clip: bool = True,
    microbatch: int | None = None,
    classes: int | None = None,
    predicts: Predicts = "epsilon",
) -> Denoise:
    """A network of a diffusion model, of images in [-1, 1] as `D(x, sigma)` of images in [0, 1].

    With `s = 2 sigma` and `z = 2 x - 1` the network sees `u = z / sqrt(1 + s^2)` at the time of `s`. If it predicts
    `eps`, the clean image is `z - s eps`; if v, it is `(u - s v) / sqrt(1 + s^2)`; else it is the output. With two
    outputs a pixel the second half is the learned variance, passed on.

    Arguments:
        network: Called as `network(images, times)`; returns an object with `.sample`, as diffusers' do.
        schedule: Its noise levels.
        precision: Of its arithmetic.
        clip: Whether the estimate is clamped to [0, 1].
        microbatch: The one shape in which it is called; None calls it with what there is.
        classes: Of a class-conditional network, which is told `class_labels=classes`: no class.
        predicts: What the network's output is.

    References:
        Progressive Distillation for Fast Sampling of Diffusion Models (Salimans and Ho, 2022), appendix D, on v,
        https://arxiv.org/abs/2202.00512
    """
    estimate = _estimate(network, schedule, precision, clip, microbatch, predicts)

    def denoise(noisy: Float[Tensor, "*n c h w"], sigma: Sigma) -> Posterior:
        if classes is None:
            return estimate(noisy, sigma, None)
        return estimate(noisy, sigma, torch.full(noisy.shape[:-3], classes, device=noisy.device))

    return denoise


def as_conditional(
    network: nn.Module,
    schedule: Schedule,
    classes: int,
    precision: str = "float32",
    clip: bool = True,
    microbatch: int | None = None,
    predicts: Predicts = "epsilon",
) -> ConditionalDenoise:
    """A class-conditional network as `D(x, sigma, label)`; otherwise as `as_denoise`.

    Arguments:
        network: Called as `network(images, times, class_labels=labels)`, labels 0 to `classes`, the last for no class.
        schedule: Its noise levels.
        classes: The number of classes.
        precision: Of its arithmetic.
        clip: Whether the estimate is clamped to [0, 1].
        microbatch: The one shape in which it is called; None calls it with what there is.
        predicts: What the network's output is.
    """
    estimate = _estimate(network, schedule, precision, clip, microbatch, predicts)

    def denoise(noisy: Float[Tensor, "*n c h w"], sigma: Sigma, labels: Int[Tensor, "*n"]) -> Posterior:
        check_labels(labels, classes)
        return estimate(noisy, sigma, torch.where(labels < 0, classes, labels))

    return denoise


def _estimate(
    network: nn.Module, schedule: Schedule, precision: str, clip: bool, microbatch: int | None, predicts: Predicts
) -> Callable[[Tensor, Sigma, Tensor | None], Posterior]:
    """The posterior given images, levels and the labels that the network takes, None where it takes none."""
    dtype: torch.dtype = getattr(torch, precision)
    exact = torch.float64 if precision == "float64" else torch.float32  # of all but the network
    network = network.eval().requires_grad_(False)
    nn.Module.to(network, dtype=dtype)  # diffusers' own `to` warns of every cast
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks the keyword

    def estimate(noisy: Tensor, sigma: Sigma, labels: Tensor | None) -> Posterior:
        flat = noisy.reshape(-1, *noisy.shape[-3:])
        levels = torch.as_tensor(sigma, dtype=torch.float64, device=flat.device)
        levels = levels.expand(noisy.shape[:-3]).reshape(-1)
        table = _tables(schedule, flat.device)
        # A level may come through float32: what is within 1e-6 of a time's level is that time.
        times = torch.searchsorted(table, levels * (1 - 1e-6)).clamp_(max=len(table) - 1)
        doubled = (2 * levels).to(exact)[:, None, None, None]
        signed = 2 * flat.to(exact) - 1
        scaled = signed / (1 + doubled**2).sqrt()
        # What else the network is told rides along as planes, so that one tensor passes through `fixed_shape`.
        told = [times] if labels is None else [times, labels.reshape(-1)]
        planes = [value.to(exact)[:, None, None, None].expand(-1, 1, *scaled.shape[2:]) for value in told]
        packed, channels = torch.cat([scaled, *planes], dim=1), flat.shape[1]

        def call(rows: Tensor) -> Tensor:
            images = rows[:, :channels].to(dtype=dtype, memory_format=torch.channels_last)
            numbers = rows[:, channels:, 0, 0].round().long()
            more = {} if labels is None else {"class_labels": numbers[:, 1]}
            output: Tensor = network(images, numbers[:, 0], **more).sample
            return output.to(exact)

        output = call(packed) if microbatch is None else fixed_shape(call, packed, microbatch)
        found = output[:, :channels]
        if predicts == "epsilon":
            clean = (signed - doubled * found + 1) / 2
        elif predicts == "v_prediction":
            clean = ((scaled - doubled * found) / (1 + doubled**2).sqrt() + 1) / 2
        else:
            clean = (found + 1) / 2
        clean = clean.clamp(0, 1) if clip else clean
        spread = output[:, channels:].reshape(noisy.shape).to(noisy.dtype) if output.shape[1] > channels else None
        return Posterior(clean.reshape(noisy.shape).to(noisy.dtype), spread)

    return estimate


def save(folder: Path, network: Any, schedule: Schedule) -> None:
    """Writes a network and its schedule the way diffusers does, weights in safetensors.

    Arguments:
        folder: Where; `UNet` reads it again.
        network: A UNet2DModel; with `num_class_embeds` it is class-conditional, with twice the outputs it has learned
            the range of its variance.
        schedule: What it was trained with.
    """
    from diffusers import DDPMScheduler

    network.save_pretrained(folder / "unet", safe_serialization=True)
    betas = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule.betas]
    ends = {"beta_start": 0.1 / schedule.steps, "beta_end": 20 / schedule.steps}
    learned = network.config.out_channels == 2 * network.config.in_channels
    variance = {"variance_type": "learned_range"} if learned else {}
    scheduler: Any = DDPMScheduler
    made = scheduler(num_train_timesteps=schedule.steps, beta_schedule=betas, **ends, **variance)
    made.save_pretrained(folder / "scheduler")
