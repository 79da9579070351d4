"""Scores that compare features with those of training images: neighbours, Gaussians, subspaces and class patterns.

x is one row of features, with d entries. Only `knn` keeps the features of the fit images (as float32) and `nnguide` a
hundredth of them; the others keep sums, means and d x d matrices in float64, from two passes over the fit images.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from robustbench_diffaug.detection.logit_scores import energy
from robustbench_diffaug.detection.passes import (
    ClassMeans,
    Unsuited,
    chunks_of,
    class_means,
    features_of,
    head_of,
    whole,
)
from robustbench_diffaug.detection.rows import Chunks, Rows, Scorer, Source
from robustbench_diffaug.rng import permutation

__all__ = ["knn", "mds", "nnguide", "rmds", "she", "vim"]

Floats: TypeAlias = NDArray[np.float64]

PAIRS = 1 << 24  # similarities held at once by `knn`: 64 MB
NEAR = 8  # neighbours on either side of the k-th that are looked at again in float64
GUIDE = 0.01  # alpha of `nnguide`
VIM_DIM = 256


def knn(source: Source, k: float) -> Scorer:
    """-|u - u_k|^2, where u is x / |x| and u_k the k-th nearest among the fit images' own.

    Neighbours are ranked by float32 products; the distances of the k-th and of those near it are computed again in
    float64, so that blocks and chunks do not show in a score. Features that are all 0 stay 0.

    Raises:
        ValueError: Features or fit images are missing, or `k` is no whole number; `Unsuited` if `k` exceeds them.

    References:
        Out-of-Distribution Detection with Deep Nearest Neighbors (Sun et al., 2022), https://arxiv.org/abs/2204.06507
    """
    count = whole(k, "knn", "k")
    bank = _Bank.of(chunks_of(source, "fit", "knn"))
    if count > len(bank.features):
        raise Unsuited(f"knn: k is {count}, and there are {len(bank.features)} fit images: take a smaller k")
    step = max(1, PAIRS // len(bank.features))

    def score(rows: Rows) -> Floats:
        queries = _directions(features_of(rows, "knn", bank.features.shape[1]))
        parts = [bank.distances(queries[start : start + step], count) for start in range(0, len(queries), step)]
        return -np.concatenate([np.zeros(0), *parts])

    return score


class _Bank(NamedTuple):
    """The features of the fit images, and their lengths.

    Arguments:
        features: As recorded, of shape (n, d).
        lengths: Of shape (n,); 1 where features are all 0.
    """

    features: NDArray[np.float32]
    lengths: Floats

    @classmethod
    def of(cls, chunks: Chunks) -> "_Bank":
        """All of them; the lengths are made by chunks, since features in float64 would be twice the bank."""
        kept, lengths = [], []
        for rows in chunks():
            exact = features_of(rows, "knn")
            kept.append(exact.astype(np.float32))
            lengths.append(_lengths(exact))
        return cls(np.concatenate(kept), np.concatenate(lengths))

    def distances(self, queries: Floats, k: int) -> Floats:
        """The squared distance from each query, a direction, to the direction k-th nearest to it, of shape (n,)."""
        first, last = max(0, k - 1 - NEAR), min(len(self.features), k + NEAR)
        similar = queries.astype(np.float32) @ self.features.T
        similar /= self.lengths.astype(np.float32)
        near = torch.from_numpy(similar).topk(last, 1).indices.numpy()[:, first:]
        found = np.empty(len(queries))
        for i, (query, ids) in enumerate(zip(queries, near, strict=True)):
            squares = ((self.features[ids] / self.lengths[ids, None] - query) ** 2).sum(1)
            found[i] = np.partition(squares, k - 1 - first)[k - 1 - first]
        return found


def mds(source: Source, value: float | None = None) -> Scorer:
    """Minus the squared Mahalanobis distance to the nearest class mean, with one covariance for all classes.

    The covariance is that of the features of the fit images about the means of their classes. Directions of no variance
    do not count, as in the pseudo-inverse of scikit-learn's `EmpiricalCovariance`: eigenvalues up to d times 2.2e-16 of
    the largest.

    Raises:
        ValueError: Features or fit images are missing, or a class has none.

    References:
        A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks (Lee et al., 2018),
            https://arxiv.org/abs/1807.03888
    """
    chunks = chunks_of(source, "fit", "mds")
    classes = class_means(chunks, "mds")
    within = _Gaussians.of(_within(chunks, classes, "mds"), classes.means)
    return lambda rows: -within.nearest(features_of(rows, "mds", len(within.middle)))


def rmds(source: Source, value: float | None = None) -> Scorer:
    """The score of `mds` plus the squared Mahalanobis distance to the mean of all fit images, with their covariance.

    Raises:
        ValueError: Features or fit images are missing, or a class has none.

    References:
        A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection (Ren et al., 2021),
            https://arxiv.org/abs/2106.09022
    """
    chunks = chunks_of(source, "fit", "rmds")
    classes = class_means(chunks, "rmds")
    shares = classes.counts / classes.counts.sum()
    covariance, middle = _within(chunks, classes, "rmds"), shares @ classes.means
    apart = classes.means - middle
    within = _Gaussians.of(covariance, classes.means)
    everything = _Gaussians.of(covariance + (apart.T * shares) @ apart, middle[None])

    def score(rows: Rows) -> Floats:
        features = features_of(rows, "rmds", len(middle))
        return everything.nearest(features) - within.nearest(features)

    return score


class _Gaussians(NamedTuple):
    """Gaussians of one covariance, in coordinates where it is the identity.

    Arguments:
        middle: What is subtracted from features first, of shape (d,), since sums of squares about 0 would cancel.
        whiten: To the coordinates, of shape (d, r).
        centres: Of the Gaussians in them, of shape (k, r).
    """

    middle: Floats
    whiten: Floats
    centres: Floats

    @classmethod
    def of(cls, covariance: Floats, means: Floats) -> "_Gaussians":
        """The Gaussians of a covariance, of shape (d, d), and of means, of shape (k, d)."""
        values, vectors = np.linalg.eigh(covariance)
        kept = values > _negligible(values)
        middle, whiten = means.mean(0), vectors[:, kept] / np.sqrt(values[kept])
        return cls(middle, whiten, (means - middle) @ whiten)

    def nearest(self, features: Floats) -> Floats:
        """The squared distance to the nearest centre, |z|^2 + min_c (|m_c|^2 - 2 z m_c), of shape (n,)."""
        placed = (features - self.middle) @ self.whiten
        offsets = (self.centres**2).sum(1) - 2 * placed @ self.centres.T
        found: Floats = (placed**2).sum(1) + offsets.min(1)
        return found


def _negligible(eigenvalues: Floats) -> float:
    """Up to where eigenvalues count as 0: the rule of `scipy.linalg.pinvh`."""
    return float(len(eigenvalues) * np.finfo(np.float64).eps * np.abs(eigenvalues).max())


def _within(chunks: Chunks, classes: ClassMeans, name: str) -> Floats:
    """The covariance of features about the means of their classes, of shape (d, d)."""
    width = classes.means.shape[1]
    total: Floats = np.zeros((width, width))
    for rows in chunks():
        centred = features_of(rows, name, width) - classes.means[rows.labels]
        total += centred.T @ centred
    covariance: Floats = total / classes.counts.sum()
    return covariance


def vim(source: Source, dim: float | None = None) -> Scorer:
    """energy(W x + b) - alpha |R^T (x - u)|: virtual-logit matching.

    u = -W^+ b; R are the eigenvectors of the mean of (x - u)(x - u)^T over fit images beyond the `dim` largest; alpha
    is their mean largest logit over their mean |R^T (x - u)|. Eigenvectors are those of a symmetric matrix in float64,
    where OpenOOD takes `numpy.linalg.eig` in float32.

    Arguments:
        source: With fit images and the last layer.
        dim: Dimensions of the principal space, less than d. None is OpenOOD's 256, and half of d if d is no larger.

    Raises:
        ValueError: Features, fit images or the last layer are missing; `Unsuited` if nothing is beyond `dim`.

    References:
        ViM: Out-Of-Distribution with Virtual-logit Matching (Wang et al., 2022), https://arxiv.org/abs/2203.10807
    """
    head, chunks = head_of(source, "vim"), chunks_of(source, "fit", "vim")
    width = head.weight.shape[1]
    size = (VIM_DIM if width > VIM_DIM else width // 2) if dim is None else whole(dim, "vim", "dim")
    if size >= width:
        raise Unsuited(f"vim: dim is {size} and features have {width} entries: take a dim below {width}")
    origin = -np.linalg.pinv(head.weight) @ head.bias
    values, vectors = np.linalg.eigh(_second_moment(chunks, origin))
    residual = vectors[:, : width - size]  # eigenvalues ascend
    if values[width - size - 1] <= _negligible(values):
        raise Unsuited(f"vim: features of the fit images do not vary beyond {size} dimensions: take a smaller dim")
    largest, beyond = 0.0, 0.0
    for rows in chunks():
        features = features_of(rows, "vim", width)
        largest += float(head.logits(features).max(1).sum())
        beyond += float(np.linalg.norm((features - origin) @ residual, axis=1).sum())
    alpha = largest / beyond

    def score(rows: Rows) -> Floats:
        features = features_of(rows, "vim", width)
        found: Floats = np.linalg.norm((features - origin) @ residual, axis=1)
        return energy(head.logits(features)) - alpha * found

    return score


def _second_moment(chunks: Chunks, origin: Floats) -> Floats:
    """The mean of (x - u)(x - u)^T, of shape (d, d)."""
    total: Floats = np.zeros((len(origin), len(origin)))
    count = 0
    for rows in chunks():
        moved = features_of(rows, "vim", len(origin)) - origin
        total += moved.T @ moved
        count += len(moved)
    return total / count


def she(source: Source, value: float | None = None) -> Scorer:
    """The inner product of x and the mean x of the predicted class, over fit images that are classified correctly.

    Raises:
        ValueError: Features or fit images are missing, or no image of a class is classified correctly.

    References:
        Out-of-Distribution Detection based on In-Distribution Data Patterns Memorization with Modern Hopfield Energy
            (Zhang et al., 2023), https://openreview.net/forum?id=KkazG4lgKL
    """
    chunks = chunks_of(source, "fit", "she")
    means = class_means(chunks, "she", _correct, "correctly classified ").means

    def score(rows: Rows) -> Floats:
        found: Floats = (features_of(rows, "she", means.shape[1]) * means[rows.logits.argmax(1)]).sum(1)
        return found

    return score


def _correct(rows: Rows) -> NDArray[np.bool_]:
    """Which rows are classified correctly, of shape (n,)."""
    found: NDArray[np.bool_] = rows.logits.argmax(1) == rows.labels
    return found


def nnguide(source: Source, k: float) -> Scorer:
    """energy(y) times the mean of the k largest (x / |x|) (v / |v|) energy(y_v), over a bank of fit images v: NNGuide.

    y are logits. The bank is a hundredth of the fit images and one more, at least k, drawn by the source's key. OpenOOD
    takes the first batches that exceed a hundredth, in the order of its loader. Features that are all 0 stay 0.

    Raises:
        ValueError: Features or fit images are missing, or `k` is no whole number; `Unsuited` if `k` exceeds them.

    References:
        Nearest Neighbor Guidance for Out-of-Distribution Detection (Park, Jung and Teoh, 2023),
            https://arxiv.org/abs/2309.14888
    """
    nearest, chunks = whole(k, "nnguide", "k"), chunks_of(source, "fit", "nnguide")
    count = sum(len(rows.logits) for rows in chunks())
    if nearest > count:
        raise Unsuited(f"nnguide: k is {nearest}, and there are {count} fit images: take a smaller k")
    taken = np.zeros(count, np.bool_)
    taken[permutation(source.key, count)[: max(nearest, int(count * GUIDE) + 1)]] = True
    bank = np.concatenate(list(_guides(chunks, taken)))

    def score(rows: Rows) -> Floats:
        similar = _directions(features_of(rows, "nnguide", bank.shape[1])) @ bank.T
        similar.partition(len(bank) - nearest, axis=1)
        found: Floats = similar[:, len(bank) - nearest :].mean(1) * energy(rows.logits)
        return found

    return score


def _guides(chunks: Chunks, taken: NDArray[np.bool_]) -> Iterator[Floats]:
    """Directions of the fit images that are taken, each times the energy of its logits."""
    start = 0
    for rows in chunks():
        chosen = taken[start : start + len(rows.logits)]
        start += len(rows.logits)
        few = rows._replace(
            logits=rows.logits[chosen], features=None if rows.features is None else rows.features[chosen]
        )
        yield _directions(features_of(few, "nnguide")) * energy(few.logits)[:, None]


def _directions(features: Floats) -> Floats:
    """Features of length 1; those that are all 0 stay so."""
    return features / _lengths(features)[:, None]


def _lengths(features: Floats) -> Floats:
    """Of each row; 1 where features are all 0."""
    lengths: Floats = np.linalg.norm(features, axis=1)
    return np.where(lengths == 0, 1.0, lengths)
