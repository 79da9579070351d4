"""The Jacobian J = dD(x, sigma)/dx of a denoiser as a linear map: products with it, and never the whole of it.

In variance-exploding coordinates, x = x0 + sigma * eps, the best denoiser has J = Cov[x0 | x] / sigma^2: symmetric,
with no eigenvalue below zero, and the mean of its trace is that of |x0 - D(x, sigma)|^2 / sigma^2. This is Theorem 1 of
DiffAug, and a trained network comes near to it. Clamping zeroes rows of J, so it should be off (`clip: false`).

J^T v is one backward pass. J v is the derivative of J^T u with respect to u in the direction v, a backward pass through
that one: forward differentiation does not pass through the attention of diffusers' networks.

Vectors are rows: `p` of them, of the `d` numbers of an image, for each of `n` images.

References:
    DiffAug: a diffuse-and-denoise augmentation for training robust classifiers (Sastry, Dumpala and Oore, 2024),
        Theorem 1, https://arxiv.org/abs/2306.09192
    A new trick for calculating Jacobian vector products (Townsend, 2017), https://j-towns.github.io/2017/06/12/A-new-trick.html
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustbench_diffaug.diffusion.base import Denoise, Sigma

__all__ = ["Jacobian", "Sketch", "Svd", "exact", "sketch", "smallest", "summary", "svd", "trace", "whole_svd"]


class Jacobian:
    """The Jacobians of a denoiser at some images, each image with its own; a batch's is block-diagonal.

    The passes that it is made of are kept, so that a product costs one pass more. The network sees
    `n * copies` images at once: more copies multiply more vectors in one pass, and take more memory.

    Arguments:
        denoise: Differentiable; twice for `jvp`.
        images: Noisy images; products are in their precision.
        sigma: Their noise level, or one of each.
        copies: Vectors of an image that are multiplied at once, at least 1.

    Raises:
        ValueError: If the denoiser's estimate does not depend differentiably on the images.
    """

    def __init__(self, denoise: Denoise, images: Float[Tensor, "n c h w"], sigma: Sigma, copies: int = 1) -> None:
        levels = torch.as_tensor(sigma, dtype=torch.float64, device=images.device).expand(len(images))
        self.copies = copies
        self._inputs = images.detach().repeat_interleave(copies, dim=0).requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._outputs = denoise(self._inputs, levels.repeat_interleave(copies)).mean
        if not self._outputs.requires_grad:
            raise ValueError("the denoiser is not differentiable: its estimate carries no gradient to the noisy image")
        self.mean: Float[Tensor, "n c h w"] = self._outputs.detach()[::copies].clone()
        self.size: int = images[0].numel()
        self.like: Float[Tensor, " 0"] = images.new_zeros(0)

    def vjp(self, vectors: Float[Tensor, "n p d"]) -> Float[Tensor, "n p d"]:
        """J^T v of each vector v."""

        def product(rows: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(self._outputs, self._inputs, rows, retain_graph=True)
            return found

        return self._multiplied(product, vectors)

    def jvp(self, vectors: Float[Tensor, "n p d"]) -> Float[Tensor, "n p d"]:
        """J v of each vector v."""
        pulled, weights = self._pulled

        def product(rows: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(pulled, weights, rows, retain_graph=True)
            return found

        return self._multiplied(product, vectors)

    @cached_property
    def _pulled(self) -> tuple[Tensor, Tensor]:
        """J^T u as a differentiable function of u, and u; it is linear, so that any u will do."""
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            weights = torch.zeros_like(self._outputs).requires_grad_()
            (pulled,) = torch.autograd.grad(self._outputs, self._inputs, weights, create_graph=True)
        return pulled, weights

    def _multiplied(self, product: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
        """A product with `copies` vectors of each image at a time, the last ones padded with zeros: one shape."""
        found = torch.empty(vectors.shape, dtype=vectors.dtype, device=vectors.device)
        for start in range(0, vectors.shape[1], self.copies):
            part = vectors[:, start : start + self.copies]
            rows = part.new_zeros(len(part), self.copies, self.size)
            rows[:, : part.shape[1]] = part
            with sdpa_kernel(SDPBackend.MATH):
                made = product(rows.reshape(self._inputs.shape)).reshape(rows.shape)
            found[:, start : start + self.copies] = made[:, : part.shape[1]]
        return found


class Svd(NamedTuple):
    """Leading singular values and vectors, J = sum_i values_i left_i right_i^T.

    Arguments:
        left: Left singular vectors, the columns of U, as rows.
        values: Singular values, decreasing.
        right: Right singular vectors, as rows.
    """

    left: Float[Tensor, "n k d"]
    values: Float[Tensor, "n k"]
    right: Float[Tensor, "n k d"]


def svd(jacobian: Jacobian, start: Float[Tensor, "n p d"], k: int, iterations: int = 2) -> Svd:
    """The k leading singular values and vectors by randomised subspace iteration.

    Q spans (J J^T)^q J Omega for random vectors Omega; the singular values of Q^T J are those of J from below. At most
    four times `start` is held at once beside what the network needs. Signs are such that the largest entry of a left
    vector is positive.

    Arguments:
        jacobian: Of some images.
        start: Omega, standard normal: k vectors of each image and some more, at most d.
        k: How many are wanted.
        iterations: q, at least 0: each costs a product with J and one with J^T, and sharpens small gaps.

    Raises:
        ValueError: If there are fewer vectors to start from than are wanted, or more than numbers of an image.

    References:
        Finding structure with randomness (Halko, Martinsson and Tropp, 2011), algorithms 4.4 and 5.1,
        https://arxiv.org/abs/0909.4061
    """
    if not 1 <= k <= start.shape[1] <= jacobian.size:
        raise ValueError(f"k is {k} with {start.shape[1]} vectors to start from; needed is 1 <= k <= these <= d")
    basis = _orthonormal(jacobian.jvp(start))[0]
    for _ in range(iterations):
        basis = _orthonormal(jacobian.vjp(basis))[0]
        basis = _orthonormal(jacobian.jvp(basis))[0]
    rows, triangle = _orthonormal(jacobian.vjp(basis))
    outer, values, inner = torch.linalg.svd(triangle.mT)  # Q^T J = triangle^T rows
    left = outer[..., :k].mT @ basis
    del basis
    right = inner[:, :k] @ rows
    signs = _signs(left)
    return Svd(left.mul_(signs), values[:, :k], right.mul_(signs))


def whole_svd(matrix: Float[Tensor, "n d d"], k: int) -> Svd:
    """What `svd` estimates, of whole matrices."""
    left, values, right = torch.linalg.svd(matrix)
    columns = left.mT[:, :k]
    signs = _signs(columns)
    return Svd(columns * signs, values[:, :k], right[:, :k] * signs)


def _signs(left: Float[Tensor, "n k d"]) -> Float[Tensor, "n k 1"]:
    """The sign of each vector's largest entry."""
    return left.gather(2, left.abs().argmax(dim=2, keepdim=True)).sign()


