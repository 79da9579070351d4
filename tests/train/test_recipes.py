"""The recipes that are shipped: each takes a step, at the embedded scale and, with small stand-ins, at ImageNet's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from robustbench_diffaug import rng
from robustbench_diffaug.diffusion import unet
from robustbench_diffaug.diffusion.base import Schedule
from robustbench_diffaug.files import built_in
from robustbench_diffaug.train import output
from robustbench_diffaug.train.generate import Generation
from robustbench_diffaug.train.image_networks import build_image_network
from robustbench_diffaug.train.loop import train
from robustbench_diffaug.train.networks import network_of
from robustbench_diffaug.train.optimiser import build_optimiser

RECIPES = Path(__file__).parent.parent.parent / "recipes"
IMAGENET = sorted((RECIPES / "imagenet").glob("*.yaml"))
NETWORKS = [name for name in sorted(built_in("recipes")) if name != "mnist5k-synthetic" and "/" not in name]


@pytest.mark.parametrize("name", NETWORKS)
def test_bundled_recipes_train(name: str, tmp_path: Path) -> None:
    """From start to end, much shortened: weights, card and entry are there."""
    recipe = output.load(built_in("recipes")[name], settings=("steps=2", "batch=8", "test=null"))
    assert recipe.name == name
    steps = list(output.run(recipe, tmp_path))
    assert [step.number for step in steps] == [1, 2]
    assert all(np.isfinite(value) for step in steps for value in step.losses.values())
    assert (tmp_path / f"{name}.card.yaml").exists()
    assert (tmp_path / f"{name}.yaml").exists()


def test_the_bundled_generation_makes_images(tmp_path: Path) -> None:
    recipe = output.load(built_in("recipes")["mnist5k-synthetic"], settings=("per_class=1", "steps=2"))
    assert isinstance(recipe, Generation)
    from robustbench_diffaug.train import generate

    *_, last = generate.run(recipe, tmp_path)
    assert last == (10, 10)
    images = np.load(tmp_path / "mnist5k-synthetic.npz")["images"]
    assert images.shape[:3] == (10, 32, 32)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small stand-ins for all that the ImageNet recipes name: JPEG of several sizes, a U-Net, EDSR and CAE."""
    root = tmp_path_factory.mktemp("imagenet")
    pixels = rng.uniform(rng.key("imagenet"), range(4), (300, 280, 3))
    for folder in ("imagenet/train", "imagenet-generated/train"):
        for index in range(4):
            place = root / folder / f"n0000000{index % 2}"
            place.mkdir(parents=True, exist_ok=True)
            side = 230 + 20 * index
            Image.fromarray((255 * pixels[index, :side]).astype(np.uint8)).save(place / f"{index}.JPEG")
    from diffusers import UNet2DModel

    options = {"in_channels": 3, "out_channels": 6, "sample_size": 256, "block_out_channels": (8, 8)}
    options |= {"layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    with rng.seeded(0):
        network = UNet2DModel(**options, **blocks)
        unet.save(root / "weights/guided-diffusion-256-unconditional", network, Schedule())
        for arch in ("edsr", "cae"):
            state = build_image_network(arch, (), 3).state_dict()
            save_file({name: value.contiguous() for name, value in state.items()}, root / f"weights/{arch}.safetensors")
    return root


def _started(recipe_path: Path, root: Path, settings: Sequence[str]) -> Path:
    """The recipe beside its files, among them what it starts from, in the form in which that is published."""
    path = root / recipe_path.name
    path.write_text(recipe_path.read_text())
    text = [line for line in path.read_text().splitlines() if line.startswith("start:")]
    if text:
        start = root / text[0].partition("uri: ")[2].strip("{}").partition(",")[0]
        path.write_text(path.read_text().replace(text[0] + "\n", ""))
        recipe = output.load(path, settings=settings)
        network = network_of(recipe)
        if start.suffix == ".safetensors":
            save_file(network.state_dict(), start)
        elif start.suffix == ".tar":
            state = {f"module.{name}": value for name, value in network.state_dict().items()}
            optimiser = build_optimiser(recipe.optimiser, network)
            sum(parameter.sum() for parameter in network.parameters()).backward()  # type: ignore[union-attr]
            optimiser.step()
            torch.save({"state_dict": state, "optimizer": optimiser.state_dict()}, start)
        else:
            torch.save(network.state_dict(), start)
        path.write_text(recipe_path.read_text())
    return path


SMALL = ("dataset.resize=72", "dataset.crop=64", "crop.size=64")


@pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)
def test_imagenet_recipes_take_a_step(path: Path, imagenet: Path, tmp_path: Path) -> None:
    """One at 224 pixels, the others at 64 to save time."""
    settings = ["batch=2", "accumulate=1", "workers=0", "steps=1", "save_every=2", "precision=float32"]
    if path.stem != "resnet50+diffaug":
        settings += SMALL
        text = path.read_text()
        settings += ["extra.dataset.resize=72", "extra.dataset.crop=64"] if "extra:" in text else []
        settings += ["deepaugment.networks.0.size=32", "deepaugment.networks.1.size=64"] if "edsr" in text else []
        settings += ["args={img_size: 64, depth: 2}"] if "vit" in path.stem else []
    recipe = output.load(_started(path, imagenet, settings), settings=settings)
    (step,) = train(recipe, tmp_path / "state.pt")
    assert all(np.isfinite(value) for value in step.losses.values())
    terms = {"clean"} | ({"diffaug"} if "+diffaug" in path.stem else set())
    terms |= {"augmix"} if "augmix" in path.stem else set()
    assert terms <= set(step.losses)


def test_there_is_a_recipe_for_each_row_of_the_paper_s_table() -> None:
    rows = {"resnet-standard", "resnet-augmix", "resnet-deepaugment", "resnet-deepaugment-augmix", "vit-standard"}
    assert rows | {f"{name}+diffaug" for name in rows} <= set(NETWORKS)
    for name in NETWORKS:
        if name.startswith(("resnet", "vit")) and not name.startswith(("resnet-noisy", "resnet-denoise")):
            recipe = output.load(built_in("recipes")[name])
            assert (recipe.diffaug is not None) == ("+diffaug" in name), name
            assert (recipe.augmix is not None) == ("augmix" in name), name
            assert (recipe.deepaugment is not None) == ("deepaugment" in name), name


def test_the_recipe_of_the_documentation_is_sound(imagenet: Path) -> None:
    text = (RECIPES.parent / "docs/training.md").read_text()
    block = text.partition("```yaml\n")[2].partition("```")[0]
    path = imagenet / "documented.yaml"
    path.write_text(block.replace("weights/my-ddpm", "weights/guided-diffusion-256-unconditional"))
    recipe = output.load(path)
    assert (recipe.name, recipe.crop.size, recipe.diffaug.high) == ("my-resnet+diffaug", 224, 1000)
