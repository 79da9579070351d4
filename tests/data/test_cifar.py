"""CIFAR and CIFAR-C, on small trees in the published forms; and pickles that are not what they seem."""

import hashlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_diffaug import rng
from robustbench_diffaug.component import Component, find
from robustbench_diffaug.data import cifar, plain_pickle
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.data.cifar import Cifar, CifarC
from robustbench_diffaug.data.corruptions import COMMON
from robustbench_diffaug.testing import check_dataset

N = 4
PIXELS = (rng.uniform(rng.key("cifar"), range(6 * N), (3, 32, 32)) * 256).astype(np.uint8)
LABELS = [7, 0, 9, 3, 3, 1, 2, 8, 5, 5, 6, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
TEN = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def rows(number: int) -> slice:
    return slice(number * N, (number + 1) * N)


def short(text: str) -> bytes:
    """A text as Python 2 pickles it."""
    return b"U" + bytes([len(text)]) + text.encode() if len(text) < 256 else long(text.encode())


def long(content: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(content)) + content


def integer(value: int) -> bytes:
    return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)


def array(pixels: np.ndarray) -> bytes:
    """An array as numpy 1 of Python 2 pickles it, protocol 2."""
    count, size = pixels.shape
    start = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\x09U\x01bq\x0a\x87q\x0bRq\x0c"
    dtype = b"cnumpy\ndtype\nq\x0dU\x02u1q\x0eK\x00K\x01\x87q\x0fRq\x10"
    filled = b"(K\x03U\x01|q\x11NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x12b"
    shape = integer(count) + integer(size) + b"\x86q\x13"
    return start + b"(K\x01" + shape + dtype + filled + b"\x89" + long(pixels.tobytes()) + b"q\x14tq\x15b"


def batch(pixels: np.ndarray, labels: dict[str, list[int]], name: str = "testing batch 1 of 1") -> bytes:
    """A batch of the Python version, laid out as cPickle did."""
    items = short("batch_label") + b"q\x02" + short(name) + b"q\x03"
    for key, values in labels.items():
        items += short(key) + b"q\x04]q\x05(" + b"".join(map(integer, values)) + b"e"
    items += short("data") + b"q\x06" + array(pixels)
    names = b"".join(
        short(f"tree_s_{row:06d}.png") + b"r" + struct.pack("<i", 1000 + row) for row in range(len(pixels))
    )
    return b"\x80\x02}q\x01(" + items + short("filenames") + b"q\x16]q\x17(" + names + b"eu."


