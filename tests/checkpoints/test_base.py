"""Channels, sizes, and what timm's weights say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.base import Checkpoint, Preprocess
from robustbench_diffaug.checkpoints.conditioning import packed
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.checkpoints.timm_model import Timm, build
from robustbench_diffaug.suite import load

ARCH = "test_efficientnet"
GREY = torch.from_numpy(rng.uniform(rng.key("grey"), range(3), (1, 6, 6))).float()


class Planes(nn.Module):
    """A weight of its own for each pixel of each of three channels; two classes."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        weights = rng.normal(rng.key("planes"), range(2), (channels * 36,))
        self.weights = nn.Parameter(torch.from_numpy(weights), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weights.T


def model(**more: Any) -> Model:
    preprocess = more.pop("preprocess", Preprocess())
    return Model("net", more.pop("network", Planes()), preprocess, 2, 4, **more)


def test_grey_images_are_shown_three_times_over_before_the_normalisation() -> None:
    normal = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    three = model(preprocess=normal, channels=3)
    coloured = GREY.expand(-1, 3, -1, -1)
    assert torch.equal(three.logits(GREY), three.logits(coloured))
    assert torch.allclose(three.logits(GREY), Planes()(normal(coloured)), atol=1e-5)
    images = GREY.clone().requires_grad_()
    (found,) = torch.autograd.grad(three.logits(images)[:, 1].sum(), images)
    each = Planes().weights[1].reshape(3, 6, 6) / torch.tensor(normal.std)[:, None, None]
    assert torch.allclose(found, each.sum(dim=0).expand(3, 1, 6, 6), atol=1e-5)


def test_the_noise_level_is_another_plane() -> None:
    sigma = torch.tensor([0.1, 0.5, 1.0])
    knowing = model(network=Planes(7), channels=3, wants=("sigma", "denoised"))
    twin = GREY.flip(2)
    expected = Planes(7)(packed(GREY.expand(-1, 3, -1, -1), sigma, twin.expand(-1, 3, -1, -1)))
    assert torch.allclose(knowing.logits(GREY, sigma, twin), expected, atol=1e-5)


def test_colours_are_never_made_grey() -> None:
    with pytest.raises(RuntimeError):
        model(network=Planes(1), channels=1).logits(GREY.expand(-1, 3, -1, -1))
    assert torch.equal(model(network=Planes(1), channels=1).logits(GREY), model(network=Planes(1)).logits(GREY))


def entry(folder: Path, inputs: int = 1, outputs: int = 10, arch: str = ARCH, **fields: Any) -> Timm:
    """A checkpoint of random weights; its classes and channels are left out unless they are given."""
    with rng.seeded(0):
        torch.save(build(arch, (), inputs, outputs).state_dict(), folder / "w.pth")
    return Timm.model_validate({"id": "x", "arch": arch, "weights": "w.pth"} | fields, context={"folder": folder})


@pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 7)])
def test_what_the_weights_say_is_written_out(tmp_path: Path, channels: int, classes: int) -> None:
    read = entry(tmp_path, channels, classes)
    assert (read.channels, read.classes) == (channels, classes)
    written = entry(tmp_path, channels, classes, channels=channels, classes=classes)
    assert read == written
    assert read.fingerprint == written.fingerprint
    dumped = read.model_dump(mode="json")
    assert (dumped["channels"], dumped["classes"]) == (channels, classes)
    assert read.loaded(Limits()).logits(torch.zeros(1, 1, 32, 32)).shape == (1, classes)


def test_planes_beside_the_image_do_not_count(tmp_path: Path) -> None:
    assert entry(tmp_path, 3, wants=["sigma", "denoised"]).channels == 1
    assert entry(tmp_path, 4, wants=["sigma"]).channels == 3
    assert entry(tmp_path, 3, wants=["sigma", "denoised"], channels=5).channels == 5


def test_a_file_that_says_nothing() -> None:
    fields = {"id": "x", "arch": ARCH, "weights": "/there-is-none.pth"}
    assert Timm.model_validate(fields | {"classes": 4}).channels == 3  # the file is found missing where it is read
    with pytest.raises(ValueError, match=r"there is no /there-is-none\.pth"):
        Timm.model_validate(fields)


