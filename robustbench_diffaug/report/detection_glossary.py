"""What the metrics of out-of-distribution detection are, and the scores that they are of."""

from robustbench_diffaug.report.entry import Entry, Source

__all__ = ["ENTRIES"]

FIGURES = "auroc|fpr95_ood_positive|fpr95_id_positive|aupr_in|aupr_out|detection_error|auoscr"

OPENOOD = Source(
    "OpenOOD v1.5: enhanced benchmark for out-of-distribution detection",
    "Zhang et al.", 2023, "https://arxiv.org/abs/2306.09301",
)  # fmt: skip
DELONG = Source(
    "Comparing the areas under two or more correlated receiver operating characteristic curves: a nonparametric "
    "approach",
    "DeLong, DeLong and Clarke-Pearson", 1988, "https://doi.org/10.2307/2531595",
)  # fmt: skip
OSCR = Source(
    "Reducing network agnostophobia", "Dhamija, Günther and Boult", 2018, "https://arxiv.org/abs/1811.04110",
)  # fmt: skip
SPECTRUM = Source(
    "Full-spectrum out-of-distribution detection",
    "Yang, Zhou and Liu", 2022, "https://arxiv.org/abs/2204.05306",
)  # fmt: skip
BASELINE = Source(
    "A baseline for detecting misclassified and out-of-distribution examples in neural networks",
    "Hendrycks and Gimpel", 2017, "https://arxiv.org/abs/1610.02136",
)  # fmt: skip
SCALING = Source(
    "Scaling out-of-distribution detection for real-world settings",
    "Hendrycks et al.", 2022, "https://arxiv.org/abs/1911.11132",
)  # fmt: skip
ENERGY = Source(
    "Energy-based out-of-distribution detection", "Liu, Wang, Owens and Li", 2020, "https://arxiv.org/abs/2010.03759",
)  # fmt: skip
ENTROPY = Source(
    "Entropy maximization and meta classification for out-of-distribution detection in semantic segmentation",
    "Chan, Rottmann and Gottschalk", 2021, "https://arxiv.org/abs/2012.06575",
)  # fmt: skip
GEN = Source(
    "GEN: pushing the limits of softmax-based out-of-distribution detection",
    "Liu, Lochman and Zach", 2023,
    "https://openaccess.thecvf.com/content/CVPR2023/html/Liu_GEN_Pushing_the_Limits_of_Softmax-Based_Out-of-Distribution_Detection_CVPR_2023_paper.html",
)  # fmt: skip
TEMPERATURE = Source(
    "On calibration of modern neural networks",
    "Guo, Pleiss, Sun and Weinberger", 2017, "https://arxiv.org/abs/1706.04599",
)  # fmt: skip
REACT = Source(
    "ReAct: out-of-distribution detection with rectified activations",
    "Sun, Guo and Li", 2021, "https://arxiv.org/abs/2111.12797",
)  # fmt: skip
ASH = Source(
    "Extremely simple activation shaping for out-of-distribution detection",
    "Djurisic, Bozanic, Ashok and Liu", 2023, "https://arxiv.org/abs/2209.09858",
)  # fmt: skip
SCALE = Source(
    "Scaling for training time and post-hoc out-of-distribution detection enhancement",
    "Xu, Chen, Franchi and Yao", 2024, "https://arxiv.org/abs/2310.00227",
)  # fmt: skip
DICE = Source(
    "DICE: leveraging sparsification for out-of-distribution detection",
    "Sun and Li", 2022, "https://arxiv.org/abs/2111.09805",
)  # fmt: skip
KNN = Source(
    "Out-of-distribution detection with deep nearest neighbors",
    "Sun, Ming, Zhu and Li", 2022, "https://arxiv.org/abs/2204.06507",
)  # fmt: skip
MAHALANOBIS = Source(
    "A simple unified framework for detecting out-of-distribution samples and adversarial attacks",
    "Lee, Lee, Lee and Shin", 2018, "https://arxiv.org/abs/1807.03888",
)  # fmt: skip
RELATIVE = Source(
    "A simple fix to Mahalanobis distance for improving near-OOD detection",
    "Ren et al.", 2021, "https://arxiv.org/abs/2106.09022",
)  # fmt: skip
VIM = Source(
    "ViM: out-of-distribution with virtual-logit matching",
    "Wang, Li, Feng and Zhang", 2022, "https://arxiv.org/abs/2203.10807",
)  # fmt: skip
SHE = Source(
    "Out-of-distribution detection based on in-distribution data patterns memorization with modern Hopfield energy",
    "Zhang et al.", 2023, "https://openreview.net/forum?id=KkazG4lgKL",
)  # fmt: skip
GUIDANCE = Source(
    "Nearest neighbor guidance for out-of-distribution detection",
    "Park, Jung and Teoh", 2023, "https://arxiv.org/abs/2309.14888",
)  # fmt: skip
ODIN = Source(
    "Enhancing the reliability of out-of-distribution image detection in neural networks",
    "Liang, Li and Srikant", 2018, "https://arxiv.org/abs/1706.02690",
)  # fmt: skip
GRADNORM = Source(
    "On the importance of gradients for detecting distributional shifts in the wild",
    "Huang, Geng and Li", 2021, "https://arxiv.org/abs/2110.00218",
)  # fmt: skip

