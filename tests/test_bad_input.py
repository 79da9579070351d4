"""Every bad input gets one clear line, with where it is and what to do, and never a traceback."""

import json
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from robustbench_diffaug import cli, rng
from robustbench_diffaug.checkpoints.timm_model import build

SMOKE = (Path(__file__).parent.parent / "suites/smoke.yaml").read_text()
NET = {"kind": "timm", "arch": "resnet10t", "args": {"channels": [4, 4, 8, 8]}, "channels": 1, "classes": 4}

Command = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def rdiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process; its exit code and the lines on standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, list[str]]:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(words))
        lines = capsys.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line or "a fault of rdiff" in line for line in lines), lines
        return int(caught.value.code or 0), lines

    return call


def one_line(found: tuple[int, list[str]], *words: str) -> None:
    """Exit code 2 and one line that holds all of the words."""
    code, lines = found
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("rdiff: ")
    for word in words:
        assert word in lines[0], lines[0]
    for jargon in ("Value error", "Input should", "validation error", "pydantic", "type=", "ctx"):
        assert jargon not in lines[0], lines[0]


def line_of(text: str, part: str) -> str:
    return f"suite.yaml:{next(i for i, line in enumerate(text.splitlines(), 1) if part in line)}:"


CHANGES: dict[str, tuple[str, str, list[str]]] = {
    "unknown key": ("seed: 0", "sead: 0", ["sead", "did you mean seed?"]),
    "unknown key of an evaluator": ("n0: 16", "no: 16", ["no", "unknown key"]),
    "wrong type": ("seed: 0", "seed: many", ["seed", "'many'", "whole number"]),
    "wrong type below": ("n: 128,", "n: [1],", ["n"]),
    "duplicate key": ("seed: 0", "seed: 0\nseed: 1", ["'seed' stands twice", "line 3"]),
    "unknown kind": ("kind: smoothing", "kind: smothing", ["no evaluator is called 'smothing'", "mean smoothing?"]),
    "unknown dataset": ("{kind: mixture, name: mixture, group: clean, size: 16}", "{kind: imagenot}", ["no dataset"]),
    "no kind": ("{kind: smoothing, ", "{", ["needs a kind"]),
    "unknown corruption": ("[gaussian_noise, contrast]", "[gaussian_nose]", ["did you mean gaussian_noise?"]),
    "severity": ("severities: [5]", "severities: [6]", ["severit", "6"]),
    "constants": ("constants: imagenet-c", "constants: imagenet", ["constants", "imagenet-c"]),
    "n too small": ("n: 128,", "n: 8,", ["nothing can be certified", "at least 10"]),
    "alpha": ("alpha: 1e-3", "alpha: 0.5", ["alpha", "0.5"]),
    "sigma beyond the schedule": ("sigmas: [0.25, 0.5]", "sigmas: [900.0]", ["beyond the schedule"]),
    "time beyond the schedule": ("times: [0, 50, 100, 200]", "times: [0, 1000]", ["outside the schedule"]),
    "no denoiser": ("      denoiser: &exact {kind: mixture}\n", "", ["exact"]),
    "two of one id": ("id: tilted", "id: bayes", ["'bayes'", "name of its own"]),
    "no checkpoints": ("checkpoints:\n", "checkpoints: []\nothers:\n", ["checkpoints"]),
    "code": ("kind: mixture, id: bayes", "kind: local, arch: 'os:system', id: bayes", ["--trust"]),
    "path kind": ("kind: mixture, id: bayes", "kind: 'os:PathLike', id: bayes", ["--trust"]),
    "a tag": ("seed: 0", "seed: !!python/object/apply:os.system ['touch pwned']", ["suite.yaml:3"]),
    "not YAML": ("seed: 0", "seed: [0", ["suite.yaml"]),
    "infinity": ("tilt: 120", "tilt: .inf", ["suite.yaml:6: checkpoints.1.tilt", "finite number, not inf"]),
    "true for a number": ("seed: 0", "seed: true", ["suite.yaml:3: seed", "a number, not true"]),
    "a huge number": ("seed: 0", "seed: " + "9" * 5000, ["suite.yaml:3: seed", "too large a number"]),
    "a huge dataset": ("size: 64}", "size: 1000000000000}", ["datasets.0.size", "at most 10000"]),
    "bins": ("modes: [default, de]", "bins: 0", ["evaluator.bins", "at least 1"]),
    "steps": ("&exact {kind: mixture}", "&exact {kind: mixture, schedule: {steps: 1}}", ["schedule.steps", "25"]),
    "lone surrogate": ("seed: 0", '"\\ud800": 0', ["unknown key '\\ud800'"]),
    "colours": ("seed: 0", '"\\e[31m": 0', ["unknown key '\\x1b[31m'"]),
    "home of nobody": (
        "{kind: mixture, id: bayes, classes: 4, temperature: 0.0016}",
        "{kind: timm, id: x, classes: 4, arch: resnet10t, weights: {uri: ~no-such-user/w}}",
        ["suite.yaml:5: checkpoints.0.weights.uri", "write the whole path"],
    ),
    "digest": (
        "{kind: mixture, id: bayes, classes: 4, temperature: 0.0016}",
        "{kind: timm, id: x, classes: 4, arch: resnet10t, weights: {uri: w, sha256: abc}}",
        ["suite.yaml:5: checkpoints.0.weights.sha256", "64 hexadecimal digits", "not 'abc'"],
    ),
    "name that is a path": ("name: smoke", "name: ../smoke", ["name"]),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("command", ["validate", "run"])
def test_suites(case: str, command: str, rdiff: Command, tmp_path: Path) -> None:
    old, new, words = CHANGES[case]
    assert old in SMOKE
    text = SMOKE.replace(old, new)
    Path("suite.yaml").write_text(text)
    one_line(rdiff(command, "suite.yaml"), "suite.yaml:", *words)
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "reports").exists()


