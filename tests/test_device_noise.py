"""Noise of a GPU: the words of numpy's Philox, bit for bit, and the normals of the host."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_diffaug import device_noise, rng
from robustbench_diffaug.batch import Batch, Limits

CPU = torch.device("cpu")
KEYS = st.integers(0, 2**128 - 1)


def philox(key: int, first: int, count: int) -> np.ndarray:
    """numpy's blocks."""
    return np.random.Philox(key=key, counter=first).random_raw(count * 4).reshape(count, 4)  # noqa: TID251


@settings(max_examples=100, deadline=None)
@given(st.lists(KEYS, min_size=1, max_size=4), st.integers(0, 2**64 - 100), st.integers(1, 40))
def test_words_are_those_of_numpy(keys: list[int], first: int, count: int) -> None:
    found = device_noise.words(keys, first, count, CPU).numpy().view(np.uint64)
    assert np.array_equal(found, np.stack([philox(key, first, count) for key in keys]))


@pytest.mark.parametrize("key", [0, 2**64 - 1, 2**64, 2**127, 2**128 - 1])
@pytest.mark.parametrize("first", [0, 2**31 - 1, 2**32 - 2, 2**63 - 5, 2**64 - 20])
def test_words_at_the_edges_of_limbs(key: int, first: int) -> None:
    found = device_noise.words([key], first, 9, CPU).numpy().view(np.uint64)
    assert np.array_equal(found[0], philox(key, first, 9))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(KEYS, min_size=1, max_size=3),
    st.integers(0, 10**6),
    st.sampled_from([(1,), (5,), (2, 3, 3), (3, 16, 16)]),
)
def test_normals_are_those_of_the_host(keys: list[int], start: int, shape: tuple[int, ...]) -> None:
    draws = range(start, start + 7)
    found = device_noise.normal(keys, draws, shape, CPU)
    expected = torch.from_numpy(np.stack([rng.normal(key, draws, shape) for key in keys]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_of_a_million_normals_none_is_off_by_more_than_the_last_place() -> None:
    found, expected = device_noise.normal([3], range(250), (4000,), CPU)[0], rng.normal(3, range(250), (4000,))
    places = found.numpy().view(np.int32) - expected.view(np.int32).astype(np.int64)
    assert abs(places).max() <= 1
    assert float(expected.min()) < -4.5 < 4.5 < float(expected.max())  # the tails are among them


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = device_noise.normal([1, 2], range(3, 20), (3, 5), CPU)
    for most in (1, 40, 100, 321):
        monkeypatch.setattr(device_noise, "MOST", most)
        assert torch.equal(device_noise.normal([1, 2], range(3, 20), (3, 5), CPU), whole)


def test_batches_on_a_gpu_have_the_noise_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "noise", property(lambda self: "device"))
    images = torch.zeros(3, 2, 5, 5)
    batch = Batch("m", ("a", "b", "c"), images, torch.zeros(3).long(), 0, Limits(budget=7))
    found = torch.cat(list(batch.noise("s", range(1, 8))), dim=1)
    keys = [rng.key(0, "s", "m", id) for id in batch.ids]
    assert torch.equal(found, device_noise.normal(keys, range(1, 8), (2, 5, 5), CPU))
    monkeypatch.undo()
    host = torch.cat(list(batch.noise("s", range(1, 8))), dim=1)
    torch.testing.assert_close(found, host, rtol=1e-6, atol=1e-6)


def test_gpus_make_their_own_noise() -> None:
    assert [Limits(device=device).noise for device in ("cpu", "cuda", "cuda:1")] == ["host", "device", "device"]
