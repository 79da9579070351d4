"""`rdiff check`, and a user's own checkpoint beside the bundled ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.checked import entry_of, images_for
from robustbench_diffaug.checkpoints.timm_model import Timm, build
from robustbench_diffaug.files import sha256
from robustbench_diffaug.suite import entries

Command = Callable[..., tuple[int, str, str]]
ARCH = "test_efficientnet"
BUILDER = """
from torch import nn, zeros

def half():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Softmax(1))

def constant():
    network = nn.Sequential(nn.Flatten(), nn.Linear(1024, 4))
    nn.init.zeros_(network[1].weight)
    return network

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
"""


def weights(channels: int = 1, classes: int = 10, arch: str = ARCH) -> dict[str, Tensor]:
    with rng.seeded(0):
        state: dict[str, Tensor] = build(arch, (), channels, classes).state_dict()
    return state


def written(file: str = "mine.yaml", **fields: object) -> None:
    Path(file).write_text(yaml.safe_dump({"kind": "timm", "id": "mine", "arch": ARCH, "weights": "w.pth"} | fields))


def test_what_is_said_of_a_file(rdiff: Command) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights(3).items()}}, "w.pth")
    written(preprocess={"size": 64, "mean": [0.5], "std": [0.25]})
    code, out, err = rdiff("check", "mine.yaml")
    assert (code, err) == (0, "")
    said = [
        f"timm {ARCH}",
        "w.pth, torch.save, 0.4 MB",
        f"{sha256(Path('w.pth'))}; the entry below pins it",
        "took the entry 'state_dict' of 2",
        "took 'module.' off the names of all",
        "101,766, computed in float32",
        "3 channels (grey images are shown three times over), 64x64 after preprocess",
        "images in [0, 1] reach the network in [-2, 2]",
        "preprocess: {size: 160, interpolation: bicubic, mean: [0.485, 0.456, 0.406]",
        "(a 9)",  # the label of the first image
        "of 64 MNIST test images, which chance might give",
        "s an image, 128 at a time",
    ]
    for words in said:
        assert words in out
    assert "\x1b" not in out


def test_what_is_to_be_pasted_is_the_same_checkpoint(rdiff: Command) -> None:
    torch.save(weights(1, 7), "w.pth")
    written(microbatch=32, args={"drop_rate": 0.1})
    code, out, _ = rdiff("check", "mine.yaml")
    assert code == 0
    assert "16 images of uniform noise" in out  # there are seven classes
    (pasted,) = [part for part in out.split("  entry\n") if part.startswith("    kind")]
    Path("again.yaml").write_text(pasted.replace("\n    ", "\n").removeprefix("    "))
    (own,), (again,) = (entries(Path(name).resolve()).values() for name in ("mine.yaml", "again.yaml"))
    assert isinstance(again, Timm)
    assert again.weights.sha256 == sha256(Path("w.pth"))
    assert again.fingerprint == own.fingerprint
    assert again.model_dump(exclude={"weights"}) == own.model_dump(exclude={"weights"})
    assert set(yaml.safe_load(pasted)) == {
        *("kind", "id", "arch", "args", "weights", "classes", "channels", "microbatch")
    }
    assert entry_of(again, Path.cwd()) == Path("again.yaml").read_text()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"classes": 5}, "does not fit the network"),
        ({"weights": "no.pth"}, "mine.yaml:4: weights: there is no"),
        ({"arch": "test_efficientne"}, "did you mean test_efficientnet"),
        ({"weights": {"uri": "w.pth", "sha256": "0" * 64}}, "not 0000"),
        ({"kind": "local", "arch": "nets.py:half", "classes": 4}, "add --trust"),
    ],
)
def test_one_line_for_what_is_wrong(rdiff: Command, fields: dict[str, Any], words: str) -> None:
    torch.save(weights(), "w.pth")
    written(**fields)
    code, out, err = rdiff("check", "mine.yaml")
    assert code == 2
    assert out == ""
    assert words in err
    assert "mine.yaml:" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("function", "preprocess", "words"),
    [
        ("half", {"mean": [0.0] * 3, "std": [1.0] * 3}, "returns probabilities; return logits (leave the softmax out)"),
        ("constant", {"mean": [0.0], "std": [1.0]}, "returns the same for 16 different images"),
        ("wide", {}, "cannot take images of uniform noise of 3x32x32"),
    ],
)
def test_outputs_that_cannot_be_used(rdiff: Command, function: str, preprocess: object, words: str) -> None:
    Path("nets.py").write_text(BUILDER)
    fields = {"kind": "local", "id": "mine", "arch": f"nets.py:{function}", "classes": 4, "preprocess": preprocess}
    if function == "constant":
        fields["preprocess"] = {"crop": 32, "mean": [0.0, 0.0, 0.0], "std": [1.0] * 3}
        Path("nets.py").write_text(BUILDER.replace("1024", "3072"))
    Path("mine.yaml").write_text(yaml.safe_dump(fields))
    code, _, err = rdiff("check", "mine.yaml", "--trust")
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1


def test_denoisers_lists_and_suites(rdiff: Command) -> None:
    exact = {"kind": "denoiser", "id": "exact", "denoiser": {"kind": "mixture"}}
    Path("two.yaml").write_text(yaml.safe_dump([exact, exact | {"id": "twin"}]))
    code, out, _ = rdiff("check", "two.yaml")
    assert code == 0
    assert out.count("(root mean square) at sigma 0.5") == 2
    assert "denoiser: {kind: mixture}" in out
    save_file(
        {name: value.contiguous() for name, value in weights().items()}, "w.pth"
    )  # the name of a file says nothing
    bench = {"name": "b", "evaluator": {"kind": "shift", "modes": ["default"]}, "datasets": [{"kind": "mnist5k"}]}
    own = {"kind": "timm", "id": "mine", "arch": ARCH, "weights": "w.pth"}
    Path("suite.yaml").write_text(yaml.safe_dump({"name": "s", "checkpoints": [own], "benches": [bench]}))
    code, out, _ = rdiff("check", "suite.yaml")
    assert code == 0
    assert "w.pth, safetensors" in out


def test_images_are_those_that_the_network_takes(tmp_path: Path) -> None:
    torch.save(weights(3, arch="test_vit"), tmp_path / "w.pth")
    fields = {"id": "x", "arch": "test_vit", "weights": "w.pth"}

    def shown(**more: object) -> str:
        found = next(images_for(Timm.model_validate(fields | more, context={"folder": tmp_path})))
        return f"{found.name} {tuple(found.images.shape)}"

    assert shown() == "images of uniform noise (16, 3, 160, 160)"
    assert shown(preprocess={"size": 160}) == "MNIST test images (64, 1, 32, 32)"
    assert shown(classes=9, args={"img_size": 32}) == "images of uniform noise (16, 3, 32, 32)"
    assert shown(classes=9, preprocess={"crop": 160}) == "images of uniform noise (16, 3, 224, 224)"


QUICK = "benches=[{name: shift, evaluator: {kind: shift, modes: [default]}, datasets: [{kind: mnist5k, group: clean}]}]"


def test_any_size_and_channels_reach_the_leaderboard_of_the_quickstart(rdiff: Command, full: bool) -> None:
    torch.save(weights(1), "one.pth")
    torch.save(weights(3), "three.pth")
    own = {"kind": "timm", "arch": ARCH}
    mine: list[dict[str, Any]] = [
        own | {"id": "one-28", "weights": "one.pth", "preprocess": {"crop": 28}},
        own | {"id": "three-32", "weights": "three.pth", "preprocess": {"mean": [0.5] * 3, "std": [0.5] * 3}},
        own | {"id": "three-64", "weights": "three.pth", "preprocess": {"size": 64}},
    ]
    Path("mine.yaml").write_text(yaml.safe_dump(mine))
    words = ["--limit", "20"] if full else ["--limit", "1", "--set", QUICK]
    code, _, err = rdiff("run", "quickstart", "--with", "mine.yaml", "-o", "run", *words)
    assert code == 0
    board = pd.read_csv("run/leaderboard.csv").set_index("checkpoint")
    for entry in mine:
        assert 0 <= board["accuracy/clean"][entry["id"]] <= 1
    assert "checkpoint three-32 takes 3 channels and is shown grey images three times over" in err
    assert "warning: checkpoint one-28: " in err
    locked = yaml.safe_load(Path("run/suite.lock.yaml").read_text())["checkpoints"][4:]
    assert [(entry["channels"], entry["classes"]) for entry in locked] == [(1, 10), (3, 10), (3, 10)]


def test_a_run_does_not_begin_where_the_accuracy_cannot_be(rdiff: Command) -> None:
    torch.save(weights(1), "w.pth")
    written(expect_accuracy=0.95)
    code, _, err = rdiff("run", "quickstart", "--with", "mine.yaml", "-o", "run", "--limit", "1", "-q")
    assert code == 2
    assert "of 64 images of mnist5k right where expect_accuracy is 0.95" in err
    assert len(err.splitlines()) == 1
    assert not Path("run").exists()
    written(expect_accuracy=1.5)
    code, _, err = rdiff("validate", "quickstart", "--with", "mine.yaml")
    assert code == 2
    assert "expect_accuracy: needed is at most 1" in err


def test_what_does_not_fit_the_images(rdiff: Command) -> None:
    torch.save(weights(arch="test_vit"), "w.pth")
    written(arch="test_vit")
    code, _, err = rdiff("validate", "quickstart", "--with", "mine.yaml")
    assert code == 2
    assert "images of mnist5k do not fit checkpoint mine: test_vit takes images of 160x160 alone" in err
    written(arch="test_vit", channels=3, preprocess={"size": 160})
    code, _, err = rdiff("validate", "quickstart", "--with", "mine.yaml")
    assert code == 0  # the weights are not loaded for it
    assert "is shown grey images" in err
