"""The corruptions against imagecorruptions, the published constants, closed forms, and independent implementations."""

import warnings
from functools import cache
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, special, stats
from skimage.data import astronaut, chelsea
from torch import Tensor

from robustbench_diffaug.data.blurs import elastic_transform, line_blur, motion_taps, smoothing
from robustbench_diffaug.data.corruptions import CONSTANTS, NAMES, NOISES, corrupt, plasma
from robustbench_diffaug.rng import key, uniform

with warnings.catch_warnings():
    # What the oracle's imports warn about is not ours to mend.
    warnings.simplefilter("ignore")
    import cv2
    import imagecorruptions
    from imagecorruptions import corruptions as oracle_corruptions

TABLES = tuple(CONSTANTS)
RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "fog", "glass_blur", "motion_blur", "snow")
OTHER = ("frost", "elastic_transform", "spatter")  # in files of their own
EXACT = tuple(name for name in NAMES if name not in (*RANDOM, *OTHER))


@cache
def picture(side: int, name: str = "astronaut") -> NDArray[np.uint8]:
    """A photograph, (side, side, 3), 8-bit; not to be written to."""
    photograph = Image.fromarray(astronaut() if name == "astronaut" else chelsea())  # type: ignore[no-untyped-call]
    return np.asarray(photograph.resize((side, side), Image.Resampling.BICUBIC))


def tensor(levels: NDArray[np.uint8], copies: int = 1) -> Tensor:
    """An 8-bit image (height, width, channels) as a batch of its copies, (copies, channels, height, width)."""
    return torch.from_numpy(levels.transpose(2, 0, 1).copy()).div(255).repeat(copies, 1, 1, 1)


def array(images: Tensor) -> NDArray[np.float64]:
    """Images in [0, 1] as levels, (batch, height, width, channels)."""
    return np.asarray((images.double() * 255).round().permute(0, 2, 3, 1).numpy())


def keys(count: int, *parts: object) -> list[int]:
    """Keys for `count` images."""
    return [key("test", *parts, index) for index in range(count)]


def oracle(levels: NDArray[np.uint8], name: str, severity: int, seed: int = 0) -> NDArray[np.float64]:
    """The result of imagecorruptions; the seed is for those that do not use numpy's global generator."""
    options = {"seed": seed} if name in ("impulse_noise", "glass_blur") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(imagecorruptions.corrupt(levels, severity, name, **options), dtype=np.float64)


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", EXACT)
def test_deterministic_corruptions_equal_the_oracle_within_one_level(name: str, severity: int) -> None:
    for side, subject in ((224, "astronaut"), (64, "chelsea"), (64, "astronaut")):
        levels = picture(side, subject)
        ours = array(corrupt(tensor(levels), name, severity, "imagenet-c", keys(1)))[0]
        assert np.abs(ours - oracle(levels, name, severity)).max() <= 1


@pytest.mark.parametrize(
    ("name", "exact"), [("brightness", 0.99), ("contrast", 1), ("pixelate", 1), ("jpeg_compression", 1)]
)
def test_some_equal_the_oracle_to_the_bit(name: str, exact: float) -> None:
    levels = picture(64)
    ours = array(corrupt(tensor(levels), name, 3, "imagenet-c", keys(1)))[0]
    assert (ours == oracle(levels, name, 3)).mean() >= exact


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("angle", [-45.0, -17.3, 0.0, 31.0, 45.0, -90.0, -120.5])
def test_motion_blur_equals_the_oracle_at_the_same_angle(angle: float, severity: int) -> None:
    radius, sigma = CONSTANTS["imagenet-c"]["motion_blur"][severity - 1]
    levels = picture(64)
    theirs = oracle_corruptions._motion_blur(levels, radius, sigma, angle)
    ours = line_blur(levels.transpose(2, 0, 1), motion_taps(radius, sigma, angle))
    np.testing.assert_allclose(ours.transpose(1, 2, 0), theirs, atol=1e-3)


