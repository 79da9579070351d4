"""The suites of OpenOOD's benchmarks, validated on made-up trees of its image lists and folders."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from robustbench_diffaug.data.lists import ImageList
from robustbench_diffaug.document import read
from robustbench_diffaug.evaluators.ood import Ood
from robustbench_diffaug.files import built_in, locate
from robustbench_diffaug.suite import check, load

NAMES = ("mnist", "cifar10", "cifar100", "imagenet")

# By role the datasets of DATA_INFO in openood/evaluation_api/datasets.py, and of configs/datasets/mnist/*.yml, of
# Jingkang50/OpenOOD 3c35632; ImageNet-ES, added after v1.5, and csid of the small ones are left out.
CLASSIC = ["mnist", "svhn", "texture", "places365"]
LISTED = {
    "mnist": {
        "ood-val": ["val_notmnist"],
        "near": ["notmnist", "fashionmnist"],
        "far": ["texture", "cifar10", "tin", "places365"],
    },
    "cifar10": {"ood-val": ["val_tin"], "near": ["cifar100", "tin"], "far": CLASSIC},
    "cifar100": {"ood-val": ["val_tin"], "near": ["cifar10", "tin"], "far": CLASSIC},
    "imagenet": {
        "ood-val": ["val_openimage_o"],
        "near": ["ssb_hard", "ninco"],
        "far": ["inaturalist", "textures", "openimage_o"],
        "csid": ["imagenet_v2", "imagenet_c", "imagenet_r"],
    },
}
SIDES = {"mnist": 28, "cifar10": 32, "cifar100": 32, "imagenet": 224}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: in every list three images of different sizes, and a file of weights of every name."""
    root = tmp_path_factory.mktemp("data")
    for index, (width, height) in enumerate([(300, 280), (260, 330), (224, 224)]):
        Image.fromarray(np.full((height, width, 3), 90 + index, np.uint8)).save(root / f"{index}.png")
    for name in NAMES:
        suite = read(built_in()[f"openood/{name}"]).data
        for entry in suite["checkpoints"]:
            path = root / entry["weights"]["uri"]
            path.parent.mkdir(exist_ok=True)
            save_file({"weight": torch.zeros(1)}, path)
        for entry in suite["benches"][0]["datasets"]:
            label = "-1" if entry["group"] in ("ood-val", "near", "far") else "3"
            same = entry["name"] == "imagenet_c"  # as published, at 224 px
            lines = [f"{entry['name']}/{index}.png {label}\n" for index in ([2, 2, 2] if same else range(3))]
            for line, index in zip(lines, [2] if same else range(3), strict=not same):
                path = root / entry["root"] / line.split()[0]
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    os.link(root / f"{index}.png", path)
            listing = root / entry["list"]
            listing.parent.mkdir(parents=True, exist_ok=True)
            listing.write_text("".join(dict.fromkeys(lines)))
    return root


@pytest.mark.parametrize("name", NAMES)
def test_a_suite_is_sound_and_openoods(data: Path, name: str) -> None:
    loaded = load(f"openood/{name}", data_dir=data)
    assert check(loaded) == ()
    (bench,) = loaded.suite.benches
    parts = [part for part in bench.parts() if isinstance(part, ImageList)]
    roles: dict[str, list[str]] = {}
    for part in parts:
        stem = Path(part.list).stem
        roles.setdefault(part.group, []).append(stem.removeprefix("test_"))
        large = name == "imagenet" and part.name != "textures"
        assert Path(part.root).name == ("images_largescale" if large else "images_classic")
        assert Path(part.list).parent == data / "benchmark_imglist" / name
        images, labels = part.opened().read(list(range(part.available())))
        assert images.shape[1:] == (3, SIDES[name], SIDES[name])
        assert set(labels.tolist()) == {-1 if part.group in ("ood-val", "near", "far") else 3}
    shifted = [f"imagenet_{mark}" for mark in ("v2", "c", "r")] if name == "imagenet" else []
    expected = {"fit": [f"train_{name}"], "val": [f"val_{name}"], "id": [name], **LISTED[name]}
    assert roles == expected
    assert roles.get("csid", []) == shifted
    assert {part.every for part in parts if part.group != "fit"} == {1}
    evaluator = bench.evaluator
    assert isinstance(evaluator, Ood)
    assert set(evaluator.average) == {"ash", "msp", "react", "scale"}


def test_preprocessing_is_openoods() -> None:
    """`default_preprocessing_dict` of openood/evaluation_api/preprocessor.py, and of others a half."""
    expected = {
        "cifar10": [[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]],
        "cifar100": [[0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]],
        "imagenet": [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]],
        "mnist": [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]],
    }
    for name, (mean, std) in expected.items():
        suite = read(built_in()[f"openood/{name}"]).data
        for entry in suite["checkpoints"]:
            assert entry["preprocess"] == {"mean": mean, "std": std}
        for entry in suite["benches"][0]["datasets"]:
            sides = (256, 224) if name == "imagenet" else (SIDES[name],) * 2
            assert (entry["resize"], entry["crop"]) == ((None, None) if entry["name"] == "imagenet_c" else sides)


def test_names_of_folders_are_names_of_suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, installed = locate("openood/cifar10")
    assert installed
    assert path.parts[-2:] == ("openood", "cifar10.yaml")
    assert locate(os.path.relpath(path))[1]
    with pytest.raises(ValueError, match="no suite called 'openood/cifar'; did you mean openood/cifar10"):
        locate("openood/cifar")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"openood/cifar10.yaml:\d+: .*there is no .*weights/resnet18.safetensors"):
        check(load("openood/cifar10", data_dir=tmp_path))
