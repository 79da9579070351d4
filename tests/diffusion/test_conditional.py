"""Class-conditional denoisers: the exact one, networks of diffusers, and mixes of scores."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import robustbench_diffaug.torchvision_guard  # noqa: F401  (before diffusers)
from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.diffusion.base import ConditionalDenoise, Denoise, Posterior, Schedule, Sigma, mixed
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.diffusion.unet import UNet, as_conditional, as_denoise, save
from robustbench_diffaug.mixture import MixtureSpec


def noise(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(rng.key("conditional", name), range(1), shape)[0])


def network(classes: int | None = 3, outputs: int = 1, **more: Any) -> nn.Module:
    from diffusers import UNet2DModel

    arguments = {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": outputs,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "num_class_embeds": None if classes is None else classes + 1,
    }
    with rng.seeded(rng.key("conditional unet")):
        made: nn.Module = UNet2DModel(**arguments | more)
    return made.eval().requires_grad_(False)


SPEC = MixtureSpec(classes=3, size=4)


def test_a_component_is_a_class() -> None:
    denoiser = MixtureDenoiser(spec=SPEC, clip=False)
    denoise, conditional = denoiser.loaded(Limits()), denoiser.loaded_conditional(Limits())
    assert denoiser.classes() == 3 and denoiser.size() == 4
    assert isinstance(conditional, ConditionalDenoise)
    levels = torch.tensor([0.02, 0.1, 0.5, 3.0], dtype=torch.float64)
    noisy = 0.5 + levels[:, None, None, None] * noise("mixture", 4, 1, 4, 4).double()
    of_class = []
    for label in range(3):
        found = conditional(noisy, levels, torch.full((4,), label)).mean
        prior, kept = SPEC.spread**2, levels[:, None, None, None] ** 2
        assert torch.allclose(found, (prior * noisy + kept * SPEC.means()[label]) / (prior + kept), atol=1e-12)
        of_class.append(found)
    # The law of total expectation, with p(class | noisy) from densities.
    for row, level in enumerate(levels):
        covariance = (SPEC.spread**2 + level**2) * torch.eye(16, dtype=torch.float64)
        densities = MultivariateNormal(SPEC.means().flatten(1), covariance).log_prob(noisy[row].flatten())
        total = torch.einsum("k,kchw->chw", densities.softmax(0), torch.stack([found[row] for found in of_class]))
        assert torch.allclose(denoise(noisy[row], float(level)).mean, total, atol=1e-10)
    assert torch.equal(conditional(noisy, levels, torch.full((4,), -1)).mean, denoise(noisy, levels).mean)
    together = conditional(noisy, levels, torch.tensor([0, -1, 2, 1])).mean
    assert torch.equal(together[2], of_class[2][2]) and torch.equal(together[1], denoise(noisy, levels).mean[1])
    assert torch.equal(conditional(noisy[0], 0.02, torch.tensor(0)).mean, of_class[0][0])


@given(st.floats(-1, 4), st.floats(0.05, 2), st.integers(-1, 2))
def test_a_mix_is_that_of_scores(mixing: float, sigma: float, label: int) -> None:
    """D = x + sigma^2 score, with scores from autograd of torch's densities."""
    noisy = (0.5 + sigma * noise("scores", 2, 1, 4, 4).double()).requires_grad_()
    covariance = (SPEC.spread**2 + sigma**2) * torch.eye(16, dtype=torch.float64)
    component = MultivariateNormal(SPEC.means().flatten(1), covariance)
    everything = MixtureSameFamily(Categorical(torch.ones(3, dtype=torch.float64)), component)
    flat = noisy.flatten(1)
    unconditional = everything.log_prob(flat).sum()
    conditional = component.log_prob(flat[:, None])[:, label].sum() if label >= 0 else unconditional
    (score,) = torch.autograd.grad((1 - mixing) * unconditional + mixing * conditional, noisy)
    denoise = MixtureDenoiser(spec=SPEC, clip=False).loaded_mixed(Limits(), mixing)
    with torch.no_grad():
        found = denoise(noisy, sigma, torch.full((2,), label)).mean
    assert torch.allclose(found, noisy + sigma**2 * score, atol=1e-8)