def test_another_network_s_weights_say_no_classes(tmp_path: Path) -> None:
    entry(tmp_path)
    with pytest.raises(
        ValueError, match=r"the classes of resnet18 cannot be read: .*w\.pth has no fc\.weight among 88 names"
    ):
        Timm.model_validate({"id": "x", "arch": "resnet18", "weights": "w.pth"}, context={"folder": tmp_path})


def test_several_networks_in_a_file_are_named(tmp_path: Path) -> None:
    with rng.seeded(0):
        state = build(ARCH, (), 1, 7).state_dict()
    every = {f"{prefix}{name}": value for prefix in ("net.", "ema.") for name, value in state.items()}
    torch.save({"state_dict": every | {"loss.weight": torch.ones(3)}}, tmp_path / "w.pth")
    fields = {"id": "x", "arch": ARCH, "weights": "w.pth"}
    with pytest.raises(ValueError, match=r"holds more than one network; say which by entry: ema\. \(or net\.\)"):
        Timm.model_validate(fields, context={"folder": tmp_path})
    weights = {"uri": "w.pth", "entry": "net."}
    assert Timm.model_validate(fields | {"weights": weights}, context={"folder": tmp_path}).classes == 7


def test_means_are_as_many_as_channels(tmp_path: Path) -> None:
    three = {"mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(
        ValueError, match="preprocess has mean and std of 3 channels, and the network takes 1; write as"
    ):
        entry(tmp_path, preprocess=three)
    assert entry(tmp_path, 3, preprocess=three).takes() == 3


LAYOUTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "the DiffAug authors' ResNet-50": ("resnet50", {"channels": [4, 4, 8, 8]}, "module.", "state_dict"),
    "DeiT": ("deit_tiny_patch16_224", {"embed_dim": 6, "depth": 1, "num_heads": 2}, "", "model"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layouts_of_published_files(name: str, tmp_path: Path) -> None:
    """Small networks by the names and in the layout of the published files."""
    arch, args, prefix, key = LAYOUTS[name]
    with rng.seeded(0):
        network = build(arch, tuple(args.items()), 3, 10).eval()
    content = {key: {f"{prefix}{name}": value for name, value in network.state_dict().items()}}
    torch.save(content | ({"epoch": 90, "arch": arch} if prefix else {}), tmp_path / "w.pth")
    found = Timm.model_validate(
        {"id": "x", "arch": arch, "args": args, "weights": "w.pth", "preprocess": "timm", "microbatch": 2},
        context={"folder": tmp_path},
    )
    assert (found.classes, found.channels) == (10, 3)
    images = torch.from_numpy(rng.uniform(rng.key("images"), range(2), (3, 224, 224))).float()
    expected = network(found.preprocess(images))
    assert torch.allclose(found.loaded(Limits(), keep=False).logits(images), expected, atol=1e-4)


def test_transformers_take_one_size(tmp_path: Path) -> None:
    vit = entry(tmp_path, arch="test_vit")
    vit.fits(160, 160)
    told = (
        r"test_vit takes images of 160x160 alone, and is given 32x32; write preprocess: \{size: 160\}, or args: \{img"
    )
    with pytest.raises(ValueError, match=told):
        vit.fits(32, 32)
    with pytest.raises(ValueError, match="is given 28x28"):
        entry(tmp_path, arch="test_vit", preprocess={"size": 160, "crop": 28}).fits(160, 160)
    entry(tmp_path, arch="test_vit", preprocess={"size": 160}).fits(32, 28)
    entry(tmp_path, arch="test_vit", args={"img_size": 32}).fits(32, 32)
    entry(tmp_path, arch="test_vit", args={"dynamic_img_size": True}).fits(32, 32)
    entry(tmp_path).fits(32, 28)


def test_records_of_earlier_versions_count() -> None:
    """The fingerprints are those of the version before classes and channels could be left out."""
    recorded = ["c99c61664e872586", "40efb37122110505", "290e73992b1f4c4f", "65136679a1ae7fd7"]
    entries = load("quickstart").suite.checkpoints
    assert [entry.fingerprint for entry in entries] == recorded
    expecting: Checkpoint = entries[0].model_copy(update={"expect_accuracy": 0.98})
    assert expecting.fingerprint == recorded[0]


def test_channels_are_those_of_the_means_where_nothing_else_says_them() -> None:
    class Plain(Checkpoint):
        kind: str = "plain"

        def load(self) -> nn.Module:
            return Planes()

    assert Plain(id="x", classes=2).takes() is None
    assert Plain(id="x", classes=2, preprocess=Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3)).takes() == 3
