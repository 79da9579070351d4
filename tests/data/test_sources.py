"""Images from files, in the formats people have, and corrupted versions of any of them."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from robustbench_diffaug import rng
from robustbench_diffaug.data.base import BadImage
from robustbench_diffaug.data.cifar import CifarC, CifarCPart
from robustbench_diffaug.data.corrupted import Corrupted, Corruptions
from robustbench_diffaug.data.corruptions import corrupt
from robustbench_diffaug.data.embedded import Mnist5k
from robustbench_diffaug.data.sources import Arrays, Folder

PIXELS = (rng.uniform(rng.key("pixels"), range(6), (12, 10, 3)) * 256).astype(np.uint8)
LABELS = np.arange(6) % 3


def expected(rows: list[int]) -> torch.Tensor:
    return torch.from_numpy(PIXELS[rows]).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("form", ["npy", "npz", "compressed"])
def test_arrays(form: str, layout: str, tmp_path: Path) -> None:
    images = PIXELS if layout == "nhwc" else PIXELS.transpose(0, 3, 1, 2)
    if form == "npy":
        np.save(tmp_path / "i.npy", images)
        np.save(tmp_path / "l.npy", LABELS)
        files = {"images": str(tmp_path / "i.npy"), "labels": str(tmp_path / "l.npy")}
    else:
        save = np.savez if form == "npz" else np.savez_compressed
        save(tmp_path / "a.npz", images=images, labels=LABELS)
        files = {"file": str(tmp_path / "a.npz")}
    dataset = Arrays.model_validate({"name": "a", "layout": layout, **files})
    found, labels = dataset.opened().read([5, 0, 3])
    assert torch.equal(found, expected([5, 0, 3]))
    assert labels.tolist() == [2, 0, 0]
    assert dataset.available() == 6


def test_stored_arrays_are_mapped_and_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=LABELS.astype(np.int32))
    from robustbench_diffaug.data.sources import _member

    array = _member(tmp_path / "a.npz", "images")
    assert not array.flags.owndata
    assert np.array_equal(array, PIXELS)
    fortran = np.asfortranarray(PIXELS)
    np.savez(tmp_path / "f.npz", images=fortran)
    assert np.array_equal(_member(tmp_path / "f.npz", "images"), PIXELS)


def test_grey_and_float_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=PIXELS[..., 0].astype(np.float32) / 255, labels=LABELS)
    found, _ = Arrays(name="a", file=str(tmp_path / "a.npz")).opened().read([1])
    assert torch.allclose(found, expected([1])[:, :1])


def test_folders(tmp_path: Path) -> None:
    for row in range(6):
        (tmp_path / f"class{LABELS[row]}").mkdir(exist_ok=True)
        Image.fromarray(PIXELS[row]).save(tmp_path / f"class{LABELS[row]}" / f"{row}.png")
    (tmp_path / "class0" / "notes.txt").write_text("no image")
    dataset = Folder(name="f", root=str(tmp_path))
    source = dataset.opened()
    assert source.ids[:2] == ["class0/0.png", "class0/3.png"]
    found, labels = source.read([1, 2])
    assert torch.equal(found, expected([3, 1]))
    assert labels.tolist() == [0, 1]
    turned = Folder(name="f", root=str(tmp_path), folders=("class2", "class0", "class1"))
    assert turned.opened().read([0])[1].tolist() == [0]
    assert turned.opened().ids[0] == "class2/2.png"
    cropped = Folder(name="f", root=str(tmp_path), crop=8).opened().read([0])[0]
    assert torch.equal(cropped, expected([0])[:, :, 2:10, 1:9])
    resized = Folder(name="f", root=str(tmp_path), resize=20, crop=16).opened().read([0])[0]
    assert resized.shape == (1, 3, 16, 16)
    before = dataset.contents()
    Image.new("RGB", (10, 12)).save(tmp_path / "class1" / "new.png")
    assert dataset.contents() != before


def test_crops_are_those_of_torchvision(tmp_path: Path) -> None:
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    (tmp_path / "a").mkdir()
    for width, height, resize, crop in ((37, 23, 16, 13), (21, 50, 9, 6), (30, 31, 30, 29), (13, 17, 20, 20)):
        pixels = rng.uniform(rng.key("crop", width), range(1), (height, width, 3))[0] * 256
        image = Image.fromarray(pixels.astype(np.uint8))
        image.save(tmp_path / "a/x.png")
        found = Folder(name="f", root=str(tmp_path), resize=resize, crop=crop).opened().read([0])[0][0]
        wanted = Compose([Resize(resize), CenterCrop(crop), PILToTensor()])(image)
        assert torch.equal(found, wanted / 255)


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in (".cache/1.png", "a/1.png", "a/._1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(PIXELS[0]).save(tmp_path / name)
    source = Folder(name="f", root=str(tmp_path)).opened()
    assert list(source.ids) == ["a/1.png"]
    assert source.read([0])[1].tolist() == [0]


def test_no_program_is_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL hands EPS to Ghostscript, whatever the file is called."""
    started: list[object] = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *words, **more: started.append(words))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(BadImage, match=r"x\.jpg is not a readable image"):
        Folder(name="f", root=str(tmp_path)).opened()
    assert not started


