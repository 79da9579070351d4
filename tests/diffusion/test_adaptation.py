"""Diffusion-driven adaptation against its authors' code on the same noise, and against what it must not depend on.

golden/dda.npz was made by the code of https://github.com/shiyegao/DDA (commit accf067): `p_sample_loop` of its respaced
diffusion with N = 50 of 100 steps and D = 4, for one image at a time, at the scale 3 = 6 / sqrt(4); and its resizer.
The network was the function below, the noise the streams below, all in float64.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from robustbench_diffaug import rng
from robustbench_diffaug.diffusion.adaptation import Adaptation, Chain, adapt, low_pass
from robustbench_diffaug.diffusion.base import Posterior, Schedule, Sigma
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.diffusion.unet import as_denoise

GOLDEN = np.load(Path(__file__).parent / "golden" / "dda.npz")


class Stand(torch.nn.Module):
    """A smooth function of image and time in place of a network, with or without a learned variance."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.learned = learned

    def forward(self, images: torch.Tensor, times: torch.Tensor) -> SimpleNamespace:
        level = (times.double() / 1000)[:, None, None, None]
        noise = 0.6 * images + 0.3 * torch.sin(2 * images + level) + 0.1 * images.mean(dim=(2, 3), keepdim=True)
        return SimpleNamespace(sample=torch.cat([noise, torch.cos(3 * images)], 1) if self.learned else noise)


def an_image() -> torch.Tensor:
    return torch.from_numpy(rng.uniform(rng.key("dda", "image"), range(1), (2, 16, 12)))


def noise_of(step: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(rng.key("dda", "noise"), range(step, step + 1), (2, 16, 12))).double()


@pytest.mark.parametrize("variance", ["learned", "small", "large"])
def test_published_settings_give_the_authors_images(variance: str) -> None:
    settings = Adaptation.model_validate({"variance": variance})
    assert (settings.respacing, settings.N, settings.D, settings.scale, settings.batch) == (100, 50, 4, 6.0, 4)
    denoise = as_denoise(Stand(variance == "learned"), Schedule(), precision="float64")
    chain = Chain.of(Schedule().sigmas(), settings.respacing)
    found = adapt(denoise, an_image(), noise_of, settings, chain, 8)
    assert np.abs(found.numpy() - GOLDEN[variance]).max() < 1e-9
    assert np.abs(found.numpy() - an_image().numpy()).max() > 0.1  # something happens


def test_low_pass_is_the_authors_resizer() -> None:
    assert np.abs(low_pass(an_image(), 4).numpy() - GOLDEN["low_pass"]).max() < 1e-12


@given(st.sampled_from([(8, 2), (16, 4), (24, 8), (12, 1)]), st.floats(-3, 3))
def test_low_pass_keeps_what_is_constant_inside(case: tuple[int, int], level: float) -> None:
    side, factor = case
    found = low_pass(torch.full((1, 1, 5 * side, 5 * side), level, dtype=torch.float64), factor)
    inside = found[..., 2 * side : 3 * side, 2 * side : 3 * side]
    assert torch.allclose(inside, torch.full_like(inside, level), atol=1e-12)


def test_chain_of_all_times_is_the_schedule_itself() -> None:
    schedule = Schedule()
    chain, beta = Chain.of(schedule.sigmas(), 1000), schedule.beta()
    assert chain.times.tolist() == list(range(1000))
    assert np.allclose(chain.log_large, np.log(beta), atol=1e-10)
    kept = np.cumprod(1 - beta)
    assert np.allclose(chain.first[1:], np.sqrt(kept[:-1]) * beta[1:] / (1 - kept[1:]))
    assert np.allclose(chain.second[1:], np.sqrt(1 - beta[1:]) * (1 - kept[:-1]) / (1 - kept[1:]))


def test_published_chain_begins_at_the_published_times() -> None:
    times = Chain.of(Schedule().sigmas(), 100).times
    assert (times[0], times[49], times[50], times[99]) == (0, 494, 505, 999)


def test_images_do_not_depend_on_their_neighbours_or_groups() -> None:
    denoiser = MixtureDenoiser()
    chain = Chain.of(denoiser.sigmas(), 100)
    settings = Adaptation(N=6, variance="small")
    count = 5
    images = torch.from_numpy(rng.uniform(1, range(count), (1, 8, 8))).float()

    def drawn(step: int, rows: slice) -> torch.Tensor:
        keys = range(count)[rows]
        return torch.from_numpy(np.concatenate([rng.normal(key, range(step, step + 1), (1, 8, 8)) for key in keys]))

    def run(rows: slice, group: int) -> torch.Tensor:
        denoise = denoiser.load(torch.device("cpu"))
        return adapt(denoise, images[rows], lambda step: drawn(step, rows), settings, chain, group)

    whole = run(slice(0, 5), 8)
    assert torch.allclose(run(slice(0, 5), 2), whole, atol=1e-6)
    assert torch.allclose(torch.cat([run(slice(0, 2), 8), run(slice(2, 5), 8)]), whole, atol=1e-6)


def test_guidance_pulls_towards_the_low_frequencies_of_the_reference() -> None:
    def flat(noisy: torch.Tensor, sigma: Sigma) -> Posterior:
        return Posterior(0.5 + 0.7 * (noisy - 0.5))  # a denoiser that would rather have grey

    chain = Chain.of(Schedule().sigmas(), 100)
    image = an_image()
    far, near = (
        adapt(flat, image, noise_of, Adaptation(scale=scale, variance="small"), chain, 8) for scale in (1e-6, 2.0)
    )
    assert low_pass(near - image, 4).norm() < 0.5 * low_pass(far - image, 4).norm()


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValidationError, match="N is 100 and the chain has the steps 0 to 99"):
        Adaptation(N=100)
    with pytest.raises(ValueError, match="respacing is 2000 and the denoiser has 1000 times"):
        Chain.of(Schedule().sigmas(), 2000)
    chain = Chain.of(Schedule().sigmas(), 100)
    denoise = as_denoise(Stand(learned=False), Schedule(), precision="float64")
    with pytest.raises(ValueError, match="no learned variance; give DDA variance: small"):
        adapt(denoise, an_image(), noise_of, Adaptation(), chain, 8)
    with pytest.raises(ValueError, match="sides are multiples of it, not 12x16"):
        adapt(denoise, an_image(), noise_of, Adaptation(D=5), chain, 8)
