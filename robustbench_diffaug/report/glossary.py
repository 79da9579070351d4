"""What each metric is: its formula, in the words of the page, and where it comes from."""

import re
from collections.abc import Iterable

from robustbench_diffaug.report import detection_glossary
from robustbench_diffaug.report.entry import Entry, Source

__all__ = ["Entry", "entries"]


COMMON = Source(
    "Benchmarking neural network robustness to common corruptions and perturbations",
    "Hendrycks and Dietterich", 2019, "https://arxiv.org/abs/1903.12261",
)  # fmt: skip
DIFFAUG = Source(
    "DiffAug: a diffuse-and-denoise augmentation for training robust classifiers",
    "Sastry, Dumpala and Oore", 2024, "https://arxiv.org/abs/2306.09192",
)  # fmt: skip
ADAPTATION = Source(
    "Back to the source: diffusion-driven adaptation to test-time corruption",
    "Gao et al.", 2023, "https://arxiv.org/abs/2207.03442",
)  # fmt: skip
CALIBRATION = Source(
    "On calibration of modern neural networks",
    "Guo, Pleiss, Sun and Weinberger",
    2017,
    "https://arxiv.org/abs/1706.04599",
)
PROPER = Source(
    "Strictly proper scoring rules, prediction, and estimation",
    "Gneiting and Raftery", 2007, "https://doi.org/10.1198/016214506000001437",
)  # fmt: skip
SMOOTHING = Source(
    "Certified adversarial robustness via randomized smoothing",
    "Cohen, Rosenfeld and Kolter", 2019, "https://arxiv.org/abs/1902.02918",
)  # fmt: skip
MACER = Source(
    "MACER: attack-free and scalable robust training via maximizing certified radius",
    "Zhai et al.", 2020, "https://arxiv.org/abs/2001.02378",
)  # fmt: skip
BAND = Source(
    "The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality",
    "Massart", 1990, "https://doi.org/10.1214/aop/1176990746",
)  # fmt: skip
PAIRED = Source(
    "Adding error bars to evals: a statistical approach to language model evaluations",
    "Miller", 2024, "https://arxiv.org/abs/2411.00640",
)  # fmt: skip
BINOMIAL = Source(
    "The use of confidence or fiducial limits illustrated in the case of the binomial",
    "Clopper and Pearson", 1934, "https://doi.org/10.1093/biomet/26.4.404",
)  # fmt: skip

