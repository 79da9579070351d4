"""Patches: cut from what scikit-image and scikit-learn themselves return, disjoint, none flat but for a reason."""

from collections import defaultdict
from importlib.machinery import ModuleSpec
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

from robustbench_diffaug.data import photographs
from robustbench_diffaug.data.photographs import Patches, Source
from robustbench_diffaug.testing import check_dataset

READERS: Any = data  # partly annotated
BY_READER = {
    "china": lambda: load_sample_image("china.jpg"),
    "flower": lambda: load_sample_image("flower.jpg"),
    "chelsea": READERS.chelsea,
    "clock_motion": READERS.clock,
    "motorcycle_left": lambda: READERS.stereo_motorcycle()[0],
}


def whole(name: str) -> np.ndarray:
    """A photograph as the package that carries it reads it, in colours."""
    found = BY_READER.get(name, getattr(READERS, name, None))
    assert found is not None
    return np.array(Image.fromarray(found()).convert("RGB"))


def corners(ids: list[str]) -> dict[str, list[tuple[int, int]]]:
    found = defaultdict(list)
    for id in ids:
        name, y, x = id.rsplit("-", 2)
        found[name].append((int(y), int(x)))
    return found


@pytest.mark.parametrize("source", ["photographs", "textures"])
def test_patches_are_what_the_packages_readers_return(source: Source) -> None:
    """Every crop in both modes, pixel by pixel; and every cell of a grid that is left out is flat."""
    colour, grey = Patches(source=source, mode="RGB"), Patches(source=source)
    ids = list(colour.opened().ids)
    assert ids == list(grey.opened().ids) and len(set(ids)) == len(ids)
    pixels, labels = colour.opened().read(range(len(ids)))
    greys = grey.opened().read(range(len(ids)))[0]
    assert pixels.shape[1:] == (3, 32, 32) and greys.shape[1:] == (1, 32, 32)
    assert set(labels.tolist()) == {-1}
    at = {id: row for row, id in enumerate(ids)}
    places = corners(ids)
    assert len(places) == {"photographs": 13, "textures": 3}[source]
    for name, taken in places.items():
        image = whole(name)
        shade = np.array(Image.fromarray(image).convert("L")) / 255
        height, width = shade.shape
        ((top, left),) = {(y % 32, x % 32) for y, x in taken}
        kept = set(taken)
        for y in range(top, height - 31, 32):
            for x in range(left, width - 31, 32):
                cell = shade[y : y + 32, x : x + 32]
                if (y, x) in kept:
                    row = at[f"{name}-{y}-{x}"]
                    assert np.array_equal(pixels[row].permute(1, 2, 0).numpy() * 255, image[y : y + 32, x : x + 32])
                    assert np.allclose(greys[row, 0].numpy(), cell, atol=1e-6)
                    assert cell.std() >= 0.05 - 1e-6
                else:
                    assert cell.std() < 0.05 + 1e-6
        assert (height - top) // 32 == height // 32 and (width - left) // 32 == width // 32  # as many as there can be


def test_no_two_patches_overlap() -> None:
    for taken in corners(list(Patches(source="photographs", draw=3).opened().ids)).values():
        assert all(abs(y - v) >= 32 or abs(x - u) >= 32 for (y, x), (v, u) in combinations(taken, 2))


def test_limits_take_as_many_of_each_photograph() -> None:
    dataset = Patches(source="photographs", limit=130)
    source = dataset.opened()
    counts = {name: len(taken) for name, taken in corners([source.ids[row] for row in dataset.rows()]).items()}
    assert set(counts.values()) == {10} and len(counts) == 13
    assert Patches(source="photographs").available() >= 2000
    assert Patches(source="textures").available() >= 750


def test_another_draw_is_another_order_of_other_cells() -> None:
    first, second = Patches(source="photographs"), Patches(source="photographs", draw=1)
    assert first.contents() != second.contents()
    assert first.fingerprint != second.fingerprint
    assert list(first.opened().ids[:20]) != list(second.opened().ids[:20])
    assert len(set(first.opened().ids) & set(second.opened().ids)) < 0.4 * first.available()


def test_flat_cells_are_left_out_of_a_made_up_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    """64x100 pixels hold six cells; one is white throughout, the others are stripes."""
    stripes = np.zeros((64, 100), np.uint8)
    stripes[:, ::2] = 255
    stripes[:32, :40] = 255
    monkeypatch.setattr(photographs, "_photograph", lambda _: Image.fromarray(stripes).convert("RGB"))
    monkeypatch.setattr(photographs, "SOURCES", {"textures": ("made/up.png",)})
    ids, pixels = photographs._crops.__wrapped__("textures", "L", 0)
    assert len(ids) == 5 and {id.split("-")[0] for id in ids} == {"up"}
    assert not any(id.startswith("up-0-") and int(id.split("-")[2]) < 8 for id in ids)
    assert torch.all(pixels.std((1, 2, 3)) > 0.05)


@pytest.mark.parametrize("found", [None, ModuleSpec("skimage", None, origin="/nowhere/__init__.py")])
def test_missing_files_are_named(found: ModuleSpec | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "find_spec", lambda _: found)
    with pytest.raises(ValueError, match=r"scikit-image has no data/moon\.png; .*pip install scikit-image"):
        photographs._photograph("skimage/data/moon.png")


def test_patches_keep_the_promises_of_datasets() -> None:
    check_dataset(Patches(source="textures"))
    check_dataset(Patches(source="photographs", mode="RGB", draw=2))
