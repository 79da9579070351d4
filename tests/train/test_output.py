"""What training leaves: weights that are what the card says, entries that a suite takes, logs and pictures."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from robustbench_diffaug import cli
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.timm_model import Timm
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.diffusion.unet import UNet
from robustbench_diffaug.train import output
from robustbench_diffaug.train.deepaugment import DeepAugment, deepaugment

Make = Callable[..., Any]


def trained(recipe: Any, folder: Path, **more: Any) -> list[Any]:
    return list(output.run(recipe, folder, **more))


def test_outputs_can_be_pasted_into_a_suite(classifier: Make, tmp_path: Path) -> None:
    recipe = classifier()
    trained(recipe, tmp_path)
    entry = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    checkpoint = Timm.model_validate(entry, context={"folder": tmp_path})
    checkpoint.check()
    model = checkpoint.loaded(Limits())
    images, labels = recipe.test.opened().read(range(12))
    accuracy = float((model.logits(images).argmax(1) == labels).float().mean())
    card = yaml.safe_load((tmp_path / "tiny.card.yaml").read_text())
    assert card["accuracy"]["value"] == pytest.approx(accuracy)
    assert card["recipe"] == recipe.digest
    assert card["sha256"] == checkpoint.weights.sha256
    before = (tmp_path / "tiny.safetensors").read_bytes()
    assert trained(recipe, tmp_path) == []  # all steps were done
    assert (tmp_path / "tiny.safetensors").read_bytes() == before


def test_half_precision_is_of_matrices_alone_and_what_was_measured(classifier: Make, tmp_path: Path) -> None:
    trained(classifier(), tmp_path / "full")
    trained(classifier(half=True), tmp_path / "half")
    full, half = (load_file(tmp_path / name / "tiny.safetensors") for name in ("full", "half"))
    for name, value in full.items():
        expected = value.half() if value.is_floating_point() and value.ndim > 1 else value
        assert torch.equal(half[name], expected)
    sizes = [(tmp_path / name / "tiny.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.8 * sizes[0]
    cards = [yaml.safe_load((tmp_path / name / "tiny.card.yaml").read_text()) for name in ("full", "half")]
    assert cards[0]["recipe"] == cards[1]["recipe"]  # how weights are written changes nothing of the training


@pytest.mark.parametrize("sees", ["noisy", "denoise-assisted"])
def test_guidance_classifiers_load_with_what_they_want(sees: str, guidance: Make, tmp_path: Path) -> None:
    recipe = guidance(sees=sees)
    trained(recipe, tmp_path)
    entry = yaml.safe_load((tmp_path / "tiny-guide.yaml").read_text())
    checkpoint = Timm.model_validate(entry, context={"folder": tmp_path})
    model = checkpoint.loaded(Limits())
    images, _ = recipe.test.opened().read(range(4))
    with pytest.raises(ValueError, match="wants sigma"):
        model.logits(images)
    sigma = torch.full((4,), 0.5)
    twin = MixtureDenoiser().loaded(Limits())(images, 0.5).mean
    logits = model.logits(images, sigma, twin)
    assert logits.shape == (4, 4)
    assert torch.equal(model.logits(images[:, None], sigma[:, None], twin[:, None])[:, 0], logits)
    other = model.logits(images, 2 * sigma, twin)
    assert not torch.equal(other, logits)
    card = yaml.safe_load((tmp_path / "tiny-guide.card.yaml").read_text())
    assert card["accuracy"]["at"] == "one uniformly random time of each image"
    with pytest.raises(ValueError, match="leave out preprocess"):
        Timm.model_validate(entry | {"preprocess": {"mean": [0.5], "std": [0.5]}}, context={"folder": tmp_path})
    with pytest.raises(ValueError, match="wants sigma too"):
        Timm.model_validate(entry | {"wants": ["denoised"]}, context={"folder": tmp_path})


def test_denoiser_outputs_load(denoiser: Make, tmp_path: Path) -> None:
    trained(denoiser(), tmp_path)
    entry = yaml.safe_load((tmp_path / "tiny-ddpm.yaml").read_text())
    found = UNet.model_validate(entry, context={"folder": tmp_path})
    assert found.loaded(Limits())(torch.full((2, 1, 8, 8), 0.5), 0.5).mean.shape == (2, 1, 8, 8)
    assert found.classes() is None
    assert found.contents()


def test_conditional_denoisers_load_with_and_without_labels(denoiser: Make, tmp_path: Path) -> None:
    trained(denoiser(classes=4, learned_sigma=True), tmp_path)
    entry = yaml.safe_load((tmp_path / "tiny-ddpm.yaml").read_text())
    found = UNet.model_validate(entry, context={"folder": tmp_path})
    assert found.classes() == 4
    images = torch.full((2, 1, 8, 8), 0.5)
    posterior = found.loaded(Limits())(images, 0.5)
    assert posterior.spread is not None
    nobody = found.loaded_conditional(Limits())(images, 0.5, torch.tensor([-1, -1])).mean
    assert torch.equal(nobody, posterior.mean)
    assert not torch.equal(found.loaded_conditional(Limits())(images, 0.5, torch.tensor([0, 1])).mean, nobody)


def test_autoencoders_can_be_named_by_deepaugment(autoencoder: Make, tmp_path: Path) -> None:
    trained(autoencoder(), tmp_path)
    entry = yaml.safe_load((tmp_path / "tiny-ae.yaml").read_text())
    term = DeepAugment.model_validate({"networks": [entry]}, context={"folder": tmp_path})
    images, _ = autoencoder().dataset.opened().read(range(4))
    assert deepaugment(images, term.networks[0], term, ("test",)).shape == images.shape


def test_the_log_has_a_row_for_50_steps_and_survives_a_stop(classifier: Make, tmp_path: Path) -> None:
    recipe = classifier(steps=120, save_every=30)
    for step in output.run(recipe, tmp_path):
        if step.number == 110:  # past the row of step 100, and past the state of step 90
            break
    with (tmp_path / "log.csv").open("a") as file:
        file.write("115,0.1")  # as a killed run may leave it
    trained(recipe, tmp_path)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["50", "100", "120"]
    assert list(rows[0]) == ["step", "lr", "clean", "accuracy"]
    assert float(rows[-1]["accuracy"]) > float(rows[0]["accuracy"])
    picture = Image.open(tmp_path / "log.png")
    assert picture.width > 800
    assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_tensorboard_events_hold_the_rows_of_the_log(classifier: Make, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(classifier(steps=60), tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    for name in ("clean", "accuracy"):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [50, 60]
        assert [scalar.value for scalar in scalars] == pytest.approx([float(row[name]) for row in rows], rel=1e-4)


def test_tensorboard_is_asked_for_by_name_where_it_is_missing(
    classifier: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        trained(classifier(), tmp_path, tensorboard=True)


def test_the_command_says_what_it_will_cost_and_where_things_are(
    classifier: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(classifier().model_dump(mode="json", serialize_as_any=True)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(path), "--set", "steps=4", "--set", "name=other"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert "other: 4 of 4 steps left, of 8 images; about" in said.err
    assert said.out.splitlines() == ["weights  trained/other", "entry    trained/other/other.yaml"]
    assert (tmp_path / "trained/other/other.safetensors").exists()
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(path), "--set", "stepps=4"])
    assert ended.value.code == 2
    assert "unknown key 'stepps'; did you mean steps?" in capsys.readouterr().err