def test_a_mix_calls_what_it_needs_and_clamps_last() -> None:
    calls: list[str] = []

    def plain(noisy: Tensor, sigma: Sigma) -> Posterior:
        calls.append("plain")
        return Posterior(torch.full_like(noisy, 0.75), torch.zeros_like(noisy))

    def told(noisy: Tensor, sigma: Sigma, labels: Tensor) -> Posterior:
        calls.append(f"told {labels.tolist()}")
        return Posterior(torch.full_like(noisy, 0.25), torch.ones_like(noisy))

    images, labels = torch.zeros(1, 1, 2, 2), torch.tensor([5])
    expected = {0.0: (0.75, ["plain"]), 1.0: (0.25, ["told [5]"]), 0.5: (0.5, ["told [5]", "plain"])}
    expected[3.0] = (-0.75, ["told [5]", "plain"])
    for mixing, (value, made) in expected.items():
        for clip in (False, True):
            calls.clear()
            found = mixed(plain, told, mixing, clip)(images, 0.1, labels)
            assert float(found.mean.mean()) == (max(0.0, value) if clip else value)
            assert found.spread is not None and float(found.spread.mean()) == (mixing != 0)
            assert calls == made
    calls.clear()
    mixed(None, told, 0.5)(images, 0.1, labels)
    assert calls == ["told [5]", "told [-1]"]  # one network gives both


def test_the_mix_of_one_denoiser_clamps_last() -> None:
    clipped, free = (MixtureDenoiser(spec=SPEC, clip=clip).loaded_mixed(Limits(), 30.0) for clip in (True, False))
    noisy, labels = 0.5 + 0.4 * noise("last", 5, 1, 4, 4), torch.tensor([0, 1, 2, 0, -1])
    wide = free(noisy, 0.4, labels).mean
    assert float(wide.max()) > 1 and float(wide.min()) < 0
    assert torch.equal(clipped(noisy, 0.4, labels).mean, wide.clamp(0, 1))


def test_a_network_is_told_its_class() -> None:
    net, sigmas = network(outputs=2), Schedule().sigmas()
    conditional, plain = (
        as_conditional(net, Schedule(), 3, clip=False),
        as_denoise(net, Schedule(), clip=False, classes=3),
    )
    times, labels = torch.tensor([10, 100, 400, 700]), torch.tensor([0, 2, -1, 1])
    levels = torch.tensor(sigmas[times.numpy()])
    noisy = 0.5 + levels[:, None, None, None].float() * noise("told", 4, 1, 16, 16)
    found = conditional(noisy, levels, labels)
    kept = (1 / (1 + 4 * levels**2)).float()[:, None, None, None]
    scaled = (kept.sqrt() * (2 * noisy - 1)).contiguous(memory_format=torch.channels_last)
    output = net(scaled, times, class_labels=torch.tensor([0, 2, 3, 1])).sample  # 3 is no class
    clean = (scaled - (1 - kept).sqrt() * output[:, :1]) / kept.sqrt()
    assert torch.allclose(found.mean, (clean + 1) / 2, atol=1e-4)
    assert found.spread is not None and torch.allclose(found.spread, output[:, 1:], atol=1e-5)
    assert torch.equal(plain(noisy, levels).mean, conditional(noisy, levels, torch.full((4,), -1)).mean)
    others = [conditional(noisy, levels, torch.full((4,), label)).mean for label in (-1, 0, 1, 2)]
    assert all(float((one - others[0]).abs().max()) > 1e-3 for one in others[1:])  # it does matter


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_neither_the_batch_nor_the_precision_loses_a_label(precision: str) -> None:
    """With 300 classes a label rounded to bfloat16 would be another one."""
    net = network(classes=300)
    exact = as_conditional(network(classes=300), Schedule(), 300, "float64")
    conditional = as_conditional(net, Schedule(), 300, precision, microbatch=4)
    noisy, labels = 0.5 + 0.2 * noise("labels", 6, 1, 16, 16), torch.tensor([257, 258, 299, -1, 0, 259])
    together = conditional(noisy, 0.3, labels).mean
    for row in range(6):
        assert torch.equal(conditional(noisy[row], 0.3, labels[row]).mean, together[row])
    atol = {"float64": 1e-6, "float32": 1e-5, "bfloat16": 0.03}[precision]
    assert torch.allclose(together, exact(noisy, 0.3, labels).mean, atol=atol)
    stacked = conditional(noisy[:, None].expand(-1, 2, -1, -1, -1), 0.3, labels[:, None].expand(-1, 2)).mean
    assert torch.equal(stacked[:, 1], together)


