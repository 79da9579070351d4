"""The networks that are shipped: their cards are true, and their records do not depend on how they are run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.timm_model import Timm
from robustbench_diffaug.data.embedded import Digits, Mnist5k
from robustbench_diffaug.files import built_in, sha256
from robustbench_diffaug.suite import check, load
from robustbench_diffaug.train import output
from robustbench_diffaug.train.generate import Generation
from robustbench_diffaug.train.recipe import ClassifierRecipe, DenoiserRecipe

ZOO = Path(__file__).parent.parent / "robustbench_diffaug" / "zoo"
CARDS = sorted(ZOO.glob("*.card.yaml"))
LEAST = {"resnet": 0.97, "vit": 0.94}
LARGE = ("imagenet", "cifar", "openood/")  # of data that the package cannot hold


def test_the_data_are_what_they_should_be() -> None:
    train, test = Mnist5k(split="train"), Mnist5k(split="test")
    assert (train.available(), test.available(), Digits().available()) == (4000, 1000, 1797)
    assert not set(train.opened().ids) & set(test.opened().ids)
    for dataset, each in ((train, 400), (test, 100)):
        images, labels = dataset.opened().read(dataset.rows())
        assert images.shape[1:] == (1, 32, 32)
        assert torch.bincount(labels).tolist() == [each] * 10
        assert float(images.min()) == 0
        assert float(images.max()) == 1
        assert not images[:, :, :2].any()


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.name.removesuffix(".card.yaml"))
def test_cards_are_true(path: Path) -> None:
    card = yaml.safe_load(path.read_text())
    recipe = output.load(built_in("recipes")[card["name"]])
    assert card["recipe"] == recipe.digest
    if isinstance(recipe, Generation):
        assert card["sha256"] == sha256(ZOO / recipe.output)
        return
    assert card["data"]["digest"] == recipe.dataset.contents()
    if isinstance(recipe, DenoiserRecipe):
        assert card["sha256"] == sha256(ZOO / card["name"] / "unet/diffusion_pytorch_model.safetensors")
        assert card["parameters"] <= 800_000
        return
    entry = yaml.safe_load((ZOO / f"{card['name']}.yaml").read_text())
    assert card["sha256"] == entry["weights"]["sha256"] == sha256(ZOO / entry["weights"]["uri"])
    if not isinstance(recipe, ClassifierRecipe):
        return
    checkpoint = Timm.model_validate(entry, context={"folder": ZOO})
    assert recipe.test is not None
    images, labels = recipe.test.opened().read(recipe.test.rows())
    accuracy = float((checkpoint.loaded(Limits()).logits(images).argmax(1) == labels).float().mean())
    assert card["accuracy"]["value"] == pytest.approx(accuracy, abs=1.1 / len(labels))  # one image
    assert accuracy >= LEAST[card["name"].partition("-")[0]]


def test_each_recipe_s_result_is_shipped() -> None:
    assert {path.name.removesuffix(".card.yaml") for path in CARDS} == {
        name for name in built_in("recipes") if "/" not in name
    }


def test_twins_are_equally_good_on_clean_images() -> None:
    accuracy = {
        path.name.removesuffix(".card.yaml"): yaml.safe_load(path.read_text()).get("accuracy") for path in CARDS
    }
    for net in LEAST:
        plain, diffaug = accuracy[f"{net}-standard"], accuracy[f"{net}-standard+diffaug"]
        assert abs(plain["value"] - diffaug["value"]) <= 0.015


@pytest.mark.parametrize("name", sorted(name for name in built_in() if not name.startswith(LARGE)))
def test_bundled_suites_are_sound(name: str) -> None:
    check(load(name))


def test_wheel_stays_small() -> None:
    assert sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file()) < 25e6


def test_records_do_not_depend_on_batch_size_or_workers(tmp_path: Path) -> None:
    """On the bundled networks: byte-identical records and metrics."""
    # A batch of 1 pads each image to a whole call of every network, so: few images, few views.
    small = ["--set", "benches.certify.evaluator.n=20", "--set", "benches.certify.evaluator.n0=8", "--limit", "5"]
    few = ["--set", "benches.shift.datasets.1.corruptions=[fog]", "--set", "benches.shift.evaluator.times=[0, 200]"]
    found = {}
    for name, flags in {
        "one": ["--batch-size", "1"],
        "three": ["--batch-size", "3"],
        "workers": ["--workers", "2"],
    }.items():
        root = tmp_path / name
        command = [sys.executable, "-m", "robustbench_diffaug", "run", "quickstart", "-q", "-o", str(root)]
        done = subprocess.run([*command, *small, *few, *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        paths = [*root.rglob("*.parquet"), root / "metrics.csv", root / "leaderboard.csv"]
        found[name] = {path.relative_to(root): path.read_bytes() for path in paths}
    assert len(found["one"]) >= 16 + 3
    assert found["three"] == found["one"]
    assert found["workers"] == found["one"]