def test_lines_are_right(rdiff: Command) -> None:
    for old, new in (("n0: 16", "nn: 16"), ("tilt: 120", "tild: 120"), ("severities: [5]", "severitys: [5]")):
        text = SMOKE.replace(old, new)
        Path("suite.yaml").write_text(text)
        one_line(rdiff("validate", "suite.yaml"), line_of(text, new))


def test_files_that_are_no_suites(rdiff: Command, tmp_path: Path) -> None:
    one_line(rdiff("run", "none.yaml"), "none.yaml")
    one_line(rdiff("run", "quickstrat"), "did you mean quickstart?")
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    names = "abcdefghijklmno"
    bomb += "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in pairwise(names))
    contents = {
        "list.yaml": b"- 1\n",
        "empty.yaml": b"",
        "latin.yaml": b"name: caf\xe9\n",
        "bomb.yaml": bomb.encode(),
        "deep.yaml": b"[" * 20_000,
        "large.yaml": b"# " + b"x" * 2_000_000,
    }
    for name, content in contents.items():
        Path(name).write_bytes(content)
        one_line(rdiff("validate", name), name)
    one_line(rdiff("validate", str(tmp_path)), str(tmp_path))


def with_network(**more: Any) -> None:
    """A suite of a timm network whose weights stand in w.safetensors."""
    data = yaml.safe_load(SMOKE)
    data["checkpoints"].append({"id": "net", "weights": {"uri": "w.safetensors"}, **NET, **more})
    Path("suite.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


def good_weights(classes: int = 4) -> dict[str, torch.Tensor]:
    with rng.seeded(1):
        network = build("resnet10t", (("channels", (4, 4, 8, 8)),), 1, classes)
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["there is no"]),
        (b"", ["holds only 0 bytes"]),
        (b"<!DOCTYPE html><html>404</html>", ["HTML page"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", ["git-lfs"]),
        (pickle.dumps({"a": 1}), ["pickle", "safetensors"]),
        (b"PK\x03\x04" + b"0" * 100, ["is a zip that is damaged or cut off"]),
        ((10**12).to_bytes(8, "little") + b'{"a":1}', ["cut off"]),
        (b"\x08\0\0\0\0\0\0\0garbage!", ["no safetensors"]),
    ],
    ids=["missing", "empty", "html", "lfs", "pickle", "zip", "header", "junk"],
)
def test_weights_that_are_none(content: bytes | None, words: list[str], rdiff: Command) -> None:
    with_network()
    if content is not None:
        Path("w.safetensors").write_bytes(content)
    one_line(rdiff("validate", "suite.yaml"), "suite.yaml:", "checkpoints.2", "w.safetensors", *words)
    one_line(rdiff("run", "suite.yaml"), "suite.yaml:", *words)


def test_another_digest(rdiff: Command) -> None:
    save_file(good_weights(), "w.safetensors")
    with_network(weights={"uri": "w.safetensors", "sha256": "0" * 64})
    one_line(rdiff("run", "suite.yaml"), "checkpoints.2", "sha256", "0" * 64)