def test_a_conditional_folder_is_read_again(tmp_path: Path) -> None:
    net = network(outputs=2)
    save(tmp_path, net, Schedule())
    denoiser = UNet(folder=str(tmp_path), microbatch=4)
    assert (denoiser.classes(), denoiser.channels(), denoiser.size()) == (3, 1, 16)
    noisy, labels = 0.5 + 0.2 * noise("folder", 3, 1, 16, 16), torch.tensor([1, -1, 2])
    direct = as_conditional(net, Schedule(), 3, microbatch=4)
    conditional = denoiser.loaded_conditional(Limits())
    assert torch.equal(conditional(noisy, 0.3, labels).mean, direct(noisy, 0.3, labels).mean)
    assert denoiser.loaded_conditional(Limits()) is conditional
    plain: Denoise = denoiser.loaded(Limits())
    assert torch.equal(plain(noisy, 0.3).mean[1], conditional(noisy, 0.3, labels).mean[1])
    scheduler = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert scheduler["variance_type"] == "learned_range"


def test_what_is_not_supported_is_said(tmp_path: Path) -> None:
    save(tmp_path, network(classes=None), Schedule())
    denoiser = UNet(folder=str(tmp_path))
    assert denoiser.classes() is None
    with pytest.raises(ValueError, match="no num_class_embeds"):
        denoiser.loaded_conditional(Limits())
    with pytest.raises(ValueError, match="no num_class_embeds"):
        denoiser.loaded_mixed(Limits(), 0.5)
    images = torch.full((2, 1, 16, 16), 0.4)
    without = denoiser.loaded_mixed(Limits(), 0.0)(images, 0.3, torch.tensor([0, 7]))  # at 0 no classes are needed
    assert torch.equal(without.mean, denoiser.loaded(Limits())(images, 0.3).mean)
    for labels, found in ((torch.tensor([0, 3]), "0 to 3"), (torch.tensor([-2, 1]), "-2 to 1")):
        for conditional in (
            as_conditional(network(), Schedule(), 3),
            MixtureDenoiser(spec=SPEC).loaded_conditional(Limits()),
        ):
            with pytest.raises(ValueError, match=f"labels go from {found}, the denoiser has the classes 0 to 2"):
                conditional(torch.zeros(2, 1, 4, 4), 0.3, labels)
    config = json.loads((tmp_path / "unet/config.json").read_text())
    for change, message in (
        ({"class_embed_type": "timestep"}, "class_embed_type timestep is not supported"),
        ({"num_class_embeds": 1}, "num_class_embeds is 1"),
    ):
        (tmp_path / "unet/config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            denoiser.load(torch.device("cpu"))
    for sample_size, size in (([16, 16], 16), ([16, 8], None), (None, None)):
        (tmp_path / "unet/config.json").write_text(json.dumps(config | {"sample_size": sample_size}))
        assert denoiser.size() == size
    scheduler = tmp_path / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "flow"}))
    with pytest.raises(ValueError, match="prediction_type flow is not one of epsilon"):
        denoiser.sigmas()
