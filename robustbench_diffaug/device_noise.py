"""The streams of `rng` computed where the images are: Philox4x64-10 in torch's integers, for a GPU.

Words are those of `rng` bit for bit. Normals may differ by some units in the last place of a float64, where the inverse
CDF is another implementation, before they are rounded to float32.

torch has no unsigned 64-bit arithmetic. Here an int64 holds the bits of a word: sums and products wrap as unsigned ones
do, shifts to the right are followed by a mask, and the high half of a product is put together from 32-bit limbs.

References:
    Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., SC 2011), https://doi.org/10.1145/2063384.2063405
"""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["normal", "words"]

ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)  # of the two halves of a key, from round to round
LOW = 2**32 - 1
MOST = 2**22  # numbers made at once: the intermediate tensors of more would fill a GPU


def words(keys: Sequence[int], first: int, count: int, device: torch.device) -> Int[Tensor, "b count 4"]:
    """The Philox blocks of some streams that numpy's generator gives from a counter on, as the bits of int64.

    Arguments:
        keys: The streams, 128 bits each.
        first: The counter, which is stepped before each block (numpy's convention); below 2^64 - count.
        count: The number of blocks.
        device: Where.
    """
    schedule = _schedule(keys).to(device)[..., None]
    zero = torch.zeros(len(keys), count, dtype=torch.int64, device=device)
    a, b, c, d = zero + (torch.arange(count, device=device) + _signed(first + 1)), zero, zero, zero
    for one, two in schedule:
        (high, low), (high2, low2) = _product(a, MULTIPLIERS[0]), _product(c, MULTIPLIERS[1])
        a, b, c, d = high2 ^ b ^ one, low2, high ^ d ^ two, low
    return torch.stack([a, b, c, d], dim=-1)


def normal(
    keys: Sequence[int], draws: range, shape: tuple[int, ...], device: torch.device
) -> Float[Tensor, "b d *shape"]:
    """`rng.normal` of each key, to 1e-6; float32.

    Arguments:
        keys: The streams, 128 bits each.
        draws: Which draws, consecutive.
        shape: The shape of one draw.
        device: Where.
    """
    size = prod(shape)
    blocks = -(-size // 4)
    values = torch.empty(len(keys), len(draws), size, device=device)
    step = max(1, MOST // (len(keys) * blocks * 4))
    for start in range(0, len(draws), step):
        count = min(step, len(draws) - start)
        found = words(keys, (draws.start + start) * blocks, count * blocks, device)
        found = found.reshape(len(keys), count, blocks * 4)[:, :, :size]
        uniforms = ((found >> 12 & (2**52 - 1)).double() + 0.5) * 2.0**-52
        values[:, start : start + count] = torch.special.ndtri(uniforms)
    return values.reshape(len(keys), len(draws), *shape)


def _schedule(keys: Sequence[int]) -> Int[Tensor, "rounds 2 b"]:
    """Both halves of each key as every round sees them."""
    rounds = [
        [[_signed((key >> 64 * half) + number * STEPS[half]) for key in keys] for half in (0, 1)]
        for number in range(ROUNDS)
    ]
    return torch.tensor(rounds, dtype=torch.int64)


def _product(values: Int[Tensor, "b n"], factor: int) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """The high and the low word of a product of 64-bit words."""
    low, high = values & LOW, values >> 32 & LOW
    factor_low, factor_high = factor & LOW, factor >> 32
    cross, other = high * factor_low, low * factor_high
    carry = (low * factor_low >> 32 & LOW) + (cross & LOW) + (other & LOW)
    upper = high * factor_high + (cross >> 32 & LOW) + (other >> 32 & LOW) + (carry >> 32)
    return upper, values * _signed(factor)


def _signed(word: int) -> int:
    """The int64 with the low 64 bits of a number."""
    return (word & 2**64 - 1 ^ 2**63) - 2**63
