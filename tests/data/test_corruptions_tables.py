"""The tables of constants against a copy of the published ones, and the elastic transform against the official code."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates
from skimage.data import astronaut

from robustbench_diffaug.data.corruptions import COMMON, CONSTANTS, NAMES, VALIDATION, corrupt
from robustbench_diffaug.rng import key, uniform

# Read off ImageNet-C/create_c/make_cifar_c.py of hendrycks/robustness, commit ca360085; of zoom_blur the ends and steps
# of its numpy.arange, of frost with the factor of its cv2.resize, of elastic_transform shares of 32 px.
CIFAR_C: dict[str, list[Any]] = {
    "gaussian_noise": [0.04, 0.06, 0.08, 0.09, 0.10],
    "shot_noise": [500, 250, 100, 75, 50],
    "impulse_noise": [0.01, 0.02, 0.03, 0.05, 0.07],
    "speckle_noise": [0.06, 0.1, 0.12, 0.16, 0.2],
    "gaussian_blur": [0.4, 0.6, 0.7, 0.8, 1],
    "glass_blur": [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
    "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    "zoom_blur": [(1, end, 0.01) for end in (1.06, 1.11, 1.16, 1.21, 1.26)],
    "fog": [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
    "frost": [(share, weight, 0.2) for share, weight in ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))],
    "snow": [
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ],
    "spatter": [
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ],
    "contrast": [0.75, 0.5, 0.4, 0.3, 0.15],
    "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],
    "saturate": [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
    "jpeg_compression": [80, 65, 58, 50, 40],
    "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],
    "elastic_transform": [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
}

# The same of make_imagenet_c.py, commit e0377d46, at severities 1 and 5; its elastic_transform says 244 px.
IMAGENET_C: dict[str, tuple[Any, Any]] = {
    "gaussian_noise": (0.08, 0.38),
    "shot_noise": (60, 3),
    "impulse_noise": (0.03, 0.27),
    "speckle_noise": (0.15, 0.6),
    "gaussian_blur": (1, 6),
    "glass_blur": ((0.7, 1, 2), (1.5, 4, 2)),
    "defocus_blur": ((3, 0.1), (10, 0.5)),
    "motion_blur": ((10, 3), (20, 15)),
    "zoom_blur": ((1, 1.11, 0.01), (1, 1.31, 0.03)),
    "fog": ((1.5, 2), (3, 1.4)),
    "frost": ((1, 0.4, 1), (0.6, 0.75, 1)),
    "snow": ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
    "spatter": ((0.65, 0.3, 4, 0.69, 0.6, 0), (0.67, 0.4, 1, 0.65, 1.5, 1)),
    "contrast": (0.4, 0.05),
    "brightness": (0.1, 0.5),
    "saturate": ((0.3, 0), (20, 0.2)),
    "jpeg_compression": (25, 7),
    "pixelate": (0.6, 0.25),
    "elastic_transform": ((488 / 224, 170.8 / 224, 24.4 / 224), (29.28 / 224, 2.44 / 224, 4.88 / 224)),
}

# Mean absolute change, in levels, of skimage's astronaut at 224 and at 32 px (PIL, bicubic) under elastic_transform of
# the official code, on 120 (200 at severities 3 and 5) and 1,000 draws of numpy.random.default_rng(severity), scipy
# 1.17 and OpenCV 5.
GOLDEN = {
    ("imagenet-c", 224): (54.63, 67.08, 25.14, 25.91, 27.09),
    ("cifar-c", 32): (39.13, 36.24, 32.97, 30.41, 25.43),
}


# Strength, sigma and greatest shift in px, as the two files have them.
ELASTIC = {
    ("imagenet-c", 224): [
        (244 * 2, 244 * 0.7, 244 * 0.1),
        (244 * 2, 244 * 0.08, 244 * 0.2),
        (244 * 0.05, 244 * 0.01, 244 * 0.02),
        (244 * 0.07, 244 * 0.01, 244 * 0.02),
        (244 * 0.12, 244 * 0.01, 244 * 0.02),
    ],
    ("cifar-c", 32): [(32 * strength, 32 * sigma, 32 * most) for strength, sigma, most in CIFAR_C["elastic_transform"]],
}


def picture(side: int) -> NDArray[np.uint8]:
    photograph = Image.fromarray(astronaut())  # type: ignore[no-untyped-call]
    return np.asarray(photograph.resize((side, side), Image.Resampling.BICUBIC))


def test_names_are_the_fifteen_and_the_four() -> None:
    assert NAMES == COMMON + VALIDATION
    assert len(COMMON) == 15
    assert COMMON[:9] == (
        *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur"),
        *("motion_blur", "zoom_blur", "snow", "frost"),
    )
    assert COMMON[9:] == ("fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression")
    assert VALIDATION == ("speckle_noise", "gaussian_blur", "spatter", "saturate")


@pytest.mark.parametrize("name", NAMES)
def test_constants_are_the_published_ones(name: str) -> None:
    assert set(CIFAR_C) == set(IMAGENET_C) == set(NAMES) == set(CONSTANTS["cifar-c"]) == set(CONSTANTS["imagenet-c"])
    assert list(CONSTANTS["cifar-c"][name]) == CIFAR_C[name]
    for severity, expected in zip((1, 5), IMAGENET_C[name], strict=True):
        found = CONSTANTS["imagenet-c"][name][severity - 1]
        assert np.ravel(found).tolist() == pytest.approx(np.ravel(expected).tolist(), rel=1e-12)
    assert len(CONSTANTS["imagenet-c"][name]) == 5


def official(levels: NDArray[np.uint8], constants: tuple[float, float, float], image_key: int) -> NDArray[np.uint8]:
    """The published elastic transform, by OpenCV and scipy, on the uniforms of a key.

    Arguments:
        levels: (height, width, channels).
        constants: Strength, sigma, greatest shift, in px.
        image_key: Of the draws.
    """
    strength, sigma, greatest = constants
    height, width, channels = levels.shape
    middle, third = np.array([height, width], dtype=np.float32) // 2, min(height, width) // 3
    points = np.array([middle + third, [middle[0] + third, middle[1] - third], middle - third], dtype=np.float32)
    moves = greatest * (2 * uniform(key(image_key, "affine"), range(1), (3, 2))[0] - 1)
    matrix = cv2.getAffineTransform(points, points + moves.astype(np.float32))
    image = cv2.warpAffine(levels.astype(np.float32) / 255, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    across, along = (
        strength * gaussian_filter(2 * draw - 1, sigma, mode="reflect", truncate=3)
        for draw in uniform(image_key, range(2), (height, width))
    )
    rows, columns = np.indices((height, width))
    planes = [
        map_coordinates(image[..., channel], (rows + along, columns + across), order=1, mode="reflect")
        for channel in range(channels)
    ]
    return np.asarray(np.clip(np.stack(planes, axis=-1), 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize(("table", "side"), ELASTIC)
def test_elastic_transform_is_the_official_one_on_the_same_draws(table: str, side: int, severity: int) -> None:
    levels, keys = picture(side), [key("elastic", severity, index) for index in range(3)]
    images = torch.from_numpy(levels.copy()).permute(2, 0, 1).div(255).repeat(len(keys), 1, 1, 1)
    ours = (corrupt(images, "elastic_transform", severity, table, keys) * 255).round().permute(0, 2, 3, 1).numpy()
    for image, image_key in zip(ours, keys, strict=True):
        theirs = official(levels, ELASTIC[table, side][severity - 1], image_key).astype(np.float64)
        assert np.abs(image - levels).mean() == pytest.approx(np.abs(theirs - levels).mean(), rel=0.05)
        assert np.abs(image - theirs).mean() < 0.1


@pytest.mark.parametrize(
    ("table", "side", "severity", "count"),
    [
        *(("imagenet-c", 224, severity, 60) for severity in (1, 3, 5)),
        *(("cifar-c", 32, severity, 200) for severity in (1, 3, 5)),
    ],
)
def test_elastic_transform_has_the_golden_strength(table: str, side: int, severity: int, count: int) -> None:
    images = torch.from_numpy(picture(side).copy()).permute(2, 0, 1).div(255).repeat(count, 1, 1, 1)
    keys = [key("golden", severity, index) for index in range(count)]
    changes = (corrupt(images, "elastic_transform", severity, table, keys) - images).abs().mean(dim=(1, 2, 3)) * 255
    golden = GOLDEN[table, side][severity - 1]
    assert float(changes.mean()) == pytest.approx(golden, abs=0.05 * golden)
    assert float(changes.std()) > 0.01 * golden
