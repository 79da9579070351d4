"""AugMix: every operation against PIL, whole mixes against a reading of the published code, its loss against numpy."""

import math
import platform
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from robustbench_diffaug import rng
from robustbench_diffaug.train.augmix import OPERATIONS, PUBLISHED, AugMix, augmix, draw, jensen_shannon, operate
from robustbench_diffaug.train.samples import Samples

BILINEAR, AFFINE = Image.Resampling.BILINEAR, Image.Transform.AFFINE
FUSES = platform.machine().lower() not in ("x86_64", "amd64")
"""Where PIL's compiler may fuse products and sums, a bilinear grey can round to its neighbour."""

# Of google-research/augmix at 9b9824c7 (Apache-2.0): its `augmentations_all` run under Pillow 13.0.0 on the images of
# `pattern`, IMAGE_SIZE = 16, with sample_level fixed to the first number and the sign to the second. What follows is
# the sum and the CRC-32 of the bytes that came out, for three channels and for the first of them alone.
GOLDEN = [
    ("autocontrast", 2.7, False, 99250, 1460446479, 34305, 2597959590),
    ("equalize", 2.7, False, 97610, 936287772, 32613, 626307703),
    ("posterize", 2.7, False, 87552, 207430535, 30336, 2016329856),
    ("rotate", 2.7, False, 94692, 1293420165, 32894, 4089540592),
    ("solarize", 2.7, False, 65948, 3544124925, 22317, 1514342141),
    ("shear_x", 2.7, False, 96761, 294812315, 33493, 2636416226),
    ("shear_y", 2.7, False, 95000, 4001270861, 32709, 2719150420),
    ("translate_x", 2.7, False, 95352, 3281271535, 33464, 2185670093),
    ("translate_y", 2.7, False, 94408, 825355632, 32744, 3299457244),
    ("color", 2.7, False, 95124, 1163568248, 34304, 4290677984),
    ("contrast", 2.7, False, 95020, 1799209455, 34177, 1495689576),
    ("brightness", 2.7, False, 57823, 3763855826, 19976, 162581830),
    ("sharpness", 2.7, False, 99037, 1210248840, 34222, 863720958),
    ("rotate", 8.3, True, 87690, 46466563, 30807, 2628020513),
    ("shear_x", 8.3, True, 86035, 4030725885, 30109, 4016581183),
    ("shear_y", 8.3, True, 85056, 2068382465, 29706, 1885677330),
    ("translate_x", 8.3, True, 70528, 2377849411, 23808, 545750706),
    ("translate_y", 8.3, True, 73152, 384392981, 25088, 2140641475),
]


def by_pil(name: str, image: Image.Image, level: float, negative: bool) -> Image.Image:
    """One operation as the published code calls it, with its level and sign from outside, for any size."""
    size, sign = image.size, -1 if negative else 1
    shear, factor = sign * level * 0.3 / 10, level * 1.8 / 10 + 0.1
    right, down = (sign * int(level * (side / 3) / 10) for side in size)
    calls: dict[str, Callable[[], Image.Image]] = {
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "posterize": lambda: ImageOps.posterize(image, 4 - int(level * 4 / 10)),
        "rotate": lambda: image.rotate(sign * int(level * 30 / 10), resample=BILINEAR),
        "solarize": lambda: ImageOps.solarize(image, 256 - int(level * 256 / 10)),
        "shear_x": lambda: image.transform(size, AFFINE, (1, shear, 0, 0, 1, 0), resample=BILINEAR),
        "shear_y": lambda: image.transform(size, AFFINE, (1, 0, 0, shear, 1, 0), resample=BILINEAR),
        "translate_x": lambda: image.transform(size, AFFINE, (1, 0, right, 0, 1, 0), resample=BILINEAR),
        "translate_y": lambda: image.transform(size, AFFINE, (1, 0, 0, 0, 1, down), resample=BILINEAR),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
    }
    return calls[name]()


def to_pil(image: np.ndarray) -> Image.Image:
    """Of an array (channels, height, width)."""
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def from_pil(image: Image.Image) -> np.ndarray:
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def by_us(name: str, images: np.ndarray, levels: list[float], negative: list[bool]) -> np.ndarray:
    positions = np.full(len(images), list(OPERATIONS).index(name))
    after = operate(torch.from_numpy(images), positions, np.array(levels), np.array(negative))
    return after.numpy()


