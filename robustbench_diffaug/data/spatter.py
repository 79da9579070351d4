"""Spatter: drops of water, or splashes of mud, on the lens.

The water's shading is OpenCV's: edges, distances from them, an equalised histogram and an emboss. Its integer and
fixed-point arithmetic is followed, so that results are those of the published code on the same noise.

References:
    Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
    ICLR 2019), https://arxiv.org/abs/1903.12261
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve1d, correlate, gaussian_filter, label, uniform_filter

from robustbench_diffaug.data.blurs import Floats, Levels, Number, truncate
from robustbench_diffaug.rng import normal

__all__ = ["distances", "edges", "equalised", "spatter"]

WATER = np.array([175, 238, 238], dtype=np.float32)  # pale turquoise
MUD = np.array([63, 42, 20], dtype=np.float32)
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])


def edges(levels: Levels) -> NDArray[np.bool_]:
    """Edges by Canny's method, as OpenCV finds them with thresholds 50 and 150: Sobel slopes, thinned, and connected.

    Arguments:
        levels: One grey image, (height, width).

    References:
        A Computational Approach to Edge Detection (Canny, 1986), https://doi.org/10.1109/TPAMI.1986.4767851
    """
    grey = levels.astype(np.int32)
    across, down = (
        convolve1d(convolve1d(grey, [1, 0, -1], axis=axis, mode="nearest"), [1, 2, 1], axis=1 - axis, mode="nearest")
        for axis in (1, 0)
    )
    steepness = np.abs(across) + np.abs(down)
    around = np.pad(steepness, 1)
    height, width = grey.shape

    def near(row: int, column: int) -> NDArray[np.int32]:
        return around[1 + row : 1 + row + height, 1 + column : 1 + column + width]

    # An edge's pixel is steepest along its slope, whose direction is rounded to 45 degrees; 13573 is tan 22.5 degrees.
    low = np.abs(across).astype(np.int64) * 13573
    slope = np.abs(down).astype(np.int64) << 15
    flat, upright = slope < low, slope > low + (np.abs(across).astype(np.int64) << 16)
    falling = (across ^ down) >= 0
    level = (steepness > near(0, -1)) & (steepness >= near(0, 1))
    vertical = (steepness > near(-1, 0)) & (steepness >= near(1, 0))
    diagonal = (steepness > np.where(falling, near(-1, -1), near(-1, 1))) & (
        steepness > np.where(falling, near(1, 1), near(1, -1))
    )
    thin = (steepness > 50) & np.select([flat, upright], [level, vertical], diagonal)
    parts, count = label(thin, np.ones((3, 3)))
    kept = np.zeros(count + 1, dtype=bool)
    kept[parts[thin & (steepness > 150)]] = True
    return np.asarray(kept[parts])


def distances(marked: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The distance of each pixel from the nearest marked one in px, along steps of 1, 1.4 and 2.1969 px; 20 at most.

    Steps lead to a neighbour, to a diagonal one, and a knight's move away. A sweep down and one up meet all ways.

    Arguments:
        marked: Pixels, (height, width).

    References:
        Distance transformations in digital images (Borgefors, 1986), https://doi.org/10.1016/S0734-189X(86)80047-0
    """
    straight, diagonal, knight = (round(step * 2**16) for step in (1, 1.4, 2.1969))
    greatest = 20 << 16
    height, width = marked.shape
    field = np.full((height + 4, width + 4), greatest, dtype=np.int64)
    field[2:-2, 2:-2][marked] = 0
    ramp = straight * np.arange(width + 4)
    steps = [(1, 0, straight), (1, -1, diagonal), (1, 1, diagonal)]
    steps += [(1, -2, knight), (1, 2, knight), (2, -1, knight), (2, 1, knight)]
    for grid in (field, field[::-1, ::-1]):
        for row in range(2, height + 2):
            line = grid[row]
            for back, aside, cost in steps:
                np.minimum(line[2:-2], grid[row - back, 2 + aside : width + 2 + aside] + cost, out=line[2:-2])
            # From the pixel before, in its turn: a running minimum of what is left of a slope.
            line[:] = np.minimum.accumulate(line - ramp) + ramp
    return np.minimum(field[2:-2, 2:-2], greatest) / 2**16


def equalised(levels: Levels) -> Levels:
    """Levels mapped so that each is about as frequent, the least one to 0.

    Arguments:
        levels: One grey image, any shape.
    """
    counts = np.bincount(levels.ravel(), minlength=256)
    first = int(counts.argmax() if counts.max() == levels.size else np.flatnonzero(counts)[0])
    if counts[first] == levels.size:
        return levels
    after = np.cumsum(counts) - counts[: first + 1].sum()
    scale = np.float32(255) / np.float32(levels.size - counts[first])
    table = np.rint(np.maximum(after, 0).astype(np.float32) * scale).astype(np.uint8)
    return np.asarray(table[levels])


def water(liquid: NDArray[np.float64], strength: Number) -> Floats:
    """How much of the water's colour is added to each pixel: drops that are darker inside and brighter at a rim.

    Arguments:
        liquid: The drops, 0 where there is none, (height, width).
        strength: The greatest share.
    """
    # Where noise goes past 1, 8 bits overflow, as in the published code.
    drops = (liquid * 255).astype(np.int64).astype(np.uint8)
    depth = uniform_filter(distances(edges(drops)), 3, mode="mirror")
    # The allowance keeps whole distances whole.
    relief = correlate(equalised((depth + 2.0**-20).astype(np.uint8)).astype(np.int32), EMBOSS, mode="mirror")
    shade = np.rint(uniform_filter(np.clip(relief, 0, 255).astype(np.float64), 3, mode="mirror"))
    share = (drops * shade).astype(np.float32)
    return np.asarray(share * np.float32(strength / max(float(share.max()), 1)), dtype=np.float32)


def mud(liquid: NDArray[np.float64], sigma: Number) -> Floats:
    """How much of each pixel is mud: the splashes, blurred, where they still are at least 0.8.

    Arguments:
        liquid: The splashes, 0 where there is none, (height, width).
        sigma: Of the blur in px.
    """
    share = gaussian_filter((liquid > 0).astype(np.float32), sigma, mode="nearest", truncate=4)
    share[share < 0.8] = 0
    return np.asarray(share)


def spatter(levels: Levels, constants: tuple[Number, ...], keys: Sequence[int]) -> Levels:
    """Adds water m c to the image, c its colour and m its thickness; or mixes in mud, (1 - m) x + m c.

    Arguments:
        levels: 8-bit images, (batch, 1 or 3 channels, height, width).
        constants: Mean, standard deviation, sigma in px and threshold of the liquid, a blurred noise; the water's
            strength, or sigma in px of the mud's blur; 0 for water and 1 for mud.
        keys: One key per image.
    """
    mean, scale, sigma, threshold, more, muddy = constants
    colour = (MUD if muddy else WATER) if levels.shape[1] == 3 else GREY @ (MUD if muddy else WATER)
    colour = np.reshape(colour, (-1, 1, 1))
    output = np.empty_like(levels)
    for image, result, image_key in zip(levels, output, keys, strict=True):
        noise = mean + scale * normal(image_key, range(1), image.shape[1:])[0].astype(np.float64)
        liquid = gaussian_filter(noise, sigma, mode="nearest", truncate=4)
        liquid[liquid < threshold] = 0
        values = image.astype(np.float32)
        share = (mud if muddy else water)(liquid, more)
        if muddy:
            values *= 1 - share
        result[:] = truncate(values + share * colour)
    return output
