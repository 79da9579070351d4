"""The training loop: bitwise resume, honest refusals, the same gradients however a batch is cut."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from robustbench_diffaug import rng
from robustbench_diffaug.engine import settle
from robustbench_diffaug.train.loop import seconds_per_step, train
from robustbench_diffaug.train.networks import network_of

Make = Callable[..., Any]


@pytest.fixture
def all_kinds(classifier: Make, denoiser: Make, guidance: Make, autoencoder: Make) -> dict[str, Any]:
    exact = {"kind": "mixture"}
    everything = {"diffaug": {"denoiser": exact}, "augmix": {}, "mix": {"smoothing": 0.1, "mixup": 0.4, "cutmix": 1.0}}
    return {
        "classifier": classifier(),
        "everything": classifier(**everything, extra={"dataset": {"kind": "mixture", "name": "more"}, "share": 0.25}),
        "denoiser": denoiser(),
        "conditional": denoiser(classes=4, learned_sigma=True),
        "guidance": guidance(),
        "denoise-assisted": guidance(sees="denoise-assisted"),
        "autoencoder": autoencoder(),
    }


@pytest.mark.parametrize(
    "kind", ["classifier", "everything", "denoiser", "conditional", "guidance", "denoise-assisted", "autoencoder"]
)
def test_a_stopped_run_ends_in_the_same_weights(kind: str, all_kinds: dict[str, Any], tmp_path: Path) -> None:
    recipe = all_kinds[kind]
    before = rng.global_states()
    whole = [step.losses for step in train(recipe, tmp_path / "whole.pt")]
    assert rng.global_states() == before
    parts = []
    for step in train(recipe, tmp_path / "parts.pt"):
        parts.append(step.losses)
        if step.number == 3:  # one step past the last saved state
            break
    parts = parts[:2] + [step.losses for step in train(recipe, tmp_path / "parts.pt")]
    assert parts == whole
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    for name in ("average", "network"):
        for key, value in one[name].items():
            assert torch.equal(value, other[name][key]), key


def test_training_learns(classifier: Make, tmp_path: Path) -> None:
    *_, last = train(classifier(steps=60, batch=24, ema=0.0, optimiser={"lr": 1e-2}), tmp_path / "state.pt")
    assert last.right is not None
    assert last.right >= 0.75  # chance is 0.25
    assert last.losses["clean"] < 0.7


def test_parts_of_a_batch_add_up_to_the_whole(classifier: Make, tmp_path: Path) -> None:
    """Without BatchNorm, which sees the parts."""
    vit = {"arch": "vit_tiny_patch16_224", "args": {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1}}
    vit["args"] |= {"num_heads": 1}  # type: ignore[operator]
    found = []
    for accumulate in (1, 2, 4):
        recipe = classifier(**vit, accumulate=accumulate, diffaug={"denoiser": {"kind": "mixture"}})
        *_, last = train(recipe, tmp_path / f"{accumulate}.pt")
        found.append(last)
    for other in found[1:]:
        assert other.losses == pytest.approx(found[0].losses, rel=1e-4)
        for one, two in zip(found[0].kept.parameters(), other.kept.parameters(), strict=True):
            assert torch.allclose(one, two, atol=1e-4)


def test_half_precision_is_near(classifier: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle("cpu")  # deterministic kernels, as the command has them
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # what is read unset shows
    full = [step.losses["clean"] for step in train(classifier(), tmp_path / "full.pt")]
    half = [step.losses["clean"] for step in train(classifier(precision="bfloat16"), tmp_path / "half.pt")]
    assert half == pytest.approx(full, rel=0.05)
    assert half != full


@pytest.mark.filterwarnings("default::DeprecationWarning")  # torch's own, of torch.jit
def test_a_compiled_network_trains_the_same(
    classifier: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    if not full:  # the default backend compiles for minutes; this one captures the same graph
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain = [step.losses["clean"] for step in train(classifier(), tmp_path / "plain.pt")]
    compiled = [step.losses["clean"] for step in train(classifier(compile=True), tmp_path / "compiled.pt")]
    assert compiled == pytest.approx(plain, rel=1e-3)
    one, other = (torch.load(tmp_path / name, weights_only=True)["network"] for name in ("plain.pt", "compiled.pt"))
    assert list(one) == list(other)  # the names of weights are the network's own


def test_the_cost_is_measured_and_leaves_nothing(classifier: Make, tmp_path: Path) -> None:
    before = rng.global_states()
    assert 0 < seconds_per_step(classifier()) < 60
    assert rng.global_states() == before
    assert list(tmp_path.iterdir()) == []


def test_initial_weights_are_the_recipe_s(classifier: Make) -> None:
    one, same, other = (network_of(recipe).state_dict() for recipe in (classifier(), classifier(), classifier(seed=1)))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_refusals(classifier: Make, tmp_path: Path) -> None:
    def message(**more: Any) -> str:
        with pytest.raises(ValueError) as caught:
            list(train(classifier(**more), tmp_path / "none.pt"))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "none.pt").exists()
        return str(caught.value)

    assert "labels of mixture go from 0 to 3, the recipe has 3" in message(classes=3, batch=24)
    assert "dataset mixture has 1 channels, the recipe 3" in message(channels=3)
    wrong = {"denoiser": {"kind": "mixture", "spec": {"channels": 3}}}
    assert "denoiser is for 3 channels" in message(diffaug=wrong)
    assert "timm has no architecture" in message(arch="resnet10x")
    assert "did you mean adamw?" in message(optimiser={"name": "adamww"})
    assert "optimiser adamw with" in message(optimiser={"args": {"speed": 1}})
    assert "schedule cosine with" in message(optimiser={"schedule_args": {"speed": 1}})
    vit = {"arch": "vit_tiny_patch16_224", "args": {"img_size": 16, "embed_dim": 8, "num_heads": 1}}
    assert "the first step failed on 8 images of 1x8x8 (Input height (8)" in message(**vit)
    with pytest.raises(ValueError, match="the first step failed"):
        seconds_per_step(classifier(**vit))
    list(train(classifier(), tmp_path / "state.pt"))
    with pytest.raises(ValueError, match="another recipe"):
        next(iter(train(classifier(seed=1), tmp_path / "state.pt")))
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"state\.pt is damaged"):
        next(iter(train(classifier(), tmp_path / "state.pt")))
    with pytest.raises(ValueError, match="low < high"):
        classifier(diffaug={"denoiser": {"kind": "mixture"}, "high": 1001})
    with pytest.raises(ValueError, match="did you mean cosine"):
        classifier(optimiser={"schedule": "cosin"})
    with pytest.raises(ValueError, match="equal parts"):
        classifier(batch=9, accumulate=2)
    with pytest.raises(ValueError, match="even number"):
        classifier(batch=9, mix={"mixup": 1.0})


def test_a_loss_that_is_not_finite_stops_the_run(classifier: Make, tmp_path: Path) -> None:
    recipe = classifier(steps=50, optimiser={"lr": 1e30, "warmup": 0.0, "clip": None})
    with pytest.raises(ValueError, match=r"not finite at step \d+ \(clean nan\); the last good state is"):
        list(train(recipe, tmp_path / "state.pt"))


def test_a_full_disk_is_one_line_and_leaves_nothing(
    classifier: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "state.pt"))

    run = train(classifier(), tmp_path / "state.pt")
    next(run)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        next(run)
    assert list(tmp_path.iterdir()) == []


def test_killed_training_goes_on_from_its_last_state(classifier: Make, tmp_path: Path) -> None:
    """kill -9 loses at most `save_every` steps, and the weights are those of an unbroken run."""
    path = tmp_path / "tiny.yaml"
    recipe = classifier(steps=60, save_every=5)
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", serialize_as_any=True)))
    command = [sys.executable, "-m", "robustbench_diffaug", "train", str(path), "-q", "-o"]
    whole = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen([*command, str(tmp_path / "parts")], stdout=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "parts/state.pt").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "parts/.state.pt.killed.part").write_bytes(b"half")  # as a kill within the writing leaves it
    again = subprocess.run([*command, str(tmp_path / "parts")], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    names = ("tiny.safetensors", "tiny.card.yaml", "tiny.yaml")
    assert [(tmp_path / "parts" / name).read_bytes() for name in names] == [
        (tmp_path / "whole" / name).read_bytes() for name in names
    ]
    assert not list((tmp_path / "parts").glob(".*.part"))
