"""Kind local: functions of a file or a module, and the denoisers of kind edm that are built so."""

import sys
from pathlib import Path

import pytest
import torch

from robustbench_diffaug import builders, rng, testing
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.local import Local
from robustbench_diffaug.component import trusting
from robustbench_diffaug.diffusion.edm import Edm
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser

CODE = """
from dataclasses import dataclass
import torch

RAN.append(1) if "RAN" in globals() else None

@dataclass
class Size:
    outputs: int

def build(outputs=4):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, Size(outputs).outputs))
    with torch.no_grad():
        network[1].weight.copy_(torch.arange(64 * outputs).reshape(outputs, 64) / 256)
        network[1].bias.zero_()
    return network

def number():
    return 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(CODE)
    return path


def entry(folder: Path, arch: str = "net.py:build") -> Checkpoint:
    data = {"kind": "local", "id": "l", "arch": arch, "classes": 4}
    with trusting(True):
        return Checkpoint.model_validate(data, context={"folder": folder})


def test_a_file_beside_the_suite(file: Path) -> None:
    found = entry(file.parent)
    images = torch.from_numpy(rng.uniform(rng.key("images"), range(3), (1, 8, 8))).float()
    expected = images.flatten(1) @ (torch.arange(256).reshape(4, 64) / 256).T
    assert torch.allclose(found.loaded(Limits()).logits(images), expected, atol=1e-5)
    testing.check_checkpoint(found, (1, 8, 8))


def test_identity_is_the_code_and_not_its_place(file: Path, tmp_path: Path) -> None:
    before = entry(file.parent).fingerprint
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "other.py").write_text(CODE)
    assert entry(moved, "other.py:build").fingerprint == before
    assert entry(moved, "other.py:number").fingerprint != before
    file.write_text(CODE + "\n# another\n")
    assert entry(file.parent).fingerprint != before


def test_records_of_modules_keep_their_identity() -> None:
    found = Local(id="l", arch="package.module:function", classes=4)
    assert found.identity() == {
        "kind": "local",
        "classes": 4,
        "preprocess": found.preprocess.identity(),
        "precision": "float32",
        "wants": [],
        "microbatch": 128,
        "arch": "package.module:function",
        "args": [],
        "weights": None,
    }


def test_code_runs_only_where_it_is_trusted_and_asked_for(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "net.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n" + CODE)
    data = {"kind": "local", "id": "l", "arch": "net.py:build", "classes": 4}
    with pytest.raises(ValueError, match="runs code that this file names; if you trust it, add --trust"):
        Checkpoint.model_validate(data, context={"folder": tmp_path})
    found = entry(tmp_path)
    found.check()
    assert found.fingerprint and not mark.exists()
    found.load()
    assert mark.exists()


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("net.py", "arch is 'file.py:function' or 'package.module:function', not 'net.py'"),
        (":build", "arch is 'file.py:function'"),
        ("net.py:not a name", "arch is 'file.py:function'"),
        ("nit.py:build", "there is no .*nit.py"),
        ("net.py:missing", "AttributeError: .*has no attribute 'missing'"),
        ("net.py:number", "returns int, not a torch.nn.Module"),
        ("bad.py:build", "failed: ZeroDivisionError: division by zero"),
        ("no_such_module:build", "failed: ModuleNotFoundError"),
    ],
)
def test_wrong_functions_are_named(file: Path, arch: str, message: str) -> None:
    (file.parent / "bad.py").write_text("1 / 0")
    before = set(sys.modules)
    with pytest.raises(ValueError, match=message):
        entry(file.parent, arch).load()
    assert not [name for name in set(sys.modules) - before if name.startswith("rdiff_local_")] or "bad" not in arch


EDM = """
import torch
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser

class Preconditioned(torch.nn.Module):
    def forward(self, x, sigma):
        denoise = MixtureDenoiser(clip=False).loaded(Limits())
        return 2 * denoise((x + 1) / 2, sigma / 2).mean - 1

def build():
    return Preconditioned()
"""


def test_edm_is_the_denoiser_in_other_units(tmp_path: Path) -> None:
    """A network in [-1, 1] made of the exact denoiser in [0, 1] gives the exact denoiser back."""
    (tmp_path / "edm.py").write_text(EDM)
    made = Edm.model_validate({"arch": "edm.py:build"}, context={"folder": tmp_path})
    testing.check_denoiser(made, (1, 8, 8))
    noisy = torch.from_numpy(rng.uniform(rng.key("noisy"), range(4), (1, 8, 8))).float()
    levels = torch.tensor([0.1, 0.5, 1.0, 3.0])
    expected = MixtureDenoiser().loaded(Limits())(noisy, levels).mean
    assert torch.allclose(made.loaded(Limits())(noisy, levels).mean, expected, atol=1e-5)
    assert Edm.runs_code and str(tmp_path) not in str(made.identity())


def test_builders_without_a_folder_stay_as_they_are() -> None:
    assert builders.name("a.b:c") == "a.b:c" and builders.digest("a.b:c") == ""
    assert builders.name("/x/y.py:c") == ":c"
