"""A score of gradients that needs none: that of the last layer is a closed form of logits and features."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from robustbench_diffaug.detection.passes import features_of
from robustbench_diffaug.detection.rows import Rows

__all__ = ["gradnorm"]


def gradnorm(rows: Rows) -> NDArray[np.float64]:
    """GradNorm, the L1 norm of a loss's gradient to the last layer's weight.

    The loss is the cross-entropy to all k classes, `-sum_j log softmax(W z + b)_j`; its gradient is the outer product
    of `k softmax(W z + b) - 1` and z, whose norm is `|k softmax(W z + b) - 1|_1 |z|_1`. This is k times the norm for
    the divergence from the uniform distribution, as in the paper, and the number that OpenOOD gives.

    Raises:
        ValueError: Features are missing.

    References:
        On the Importance of Gradients for Detecting Distributional Shifts in the Wild (Huang et al., 2021),
            https://arxiv.org/abs/2110.00218
    """
    logits = rows.logits.astype(np.float64)
    shares = softmax(logits, axis=1) * logits.shape[1]
    found: NDArray[np.float64] = np.abs(shares - 1).sum(axis=1) * np.abs(features_of(rows, "gradnorm")).sum(axis=1)
    return found
