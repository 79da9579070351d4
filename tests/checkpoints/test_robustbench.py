"""Kind robustbench with a package of that name whose `load_model` has the real one's signature, files and faults."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robustbench_diffaug import rng, testing
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.robustbench_model import RobustBench
from robustbench_diffaug.component import trusting

PACKAGE = """
from pathlib import Path
import torch

class Network(torch.nn.Module):
    def __init__(self, members):
        super().__init__()
        self.members = torch.nn.ModuleList(torch.nn.Linear(64, 4) for _ in range(members))

    def forward(self, images):
        return sum(member(images.flatten(1)) for member in self.members)

def load_model(model_name, model_dir="./models", dataset="cifar10", threat_model="Linf", custom_checkpoint=""):
    path = Path(model_dir) / dataset / threat_model / f"{model_name}.pt"
    if model_name == "Nothing":
        return None
    if model_name == "Ensemble":
        network = Network(3)
        for i, member in enumerate(network.members):
            file = Path(f"{path}_m{i}.pt")
            if not file.is_file():
                torch.save(torch.nn.Linear(64, 4).state_dict(), file)  # the real one fetches it
            member.load_state_dict(torch.load(file, weights_only=True))
        return network
    network = Network(1)
    network.members[0].load_state_dict(torch.load(path, weights_only=True))
    return network
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "site" / "robustbench").mkdir(parents=True)
    (tmp_path / "site" / "robustbench" / "__init__.py").touch()
    (tmp_path / "site" / "robustbench" / "utils.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    for name in ("robustbench", "robustbench.utils"):
        sys.modules.pop(name, None)


def member(seed: int) -> torch.nn.Linear:
    with rng.seeded(rng.key("member", seed)):
        return torch.nn.Linear(64, 4).requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "models" / "cifar10" / "Linf"
    place.mkdir(parents=True)
    torch.save(member(0).state_dict(), place / "One.pt")
    torch.save({}, place / "Nothing.pt")
    for i in range(3):
        torch.save(member(i).state_dict(), place / f"Ensemble.pt_m{i}.pt")
    return tmp_path / "models"


def entry(folder: Path, model: str = "One", **fields: object) -> RobustBench:
    return RobustBench.model_validate(
        {"id": "r", "model": model, "classes": 4, "folder": str(folder), "microbatch": 5} | fields
    )


@pytest.fixture
def images() -> Tensor:
    return torch.from_numpy(rng.uniform(rng.key("images"), range(5), (1, 8, 8))).float()


@pytest.mark.usefixtures("package")
def test_logits_are_those_of_the_package(folder: Path, images: Tensor) -> None:
    assert torch.allclose(entry(folder).loaded(Limits()).logits(images), member(0)(images.flatten(1)), atol=1e-6)
    together = sum(member(i)(images.flatten(1)) for i in range(3))
    assert torch.allclose(entry(folder, "Ensemble").loaded(Limits()).logits(images), together, atol=1e-6)


@pytest.mark.usefixtures("package")
def test_conforms(folder: Path) -> None:
    for other in folder.rglob("[!O]*.pt"):
        other.unlink()
    testing.check_checkpoint(entry(folder), (1, 8, 8))


def test_identity_is_the_files(folder: Path) -> None:
    """Of an ensemble all of them."""
    one, several = entry(folder).fingerprint, entry(folder, "Ensemble").fingerprint
    torch.save(member(9).state_dict(), folder / "cifar10" / "Linf" / "Ensemble.pt_m2.pt")
    assert entry(folder).fingerprint == one and entry(folder, "Ensemble").fingerprint != several


@pytest.mark.usefixtures("package")
def test_nothing_is_fetched_unnoticed(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*Two.pt; RobustBench's files lie in <folder>/<dataset>/"):
        entry(folder, "Two").load()
    with pytest.raises(ValueError, match=r"there is no .*cifar100/L2/One.pt"):
        entry(folder, dataset="cifar100", threat_model="L2").check()
    with pytest.raises(ValueError, match="is a name of RobustBench, not the path"):
        entry(folder, "../One").check()
    with pytest.raises(ValueError, match="is a network of torchvision with its own weights; use kind torchvision"):
        entry(folder, "Standard_R50", dataset="imagenet").check()
    (folder / "cifar10" / "Linf" / "Ensemble.pt_m2.pt").unlink()
    with pytest.raises(
        ValueError, match=r"robustbench fetched more files of Ensemble into .*; look at them, run again"
    ):
        entry(folder, "Ensemble").load()


@pytest.mark.usefixtures("package")
def test_what_the_package_cannot_load_is_one_line(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"gives NoneType for Nothing, not a torch.nn.Module"):
        entry(folder, "Nothing").load()
    (folder / "cifar10" / "Linf" / "One.pt").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="robustbench cannot load One: UnpicklingError: ") as caught:
        entry(folder).load()
    assert "\n" not in str(caught.value)


def test_without_the_package_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(
        ValueError, match=r"needs the package robustbench, which cannot be imported .*; install it"
    ) as caught:
        entry(folder).check()
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("package")
def test_it_needs_trust(folder: Path, rdiff: Callable[..., tuple[int, str, str]]) -> None:
    Path("mine.yaml").write_text("{kind: robustbench, id: mine, model: One, classes: 4, folder: models}")
    code, _, err = rdiff("check", "mine.yaml")
    assert code == 2 and "kind robustbench runs code that this file names; if you trust it, add --trust" in err
    with trusting(True), pytest.raises(ValueError, match="'Linf', 'L2' or 'corruptions'"):
        Checkpoint.model_validate(
            {"kind": "robustbench", "id": "r", "model": "One", "classes": 4, "folder": "f", "threat_model": "Linfinity"}
        )
