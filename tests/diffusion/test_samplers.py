"""One-step samplers against diffusers, the authors' DPM-Solver, its published formula and the exact flow."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import robustbench_diffaug.torchvision_guard  # noqa: F401  (before diffusers)
from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.diffusion.base import Denoise, Posterior, Schedule, Sigma
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.diffusion.samplers import ddim, dpm_solver_2
from robustbench_diffaug.diffusion.unet import as_denoise
from robustbench_diffaug.mixture import MixtureSpec


def noise(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(rng.key("test", name), range(1), shape)[0])


def gaussian(mean: float, variance: float) -> Denoise:
    """The exact denoiser of pixels from N(mean, variance)."""

    def denoise(noisy: Tensor, sigma: Sigma) -> Posterior:
        squared = torch.as_tensor(sigma, dtype=torch.float64).expand(noisy.shape[:-3])[..., None, None, None] ** 2
        return Posterior((variance * noisy + squared * mean) / (variance + squared))

    return denoise


def network() -> nn.Module:
    from diffusers import UNet2DModel

    with rng.seeded(rng.key("samplers")):
        made: nn.Module = UNet2DModel(
            sample_size=16,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("t", [10, 300, 650])
def test_ddim_is_that_of_diffusers(t: int) -> None:
    from diffusers import DDIMScheduler

    net, sigmas = network(), Schedule().sigmas()
    kept = 1 / (1 + 4 * sigmas**2)
    clean, eps = 0.5 + 0.2 * noise("clean", 3, 1, 16, 16), noise("eps", 3, 1, 16, 16)
    ours = ddim(as_denoise(net, Schedule(), clip=False), clean + float(sigmas[t]) * eps, float(sigmas[t]))
    scheduler: Any = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(1)  # one step, to time 0
    noisy = scheduler.add_noise(2 * clean - 1, eps, torch.tensor([t]))
    output = net(noisy.contiguous(memory_format=torch.channels_last), t).sample
    assert torch.allclose(ours, (scheduler.step(output, t, noisy).prev_sample + 1) / 2, atol=1e-5)
    # and to a later time: a step of 500 times is one of 2
    if t >= 500:
        scheduler.set_timesteps(2)
        theirs = scheduler.step(output, t, noisy).prev_sample / kept[t - 500] ** 0.5
        exploded = clean + float(sigmas[t]) * eps
        ours = ddim(as_denoise(net, Schedule(), clip=False), exploded, float(sigmas[t]), float(sigmas[t - 500]))
        assert torch.allclose(ours, (theirs + 1) / 2, atol=1e-5)


# Made with the authors' DPM_Solver.singlestep_dpm_solver_second_update (github.com/LuChengTHU/dpm-solver at 52bc3fb,
# dpm_solver_pytorch.py; 'dpmsolver', r1 = 0.5, NoiseScheduleVP 'discrete' of the linear betas, float64): from the
# discrete time to t = 1e-3, of x = -1.5, 0.2, 2.0 with the exact noise prediction of data from N(0.3, 0.25).
GOLDEN = {
    50: (-1.4767845356134637, 0.20552027310464094, 1.9867841882179282),
    100: (-1.47898526212028, 0.21637789813498154, 2.0114683031111413),
    300: (-2.0847495880468183, 0.3164957992747495, 2.8589909152622917),
    600: (-7.168981134226305, 1.0335333921288574, 9.718548772975499),
    999: (-31.855962246350785, 4.541199722642811, 43.079371219220654),
}
# From the same NoiseScheduleVP: marginal_std(t) / marginal_alpha(t) / 2.
LEVELS = {
    0.001: 0.0050002500187512865,
    0.0015: 0.006324186734853675,
    0.1234567: 0.21042242076798592,
    0.5: 1.7120683095220233,
    0.98765: 69.52215038937442,
    1.0: 78.7036404052036,
}


def test_dpm_solver_is_that_of_its_authors() -> None:
    denoiser = MixtureDenoiser()
    sigmas, end = torch.tensor(denoiser.sigmas()), denoiser.level(1e-3)
    for t, expected in GOLDEN.items():
        start = float(sigmas[t])
        alpha, alpha_end = ((1 + 4 * level**2) ** -0.5 for level in (start, end))
        preserving = torch.tensor([-1.5, 0.2, 2.0], dtype=torch.float64)[:, None, None, None]
        # N(0.3, 0.25) in [-1, 1] is N(0.65, 0.0625) in [0, 1].
        found = dpm_solver_2(gaussian(0.65, 0.0625), (preserving / alpha + 1) / 2, start, end)
        assert (alpha_end * (2 * found - 1)).flatten().tolist() == pytest.approx(expected, rel=1e-9)


def test_levels_of_continuous_times_are_the_authors() -> None:
    denoiser = MixtureDenoiser()
    for time, level in LEVELS.items():
        assert denoiser.level(time) == pytest.approx(level, rel=1e-9)
    assert denoiser.level(1e-3) == denoiser.sigma(0)
    assert [denoiser.level((t + 1) / 1000) for t in range(1000)] == denoiser.sigmas().tolist()
    assert 0 < denoiser.level(1e-9) < denoiser.level(5e-4) < denoiser.sigma(0)
    for time in (0.0, -0.1, 1.0001, math.nan):
        with pytest.raises(ValueError, match=r"outside \(0, 1\]"):
            denoiser.level(time)


@given(st.floats(1e-6, 1), st.floats(1e-6, 1), st.sampled_from(["linear", "cosine"]))
def test_levels_grow_with_time(one: float, other: float, betas: str) -> None:
    denoiser = MixtureDenoiser(schedule=Schedule.model_validate({"betas": betas}))
    low, high = sorted((one, other))
    assert denoiser.level(low) <= denoiser.level(high)
    assert denoiser.level(high) >= denoiser.sigmas()[max(0, math.floor(high * 1000) - 1)] * (high >= 1e-3)


def preserving_step(denoise: Denoise, noisy: Tensor, start: float, end: float) -> Tensor:
    """DPM-Solver-2 as published: in variance-preserving coordinates, with lambda, h and r1."""
    r1 = 0.5
    lambda_s, lambda_t = -math.log(2 * start), -math.log(2 * end)
    h = lambda_t - lambda_s
    lambda_s1 = lambda_s + r1 * h

    def alpha_and_std(lam: float) -> tuple[float, float]:
        return (1 / (1 + math.exp(-2 * lam))) ** 0.5, (1 / (1 + math.exp(2 * lam))) ** 0.5

    def eps(z: Tensor, lam: float) -> Tensor:
        a, s = alpha_and_std(lam)
        clean = 2 * denoise((z / a + 1) / 2, math.exp(-lam) / 2).mean - 1
        return (z - a * clean) / s

    (a_s, _), (a_s1, s_s1), (a_t, s_t) = map(alpha_and_std, (lambda_s, lambda_s1, lambda_t))
    z = a_s * (2 * noisy - 1)
    first = eps(z, lambda_s)
    z_s1 = a_s1 / a_s * z - s_s1 * math.expm1(r1 * h) * first
    second = eps(z_s1, lambda_s1)
    z_t = a_t / a_s * z - s_t * math.expm1(h) * first - 1 / (2 * r1) * s_t * math.expm1(h) * (second - first)
    return (z_t / a_t + 1) / 2


@given(st.floats(0.02, 70), st.floats(0.001, 0.9), st.integers(0, 1000))
def test_dpm_solver_is_its_published_formula(start: float, share: float, row: int) -> None:
    denoise = MixtureDenoiser(clip=False).loaded(Limits())
    noisy = 0.5 + start * noise(f"row {row}", 2, 1, 8, 8).double()
    end = start * share
    found, expected = dpm_solver_2(denoise, noisy, start, end), preserving_step(denoise, noisy, start, end)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9 * start)


def test_a_level_of_each_image_and_those_that_are_there_already() -> None:
    denoise, end = MixtureDenoiser(clip=False).loaded(Limits()), 0.05
    levels = torch.tensor([[3.0, 0.05], [0.01, 0.4]], dtype=torch.float64)
    noisy = 0.5 + levels[..., None, None, None] * noise("levels", 2, 2, 1, 8, 8).double()
    found = dpm_solver_2(denoise, noisy, levels, end)
    for row, draw in ((0, 0), (1, 1)):
        alone = preserving_step(denoise, noisy[row, draw], float(levels[row, draw]), end)
        assert torch.allclose(found[row, draw], alone, atol=1e-9)
    for row, draw in ((0, 1), (1, 0)):
        one_step = denoise(noisy[row, draw], float(levels[row, draw])).mean
        assert torch.allclose(found[row, draw], one_step, rtol=0, atol=1e-14)
    assert torch.equal(dpm_solver_2(denoise, noisy, 0.03, end), ddim(denoise, noisy, 0.03))
    single = dpm_solver_2(denoise, noisy.float(), levels, end)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), found, atol=1e-5)


def test_the_calls_are_two_or_one() -> None:
    seen: list[Any] = []
    exact = gaussian(0.5, 0.01)

    def counting(noisy: Tensor, sigma: Sigma) -> Posterior:
        seen.append(sigma)
        return exact(noisy, sigma)

    noisy = noise("calls", 2, 1, 4, 4).double()
    dpm_solver_2(counting, noisy, 2.0, 0.02)
    assert len(seen) == 2 and seen[1].tolist() == pytest.approx([0.2, 0.2])
    dpm_solver_2(counting, noisy, 0.02, 0.02)
    ddim(counting, noisy, 0.5)
    assert len(seen) == 4


def test_second_order_and_first_order_on_the_exact_flow() -> None:
    """Of one Gaussian the flow is x(s) = m + sqrt((v + s^2) / (v + S^2)) (x(S) - m)."""
    spec = MixtureSpec(classes=1)
    denoise = MixtureDenoiser(spec=spec, clip=False).loaded(Limits())
    mean, variance, start, end = spec.means()[0], spec.spread**2, 2.0, 0.01
    noisy = mean + start * noise("flow", 4, 1, 8, 8).double()
    exact = mean + ((variance + end**2) / (variance + start**2)) ** 0.5 * (noisy - mean)

    def error(order: int, steps: int) -> float:
        levels, found = np.geomspace(start, end, steps + 1), noisy
        for level, following in pairwise(levels):
            step = dpm_solver_2 if order == 2 else ddim
            found = step(denoise, found, float(level), float(following))
        return float((found - exact).abs().max())

    for order in (1, 2):
        errors = [error(order, steps) for steps in (40, 80, 160)]
        for coarse, fine in pairwise(errors):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_gradients_pass_and_bad_ends_are_refused() -> None:
    denoise = MixtureDenoiser(clip=False).loaded(Limits())
    noisy = (0.5 + noise("gradient", 1, 1, 8, 8).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dpm_solver_2(denoise, x, 0.3, 0.01).mean(), (noisy,))
    for end in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="end_sigma must be above 0"):
            dpm_solver_2(denoise, noisy, 0.3, end)