# Of each score: its formula, higher for in-distribution, and its paper. f are the logits, p their softmax, z the input
# of the last layer, W and b that layer.
SCORES: tuple[tuple[str, str, Source | None], ...] = (
    ("msp", "maxₖ pₖ, the largest class probability.", BASELINE),
    ("maxlogit", "maxₖ fₖ.", SCALING),
    ("energy", "ln Σₖ exp fₖ, the negative energy.", ENERGY),
    ("entropy", "Σₖ pₖ ln pₖ, the negative entropy.", ENTROPY),
    ("gen", "−Σ (pₖ (1 − pₖ))^γ over the M largest pₖ, the negative generalised entropy.", GEN),
    ("temperature", "maxₖ of the softmax of f / T, with the T of the least log-likelihood loss on val.", TEMPERATURE),
    ("klm", "−minₖ KL(p ‖ mean p of the validation images predicted as k).", SCALING),
    ("react", "ln Σ exp(W min(z, c) + b), with c a percentile of all activations on val.", REACT),
    ("ash", "ash-b, the variant of the protocol.", ASH),
    ("ash-b", "ln Σ exp(W z′ + b): the k largest of z become Σz / k each, all others 0.", ASH),
    ("ash-s", "ln Σ exp(W z′ + b): the k largest of z times exp(Σz / their sum), all others 0.", ASH),
    ("ash-p", "ln Σ exp(W z′ + b): all but the k largest of z become 0.", ASH),
    ("scale", "ln Σ exp(W z′ + b), z′ = z exp(Σz / sum of the k largest).", SCALE),
    ("dice", "ln Σ exp of W z + b over those weights alone that contribute most on the training images.", DICE),
    ("knn", "minus the squared distance of z / |z| to its k-th nearest among the training images.", KNN),
    ("mds", "−minₖ (z − μₖ)ᵀ Σ⁻¹ (z − μₖ), class means and one covariance of the training images.", MAHALANOBIS),
    ("rmds", "as mds, with the distance to the mean of all training images taken off.", RELATIVE),
    ("vim", "ln Σ exp fₖ − α |part of z outside the principal space of the training images|.", VIM),
    ("she", "zᵀ (mean z of the training images of the predicted class that are predicted right).", SHE),
    ("nnguide", "energy times the mean of the k largest similarities to training images, each times its energy.",
     GUIDANCE),
    ("odin", "maxₖ of the softmax of f / T, of the image moved a small step towards it.", ODIN),
    ("gradnorm", "l1 norm of the gradient, in the last layer's weights, of KL(uniform ‖ p).", GRADNORM),
    ("average", "of the figures of the scores that the suite averages; no score of its own."
     " Its interval is of the mean.", None),
)  # fmt: skip


def _score(name: str, formula: str, source: Source | None) -> Entry:
    return Entry(f"…/{name}/…", rf"(gain/)?({FIGURES})/{name}/.+", f"the score {name}: {formula}", source)


ENTRIES = (
    Entry(
        "auroc/<score>/<near|far|dataset>",
        r"auroc/.+",
        "P(score of an in-distribution image > score of another) + P(they are equal) / 2. near and far: the unweighted "
        "mean over the datasets of that role, as OpenOOD v1.5 has it.",
        OPENOOD,
    ),
    Entry(
        "interval of auroc and gain/auroc",
        r"(gain/)?auroc/.+",
        "by the variances of placement values, which take in that the same ID images are behind all parts of a mean or "
        "a difference.",
        DELONG,
    ),
    Entry(
        "…/near-fs, …/far-fs",
        rf"({FIGURES})/.+/(near|far)-fs",
        "full spectrum: images of the known classes under covariate shift (csid) count as in-distribution too.",
        SPECTRUM,
    ),
    Entry(
        "fpr95_ood_positive/…",
        r"fpr95_ood_positive/.+",
        "share of ID images that are flagged at the highest threshold that flags at least 95 % of the OOD images: "
        "OpenOOD v1.5's. Not comparable with fpr95_id_positive.",
        OPENOOD,
    ),
    Entry(
        "fpr95_id_positive/…",
        r"fpr95_id_positive/.+",
        "share of OOD images that pass at the threshold that passes at least 95 % of the ID images: that of older "
        "papers, and of OpenOOD before August 2023. Not comparable with fpr95_ood_positive.",
        BASELINE,
    ),
    Entry(
        "aupr_in/…, aupr_out/…",
        r"aupr_(in|out)/.+",
        "area under the precision-recall curve, by trapezoids, with ID (in) or OOD (out) as positive; it moves with "
        "the number of images of either kind.",
        OPENOOD,
    ),
    Entry(
        "detection_error/…",
        r"detection_error/.+",
        "minimum over thresholds of (share of ID flagged + share of OOD passed) / 2.",
        ODIN,
    ),
    Entry(
        "auoscr/…",
        r"auoscr/.+",
        "area under the share of ID images that pass and are classified right against the share of OOD images that "
        "pass.",
        OSCR,
    ),
    Entry(
        "roc/<score>/<near|far>@fpr=<x>",
        r"roc/.+",
        "share of OOD images flagged at the threshold that flags the share x of the ID images.",
        OPENOOD,
    ),
    Entry(
        "density/<score>/<role>@s=<x>",
        r"density/.+",
        "share of the role's images whose score lies in the bin around x; 0 and 1 are the 0.5 and 99.5 percentiles of "
        "all scores.",
    ),
    Entry(
        "sweep/<score>@<parameter>=<value>, chosen/<score>",
        r"sweep/.+|chosen/.+",
        "auroc of ID validation against OOD validation images at each value of a hyper-parameter, and the value taken: "
        "the first of the best.",
        OPENOOD,
    ),
    Entry(
        "gain/<figure>/<score>/<near|far|dataset>",
        rf"gain/({FIGURES})/.+",
        "the figure of the checkpoint minus that of the one it is compared with, on the same images.",
        DELONG,
    ),
    *(_score(*score) for score in SCORES),
)  # fmt: skip
