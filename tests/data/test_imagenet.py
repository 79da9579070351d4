"""ImageNet and the sets made after it, on small trees in exactly the published layouts."""

import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize, ToTensor

from robustbench_diffaug import rng
from robustbench_diffaug.component import fingerprint
from robustbench_diffaug.data.base import BadImage, Dataset
from robustbench_diffaug.data.corruptions import COMMON
from robustbench_diffaug.data.image_files import Geometry
from robustbench_diffaug.data.imagenet import PRESETS, ImageNet, ImageNetC
from robustbench_diffaug.data.imagenet_classes import CATEGORIES, indices, synsets
from robustbench_diffaug.data.sources import Folder
from robustbench_diffaug.testing import check_dataset

# indices_in_1k of hendrycks/natural-adv-examples, eval.py, commit 2f866f5, the first and last of 200
FIRST_OF_A, LAST_OF_A = (6, 11, 13, 15, 17, 22, 23, 27, 30, 37), (971, 972, 980, 981, 984, 986, 987, 988)
# imagenet_r_wnids of hendrycks/imagenet-r, eval.py, commit 44d3a1d, the first of 200
FIRST_OF_R = "n01443537 n01484850 n01494475 n01498041 n01514859 n01518878 n01531178 n01534433 n01614925 n01616318"


def jpeg(size: tuple[int, int] = (8, 8), level: int = 0) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, (level, level, level)).save(file, "JPEG", quality=95)
    return file.getvalue()


def noise(size: tuple[int, int], name: str = "") -> Image.Image:
    levels = rng.uniform(rng.key("noise", *size, name), range(1), (size[1], size[0], 3))[0] * 256
    return Image.fromarray(levels.astype(np.uint8))