@pytest.mark.parametrize(
    "header",
    [
        "((((",
        "{[]: 1}",
        "  x\n y",
        "'''",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000000000000,), }",
    ],
)
def test_damaged_headers_are_refused_in_one_line(header: str, tmp_path: Path) -> None:
    padded = header.encode() + b" " * (117 - len(header)) + b"\n"
    for name in ("images", "labels", "fog"):
        (tmp_path / f"{name}.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + padded + bytes(100))
    with pytest.raises(ValueError, match=r"images\.npy is not an npy file that can be mapped") as caught:
        Arrays(name="a", images=str(tmp_path / "images.npy"), labels=str(tmp_path / "labels.npy")).open()
    assert type(caught.value) is ValueError
    with pytest.raises(ValueError, match=r"fog\.npy is not a whole npy file") as caught:
        CifarCPart(name="c", root=str(tmp_path), corruption="fog").open()
    assert type(caught.value) is ValueError


def test_arrays_of_the_other_byte_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=(PIXELS / 255).astype(">f4"), labels=LABELS.astype(">i2"))
    found, labels = Arrays(name="a", file=str(tmp_path / "a.npz")).opened().read([1, 2])
    assert torch.allclose(found, expected([1, 2]))
    assert labels.tolist() == [1, 2]


def test_class_folders_cannot_lead_away(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "outside")
    for name in ("../outside", "link", str(tmp_path / "outside"), ".", ""):
        with pytest.raises(ValueError, match="no folder of class"):
            Folder(name="f", root=str(tmp_path / "root"), folders=(name,)).open()
    with pytest.raises(ValueError, match="link; a link that leads elsewhere is none"):
        Folder(name="f", root=str(tmp_path / "root")).open()


def test_severities_of_a_grid_are_checked_where_they_stand() -> None:
    for make in (
        lambda: CifarC(name="c", root="none", severities=(0, 5)),
        lambda: Corruptions(base=Mnist5k(), corruptions=("fog",), constants="imagenet-c", severities=(6,)),
    ):
        with pytest.raises(ValidationError, match="severities"):
            make()


def test_a_grid_stands_for_its_parts() -> None:
    base = Mnist5k(group="clean", limit=4)
    grid = Corruptions(base=base, corruptions=("fog", "shot_noise"), severities=(1, 5), constants="imagenet-c")
    names = [part.declared().name for part in grid.parts()]
    assert names == ["mnist5k/fog@s1", "mnist5k/fog@s5", "mnist5k/shot_noise@s1", "mnist5k/shot_noise@s5"]
    part = grid.parts()[3].declared()
    assert (part.origin, part.group, part.severity, part.n, part.n_available) == ("mnist5k", "shot_noise", 5, 4, 1000)
    found, labels = grid.parts()[3].opened().read([2, 0])
    source = base.opened()
    images, classes = source.read([2, 0])
    keys = [rng.key("corruption", 0, "shot_noise", 5, source.ids[row]) for row in (2, 0)]
    assert torch.equal(found, corrupt(images, "shot_noise", 5, "imagenet-c", keys))
    assert torch.equal(labels, classes)
    other = Corrupted(name="x", base=base, corruption="shot_noise", constants="imagenet-c", draw=1)
    assert not torch.equal(other.opened().read([2, 0])[0], found)


def test_images_as_they_lie_on_disk(tmp_path: Path) -> None:
    """What a trainer crops for itself: whole, in the mode, and refused by name where it cannot be fitted."""
    sizes = ((37, 23), (21, 50), (30, 31))
    for row, size in enumerate(sizes):
        (tmp_path / f"class{row % 2}").mkdir(exist_ok=True)
        Image.fromarray(PIXELS[row]).resize(size).save(tmp_path / f"class{row % 2}/{row}.png")
    source = Folder(name="f", root=str(tmp_path), mode="L", resize=16, crop=13).opened()
    assert source.decode is not None
    assert source.fit is not None
    images, labels = source.read([2, 0, 1])
    decoded = [source.decode(row) for row in (2, 0, 1)]
    assert [image.size for image in decoded] == [sizes[1], sizes[0], sizes[2]]
    assert {image.mode for image in decoded} == {"L"}
    assert torch.equal(torch.stack([source.fit(image) for image in decoded]), images)
    assert list(source.labels or []) == [0, 0, 1]
    assert labels.tolist() == [1, 0, 0]
    Image.new("RGB", (12, 90)).save(tmp_path / "class1/3.png")
    (tmp_path / "class1/4.png").write_bytes(b"no image")
    for more, row, message in (
        ({"crop": 13}, 3, r"class1/3\.png is 12x90, too small for a crop of 13"),
        ({"resize": 12, "crop": 12}, 4, r"class1/4\.png is not a readable image"),
        ({"resize": 20}, 1, r"images of f differ in size, 32x20 and 20x20 at .*class0/2\.png; give crop"),
    ):
        found = Folder.model_validate({"name": "f", "root": str(tmp_path), **more}).opened()
        assert found.decode is not None
        for refused in (found.decode, lambda row, found=found: found.read([row])):
            with pytest.raises(ValueError, match=message):
                refused(row)


def test_labels_are_known_without_reading_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=LABELS)
    for dataset in (Arrays(name="a", file=str(tmp_path / "a.npz")), Mnist5k(limit=5)):
        source = dataset.opened()
        assert list(source.labels or [])[:5] == source.read(range(5))[1].tolist()
