"""The suites of data that the package cannot hold, validated on made-up trees in the published layouts."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from robustbench_diffaug.checkpoints.timm_model import build
from robustbench_diffaug.data.corruptions import COMMON
from robustbench_diffaug.data.imagenet_classes import CATEGORIES, indices, synsets
from robustbench_diffaug.document import read
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.files import built_in
from robustbench_diffaug.suite import Loaded, check, load


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: one image in each folder of a class, links to a single file; empty weights of the right names."""
    root = tmp_path_factory.mktemp("data")
    picture = root / "picture.JPEG"
    Image.fromarray(np.full((300, 280, 3), 99, np.uint8)).save(picture, "JPEG")
    trees = {"imagenet/val": synsets(), "imagenet-s": synsets(), "imagenet-sketch": synsets()}
    trees |= {f"imagenet-c/{corruption}/5": synsets() for corruption in COMMON}
    trees |= {"imagenet-r": tuple(indices("r")), "imagenet-a": tuple(indices("a"))}
    trees |= {f"imagenet-d/{nuisance}": tuple(CATEGORIES) for nuisance in ("background", "material", "texture")}
    for tree, folders in trees.items():
        for index, folder in enumerate(folders):
            (root / tree / folder).mkdir(parents=True)
            os.link(picture, root / tree / folder / f"ILSVRC2012_val_{index + 1:08d}.JPEG")
    (root / "cifar-10").mkdir()
    record = np.zeros((10_000, 3073), np.uint8)
    for name in ("test_batch.bin", *(f"data_batch_{index}.bin" for index in range(1, 6))):
        record.tofile(root / "cifar-10" / name)
    (root / "CIFAR-10-C").mkdir()
    for corruption in COMMON:
        path = root / "CIFAR-10-C" / f"{corruption}.npy"
        np.lib.format.open_memmap(path, "w+", np.uint8, (50_000, 32, 32, 3)).flush()
    np.save(root / "CIFAR-10-C" / "labels.npy", np.zeros(50_000, np.uint8))
    (root / "weights").mkdir()
    (root / "denoisers").mkdir()
    state = build("resnet10t", (("channels", (8, 8, 8, 8)), ("stem_width", 8)), 3, 10).state_dict()
    for name in ("imagenet-c", "imagenet-rsa", "imagenet-certify", "cifar10-c"):
        for entry in read(built_in()[name]).data["checkpoints"]:
            save_file(state, root / entry["weights"]["uri"])
    for name in ("256x256_diffusion_uncond.pt", "cifar10_uncond_50M_500K.pt"):
        torch.save({}, root / "denoisers" / name)  # validate reads no more of it
    return root


def validated(name: str, data: Path) -> Loaded:
    loaded = load(name, data_dir=data)
    assert check(loaded) == ()
    return loaded


def test_table_1_of_the_paper(data: Path) -> None:
    suite = validated("imagenet-c", data).suite
    assert len(suite.checkpoints) == 10
    modes = [mode for bench in suite.benches for mode in bench.evaluator.modes]  # type: ignore[attr-defined]
    assert set(modes) == {"default", "de", "dda", "dda-se"}
    for bench, side in zip(suite.benches, (224, 256), strict=True):
        parts = bench.parts()
        assert [part.group for part in parts] == ["clean", *COMMON]
        assert {part.origin or part.name for part in parts} == {"clean"}
        assert parts[3].opened().read([0, 999])[0].shape == (2, 3, side, side)
        ids = [part.opened().ids for part in parts[:3]]
        assert ids[0] == ids[1] == ids[2]  # so that versions of an image are one cluster
    ensemble = suite.benches[0].evaluator
    assert ensemble.times == tuple(range(0, 451, 50))  # type: ignore[attr-defined]


def test_tables_2_and_7_of_the_paper(data: Path) -> None:
    suite = validated("imagenet-rsa", data).suite
    covered = {part.name: len(part.covers()) for part in suite.benches[0].parts()}
    assert covered["imagenet-r"] == covered["imagenet-a"] == 200
    assert covered["imagenet-s"] == covered["imagenet-sketch"] == 0
    assert suite.benches[0].parts()[-1].class_space == "full"  # ImageNet-D


def test_table_13_and_figure_10_of_the_paper(data: Path) -> None:
    suite = validated("imagenet-certify", data).suite
    (bench,) = suite.benches
    smoothing, (images,) = bench.evaluator, bench.parts()
    assert isinstance(smoothing, Smoothing)
    assert (smoothing.n0, smoothing.n, smoothing.alpha) == (100, 10_000, 0.001)
    assert smoothing.denoiser is not None
    assert [smoothing.denoiser.time(sigma) for sigma in smoothing.sigmas] == [145, 259, 396]  # denoised smoothing's
    assert set(np.arange(0.5, 3.1, 0.5)) <= set(smoothing.radii)
    assert images.opened().read([0])[0].shape == (1, 3, 224, 224)
    assert images.every == 50


def test_cifar_by_robustbenchs_protocol(data: Path) -> None:
    suite = validated("cifar10-c", data).suite
    parts = suite.benches[0].parts()
    assert [part.severity for part in parts] == [0, *(severity for _ in COMMON for severity in range(1, 6))]
    assert {len(part.rows()) for part in parts} == {10_000}
    noise = suite.benches[0].evaluator.denoisers()[0]
    ends = [noise.sigma(t) for t in suite.benches[0].evaluator.times[1:]]  # type: ignore[attr-defined]
    assert np.allclose((ends[0], ends[-1]), (0.0880, 1.318), rtol=3e-3)


def test_what_is_missing_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"imagenet-c.yaml:\d+: .*there is no .*weights/resnet50.safetensors"):
        check(load("imagenet-c", data_dir=tmp_path))