def plant(root: Path, folders: Sequence[str], names: Sequence[str], content: bytes) -> Path:
    """A tree with the same image under all names in all folders."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / name).write_bytes(content)
    return root


def of(root: Path, **fields: Any) -> ImageNet:
    return ImageNet.model_validate({"name": "x", "root": str(root), **fields})


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation set, one image a class, numbered as the official names are."""
    root = tmp_path_factory.mktemp("imagenet") / "val"
    for index, wnid in enumerate(synsets()):
        (root / wnid).mkdir(parents=True)
        (root / wnid / f"ILSVRC2012_val_{index + 1:08d}.JPEG").write_bytes(jpeg(level=index // 4))
    return root


def test_classes_are_those_of_the_publications() -> None:
    assert len(synsets()) == 1000
    assert list(synsets()) == sorted(synsets())
    found = tuple(index for (index,) in indices("a").values())
    assert (len(found), found[:10], found[-8:]) == (200, FIRST_OF_A, LAST_OF_A)
    assert (len(indices("r")), list(indices("r"))[:10]) == (200, FIRST_OF_R.split())
    assert all(synsets()[index] == wnid for variant in ("r", "a") for wnid, (index,) in indices(variant).items())
    assert list(indices("v2"))[:3] == ["0", "1", "2"]


def test_categories_of_imagenet_d_are_the_classes_of_their_names() -> None:
    """Where a category bears the name of a class, it is that class: by torchvision's list of names."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES as NAMES

    known = {re.sub(r"\W", "_", name.lower()): index for index, name in enumerate(NAMES)}
    shared = [name for name in CATEGORIES if name in known]
    assert len(shared) >= 45
    assert [name for name in shared if known[name] not in CATEGORIES[name]] == []
    every = [index for group in CATEGORIES.values() for index in group]
    assert (len(CATEGORIES), len(every), len(set(every))) == (113, 125, 125)
    assert sum(len(group) > 1 for group in CATEGORIES.values()) == 9


def test_the_validation_set(val: Path) -> None:
    dataset = of(val)
    assert dataset.covers() == ()
    source = dataset.opened()
    assert list(source.ids)[:2] == ["n01440764/ILSVRC2012_val_00000001", "n01443537/ILSVRC2012_val_00000002"]
    images, labels = source.read([999, 0, 281])
    assert labels.tolist() == [999, 0, 281]
    assert synsets()[281] == "n02123045"  # the tabby cat
    assert torch.allclose(images.mean(dim=(1, 2, 3)) * 255, torch.tensor([249.0, 0.0, 70.0]), atol=1)
    assert list(source.labels or []) == list(range(1000))


def test_a_subset_must_be_declared(val: Path) -> None:
    chosen = of(val, classes=["n02123045", "n01443537"])
    assert chosen.opened().read([0, 1])[1].tolist() == [1, 281]
    assert chosen.covers() == (1, 281)
    assert chosen.declared().classes == 2
    for classes, message in (
        (["n02123046"], "did you mean n02123045"),
        (["n02123045", "n02123045"], "classes names one twice"),
    ):
        with pytest.raises(ValueError, match=message):
            of(val, classes=classes)


@pytest.mark.parametrize("variant", ["r", "a"])
def test_two_hundred_classes(tmp_path: Path, variant: str) -> None:
    known = indices("r" if variant == "r" else "a")
    names = ["art_0.jpg", "sketch_12.jpg"] if variant == "r" else ["0.000116_digital clock _ digital clock_0.86.jpg"]
    plant(tmp_path, list(known), names, jpeg())
    (tmp_path / "README.txt").write_text("as published")
    dataset = of(tmp_path, variant=variant)
    labels = [index for (index,) in known.values() for _ in names]
    assert list(dataset.opened().labels or []) == labels
    assert dataset.opened().read([0])[1].tolist() == labels[:1]
    assert dataset.covers() == tuple(sorted(set(labels)))
    assert dataset.opened().ids[0] == f"{next(iter(known))}/{names[0][:-4]}"
    assert (dataset.declared().classes, dataset.declared().class_space) == (200, "subset")
    assert of(tmp_path, variant=variant, class_space="full").declared().class_space == "full"


def test_folders_of_imagenet_v2_are_numbers(tmp_path: Path) -> None:
    for index in range(1000):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "0f6ab8ae.jpeg").write_bytes(jpeg(level=index // 4))
    source = of(tmp_path, variant="v2").opened()
    assert list(source.ids)[:3] == ["0/0f6ab8ae", "1/0f6ab8ae", "2/0f6ab8ae"]
    images, labels = source.read([2, 10, 100, 999])
    assert labels.tolist() == [2, 10, 100, 999]
    assert torch.allclose(images.mean(dim=(1, 2, 3)) * 255, torch.tensor([0.0, 2.0, 25.0, 249.0]), atol=1)
    with pytest.raises(ValueError, match="its folders are those of ImageNetV2, so write variant: v2"):
        of(tmp_path).opened()


def test_imagenet_d(tmp_path: Path) -> None:
    for nuisance, names in (
        ("background", ["banana", "chair"]),
        ("texture", ["teapot"]),
        ("material", ["banana", "alarm_clock"]),
    ):
        plant(tmp_path / nuisance, names, ["7.png"], jpeg())
    (tmp_path / "questions").mkdir()  # is published with it
    out = of(tmp_path, variant="d", several="leave-out")
    found = list(zip(out.opened().ids, out.opened().labels or [], strict=True))
    assert found == [("background/banana/7", 954), ("material/banana/7", 954), ("texture/teapot/7", 849)]
    assert out.class_space == "full"
    assert len(out.covers()) == 104
    first = of(tmp_path, variant="d", several="first", nuisances=["material"], class_space="subset")
    found = list(zip(first.opened().ids, first.opened().labels or [], strict=True))
    assert found == [("material/alarm_clock/7", 409), ("material/banana/7", 954)]
    assert first.class_space == "subset"
    assert len(first.covers()) == 125
    with pytest.raises(ValueError, match="write several: leave-out"):
        of(tmp_path, variant="d")
    with pytest.raises(ValueError, match="has no folder of wok"):
        of(tmp_path, variant="d", several="first", classes=["wok"]).opened()
    (tmp_path / "texture/n07753592").mkdir()
    with pytest.raises(ValueError, match="texture has a folder n07753592, which is no category of ImageNet-D"):
        out.open()
    for name in ("several", "nuisances"):
        value: object = "first" if name == "several" else ["texture"]
        with pytest.raises(ValueError, match=f"{name} is about ImageNet-D, and the variant is val"):
            of(tmp_path, **{name: value})


def test_folders_of_another_set_are_refused(tmp_path: Path) -> None:
    numbers, rendition = [str(index) for index in range(1000)], list(indices("r"))
    trees: list[tuple[str, list[str], str, str]] = [
        ("numbers", numbers, "val", "has a folder 0 and 999 more; its folders are those of ImageNetV2"),
        ("r", rendition, "val", "lacks the class folder n01440764 and 799 more; its folders are those of ImageNet-R"),
        ("r2", rendition, "a", "so write variant: r"),
        ("wnids", list(synsets()), "v2", "so write variant: val"),
        ("short", list(synsets()[:-1]), "val", "lacks the class folder n15075141; if it is meant"),
        ("odd", [*synsets(), "n99999999"], "sketch", "is not ImageNet-Sketch: it has a folder n99999999; a class"),
        ("above", ["train", "val"], "s", "root must be the folder in which the class folders lie"),
        ("flat", [], "val", "the images must be sorted into such folders"),
    ]
    for name, folders, variant, message in trees:
        for folder in folders:
            (tmp_path / name / folder).mkdir(parents=True)
        (tmp_path / name).mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message) as caught:
            of(tmp_path / name, variant=variant).open()
        assert "\n" not in str(caught.value)
    (tmp_path / "short/n15075141").mkdir()
    with pytest.raises(ValueError, match="short/n01440764 holds no image; was the set unpacked to its end"):
        of(tmp_path / "short").open()


def test_two_files_of_one_name_and_links_are_refused(tmp_path: Path) -> None:
    plant(tmp_path / "a", ["n01440764"], ["x.JPEG", "x.png"], jpeg())
    with pytest.raises(ValueError, match=r"has two files n01440764/x\.\*"):
        of(tmp_path / "a", classes=["n01440764"]).open()
    plant(tmp_path / "out", ["n01440764"], ["x.JPEG"], jpeg())
    (tmp_path / "b").mkdir()
    (tmp_path / "b/n01440764").symlink_to(tmp_path / "out/n01440764")
    with pytest.raises(ValueError, match="has no folder of class n01440764"):
        of(tmp_path / "b", classes=["n01440764"]).open()


WNIDS = ["n01440764", "n01443537", "n02123045"]


def test_imagenet_c(tmp_path: Path) -> None:
    clean = ["ILSVRC2012_val_00000293.JPEG", "ILSVRC2012_val_00002138.JPEG"]
    plant(tmp_path / "val", WNIDS, clean, jpeg((300, 260)))
    for corruption in ("fog", "shot_noise"):
        for severity in (1, 5):
            plant(tmp_path / "c" / corruption / str(severity), WNIDS, clean, jpeg((224, 224), 40 * severity))
    fields: dict[str, Any] = {"root": str(tmp_path / "c"), "classes": WNIDS, "preset": "imagenet-c", "origin": "clean"}
    grid = ImageNetC.model_validate({**fields, "corruptions": ["fog", "shot_noise"], "severities": [1, 5]})
    parts = grid.parts()
    declared = [part.declared() for part in parts]
    assert [one.name for one in declared] == [
        "imagenet-c/fog@s1",
        "imagenet-c/fog@s5",
        "imagenet-c/shot_noise@s1",
        "imagenet-c/shot_noise@s5",
    ]
    assert [(one.group, one.severity) for one in declared][1:3] == [("fog", 5), ("shot_noise", 1)]
    base = of(tmp_path / "val", name="clean", classes=WNIDS, preset="imagenet-val")
    assert {one.origin for one in declared} == {base.declared().origin}
    assert {one.classes for one in declared} == {3}
    assert all(list(part.opened().ids) == list(base.opened().ids) for part in parts)
    # the texts are held once, whatever the number of corruptions
    assert len({id(part.opened().ids[0]) for part in parts}) == 1
    images, labels = parts[3].opened().read([4])
    assert labels.tolist() == [281]
    assert torch.allclose(images, torch.full((1, 3, 224, 224), 200 / 255), atol=1 / 255)
    assert len({part.fingerprint for part in parts}) == 4
    assert grid.covers() == (0, 1, 281)
    with pytest.raises(ValueError, match="open its parts"):
        grid.open()
    for dataset in (base, grid):
        check_dataset(dataset)
    whole = ImageNetC(root="c")
    assert {part.group for part in whole.parts()} == set(COMMON)
    assert len(whole.parts()) == 75
    assert {part.origin for part in whole.parts()} == {"imagenet-c"}
    with pytest.raises(ValueError, match="did you mean fog"):
        ImageNetC(root="c", corruptions=("fogg",))
    with pytest.raises(ValueError, match=r"there is no .*c/snow/5"):
        ImageNetC.model_validate({**fields, "corruptions": ["snow"], "severities": [5]}).parts()[0].opened()


SIZES = st.tuples(st.integers(8, 60), st.integers(8, 60))


@settings(max_examples=80, deadline=None)
@given(
    size=SIZES,
    resize=st.none() | st.integers(8, 40) | st.tuples(st.integers(8, 40), st.integers(8, 40)),
    crop=st.none() | st.integers(1, 8),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
def test_every_geometry_is_torchvisions(
    size: tuple[int, int], resize: int | tuple[int, int] | None, crop: int | None, interpolation: Any
) -> None:
    image = noise(size)
    steps: list[Any] = [] if resize is None else [Resize(resize, InterpolationMode(interpolation))]
    steps += [] if crop is None else [CenterCrop(crop)]
    geometry = Geometry("RGB", resize, crop, interpolation)
    found = geometry.fit(image)
    assert torch.equal(found, Compose([*steps, ToTensor()])(image))
    assert geometry.fitted(size) == found.shape[:0:-1]
    assert geometry.constant in (None, geometry.fitted(size))


@pytest.mark.parametrize(
    ("preset", "steps"),
    [
        ("imagenet-val", [Resize(256), CenterCrop(224)]),
        ("imagenet-c", [CenterCrop(224)]),
        ("diffaug-paper", [Resize(256), CenterCrop(224)]),
        ("robustbench", [Resize([224, 224])]),
    ],
)
def test_presets_are_the_published_transforms(tmp_path: Path, preset: str, steps: list[Any]) -> None:
    sizes = ((500, 375), (333, 500), (224, 224), (257, 241))
    (tmp_path / "n01440764").mkdir()
    for row, size in enumerate(sizes):
        noise(size).save(tmp_path / f"n01440764/ILSVRC2012_val_{row:08d}.JPEG", quality=95)
    source = of(tmp_path, classes=["n01440764"], preset=preset).opened()
    for row, image in enumerate(source.read(range(4))[0]):
        with Image.open(tmp_path / f"n01440764/ILSVRC2012_val_{row:08d}.JPEG") as file:
            assert torch.equal(image, Compose([*steps, ToTensor()])(file.convert("RGB")))


def test_presets_are_written_out(tmp_path: Path) -> None:
    plant(tmp_path, ["n01440764"], ["x.JPEG"], jpeg((300, 260)))
    for preset, fitting in PRESETS.items():
        dataset = of(tmp_path, classes=["n01440764"], preset=preset)
        assert (dataset.resize, dataset.crop, dataset.interpolation) == fitting
        dumped = dataset.model_dump(mode="json")
        assert dumped["preset"] == preset
        assert ImageNet.model_validate(dumped) == dataset
        by_hand = of(tmp_path, classes=["n01440764"], **fitting._asdict())
        assert fingerprint(by_hand) == fingerprint(dataset)
        (part, *_) = ImageNetC.model_validate({"root": "c", "preset": preset}).parts()
        assert isinstance(part, ImageNet)
        assert (part.preset, part.resize, part.crop, part.interpolation) == (preset, *fitting)
    message = r"preset robustbench means resize \[224, 224\], crop none, .* and crop 200 is given beside it"
    with pytest.raises(ValueError, match=message):
        of(tmp_path, preset="robustbench", crop=200)
    with pytest.raises(ValueError, match="and interpolation bicubic is given beside it; leave one out"):
        ImageNetC.model_validate({"root": "c", "preset": "imagenet-c", "interpolation": "bicubic"})
    with pytest.raises(ValueError, match="preset"):
        of(tmp_path, preset="imagenet")


def damaged(root: Path, kind: str) -> Dataset:
    """Five images of which the first and the fourth are damaged."""
    plant(root, ["n01440764"], [f"{row}.JPEG" for row in range(5)], jpeg((40, 30), 80))
    (root / "n01440764/0.JPEG").write_bytes(b"<html>not found</html>")
    (root / "n01440764/3.JPEG").write_bytes(jpeg((40, 30), 80)[:150])
    if kind == "folder":
        return Folder(name="f", root=str(root), on_bad_image="skip")
    return of(root, classes=["n01440764"], crop=24)


@pytest.mark.parametrize("kind", ["folder", "imagenet"])
def test_damaged_images_are_named_and_counted(tmp_path: Path, kind: str) -> None:
    source = damaged(tmp_path, kind).opened()
    assert len(source.ids) == 5
    with pytest.raises(BadImage, match=r"^2 of 5 images of this batch cannot be read, first .*/0\.JPEG is not a"):
        source.read(range(5))
    with pytest.raises(BadImage, match=r"^1 of 2 images of this batch cannot be read, first .*/3\.JPEG is not a"):
        source.read([1, 3])
    with pytest.raises(BadImage, match=r"/3\.JPEG is not a readable image") as caught:
        source.read([3])
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert source.decode is not None
    with pytest.raises(BadImage, match=r"/0\.JPEG is not a readable image"):
        source.decode(0)
    images, labels = source.read([1, 2, 4])
    assert torch.allclose(images, torch.full_like(images, 80 / 255), atol=2 / 255)
    assert labels.tolist() == [0, 0, 0]


def test_a_folder_of_damaged_images_alone(tmp_path: Path) -> None:
    plant(tmp_path, ["a"], ["0.png", "1.png"], b"no image")
    with pytest.raises(BadImage, match=r"a/0\.png is not a readable image"):
        Folder(name="f", root=str(tmp_path)).open()


def test_images_are_not_kept(val: Path) -> None:
    import weakref

    source = of(val).opened()
    read = [weakref.ref(source.read(range(start, start + 50))[0]) for start in range(0, 200, 50)]
    assert [one() for one in read] == [None] * 4
