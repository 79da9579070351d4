"""Image lists as OpenOOD has them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustbench_diffaug import rng
from robustbench_diffaug.data.base import BadImage, Dataset
from robustbench_diffaug.data.lists import ImageList
from robustbench_diffaug.data.sources import Folder
from robustbench_diffaug.testing import check_dataset

PIXELS = (rng.uniform(rng.key("lists"), range(4), (12, 10, 3)) * 256).astype(np.uint8)
PATHS = ["cifar10/test/cat/0001.png", "cifar10/test/dog/0001.png", "texture/a b.png", "x.jpg.png"]
LABELS = [3, 5, -1, -1]


def write(folder: Path, text: str | None = None, name: str = "test.txt") -> ImageList:
    for path, pixels in zip(PATHS, PIXELS, strict=True):
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / path)
    lines = "".join(f"{path} {label}\n" for path, label in zip(PATHS, LABELS, strict=True))
    (folder / name).write_text(lines if text is None else text)
    entry = {"kind": "imglist", "name": "l", "list": str(folder / name), "root": str(folder / "images")}
    found = Dataset.model_validate(entry)
    assert isinstance(found, ImageList)
    return found


def test_a_list(tmp_path: Path) -> None:
    dataset = write(tmp_path)
    check_dataset(dataset)
    source = dataset.opened()
    assert list(source.ids) == PATHS
    assert list(source.labels or []) == LABELS
    images, labels = source.read([2, 0])
    assert torch.equal(images, torch.from_numpy(PIXELS[[2, 0]]).permute(0, 3, 1, 2).float() / 255)
    assert labels.tolist() == [-1, 3]


@pytest.mark.parametrize("form", ["\ufeff{}", "{}\n\n", "{}"])
def test_byte_order_marks_and_ends_of_lines_do_not_matter(form: str, tmp_path: Path) -> None:
    lines = [f"./{path} {label}" for path, label in zip(PATHS, LABELS, strict=True)]
    source = write(tmp_path, form.format("\r\n".join(lines))).opened()
    assert list(source.ids) == PATHS
    assert list(source.labels or []) == LABELS


def test_images_are_fitted_as_those_of_a_folder(tmp_path: Path) -> None:
    """Whose crops are compared with torchvision's."""
    dataset = write(tmp_path, f"{PATHS[0]} 0\n")
    more = {"mode": "L", "resize": 20, "crop": 16}
    folder = Folder.model_validate({"name": "f", "root": str(tmp_path / "images/cifar10/test"), **more})
    assert torch.equal(
        dataset.model_copy(update=more).opened().read([0])[0], folder.opened().read([0])[0]
    )  # the first of the folder's is the cat's


def test_what_records_depend_on(tmp_path: Path) -> None:
    before = write(tmp_path)
    assert write(tmp_path, name="copy.txt").fingerprint == before.fingerprint
    assert before.model_copy(update={"threads": 1}).fingerprint == before.fingerprint
    assert before.model_copy(update={"mode": "L"}).fingerprint != before.fingerprint
    known = before.fingerprint
    assert write(tmp_path, f"{PATHS[0]} 3\n").fingerprint != known
    assert write(tmp_path, "".join(f"{path} 0\n" for path in PATHS)).fingerprint != known


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../test.txt 1", r"test\.txt:2 names '\.\./test\.txt', which is not a path below"),
        ("cifar10/../../test.txt 1", r"test\.txt:2 names .* which is not a path below"),
        ("/etc/hostname 1", "names '/etc/hostname', which is not a path below"),
        ("a\0b.png 1", "which is not a path below"),
        (". 1", "which is not a path below"),
        ("link/secret.png 1", "which a link leads out of"),
        ("secret.png 1", "which a link leads out of"),
        ("loop.png 1", "which cannot be read|there is no such file"),
        ("absent.png 1", "and there is no such file below .*; check root"),
        ("cifar10 1", "and there is no such file below"),
        ("n" * 300 + " 1", "which cannot be read: .*File name too long"),
        (f"{PATHS[0]} 4", r"test\.txt:2 names cifar10/test/cat/0001\.png a second time"),
        (f"cifar10//test/./cat/0001.png {LABELS[0]}", "a second time"),
        (PATHS[1], r"test\.txt:2 is 'cifar10/test/dog/0001\.png'; needed are a path and a label"),
        ("5", "needed are a path and a label"),
        (f"{PATHS[1]} -2", "needed are a path and a label"),
        (f"{PATHS[1]} 1.5", "needed are a path and a label"),
        (f"{PATHS[1]} {10**9}", "needed are a path and a label"),
        (f"{PATHS[1]} ٣", "needed are a path and a label"),
    ],
)
def test_lines_are_refused_by_number(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    Image.fromarray(PIXELS[0]).save(tmp_path / "outside/secret.png")
    dataset = write(tmp_path, f"{PATHS[0]} 3\n{line}\n")
    (tmp_path / "images/link").symlink_to(tmp_path / "outside")
    (tmp_path / "images/secret.png").symlink_to(tmp_path / "outside/secret.png")
    (tmp_path / "images/loop.png").symlink_to(tmp_path / "images/loop.png")
    for refused in (dataset.open, dataset.contents):
        with pytest.raises(ValueError, match=message) as caught:
            refused()
        assert type(caught.value) is ValueError


def test_links_that_stay_below_the_root_are_followed(tmp_path: Path) -> None:
    dataset = write(tmp_path, "here/0001.png 1\nlink.png 2\n")
    (tmp_path / "images/here").symlink_to(tmp_path / "images/cifar10/test/dog")
    (tmp_path / "images/link.png").symlink_to(tmp_path / "images/cifar10/test/cat/0001.png")
    images, _ = dataset.opened().read([0, 1])
    assert torch.equal(images, torch.from_numpy(PIXELS[[1, 0]]).permute(0, 3, 1, 2).float() / 255)


def test_a_list_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty; needed are lines"):
        write(tmp_path, "\n").open()
    dataset = write(tmp_path)
    (tmp_path / "test.txt").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match="is not a readable text"):
        dataset.open()
    (tmp_path / "test.txt").unlink()
    with pytest.raises(ValueError, match=r"there is no .*test\.txt"):
        dataset.open()
    with pytest.raises(ValueError, match=r"x\.jpg\.png is not a folder"):
        write(tmp_path).model_copy(update={"root": str(tmp_path / "images/x.jpg.png")}).open()


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    source = write(tmp_path).opened()
    (tmp_path / "images" / PATHS[1]).write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(BadImage, match=r"dog/0001\.png is not a readable image"):
        source.read([1])
    assert len(source.read([0, 2])[0]) == 2
