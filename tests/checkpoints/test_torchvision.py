"""Kind torchvision against the library itself."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import robustbench_diffaug.torchvision_guard  # noqa: F401  (before torchvision)
from robustbench_diffaug import rng, testing
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints import torchvision_model
from robustbench_diffaug.checkpoints.torchvision_model import Torchvision, stated
from robustbench_diffaug.notes import noting


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SqueezeNet is torchvision's smallest network that any small image passes through."""
    from torchvision import models

    path = tmp_path_factory.mktemp("torchvision") / "w.safetensors"
    with rng.seeded(rng.key("torchvision")):
        save_file(models.squeezenet1_1(num_classes=4).state_dict(), path)
    return path


def test_logits_are_those_of_the_library(file: Path) -> None:
    from safetensors.torch import load_file
    from torchvision import models

    entry = Torchvision(id="s", arch="squeezenet1_1", classes=4, weights=str(file), microbatch=5)
    network = models.get_model("squeezenet1_1", num_classes=4)
    network.load_state_dict(load_file(file))
    images = torch.from_numpy(rng.uniform(rng.key("images"), range(5), (3, 32, 32))).float()
    expected = network.eval()(images.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(entry.loaded(Limits()).logits(images), expected, atol=1e-6)
    assert entry.takes() == 3


def test_conforms(file: Path) -> None:
    entry = Torchvision(id="s", arch="squeezenet1_1", classes=4, weights=str(file), microbatch=5)
    testing.check_checkpoint(entry, (3, 32, 32))


@pytest.mark.parametrize("arch", ["resnet50", "efficientnet_b0", "vit_b_16"])
def test_preprocess_is_what_the_library_states(arch: str, file: Path) -> None:
    from torchvision import models

    entry = Torchvision.model_validate(
        {"id": "s", "arch": arch, "classes": 4, "weights": str(file), "preprocess": "torchvision"}
    )
    found = models.get_model_weights(arch).DEFAULT.transforms()
    assert (entry.preprocess.size, entry.preprocess.crop) == (found.resize_size[0], found.crop_size[0])
    assert entry.preprocess.interpolation == found.interpolation.value
    assert entry.preprocess.mean == (0.485, 0.456, 0.406) and entry.preprocess.std == (0.229, 0.224, 0.225)


def test_preprocess_shows_the_network_the_library_s_pixels(file: Path) -> None:
    """The library's transform of a picture of 8 bits is that of the value, to the rounding of 8 bits."""
    from PIL import Image
    from torchvision import models
    from torchvision.transforms.functional import pil_to_tensor

    pixels = (rng.uniform(rng.key("pixels"), range(1), (300, 300, 3))[0] * 256).astype("uint8")
    image = Image.fromarray(pixels)
    expected = models.get_model_weights("resnet50").DEFAULT.transforms()(image)
    entry = Torchvision.model_validate(
        {"id": "s", "arch": "resnet50", "classes": 4, "weights": str(file), "preprocess": stated("resnet50")}
    )
    found = entry.preprocess(pil_to_tensor(image)[None].float() / 255)[0]
    assert found.shape == expected.shape == (3, 224, 224)
    assert float((found - expected).abs().max()) <= 1 / 255 / 0.224 + 1e-6


def test_the_old_names_of_densenet_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published files say `norm.1` where the networks say `norm1`; here in the smallest of such networks."""
    from torchvision import models

    monkeypatch.setattr(torchvision_model, "_built", lambda *_: models.DenseNet(2, (1, 2), 4, num_classes=4))
    with rng.seeded(rng.key("densenet")):
        network = models.DenseNet(2, (1, 2), 4, num_classes=4).eval()
    old = {
        re.sub(r"(norm|conv)([12])\.(?=[a-z_]+$)", r"\1.\2.", name) if "denselayer" in name else name: value
        for name, value in network.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "old.pth")
    entry = Torchvision(id="d", arch="densenet121", classes=4, weights=str(tmp_path / "old.pth"))
    with noting() as notes:
        found = entry.load().eval()
    images = torch.from_numpy(rng.uniform(rng.key("images"), range(2), (3, 32, 32))).float()
    assert torch.equal(found(images), network(images))
    assert any("old names of DenseNet's layers" in text for text in notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "vit_b_16"}, r"write preprocess: \{size: 224\}, or build it for others by args: \{image_size: 32\}"),
        ({"arch": "maxvit_t"}, r"write preprocess: \{size: 224\}, or build it for others by args: \{input_size: 32\}"),
        ({"arch": "vit_b_16", "args": {"image_size": 32}}, ""),
        ({"arch": "maxvit_t", "args": {"input_size": [32, 32]}}, ""),
        ({"arch": "vit_b_16", "preprocess": {"size": 224}}, ""),
        ({"arch": "squeezenet1_1"}, ""),
    ],
)
def test_architectures_of_one_size_say_so(fields: dict[str, object], message: str, file: Path) -> None:
    entry = Torchvision.model_validate({"id": "s", "classes": 4, "weights": str(file)} | fields)
    if not message:
        entry.fits(32, 32)
        return
    with pytest.raises(ValueError, match=message):
        entry.fits(32, 32)


def test_four_lines_are_enough(file: Path, rdiff: Callable[..., tuple[int, str, str]]) -> None:
    shutil.copy(file, "w.safetensors")
    lines = ("kind: torchvision", "id: s", "arch: squeezenet1_1", "classes: 4", "weights: w.safetensors")
    Path("s.yaml").write_text("\n".join(lines))
    code, out, err = rdiff("check", "s.yaml")
    assert (code, err) == (0, "") and "torchvision squeezenet1_1" in out
    Path("s.yaml").write_text("\n".join(lines).replace("squeezenet1_1", "squeezenet1"))
    code, _, err = rdiff("check", "s.yaml")
    assert code == 2 and "torchvision has no classifier 'squeezenet1'; did you mean squeezenet1_" in err


def test_wrong_entries_are_refused(file: Path) -> None:
    with pytest.raises(ValueError, match="no classifier 'resnet51'; did you mean resnet5"):
        Torchvision(id="s", arch="resnet51", classes=4, weights=str(file)).check()
    with pytest.raises(ValueError, match=r"cannot build squeezenet1_1 with .'depth': 3."):
        Torchvision(id="s", arch="squeezenet1_1", args={"depth": 3}, classes=4, weights=str(file)).load()
    with pytest.raises(ValueError, match="does not fit the network"):
        Torchvision(id="s", arch="squeezenet1_1", classes=5, weights=str(file)).load()
