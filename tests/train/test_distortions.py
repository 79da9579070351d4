"""The perturbations of weights and features, each by what defines it."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.train import distortions


def values(*shape: int, key: int = 0) -> Tensor:
    return torch.from_numpy(rng.normal(rng.key("deepaugment", key), range(1), shape)[0])


@given(key=st.integers(0, 2**64), width=st.integers(2, 6))
def test_involutions_undo_themselves(key: int, width: int) -> None:
    weight = values(width, width, 3, 3)
    for change in (
        distortions.flip,
        distortions.mirror,
        distortions.negate,
        distortions.signs,
        distortions.negate_filters,
    ):
        assert torch.equal(change(change(weight, key), key), weight)
    for change in (distortions.holes, distortions.zero_filters):
        assert torch.equal(change(change(weight, key), key), change(weight, key))
    for change in (distortions.turn, distortions.turn_filters):
        turned = weight
        for _ in range(4):
            turned = change(turned, key)
        assert torch.equal(turned, weight)
        assert not torch.equal(change(weight, key), weight)


def test_fixed_kernels_are_the_published_ones() -> None:
    # The kernels of options 4 and 5 of EDSR_distort_imagenet.py in github.com/hendrycks/imagenet-r
    ones = torch.ones(2, 1, 3, 3)
    found = distortions.laplace(ones, 0)
    assert found[1, 0].tolist() == [[0, 1, 0], [1, -4, 1], [0, 1, 0]]
    found = distortions.sharpen(ones, 0)
    assert found[0, 0].tolist() == [[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]]
    weight = values(2, 3, 3, 3)
    assert torch.equal(distortions.sharpen(weight, 0)[..., 1, 1], 8 * weight[..., 1, 1])
    assert not distortions.zero(weight, 0).any()
    # -gelu(1) = -Phi(1)
    assert torch.allclose(distortions.minus_gelu(ones, 0), torch.tensor(-0.8413447))


def test_masks_hit_half() -> None:
    weight = torch.ones(32, 32, 3, 3)
    share = float(distortions.holes(weight, 1).mean())
    assert stats.binomtest(round(share * weight.numel()), weight.numel(), 0.5).pvalue > 1e-4
    signed = distortions.signs(weight, 2)
    assert set(signed.unique().tolist()) == {-1.0, 1.0}
    assert stats.binomtest(int((signed > 0).sum()), weight.numel(), 0.5).pvalue > 1e-4
    either = {len(distortions.signs_or_holes(weight, key).unique()) for key in range(8)}
    assert either == {2}
    assert {float(distortions.signs_or_holes(weight, key).min()) for key in range(8)} == {-1.0, 0.0}


@given(key=st.integers(0, 2**32), most=st.sampled_from([4.0, 8.0]))
def test_scale_and_noise_stay_in_their_ranges(key: int, most: float) -> None:
    weight = values(8, 8, 3, 3)
    ratio = distortions.scale(weight, key, most) / weight
    assert 0.999 <= float(ratio.min()) < float(ratio.max()) <= 1.001 + most
    strength = float(rng.uniform(rng.key(key, "strength"), range(1), ())[0])
    assert float(ratio.max()) == pytest.approx(1 + most * strength, rel=0.05)
    assert float((distortions.noise(weight, key) - weight).abs().max()) == pytest.approx(0.5, abs=0.02)
    size = float(weight.square().mean().sqrt())
    assert float((distortions.own_noise(weight, key) - weight).abs().max()) == pytest.approx(size, rel=0.04)


@given(key=st.integers(0, 2**32), count=st.integers(1, 12))
def test_filters_are_changed_whole_and_with_their_bias(key: int, count: int) -> None:
    weight, bias = 1 + values(8, 3, 3, 3).abs(), torch.arange(1.0, 9.0)
    for change, factor in ((distortions.negate_filters, -1.0), (distortions.zero_filters, 0.0)):
        found, shifted = change(weight, key, share=count), change(bias, key, share=count)
        hit = shifted != bias
        assert 1 <= int(hit.sum()) <= min(8, count)
        assert torch.equal(found[hit], factor * weight[hit])
        assert torch.equal(found[~hit], weight[~hit])
    found = distortions.minus_gelu_filters(weight, key, share=count)
    assert torch.equal(found[hit], -functional.gelu(weight[hit]))
    assert torch.equal(found[~hit], weight[~hit])


def test_half_of_draws_hit_the_expected_share_of_filters() -> None:
    # 32 draws with replacement of 64 filters: each is hit with chance 1 - (63/64)^32
    hits = [int((distortions.negate_filters(torch.ones(64), key) < 0).sum()) for key in range(200)]
    assert np.mean(hits) == pytest.approx(64 * (1 - (63 / 64) ** 32), abs=1)


def test_the_largest_tap_alone_is_kept() -> None:
    weight = values(5, 4, 3, 3)
    found = distortions.largest_tap(weight, 0)
    assert (found != 0).flatten(2).sum(2).eq(1).all()
    assert torch.equal(found.flatten(2).sum(2), weight.flatten(2).amax(2))


def test_kernel_mixes_are_convolutions() -> None:
    weight = values(5, 4, 3, 3)
    shifted = distortions.shift(weight, 3)
    assert all(torch.equal(shifted[:, 0], shifted[:, other]) for other in range(1, 4))  # one sum for all channels
    single = torch.zeros(1, 4, 3, 3)
    single[0, 2, 1, 1] = 7.0  # one tap stays one tap, moved, of either sign
    moved = distortions.shift(single, 3)[0, 0]
    assert int((moved != 0).sum()) == 1
    assert float(moved.abs().sum()) == 7.0
    middle = torch.zeros(4, 4, 3, 3)
    middle[range(4), range(4), 1, 1] = 1.0  # the response to a single tap is the kernel, mirrored
    kernel = distortions.dirichlet(middle, 5).flatten(2)
    assert torch.allclose(kernel.sum(2), torch.ones(4, 4), atol=1e-5)
    assert float(kernel.min()) >= 0
    assert float(distortions.mix(middle, 5).min()) >= -1 / 6 - 1e-6
    assert float(distortions.mix(middle, 5).max()) <= 1 / 6
    alike = distortions.dirichlet_alike(weight, 5)
    assert float(alike.norm()) == pytest.approx(float(weight.norm()), rel=1e-5)
    ratio = alike / distortions.dirichlet(weight, 5)
    assert float(ratio.std() / ratio.mean()) < 1e-4


def test_dirichlet_taps_have_their_marginal_distribution() -> None:
    middle = torch.zeros(40, 40, 3, 3)
    middle[range(40), range(40), 1, 1] = 1.0
    taps = distortions.dirichlet(middle, 9).flatten(2)[..., 4].flatten()
    # A tap of Dirichlet(0.1 x 9) is Beta(0.1, 0.8); float32 cannot hold the smallest
    kept = taps[taps > 1e-6].double().numpy()
    law = stats.beta(0.1, 0.8)
    assert stats.kstest(law.cdf(kept), stats.uniform(law.cdf(1e-6), 1 - law.cdf(1e-6)).cdf).pvalue > 1e-3
    assert len(kept) / len(taps) == pytest.approx(1 - law.cdf(1e-6), abs=0.05)


@given(key=st.integers(0, 2**32), channels=st.sampled_from([1, 4, 16]))
def test_features_keep_shape_and_what_they_must(key: int, channels: int) -> None:
    features, start = values(channels, 6, 5), values(channels, 6, 5, key=1)
    for name in distortions.__all__:
        function = getattr(distortions, name)
        if not (inspect.isfunction(function) and "start" in inspect.signature(function).parameters):
            continue
        before = features.clone()
        found = function(features, key, start)
        assert found.shape == features.shape
        assert torch.equal(features, before), name  # the argument is not changed
        assert torch.equal(found, function(features, key, start)), name
    assert torch.equal(distortions.bypass(features, key, start), start)
    assert torch.equal(distortions.negate_features(features, key, start), -features)
    assert torch.equal(distortions.wave(features, key, start), torch.sin(features))
    for change in (distortions.flip_features, distortions.flip_in_space):
        assert torch.equal(change(change(features, key, start), key, start), features)
        assert torch.equal(
            change(features, key, start).sort(0).values.flatten().sort().values, features.flatten().sort().values
        )
    activated = distortions.activate(features, key, start)
    assert torch.equal(activated, functional.relu(features)) or torch.equal(activated, functional.gelu(features))
    permuted = distortions.permute_channels(features, key, start)
    assert torch.equal(permuted[10:], features[10:])
    assert torch.equal(permuted.sort(0).values, features.sort(0).values)


def test_feature_masks_have_their_shares() -> None:
    ones = torch.ones(20, 40, 40)
    for change, low, chance in (
        (distortions.drop, 0.0, 0.05),
        (distortions.negate_some, -1.0, 0.025),
        (distortions.holes_in_space, 0.0, 0.2),
        (distortions.negate_in_space, -1.0, 0.1),
    ):
        found = change(ones, 4, ones)
        assert set(found.unique().tolist()) == {low, 1.0}
        places = found[:1] if "space" in change.__name__ else found
        assert stats.binomtest(int((places == low).sum()), places.numel(), chance).pvalue > 1e-4
        if "space" in change.__name__:
            assert torch.equal(found, found[:1].expand_as(found))


def test_channels_take_each_others_place() -> None:
    features = torch.arange(64.0)[:, None, None].expand(64, 2, 2)
    found = distortions.copy_channels(features, 1, features)
    changed = int((found[:, 0, 0] != features[:, 0, 0]).sum())
    assert 1 <= changed <= 5
    assert set(found.unique().tolist()) <= set(features.unique().tolist())
    few = torch.arange(8.0)[:, None, None].expand(8, 2, 2)
    assert max(int((distortions.copy_channels(few, key, few) != few)[:, 0, 0].sum()) for key in range(20)) == 1
    flipped = distortions.flip_some_channels(values(16, 4, 4), 1, few)
    whole = (flipped == values(16, 4, 4)).flatten(1).all(1)
    assert 11 <= int(whole.sum()) < 16


def test_kernels_of_features_are_near_the_identity() -> None:
    point = torch.zeros(16, 7, 7)
    point[3, 3, 3] = 1.0
    assert float((distortions.blend(point, 1, point) - point).abs().max()) <= 0.1
    added = distortions.add_neighbours(point, 1, point) - point
    assert set(added.unique().tolist()) <= {0.0, 1.0}
    shifted = distortions.shift_channels(point, 1, point)
    assert float(shifted.sum()) == 1.0
    assert float(shifted[3, 2:5, 2:5].sum()) == 1.0


def test_bits_are_drawn_by_their_chance() -> None:
    for level in (-0.5, 0.0, 0.8):
        bits = distortions.binarise(torch.full((8, 30, 30), level), 5, torch.zeros(1))
        assert set(bits.unique().tolist()) == {-1.0, 1.0}
        assert stats.binomtest(int((bits > 0).sum()), bits.numel(), (1 + level) / 2).pvalue > 1e-4
    bits = distortions.binarise(torch.zeros(8, 30, 30), 5, torch.zeros(1))
    found = distortions.amplify_bits(bits, 5, torch.zeros(1))
    assert torch.equal(found[bits < 0], bits[bits < 0])  # a zero stays a zero
    # b (3 + 4 u r) is in [3, 7], hence 2 b - 1 in [5, 13]
    assert 5 <= float(found[bits > 0].min()) < float(found[bits > 0].max()) <= 13
