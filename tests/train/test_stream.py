"""The samples of each step: one order, the same from memory and from disk, for one process and for several."""

import itertools
import multiprocessing
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

import robustbench_diffaug.torchvision_guard  # noqa: F401
from robustbench_diffaug import rng
from robustbench_diffaug.data.sources import Arrays, Folder
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.mixture import MixtureSpec
from robustbench_diffaug.train.parallel import Place
from robustbench_diffaug.train.samples import Samples
from robustbench_diffaug.train.stream import Chosen, Crop, Order, Reader, _next, positions, stream


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of different sizes in two folders of classes, as ImageNet has them."""
    root = tmp_path_factory.mktemp("photographs")
    for index in range(10):
        pixels = rng.uniform(rng.key("photograph", index), range(1), (40 + 3 * index, 60 - 2 * index, 3))[0]
        place = root / f"n{index % 2}"
        place.mkdir(exist_ok=True)
        Image.fromarray((255 * pixels).astype(np.uint8)).save(place / f"{index}.JPEG", quality=90)
    return root


def folder(root: Path, **more: Any) -> Folder:
    return Folder(name="photographs", root=str(root), resize=40, crop=32, **more)


def some(count: int, *arguments: Any, **more: Any) -> list[Samples]:
    found = stream(*arguments, **more)
    taken = list(itertools.islice(found, count))
    found.close()
    return taken


def same(one: Samples, other: Samples) -> bool:
    pairs = [(one.images, other.images), (one.labels, other.labels)]
    if one.ordinary is not None and other.ordinary is not None:
        pairs.append((one.ordinary, other.ordinary))
    together = (one.ordinary is None) == (other.ordinary is None) and list(one.keys) == list(other.keys)
    return together and all(torch.equal(first, second) for first, second in pairs)


def test_steps_are_windows_of_shuffled_epochs() -> None:
    data = Mixture(size=10)
    taken = some(5, data, None, 0.0, 3, 4, 1, Place(), None, "cpu", 0)
    keys = [key for samples in taken for key in samples.keys]
    for epoch in range(2):  # two epochs of ten are five steps of four
        order = rng.permutation(rng.key("order", 3, epoch), 10)
        ids = data.opened().ids
        assert keys[10 * epoch : 10 * epoch + 10] == [(3, epoch, ids[row]) for row in order]
    images, labels = data.opened().read(range(10))
    for samples in taken:
        for image, label, key in zip(samples.images, samples.labels, samples.keys, strict=True):
            row = data.opened().ids.index(str(key[-1]))
            assert torch.equal(image, images[row])
            assert label == labels[row]


def test_a_later_first_step_is_that_step() -> None:
    arguments = (Mixture(size=10), Mixture(name="more", size=7), 0.25, 0, 8)
    whole = some(6, *arguments, 1, Place(), None, "cpu", 0)
    assert all(map(same, whole[3:], some(3, *arguments, 4, Place(), None, "cpu", 0)))


@pytest.mark.parametrize("crop", [None, Crop(size=32)], ids=["plain", "crop"])
def test_memory_disk_and_workers_give_the_same(crop: Crop | None, photographs: Path) -> None:
    data, extra = folder(photographs), folder(photographs, every=2).model_copy(update={"name": "again"})
    held = some(3, data, extra, 0.25, 0, 4, 1, Place(), crop, "cpu", 0)
    for workers, hold in ((0, 1), (1 if crop is None else 2, 1)):  # workers start slowly
        streamed = some(3, data, extra, 0.25, 0, 4, 1, Place(), crop, "cpu", workers, hold=hold)
        assert all(map(same, held, streamed)), workers
    assert [samples.ordinary is None for samples in held] == [crop is None] * 3


def test_slices_of_processes_join_to_the_whole() -> None:
    arguments = (Mixture(size=10), Mixture(name="more", size=7), 0.5, 0, 8, 2)
    whole = some(2, *arguments, Place(), Crop(size=8), "cpu", 0)
    parts = [some(2, *arguments, Place(rank, 4, rank), Crop(size=8), "cpu", 0) for rank in range(4)]
    for step, samples in enumerate(whole):
        joined = [part[step] for part in parts]
        assert torch.equal(torch.cat([part.images for part in joined]), samples.images)
        assert [key for part in joined for key in part.keys] == list(samples.keys)
    assert [positions(2, 8, Place(rank, 4)) for rank in (0, 3)] == [range(8, 10), range(14, 16)]


@given(st.integers(1, 99), st.integers(1, 40), st.integers(2, 30), st.integers(2, 30))
@settings(max_examples=60, deadline=None)
def test_the_share_is_exact_and_each_set_goes_through_its_epochs(percent: int, batch: int, n: int, m: int) -> None:
    share = Fraction(percent, 100)
    order = Order(0, ([f"a{i}" for i in range(n)], [f"b{i}" for i in range(m)]), share, "more")
    chosen = [order.at(position) for position in range(100 * 3)]
    assert sum(one.source for one in chosen) == 3 * percent  # exactly
    for first in range(0, 300 - batch):
        inside = sum(one.source for one in chosen[first : first + batch])
        assert abs(inside - batch * share) < 1
    for source, size in ((0, n), (1, m)):
        rows = [one.row for one in chosen if one.source == source]
        whole = len(rows) // size * size
        assert all(count == whole // size for count in Counter(rows[:whole]).values())
    assert len({one.key for one in chosen}) == 300  # no two samples share their randomness


def test_boxes_have_the_distribution_of_the_field() -> None:
    """Area uniform in the scale, log ratio uniform; and the box is inside."""
    crop, side = Crop(size=8, scale=(0.1, 0.6)), 1000
    boxes = np.array([crop.box(side, side, ("box", index)) for index in range(3000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= side).all()
    assert (left + width <= side).all()
    area = height * width / side**2
    counts, _ = np.histogram(area, 10, (0.1, 0.6))
    assert ((counts - 300) ** 2 / 300).sum() < 27.9  # chi-square, 9 degrees of freedom, 0.001
    ratio = np.log(width / height) / np.log(4 / 3)
    counts, _ = np.histogram(ratio, 10, (-1, 1))
    assert ((counts - 300) ** 2 / 300).sum() < 27.9
    flips = sum(crop.flipped(("flip", index)) for index in range(2000))
    assert abs(flips - 1000) < 3.3 * 500**0.5
    assert not Crop(size=8, flip=False).flipped(("flip", 1))


def test_images_that_no_box_fits_are_cropped_in_the_centre() -> None:
    crop = Crop(size=8, scale=(0.9, 1.0), ratio=(1.0, 1.0))
    assert crop.box(100, 10, ("tall",)) == (45, 0, 10, 10)
    assert crop.box(10, 100, ("wide",)) == (0, 45, 10, 10)


def test_the_crop_is_torchvision_s(photographs: Path) -> None:
    from torchvision.transforms.v2 import functional as vision

    image, crop = Image.open(photographs / "n0/2.JPEG"), Crop(size=24)
    for index in range(20):
        key = ("crop", index)
        expected = vision.resized_crop(image, *crop.box(image.height, image.width, key), size=[24, 24])
        expected = vision.hflip(expected) if crop.flipped(key) else expected
        pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255
        assert float((crop.of_image(image, key) - pixels).abs().max()) < 2.5 / 255, index


def test_crops_of_tensors_are_the_same_held_and_not() -> None:
    data = Mixture(spec=MixtureSpec(channels=3, size=16), size=9, every=2)
    extra = Mixture(name="more", spec=MixtureSpec(channels=3, size=16), size=5)
    arguments = (data, extra, 0.3, 0, 10, 1, Place(), Crop(size=16), "cpu", 0)
    held, streamed = some(4, *arguments), some(4, *arguments, hold=0)
    assert all(map(same, held, streamed))
    for samples in held:
        assert sum(len(key) == 4 for key in samples.keys) == 3  # three in ten, though the float 0.3 is a little less
        assert samples.ordinary is not None
        crops = zip(samples.images, samples.ordinary, samples.keys, strict=True)
        assert all(torch.equal(crop, Crop(size=16).of_tensor(image, key)) for image, crop, key in crops)


def test_crops_have_torchvision_s_pixels() -> None:
    """On the same 8 bits they are the same bits; from tensors there is rounding alone."""
    from torchvision.transforms.v2 import functional as vision

    seen = set()
    for index, (width, height) in enumerate(((37, 23), (21, 50), (64, 20), (18, 18)) * 8):
        pixels = rng.uniform(rng.key("crop", index), range(1), (height, width, 3))[0] * 256
        image, crop, key = Image.fromarray(pixels.astype(np.uint8)), Crop(size=16), (0, 0, str(index))
        box = crop.box(height, width, key)
        expected = vision.resized_crop(image, *box, size=[16, 16])
        tensor = vision.pil_to_tensor(image) / 255
        softly = vision.resized_crop(tensor, *box, size=[16, 16], antialias=True)
        if crop.flipped(key):
            expected, softly = vision.hflip(expected), vision.hflip(softly)
        assert torch.equal(crop.of_image(image, key), vision.pil_to_tensor(expected) / 255)
        assert torch.allclose(crop.of_tensor(tensor, key), softly, atol=1e-6)
        seen.add(crop.flipped(key))
    assert seen == {False, True}
    whole = Crop(size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    assert torch.equal(whole.of_tensor(softly, (0,)), softly)


@pytest.mark.parametrize(("height", "width"), [(300, 500), (90, 100)])
def test_boxes_are_distributed_as_torchvision_s(height: int, width: int) -> None:
    from torchvision.transforms import RandomResizedCrop

    found = np.array([Crop(size=1).box(height, width, (0, index)) for index in range(4000)], float)
    image = Image.new("L", (width, height))
    with rng.seeded(rng.key("torchvision")):
        drawn = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    for ours, theirs in zip(found.T, np.array(drawn, float).T, strict=True):
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-4  # 8 of them


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (33, 32)])
def test_boxes_that_never_fit_are_torchvision_s(height: int, width: int) -> None:
    from torchvision.transforms import RandomResizedCrop

    found = Crop(size=1, scale=(1.0, 1.0), ratio=(0.7, 0.9)).box(height, width, (0,))
    assert found == RandomResizedCrop.get_params(Image.new("L", (width, height)), [1.0, 1.0], [0.7, 0.9])


def test_files_that_come_or_go_are_noticed(photographs: Path) -> None:
    reader = Reader((folder(photographs),), (range(11),), None)
    assert not isinstance(reader[[Chosen(0, 0, (0, 0, "n0/0.JPEG"))]], str)
    for row, name in ((0, "n0/new.JPEG"), (9, "n0/0.JPEG"), (10, "n1/9.JPEG")):
        found = reader[[Chosen(0, row, (0, 0, name))]]
        assert found == "files of photographs were added or removed since the run began; start it again"


def test_the_death_of_a_worker_is_told_in_one_line() -> None:
    def dying(message: str) -> Iterator[Any]:
        raise RuntimeError(message)
        yield

    with pytest.raises(ValueError, match="a process that reads images died"):
        _next(dying("DataLoader worker (pid(s) 7) exited unexpectedly"))
    with pytest.raises(RuntimeError, match="of another kind"):
        _next(dying("of another kind"))


def test_a_damaged_image_is_one_line_with_its_name(photographs: Path, tmp_path: Path) -> None:
    for source in photographs.rglob("*.JPEG"):
        target = tmp_path / source.relative_to(photographs)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    (tmp_path / "n1/7.JPEG").write_bytes((tmp_path / "n1/7.JPEG").read_bytes()[:300])
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"7\.JPEG is not a readable image") as caught:
            some(5, folder(tmp_path), None, 0.0, 0, 4, 1, Place(), Crop(size=32), "cpu", workers, hold=1)
        assert "\n" not in str(caught.value)
        assert not multiprocessing.active_children()  # though the traceback is still there


def test_refusals(photographs: Path, tmp_path: Path) -> None:
    def message(*arguments: Any) -> str:
        with pytest.raises(ValueError) as caught:
            some(1, *arguments)
        return str(caught.value)

    data = Mixture(size=10)
    assert "cannot be shared by 3 processes" in message(data, None, 0.0, 0, 4, 1, Place(0, 3), None, "cpu", 0)
    assert "must be between 0 and 1" in message(data, Mixture(name="more"), 1.0, 0, 4, 1, Place(), None, "cpu", 0)
    other = folder(photographs)
    assert "images differ in" in message(data, other, 0.5, 0, 4, 1, Place(), None, "cpu", 0)
    assert "the crop gives 24x24" in message(other, None, 0.0, 0, 4, 1, Place(), Crop(size=24), "cpu", 0)
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 4, 4), np.uint8), labels=np.zeros(0, int))
    none = Arrays(name="none", file=str(tmp_path / "none.npz"))
    assert message(none, None, 0.0, 0, 4, 1, Place(), None, "cpu", 0) == "dataset none is empty"
    with pytest.raises(ValueError, match="in this order"):
        Crop(size=8, scale=(0.5, 0.1))


def test_global_generators_stay_and_closing_ends_the_workers(photographs: Path, tmp_path: Path) -> None:
    """In a process of its own: when the stream is closed no child is left."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sys\n"
        "from robustbench_diffaug import rng\n"
        "from robustbench_diffaug.data.sources import Folder\n"
        "from robustbench_diffaug.train.parallel import Place\n"
        "from robustbench_diffaug.train.stream import Crop, stream\n"
        "if __name__ == '__main__':\n"
        "    data = Folder(name='p', root=sys.argv[1], resize=40, crop=32)\n"
        "    before = rng.global_states()\n"
        "    found = stream(data, None, 0.0, 0, 4, 1, Place(), Crop(size=32), 'cpu', 2)\n"
        "    next(found)\n"
        "    assert len(multiprocessing.active_children()) == 2\n"
        "    found.close()\n"
        "    assert rng.global_states() == before\n"
        "    assert not multiprocessing.active_children()\n"
    )
    done = subprocess.run([sys.executable, str(script), str(photographs)], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