def test_truncated_weights(rdiff: Command) -> None:
    save_file(good_weights(), "w.safetensors")
    whole = Path("w.safetensors").read_bytes()
    Path("w.safetensors").write_bytes(whole[: len(whole) // 2])
    with_network()
    for command in ("validate", "plan", "run"):
        one_line(
            rdiff(command, "suite.yaml"), "suite.yaml:", "checkpoints.2.weights", "w.safetensors is damaged or cut off"
        )


def failed(found: tuple[int, list[str]], *words: str) -> None:
    """Exit code 1, each failed cell in a line, and the other checkpoints on the board."""
    code, lines = found
    assert code == 1, lines
    assert lines
    for line in lines:
        assert line.startswith(("failed: ", "warning: "))
    for word in words:
        assert any(word in line for line in lines), (word, lines)
    board = Path("reports/smoke/leaderboard.csv").read_text()
    assert "bayes" in board
    assert "tilted" in board
    assert json.loads(Path("reports/smoke/manifest.json").read_text())["failures"]


def test_weights_of_another_number_of_classes(rdiff: Command) -> None:
    save_file(good_weights(classes=7), "w.safetensors")
    with_network()
    failed(rdiff("run", "suite.yaml", "-q"), "net", "fc.weight is (7, ", "not (4, ")


def test_labels_beyond_the_classes(rdiff: Command) -> None:
    save_file(good_weights(classes=3), "w.safetensors")
    with_network(classes=3)
    one_line(rdiff("validate", "suite.yaml"), "suite.yaml:", "bayes has 4 classes and net 3", "make a bench of each")
    data = yaml.safe_load(Path("suite.yaml").read_text())
    own = [bench | {"name": f"{bench['name']}-net", "checkpoints": ["net"]} for bench in data["benches"]]
    data["benches"] = [bench | {"checkpoints": ["bayes", "tilted"]} for bench in data["benches"]] + own
    Path("suite.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    failed(rdiff("run", "suite.yaml", "-q"), "label 3", "net knows 3 classes")


def test_logits_that_are_not_numbers(rdiff: Command) -> None:
    state = good_weights()
    state["fc.bias"][:] = float("nan")
    save_file(state, "w.safetensors")
    with_network()
    failed(rdiff("run", "suite.yaml", "-q"), "NaN")


def test_unknown_architectures_and_arguments(rdiff: Command) -> None:
    save_file(good_weights(), "w.safetensors")
    with_network(arch="resnet10q")
    failed(rdiff("run", "suite.yaml", "-q"), "timm has no architecture 'resnet10q'")
    with_network(args={"chanels": [1]})
    failed(rdiff("run", "suite.yaml", "-q"), "timm cannot build resnet10t")


def test_channels_that_do_not_fit(rdiff: Command) -> None:
    save_file(good_weights(), "w.safetensors")
    with_network(channels=2)
    one_line(rdiff("run", "suite.yaml"), "have 1 channels, checkpoint net takes 2; convert the images")
    coloured = "&exact {kind: mixture, spec: {channels: 3}}"
    Path("suite.yaml").write_text(SMOKE.replace("&exact {kind: mixture}", coloured))
    one_line(rdiff("run", "suite.yaml"), "have 1 channels, the denoiser 3")


def with_dataset(**entry: Any) -> None:
    data = yaml.safe_load(SMOKE)
    data["benches"] = [{"name": "shift", "evaluator": {"kind": "shift"}, "datasets": [{"name": "mine", **entry}]}]
    Path("suite.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


def test_folders_of_images(rdiff: Command) -> None:
    with_dataset(kind="folder", root="images", mode="L")
    one_line(rdiff("run", "suite.yaml"), "benches.0", "images")
    Path("images/a").mkdir(parents=True)
    one_line(rdiff("run", "suite.yaml"), "images is empty")
    Image.new("L", (8, 8), 100).save("images/a/1.png")
    Image.new("L", (9, 8), 100).save("images/a/2.png")
    code, lines = rdiff("run", "suite.yaml", "-q")
    assert code == 1
    assert lines == sorted(set(lines))
    assert "differ in size, 8x8 and 9x8 at " in lines[0]
    assert "a/2.png; give crop" in lines[0]
    Path("images/a/2.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    code, lines = rdiff("run", "suite.yaml", "-q")
    assert code == 1
    assert "2.png is not a readable image" in lines[0]


def test_images_that_are_deeper_than_eight_bits(rdiff: Command) -> None:
    with_dataset(kind="folder", root="images", mode="L")
    Path("images/a").mkdir(parents=True)
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save("images/a/1.png")
    one_line(rdiff("run", "suite.yaml"), "benches.0.datasets.0", "1.png has more than 8 bits", "convert it")
    with_dataset(kind="folder", root="images", mode="L", folders=["a", "a"])
    one_line(rdiff("run", "suite.yaml"), "benches.0.datasets.0", "names one twice")


def test_arrays(rdiff: Command) -> None:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.zeros(4, np.int64)
    with_dataset(kind="arrays", file="a.npz")
    one_line(rdiff("run", "suite.yaml"), "a.npz")
    Path("a.npz").write_bytes(b"nothing")
    one_line(rdiff("run", "suite.yaml"), "a.npz is not a readable npz")
    np.savez("a.npz", images=images)
    one_line(rdiff("run", "suite.yaml"), "no array 'labels'")
    np.savez("a.npz", images=images, labels=np.array([None] * 4, dtype=object))
    one_line(rdiff("run", "suite.yaml"), "a.npz")
    np.savez("a.npz", images=images[:0], labels=labels[:0])
    one_line(rdiff("run", "suite.yaml"), "dataset mine is empty")
    np.savez("a.npz", images=images, labels=labels[:3])
    one_line(rdiff("run", "suite.yaml"), "shape (3,)")
    np.savez("a.npz", images=images.astype(np.float32) + 2, labels=labels)
    one_line(rdiff("run", "suite.yaml"), "outside [0, 1]")
    np.savez("a.npz", images=images, labels=labels - 2)
    one_line(rdiff("run", "suite.yaml"), "labels go from -2 to -2")
    np.savez("a.npz", images=images.astype(np.longdouble), labels=labels)
    one_line(rdiff("run", "suite.yaml"), "images are float128")
    whole = Path("a.npz").read_bytes()
    Path("a.npz").write_bytes(whole[: len(whole) // 2])
    one_line(rdiff("run", "suite.yaml"), "benches.0.datasets.0", "a.npz is not a readable npz")
    with_dataset(kind="arrays", images="a.npz", labels="a.npz")
    np.savez("a.npz", images=images, labels=labels)
    one_line(rdiff("run", "suite.yaml"), "a.npz is not an npy file; an npz goes under file")
    with_dataset(kind="arrays", images="i.npy")
    one_line(rdiff("run", "suite.yaml"), "both images and labels")


def test_output_folders(rdiff: Command) -> None:
    Path("suite.yaml").write_text(SMOKE)
    assert rdiff("run", "suite.yaml", "-q", "-L", "4", "-o", "out")[0] == 0
    one_line(rdiff("run", "suite.yaml", "-o", "out", "--seed", "1"), "out", "seed 0", "--output")
    Path("suite.yaml").write_text(SMOKE.replace("name: smoke", "name: other"))
    one_line(rdiff("run", "suite.yaml", "-o", "out"), "suite smoke", "other")
    one_line(rdiff("plan", "suite.yaml", "-o", "out"), "suite smoke", "other")
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("precious")
    one_line(rdiff("run", "suite.yaml", "-o", "mine"), "mine is no run folder", "--output")
    Path("file").write_text("")
    one_line(rdiff("run", "suite.yaml", "-o", "file"), "file")


def test_flags(rdiff: Command) -> None:
    one_line(rdiff("run", "smoke", "--set", "seed"), "--set seed", "key=value")
    one_line(rdiff("run", "smoke", "--set", "benches.cert.evaluator.n=4"), "'cert'", "did you mean certify?")
    one_line(rdiff("run", "smoke", "--set", "benchs.certify.evaluator.n=4"), "did you mean benches?")
    one_line(rdiff("run", "smoke", "--device", "gpu"), "--device gpu")
    one_line(rdiff("run", "smoke", "--device", "cuda:99"), "cuda:99")
    one_line(rdiff("run", "smoke", "--with", "none.yaml"), "none.yaml")
    one_line(rdiff("run", "smoke", "--executor", "local", "--workers", "2"), "processes")
    for words in (["run", "smoke", "--batch-size", "0"], ["run"], ["run", "smoke", "--nonsense"], ["fly"]):
        code, lines = rdiff(*words)
        assert code == 2
        assert len(lines) == 1
        assert lines[0].startswith("rdiff: ")
        assert "--help" in lines[0]


def test_recipes(rdiff: Command) -> None:
    one_line(rdiff("train", "resnet-standrd"), "did you mean resnet-standard?")
    Path("r.yaml").write_text("kind: clasifier\n")
    one_line(rdiff("train", "r.yaml"), "r.yaml:1", "'clasifier'", "classifier, denoiser")
    recipe = (Path(__file__).parent.parent / "recipes/resnet-standard.yaml").read_text()
    Path("r.yaml").write_text(recipe.replace("steps:", "stops:"))
    one_line(rdiff("train", "r.yaml"), "r.yaml:", "stops", "did you mean steps?")
    Path("r.yaml").write_text(recipe.replace("classes: 10", "classes: 9"))
    one_line(rdiff("train", "r.yaml", "-q"), "labels of mnist5k go from 0 to 9, the recipe has 9")
