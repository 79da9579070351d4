"""Kinds torchscript and export against the network that was exported."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from torch import Tensor, nn

from robustbench_diffaug import rng, testing
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.exported import Exported, TorchScript
from robustbench_diffaug.component import kinds, trusting
from robustbench_diffaug.files import Weights


def network() -> nn.Module:
    with rng.seeded(rng.key("exported")):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 4))


class Two(nn.Module):
    def forward(self, images: Tensor, more: Tensor) -> Tensor:
        return (images + more).flatten(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    example = torch.zeros(5, 1, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, by which such files are made, and of tracing in training mode
        torch.jit.save(torch.jit.trace(network().eval(), example), root / "net.pt")
        torch.jit.save(torch.jit.script(network().train()), root / "scripted.pt")
        torch.jit.save(torch.jit.trace(network().train(), example, check_trace=False), root / "training.pt")
        torch.jit.save(torch.jit.trace(dropping().train(), example, check_trace=False), root / "dropping.pt")
    rows = torch.export.Dim("rows", min=1)
    torch.export.save(torch.export.export(network().eval(), (example,)), root / "fixed.pt2")
    torch.export.save(
        torch.export.export(network().eval(), (example,), dynamic_shapes=({0: rows},)), root / "dynamic.pt2"
    )
    torch.export.save(torch.export.export(network().train(), (example,)), root / "training.pt2")
    torch.export.save(torch.export.export(dropping().train(), (example,)), root / "dropping.pt2")
    torch.export.save(torch.export.export(Two(), (example, example)), root / "two.pt2")
    torch.export.save(torch.export.export(nn.Linear(8, 4), (example[0, 0],)), root / "flat.pt2")
    return root


@pytest.fixture
def images() -> Tensor:
    return torch.from_numpy(rng.uniform(rng.key("images"), range(7), (1, 8, 8))).float()


@pytest.fixture
def entries(folder: Path) -> Iterator[list[Checkpoint]]:
    yield [
        TorchScript(id="s", classes=4, weights=str(folder / "net.pt"), microbatch=5),
        TorchScript(id="t", classes=4, weights=str(folder / "scripted.pt"), microbatch=5),
        Exported(id="e", classes=4, weights=str(folder / "fixed.pt2"), microbatch=5),
        Exported(id="d", classes=4, weights=str(folder / "dynamic.pt2"), microbatch=6),
    ]


def test_logits_are_those_of_the_network(entries: list[Checkpoint], images: Tensor) -> None:
    """TorchScript's too, and no warning of torch.jit comes through (warnings are errors here)."""
    expected = network().eval()(images)
    for entry in entries:
        assert torch.allclose(entry.loaded(Limits()).logits(images), expected, atol=1e-6), entry.kind


def test_gradients_pass(entries: list[Checkpoint], images: Tensor) -> None:
    expected, leaf = images.clone().requires_grad_(), images.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(network().eval()(expected).square().sum(), expected)
    for entry in entries:
        with torch.enable_grad():
            (found,) = torch.autograd.grad(entry.loaded(Limits()).logits(leaf).square().sum(), leaf)
        assert torch.allclose(found, wanted, atol=1e-5), entry.kind


def test_both_conform(entries: list[Checkpoint]) -> None:
    for entry in entries:
        testing.check_checkpoint(entry, (1, 8, 8))


def test_both_need_trust(folder: Path) -> None:
    for kind, name in (("torchscript", "net.pt"), ("export", "fixed.pt2")):
        data = {"kind": kind, "id": "x", "classes": 4, "weights": str(folder / name)}
        with pytest.raises(ValueError, match=f"kind {kind} runs code that this file names"):
            Checkpoint.model_validate(data)
        with trusting(True):
            assert Checkpoint.model_validate(data).kind == kind


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exported for 5 images at once; write microbatch: 5"):
        Exported(id="e", classes=4, weights=str(folder / "fixed.pt2")).load()
    with pytest.raises(ValueError, match=r"takes 2 inputs \(\(5, 1, 8, 8\), \(5, 1, 8, 8\)\), not one of images"):
        Exported(id="e", classes=64, weights=str(folder / "two.pt2"), microbatch=5).load()
    with pytest.raises(ValueError, match=r"takes 1 inputs \(\(8, 8\)\), not one of images"):
        Exported(id="e", classes=4, weights=str(folder / "flat.pt2"), microbatch=8).load()
    with pytest.raises(ValueError, match=r"is an archive, but no torch.export file"):
        Exported(id="e", classes=4, weights=str(folder / "net.pt")).check()
    with pytest.raises(ValueError, match="is an archive, but no TorchScript file"):
        TorchScript(id="e", classes=4, weights=str(folder / "fixed.pt2")).check()
    whole = (folder / "net.pt").read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 2]):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match="is no TorchScript file, or is cut off"):
            TorchScript(id="e", classes=4, weights=str(tmp_path / "bad.pt")).check()


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("training.pt", "aten::batch_norm"),
        ("dropping.pt", "aten::dropout"),
        ("training.pt2", "aten.batch_norm.default"),
        ("dropping.pt2", "aten.dropout.default"),
    ],
)
def test_what_was_exported_in_training_mode_is_refused(name: str, operation: str, folder: Path) -> None:
    """Its logits would depend on the images beside, or on chance; a scripted network obeys eval() and is fine."""
    kind = Exported if name.endswith("2") else TorchScript
    with pytest.raises(
        ValueError, match=rf"exported in training mode: its {operation} .*; call network.eval\(\) before"
    ):
        kind(id="e", classes=4, weights=str(folder / name), microbatch=5).load()