def write(root: Path, form: str, classes: int = 10) -> Path:
    """A small tree of both splits; of 100 classes the fine labels are 9 times those of 10."""
    root.mkdir(parents=True, exist_ok=True)
    files = {name: rows(number) for number, name in enumerate(TEN)}
    if classes == 100:
        files = {"train": slice(0, 5 * N), "test": rows(5)}
    for name, part in files.items():
        pixels, labels = PIXELS[part], LABELS[part]
        coarse, fine = [label // 2 for label in labels], [9 * label for label in labels]
        if form == "binary":
            heads = (
                [bytes([label]) for label in labels] if classes == 10 else map(bytes, zip(coarse, fine, strict=True))
            )
            records = [head + image.tobytes() for head, image in zip(heads, pixels, strict=True)]
            (root / f"{name}.bin").write_bytes(b"".join(records))
        else:
            keys = {"labels": labels} if classes == 10 else {"coarse_labels": coarse, "fine_labels": fine}
            (root / name).write_bytes(batch(pixels.reshape(len(pixels), -1), keys))
    return root


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("form", ["binary", "python"])
def test_both_forms_of_both(form: str, classes: int, tmp_path: Path) -> None:
    folder = cifar.ARCHIVES[classes][form == "python"]
    root = write(tmp_path / folder, form, classes)
    entry: dict[str, Any] = {"kind": "cifar", "name": "c", "classes": classes}
    for place, split, part in ((root, "train", slice(0, 5 * N)), (tmp_path, "test", rows(5))):
        dataset = Dataset.model_validate({**entry, "root": str(place), "split": split})
        check_dataset(dataset)
        source = dataset.opened()
        everything = list(range(len(PIXELS[part])))
        assert list(source.ids) == [f"{row:06d}" for row in everything]
        images, labels = source.read(everything)
        assert torch.equal(images, torch.from_numpy(PIXELS[part]).float() / 255)
        assert labels.tolist() == [label * (1 if classes == 10 else 9) for label in LABELS[part]]
        assert list(source.labels or []) == labels.tolist()


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy.core is gone, and only its pickles name it
def test_the_python_form_is_read_as_torchvision_reads_it(classes: int, tmp_path: Path) -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    root = write(tmp_path / cifar.ARCHIVES[classes][1], "python", classes)
    original = CIFAR10 if classes == 10 else CIFAR100
    key = "batches.meta" if classes == 10 else "meta"
    names = short("label_names" if classes == 10 else "fine_label_names")
    (root / key).write_bytes(b"\x80\x02}" + names + b"](" + b"".join(map(short, "abcdefghij")) + b"es.")

    class Small(original):  # type: ignore[valid-type, misc]
        train_list = [[name, None] for name in (TEN[:5] if classes == 10 else ["train"])]
        test_list = [[TEN[5] if classes == 10 else "test", None]]
        meta = {**original.meta, "md5": None}

    for split in ("train", "test"):
        theirs = Small(str(tmp_path), train=split == "train")
        ours = Cifar.model_validate({"name": "c", "root": str(tmp_path), "classes": classes, "split": split}).opened()
        images, labels = ours.read(range(len(theirs)))
        assert torch.equal((images * 255).round().byte(), torch.from_numpy(theirs.data).permute(0, 3, 1, 2))
        assert labels.tolist() == theirs.targets


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_that_python_3_pickled_again(protocol: int, tmp_path: Path) -> None:
    content = {b"labels": LABELS[rows(5)], "data": PIXELS[rows(5)].reshape(N, -1), "more": {"a": [1, (None, True)]}}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol))
    images, labels = Cifar(name="c", root=str(tmp_path)).opened().read(range(N))
    assert torch.equal(images, torch.from_numpy(PIXELS[rows(5)]).float() / 255)
    assert labels.tolist() == LABELS[rows(5)]
    assert plain_pickle.read(tmp_path / "test_batch")["more"] == content["more"]


def test_arrays_are_views_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, "python")
    data = plain_pickle.read(tmp_path / "test_batch")["data"]
    assert not data.flags.owndata
    assert not data.flags.writeable
    fortran = np.asfortranarray(PIXELS[rows(0)].reshape(N, -1))
    (tmp_path / "f").write_bytes(pickle.dumps({"data": fortran}, 2))
    assert np.array_equal(plain_pickle.read(tmp_path / "f")["data"], fortran)


