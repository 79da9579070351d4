"""What the outputs of a classifier give away: that they are probabilities, or the same for every image."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["ROUNDING", "are_log_probabilities", "are_probabilities", "odd", "same"]

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""How far the probabilities of an image may add up beside 1, by the precision of the network."""


def are_probabilities(outputs: Float[Tensor, "n k"], dtype: torch.dtype = torch.float32) -> bool:
    """Whether every row is at least 0 and adds up to 1, of two classes or more.

    Arguments:
        outputs: Of some images.
        dtype: Of the network's arithmetic, for the tolerance.
    """
    values = outputs.detach().double()
    sums_up = (values.sum(dim=1) - 1).abs() < ROUNDING.get(dtype, 1e-4)
    return values.shape[1] > 1 and bool(sums_up.all()) and bool((values >= 0).all())


def are_log_probabilities(outputs: Float[Tensor, "n k"], dtype: torch.dtype = torch.float32) -> bool:
    """Whether the exponentials of the outputs are probabilities; `argmax` and `softmax` are then those of logits."""
    return are_probabilities(outputs.detach().double().exp(), dtype)


def same(outputs: Float[Tensor, "n k"]) -> bool:
    """Whether all rows, of two or more, are equal but for rounding: `max - min <= 1e-6 max|outputs|`."""
    values = outputs.detach().double()
    spread = values.amax(dim=0) - values.amin(dim=0)
    return len(values) > 1 and bool(spread.amax() <= 1e-6 * values.abs().amax())


def odd(outputs: Float[Tensor, "n k"], dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """What is odd of the outputs of different images, though they can be used.

    Arguments:
        outputs: Finite ones, of different images.
        dtype: Of the network's arithmetic.

    Raises:
        ValueError: If they cannot be used: they are probabilities, or the same for all images.
    """
    if are_probabilities(outputs, dtype):
        raise ValueError("the network returns probabilities; return logits (leave the softmax out)")
    if same(outputs) and outputs.shape[1] > 1:
        raise ValueError(
            f"the network returns the same for {len(outputs)} different images, which is broken; are its weights those "
            "that it was trained to?"
        )
    if are_log_probabilities(outputs, dtype):
        return ("the network returns log-probabilities; they are taken as logits, whose softmax is the same",)
    return ()
