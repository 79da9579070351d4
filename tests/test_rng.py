"""The random streams: their definition for ever, random access, and their distribution."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri
from scipy.stats import kstest

from robustbench_diffaug import rng

WORD = 2**64 - 1


def philox(counter: int, key: int) -> list[int]:
    """Philox4x64-10 from the paper: ten rounds of two multiplications."""
    c = [counter >> shift & WORD for shift in (0, 64, 128, 192)]
    k = [key & WORD, key >> 64]
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [second >> 64 ^ c[1] ^ k[0], second & WORD, first >> 64 ^ c[3] ^ k[1], first & WORD]
        k = [(k[0] + 0x9E3779B97F4A7C15) & WORD, (k[1] + 0xBB67AE8584CAA73B) & WORD]
    return c


@given(st.integers(0, 2**128 - 1), st.integers(0, 10**6), st.integers(1, 9))
def test_the_stream_is_the_documented_one(key: int, draw: int, size: int) -> None:
    found = rng.uniform(key, range(draw, draw + 2), (size,))
    blocks = -(-size // 4)
    for row in range(2):
        for element in range(size):
            counter = (draw + row) * blocks + element // 4 + 1  # stepped before each block
            word = philox(counter, key)[element % 4]
            assert found[row, element] == ((word >> 12) + 0.5) / 2**52


def test_normals_are_the_inverse_distribution_of_the_uniforms() -> None:
    key = rng.key("normals")
    uniforms = rng.uniform(key, range(3, 7), (2, 5))
    assert np.array_equal(rng.normal(key, range(3, 7), (2, 5)), ndtri(uniforms).astype(np.float32))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**128 - 1), st.integers(0, 9), st.sampled_from([(1, 64, 64), (9000,), (3, 5, 7)]))
def test_normals_made_in_pieces_are_those_made_at_once(key: int, start: int, shape: tuple[int, ...]) -> None:
    draws = range(start, start + 2 * rng.CACHED // int(np.prod(shape)) + 1)  # of any shape more than one piece
    whole = ndtri(rng.uniform(key, draws, shape)).astype(np.float32)
    assert rng.normal(key, draws, shape).tobytes() == whole.tobytes()
    strided = np.zeros((*whole.shape, 2), np.float32)
    assert np.shares_memory(rng.normal(key, draws, shape, out=strided[..., 1]), strided)
    assert np.array_equal(strided[..., 1], whole)
    assert not strided[..., 0].any()


def test_normals_are_fixed_for_ever() -> None:
    # As drawn when the stream was defined, by one call of scipy's ndtri and one rounding.
    golden = ["-0x1.8add5ep-3", "0x1.4c2cd4p+0", "-0x1.71003cp-1", "0x1.73dc1ep-6", "-0x1.e4140ep-3", "0x1.12e126p-5"]
    assert rng.normal(rng.key("fixed"), range(2), (3,)).ravel().tolist() == [*map(float.fromhex, golden)]


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 13))
def test_any_draw_alone_is_the_draw_among_others(start: int, count: int, size: int) -> None:
    whole = rng.uniform(7, range(0, start + count), (size,))
    assert np.array_equal(rng.uniform(7, range(start, start + count), (size,)), whole[start:])


def test_distribution() -> None:
    uniforms = rng.uniform(rng.key("ks"), range(100), (1000,)).ravel()
    assert 0 < uniforms.min() < uniforms.max() < 1
    assert kstest(uniforms, "uniform").pvalue > 1e-3
    normals = rng.normal(rng.key("ks"), range(100), (1000,)).ravel()
    assert kstest(normals.astype(float), "norm").pvalue > 1e-3
    other = rng.normal(rng.key("another"), range(100), (1000,)).ravel()
    assert abs(np.corrcoef(normals, other)[0, 1]) < 0.015


def test_keys_are_fixed_for_ever() -> None:
    assert rng.key("a", 1) == rng.key("a", "1") != rng.key("a1")
    assert rng.key("a", 1) == 0xE6154E11670F14F51F5868BA03B3FEB4


def test_permutations() -> None:
    found = rng.permutation(rng.key("p"), 1000)
    assert sorted(found) == list(range(1000))
    assert list(found) != list(range(1000))
    assert list(rng.permutation(rng.key("p"), 1000)) == list(found)


def test_seeded_is_repeatable_and_puts_the_generators_back() -> None:
    before = rng.global_states()
    draws = []
    for _ in range(2):
        with rng.seeded(rng.key("s")):
            draws.append((float(torch.randn(1)), float(np.random.rand())))  # noqa: TID251
    assert draws[0] == draws[1]
    assert rng.global_states() == before
    np.random.rand()  # noqa: TID251
    assert rng.global_states() != before
