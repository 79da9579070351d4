"""Loss terms against independent computations, on fixed inputs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.train.augmix import AugMix, augmix
from robustbench_diffaug.train.diffaug import DiffAug, diffaug, times_of
from robustbench_diffaug.train.geometry import Affine, affine
from robustbench_diffaug.train.losses import classifier_loss, guidance_loss, loss_of
from robustbench_diffaug.train.networks import network_of
from robustbench_diffaug.train.samples import Samples

Make = Callable[..., Any]
Some = Callable[[int], Samples]


class Seen(nn.Module):
    """A linear classifier that keeps what it was shown."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(64, classes)
        self.inputs: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.inputs.append(images)
        return self.layer(images[:, :1].flatten(1))  # type: ignore[no-any-return]


@pytest.fixture
def seen() -> Seen:
    with rng.seeded(0):
        return Seen()


def entropy(logits: Tensor, labels: Tensor) -> float:
    return float(-logits.log_softmax(1)[range(len(labels)), labels].mean())


def test_diffaug_is_the_published_operator(some: Some) -> None:
    samples, term = some(6), DiffAug(denoiser=MixtureDenoiser(), low=100, high=600)
    found = diffaug(samples, term)
    denoise = MixtureDenoiser().loaded(Limits())
    for row in range(6):
        # x_t = sqrt(abar) x + sqrt(1 - abar) z in [-1, 1], then E[x0 | x_t], one image at a time
        chance = float(rng.uniform(rng.key("diffaug time", 0, 0, str(row)), range(1), (1,))[0, 0])
        t = 100 + int(chance * 500)
        z = torch.from_numpy(rng.normal(rng.key("diffaug noise", 0, 0, str(row)), range(1), (1, 8, 8))[0])
        kept = float(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t])
        noisy = kept**0.5 * (2 * samples.images[row] - 1) + (1 - kept) ** 0.5 * z
        exploded = (noisy / kept**0.5 + 1) / 2
        expected = denoise(exploded[None], ((1 - kept) / kept) ** 0.5 / 2).mean[0].clamp(0, 1)
        assert torch.allclose(found[row], expected, atol=1e-5)


def test_diffaug_with_the_other_sampler_and_with_labels(some: Some) -> None:
    samples, exact = some(6), MixtureDenoiser()
    plain = diffaug(samples, DiffAug(denoiser=exact, low=100, high=600))
    second = diffaug(samples, DiffAug(denoiser=exact, low=100, high=600, sampler="dpm-solver-2"))
    assert second.shape == plain.shape
    assert not torch.allclose(second, plain)
    known = diffaug(samples, DiffAug(denoiser=exact, low=100, high=600, mixing=1.0))
    halfway = diffaug(samples, DiffAug(denoiser=exact, low=100, high=600, mixing=0.5))
    assert torch.allclose(halfway, (plain + known) / 2, atol=1e-5)
    times = times_of(samples, 100, 600)
    sigma = torch.from_numpy(exact.sigmas()[times]).float()
    noisy = samples.images + sigma[:, None, None, None] * samples.normal("diffaug noise")
    expected = exact.loaded_conditional(Limits())(noisy, sigma, samples.labels).mean
    assert torch.allclose(known, expected, atol=1e-6)


def test_times_cover_the_range_evenly() -> None:
    samples = Samples(torch.zeros(4000, 1, 1, 1), torch.zeros(4000).long(), [(0, 0, row) for row in range(4000)])
    counts, _ = np.histogram(times_of(samples, 100, 600), 10, (100, 600))
    assert float(((counts - 400) ** 2 / 400).sum()) < 27.9  # chi-square, 9 degrees of freedom, 0.001
    assert times_of(samples, 3, 4).tolist() == [3] * 4000


def test_both_branches_go_through_the_network_in_one_forward(classifier: Make, some: Some) -> None:
    recipe = classifier(augment=None, diffaug={"denoiser": {"kind": "mixture"}, "weight": 0.5})
    network, samples = network_of(recipe).train(), some(6)
    terms = {name: term.detach() for name, term in classifier_loss(recipe)(network, samples).losses.items()}
    again = network_of(recipe).train()
    both = torch.cat([samples.images, diffaug(samples, recipe.diffaug)])
    logits = again(both).detach()  # BatchNorm sees both branches, as published
    assert float(terms["clean"]) == pytest.approx(entropy(logits[:6], samples.labels), rel=1e-5)
    assert float(terms["diffaug"]) == pytest.approx(0.5 * entropy(logits[6:], samples.labels), rel=1e-5)


