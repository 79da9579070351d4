"""Generated images against closed forms and diffusers, the same in any batches, whole or not at all."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import robustbench_diffaug.torchvision_guard  # noqa: F401  (before diffusers)
from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.data.sources import Arrays, Folder
from robustbench_diffaug.diffusion.base import Schedule
from robustbench_diffaug.diffusion.unet import UNet, save
from robustbench_diffaug.train.generate import Generation, run, sample

SPEC = {"classes": 3, "size": 4}


def generation(**more: Any) -> Generation:
    mixture = {"kind": "mixture", "spec": SPEC}
    data = {"kind": "generation", "name": "drawn", "denoiser": mixture, "per_class": 7, "steps": 20}
    return Generation.model_validate(data | more)


def drawn(recipe: Generation, label: int, count: int) -> Tensor:
    denoise = recipe.denoiser.loaded_mixed(Limits(), recipe.mixing)
    return sample(recipe, denoise, torch.full((count,), label), torch.arange(count))


def test_images_are_those_of_the_closed_form() -> None:
    """Of one component every DDIM step is affine: x - m shrinks by v / (v + s^2) (1 - s' / s) + s' / s."""
    recipe = generation(denoiser={"kind": "mixture", "spec": SPEC, "clip": False}, steps=40)
    spec = recipe.denoiser.spec  # type: ignore[attr-defined]
    variance, sigmas = spec.spread**2, recipe.denoiser.sigmas()
    times = [1000 - 25 * step - 1 for step in range(40)]
    assert (times[0], times[-1]) == (999, 24)
    levels, factor = [*sigmas[times], 0.0], 1.0
    for level, following in pairwise(levels):
        factor *= variance / (variance + level**2) * (1 - following / level) + following / level
    start = (0.25 + levels[0] ** 2) ** 0.5
    for label in range(3):
        found = drawn(recipe, label, 300).double()
        noise = [rng.normal(rng.key("generation", 0, label, index), range(1), (1, 4, 4))[0] for index in range(300)]
        mean = spec.means()[label]
        expected = mean + factor * (0.5 + start * torch.from_numpy(np.stack(noise)).double() - mean)
        assert torch.allclose(found, expected, atol=2e-5)
        # So they have the component's mean, and the spread that so few steps leave of its own.
        error = float((found.mean(0) - mean).abs().max())
        assert error < 5 * spec.spread / 300**0.5
        assert float((found - mean).std()) == pytest.approx(factor * start, rel=0.03)
        nearest = (found[:, None] - spec.means()).square().flatten(2).sum(2).argmin(1)
        assert bool((nearest == label).all())


def test_more_steps_give_the_spread_of_the_component() -> None:
    spreads = []
    for steps in (10, 50, 1000):
        found = drawn(generation(steps=steps), 1, 200).double()
        means = generation().denoiser.spec.means()  # type: ignore[attr-defined]
        spreads.append(abs(float((found - means[1]).std()) / 0.04 - 1))
    assert spreads[0] > spreads[1] > spreads[2]
    assert spreads[2] < 0.04


def test_noise_in_each_step_keeps_the_closed_form() -> None:
    """Of one component: the mean stays, and the variance follows the affine step with the added noise."""
    more = {"eta": 1.0, "start": 599, "mean": 0.3}
    recipe = generation(denoiser={"kind": "mixture", "spec": SPEC, "clip": False}, steps=30, **more)
    spec = recipe.denoiser.spec  # type: ignore[attr-defined]
    variance, sigmas = spec.spread**2, recipe.denoiser.sigmas()
    levels = [*sigmas[[600 - 20 * step - 1 for step in range(30)]], 0.0]
    spread = 0.25 + levels[0] ** 2
    for level, following in pairwise(levels):
        added = following * (1 - (following / level) ** 2) ** 0.5
        down = (following**2 - added**2) ** 0.5
        factor = variance / (variance + level**2) * (1 - down / level) + down / level
        spread = factor**2 * spread + added**2
    found = drawn(recipe, 1, 400).double() - spec.means()[1]
    assert float(found.std()) == pytest.approx(spread**0.5, rel=0.03)
    assert float(found.mean(0).abs().max()) < 5 * spread**0.5 / 400**0.5


def test_mixing_0_draws_from_all_classes_and_more_sharpens() -> None:
    means = generation().denoiser.spec.means()  # type: ignore[attr-defined]

    def nearest(mixing: float) -> Tensor:
        found = drawn(generation(mixing=mixing), 2, 60).double()
        closest: Tensor = (found[:, None] - means).square().flatten(2).sum(2).argmin(1)
        return closest

    assert set(nearest(0.0).tolist()) == {0, 1, 2}
    assert set(nearest(1.0).tolist()) == set(nearest(3.0).tolist()) == {2}


def unet(folder: Path) -> UNet:
    from diffusers import UNet2DModel

    with rng.seeded(rng.key("generate")):
        network = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            num_class_embeds=3,
        )
    save(folder, network, Schedule())
    return UNet(folder=str(folder), microbatch=4)


@pytest.mark.parametrize("mixing", [0.0, 1.0, 1.5])
def test_a_network_is_sampled_as_by_diffusers(mixing: float, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, UNet2DModel

    recipe = generation(denoiser=unet(tmp_path), steps=5, mixing=mixing)
    assert (recipe.classes, recipe.shape) == (2, (1, 8, 8))
    ours = drawn(recipe, 1, 3)
    network = UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    scheduler: Any = DDIMScheduler(timestep_spacing="trailing", clip_sample=True)
    scheduler.set_timesteps(5)
    keys = [rng.key("generation", 0, 1, index) for index in range(3)]
    images = torch.from_numpy(np.concatenate([rng.normal(key, range(1), (1, 8, 8)) for key in keys]))
    with torch.no_grad():
        for t in scheduler.timesteps:
            told, plain = (network(images, t, class_labels=torch.full((3,), label)).sample for label in (1, 2))
            guided = (1 - mixing) * plain + mixing * told
            images = scheduler.step(guided, t, images, use_clipped_model_output=True).prev_sample
    assert torch.allclose(ours, (images + 1) / 2, atol=2e-4)
    assert float(ours.std()) > 0.05


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["folder", "arrays"])
def test_no_byte_depends_on_how_images_are_batched(form: str, tmp_path: Path) -> None:
    denoiser, found = unet(tmp_path / "unet"), []
    for batch in (128, 1, 3, 7, 15):
        recipe = generation(denoiser=denoiser, steps=2, form=form, batch=batch, mixing=0.5)
        progress = list(run(recipe, tmp_path / f"{batch}"))
        assert progress[-1] == (14, 14) and progress == sorted(set(progress))
        assert len(progress) == {128: 1, 15: 1, 7: 2, 3: 6, 1: 14}[batch]
        found.append(contents(tmp_path / f"{batch}"))
    assert all(one == found[0] for one in found[1:])


@pytest.mark.parametrize("channels", [1, 3])
def test_both_forms_are_read_as_the_same_images(channels: int, tmp_path: Path) -> None:
    spec = SPEC | {"classes": 11, "channels": channels}
    loaded = []
    for form, kind in (("folder", Folder), ("arrays", Arrays)):
        recipe = generation(denoiser={"kind": "mixture", "spec": spec}, form=form, per_class=2, steps=5, name=form)
        assert list(run(recipe, tmp_path)) == [(22, 22)]
        entry = yaml.safe_load((tmp_path / f"{form}.yaml").read_text())
        dataset = kind.model_validate(entry, context={"folder": tmp_path})
        images, labels = dataset.opened().read(range(22))
        assert labels.tolist() == [row // 2 for row in range(22)]  # 10 is after 9
        assert images.shape == (22, channels, 4, 4)
        for label in (0, 2, 10):
            exact = drawn(recipe, label, 2)
            assert float((images[2 * label : 2 * label + 2] - exact).abs().max()) <= 0.5 / 255 + 1e-6
        loaded.append(images)
        card = yaml.safe_load((tmp_path / f"{form}.card.yaml").read_text())
        sampler = {"kind": "ddim", "steps": 5, "eta": 0.0, "start": 999, "mixing": 1.0}
        assert (card["recipe"], card["sampler"]) == (recipe.digest, sampler)
        assert card["denoiser"]["fingerprint"] == recipe.denoiser.fingerprint
    assert torch.equal(loaded[0], loaded[1])
    assert (tmp_path / "folder/03/1.png").is_file()
    with np.load(tmp_path / "arrays.npz") as arrays:  # numpy itself agrees
        assert arrays["images"].shape == ((22, 4, 4) if channels == 1 else (22, 4, 4, 3))
        assert arrays["images"].dtype == np.uint8
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize("form", ["folder", "arrays"])
def test_a_stopped_run_continues(form: str, tmp_path: Path) -> None:
    recipe = generation(form=form, batch=7)
    whole = list(run(recipe, tmp_path / "whole"))
    assert whole == [(7, 21), (14, 21), (21, 21)]
    parts = tmp_path / "parts"
    for done, _ in run(recipe, parts):
        if done == 14:  # the first class is written, the second is not yet
            break
    (work,) = parts.iterdir()
    assert work.name.startswith(".drawn.") and not (parts / recipe.output).exists()
    (finished,) = work.iterdir()
    before = finished.stat().st_ino
    stray = work / f".{finished.name}.part"  # a class that was cut off while it was written
    if form == "folder":
        stray.mkdir()
        (stray / "0.png").write_bytes(b"cut off")
    progress = run(recipe, parts)
    assert next(progress) == (14, 21)
    assert finished.stat().st_ino == before  # not drawn again
    assert list(progress) == [(21, 21)]
    assert contents(parts) == contents(tmp_path / "whole")
    assert list(run(recipe, parts)) == [(21, 21)]  # all is there


def test_another_output_of_that_name_is_left_alone(tmp_path: Path) -> None:
    list(run(generation(), tmp_path))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="not of this recipe; delete it or choose another name"):
        list(run(generation(seed=1), tmp_path))
    assert contents(tmp_path) == before
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="not of this recipe"):
        list(run(generation(name="other"), tmp_path))


def test_seeds_are_other_images_and_batches_are_outside() -> None:
    assert not torch.allclose(drawn(generation(), 0, 2), drawn(generation(seed=1), 0, 2))
    assert generation(batch=3).digest == generation().digest != generation(steps=21).digest
    hash(generation())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 1001}, "steps is 1001; there are 1000 times to step through"),
        ({"start": 1000}, "start is 1000; the denoiser's last time is 999"),
        ({"start": 30, "steps": 32}, "steps is 32; there are 31 times to step through"),
        ({"channels": 3}, "channels is 3, the denoiser is for 1"),
        ({"denoiser": {"kind": "mixture", "spec": {"channels": 2}}}, "1 or 3 channels, not 2; write form: arrays"),
        ({"name": "../elsewhere"}, "name"),
        ({"name": ".hidden"}, "name"),
        ({"per_class": 0}, "per_class"),
        ({"kind": "denoiser"}, "kind"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generation(**change)


def test_a_denoiser_must_know_classes_and_sizes(tmp_path: Path) -> None:
    denoiser = unet(tmp_path)
    config = (tmp_path / "unet/config.json").read_text()
    (tmp_path / "unet/config.json").write_text(config.replace('"sample_size": 8', '"sample_size": null'))
    with pytest.raises(ValueError, match="the denoiser takes any size; give size"):
        generation(denoiser=denoiser)
    assert generation(denoiser=denoiser, size=16).shape == (1, 16, 16)
    (tmp_path / "unet/config.json").write_text(config.replace('"num_class_embeds": 3', '"num_class_embeds": null'))
    with pytest.raises(ValueError, match="knows no classes"):
        generation(denoiser=denoiser)
