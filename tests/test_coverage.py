"""What intervals promise: how often they hold the truth, from one image in a thousand to all but one."""

from math import sqrt

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from robustbench_diffaug.detection.intervals import placements
from robustbench_diffaug.rng import key, normal, uniform
from robustbench_diffaug.stats import Estimate, clustered_mean, exact_proportion, proportion

SHARES = np.arange(1, 1000) / 1000


def coverage(n: int, interval: object) -> NDArray[np.float64]:
    """The exact coverage of an interval of n decisions at each of `SHARES`, over all counts of hits."""
    assert callable(interval)
    low, high = np.array([interval(np.arange(n) < k)[1:3] for k in range(n + 1)]).T
    found = []
    for part in np.array_split(SHARES[:, None], 20):
        held = (low <= part) & (part <= high)
        found.append((binom.pmf(np.arange(n + 1), n, part) * held).sum(axis=1))
    return np.concatenate(found)


@pytest.mark.parametrize(("n", "least"), [(50, 0.860), (500, 0.909), (5000, 0.944)])
def test_coverage_of_shares_over_the_grid(n: int, least: float, full: bool) -> None:
    """Clopper and Pearson's is never below 95 %; Wilson's is 95 % on average, and its dips are those of the docs."""
    if n < 5000 or full:
        assert coverage(n, exact_proportion).min() >= 0.95
    wilson = coverage(n, proportion)
    assert abs(wilson.mean() - 0.95) <= 0.005
    assert least <= wilson.min() <= least + 0.002


def held(estimates: list[Estimate], truth: float) -> float:
    """How often the truth is held; no interval is a point."""
    assert all(estimate.low < estimate.high for estimate in estimates)
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]))


def slack(runs: int) -> float:
    """What chance may take off a share of 0.93 that many runs give."""
    return 2.6 * sqrt(0.93 * 0.07 / runs)


SMALL = [(50, 4, 0.001), (50, 4, 0.02), (50, 4, 0.3), (500, 4, 0.002), (500, 4, 0.03), (500, 4, 0.5), (500, 4, 0.999)]
LARGE = [(5000, 4, 0.001), (5000, 4, 0.003), (5000, 4, 0.3), (5000, 4, 0.999)]
CORRUPTED = [(32, 15, 0.01), (32, 15, 0.1), (32, 15, 0.3), (100, 15, 0.03)]  # as often as images of ImageNet-C


@pytest.mark.parametrize(("images", "versions", "share"), SMALL + LARGE + CORRUPTED)
def test_coverage_of_means_over_versions_of_images(images: int, versions: int, share: float, full: bool) -> None:
    runs = 1000 if full else 100 if images < 5000 else 30
    found = []
    for run in range(runs):
        ((hard, own),) = normal(key("coverage", images, share, run), range(1), (2, images, versions))
        hits = ndtr(0.8 * hard[:, :1] + 0.6 * own) < share
        groups = np.arange(images).repeat(versions)
        found.append(clustered_mean(hits.ravel(), groups, key(run), resamples=400, bounded=True))
    assert held(found, share) >= 0.93 - slack(runs)


@pytest.mark.parametrize("images", [50, 500, 5000])
@pytest.mark.parametrize("area", [0.5, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("tail", ["normal", "exponential"])
def test_coverage_of_areas(images: int, area: float, tail: str, full: bool) -> None:
    """DeLong's interval, with the wider one where few images are misplaced or none."""
    runs, found = 1000 if full else 80, []
    for run in range(runs):
        name = key("areas", images, area, tail, run)
        if tail == "normal":
            inside, outside = normal(name, range(1), (2, images))[0]
            inside = inside + sqrt(2) * ndtri(area)
        else:
            inside, outside = -np.log(uniform(name, range(1), (2, images))[0])
            inside = inside * area / (1 - area)
        found.append(placements(inside, outside, "outside").estimate())
    assert held(found, area) >= 0.93 - slack(runs)


def test_coverage_of_differences_of_areas(full: bool) -> None:
    runs = 1000 if full else 80
    for area in (0.8, 0.97, 0.999):
        found, wrong = [], 0
        for run in range(runs):
            shared, one, other = normal(key("differences", area, run), range(1), (3, 2, 100))[0]
            shift = np.array([[sqrt(2) * ndtri(area)], [0.0]])
            each = [0.9 * shared + sqrt(0.19) * own + shift for own in (one, other)]
            pair = [placements(scores[0], scores[1], "outside") for scores in each]
            found.append((pair[0] - pair[1]).estimate())
            wrong += (pair[0] - pair[1]).pvalue() <= 0.05
        assert held(found, 0.0) >= 0.93 - slack(runs)
        assert wrong / runs <= 0.05 + 2.6 * sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize("n", [1, 2, 50, 5000])
def test_all_right_and_all_wrong_are_no_points(n: int) -> None:
    for value in (False, True):
        hits = np.full(n, value)
        found = [
            proportion(hits),
            exact_proportion(hits),
            clustered_mean(hits, None, key("all"), resamples=100, bounded=True),
        ]
        found.append(placements(np.full(n, float(value)), np.full(n, 0.5), "outside").estimate())
        for estimate in found:
            assert estimate.value == float(value)
            assert estimate.high - estimate.low >= 0.75 * (1 - 0.025 ** (1 / n))