def test_grey_images_are_shown_three_times_over(tmp_path: Path, images: Tensor) -> None:
    with rng.seeded(rng.key("colour")):
        made = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval().requires_grad_(False)
    torch.export.save(torch.export.export(made, (torch.zeros(5, 3, 8, 8),)), tmp_path / "colour.pt2")
    for more in ({"channels": 3}, {"preprocess": {"mean": [0, 0, 0], "std": [1, 1, 1]}}):
        entry = Exported.model_validate(
            {"id": "c", "classes": 4, "weights": str(tmp_path / "colour.pt2"), "microbatch": 5} | more
        )
        assert entry.takes() == 3
        assert torch.allclose(entry.loaded(Limits()).logits(images), made(images.expand(-1, 3, -1, -1)), atol=1e-6)


def test_other_sizes_are_one_line(folder: Path) -> None:
    model = Exported(id="e", classes=4, weights=str(folder / "fixed.pt2"), microbatch=5).loaded(Limits())
    with pytest.raises(
        ValueError, match=r"takes images of 1x8x8 .channels, height, width., and is given 3x9x9; preproc"
    ):
        model.logits(torch.zeros(5, 3, 9, 9))


def test_the_kinds_that_other_kinds_name_are_there(folder: Path) -> None:
    """Given as weights of kind timm, each is recognised, and the answer names the kind that reads it."""
    for name, kind in (("net.pt", "torchscript"), ("fixed.pt2", "export")):
        with pytest.raises(ValueError, match=f"; give kind: {kind} for it"):
            Weights(uri=str(folder / name)).check()
        assert kind in kinds(Checkpoint)
    onnx = b"\x08\x08\x12\x07pytorch" + bytes(64)
    (folder / "net.onnx").write_bytes(onnx)
    with pytest.raises(ValueError, match="looks like an ONNX file; give kind: onnx for it"):
        Weights(uri=str(folder / "net.onnx")).check()
    assert "onnx" in kinds(Checkpoint)


def test_check_needs_trust(folder: Path, rdiff: Callable[..., tuple[int, str, str]]) -> None:
    for kind, name in (("torchscript", "net.pt"), ("export", "fixed.pt2")):
        lines = (f"kind: {kind}", "id: mine", f"weights: {folder / name}", "classes: 4", "microbatch: 5")
        Path("mine.yaml").write_text("\n".join((*lines, "channels: 1", "preprocess: {size: 8}")))
        code, _, err = rdiff("check", "mine.yaml")
        assert code == 2 and err.count("\n") == 1 and "add --trust" in err
        code, out, err = rdiff("check", "mine.yaml", "--trust")
        assert (code, err) == (0, "") and "8x8 after preprocess" in out


def test_a_broken_archive_is_one_line(folder: Path, tmp_path: Path) -> None:
    for kind, name in ((TorchScript, "net.pt"), (Exported, "fixed.pt2")):
        with ZipFile(folder / name) as old, ZipFile(tmp_path / name, "w") as new:
            for member in old.namelist():
                new.writestr(member, b"{" if member.endswith((".py", "model.json", "data.pkl")) else old.read(member))
        entry = kind(id="e", classes=4, weights=str(tmp_path / name))
        with pytest.raises(ValueError, match="cannot be loaded: ") as caught:
            entry.load()
        assert "\n" not in str(caught.value)
