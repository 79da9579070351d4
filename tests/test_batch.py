"""Noise belongs to a sample, not to the batch it comes in; networks are called in one shape."""

from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_diffaug import batch as batches
from robustbench_diffaug import rng
from robustbench_diffaug.batch import Batch, Limits, fixed_shape
from robustbench_diffaug.prefetch import ahead

IDS = ("a", "b", "c", "d", "e")
SHAPE = (2, 3, 3)


def batch(ids: tuple[str, ...], budget: int = 512, dataset: str = "m", seed: int = 0) -> Batch:
    return Batch(dataset, ids, torch.zeros(len(ids), *SHAPE), torch.zeros(len(ids)).long(), seed, Limits(budget=budget))


def noise(found: Batch, draws: range, stream: str = "s") -> torch.Tensor:
    return torch.cat(list(found.noise(stream, draws)), dim=1)


@settings(max_examples=40, deadline=None)
@given(st.permutations(IDS), st.integers(1, 5), st.integers(1, 60), st.integers(0, 9), st.integers(1, 9))
def test_a_draw_depends_on_its_sample_and_index_alone(
    order: list[str], size: int, budget: int, start: int, count: int
) -> None:
    whole = noise(batch(IDS), range(20))
    ids, draws = tuple(order[:size]), range(start, start + count)
    expected = whole[[IDS.index(id) for id in ids]][:, start : start + count]
    assert torch.equal(noise(batch(ids, budget), draws), expected)


@pytest.mark.parametrize(("count", "budget"), [(1, 512), (5, 7), (5, 1), (3, 10)])
def test_chunks_stay_within_the_budget(count: int, budget: int) -> None:
    chunks = list(batch(IDS[:count], budget).noise("s", range(11)))
    assert sum(chunk.shape[1] for chunk in chunks) == 11
    assert all(chunk.shape[0] * chunk.shape[1] <= max(budget, count) for chunk in chunks)
    assert all(chunk.shape[2:] == SHAPE and chunk.dtype == torch.float32 for chunk in chunks)


@pytest.mark.parametrize("budget", [1, 7, 512])
def test_threads_change_no_noise(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = list(batch(IDS, budget).noise("s", range(11)))
    used: list[int] = []

    def counted(items: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        used.append(1)
        return ahead(items)

    monkeypatch.setattr(batches, "ahead", counted)
    assert len(list(batch(IDS, budget).noise("s", range(11)))) == len(alone)
    assert not used  # at one thread there is none to spare
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = list(batch(IDS, budget).noise("s", range(11)))
    assert len(used) == (len(alone) > 1)
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 5), st.integers(0, 9)), max_size=4), st.integers(1, 40)
)
def test_streams_follow_each_other(streams: list[tuple[str, int, int]], budget: int) -> None:
    found = batch(IDS, budget)
    asked = [(name, range(start, start + count)) for name, start, count in streams]
    joined, apart = list(found.noises(asked)), [chunk for one in asked for chunk in found.noise(*one)]
    assert len(joined) == len(apart)
    assert all(torch.equal(one, other) for one, other in zip(joined, apart, strict=True))


def test_seeds_streams_datasets_and_samples_have_draws_of_their_own() -> None:
    base = noise(batch(("a",)), range(2))
    others = [
        noise(batch(("b",)), range(2)),
        noise(batch(("a",), dataset="n"), range(2)),
        noise(batch(("a",), seed=1), range(2)),
        noise(batch(("a",)), range(2), "t"),
    ]
    assert not any(bool((base == other).any()) for other in others)
    assert not bool((base[:, 0] == base[:, 1]).any())
    assert torch.equal(
        base[0].double(), torch.from_numpy(rng.normal(rng.key(0, "s", "m", "a"), range(2), SHAPE)).double()
    )


def test_one_uniform_of_each_sample() -> None:
    found = batch(IDS).uniform("s")
    assert found.shape == (5,)
    assert found.dtype == torch.float64
    assert bool(((found > 0) & (found < 1)).all())
    assert torch.equal(batch(IDS[::-1]).uniform("s"), found.flip(0))
    assert not bool((batch(IDS).uniform("s", 1) == found).any())


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 23])
def test_networks_see_one_shape_and_rows_stay_in_place(rows: int) -> None:
    shapes = []

    def network(inputs: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(inputs.shape))
        return inputs.flatten(1) * 2

    inputs = torch.arange(rows * 6.0).reshape(rows, 2, 3)
    assert torch.equal(fixed_shape(network, inputs, 8), inputs.flatten(1) * 2)
    assert set(shapes) == {(8, 2, 3)}
    assert len(shapes) == -(-rows // 8)


def test_in_one_shape_a_row_is_bitwise_the_row_alone() -> None:
    with rng.seeded(1):
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3),
            torch.nn.ReLU(),
            torch.nn.Conv2d(16, 8, 3),
            torch.nn.Flatten(),
            torch.nn.LazyLinear(5),
        )
    images = torch.from_numpy(rng.normal(rng.key("rows"), range(19), (3, 16, 16)))
    with torch.no_grad():
        whole = fixed_shape(network, images, 8)
        assert torch.equal(fixed_shape(network, images.flip(0), 8).flip(0), whole)
        for row in range(19):
            assert torch.equal(fixed_shape(network, images[row : row + 1], 8)[0], whole[row])


def test_gradients_pass() -> None:
    inputs = torch.ones(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(fixed_shape(lambda rows: rows**2, inputs, 2).sum(), inputs)
    assert torch.equal(gradient, torch.full((3, 4), 2.0))