def test_motion_blur_draws_its_angle_from_the_key() -> None:
    levels = picture(64)
    (image_key,) = keys(1)
    angle = 90 * uniform(image_key, range(1), (1,))[0, 0] - 45
    theirs = oracle_corruptions._motion_blur(levels, 15, 8, angle)
    ours = array(corrupt(tensor(levels), "motion_blur", 3, "imagenet-c", [image_key]))[0]
    assert np.abs(ours - np.floor(theirs)).max() <= 1
    assert sum(motion_taps(15, 8, angle).values()) == pytest.approx(1)


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("name", RANDOM)
def test_random_corruptions_are_as_strong_as_the_oracle(name: str, severity: int) -> None:
    # The few draws of a fractal's coarsest scales decide a fog, so that it takes many to tell its mean.
    count = {"fog": 400, "motion_blur": 100, "snow": 50, "impulse_noise": 100}.get(name, 12)
    levels = picture(64)
    ours = array(corrupt(tensor(levels, count), name, severity, "imagenet-c", keys(count, name, severity)))
    np.random.seed(severity)
    theirs = np.stack([oracle(levels, name, severity, seed) for seed in range(count)])
    strengths = [np.abs(images - levels).mean() for images in (ours, theirs)]
    assert strengths[0] == pytest.approx(strengths[1], rel=0.03)


def test_fog_equals_the_reference_formula_on_its_clouds() -> None:
    levels, image_keys = picture(64), keys(3)
    clouds = plasma(64, 1.4, image_keys).astype(np.float64)
    assert clouds.min() == 0
    assert clouds.max() == 1
    value = levels / 255.0
    foggy = (value + 3 * clouds[..., None]) * value.max() / (value.max() + 3)
    ours = array(corrupt(tensor(levels, 3), "fog", 5, "imagenet-c", image_keys))
    assert np.abs(ours - np.floor(255 * foggy)).max() <= 1


def test_plasma_is_the_oracles_fractal_on_the_same_uniforms(monkeypatch: pytest.MonkeyPatch) -> None:
    (image_key,) = keys(1)
    draws = iter(uniform(image_key, range(1), (32 * 32,))[0])

    def given_uniforms(low: float, high: float, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return low + (high - low) * np.array([next(draws) for _ in range(int(np.prod(shape)))]).reshape(shape)

    monkeypatch.setattr(np.random, "uniform", given_uniforms)
    theirs = oracle_corruptions.plasma_fractal(32, 1.75)
    np.testing.assert_allclose(plasma(32, 1.75, [image_key])[0], theirs, atol=1e-5)


@pytest.mark.parametrize(("table", "severity"), [("imagenet-c", 1), ("imagenet-c", 5), ("cifar-c", 5)])
@pytest.mark.parametrize("level", [3, 100, 255])
def test_shot_noise_is_poisson(table: str, severity: int, level: int) -> None:
    photons = CONSTANTS[table]["shot_noise"][severity - 1]
    images = torch.full((50, 1, 64, 64), level / 255)
    seen = array(corrupt(images, "shot_noise", severity, table, keys(50, table, severity, level))).ravel()
    counted = np.round(seen / 255 * photons).astype(int)
    counts = np.arange(photons + 1)
    # What is brighter than white is cut to white.
    chances = stats.poisson.pmf(counts, level / 255 * photons)
    chances[-1] = stats.poisson.sf(photons - 1, level / 255 * photons)
    mean = counts @ chances
    variance = (counts - mean) ** 2 @ chances
    fourth = (counts - mean) ** 4 @ chances
    assert counted.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / counted.size))
    assert counted.var() == pytest.approx(variance, abs=4 * np.sqrt((fourth - variance**2) / counted.size))
    rare = chances * counted.size < 5
    found = np.bincount(counted, minlength=photons + 1)
    found = np.append(found[~rare], found[rare].sum())
    expected = np.append(chances[~rare], chances[rare].sum()) * counted.size
    common = expected > 1e-6
    assert found[~common].sum() == 0
    assert stats.chisquare(found[common], expected[common], sum_check=False).pvalue > 1e-3


def test_more_photons_than_levels_are_poisson_too() -> None:
    images = torch.full((50, 1, 64, 64), 100 / 255)
    seen = np.sort(array(corrupt(images, "shot_noise", 1, "cifar-c", keys(50))).ravel())
    measured = seen.searchsorted(np.arange(256), side="right") / seen.size
    # The greatest count below the next level; level 255 takes all.
    greatest = np.ceil(np.arange(1, 257) * 500 / 255 - 1e-9) - 1
    expected = np.append(stats.poisson.cdf(greatest[:-1], 100 / 255 * 500), 1)
    assert np.abs(measured - expected).max() < 1.95 / np.sqrt(seen.size)


