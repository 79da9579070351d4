"""What outputs give away."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.checkpoints.outputs import are_log_probabilities, are_probabilities, odd, same


def logits(count: int = 8, classes: int = 5) -> Tensor:
    return torch.from_numpy(rng.normal(rng.key("outputs"), range(count), (classes,)))


@given(count=st.integers(1, 9), classes=st.integers(2, 12), scale=st.floats(0.1, 50))
def test_what_softmax_gives_is_told_from_what_it_is_given(count: int, classes: int, scale: float) -> None:
    values = scale * logits(count, classes)
    assert are_probabilities(values.softmax(dim=1))
    assert are_log_probabilities(values.log_softmax(dim=1))
    assert not are_probabilities(values.log_softmax(dim=1))
    assert not are_probabilities(values + 2)
    assert not are_log_probabilities(values + 2)


def test_one_row_that_is_none_makes_them_logits() -> None:
    values = logits().softmax(dim=1)
    values[3, 0] += 1e-3
    assert not are_probabilities(values)
    assert are_probabilities(values, torch.bfloat16)


def test_the_same_for_all_images() -> None:
    constant = logits(1).expand(6, -1)
    assert same(constant)
    assert same(torch.zeros(6, 4))
    assert same(constant + 1e-7 * logits(6) / 10)
    assert not same(1e-3 * logits(6))
    assert not same(logits(6))
    assert not same(logits(1))  # one image tells nothing
    moved = constant.clone()
    moved[2, 1] += 1e-3
    assert not same(moved)


def test_what_cannot_be_used_is_refused() -> None:
    assert odd(logits()) == ()
    with pytest.raises(ValueError, match=r"returns probabilities; return logits \(leave the softmax out\)"):
        odd(logits().softmax(dim=1))
    with pytest.raises(ValueError, match="the same for 6 different images"):
        odd(torch.zeros(6, 4))
    (warning,) = odd(logits().log_softmax(dim=1))
    assert "log-probabilities" in warning
