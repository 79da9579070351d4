"""The trainer: losses against independent computations, bitwise resume, and honest refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.timm_model import Timm
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.diffusion.unet import UNet
from robustbench_diffaug.files import built_in
from robustbench_diffaug.train import output
from robustbench_diffaug.train.loop import network_of, train
from robustbench_diffaug.train.losses import affine, classifier_loss, denoiser_loss, diffaug
from robustbench_diffaug.train.recipe import Affine, ClassifierRecipe, DenoiserRecipe, DiffAug
from robustbench_diffaug.train.samples import Samples


def classifier(**more: Any) -> ClassifierRecipe:
    data = {
        "kind": "classifier",
        "name": "tiny",
        "dataset": {"kind": "mixture", "size": 24},
        "test": {"kind": "mixture", "size": 12, "draw": 1},
        "channels": 1,
        "classes": 4,
        "arch": "resnet10t",
        "args": {"channels": [4, 4, 8, 8], "stem_width": 4},
        "steps": 6,
        "batch": 8,
        "ema": 0.5,
        "save_every": 2,
        "augment": {"degrees": 5, "pixels": 1},
    }
    return ClassifierRecipe.model_validate(data | more)


def denoiser(**more: Any) -> DenoiserRecipe:
    data = {
        "kind": "denoiser",
        "name": "tiny-ddpm",
        "dataset": {"kind": "mixture", "size": 24},
        "channels": 1,
        "unet": {
            "sample_size": 8,
            "block_out_channels": [8, 8],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ["DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D"],
        },
        "steps": 4,
        "batch": 8,
        "ema": 0.5,
        "save_every": 2,
    }
    return DenoiserRecipe.model_validate(data | more)


def some(count: int = 6) -> Samples:
    images = 0.5 + 0.1 * torch.from_numpy(rng.normal(rng.key("samples"), range(count), (1, 8, 8)))
    return Samples(images, torch.arange(count) % 4, [(0, 0, f"{row}") for row in range(count)])


@pytest.mark.parametrize("recipe", [classifier(), denoiser()], ids=["classifier", "denoiser"])
def test_a_stopped_run_ends_in_the_same_weights(recipe: ClassifierRecipe | DenoiserRecipe, tmp_path: Path) -> None:
    whole = [step.losses for step in train(recipe, tmp_path / "whole.pt")]
    parts = []
    for step in train(recipe, tmp_path / "parts.pt"):
        parts.append(step.losses)
        if step.number == 3:  # one step past the last saved state
            break
    parts = parts[:2] + [step.losses for step in train(recipe, tmp_path / "parts.pt")]
    assert parts == whole
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    for key, value in one["average"].items():
        assert torch.equal(value, other["average"][key])


def test_a_run_does_not_touch_global_random_states(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    list(train(classifier(steps=2), tmp_path / "state.pt"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_diffaug_is_the_published_operator() -> None:
    samples, term = some(), DiffAug(denoiser=MixtureDenoiser(), low=100, high=600)
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


def test_times_cover_the_range_evenly() -> None:
    samples = Samples(torch.zeros(4000, 1, 1, 1), torch.zeros(4000).long(), [(0, 0, row) for row in range(4000)])
    times = 100 + (samples.uniform("diffaug time", 1)[:, 0] * 500).long()
    counts = torch.histc(times.float(), 10, 100, 600)
    assert float(((counts - 400) ** 2 / 400).sum()) < 27.9  # chi-square, 9 degrees of freedom, 0.001


def test_classifier_loss_is_the_sum_of_both_branches_in_one_forward() -> None:
    recipe = classifier(augment=None, diffaug={"denoiser": {"kind": "mixture"}, "weight": 0.5})
    network, samples = network_of(recipe).train(), some()
    terms = {name: term.detach() for name, term in classifier_loss(recipe)(network, samples).items()}
    assert recipe.diffaug is not None
    again = network_of(recipe).train()
    both = torch.cat([samples.images, diffaug(samples, recipe.diffaug)])
    logits = again(both).detach()  # BatchNorm sees both branches, as published
    clean = -logits[:6].log_softmax(1)[range(6), samples.labels].mean()
    denoised = -logits[6:].log_softmax(1)[range(6), samples.labels].mean()
    assert float(terms["clean"]) == pytest.approx(float(clean), rel=1e-5)
    assert float(terms["diffaug"]) == pytest.approx(0.5 * float(denoised), rel=1e-5)


def test_denoiser_loss_is_that_of_diffusers() -> None:
    from diffusers import DDPMScheduler

    recipe, samples = denoiser(), some()
    network = network_of(recipe).eval()
    with torch.no_grad():
        found = float(denoiser_loss(recipe)(network, samples)["noise"])
        times = (samples.uniform("time", 1)[:, 0] * 1000).long()
        noise = samples.normal("noise")
        noisy = DDPMScheduler().add_noise(2 * samples.images - 1, noise, times)
        expected = float(functional.mse_loss(network(noisy, times).sample, noise))
    assert found == pytest.approx(expected, rel=1e-5)


def test_affine_maps() -> None:
    images = some().images
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


@pytest.mark.parametrize("name", sorted(built_in("recipes")))
def test_bundled_recipes_load_and_take_a_step(name: str, tmp_path: Path) -> None:
    recipe = output.load(built_in("recipes")[name])
    assert recipe.name == name
    first = next(iter(train(recipe.model_copy(update={"batch": 8}), tmp_path / "state.pt")))
    assert all(np.isfinite(value) for value in first.losses.values())


def test_outputs_can_be_pasted_into_a_suite(tmp_path: Path) -> None:
    for _ in output.run(classifier(), tmp_path):
        pass
    entry = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    checkpoint = Timm.model_validate(entry, context={"folder": tmp_path})
    checkpoint.check()
    model = checkpoint.loaded(Limits())
    images, labels = classifier().test.opened().read(range(12))  # type: ignore[union-attr]
    accuracy = float((model.logits(images).argmax(1) == labels).float().mean())
    card = yaml.safe_load((tmp_path / "tiny.card.yaml").read_text())
    assert card["accuracy"]["value"] == pytest.approx(accuracy)
    assert card["recipe"] == classifier().digest
    assert card["sha256"] == checkpoint.weights.sha256
    assert (tmp_path / "log.csv").read_text().startswith("step,clean")
    before = (tmp_path / "tiny.safetensors").read_bytes()
    assert list(output.run(classifier(), tmp_path)) == []  # all steps were done
    assert (tmp_path / "tiny.safetensors").read_bytes() == before


def test_denoiser_outputs_load(tmp_path: Path) -> None:
    for _ in output.run(denoiser(), tmp_path):
        pass
    entry = yaml.safe_load((tmp_path / "tiny-ddpm.yaml").read_text())
    found = UNet.model_validate(entry, context={"folder": tmp_path})
    assert found.loaded(Limits())(torch.full((2, 1, 8, 8), 0.5), 0.5).mean.shape == (2, 1, 8, 8)
    assert found.contents()


def test_refusals(tmp_path: Path) -> None:
    def message(recipe: ClassifierRecipe) -> str:
        with pytest.raises(ValueError) as caught:
            next(iter(train(recipe, tmp_path / "none.pt")))
        return str(caught.value)

    assert "labels of mixture go from 0 to 3, the recipe has 3" in message(classifier(classes=3))
    assert "channels" in message(classifier(channels=3))
    wrong = {"denoiser": {"kind": "mixture", "spec": {"channels": 3}}}
    assert "denoiser is for 3 channels" in message(classifier(diffaug=wrong))
    assert "timm has no architecture" in message(classifier(arch="resnet10x"))
    list(train(classifier(), tmp_path / "state.pt"))
    with pytest.raises(ValueError, match="another recipe"):
        next(iter(train(classifier(seed=1), tmp_path / "state.pt")))
    with pytest.raises(ValueError, match="low < high"):
        classifier(diffaug={"denoiser": {"kind": "mixture"}, "high": 1001})


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not finite at step \d+ \(clean nan\)"):
        list(train(classifier(steps=50, optimiser={"lr": 1e30, "warmup": 0.0, "clip": 1e30}), tmp_path / "state.pt"))
