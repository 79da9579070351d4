"""Schedules against published facts and diffusers, and the adapter against diffusers' schedulers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import robustbench_diffaug.torchvision_guard  # noqa: F401  (before diffusers)
from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.diffusion.base import Denoiser, Schedule
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.diffusion.unet import UNet, as_denoise, save


def tiny(channels: int = 1, outputs: int | None = None) -> nn.Module:
    """A UNet of diffusers with random weights, large enough that its output matters."""
    from diffusers import UNet2DModel

    with rng.seeded(rng.key("tiny unet", channels)):
        network: nn.Module = UNet2DModel(
            sample_size=16,
            in_channels=channels,
            out_channels=outputs or channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    return network.eval().requires_grad_(False)


def noise(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(rng.key("test", name), range(1), shape)[0])


@pytest.mark.parametrize(
    ("betas", "steps", "times"),
    [("linear", 1000, (70, 145, 259, 396)), ("cosine", 4000, (573, 1158, 1984, 2809))],
)
def test_smoothing_times_are_the_published_ones(betas: str, steps: int, times: tuple[int, ...]) -> None:
    # (Certified!!) Adversarial Robustness for Free!: the first t with sqrt((1 - abar) / abar) >= 2 sigma
    denoiser = MixtureDenoiser(schedule=Schedule.model_validate({"betas": betas, "steps": steps}))
    assert tuple(denoiser.time(sigma) for sigma in (0.12, 0.25, 0.5, 1.0)) == times
    for sigma, t in zip((0.12, 0.25, 0.5, 1.0), times, strict=True):
        assert denoiser.sigma(t - 1) < sigma <= denoiser.sigma(t) < sigma * 1.01


def test_published_levels_of_the_linear_schedule() -> None:
    levels = {50: 0.088, 100: 0.171, 200: 0.362, 300: 0.620, 400: 1.02, 450: 1.32, 600: 3.09, 999: 78.7}
    sigmas = Schedule().sigmas()
    for t, level in levels.items():
        assert sigmas[t] == pytest.approx(level, rel=6e-3)


@pytest.mark.parametrize(("betas", "name"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_betas_are_those_of_diffusers(betas: str, name: str) -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name).betas.double().numpy()
    ours = Schedule.model_validate({"betas": betas}).beta()
    assert np.allclose(ours, theirs, rtol=2e-5, atol=1e-8)


def test_first_time_is_one_and_beyond_the_end_is_refused() -> None:
    denoiser = MixtureDenoiser()
    assert denoiser.time(1e-9) == 1
    with pytest.raises(ValueError, match="beyond the schedule"):
        denoiser.time(1000.0)
    with pytest.raises(ValueError, match="outside the schedule"):
        denoiser.sigma(1000)


@pytest.mark.parametrize("t", [1, 50, 259, 700, 999])
def test_one_step_estimate_is_that_of_diffusers(t: int) -> None:
    from diffusers import DDIMScheduler, DDPMScheduler

    network, sigma = tiny(), float(Schedule().sigmas()[t])
    images = 0.5 + 0.2 * noise("images", 3, 1, 16, 16).double()
    eps = noise("eps", 3, 1, 16, 16).double()
    network = network.double()
    ours = as_denoise(network, Schedule(), "float64", clip=True)(images + sigma * eps, sigma).mean
    for scheduler in (DDPMScheduler(clip_sample=True), DDIMScheduler(clip_sample=True)):
        scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - Schedule().beta()))  # theirs are float32
        noisy = scheduler.add_noise(2 * images - 1, eps, torch.tensor([t]))
        output = network(noisy.contiguous(memory_format=torch.channels_last), t).sample
        if isinstance(scheduler, DDIMScheduler):
            scheduler.set_timesteps(1000)
        theirs = scheduler.step(output, t, noisy).pred_original_sample
        assert torch.allclose(ours, (theirs + 1) / 2, atol=1e-9)


def test_a_level_per_image_equals_one_level_at_a_time() -> None:
    denoise = as_denoise(tiny(), Schedule(), microbatch=4)
    images, levels = 0.5 + 0.2 * noise("a", 4, 1, 16, 16), torch.tensor(Schedule().sigmas()[[1, 100, 400, 900]])
    noisy = images + levels[:, None, None, None].float() * noise("b", 4, 1, 16, 16)
    together = denoise(noisy, levels).mean
    for row in range(4):
        assert torch.equal(together[row], denoise(noisy, float(levels[row])).mean[row])
    # A level that went through float32 still means the same time.
    assert torch.equal(together, denoise(noisy, levels.float()).mean) or torch.allclose(
        together, denoise(noisy, levels.float()).mean, atol=1e-5
    )


def test_learned_variance_is_passed_on() -> None:
    found = as_denoise(tiny(1, 2), Schedule())(torch.full((2, 1, 16, 16), 0.5), 0.25)
    assert found.spread is not None
    assert found.mean.shape == found.spread.shape == (2, 1, 16, 16)


def test_folder_round_trip_and_precision(tmp_path: Path) -> None:
    network = tiny()
    save(tmp_path, network, Schedule(betas="cosine", steps=1000))
    denoiser = UNet(folder=str(tmp_path))
    assert denoiser.channels() == 1
    assert np.array_equal(denoiser.sigmas(), Schedule(betas="cosine").sigmas())
    images = 0.5 + 0.1 * noise("c", 5, 1, 16, 16)
    direct = as_denoise(network, Schedule(betas="cosine"), microbatch=128)(images, 0.5).mean
    assert torch.equal(denoiser.loaded(Limits())(images, 0.5).mean, direct)
    # bfloat16 has three significant digits, but times must not lose theirs.
    rough = UNet(folder=str(tmp_path), precision="bfloat16").loaded(Limits())(images, 0.5).mean
    assert torch.allclose(rough, direct, atol=0.03)


def test_gradients_pass_through() -> None:
    images = (0.5 + 0.1 * noise("d", 2, 1, 16, 16)).requires_grad_()
    with torch.enable_grad():
        as_denoise(tiny(), Schedule(), clip=False)(images, 0.25).mean.sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    save(tmp_path, tiny(), Schedule())
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"<!DOCTYPE html><html>")
    denoiser: Denoiser = UNet(folder=str(tmp_path))
    with pytest.raises(ValueError, match="HTML page"):
        denoiser.load(torch.device("cpu"))
    (tmp_path / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(ValueError, match="scheduler_config"):
        denoiser.sigmas()