def greys(name: str, shape: tuple[int, ...], low: int = 0, high: int = 255) -> np.ndarray:
    chance = rng.uniform(rng.key("test augmix", name), range(1), shape)[0]
    return np.asarray(low + np.floor(chance * (high - low + 1)), dtype=np.uint8)


def pattern() -> np.ndarray:
    y, x = np.mgrid[:16, :16]
    channels = [(x * 13 + y * 7) % 256, (x * x + 5 * y) % 256, (200 - 9 * x + y * y // 2) % 256]
    return np.stack(channels).astype(np.uint8)


def some(count: int = 6, channels: int = 1, size: int = 32) -> Samples:
    images = torch.from_numpy(greys("samples", (count, channels, size, size))).float() / 255
    return Samples(images, torch.arange(count) % 4, [(0, 0, f"{row}") for row in range(count)])


def many(count: int = 4000) -> Samples:
    return Samples(torch.zeros(count, 1, 1, 1), torch.zeros(count).long(), [(1, 2, row) for row in range(count)])


def assert_same(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    if FUSES and name in ("rotate", "shear_x", "shear_y"):
        away = np.abs(found.astype(int) - expected)
        assert away.max(initial=0) <= 1
        assert (away > 0).mean() < 0.01
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", OPERATIONS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_operations_are_those_of_pil(name: str, data: st.DataObject) -> None:
    count, channels = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 3]))
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    low, high = sorted(data.draw(st.tuples(st.integers(0, 255), st.integers(0, 255))))
    levels = [data.draw(st.floats(0.0, 9.999)) for _ in range(count)]
    negative = [data.draw(st.booleans()) for _ in range(count)]
    images = greys(str(data.draw(st.integers(0, 9))), (count, channels, height, width), low, high)
    found = by_us(name, images, levels, negative)
    for row in range(count):
        expected = from_pil(by_pil(name, to_pil(images[row]), levels[row], negative[row]))
        assert_same(name, found[row], expected)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_operations_on_flat_and_odd_images(name: str, channels: int) -> None:
    def image(value: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        y, x = np.mgrid[:32, :32]
        return np.stack([np.broadcast_to(value(y + c, x), (32, 32)) for c in range(channels)]).astype(np.uint8)

    flat = [image(lambda y, x, grey=grey: x * 0 + grey) for grey in (0, 1, 127, 255)]  # type: ignore[misc]
    odd = [
        image(lambda y, x: (x == 16) * 255),  # a line
        image(lambda y, x: (y < 3) * 7 + 200),  # two greys
        image(lambda y, x: (y > 3) * 5 + 250),  # too few below the brightest for PIL to move them
        image(lambda y, x: (x + y) % 2 * 255),  # a chessboard
        image(lambda y, x: x * 8 + (y == 5) * 3),  # a ramp
        image(lambda y, x: np.minimum(x * x, 255)),  # so many of the brightest that PIL's table passes 255
    ]
    images = np.stack(flat + odd)
    for level in (0.1, 1.0, 3.0, 5.0, 9.99):
        for negative in (False, True):
            found = by_us(name, images, [level] * len(images), [negative] * len(images))
            for row in range(len(images)):
                assert_same(name, found[row], from_pil(by_pil(name, to_pil(images[row]), level, negative)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_round_levels_on_every_grey(name: str) -> None:
    """Where products meet whole numbers, and where a shear takes a pixel from the very edge (level 20 / 3)."""
    levels = [*(step / 10 for step in range(1, 100)), 20 / 3]
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    found = by_us(name, np.stack([image] * 100), levels, [False] * 100)
    for row, level in enumerate(levels):
        assert_same(name, found[row], from_pil(by_pil(name, to_pil(image), level, False)))


@pytest.mark.parametrize(("name", "level", "negative", *"abcd"), GOLDEN, ids=[f"{row[0]}-{row[1]}" for row in GOLDEN])
def test_golden_numbers(name: str, level: float, negative: bool, a: int, b: int, c: int, d: int) -> None:
    for images, total, digest in ((pattern()[None], a, b), (pattern()[None, :1], c, d)):
        found = by_us(name, images, [level], [negative])[0]
        if FUSES and name in ("rotate", "shear_x", "shear_y"):
            assert abs(int(found.sum(dtype=int)) - total) < 10
        else:
            assert int(found.sum(dtype=int)) == total
            assert zlib.crc32(found.transpose(1, 2, 0).tobytes()) == digest


def test_an_image_keeps_its_own_parameters_and_may_have_no_operation() -> None:
    names = [*OPERATIONS, *OPERATIONS]
    images = greys("mixed", (len(names) + 1, 3, 12, 9))
    positions = np.array([list(OPERATIONS).index(name) for name in names] + [-1])
    levels, negative = np.linspace(0.1, 9.9, len(positions)), np.arange(len(positions)) % 2 == 0
    before = images.copy()
    found = operate(torch.from_numpy(images), positions, levels, negative).numpy()
    for row, name in enumerate(names):
        expected = from_pil(by_pil(name, to_pil(images[row]), levels[row], negative[row]))
        assert_same(name, found[row], expected)
    np.testing.assert_array_equal(found[-1], images[-1])
    np.testing.assert_array_equal(images, before)


def published(image: np.ndarray, chance: np.ndarray, term: AugMix) -> np.ndarray:
    """`aug` of the published code's cifar.py for one image in 8 bits, its chance from outside; alpha is 1."""
    known, steps = list(OPERATIONS)[: 13 if term.all_ops else 9], term.depth or 3
    numbers = iter(chance.tolist())
    m = np.float32(next(numbers))  # Beta(1, 1) is uniform
    exponentials, mixed = [], []
    for _ in range(term.width):
        exponentials.append(-math.log1p(-next(numbers)))
        chosen = next(numbers)
        depth, chain = term.depth or (1 if chosen < 1 / 3 else 2 if chosen < 2 / 3 else 3), to_pil(image)
        for step in range(steps):
            operation, level, sign = next(numbers), next(numbers), next(numbers)
            if step < depth:
                amount = 0.1 + (term.severity - 0.1) * level
                chain = by_pil(known[int(operation * len(known))], chain, amount, sign > 0.5)
        mixed.append(from_pil(chain).astype(np.float32) / 255)
    weights = np.array(exponentials) / sum(exponentials)
    mix = sum(w * x for w, x in zip(weights.astype(np.float32), mixed, strict=True))
    result: np.ndarray = (1 - m) * image.astype(np.float32) / 255 + m * mix
    return result


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "term",
    [AugMix(), AugMix(severity=1), AugMix(all_ops=True, severity=10), AugMix(width=1, depth=5), AugMix(width=4)],
    ids=["cifar", "imagenet", "all", "deep", "wide"],
)
def test_augmix_is_the_published_mix(term: AugMix, channels: int) -> None:
    samples = some(12, channels)
    found = augmix(samples, samples.images, term, "first").numpy()
    count = 1 + term.width * (2 + 3 * (term.depth or 3))
    for row in range(12):
        chance = rng.uniform(rng.key("augmix/first", 0, 0, str(row)), range(1), (count,))[0]
        image = (samples.images[row].numpy() * 255).round().astype(np.uint8)
        np.testing.assert_allclose(found[row], published(image, chance, term), atol=0.004 if FUSES else 1e-6)
    assert found.min() >= 0 and found.max() <= 1 + 1e-6


def test_the_image_itself_is_mixed_unrounded() -> None:
    samples, term = some(8), AugMix()
    shifted = (samples.images * 0.9 + 0.0004).clamp(0, 1)  # as an affine augmentation leaves it
    share = torch.from_numpy(draw(samples, term, "a").share)[:, None, None, None]
    rounded = (shifted * 255).round() / 255
    away = augmix(samples, shifted, term, "a") - augmix(samples, rounded, term, "a")
    assert torch.allclose(away, (1 - share) * (shifted - rounded), atol=1e-6)
    assert float(away.abs().max()) > 1e-4


def test_a_sample_does_not_depend_on_its_batch() -> None:
    samples, term = some(9, 3), AugMix(all_ops=True)
    whole = augmix(samples, samples.images, term, "a")
    for rows in ([0], [8], [4, 2], [8, 7, 6, 5, 4, 3, 2, 1, 0], [1, 1, 5]):
        part = Samples(samples.images[rows], samples.labels[rows], [samples.keys[row] for row in rows])
        assert torch.equal(augmix(part, part.images, term, "a"), whole[rows])
        packed = part.images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(augmix(part, packed, term, "a"), whole[rows])


def test_streams_and_keys_are_other_draws() -> None:
    samples, term = some(), AugMix()
    first = augmix(samples, samples.images, term, "first")
    assert torch.equal(first, augmix(samples, samples.images, term, "first"))
    later = Samples(samples.images, samples.labels, [(0, 1, f"{row}") for row in range(6)])
    for other in (augmix(samples, samples.images, term, "second"), augmix(later, samples.images, term, "first")):
        assert all(not torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("width", [1, 3])
def test_moments_of_the_weights(alpha: float, width: int) -> None:
    drawn = draw(many(), AugMix(alpha=alpha, width=width), "a")
    np.testing.assert_allclose(drawn.weights.sum(1), 1, atol=1e-6)
    assert drawn.weights.min() >= 0 and drawn.share.min() >= 0 and drawn.share.max() <= 1
    # Dirichlet: mean 1/k, variance (1/k)(1 - 1/k)/(k alpha + 1). Beta: mean 1/2, variance 1/(4 (2 alpha + 1)).
    for values, mean, spread in (
        *((drawn.weights[:, i], 1 / width, (1 - 1 / width) / width / (width * alpha + 1)) for i in range(width)),
        (drawn.share, 0.5, 1 / (4 * (2 * alpha + 1))),
    ):
        assert abs(values.mean() - mean) <= 5 * math.sqrt(spread / 4000) + 1e-6
        assert values.var() == pytest.approx(spread, rel=0.12, abs=1e-6)
    if width == 3:  # covariance -1/(k^2 (k alpha + 1))
        found = np.cov(drawn.weights[:, 0], drawn.weights[:, 1])[0, 1]
        assert found == pytest.approx(-1 / (9 * (3 * alpha + 1)), rel=0.2)
        assert abs(np.corrcoef(drawn.weights[:, 0], drawn.share)[0, 1]) < 5 / math.sqrt(4000)


@pytest.mark.parametrize(("term", "known"), [(AugMix(severity=1), 9), (AugMix(severity=10, all_ops=True), 13)])
def test_operations_levels_signs_and_depths_are_uniform(term: AugMix, known: int) -> None:
    drawn = draw(many(), term, "a")
    ended = drawn.operations == -1
    assert not ended[..., 0].any()
    assert not (ended[..., 1] & ~ended[..., 2]).any()
    assert_even(np.bincount((~ended).sum(2).ravel(), minlength=4)[1:])
    assert_even(np.bincount(drawn.operations[~ended], minlength=known))
    assert drawn.levels.min() >= 0.1 and drawn.levels.max() < term.severity
    assert_even(np.histogram(drawn.levels, 10, (0.1, term.severity))[0])
    assert_even(np.bincount(drawn.negative.ravel().astype(int)))


def assert_even(counts: np.ndarray) -> None:
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1  # chi-square; 5 deviations and a little for its skewness
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom) + 8


@pytest.mark.parametrize("depth", [1, 5])
def test_a_fixed_depth_is_the_depth_of_all_chains(depth: int) -> None:
    drawn = draw(some(), AugMix(depth=depth, width=2), "a")
    assert drawn.operations.shape == (6, 2, depth)
    assert drawn.operations.min() >= 0


def test_severity_bounds_how_far_an_image_moves() -> None:
    """At the published severity of ImageNet a shift is at most a thirtieth of the image, a turn 2 degrees."""
    image = np.zeros((1, 1, 60, 60), np.uint8)
    image[..., 30, 30] = 255
    drawn = draw(many(30), AugMix(severity=1), "a")
    levels, negative = drawn.levels.ravel().tolist(), drawn.negative.ravel().tolist()
    for name in ("translate_x", "translate_y"):
        _, _, y, x = np.nonzero(by_us(name, np.repeat(image, len(levels), 0), levels, negative))
        assert len(y) == len(levels)
        assert {*(y - 30), *(x - 30)} == {-1, 0, 1}
    turned = by_us("rotate", np.repeat(image, 2, 0), [0.999, 0.3], [False, True])
    assert turned[0, 0, 29:32, 29:32].sum() > 200
    np.testing.assert_array_equal(turned[1], image[0])  # less than a degree is none


def test_everything_stays_on_the_device_of_the_images() -> None:
    class Elsewhere(Samples):
        def uniform(self, stream: str, count: int) -> torch.Tensor:
            return some().uniform(stream, count)

    images = torch.empty(6, 3, 8, 8, device="meta")
    samples = Elsewhere(images, torch.arange(6), some().keys)
    mixed = augmix(samples, images, AugMix(all_ops=True, width=8), "a")
    assert mixed.device.type == "meta" and mixed.shape == images.shape


# Of the same repository's cifar.py, its three lines that compute the loss without the factor 12, torch 2.13.0.
LOGITS = [
    [[1.0, 2.0, -1.0, 0.5], [0.0, 0.0, 3.0, -2.0]],
    [[0.5, 1.0, 0.0, 0.5], [2.0, -1.0, 1.0, 0.0]],
    [[-1.0, 3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]],
]


@pytest.mark.parametrize(("factor", "golden"), [(1, 0.2112892121076584), (20, 0.3408217430114746)])
def test_jensen_shannon_golden_numbers(factor: float, golden: float) -> None:
    found = jensen_shannon([torch.tensor(version) * factor for version in LOGITS])
    assert float(found) == pytest.approx(golden, rel=1e-5)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_jensen_shannon_is_its_formula(data: st.DataObject) -> None:
    versions, rows, classes = (data.draw(st.integers(*bounds)) for bounds in ((2, 4), (1, 5), (2, 6)))
    chance = rng.uniform(rng.key("logits", data.draw(st.integers(0, 99))), range(1), (versions, rows, classes))[0]
    logits = (chance - 0.5) * data.draw(st.sampled_from([0.0, 0.1, 5.0, 80.0]))
    found = float(jensen_shannon([torch.from_numpy(version) for version in logits]))
    p = np.exp(logits - logits.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)
    entropies = -(p * np.log(p)).sum(2)
    mean = np.clip(p.mean(0), 1e-7, 1)
    crossed = -(p.mean(0) * np.log(mean)).sum(1)
    assert found == pytest.approx((crossed - entropies.mean(0)).mean(), rel=1e-6, abs=1e-9)
    assert -1e-6 <= found <= math.log(versions) + 1e-9


def test_jensen_shannon_at_its_ends() -> None:
    equal = torch.tensor(LOGITS[0])
    assert float(jensen_shannon([equal, equal, equal])) == pytest.approx(0, abs=1e-6)
    certain = [torch.eye(3)[[k]] * 2000 for k in range(3)]
    for version in certain:
        version.requires_grad_()
    found = jensen_shannon(certain)
    assert float(found.detach()) == pytest.approx(math.log(3), rel=1e-6)
    found.backward()
    assert all(version.grad is not None and bool(torch.isfinite(version.grad).all()) for version in certain)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("severity", 0, "greater than 0"),
        ("severity", 10.5, "less than or equal to 10"),
        ("depth", -1, "greater than 0"),
        ("alpha", 0.01, "greater than or equal to 0.1"),
        ("width", True, "needed is a number, not true"),
        ("wdith", 3, "did you mean width"),
    ],
)
def test_refusals(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugMix.model_validate({field: value})


def test_other_refusals() -> None:
    samples = some(2, 2)
    with pytest.raises(ValueError, match="1 or 3 channels, these have 2"):
        augmix(samples, samples.images, AugMix(), "a")
    with pytest.raises(ValueError, match="2 versions of each image, not 1"):
        jensen_shannon([torch.zeros(1, 3)])


def test_what_is_left_out_is_as_published() -> None:
    assert AugMix() == AugMix(width=3, depth=None, severity=3, alpha=1, weight=12, all_ops=False)
    assert len({AugMix(), AugMix(severity=3.0), AugMix(severity=1)}) == 2
    names = "autocontrast equalize posterize rotate solarize shear_x shear_y translate_x translate_y"
    assert " ".join(PUBLISHED) == names
