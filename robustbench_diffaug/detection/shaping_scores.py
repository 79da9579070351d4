"""Scores that change the features or the last layer first, and take the energy of the logits: ReAct, ASH, SCALE, DICE.

z is one row of features, with d entries, W and b the last layer, and energy(y) = log sum_c exp(y_c). All but DICE
presume that z is not negative, as after a ReLU. For a percentage p, the k = d - round(d p / 100) largest entries of z
are its top, a half rounded to even.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from robustbench_diffaug.detection.logit_scores import energy
from robustbench_diffaug.detection.passes import chunks_of, features_of, head_of, percentile, percents
from robustbench_diffaug.detection.rows import Rows, Scorer, Source

__all__ = ["ash_b", "ash_p", "ash_s", "dice", "react", "scale"]

Shape: TypeAlias = Callable[[torch.Tensor, int], torch.Tensor]  # features of shape (n, d), k -> features


def react(source: Source, percent: float) -> Scorer:
    """energy(W min(z, c) + b), with c a percentile of all entries of the features of all validation images.

    Raises:
        ValueError: The last layer, features or validation images are missing, or `percent` is not in [0, 100].

    References:
        ReAct: Out-of-distribution Detection With Rectified Activations (Sun, Guo and Li, 2021),
            https://arxiv.org/abs/2111.12797
    """
    head, chunks = head_of(source, "react"), chunks_of(source, "val", "react")
    limit = percentile(chunks, percents(percent, "react", "percentile"), "react")
    return lambda rows: energy(head.logits(np.minimum(features_of(rows, "react", head.weight.shape[1]), limit)))


def ash_b(source: Source, percent: float) -> Scorer:
    """energy(W z' + b), where z' shares the sum of z out among its top, and is 0 elsewhere: ASH-B, OpenOOD's `ash`.

    Among equal entries at the edge of the top it is torch's `topk` that chooses, as in OpenOOD.

    Raises:
        ValueError: The last layer or features are missing, or `percent` leaves no top.

    References:
        Extremely Simple Activation Shaping for Out-of-Distribution Detection (Djurisic et al., 2023),
            https://arxiv.org/abs/2209.09858
    """

    def shape(features: torch.Tensor, top: int) -> torch.Tensor:
        share = (features.sum(1, keepdim=True) / top).expand(-1, top)
        return torch.zeros_like(features).scatter(1, features.topk(top, 1).indices, share)

    return _shaped(source, percent, "ash-b", shape)


def ash_p(source: Source, percent: float) -> Scorer:
    """energy(W z' + b), where z' is z in its top, and 0 elsewhere: ASH-P.

    Raises:
        ValueError: The last layer or features are missing, or `percent` leaves no top.

    References:
        Extremely Simple Activation Shaping for Out-of-Distribution Detection (Djurisic et al., 2023),
            https://arxiv.org/abs/2209.09858
    """
    return _shaped(source, percent, "ash-p", _pruned)


def ash_s(source: Source, percent: float) -> Scorer:
    """energy(W z' + b), where z' is exp(s / t) z in its top, and 0 elsewhere; s sums z, t its top: ASH-S.

    Raises:
        ValueError: The last layer or features are missing, or `percent` leaves no top.

    References:
        Extremely Simple Activation Shaping for Out-of-Distribution Detection (Djurisic et al., 2023),
            https://arxiv.org/abs/2209.09858
    """
    return _shaped(source, percent, "ash-s", lambda features, top: _pruned(features, top) * _factor(features, top))


def scale(source: Source, percent: float) -> Scorer:
    """energy(W exp(s / t) z + b), where s sums z and t its top: SCALE.

    Raises:
        ValueError: The last layer or features are missing, or `percent` leaves no top.

    References:
        Scaling for Training Time and Post-hoc Out-of-distribution Detection Enhancement (Xu et al., 2024),
            https://arxiv.org/abs/2310.00227
    """
    return _shaped(source, percent, "scale", lambda features, top: features * _factor(features, top))


def dice(source: Source, percent: float) -> Scorer:
    """energy(W' z + b), where W' is W where W m exceeds a percentile of all of it, and 0 elsewhere: DICE.

    m is the mean of the features of all fit images, and W m has the entries W_cj m_j.

    Raises:
        ValueError: The last layer, features or fit images are missing, or `percent` is not in [0, 100].

    References:
        DICE: Leveraging Sparsification for Out-of-Distribution Detection (Sun and Li, 2022),
            https://arxiv.org/abs/2111.09805
    """
    head, chunks = head_of(source, "dice"), chunks_of(source, "fit", "dice")
    total: NDArray[np.float64] = np.zeros(head.weight.shape[1])
    count = 0
    for rows in chunks():
        total += features_of(rows, "dice", len(total)).sum(0)
        count += len(rows.logits)
    parts = head.weight * (total / count)
    kept = parts > np.percentile(parts, percents(percent, "dice", "p"))
    sparse = head._replace(weight=np.where(kept, head.weight, 0.0))
    return lambda rows: energy(sparse.logits(features_of(rows, "dice", len(total))))


def _shaped(source: Source, percent: float, name: str, shape: Shape) -> Scorer:
    """The energy after the features have been shaped."""
    head = head_of(source, name)
    width = head.weight.shape[1]
    top = width - round(width * percents(percent, name, "percentile") / 100)
    if top < 1:
        raise ValueError(f"{name}: percentile {percent:g} leaves none of {width} features: take a smaller one")

    def score(rows: Rows) -> NDArray[np.float64]:
        return energy(head.logits(shape(torch.from_numpy(features_of(rows, name, width)), top).numpy()))

    return score


def _pruned(features: torch.Tensor, top: int) -> torch.Tensor:
    """The top of the features, and 0 elsewhere."""
    values, indices = features.topk(top, 1)
    return torch.zeros_like(features).scatter(1, indices, values)


def _factor(features: torch.Tensor, top: int) -> torch.Tensor:
    """exp(s / t), of shape (n, 1). Features that are all 0 stay so under any factor: s = 0 has the factor 1."""
    whole, part = features.sum(1, keepdim=True), features.topk(top, 1).values.sum(1, keepdim=True)
    return torch.where(whole == 0, 0.0, whole / part).exp()
