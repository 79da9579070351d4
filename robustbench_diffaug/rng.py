"""The only source of randomness: random access to Philox4x64-10, a pure function of a key and a draw index.

The stream is fixed for ever. A key of 128 bits names it; element `e` of draw `d`, of draws with `E` elements, is word
`e % 4` of the Philox block at counter `d * ceil(E / 4) + e // 4` (numpy's convention: the counter is stepped before
each block). The high 52 bits `w` of a word give the uniform `(w + 1/2) / 2**52`, and its inverse normal CDF the
normal. Nothing is rejected, so any draw can be had without the ones before it, on any device.

References:
    Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., SC 2011), https://doi.org/10.1145/2063384.2063405
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from math import prod

import numpy as np
import torch
from scipy.special import ndtri

__all__ = ["global_states", "key", "normal", "permutation", "seeded", "uniform"]

CACHED = 2**14  # normals made at once: their float64 intermediates stay in a core's cache


def key(*parts: object) -> int:
    """A 128-bit key of any values that print, by BLAKE2b of their texts; `key("a", 1)` is always the same number."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")


def uniform(key: int, draws: range, shape: tuple[int, ...]) -> np.ndarray:
    """Uniforms on (0, 1), never 0 or 1.

    Arguments:
        key: The stream, 128 bits.
        draws: Which draws, consecutive.
        shape: The shape of one draw.

    Returns:
        A float64 array of shape (len(draws), *shape).
    """
    size = prod(shape)
    found = _uniforms(_generator(key, draws, size), len(draws), size)
    return found.reshape(len(draws), *shape)


def normal(key: int, draws: range, shape: tuple[int, ...], out: np.ndarray | None = None) -> np.ndarray:
    """Standard normals, the inverse CDF of `uniform`; float32, of shape (len(draws), *shape).

    Arguments:
        key: The stream, 128 bits.
        draws: Which draws, consecutive.
        shape: The shape of one draw.
        out: Where they are written, of that shape; a new array by default.
    """
    size = prod(shape)
    values = np.empty((len(draws), *shape), np.float32) if out is None else out
    generator, step = _generator(key, draws, size), max(1, CACHED // max(1, size))
    for start in range(0, len(draws), step):
        part = values[start : start + step]
        ndtri(_uniforms(generator, len(part), size).reshape(part.shape), out=part, casting="same_kind")
    return values


def _generator(key: int, draws: range, size: int) -> np.random.Philox:
    """What gives the words from the first draw on."""
    return np.random.Philox(key=key, counter=draws.start * -(-size // 4))


def _uniforms(generator: np.random.Philox, count: int, size: int) -> np.ndarray:
    """The uniforms of the next draws, of shape (count, size)."""
    blocks = -(-size // 4)
    words = generator.random_raw(count * blocks * 4).reshape(count, blocks * 4)[:, :size]
    values = (words >> np.uint64(12)).astype(np.float64)
    values += 0.5
    values *= 2.0**-52
    return values


def permutation(key: int, size: int) -> np.ndarray:
    """A uniformly random order of `range(size)`, by sorting `size` uniforms."""
    return np.argsort(uniform(key, range(1), (size,))[0], kind="stable")


def global_states() -> tuple[bytes, str]:
    """Where torch's and numpy's global generators are, to find out who has drawn from them."""
    return torch.random.get_rng_state().numpy().tobytes(), repr(np.random.get_state())


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Runs library code that draws from torch's and numpy's global generators; both are put back afterwards.

    For initialisation, dropout and the like. Evaluators never need it.
    """
    numpy_state = np.random.get_state()
    with torch.random.fork_rng():
        np.random.seed(key % 2**32)
        torch.manual_seed(key % 2**32)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
