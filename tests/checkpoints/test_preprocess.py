"""What classifiers expect of an image: sizes, crops, timm's own numbers, and signs that it is done twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Normalize

from robustbench_diffaug import rng
from robustbench_diffaug.checkpoints.base import Checkpoint, Preprocess, normalising
from robustbench_diffaug.checkpoints.local import Local
from robustbench_diffaug.checkpoints.timm_model import Timm, build
from robustbench_diffaug.component import trusting
from robustbench_diffaug.document import dump, parse

# torchvision's and everybody's for ImageNet
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(height: int, width: int) -> Tensor:
    return torch.from_numpy(rng.uniform(rng.key("images", height, width), range(2), (3, height, width))).float()


def timm(**fields: Any) -> Timm:
    return Timm.model_validate({"id": "x", "arch": "resnet50", "classes": 1000, "weights": {"uri": "w"}, **fields})


@settings(max_examples=60, deadline=None)
@given(height=st.integers(6, 30), width=st.integers(6, 30), crop=st.integers(1, 6), size=st.none() | st.integers(6, 20))
def test_crops_are_torchvisions(height: int, width: int, crop: int, size: int | None) -> None:
    batch = images(height, width)
    resized = Preprocess(size=size)(batch)
    found = Preprocess(size=size, crop=crop, mean=MEAN, std=STD)(batch)
    assert torch.allclose(found, Normalize(MEAN, STD)(CenterCrop(crop)(resized)), atol=1e-6)
    assert resized.shape[2:] == ((size, size) if size else (height, width))


def test_crops_larger_than_the_image_are_refused() -> None:
    with pytest.raises(ValueError, match="preprocess crops to 9, and images are 12x8; make crop smaller"):
        Preprocess(crop=9)(images(8, 12))


def test_adapted_images_of_256_pixels_reach_a_classifier_of_224() -> None:
    assert Preprocess(crop=224)(images(256, 256)).shape == (2, 3, 224, 224)
    assert torch.equal(Preprocess(crop=224)(images(224, 224)), images(224, 224))


def test_timms_own_numbers() -> None:
    found = timm(preprocess="timm").preprocess
    assert found == Preprocess(size=224, interpolation="bicubic", mean=MEAN, std=STD)
    half = (0.5, 0.5, 0.5)
    vit = timm(arch="vit_base_patch16_224", preprocess="timm").preprocess
    assert vit == Preprocess(size=224, interpolation="bicubic", mean=half, std=half)
    # the tag says whose weights, and so whose numbers
    clip = timm(arch="vit_base_patch16_clip_224.openai_ft_in1k", preprocess="timm").preprocess
    assert clip.mean == (0.48145466, 0.4578275, 0.40821073)
    assert timm(arch="vit_base_patch16_224", args={"img_size": 96}, preprocess="timm").preprocess.size == 96


def test_timms_numbers_are_written_out() -> None:
    entry = timm(preprocess="timm")
    dumped = entry.model_dump(mode="json")
    assert dumped["preprocess"]["mean"] == list(MEAN)
    data, _ = parse(dump(dumped).decode())
    again = Timm.model_validate(data)
    assert again == entry
    assert again.preprocess.identity() == Preprocess(size=224, mean=MEAN, std=STD).identity()


def test_what_timm_cannot_say_is_refused() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"arch": "resnet5o"}, "timm has no architecture 'resnet5o'; did you mean resnet50?"),
        ({"arch": "resnet50.mine"}, "timm has no weights 'resnet50.mine'; there are resnet50.a1_in1k"),
        ({"channels": 1}, "preprocess: timm is for images of 3 channels"),
        ({"preprocess": "imagenet"}, "only kind timm takes a word, which is timm"),
        ({"wants": ["sigma"]}, "leave out preprocess"),
    ]
    for fields, message in refused:
        with pytest.raises(ValueError, match=message):
            timm(**{"preprocess": "timm", **fields})
    with trusting(True), pytest.raises(ValueError, match="only kind timm takes a word"):
        Local.model_validate({"id": "x", "arch": "a:b", "classes": 2, "preprocess": "timm"})


class Normalizing(nn.Module):
    """A layer with buffers, as RobustBench has it."""

    def __init__(self, mean: str, std: str, channels: int = 3) -> None:
        super().__init__()
        self.register_buffer(mean, torch.full((1, channels, 1, 1), 0.5))
        self.register_buffer(std, torch.full((1, channels, 1, 1), 0.25))


class Plain(nn.Module):
    """A layer with tensors that are no buffers, as locuslab's smoothing has it."""

    def __init__(self) -> None:
        super().__init__()
        self.means, self.sds = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.25, 0.25, 0.25])


@pytest.mark.parametrize(
    "layer",
    [
        Normalizing("mean", "std"),
        Normalizing("mu", "sigma", 1),
        Normalizing("_mean", "_std"),
        Plain(),
        Normalize(MEAN, STD),
    ],
)
def test_layers_that_normalise_are_found(layer: nn.Module) -> None:
    convolution = nn.Conv2d(3, 2, 1)
    assert normalising(nn.Sequential(layer, convolution)) == f"0, a {type(layer).__name__}"
    assert normalising(layer) == f"the whole, a {type(layer).__name__}"
    assert normalising(nn.Sequential(convolution, nn.BatchNorm2d(3), nn.LayerNorm(3))) is None


@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_architectures_of_timm_do_not_normalise(arch: str) -> None:
    assert normalising(build(arch, (), 3, 4)) is None
    assert not Timm.may_normalise


def test_numbers_for_0_to_255_are_noticed() -> None:
    (warning,) = timm(preprocess={"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}).warnings()
    assert "mean [123.675, 116.28, 103.53] and std [58.395, 57.12, 57.375], above 1" in warning
    assert timm(preprocess={"mean": list(MEAN), "std": list(STD)}).warnings() == ()
    assert timm().warnings() == ()


SOURCE = """
import torch
from torch import nn

class NormalizeLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.means, self.sds = torch.tensor([0.5]), torch.tensor([0.5])

    def forward(self, x):
        return (x - self.means) / self.sds

def normalised():
    return nn.Sequential(NormalizeLayer(), nn.Flatten(), nn.Linear(4, 2))

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
"""


def test_normalising_twice_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "networks_that_normalise.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def entry(function: str, **fields: Any) -> Checkpoint:
        data = {"id": "x", "arch": f"networks_that_normalise:{function}", "classes": 2, **fields}
        with trusting(True):
            return Local.model_validate(data)

    both = {"mean": [0.5], "std": [0.5]}
    (warning,) = entry("normalised", preprocess=both).warnings()
    assert warning.startswith("the network normalises images itself (0, a NormalizeLayer), and preprocess has mean")
    assert entry("normalised").warnings() == ()
    assert entry("normalised", preprocess={"size": 2}).warnings() == ()
    assert entry("plain", preprocess=both).warnings() == ()
    # what cannot be loaded is the run's to say
    save_file({"0.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    weights = {"uri": str(tmp_path / "w.safetensors")}
    assert entry("plain", preprocess=both, weights=weights).warnings() == ()