def _orthonormal(rows: Float[Tensor, "n p d"]) -> tuple[Float[Tensor, "n p d"], Float[Tensor, "n p p"]]:
    """Orthonormal rows of the same span, and the triangle with `rows = triangle^T @ them`."""
    basis, triangle = torch.linalg.qr(rows.mT)
    return basis.mT, triangle


def exact(jacobian: Jacobian) -> Float[Tensor, "n d d"]:
    """The whole matrices, J_ij = dD_i / dx_j, from d products: for small images."""
    unit = torch.eye(jacobian.size, dtype=jacobian.like.dtype, device=jacobian.like.device)
    return jacobian.vjp(unit.expand(len(jacobian.mean), -1, -1))


def trace(jacobian: Jacobian, probes: Float[Tensor, "n p d"]) -> Float[Tensor, " n"]:
    """Hutchinson's estimate of tr J, the mean of v^T J v over probes v of independent signs.

    References:
        A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines (Hutchinson, 1989),
        https://doi.org/10.1080/03610918908812806
    """
    return (probes * jacobian.vjp(probes)).sum(dim=2).mean(dim=1)


class Sketch(NamedTuple):
    """What is known of each image's Jacobian without its spectrum.

    Arguments:
        trace: tr J, the expected number of directions that survive.
        asymmetry: |J - J^T| / |J| in Frobenius norms: 0 for the best denoiser, sqrt(2) for no relation at all.
        rank: The effective rank (tr J)^2 / |J|^2: r for r equal eigenvalues, less for unequal ones.
    """

    trace: Float[Tensor, " n"]
    asymmetry: Float[Tensor, " n"]
    rank: Float[Tensor, " n"]


