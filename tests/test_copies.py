"""Corrupted copies on disk: the pixels of the dataset on the fly, in the layouts of ImageNet-C and CIFAR-10-C."""

import json
from collections.abc import Generator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.cli import main
from robustbench_diffaug.data import copies
from robustbench_diffaug.data.base import BadImage, Dataset, Images
from robustbench_diffaug.data.copies import Copy
from robustbench_diffaug.data.corrupted import Corruptions
from robustbench_diffaug.data.sources import Arrays, Folder

PIXELS = (rng.uniform(rng.key("copies"), range(7), (24, 20, 3)) * 256).astype(np.uint8)
CLASSES = ("n01440764", "n03")
NAMES = ("fog", "frost", "gaussian_noise")


class Listed(Dataset):
    """Images with ids of one's own, whose labels are not known before they are read; the bad ones cannot be."""

    kind: Literal["listed"] = "listed"
    name: str = "listed"
    ids: tuple[str, ...]
    labels: tuple[int, ...]
    bad: tuple[int, ...] = ()

    def contents(self) -> str:
        return "listed"

    def open(self) -> Images:
        def read(rows: Sequence[int]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]:
            for row in rows:
                if row in self.bad:
                    raise BadImage(f"{self.ids[row]} is damaged")
            images = torch.from_numpy(PIXELS[list(rows)]).permute(0, 3, 1, 2) / 255
            return images, torch.tensor([self.labels[row] for row in rows])

        return Images(self.ids, read)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Seven images in two folders of classes."""
    root = tmp_path / "clean"
    for name in CLASSES:
        (root / name).mkdir(parents=True)
    # Two names are the same but for their ends, so that the copy must tell them apart.
    for row, name in enumerate(("a.png", "b.png", "a.bmp", "c.png", "b.bmp", "d e.png", "é.png")):
        Image.fromarray(PIXELS[row]).save(root / CLASSES[row % 2] / name)
    return Folder(name="clean", root=str(root))


@pytest.fixture
def arrays(tmp_path: Path) -> Arrays:
    np.savez(tmp_path / "clean.npz", images=PIXELS, labels=np.array([3, 0, 9, 1, 1, 0, 2]))
    return Arrays(name="clean", file=str(tmp_path / "clean.npz"), every=2)


def done(copy: Copy) -> int:
    return sum(step.images for step in copies.write(copy))


def fly(copy: Copy) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
    """Levels (b, h, w, c) and labels of each version, by the dataset that corrupts on the fly."""
    given = {"severities": copy.severities, "constants": copy.constants, "draw": copy.draw}
    grid = Corruptions(base=copy.dataset, corruptions=copy.corruptions, **given)
    found = {}
    for version, part in zip(copy.versions, grid.parts(), strict=True):
        images, labels = part.opened().read(part.rows())
        found[version] = (images * 255).round().byte().permute(0, 2, 3, 1), labels
    return found


def test_arrays_are_those_of_the_dataset_on_the_fly(
    arrays: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Copy(arrays, tmp_path / "copy", "cifar-c", NAMES, constants="cifar-c", draw=3)
    monkeypatch.setattr(copies, "VALUES", 3 * 24 * 20 * 3)  # three images at a time
    assert done(copy) == 4 * 5 * len(NAMES)
    labels = np.load(tmp_path / "copy/labels.npy")
    assert labels.dtype == np.uint8
    expected = fly(copy)
    for name in NAMES:
        array = np.load(tmp_path / f"copy/{name}.npy", mmap_mode="r")
        assert array.dtype == np.uint8
        assert array.shape == (20, 24, 20, 3)
        for severity in range(1, 6):
            part = slice(4 * (severity - 1), 4 * severity)
            np.testing.assert_array_equal(array[part], expected[name, severity][0])
            assert labels[part].tolist() == [3, 9, 1, 2] == expected[name, severity][1].tolist()
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {f"{name}.npy" for name in NAMES} | {
        "labels.npy",
        "copy.json",
    }


def test_many_classes_and_labels_that_are_not_known_before(tmp_path: Path) -> None:
    dataset = Listed(ids=tuple("abcdefg"), labels=(0, 300, 2, 3, 4, -1, 6))
    copy = Copy(dataset, tmp_path / "copy", "cifar-c", ("contrast",), constants="cifar-c")
    assert done(copy) == 35
    labels = np.load(tmp_path / "copy/labels.npy")
    assert labels.dtype == np.int64
    assert labels.tolist() == 5 * list(dataset.labels)


def test_folders_are_jpeg_of_the_dataset_on_the_fly(folder: Folder, tmp_path: Path) -> None:
    copy = Copy(folder, tmp_path / "copy", "imagenet-c", NAMES, (2, 5))
    assert done(copy) == 7 * 2 * len(NAMES)
    for (name, severity), (levels, labels) in fly(copy).items():
        root = tmp_path / "copy" / name / str(severity)
        assert sorted(path.name for path in root.iterdir()) == list(CLASSES)
        expected = []
        for level, label in zip(levels, labels.tolist(), strict=True):
            file = BytesIO()
            Image.fromarray(level.numpy()).save(file, "JPEG", quality=85)
            with Image.open(file) as picture:
                expected.append((CLASSES[label], picture.tobytes()))
        found = []
        for path in root.rglob("*.JPEG"):
            with Image.open(path) as picture:
                assert picture.format == "JPEG"
                found.append((path.parent.name, picture.tobytes()))
        assert sorted(found) == sorted(expected)
        assert {path.name for path in (root / "n03").iterdir()} == {"b.JPEG", "c.JPEG", "d e.JPEG"}
        again = Folder(name="again", root=str(root))
        assert again.opened().read(range(7))[1].tolist() == labels.tolist()


@pytest.mark.parametrize("form", ["imagenet-c", "cifar-c"])
def test_a_copy_that_was_stopped_is_continued(
    form: Literal["imagenet-c", "cifar-c"], folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Copy(folder, tmp_path / "whole", form, NAMES)
    assert done(whole) == 7 * 15
    monkeypatch.setattr(copies, "VALUES", 2 * 24 * 20 * 3)
    stopped = Copy(folder, tmp_path / "stopped", form, NAMES)
    steps = copies.write(stopped)
    assert isinstance(steps, Generator)
    for _ in range(25):
        next(steps)
    steps.close()
    assert not list((tmp_path / "stopped").rglob("*.part"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").rglob("*.*") if path.name != "copy.json"}
    assert kept
    left = copies.estimate(stopped)
    assert 0 < left.images < 7 * 15
    assert left.seconds > 0
    assert left.bytes > 0
    assert done(stopped) == 7 * 15
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    files = [sorted(path for path in copy.folder.rglob("*.*")) for copy in (whole, stopped)]
    assert [path.relative_to(whole.folder) for path in files[0]] == [
        path.relative_to(stopped.folder) for path in files[1]
    ]
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(*files, strict=True))
    assert copies.estimate(stopped).images == 0
    monkeypatch.setattr(copies, "corrupt", None)  # nothing is made any more
    assert done(stopped) == 7 * 15


def test_names_are_safe_and_distinct(tmp_path: Path) -> None:
    ids = ("../../up.png", "a/x.png", "a/x.jpg", "b/x.png", "/etc/.hidden", "é \x00?*|.jpeg", "A/X.png")
    dataset = Listed(ids=ids, labels=(0, 1, 1, 4, 0, 0, 1))
    assert done(Copy(dataset, tmp_path / "copy", "imagenet-c", ("contrast",), (1,))) == 7
    root = tmp_path / "copy/contrast/1"
    assert sorted(path.name for path in root.iterdir()) == [f"{label:05d}" for label in range(5)]
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.JPEG"))
    assert len(files) == 7
    assert len({file.casefold() for file in files}) == 7
    assert {"00004/b_x.JPEG", "00000/_.._up.JPEG"} < set(files)
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}
    assert all(file.isprintable() and not set('?*|\\\x00:"<>') & set(file) for file in files)


def test_damaged_images_are_skipped_where_the_dataset_says_so(tmp_path: Path) -> None:
    fields = {"ids": tuple(f"{row}.png" for row in range(7)), "labels": (0, 1, 0, 1, 0, 1, 0), "bad": (2, 5)}
    failing = Listed.model_validate(fields)
    with pytest.raises(BadImage, match=r"2\.png is damaged"):
        done(Copy(failing, tmp_path / "fails", "imagenet-c", ("fog",)))
    skipping = Listed.model_validate({**fields, "on_bad_image": "skip"})
    steps = list(copies.write(Copy(skipping, tmp_path / "skips", "imagenet-c", ("fog",), (1, 2))))
    assert [message for step in steps for message in step.skipped] == ["2.png is damaged", "5.png is damaged"]
    assert sum(step.images for step in steps) == 7 * 2
    assert len(list((tmp_path / "skips").rglob("*.JPEG"))) == 5 * 2
    with pytest.raises(BadImage):  # an array has a place for every image
        done(Copy(skipping, tmp_path / "arrays", "cifar-c", ("fog",)))
    assert not (tmp_path / "arrays/fog.npy").exists()


@pytest.mark.parametrize("bad", [(0,), (0, 1, 2)])
def test_the_first_images_may_be_damaged_too(bad: tuple[int, ...], tmp_path: Path) -> None:
    ids, labels = tuple(f"{row}.png" for row in range(7)), (0, 1, 0, 1, 0, 1, 0)
    copy = Copy(
        Listed(ids=ids, labels=labels, bad=bad, on_bad_image="skip"), tmp_path / "skips", "imagenet-c", ("fog",), (1,)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "VALUES", 24 * 20 * 3)  # one image at a time, and two for the estimate
        cost = copies.estimate(copy)
        assert cost.images == 7 and cost.bytes > 0
        assert done(copy) == 7
    assert len(list((tmp_path / "skips").rglob("*.JPEG"))) == 7 - len(bad)
    none = Listed(ids=ids, labels=labels, bad=tuple(range(7)), on_bad_image="skip")
    with pytest.raises(BadImage, match=r"0\.png is damaged"):
        copies.estimate(Copy(none, tmp_path / "none", "imagenet-c", ("fog",)))


def test_what_cannot_be_copied_is_refused(folder: Folder, arrays: Arrays, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'frog'; did you mean fog"):
        Copy(folder, tmp_path, "imagenet-c", ("frog",))
    with pytest.raises(ValueError, match="severities 1 to 5"):
        Copy(folder, tmp_path, "cifar-c", ("fog",), (1, 5))
    with pytest.raises(ValueError, match="is no copy that could be continued"):
        done(Copy(folder, tmp_path / "clean", "imagenet-c", ("fog",)))
    with pytest.raises(ValueError, match="without a label"):
        done(Copy(Listed(ids=("a",), labels=(-1,)), tmp_path / "unlabelled", "imagenet-c", ("fog",)))
    copy = Copy(arrays, tmp_path / "copy", "cifar-c", ("contrast",))
    done(copy)
    for change, word in (
        ({"form": "imagenet-c"}, "format"),
        ({"dataset": folder}, "dataset"),
        ({"draw": 1}, "draw"),
        ({"constants": "cifar-c"}, "constants"),
    ):
        other = Copy(**{**{name: getattr(copy, name) for name in Copy.__dataclass_fields__}, **change})
        with pytest.raises(ValueError, match=f"another {word}; choose another -o"):
            done(other)
    (tmp_path / "copy/copy.json").write_text("{")
    with pytest.raises(ValueError, match=r"copy\.json is damaged"):
        done(copy)
    with pytest.raises(ValueError, match="is empty"):
        copies.estimate(Copy(Listed(ids=(), labels=()), tmp_path / "none", "imagenet-c", ("fog",)))


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["corrupt", *map(str, words)])
    return int(stopped.value.code or 0)


def test_the_command(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = tmp_path / "entry.yaml"
    entry.write_text("kind: folder\nname: clean\nroot: clean\nlimit: 4\n")
    words = (entry, "-o", tmp_path / "copy", "--corruption", "frost", "--corruption", "snow", "--severity", 3)
    assert run(*words) == 0
    output = capsys.readouterr()
    assert "8 images of 2 versions are left: about" in output.err
    assert "timed on 4 images" in output.err
    assert output.out == f"copy    {tmp_path / 'copy'}\n"
    said = json.loads((tmp_path / "copy/copy.json").read_text())
    assert said["constants"] == "imagenet-c"
    assert len(list((tmp_path / "copy").rglob("*.JPEG"))) == 8
    assert run(*words) == 0
    assert "0 images of 2 versions are left\n" in capsys.readouterr().err
    assert run(entry, "-o", tmp_path / "arrays", "--format", "cifar-c", "--corruption", "pixelate", "-q") == 0
    assert json.loads((tmp_path / "arrays/copy.json").read_text())["constants"] == "cifar-c"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("kind: folder\nname: clean\nroot: nowhere\n", (), "there is no"),
        ("kind: foldr\nname: clean\n", (), "entry.yaml:1: kind: no dataset is called 'foldr'; did you mean folder?"),
        ("- kind: mnist5k\n", (), "entry.yaml:1: needed is one dataset entry"),
        ("kind: mnist5k\n", ("--corruption", "frog"), "no corruption is called 'frog'"),
        ("kind: mnist5k\n", ("--severity", "2", "--format", "cifar-c"), "severities 1 to 5"),
        ("kind: folder\nname: clean\nroot: clean\n", ("--textures", "nowhere"), "nowhere has no frost1.png"),
        (
            "kind: corruptions\nbase: {kind: mnist5k}\ncorruptions: [fog]\nconstants: cifar-c\n",
            (),
            "entry.yaml:1: kind corruptions stands for several datasets",
        ),
    ],
)
def test_the_command_teaches(
    text: str, words: tuple[str, ...], message: str, folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "entry.yaml").write_text(text)
    assert run(tmp_path / "entry.yaml", "-o", tmp_path / "copy", *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert len(lines) == 1
    assert not (tmp_path / "copy").exists()
