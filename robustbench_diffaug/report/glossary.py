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
ALIGNED = Source(
    "Are perceptually-aligned gradients a general property of robust classifiers?",
    "Kaur, Cohen and Lipton", 2019, "https://arxiv.org/abs/1910.08640",
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
        "frechet, precision, recall, density, coverage@scale=<w>",
        r"(gain/)?(frechet|precision|recall|density|coverage)@scale=.+",
        "images drawn under guidance of scale w against real ones, by the features of the network that the group "
        "names: squared Frechet distance of fitted Gaussians (no FID unless that is its Inception network); shares of "
        "drawn images near real ones and of real near drawn, real balls per drawn image, and real balls with a drawn "
        "image.",
    ),
    Entry(
        "agreement, score@scale=<w>",
        r"(gain/)?(agreement|score)(@scale=|/real).*",
        "by an independent classifier: the share of drawn images whose prediction is the class asked for, and "
        "exp(mean KL(p(y|x), mean p)). real: of the real images, against their labels.",
    ),
    Entry(
        "accuracy@t=<t>, entropy@t=<t>",
        r"(gain/)?(accuracy|entropy)@t=.+",
        "of f at D(x + σₜ ε, σₜ): the image diffused to time t and denoised in one step. Entropy is the mean "
        "of −Σₖ pₖ ln pₖ, in nats.",
        DIFFAUG,
    ),
    Entry(
        "noisy/…@t=<t>",
        r"noisy/.+@t=.+",
        "of f at xₜ = x + σₜ ε itself, in the units of [0, 1] and not clamped; networks that want it are told σₜ, or "
        "given D(xₜ, σₜ) too.",
        DIFFAUG,
    ),
    Entry(
        "entropy_gap@t=<t>, entropy/uniform",
        r"(.+/)?(entropy_gap@t=.+|entropy/uniform)",
        "ln K − entropy: how far predictions are from the uniform one among K classes, whose entropy is ln K.",
        DIFFAUG,
    ),
    Entry(
        "nll@t=<t>, ece@t=<t>",
        r"(.+/)?(nll|ece)@t=.+",
        "the mean of −ln p(y), and the calibration error as of images, both of the images diffused to t.",
        PROPER,
    ),
    Entry(
        "entropy/early, entropy/late",
        r"(.+/)?entropy/(early|late)",
        "the entropy averaged over the times up to 450, and over those from 500 on: in the paper networks trained with "
        "DiffAug have less of it at early times and more at late ones.",
        DIFFAUG,
    ),
    Entry(
        "random-time/accuracy/<group>",
        r"(.+/)?random-time/(accuracy/)?.+",
        "share of right predictions where each image is diffused to one time of its own, uniform over the schedule, "
        "the same for all networks.",
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
        r"(.+/)?gain/mean(-noise)?",
        "accuracy of the mode minus that of the plain network, on the same samples, with the interval of the "
        "paired difference, in percentage points.",
        PAIRED,
    ),
    Entry(
        "gain/<figure>",
        r"(.+/)?gain/(?!(mean$|mean-noise$|auroc|fpr95_|aupr_|detection_error|auoscr)).+",
        "the figure of a network minus that of the one that the setting gains compares it with, on the same samples "
        "at the same noise, with the interval of the paired difference.",
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
    Entry(
        "gradient_norm@t=<t>, jacobian_norm@t=<t>",
        r"(.+/)?(gradient|jacobian)_norm@t=.+",
        "the mean l2 norm of g = ∇ ln p(y | x), and the root of the mean of ‖J‖², J the Jacobian of the logits and "
        "‖J‖² its Frobenius norm's square, at x = xₜ = x₀ + σₜ ε; denoised/: at and to D(xₜ); chain/: at D(xₜ), to xₜ.",
        DIFFAUG,
    ),
    Entry(
        "pag_cosine@t=<t>, pag_class_cosine@t=<t>",
        r"(.+/)?pag_(class_)?cosine@t=.+",
        "the mean cosine of g with D(xₜ) − xₜ, and with m_y − m_k, the mean images of the label's class and of the "
        "other class with the highest logit: how far gradients are perceptually aligned.",
        ALIGNED,
    ),
    Entry(
        "gradient_sparsity@t=<t>, gradient_variation@t=<t>",
        r"(.+/)?gradient_(sparsity|variation)@t=.+",
        "the mean of (√d − ‖g‖₁ / ‖g‖₂) / (√d − 1), and of the total variation of g over its spread, relative to that "
        "of the image.",
        ALIGNED,
    ),
    Entry(
        "generated_accuracy@t=<t>, generated_confidence@t=<t>",
        r"(.+/)?generated_(accuracy|confidence)@t=.+",
        "share of images that another classifier takes for a class drawn for each, after some steps along the "
        "gradient of its log-probability, and that classifier's probability of it.",
        ALIGNED,
    ),
    *detection_glossary.ENTRIES,
    Entry(
        "jacobian_…@t=<t>, denoising_error@t=<t>, trace_gap@t=<t>, effective_rank@t=<t>",
        r"(jacobian_(trace|asymmetry|smallest|largest)|denoising_error|trace_gap|effective_rank)@t=.+",
        "of J = dD(xₜ, σₜ)/dx, means over images: tr J; ‖x − D‖² / σₜ² and how far tr J is above it, 0 for the best "
        "denoiser; ‖J − Jᵀ‖ / ‖J‖; the smallest eigenvalue of (J + Jᵀ) / 2; the largest singular value; "
        "(tr J)² / ‖J‖².",
        DIFFAUG,
    ),
    Entry(
        "denoised-rms@t=<t>, <solver>-rms@t=<t>, mixed-rms@lambda=<share>, adapted-rms",
        r"(denoised|ddim|dpm-solver-2)-rms@t=.+|mixed-rms@lambda=.+|adapted-rms",
        "root mean square difference of pixels between an image and what a denoiser makes of it: diffused to t and "
        "denoised in one step, by a solver, with a share of the class-conditional score, or adapted.",
        DIFFAUG,
    ),
    Entry(
        "toy-distance/<kind>",
        r"toy-distance/.+",
        "mean distance of points in the plane from the arc around which their data lie, in radii of the arc: of the "
        "data, diffused, and denoised with the exact score.",
        DIFFAUG,
    ),
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
