"""Published errors of AlexNet on ImageNet-C, and the mean corruption error (mCE), which is relative to such errors.

RobustBench has the formula of ImageNet-C and other errors of AlexNet: of 5,000 images instead of 50,000. So an mCE is
told together with its baseline, and two baselines never share a column.
"""

from collections.abc import Collection, Mapping
from math import fsum
from statistics import fmean
from types import MappingProxyType
from typing import Annotated, TypeAlias

from pydantic import Field, model_validator

from robustbench_diffaug.component import Value, suggest

__all__ = ["BASELINES", "Baseline", "Errors", "corruption_errors", "mce", "published", "relative_mce"]

Errors: TypeAlias = Mapping[str, Mapping[int, float]]
"""Errors in [0, 1] by corruption and severity."""

Share = Annotated[float, Field(ge=0, le=1)]


class Baseline(Value):
    """Errors to which those of other networks are relative.

    Arguments:
        name: What stands behind `mce/`.
        errors: Of each corruption, the error at each of the severities or, alone, their mean; in [0, 1].
        severities: Which severities.
        clean: The error on clean images, in [0, 1]; None where it is not known.
        source: Where the errors are from: title (authors, year), link.
        clean_source: Where that on clean images is from, if from elsewhere.
    """

    name: str
    errors: tuple[tuple[str, tuple[Share, ...]], ...]
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    clean: Share | None = None
    source: str = ""
    clean_source: str = ""

    @model_validator(mode="after")
    def _whole(self) -> "Baseline":
        if not self.errors or not self.severities:
            raise ValueError(f"the baseline {self.name} has no errors")
        for corruption, errors in self.errors:
            if len(errors) not in (1, len(self.severities)):
                raise ValueError(f"the baseline {self.name} has {len(errors)} errors of {corruption}")
        return self

    @classmethod
    def of(cls, name: str, errors: Errors, clean: float | None = None) -> "Baseline":
        """The baseline that a measured network is.

        Arguments:
            name: Of the network.
            errors: Of every corruption at the same severities, in [0, 1].
            clean: On clean images, where it was measured.

        Raises:
            ValueError: If corruptions have different severities, or an error is not in [0, 1].
        """
        severities = tuple(sorted(next(iter(errors.values()), {})))
        for corruption, found in errors.items():
            if tuple(sorted(found)) != severities:
                known = ", ".join(map(str, sorted(found)))
                raise ValueError(f"the baseline {name} has {corruption} at severities {known} only; measure all")
        rows = tuple((corruption, tuple(found[s] for s in severities)) for corruption, found in errors.items())
        checked = [*(error for _, row in rows for error in row), *(() if clean is None else (clean,))]
        _check_shares(checked)
        return cls(name=name, errors=rows, severities=severities, clean=clean)

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Those that its mCE is the mean over."""
        return tuple(corruption for corruption, _ in self.errors)

    def error(self, corruption: str) -> float:
        """The mean error over the severities.

        Raises:
            ValueError: If the baseline lacks the corruption.
        """
        for name, errors in self.errors:
            if name == corruption:
                return fmean(errors)
        near = suggest(corruption, list(self.corruptions))
        raise ValueError(f"the baseline {self.name} has no error of {corruption}{near}")

    def require(self, measured: Mapping[str, Collection[int]]) -> None:
        """Checks that all was measured that the mCE is a mean over; what there is beyond it does no harm.

        Arguments:
            measured: The severities at which each corruption was measured.

        Raises:
            ValueError: If a corruption or a severity is missing.
        """
        lacking = [f"{c}@s{s}" for c in self.corruptions for s in self.severities if s not in measured.get(c, ())]
        if lacking:
            shown = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
            whole = len(self.corruptions) * len(self.severities)
            raise ValueError(
                f"the mCE relative to {self.name} is a mean over {whole} accuracies, and {len(lacking)} are missing: "
                f"{shown}; measure them, or leave {self.name} out of the baselines"
            )


def _check_shares(errors: Collection[float]) -> None:
    odd = next((error for error in errors if not 0 <= error <= 1), None)
    if odd is not None:
        raise ValueError(f"an error is {odd:g}, and needed is a fraction in [0, 1]; divide percentages by 100")


def _sums(errors: Errors, baseline: Baseline, clean: float, clean_baseline: float) -> dict[str, float]:
    """Of each corruption the sum of errors above the clean one, divided by that of the baseline."""
    baseline.require(errors)
    count, ratios = len(baseline.severities), {}
    for corruption in baseline.corruptions:
        found = [errors[corruption][severity] for severity in baseline.severities]
        _check_shares(found)
        below = count * baseline.error(corruption) - count * clean_baseline
        if below <= 0:
            why = "makes no error" if not clean_baseline else "makes no more errors than on clean images"
            raise ValueError(f"the baseline {baseline.name} {why} under {corruption}, so nothing is relative to it")
        ratios[corruption] = (fsum(found) - count * clean) / below
    return ratios


def corruption_errors(errors: Errors, baseline: Baseline) -> dict[str, float]:
    """The corruption errors, CE_c = sum_s E_cs / sum_s E'_cs, with E' the baseline's: 1 is as many errors as it makes.

    Arguments:
        errors: In [0, 1]; corruptions and severities that the baseline lacks are left out.
        baseline: Relative to what.

    Raises:
        ValueError: If a corruption or severity of the baseline is missing, an error is not in [0, 1], or the baseline
            makes no error under a corruption.

    References:
        Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
        2019), https://arxiv.org/abs/1903.12261
    """
    return _sums(errors, baseline, 0.0, 0.0)


def mce(errors: Errors, baseline: Baseline) -> float:
    """The mean corruption error, mean_c CE_c, a fraction: 1 is the baseline's, and publications print it times 100.

    Arguments:
        errors: In [0, 1], as of `corruption_errors`.
        baseline: Relative to what.

    Raises:
        ValueError: As `corruption_errors`.

    References:
        Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
        2019), https://arxiv.org/abs/1903.12261
    """
    return fmean(corruption_errors(errors, baseline).values())


def relative_mce(errors: Errors, clean: float, baseline: Baseline) -> float:
    """The relative mCE, mean_c (sum_s (E_cs - E_clean) / sum_s (E'_cs - E'_clean)), with E' the baseline's; a fraction.

    Arguments:
        errors: In [0, 1], as of `corruption_errors`.
        clean: The error on clean images, in [0, 1].
        baseline: Relative to what; its clean error is needed.

    Raises:
        ValueError: As `corruption_errors`; or if the baseline's clean error is not known.

    References:
        Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
        2019), https://arxiv.org/abs/1903.12261
    """
    if baseline.clean is None:
        raise ValueError(f"the baseline {baseline.name} has no error on clean images, which the relative mCE needs")
    _check_shares([clean])
    return fmean(_sums(errors, baseline, clean, baseline.clean).values())


def published(name: str) -> Baseline:
    """The published baseline of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in BASELINES:
        raise ValueError(f"no published baseline is called {name!r}{suggest(name, list(BASELINES))}")
    return BASELINES[name]


