"""Scores of logits alone: softmax, energy, entropies, temperature scaling and KL matching.

The probabilities of `msp`, `gen` and `temperature` are float32, as OpenOOD's are: where a network is sure they round to
1, and the ties this makes (or, in `gen`, the rounding of 1 - p) are part of the protocol. All else is float64.

Logits have shape (n, k), scores shape (n,); scores are higher for what looks in-distribution.
"""

from math import exp, log
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax, xlogy

from robustbench_diffaug.detection.passes import add_rows, chunks_of
from robustbench_diffaug.detection.rows import Chunks, Scorer, Source

__all__ = ["energy", "energy_score", "entropy", "gen", "klm", "max_logit", "max_softmax", "temperature"]

Floats: TypeAlias = NDArray[np.float64]
Logits: TypeAlias = NDArray[Any]  # float32 as recorded, or float64

TRUNCATED = 100  # M of `gen`
BLOCK = 4096  # rows whose float64 intermediates are held at once


def max_softmax(logits: Logits) -> Floats:
    """The largest probability, max_c p_c.

    References:
        A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks (Hendrycks and
            Gimpel, 2017), https://arxiv.org/abs/1610.02136
    """
    return _probabilities(logits).amax(1).double().numpy()


def max_logit(logits: Logits) -> Floats:
    """The largest logit, max_c z_c.

    References:
        Scaling Out-of-Distribution Detection for Real-World Settings (Hendrycks et al., 2022),
            https://arxiv.org/abs/1911.11132
    """
    found: Floats = logits.max(axis=1).astype(np.float64)
    return found


def energy(logits: Logits, temperature: float = 1.0) -> Floats:
    """The negative free energy, T log sum_c exp(z_c / T).

    Arguments:
        logits: Of shape (n, k).
        temperature: T, above 0.

    References:
        Energy-based Out-of-distribution Detection (Liu et al., 2020), https://arxiv.org/abs/2010.03759
    """
    found: Floats = temperature * logsumexp(logits.astype(np.float64) / temperature, axis=1)
    return found


def entropy(logits: Logits) -> Floats:
    """The negative entropy of the probabilities, sum_c p_c log p_c, in nats.

    References:
        Entropy Maximization and Meta Classification for Out-of-Distribution Detection in Semantic Segmentation (Chan,
            Rottmann and Gottschalk, 2021), https://arxiv.org/abs/2012.06575
    """
    exact = logits.astype(np.float64)
    probabilities = softmax(exact, axis=1)
    # log p from the logits, since p itself may underflow: then 0 times a finite number is 0
    found: Floats = (probabilities * (exact - logsumexp(exact, axis=1, keepdims=True))).sum(1)
    return found


def energy_score(source: Source, temperature: float) -> Scorer:
    """`energy` at a temperature T.

    Raises:
        ValueError: T is not above 0.
    """
    _positive(temperature, "energy", "temperature")
    return lambda rows: energy(rows.logits, temperature)


def gen(source: Source, gamma: float) -> Scorer:
    """The generalised entropy, -sum of (p_c (1 - p_c))^gamma over the M = 100 largest probabilities.

    OpenOOD sweeps gamma and M together; here gamma is swept and M stays at its default.

    Raises:
        ValueError: gamma is not above 0.

    References:
        GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection (Liu, Lochman and Zach, 2023),
            https://openaccess.thecvf.com/content/CVPR2023/papers/Liu_GEN_Pushing_the_Limits_of_Softmax-Based_Out-of-Distribution_Detection_CVPR_2023_paper.pdf
    """
    _positive(gamma, "gen", "gamma")

    def score(logits: Logits) -> Floats:
        largest = _probabilities(logits).sort(dim=1).values[:, -TRUNCATED:].double()
        return -(largest**gamma * (1 - largest) ** gamma).sum(1).numpy()

    return lambda rows: score(rows.logits)


def temperature(source: Source, value: float | None = None) -> Scorer:
    """The largest probability of z / T, with T fitted to validation images by their negative log-likelihood.

    T is where OpenOOD's 50 steps of L-BFGS from 1.5 with rate 0.01 end, somewhat short of the minimum. Where these run
    away, as they do if the minimum is far below 1.5, and end at a T below 0 or a likelihood worse than the first, T is
    the minimum itself, between 0.01 and 100. The logits of the validation images are kept meanwhile.

    Raises:
        ValueError: There are no validation images, or a label is none of the network's classes.

    References:
        On Calibration of Modern Neural Networks (Guo et al., 2017), https://arxiv.org/abs/1706.04599
    """
    found = np.float32(_temperature(_Likelihood.of(chunks_of(source, "val", "temperature"))))
    return lambda rows: max_softmax(rows.logits / found)


