"""Likeness of gradients: what knows no scale, sparsity and roughness by hand; and sure networks' gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustbench_diffaug import rng
from robustbench_diffaug.evaluators.differentiable import rising
from robustbench_diffaug.evaluators.gradients_likeness import cosine, hoyer, roughness, tiles

SHAPE = (1, 8, 8)


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_likeness_knows_no_scale(seed: int) -> None:
    one, other = (torch.from_numpy(rng.normal(seed, range(k, k + 3), SHAPE)) for k in (0, 3))
    for scale in (1e-20, 3.0, 1e20):
        assert torch.allclose(cosine(one * scale, other), cosine(one, other), atol=1e-6)
        assert torch.allclose(hoyer(one * scale), hoyer(one), atol=1e-6)
        assert torch.allclose(roughness(one * scale), roughness(one), rtol=1e-5)
    assert torch.allclose(cosine(one, -one), torch.tensor(-1.0, dtype=torch.float64))
    flat, also = one.double().flatten(1), other.double().flatten(1)
    assert torch.allclose(cosine(one, other), torch.cosine_similarity(flat, also, dim=1), atol=1e-12)


def test_sparsity_and_roughness_by_hand() -> None:
    one = torch.zeros(3, 1, 4, 4)
    one[0, 0, 1, 2], one[1] = 5.0, 2.0
    one[2, 0, :2, :2] = -1.0
    assert torch.allclose(hoyer(one), torch.tensor([1.0, 0.0, (4 - 2) / 3], dtype=torch.float64))
    wave = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).reshape(1, 1, 2, 2)
    assert float(roughness(wave)) == pytest.approx(2 / 1.0) and float(roughness(7 - 3 * wave)) == pytest.approx(2)
    nothing = torch.zeros(1, 1, 4, 4)
    assert all(bool(measure(nothing).isnan().all()) for measure in (hoyer, roughness, lambda z: cosine(z, z)))
    shades = tiles(torch.cat([wave, wave * 0 + 0.3]) * 2 - 1)
    assert shades.tolist() == [[[[0, 255], [0, 255]]], [[[0, 0], [0, 0]]]]


@given(st.integers(0, 2), st.floats(-300, 300), st.floats(-300, 300))
def test_a_network_too_sure_of_itself_still_has_a_gradient(label: int, first: float, second: float) -> None:
    logits = torch.tensor([[first, second, 0.0]], dtype=torch.float64, requires_grad=True)
    found = rising(logits, torch.tensor([label]))
    assert float(found.direction.norm()) == pytest.approx(1, abs=1e-9) and float(found.length) > 0
    (expected,) = torch.autograd.grad(logits.log_softmax(dim=1)[0, label], logits)
    assert torch.allclose(found.direction * found.length, expected, atol=1e-14)
