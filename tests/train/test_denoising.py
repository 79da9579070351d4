"""The loss of denoisers: against torch.distributions, the published code's numbers, and the plain loss bit for bit."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.diffusion.base import Schedule
from robustbench_diffaug.train.denoising import bound, noise_loss, told_classes
from robustbench_diffaug.train.samples import Samples


def some(count: int = 6, channels: int = 1) -> Samples:
    images = 0.5 + 0.1 * torch.from_numpy(rng.normal(rng.key("samples"), range(count), (channels, 8, 8)))
    return Samples(images, torch.arange(count) % 4, [(0, 0, f"{row}") for row in range(count)])


def unet(**more: Any) -> nn.Module:
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
    from diffusers import UNet2DModel

    arguments = {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    with rng.seeded(rng.key("denoising")):
        made: nn.Module = UNet2DModel(**arguments | more)
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Recording(nn.Module):
    """Says what it was told and gives fixed outputs."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = nn.Parameter(outputs)
        self.told: dict[str, Any] = {}

    def forward(self, images: Tensor, times: Tensor, **more: Any) -> SimpleNamespace:
        self.told = {"images": images, "times": times, **more}
        return SimpleNamespace(sample=self.outputs)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(betas="cosine", steps=4000)], ids=["linear", "cosine"])
def test_an_unconditional_training_is_the_plain_one_bit_for_bit(schedule: Schedule) -> None:
    samples, losses, gradients = some(), [], []
    for way in range(2):
        network = unet()
        if way == 0:
            terms = noise_loss(network, samples, schedule, classes=None, drop=0.1, learned_sigma=False)
            assert list(terms) == ["noise"]
            loss = terms["noise"]
        else:  # as the bundled denoiser was trained
            kept = torch.from_numpy(np.cumprod(1 - schedule.beta())).float()
            times = (samples.uniform("time", 1)[:, 0] * schedule.steps).long()
            noise = samples.normal("noise")
            share = kept[times][:, None, None, None]
            noisy = share.sqrt() * (2 * samples.images - 1) + (1 - share).sqrt() * noise
            predicted = network(noisy.contiguous(memory_format=torch.channels_last), times).sample
            loss = functional.mse_loss(predicted, noise)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert losses[0] == losses[1] > 0.1
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, noise, predicted noise and variances by formulas, float64."""
    grid = torch.arange(6 * 2 * 3 * 3, dtype=torch.float64).reshape(6, 2, 3, 3)
    noise = 1.3 * torch.sin(grid)
    return (grid * 37) % 256 / 255, noise, noise + 0.2 * torch.cos(2 * grid), 0.8 * torch.cos(grid / 3)


# Made with _vb_terms_bpd of github.com/openai/guided-diffusion (22e0df8, EPSILON, LEARNED_RANGE, float64) of the same
# example. At time 0 it has a tanh in place of the normal CDF, hence that tolerance.
PUBLISHED = [
    (
        Schedule(),
        [0, 1, 10, 200, 700, 999],
        [1.450738, 0.07013967, 0.004557585, 0.0001775529, 0.0002067638, 0.0002991964],
    ),
    (
        Schedule(betas="cosine", steps=4000),
        [0, 1, 50, 1000, 3000, 3999],
        [0.2139625, 0.05845264, 0.0005168512, 3.117472e-05, 3.202475e-05, 14.64537],
    ),
]


@pytest.mark.parametrize(("schedule", "times", "published"), PUBLISHED, ids=["linear", "cosine"])
def test_the_bound_is_the_published_one(schedule: Schedule, times: list[int], published: list[float]) -> None:
    images, noise, predicted, values = example()
    found = bound(predicted, values, images, noise, torch.tensor(times), schedule)
    assert found[0].item() == pytest.approx(published[0], rel=3e-3)
    assert found[1:].tolist() == pytest.approx(published[1:], rel=2e-5)
    inputs = predicted.float(), values.float(), images.float(), noise.float()
    single = bound(*inputs, torch.tensor(times), schedule)
    assert single.tolist() == pytest.approx(found.tolist(), rel=1e-3)


@given(st.integers(0, 999), st.integers(0, 2**32), st.sampled_from(["linear", "cosine"]))
def test_the_bound_is_that_of_distributions(t: int, row: int, betas: str) -> None:
    """KL of torch's normals after time 0, and the probability of a bin by its CDF at time 0; all means in full."""
    schedule = Schedule.model_validate({"betas": betas})
    beta = schedule.beta()
    kept = np.cumprod(1 - beta)
    before = kept[t - 1] if t else 1.0
    normal = torch.from_numpy(rng.normal(rng.key("bound", row), range(3), (1, 2, 4, 4))).double()
    noise, predicted, values = normal[0], normal[0] + 0.3 * normal[1], normal[2].tanh()
    levels = rng.uniform(rng.key("bound", row, "pixels"), range(1), (1, 2, 4, 4))[0]
    images = torch.from_numpy(np.floor(256 * levels) / 255)
    clean = 2 * images - 1
    noisy: Tensor = kept[t] ** 0.5 * clean + (1 - kept[t]) ** 0.5 * noise
    estimate = (noisy - (1 - kept[t]) ** 0.5 * predicted) / kept[t] ** 0.5

    def mean(x0: Tensor) -> Tensor:  # of q(x_{t-1} | x_t, x_0)
        first, second = before**0.5 * beta[t], (1 - beta[t]) ** 0.5 * (1 - before)
        return x0 * float(first / (1 - kept[t])) + noisy * float(second / (1 - kept[t]))

    at = max(t, 1)
    smallest = beta[at] * (1 - kept[at - 1]) / (1 - kept[at])
    std = (beta[t] ** ((values + 1) / 2) * smallest ** ((1 - values) / 2)).sqrt()
    model = Normal(mean(estimate), std)
    if t:
        nats = kl_divergence(Normal(mean(clean), smallest**0.5), model)
    else:
        lower = torch.where(clean < -0.999, 0.0, model.cdf(clean - 1 / 255))
        upper = torch.where(clean > 0.999, 1.0, model.cdf(clean + 1 / 255))
        nats = -(upper - lower).clamp(min=1e-12).log()
    found = bound(predicted, values, images, noise, torch.tensor([t]), schedule)
    assert float(found) == pytest.approx(float(nats.mean()) / np.log(2), rel=2e-4, abs=1e-6)