def sketch(jacobian: Jacobian, probes: Float[Tensor, "n p d"]) -> Sketch:
    """Estimates from products with random signs v, as E v^T J v = tr J, E |J v|^2 = |J|^2 and likewise of J - J^T.

    The square of the trace is the mean of (v^T J v)(w^T J w) over pairs of probes, in which no probe meets itself, so
    that the noise of the trace does not raise the effective rank.

    Arguments:
        jacobian: Of some images.
        probes: Of each image, independent signs, two or more.

    Raises:
        ValueError: If there are fewer than two probes.

    References:
        Benign overfitting in linear regression (Bartlett et al., 2020), the effective rank R_0,
        https://arxiv.org/abs/1906.11300
    """
    count = probes.shape[1]
    if count < 2:
        raise ValueError(f"{count} probes are too few for the square of a trace; give two or more")
    forth, back = jacobian.jvp(probes), jacobian.vjp(probes)
    traces = (probes * back).sum(dim=2)
    square = (traces.sum(dim=1) ** 2 - (traces**2).sum(dim=1)) / (count * (count - 1))
    whole = (forth.square() + back.square()).sum(dim=2).mean(dim=1) / 2
    apart = (forth - back).square().sum(dim=2).mean(dim=1)
    return Sketch(traces.mean(dim=1), (apart / whole).sqrt(), square / whole)


def summary(matrix: Float[Tensor, "n d d"]) -> Sketch:
    """What `sketch` estimates, of whole matrices."""
    whole = matrix.square().sum(dim=(1, 2))
    apart = (matrix - matrix.mT).square().sum(dim=(1, 2))
    traces = matrix.diagonal(dim1=1, dim2=2).sum(dim=1)
    return Sketch(traces, (apart / whole).sqrt(), traces**2 / whole)


def smallest(jacobian: Jacobian, start: Float[Tensor, "n p d"], steps: int) -> Float[Tensor, " n"]:
    """The smallest eigenvalue of the symmetric part S = (J + J^T) / 2 by block Lanczos: never too low, often too high.

    It is the smallest eigenvalue of S within the span of Omega, S Omega, ..., S^(steps - 1) Omega, held orthonormal.

    Arguments:
        jacobian: Of some images.
        start: Omega, standard normal, p vectors of each image.
        steps: At least 1; no more than d / p are made, which span all there is.

    References:
        The block Lanczos method for computing eigenvalues (Golub and Underwood, 1977),
        https://doi.org/10.1016/B978-0-12-587260-7.50018-2
    """
    block, moved = _orthonormal(start)[0], list[Tensor]()
    held = block
    for step in range(1, min(steps, jacobian.size // start.shape[1]) + 1):
        moved.append((jacobian.jvp(block) + jacobian.vjp(block)) / 2)
        if step == min(steps, jacobian.size // start.shape[1]):
            break
        block = moved[-1]
        for _ in range(3):  # where the span is exhausted, what is left is rounding, and must be made orthogonal again
            block = _orthonormal(block - (block @ held.mT) @ held)[0]
        held = torch.cat([held, block], dim=1)
    inside = held @ torch.cat(moved, dim=1).mT
    values: Tensor = torch.linalg.eigvalsh((inside + inside.mT) / 2)
    return values[:, 0]