HENDRYCKS = Baseline(
    name="hendrycks-alexnet",
    errors=(
        ("gaussian_noise", (0.886428,)),
        ("shot_noise", (0.894468,)),
        ("impulse_noise", (0.922640,)),
        ("defocus_blur", (0.819880,)),
        ("glass_blur", (0.826268,)),
        ("motion_blur", (0.785948,)),
        ("zoom_blur", (0.798360,)),
        ("snow", (0.866816,)),
        ("frost", (0.826572,)),
        ("fog", (0.819324,)),
        ("brightness", (0.564592,)),
        ("contrast", (0.853204,)),
        ("elastic_transform", (0.646056,)),
        ("pixelate", (0.717840,)),
        ("jpeg_compression", (0.606500,)),
    ),
    clean=0.4348,
    source="Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich, "
    "2019), https://arxiv.org/abs/1903.12261, to six digits in AugMix's imagenet.py, "
    "https://github.com/google-research/augmix",
    clean_source="Robustness Metrics (Djolonga et al., 2020), reports/imagenet_variants.py, "
    "https://github.com/google-research/robustness_metrics; torchvision states 56.522 % accuracy for the same weights",
)

_ACCURACIES = (  # of AlexNet at severities 1 to 5
    ("gaussian_noise", (0.311, 0.1814, 0.0724, 0.0214, 0.0058)),
    ("shot_noise", (0.2944, 0.1598, 0.0726, 0.0196, 0.012)),
    ("impulse_noise", (0.2234, 0.1154, 0.0556, 0.014, 0.0054)),
    ("defocus_blur", (0.3404, 0.262, 0.1502, 0.085, 0.0522)),
    ("glass_blur", (0.3486, 0.2412, 0.1126, 0.08, 0.0636)),
    ("motion_blur", (0.4174, 0.295, 0.1794, 0.1022, 0.0698)),
    ("zoom_blur", (0.3028, 0.2308, 0.1936, 0.163, 0.1312)),
    ("snow", (0.2788, 0.114, 0.132, 0.085, 0.0502)),
    ("frost", (0.3788, 0.1976, 0.1052, 0.0994, 0.0616)),
    ("fog", (0.3154, 0.2324, 0.157, 0.1214, 0.0556)),
    ("brightness", (0.5504, 0.514, 0.464, 0.3886, 0.2906)),
    ("contrast", (0.3496, 0.2334, 0.1094, 0.0266, 0.0094)),
    ("elastic_transform", (0.471, 0.3022, 0.44, 0.3568, 0.1898)),
    ("pixelate", (0.4754, 0.4502, 0.267, 0.1288, 0.0858)),
    ("jpeg_compression", (0.4858, 0.4522, 0.4228, 0.3488, 0.2564)),
)
ROBUSTBENCH = Baseline(
    name="robustbench-alexnet",
    errors=tuple((corruption, tuple(1 - accuracy for accuracy in row)) for corruption, row in _ACCURACIES),
    clean=1 - 0.5624,
    source="RobustBench: a standardized adversarial robustness benchmark (Croce et al., 2021), "
    "https://arxiv.org/abs/2010.09670, row AlexNet of model_info/imagenet/corruptions/unaggregated_results.csv, "
    "https://github.com/RobustBench/robustbench",
    clean_source="clean_acc in AlexNet.json, beside it",
)

BASELINES: Mapping[str, Baseline] = MappingProxyType({entry.name: entry for entry in (HENDRYCKS, ROBUSTBENCH)})
"""The published baselines by name; both are AlexNet on ImageNet-C."""