@pytest.mark.parametrize(("name", "scale"), [("gaussian_noise", 0.08), ("speckle_noise", 0.15 * 128 / 255)])
def test_normal_noise_has_the_mean_and_deviation_of_its_closed_form(name: str, scale: float) -> None:
    images = torch.full((20, 3, 64, 64), 128 / 255)
    noise = (array(corrupt(images, name, 1, "imagenet-c", keys(20, name))) + 0.5 - 128) / 255
    # Cut to 8 bits: half a level is lost on the mean, and the deviation of one level's uniform is added.
    deviation = np.sqrt(scale**2 + 1 / 12 / 255**2)
    assert noise.mean() == pytest.approx(0, abs=4 * deviation / np.sqrt(noise.size))
    assert noise.std() == pytest.approx(deviation, rel=4 / np.sqrt(2 * noise.size))
    # Against the cumulative chances of the levels themselves.
    measured = np.searchsorted(np.sort(noise.ravel()), np.arange(-127.5, 128) / 255, side="right") / noise.size
    expected = stats.norm.cdf(np.arange(-127, 129) / 255, scale=scale)
    assert np.abs(measured - expected)[:-1].max() < 1.95 / np.sqrt(noise.size)


@pytest.mark.parametrize("severity", [1, 5])
@pytest.mark.parametrize("table", TABLES)
def test_noise_is_the_inverse_of_its_distribution_at_the_keys_uniforms(table: str, severity: int) -> None:
    levels, (image_key,) = picture(224), keys(1)
    draws = uniform(image_key, range(1), (3, 224, 224))[0].transpose(1, 2, 0)
    value, normal = levels / 255, special.ndtri(draws)
    constants = {name: CONSTANTS[table][name][severity - 1] for name in NAMES}
    photons = constants["shot_noise"]
    for name, expected in {
        "gaussian_noise": value + constants["gaussian_noise"] * normal,
        "speckle_noise": value + value * constants["speckle_noise"] * normal,
        "shot_noise": stats.poisson.ppf(draws, value * photons) / photons,
    }.items():
        ours = array(corrupt(tensor(levels), name, severity, table, [image_key]))[0]
        # A product that ends at a whole level may fall on either side of it: white, 255 / 255 * 255, stays.
        differences = np.abs(ours - np.floor(np.clip(expected, 0, 1) * 255))
        assert differences.max() <= 1
        assert (differences > 0).mean() < 1e-5


def test_impulse_noise_is_half_salt_and_half_pepper_for_each_channel_alone() -> None:
    images = torch.full((20, 3, 64, 64), 100 / 255)
    noisy = array(corrupt(images, "impulse_noise", 5, "imagenet-c", keys(20)))
    tolerance = 4 * np.sqrt(0.135 * 0.865 / noisy.size)
    assert (noisy == 255).mean() == pytest.approx(0.135, abs=tolerance)
    assert (noisy == 0).mean() == pytest.approx(0.135, abs=tolerance)
    assert set(np.unique(noisy)) == {0, 100, 255}
    assert np.corrcoef((noisy == 255)[..., 0].ravel(), (noisy == 255)[..., 1].ravel())[0, 1] == pytest.approx(
        0, abs=0.02
    )


def test_glass_blur_equals_pixel_after_pixel() -> None:
    levels, (image_key,) = picture(64), keys(1)
    sigma, shift, rounds = CONSTANTS["imagenet-c"]["glass_blur"][2]

    def blur(image: NDArray[np.uint8]) -> NDArray[np.float64]:
        return np.asarray(ndimage.gaussian_filter(image / 255, (sigma, sigma, 0), mode="nearest") * 255)

    image = np.floor(blur(levels)).astype(np.uint8)
    for draw in uniform(image_key, range(rounds), (64, 64)):
        for row in range(64 - shift, shift, -1):
            for column in range(64 - shift, shift, -1):
                down, rest = divmod(draw[row, column] * 2 * shift, 1)
                image[row, column] = image[row + int(down) - shift, column + int(rest * 2 * shift) - shift]
    ours = array(corrupt(tensor(levels), "glass_blur", 3, "imagenet-c", [image_key]))[0]
    assert np.abs(ours - np.floor(blur(image))).max() <= 2
    assert (np.abs(ours - np.floor(blur(image))) > 1).mean() < 1e-3


