"""A network and images that others published: the CIFAR-10 ResNet-18 of pyautoattack's wheel, and foolbox's images.

Nothing of these is in this repository; both packages are installed for the tests.
"""

import shutil
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn
from torch.nn import functional

from robustbench_diffaug.batch import Limits
from robustbench_diffaug.files import Weights, sha256
from robustbench_diffaug.state import read_state
from robustbench_diffaug.suite import load

Command = Callable[..., tuple[int, str, str]]
OURS = Path(__file__).parent / "third_party"


def installed(package: str, *parts: str) -> Path:
    """A file or folder of an installed package, which is not imported."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None, f"pip install {package}, which the extra tests names"
    return Path(spec.origin).parent.joinpath(*parts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The suite with its network, and beside it what the packages carry."""
    for name in ("suite.yaml", "network.py"):
        shutil.copy(OURS / name, tmp_path / name)
    (tmp_path / "model_test.pt").symlink_to(installed("pyautoattack", "examples", "model_test.pt"))
    (tmp_path / "images").mkdir()
    lines = []
    for path in sorted(installed("foolbox", "data").glob("cifar10_*.png")):
        shutil.copy(path, tmp_path / "images" / path.name)
        lines.append(f"{path.name} {path.stem.rpartition('_')[2]}")
    assert len(lines) == 20
    (tmp_path / "cifar10.txt").write_text("\n".join(lines))
    return tmp_path


def theirs(file: Path) -> nn.Module:
    """The class of the wheel itself, with its weights read by torch."""
    spec = spec_from_file_location("their_resnet", installed("pyautoattack", "examples", "resnet.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = module.ResNet18()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval()


def pictures(folder: Path) -> Tensor:
    """Foolbox's images in [0, 1], read by Pillow."""
    every = [np.asarray(Image.open(path).convert("RGB")) for path in sorted((folder / "images").iterdir())]
    return torch.from_numpy(np.stack(every)).permute(0, 3, 1, 2).float() / 255


def test_weights_are_those_that_torch_reads(folder: Path) -> None:
    found = read_state(Weights(uri=str(folder / "model_test.pt")))
    expected = torch.load(folder / "model_test.pt", map_location="cpu", weights_only=True)
    assert found.notes == ()
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.items())


def test_logits_are_those_of_the_wheel(folder: Path) -> None:
    (entry,) = load(str(folder / "suite.yaml"), trust=True).suite.checkpoints
    images = pictures(folder)
    with torch.no_grad():
        found = entry.loaded(Limits(), keep=False).logits(images)
        expected = theirs(folder / "model_test.pt")(images)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)
    assert float(expected.abs().max()) > 1


def test_check_says_what_it_found(folder: Path, rdiff: Command) -> None:
    code, out, err = rdiff("check", "suite.yaml", "--trust")
    assert (code, err) == (0, "")
    said = [
        "model_test.pt, torch.save, 44.8 MB",
        f"{sha256(folder / 'model_test.pt')}; the entry below pins it",
        "every name and shape fits as it is",
        "11,173,962, computed in float32",
        "64 MNIST test images of 3x32x32",  # found by showing it grey ones first
        "which chance might give; if it knows digits",
        "    arch: network.py:resnet18\n    weights: {uri: model_test.pt, sha256: ",
    ]
    for words in said:
        assert words in out


def test_all_twenty_are_right(folder: Path, rdiff: Command) -> None:
    code, _, err = rdiff("run", "suite.yaml", "--trust", "-o", "run")
    assert code == 0, err
    assert "warning" not in err
    (board,) = pd.read_csv("run/leaderboard.csv").to_dict("records")
    low, _ = proportion_confint(20, 20, method="wilson")
    assert board["accuracy/clean"] == board["accuracy/clean_high"] == 1
    assert board["accuracy/clean_low"] == pytest.approx(low, abs=1e-9)
    metrics = pd.read_csv("run/metrics.csv").set_index("metric")["value"]
    noisy = load("suite.yaml", trust=True).suite.benches[0].parts()[1]
    images, labels = noisy.opened().read(range(20))
    with torch.no_grad():
        expected = theirs(folder / "model_test.pt")(images)
    assert metrics["accuracy/gaussian_noise@s5"] == int((expected.argmax(dim=1) == labels).sum()) / 20
    (records,) = Path("run/records/shift/cifar-resnet18").glob("*gaussian_noise*/*/*.parquet")
    told = torch.tensor(pd.read_parquet(records)["nll"].to_list(), dtype=torch.float64)
    assert torch.allclose(told, functional.cross_entropy(expected.double(), labels, reduction="none"), atol=1e-3)
    assert metrics["certified@0.01"] == 1  # of two images, at a noise that no eye sees
    code, _, err = rdiff("run", "suite.yaml", "--trust", "-o", "run", "-q")
    assert code == 0
    assert err == "nothing was left to do\n"


def test_it_is_refused_without_trust(folder: Path, rdiff: Command) -> None:
    code, _, err = rdiff("run", "suite.yaml")
    assert code == 2
    assert "suite.yaml:6: checkpoints.0.kind: kind local runs code that this file names; if you trust it, add" in err