def test_at_time_0_the_256_pixel_values_are_a_distribution() -> None:
    ratio = float(np.sqrt(1 / (1 - Schedule().beta()[0]) - 1))
    pixels = (torch.arange(256, dtype=torch.float64) / 255)[:, None, None, None]
    zeros = torch.zeros_like(pixels)
    for mean in (-1.0, -0.3, 0.004, 0.99):
        predicted = (2 * pixels - 1 - mean) / ratio  # so that the estimate is the mean
        bits = bound(predicted, zeros, pixels, zeros, torch.zeros(256, dtype=torch.long), Schedule())
        assert float((2.0**-bits).sum()) == pytest.approx(1, abs=1e-6)


def test_the_right_noise_and_variance_cost_nothing() -> None:
    images, noise, _, _ = example()
    times = torch.tensor([1, 2, 50, 400, 800, 999])
    least = bound(noise, -torch.ones_like(noise), images, noise, times, Schedule())
    assert float(least.abs().max()) < 1e-12
    assert float(bound(noise, torch.zeros_like(noise), images, noise, times, Schedule()).min()) > 0


def test_the_hybrid_loss() -> None:
    schedule, samples = Schedule(betas="cosine", steps=4000), some()
    network = unet(out_channels=2)
    terms = noise_loss(network, samples, schedule, classes=None, drop=0.0, learned_sigma=True)
    assert list(terms) == ["noise", "vlb"]
    recorded = Recording(torch.zeros(6, 2, 8, 8))
    plain = noise_loss(recorded, samples, schedule, classes=None, drop=0.0, learned_sigma=True)
    times, noise = recorded.told["times"], samples.normal("noise")
    zeros = torch.zeros_like(noise)
    bits = bound(zeros, zeros, samples.images, noise, times, schedule)
    assert float(plain["vlb"].detach()) == pytest.approx(4 * float(bits.mean()), rel=1e-6)
    assert float(plain["noise"].detach()) == pytest.approx(float(noise.square().mean()), rel=1e-6)
    # The bound teaches the variance alone.
    plain["vlb"].backward()
    assert recorded.outputs.grad is not None
    assert not recorded.outputs.grad[:, :1].any() and bool((recorded.outputs.grad[:, 1:] != 0).all())
    sum(terms.values(), torch.tensor(0.0)).backward()
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


def test_labels_are_dropped_with_the_given_chance_and_as_if_alone() -> None:
    keys = [(0, 0, row) for row in range(4000)]
    samples = Samples(torch.zeros(4000, 1, 1, 1), torch.arange(4000) % 4 - 1, keys)
    told = told_classes(samples, 3, 0.2)
    unknown = samples.labels < 0
    assert bool((told[unknown] == 3).all())
    dropped = told[~unknown] == 3
    assert abs(float(dropped.double().mean()) - 0.2) < 4 * (0.2 * 0.8 / 3000) ** 0.5
    assert torch.equal(told[~unknown][~dropped], samples.labels[~unknown][~dropped])
    alone = Samples(samples.images[7:8], samples.labels[7:8], keys[7:8])
    assert torch.equal(told_classes(alone, 3, 0.2), told[7:8])
    assert torch.equal(told_classes(samples, 3, 0.0), torch.where(unknown, 3, samples.labels))
    assert bool((told_classes(samples, 3, 1.0) == 3).all())


def test_a_conditional_network_is_told_the_classes() -> None:
    samples = some()
    recorded = Recording(torch.zeros(6, 1, 8, 8))
    noise_loss(recorded, samples, Schedule(), classes=4, drop=0.5, learned_sigma=False)
    assert torch.equal(recorded.told["class_labels"], told_classes(samples, 4, 0.5))
    plain = Recording(torch.zeros(6, 1, 8, 8))
    noise_loss(plain, samples, Schedule(), classes=None, drop=0.5, learned_sigma=False)
    assert "class_labels" not in plain.told
    assert torch.equal(plain.told["images"], recorded.told["images"])  # times and noise do not depend on classes
    network = unet(num_class_embeds=5)
    noise_loss(network, samples, Schedule(), classes=4, drop=0.5, learned_sigma=False)["noise"].backward()
    gradient = network.class_embedding.weight.grad  # type: ignore[union-attr]
    assert isinstance(gradient, Tensor)
    told = sorted(set(recorded.told["class_labels"].tolist()))
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == told


def test_outputs_of_another_shape_are_refused() -> None:
    for channels, learned, needed in ((1, True, 2), (2, False, 1)):
        with pytest.raises(ValueError, match=f"gives {channels} channels; .* write out_channels: {needed} under unet"):
            network = Recording(torch.zeros(6, channels, 8, 8))
            noise_loss(network, some(), Schedule(), classes=None, drop=0.0, learned_sigma=learned)