def test_elastic_transform_equals_opencv_and_scipy() -> None:
    levels, (image_key,) = picture(64), keys(1)
    for constants in (CONSTANTS["imagenet-c"]["elastic_transform"][4], CONSTANTS["cifar-c"]["elastic_transform"][1]):
        strength, sigma, greatest = (64 * constant for constant in constants)
        points = np.array([[53, 53], [53, 11], [11, 11]], dtype=np.float32)
        moves = greatest * (2 * uniform(key(image_key, "affine"), range(1), (3, 2))[0] - 1)
        affine = cv2.getAffineTransform(points, points + moves.astype(np.float32))
        mapped = cv2.warpAffine(levels.astype(np.float32), affine, (64, 64), borderMode=cv2.BORDER_REFLECT_101)
        across, along = (
            strength * ndimage.gaussian_filter(2 * draw - 1, sigma, mode="reflect", truncate=3)
            for draw in uniform(image_key, range(2), (64, 64))
        )
        rows, columns = np.indices((64, 64))
        theirs = np.stack(
            [
                ndimage.map_coordinates(mapped[..., channel], (rows + along, columns + across), order=1, mode="reflect")
                for channel in range(3)
            ]
        )
        ours = elastic_transform(levels.transpose(2, 0, 1)[None].copy(), constants, [image_key])[0]
        # OpenCV may interpolate in steps of 1/32 px.
        assert np.abs(ours - theirs).mean() < 1
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999


def test_smoothing_is_scipys_gaussian_filter() -> None:
    values = uniform(keys(1)[0], range(1), (20,))[0]
    for sigma in (0.3, 2.0, 15.0):
        theirs = ndimage.gaussian_filter1d(values, sigma, mode="reflect", truncate=3)
        np.testing.assert_allclose(smoothing(20, sigma) @ values, theirs, atol=1e-12)


def test_the_constants_are_the_published_ones() -> None:
    imagenet, cifar = CONSTANTS["imagenet-c"], CONSTANTS["cifar-c"]
    assert list(imagenet) == list(cifar) == list(NAMES)
    assert imagenet["gaussian_noise"] == (0.08, 0.12, 0.18, 0.26, 0.38)
    assert imagenet["shot_noise"] == (60, 25, 12, 5, 3)
    assert imagenet["impulse_noise"] == (0.03, 0.06, 0.09, 0.17, 0.27)
    assert imagenet["defocus_blur"] == ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
    assert imagenet["glass_blur"][4] == (1.5, 4, 2)
    assert imagenet["motion_blur"] == ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
    assert imagenet["zoom_blur"][4] == (1, 1.31, 0.03)
    assert imagenet["snow"][4] == (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)
    assert imagenet["fog"] == ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
    assert imagenet["brightness"] == (0.1, 0.2, 0.3, 0.4, 0.5)
    assert imagenet["contrast"] == (0.4, 0.3, 0.2, 0.1, 0.05)
    assert imagenet["elastic_transform"][4] == pytest.approx((29.28 / 224, 2.44 / 224, 4.88 / 224))
    assert imagenet["pixelate"] == (0.6, 0.5, 0.4, 0.3, 0.25)
    assert imagenet["jpeg_compression"] == (25, 18, 15, 10, 7)
    assert cifar["gaussian_noise"] == (0.04, 0.06, 0.08, 0.09, 0.10)
    assert cifar["shot_noise"] == (500, 250, 100, 75, 50)
    assert cifar["impulse_noise"] == (0.01, 0.02, 0.03, 0.05, 0.07)
    assert cifar["defocus_blur"] == ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
    assert cifar["motion_blur"] == ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
    assert cifar["fog"] == ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))
    assert cifar["brightness"] == (0.05, 0.1, 0.15, 0.2, 0.3)
    assert cifar["contrast"] == (0.75, 0.5, 0.4, 0.3, 0.15)
    assert cifar["pixelate"] == (0.95, 0.9, 0.85, 0.75, 0.65)
    assert cifar["jpeg_compression"] == (80, 65, 58, 50, 40)
    assert all(len(table[name]) == 5 for table in CONSTANTS.values() for name in NAMES)
    assert NAMES[:3] == NOISES


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", NAMES)
def test_an_image_depends_on_nothing_beside_it(name: str, table: str) -> None:
    image_keys = keys(7)
    images = torch.stack([tensor(picture(40, subject))[0] for subject in ("astronaut", "chelsea")] * 4)[:7]
    images = images * torch.linspace(0.2, 1, 7)[:, None, None, None]
    together = corrupt(images, name, 4, table, image_keys)
    assert torch.equal(together, corrupt(images, name, 4, table, image_keys))
    alone = [corrupt(images[[index]], name, 4, table, [image_keys[index]]) for index in range(7)]
    assert torch.equal(together, torch.cat(alone))
    order = [4, 1, 6]
    assert torch.equal(together[order], corrupt(images[order], name, 4, table, [image_keys[index] for index in order]))
    many = corrupt(images.repeat(10, 1, 1, 1), name, 4, table, image_keys * 10)
    assert torch.equal(many, together.repeat(10, 1, 1, 1))