class Evil:
    """Pickles as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], self.call[1:]


MARK = "touched"
DEEP = 20_000
HOSTILE = {
    "os.system": (pickle.dumps({"data": Evil(os.system, f"touch {MARK}")}, 2), r"wants 'posix\.system'"),
    "protocol 4": (pickle.dumps({"data": Evil(os.system, f"touch {MARK}")}, 4), r"wants 'posix\.system'"),
    "eval": (pickle.dumps({"data": Evil(eval, "1+1")}, 2), r"wants '__builtin__\.eval'"),
    "a dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.tobytes\x93.", "not a whole pickle"),
    "a relative of a known name": (b"\x80\x02cnumpy\nload\n.", r"wants 'numpy\.load'"),
    "protocol 0": (b"cos\nsystem\n(S'touch touched'\ntR.", r"wants 'os\.system'"),
    "inst": (b"(S'touch touched'\nios\nsystem\n.", "wants the instruction STRING"),
    "inst alone": (b"(ios\nsystem\n.", r"wants the instruction INST 'os system'"),
    "obj": (b"\x80\x02(cos\nsystem\no.", r"wants 'os\.system'"),
    "newobj": (b"\x80\x02cnumpy\nndarray\n)\x81.", "wants the instruction NEWOBJ"),
    "persistent": (b"Pid\n.", "wants the instruction PERSID"),
    "extension": (b"\x80\x02\x82\x01.", "wants the instruction EXT1"),
    "a call of an array": (b"\x80\x02cnumpy\nndarray\nK\x05\x85R.", "wants a call that plain data does not need"),
    "a great array": (b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.", "wants a call"),
    "an array of objects": (pickle.dumps({"data": np.array([None])}, 2), "an array of dtype 'O8'"),
    "floats": (pickle.dumps({"data": np.zeros(3)}, 2), "an array of dtype 'f8'"),
    "another encoding": (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0zip\x86R.", "wants a call"),
    "deep lists": (b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".", "holds list, not a mapping"),
    "deep tuples as a key": (b"\x80\x02})" + b"\x85" * DEEP + b"Ns.", "only mappings with texts as keys"),
    "a deep name": (b"\x80\x04]" + b"]a" * 9 + b"2" * 30 + b"\x93.", "wants the instruction DUP"),
    "a bomb of references as a name": (
        b"\x80\x04](NNe\x94" + b"".join(b"](" + 2 * (b"h" + bytes([n])) + b"e\x94" for n in range(99)) + b"h\x00\x93.",
        "not a whole pickle",
    ),
    "a giant text": (b"\x80\x02T\xff\xff\xff\x7fabc.", "not a whole pickle of plain data: ValueError"),
    "giant bytes": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00abc.", "not a whole pickle"),
    "negative length": (b"\x80\x02T\xff\xff\xff\xffabc.", "not a whole pickle"),
    "an unknown memo": (b"\x80\x02h\x05.", "not a whole pickle"),
    "an empty stack": (b"\x80\x02.", "not a whole pickle"),
    "an append to nothing": (b"\x80\x02a.", "not a whole pickle"),
    "a mark too few": (b"\x80\x02}u.", "not a whole pickle"),
    "a list": (b"\x80\x02].", "holds list, not a mapping"),
    "nothing": (b"", "has 0 bytes"),
    "no pickle": (b"<html>", "not a whole pickle"),
    "zeros": (b"\0" * 100, "not a whole pickle"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Cifar(name="c", root=str(tmp_path)).open()
    assert type(caught.value) is ValueError
    assert str(tmp_path / "test_batch") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not (tmp_path / MARK).exists()


def test_what_a_pickle_may_cost_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p"
    path.write_bytes(b"\x80\x02}." + b"\0" * 100)
    assert plain_pickle.read(path) == {}
    monkeypatch.setattr(plain_pickle, "LONGEST", 9)
    path.write_bytes(b"\x80\x02" + b"N0" * 9 + b"}.")
    with pytest.raises(ValueError, match="wants the instruction POP"):
        plain_pickle.read(path)
    path.write_bytes(b"\x80\x02" + b"}" * 20)
    with pytest.raises(ValueError, match="has more than 9 instructions"):
        plain_pickle.read(path)
    monkeypatch.setattr(plain_pickle, "LONGEST", 10**6)
    monkeypatch.setattr(plain_pickle, "LARGEST", 2000)
    encode = b"h\x00h\x01h\x02\x86R"
    start = b"\x80\x02c_codecs\nencode\nq\0" + b"X" + struct.pack("<i", 500) + b"a" * 500 + b"q\x01"
    path.write_bytes(start + b"X\x06\0\0\0latin1q\x02" + encode * 5 + b".")
    with pytest.raises(ValueError, match="makes more than 2000 bytes"):
        plain_pickle.read(path)
    path.write_bytes(b"\x80\x02}." + b"\0" * 2000)
    with pytest.raises(ValueError, match="needed is a pickle of 1 to 2000"):
        plain_pickle.read(path)


WHOLE = batch(PIXELS[rows(5)].reshape(N, -1), {"labels": LABELS[rows(5)]})
"""A published batch in small."""


@settings(deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.booleans())
def test_damaged_batches_are_read_or_refused(tmp_path_factory: Any, place: int, value: int, cut: bool) -> None:
    root = tmp_path_factory.mktemp("damaged")
    content = WHOLE[:place] if cut else WHOLE[:place] + bytes([value]) + WHOLE[place + 1 :]
    (root / "test_batch").write_bytes(content)
    try:
        images, labels = Cifar(name="c", root=str(root)).open().read([0])
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error)
    else:
        assert not cut
        assert images.shape == (1, 3, 32, 32) and 0 <= int(labels) < 10


def test_the_published_order_counts_over_the_batches_and_nothing_is_half_there(tmp_path: Path) -> None:
    write(tmp_path, "binary")
    train = Cifar(name="c", root=str(tmp_path), split="train")
    whole = (tmp_path / "data_batch_2.bin").read_bytes()
    for content, message in (
        (whole[:-1], r"data_batch_2\.bin has 12291 bytes, which are no whole records of 3073"),
        (whole[:-3073], r"data_batch_2\.bin have 4 and 3 images, where batches are equal"),
        (b"\x0a" + whole[1:], r"data_batch_2\.bin: labels go from 0 to 10, of 10 classes|labels go from 1 to 10"),
    ):
        (tmp_path / "data_batch_2.bin").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            train.open()
    (tmp_path / "data_batch_2.bin").unlink()
    with pytest.raises(ValueError, match=r"there is no .*data_batch_2\.bin, but data_batch_1\.bin is"):
        train.open()
    with pytest.raises(
        ValueError, match=r"holds no test split of CIFAR-100: needed is test\.bin or test, there or in cifar"
    ):
        Cifar(name="c", root=str(tmp_path), classes=100).open()
    write(tmp_path / "python", "python", 100)
    with pytest.raises(ValueError, match="has no data and labels; it has 'batch_label', 'coarse_labels', 'data'"):
        (tmp_path / "python" / "test").rename(tmp_path / "python" / "test_batch")
        Cifar(name="c", root=str(tmp_path / "python")).open()


def corrupted(root: Path) -> np.ndarray:
    """Arrays as CIFAR-10-C has them; the level of each pixel tells corruption, severity and image."""
    root.mkdir(exist_ok=True)
    levels = np.stack([np.full((5 * N, 32, 32, 3), 10 * place, np.uint8) for place in range(len(COMMON))])
    levels += np.repeat(np.arange(5, dtype=np.uint8), N)[None, :, None, None, None]
    levels[..., 0, 0, 2] = np.arange(5 * N)
    for name, array in zip(COMMON, levels, strict=True):
        np.save(root / f"{name}.npy", array)
    np.save(root / "labels.npy", np.tile(LABELS[rows(5)], 5).astype(np.uint8))
    return levels


def test_the_grid_of_cifar_c(tmp_path: Path) -> None:
    levels = corrupted(tmp_path / "c")
    write(tmp_path, "binary")
    grid = Dataset.model_validate(
        {"kind": "cifar-c", "name": "cifar10-c", "origin": "clean", "root": str(tmp_path / "c")}
    )
    parts = grid.parts()
    assert len(parts) == 75
    assert [part.name for part in parts[4:6]] == ["cifar10-c/gaussian_noise@s5", "cifar10-c/shot_noise@s1"]
    test = Cifar(name="clean", root=str(tmp_path)).opened()
    for place in (0, 17, 74):
        part = parts[place]
        check_dataset(part)
        corruption, severity = divmod(place, 5)
        declared = part.declared()
        assert (declared.origin, declared.group, declared.severity) == ("clean", COMMON[corruption], severity + 1)
        assert (declared.n, declared.n_available) == (N, N)
        source = part.opened()
        assert list(source.ids) == list(test.ids)
        images, labels = source.read([3, 1])
        wanted = levels[corruption, [severity * N + 3, severity * N + 1]]
        assert torch.equal((images * 255).round().byte(), torch.from_numpy(wanted).permute(0, 3, 1, 2))
        assert labels.tolist() == [LABELS[5 * N + 3], LABELS[5 * N + 1]]
    few = CifarC(name="x", root=str(tmp_path / "c"), corruptions=("fog",), severities=(5, 1), limit=2)
    assert [part.name for part in few.parts()] == ["x/fog@s5", "x/fog@s1"]
    assert [(part.declared().origin, part.declared().n) for part in few.parts()] == [("x", 2)] * 2
    assert few.contents() and few.contents() != grid.contents()
    assert few.parts()[0].fingerprint != few.parts()[1].fingerprint
    with pytest.raises(ValueError, match="is a grid"):
        few.open()


def test_each_file_is_hashed_and_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupted(tmp_path)
    opened: list[str] = []
    load, digest = np.load, hashlib.file_digest

    def loading(path: Path, **more: Any) -> Any:
        opened.append(f"map {path.name}")
        return load(path, **more)

    def hashing(file: Any, name: str) -> Any:
        opened.append(f"hash {Path(file.name).name}")
        return digest(file, name)

    monkeypatch.setattr(np, "load", loading)
    monkeypatch.setattr(hashlib, "file_digest", hashing)
    for part in CifarC(name="c", root=str(tmp_path), corruptions=("fog", "snow")).parts():
        part.opened().read([0])
    assert sorted(opened) == [f"{how} {name}.npy" for how in ("hash", "map") for name in ("fog", "labels", "snow")]
    assert isinstance(cifar._mapped(tmp_path / "fog.npy"), np.memmap)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "fog",
            np.zeros((5 * N - 1, 32, 32, 3), np.uint8),
            r"has 19 images and labels\.npy 20 labels",
        ),
        ("fog", np.zeros((5 * N, 32, 32, 3), np.float32), "float32; needed is"),
        ("fog", np.zeros((5 * N, 3, 32, 32), np.uint8), r"has shape \(20, 3, 32, 32\)"),
        ("labels", np.zeros(5 * N - 1, np.int64), "has 19 labels; needed are the same n, 5 times over"),
        ("labels", np.arange(5 * N), "the same n, 5 times over"),
        ("labels", np.zeros(0, np.int64), "has 0 labels"),
        ("labels", np.zeros(5 * N), "float64; needed are 5 n integers"),
        ("labels", np.full(5 * N, -2), "goes from -2 to -2"),
        ("labels", np.array([None] * 20), "not a whole npy file"),
    ],
)
def test_other_arrays_are_refused(name: str, array: np.ndarray, message: str, tmp_path: Path) -> None:
    corrupted(tmp_path)
    np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        CifarC(name="c", root=str(tmp_path), corruptions=("fog",)).parts()[0].open()


def test_files_that_are_missing_or_cut_off_are_named(tmp_path: Path) -> None:
    corrupted(tmp_path)
    part = CifarC(name="c", root=str(tmp_path), corruptions=("fog",)).parts()[0]
    content = (tmp_path / "fog.npy").read_bytes()
    for cut in (content[:-1], content[:50], b"", b"PK\x03\x04"):
        (tmp_path / "fog.npy").write_bytes(cut)
        with pytest.raises(ValueError, match=r"fog\.npy is not") as caught:
            part.open()
        assert type(caught.value) is ValueError
    (tmp_path / "fog.npy").unlink()
    with pytest.raises(ValueError, match=r"there is no .*fog\.npy"):
        part.open()
    with pytest.raises(ValueError, match="no corruption is called 'fogg'; did you mean fog"):
        CifarC(name="c", root=str(tmp_path), corruptions=("fogg",))


@pytest.mark.parametrize("kind", ["cifar", "cifar-c", "cifar-c-part", "imglist", "table"])
def test_the_kinds_are_installed(kind: str) -> None:
    found: type[Component] = find(Dataset, kind)
    assert found.model_fields["kind"].default == kind