class _Likelihood(NamedTuple):
    """The mean negative log-likelihood of labels, as a function of the temperature."""

    logits: Logits
    labels: NDArray[np.integer[Any]]

    @classmethod
    def of(cls, chunks: Chunks) -> "_Likelihood":
        """That of all rows."""
        kept = [(rows.logits, rows.labels) for rows in chunks()]
        logits, labels = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
        for label in labels[(labels < 0) | (labels >= logits.shape[1])]:
            raise ValueError(
                f"temperature: a val image has label {label}; the network's classes are 0 to {logits.shape[1] - 1}"
            )
        return cls(logits, labels)

    def at(self, temperature: float) -> tuple[float, float]:
        """Its value and its derivative."""
        total, slope = 0.0, 0.0
        for start in range(0, len(self.labels), BLOCK):
            part = self.logits[start : start + BLOCK].astype(np.float64)
            own = np.take_along_axis(part, self.labels[start : start + BLOCK, None], axis=1)[:, 0]
            total += float((logsumexp(part / temperature, axis=1) - own / temperature).sum())
            slope += float((own - (softmax(part / temperature, axis=1) * part).sum(1)).sum()) / temperature**2
        return total / len(self.labels), slope / len(self.labels)


def _temperature(likelihood: _Likelihood) -> float:
    """OpenOOD's steps from 1.5 and, where they do not improve on it, the minimum."""
    value = torch.tensor([1.5], dtype=torch.float64)
    optimiser = torch.optim.LBFGS([value], lr=0.01, max_iter=50)

    def loss() -> float:
        found, slope = likelihood.at(value.item())
        value.grad = torch.tensor([slope], dtype=torch.float64)
        return found

    optimiser.step(loss)
    if value.item() > 0 and likelihood.at(value.item())[0] <= likelihood.at(1.5)[0]:
        return value.item()
    bounds = log(0.01), log(100)  # in log T there is one minimum, since the likelihood is convex in 1 / T
    best = minimize_scalar(lambda place: likelihood.at(exp(place))[0], bounds=bounds, method="bounded")
    return exp(best.x)


def klm(source: Source, value: float | None = None) -> Scorer:
    """KL matching: -min_c KL(p, q_c), with q_c the mean probabilities of validation images that are predicted to be c.

    For a class that is never predicted q_c is all at c, as OpenOOD has it; then KL is infinite unless p is, too.

    Raises:
        ValueError: There are no validation images.

    References:
        Scaling Out-of-Distribution Detection for Real-World Settings (Hendrycks et al., 2022),
            https://arxiv.org/abs/1911.11132
    """
    typical = _typical(chunks_of(source, "val", "klm"))
    impossible = typical == 0
    logs = np.log(np.where(impossible, 1.0, typical))

    def score(logits: Logits) -> Floats:
        given = softmax(logits.astype(np.float64), axis=1)
        divergence = xlogy(given, given).sum(1)[:, None] - given @ logs.T
        divergence[(given > 0).astype(np.float64) @ impossible.T > 0] = np.inf
        lowest: Floats = -divergence.min(1)
        return lowest

    return lambda rows: score(rows.logits)


def _typical(chunks: Chunks) -> Floats:
    """The mean probabilities by predicted class, of shape (k, k); each row sums to 1."""
    totals: Floats = np.zeros((0, 0))
    for rows in chunks():
        if not totals.size:
            totals = np.zeros((rows.logits.shape[1], rows.logits.shape[1]))
        add_rows(totals, rows.logits.argmax(1), softmax(rows.logits.astype(np.float64), axis=1))
    mass = totals.sum(1, keepdims=True)
    return np.where(mass > 0, totals / np.where(mass > 0, mass, 1), np.eye(len(totals)))


def _probabilities(logits: Logits) -> torch.Tensor:
    """The softmax in float32, of shape (n, k)."""
    return torch.softmax(torch.tensor(logits, dtype=torch.float32), 1)  # a copy: recorded arrays may be read-only


def _positive(value: float, name: str, parameter: str) -> None:
    """Raises ValueError for a value that is not above 0."""
    if not value > 0:
        raise ValueError(f"{name}: {parameter} is {value:g}; it is above 0")