@pytest.mark.parametrize("name", (*RANDOM, *OTHER))
def test_another_key_gives_another_image(name: str) -> None:
    first, second = corrupt(tensor(picture(40), 2), name, 5, "imagenet-c", keys(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    channels=st.sampled_from([1, 3]),
    severity=st.integers(1, 5),
    batch=st.integers(0, 3),
    seed=st.integers(0, 2**128 - 1),
    contents=st.sampled_from(["noise", "black", "white", "grey"]),
)
def test_results_are_eight_bit_images_of_the_same_shape(
    name: str, table: str, height: int, width: int, channels: int, severity: int, batch: int, seed: int, contents: str
) -> None:
    shape = (channels, height, width)
    constant = {"black": 0.0, "white": 1.0, "grey": 0.5}.get(contents)
    images = torch.from_numpy(uniform(seed, range(batch), shape).astype(np.float32))
    images = images if constant is None else torch.full_like(images, constant)
    result = corrupt(images, name, severity, table, keys(batch, seed))
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert bool(((result >= 0) & (result <= 1)).all())
    assert torch.equal(result, (result * 255).round() / 255)


@pytest.mark.parametrize(
    "name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur", "pixelate"]
)
@pytest.mark.parametrize("level", [0, 37, 255])
def test_blurs_leave_flat_images_as_they_are(name: str, level: int) -> None:
    images = torch.full((1, 1, 32, 32), level / 255)
    for severity in (1, 5):
        assert torch.equal(corrupt(images, name, severity, "imagenet-c", keys(1)), images)


def test_grey_images_are_as_grey_pictures_of_three_channels() -> None:
    grey = tensor(picture(32))[:, :1]
    for name in ("defocus_blur", "motion_blur", "zoom_blur", "fog", "brightness", "contrast", "pixelate", "glass_blur"):
        colour = corrupt(grey.repeat(1, 3, 1, 1), name, 4, "imagenet-c", keys(1))
        assert torch.equal(corrupt(grey, name, 4, "imagenet-c", keys(1)).repeat(1, 3, 1, 1), colour)
    file = BytesIO()
    Image.fromarray(array(grey)[0, :, :, 0].astype(np.uint8)).save(file, "JPEG", quality=7)
    ours = array(corrupt(grey, "jpeg_compression", 5, "imagenet-c", keys(1)))[0, :, :, 0]
    np.testing.assert_array_equal(ours, np.asarray(Image.open(file)))


def test_images_are_rounded_to_eight_bits_first() -> None:
    images = tensor(picture(32))
    nudged = (images + 0.4 / 255 * torch.where(images < 0.5, 1, -1)).double()
    for name in NAMES:
        assert torch.equal(corrupt(images, name, 3, "cifar-c", keys(1)), corrupt(nudged, name, 3, "cifar-c", keys(1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "gausian_noise"}, "did you mean gaussian_noise"),
        ({"constants": "cifar10-c"}, "did you mean cifar-c"),
        ({"severity": 0}, "from 1 .mild. to 5"),
        ({"severity": 6}, "from 1 .mild. to 5"),
        ({"keys": [1]}, "1 keys for 2 images"),
        ({"images": torch.full((2, 3, 8, 8), 1.01)}, "finite and in"),
        ({"images": torch.full((2, 3, 8, 8), -0.01)}, "finite and in"),
        ({"images": torch.full((2, 3, 8, 8), torch.nan)}, "finite and in"),
        ({"images": torch.full((2, 3, 8, 8), torch.inf)}, "finite and in"),
        ({"images": torch.zeros(2, 4, 8, 8)}, "1 or 3 channels"),
        ({"images": torch.zeros(2, 3, 7, 8)}, "8 px or more"),
    ],
)
def test_what_cannot_be_corrupted_is_refused_with_advice(change: dict[str, object], message: str) -> None:
    images = torch.zeros(2, 3, 8, 8)
    arguments = {"images": images, "name": "fog", "severity": 1, "constants": "cifar-c", "keys": [1, 2]} | change
    with pytest.raises(ValueError, match=message):
        corrupt(**arguments)  # type: ignore[arg-type]