ALWAYS = (
    Entry(
        "interval",
        "",
        "The range beside each figure: where it would lie over other samples from the same source, with a "
        "confidence of 95 % unless the settings say otherwise.",
        BINOMIAL,
    ),
    Entry(
        "rank",
        "",
        "From 1 + the number of checkpoints whose whole interval is better, to the number of those whose "
        "whole interval is not worse: 1–3 means that first to third cannot be told apart.",
    ),
)
ENTRIES = (
    Entry(
        "accuracy/<dataset>",
        r"(?!(predict|smoothed)/)(.+/)?accuracy(/[^@]+)?",
        "mean of 1[argmax f(x) = y] over the samples (x, y). clean: the images as they are.",
    ),
    Entry(
        "accuracy/<corruption>@s<severity>",
        r"(.+/)?accuracy/[^@]+@s\d+",
        "accuracy on the images under the corruption; without a severity the mean over those of the suite; "
        "mean: over all corruptions, mean-<family>: of one family; their intervals resample images, with all "
        "corruptions of an image together.",
        COMMON,
    ),
    Entry(
        "mce/<baseline>",
        r"(.+/)?mce/.+",
        "mean over corruptions c of Σₛ E(c, s) / Σₛ E₀(c, s), with E the error and E₀ that of the named baseline.",
        COMMON,
    ),
    Entry(
        "relative-mce/<baseline>",
        r"(.+/)?relative-mce/.+",
        "mean over corruptions c of Σₛ (E(c, s) − E(clean)) / Σₛ (E₀(c, s) − E₀(clean)): of the errors that the "
        "corruptions add.",
        COMMON,
    ),
    Entry(
        "accuracy/<dataset>/classes=<space>",
        r"(.+/)?accuracy/.+/classes=(full|subset)",
        "accuracy of predictions among all classes of the network (full), or among those that the images can be of "
        "(subset), where the dataset declares the other.",
    ),
    Entry(
        "accuracy@t=<t>, entropy@t=<t>",
        r"(.+/)?(accuracy|entropy)@t=.+",
        "of f at D(x + σₜ ε, σₜ): the image diffused to time t and denoised in one step. Entropy is the mean "
        "of −Σₖ pₖ ln pₖ, in nats.",
        DIFFAUG,
    ),
    Entry(
        "de/…, de[step=<n>]/…",
        r"de(\[step=\d+\])?/.+",
        "DiffAug-Ensemble: the class probabilities averaged over the image and its diffused-and-denoised "
        "versions; t<= those up to t only, [step=n] those of times that are multiples of n.",
        DIFFAUG,
    ),
    Entry(
        "dda/…, dda-se/…",
        r"dda(-se)?/.+",
        "diffusion-driven adaptation: the prediction on the adapted image, or, -se, the mean of the "
        "probabilities on it and on the image itself.",
        ADAPTATION,
    ),
    Entry(
        "…/gain/…",
        r"(.+/)?gain/(?!(auroc|fpr95_|aupr_|detection_error|auoscr)).+",
        "accuracy of the mode minus that of the plain network, on the same samples, with the interval of the "
        "paired difference, in percentage points.",
        PAIRED,
    ),
    Entry(
        "ece",
        r"(.+/)?ece(/.+)?",
        "expected calibration error: Σₘ (nₘ / n) |accuracyₘ − confidenceₘ| over bins m of the confidence.",
        CALIBRATION,
    ),
    Entry(
        "nll, brier, entropy",
        r"(.+/)?(nll|brier|entropy)",
        "means over the samples of −ln p(y), of Σₖ (pₖ − 1[k = y])², and of −Σₖ pₖ ln pₖ.",
        PROPER,
    ),
    Entry(
        "certified@<radius>",
        r"certified@.+",
        "share of samples whose smoothed classifier g(x) = argmaxₖ P(f(x + N(0, σ² I)) = k) is right and "
        "certified constant within the l2 radius: σ Φ⁻¹(p) ≥ radius, with p the lower Clopper-Pearson limit "
        "of the top class at confidence 1 − α. Radii in units of pixels in [0, 1]. Each certificate fails "
        "with probability at most α.",
        SMOOTHING,
    ),
    Entry(
        "certified-band@<radius>",
        r"certified-band@.+",
        "certified accuracy with an interval that holds at all radii together: ± √(ln(2 / δ) / 2n), δ = 5 %.",
        BAND,
    ),
    Entry(
        "certified-lower@<radius>",
        r"certified-lower@.+",
        "what the certified accuracy of these very images is at least, at all radii together, with probability 1 − ρ "
        "over the noise: the share less q / n, with q the 1 − ρ quantile of Binomial(n, α), which the number of "
        "wrong certificates does not exceed. Of other images it says nothing.",
        SMOOTHING,
    ),
    Entry(
        "certified-envelope@<radius>, sigma-envelope@<radius>",
        r"(certified|sigma)-envelope@.+",
        "the highest certified accuracy over noise levels, as papers print it, and the level σ that has it. The level "
        "is chosen on the same images, so the figure is too high by chance; its interval holds for all levels at once.",
    ),
    Entry(
        "certified-selected@<radius>, sigma-selected@<radius>",
        r"(certified|sigma)-selected@.+",
        "certified accuracy, on one random half of the images, at the noise level σ that is best at this radius on the "
        "other half.",
    ),
    Entry(
        "certified-any@<radius>",
        r"certified-any@.+",
        "share of samples that at least one of S noise levels certifies at the radius, each at α / S, so that the "
        "certificates of a sample are all true but for a probability of α. The levels are different classifiers.",
    ),
    Entry(
        "smoothed/accuracy",
        r"smoothed/accuracy",
        "share of samples whose certified class is right, whatever the radius; where it abstains it is wrong.",
        SMOOTHING,
    ),
    Entry(
        "predict/accuracy, predict/abstain",
        r"predict/(accuracy|abstain)",
        "of the prediction that may abstain: the class with most of the n votes, unless a two-sided binomial test of "
        "the two top counts has a p-value above α. A class that is not the most probable one is returned with "
        "probability at most α.",
        SMOOTHING,
    ),
    Entry(
        "abstain",
        r"abstain",
        "share of samples on which the smoothed classifier returns no class: p < 1/2.",
        SMOOTHING,
    ),
    Entry(
        "acr",
        r"acr",
        "average certified radius: mean over the samples of the certified radius, 0 where the prediction is "
        "wrong or abstains.",
        MACER,
    ),
    *detection_glossary.ENTRIES,
    Entry(
        "forwards/…, backwards/…",
        r"(.+/)?(forwards|backwards)(-per-image)?/.+",
        "images that went through a network, forwards or for its gradient: what the figures cost, on any machine; "
        "-per-image: in the mode that stands before it.",
    ),
)


def entries(metrics: Iterable[str]) -> list[Entry]:
    """The entries that the metrics of a page need."""
    names = list(dict.fromkeys(metrics))
    used = [entry for entry in ENTRIES if any(re.fullmatch(entry.pattern, name) for name in names)]
    return [*used, *ALWAYS] if names else []