def test_augmix_and_diffaug_compose_as_published(classifier: Make, some: Some, seen: Seen) -> None:
    recipe = classifier(augment=None, augmix={"severity": 2}, diffaug={"denoiser": {"kind": "mixture"}})
    samples = some(6)
    terms = classifier_loss(recipe)(seen, samples)
    (shown,) = seen.inputs
    clean, one, two, denoised = shown.chunk(4)
    assert torch.equal(clean, samples.images)
    assert torch.equal(one, augmix(samples, clean, AugMix(severity=2), "augmix 1"))
    assert not torch.equal(one, two)
    assert torch.equal(denoised, diffaug(samples, recipe.diffaug))  # of the image without augmentation
    probabilities = [seen.layer(part.flatten(1)).softmax(1).detach().double() for part in (clean, one, two)]
    mean = sum(probabilities) / 3
    assert isinstance(mean, Tensor)
    divergence = sum(float((p * (p / mean).log()).sum(1).mean()) for p in probabilities) / 3
    assert float(terms.losses["augmix"].detach()) == pytest.approx(12 * divergence, rel=1e-3)
    assert set(terms.losses) == {"clean", "augmix", "diffaug"}


def test_smoothing_is_the_cross_entropy_of_smoothed_labels(classifier: Make, some: Some, seen: Seen) -> None:
    samples = some(8)
    smoothed = classifier(augment=None, mix={"smoothing": 0.2}, diffaug={"denoiser": {"kind": "mixture"}})
    terms = classifier_loss(smoothed)(seen, samples).losses
    clean, denoised = (seen.layer(part.flatten(1)).detach() for part in seen.inputs[0].chunk(2))
    for name, logits in (("clean", clean), ("diffaug", denoised)):
        expected = functional.cross_entropy(logits, samples.labels, label_smoothing=0.2)
        assert float(terms[name].detach()) == pytest.approx(float(expected), rel=1e-5)


def test_mixup_mixes_the_ordinary_branch_alone(classifier: Make, some: Some, seen: Seen) -> None:
    samples = some(8)
    recipe = classifier(augment=None, mix={"mixup": 1.0}, diffaug={"denoiser": {"kind": "mixture"}})
    before = rng.global_states()
    terms = classifier_loss(recipe)(seen, samples)
    assert rng.global_states() == before
    mixed, denoised = seen.inputs[0].chunk(2)
    assert torch.equal(denoised, diffaug(samples, recipe.diffaug))
    share = (mixed - samples.images.flip(0)) / (samples.images - samples.images.flip(0))
    assert float(share.std()) < 1e-2  # one share for the batch
    lam = float(share.median())
    logits = seen.layer(mixed.flatten(1)).detach()
    expected = lam * entropy(logits, samples.labels) + (1 - lam) * entropy(logits, samples.labels.flip(0))
    assert float(terms.losses["clean"].detach()) == pytest.approx(expected, rel=1e-3)


def test_guidance_classifiers_see_what_they_should(guidance: Make, some: Some) -> None:
    samples, exact = some(6), MixtureDenoiser()
    for sees, planes in (("noisy", 2), ("denoise-assisted", 3)):
        with rng.seeded(0):
            network = Seen()
        recipe = guidance(sees=sees)
        terms = guidance_loss(recipe)(network, samples)
        (shown,) = network.inputs
        assert shown.shape == (6, planes, 8, 8)
        sigma = torch.from_numpy(exact.sigmas()[times_of(samples, 0, 1000)]).float()
        noisy = samples.images + sigma[:, None, None, None] * samples.normal("diffaug noise")
        kept = 1 / (1 + (2 * sigma) ** 2)  # abar
        at_t = kept.sqrt()[:, None, None, None] * (2 * noisy - 1)
        assert torch.allclose(shown[:, :1], at_t, atol=1e-4)
        if sees == "denoise-assisted":
            twin = exact.loaded(Limits())(noisy, sigma).mean
            assert torch.allclose(shown[:, 1:2], 2 * twin - 1, atol=1e-5)
        assert torch.allclose(shown[:, -1, 0, 0], (2 * sigma).log() / 4, atol=1e-5)
        expected = entropy(network.layer(at_t.flatten(1)).detach(), samples.labels)
        assert float(terms.losses["noisy"].detach()) == pytest.approx(expected, rel=1e-4)


def test_the_autoencoder_s_loss_is_the_squared_error(autoencoder: Make, some: Some) -> None:
    samples, half = some(4), nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(half.weight, 0.5)
    found = float(loss_of(autoencoder())(half, samples).losses["image"].detach())
    assert found == pytest.approx(float((samples.images / 2).square().mean()), rel=1e-5)


def test_affine_maps(some: Some) -> None:
    images = some(6).images
    middle = torch.full((6, 4), 0.5, dtype=torch.float64)
    assert torch.allclose(affine(images, middle, Affine(degrees=30, pixels=3, zoom=0.2)), images, atol=1e-5)
    right = middle.clone()
    right[:, 2] = 1.0  # the largest shift along the width: two pixels
    shifted = affine(images, right, Affine(pixels=2))
    assert torch.allclose(shifted[..., :-2], images[..., 2:], atol=1e-5)
    turned = middle.clone()
    turned[:, 0] = 1.0
    quarter = affine(images, turned, Affine(degrees=90))
    assert any(torch.allclose(quarter, torch.rot90(images, k, (2, 3)), atol=1e-4) for k in (1, 3))
