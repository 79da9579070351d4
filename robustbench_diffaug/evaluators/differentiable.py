"""Gradients of classifiers to what they see, and back through a denoiser; what has none is named."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional

from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.checkpoints.outputs import are_probabilities
from robustbench_diffaug.diffusion.base import Denoise

__all__ = ["Pulled", "Rising", "Shown", "Through", "gradient_of", "logits_of", "pulled", "pulled_back", "rising"]

Through: TypeAlias = Literal["image", "denoised", "chain"]
"""To what a gradient is taken: the image itself, its denoised twin, or the image by way of the denoiser."""


class Rising(NamedTuple):
    """The gradient of `log p_y` to the logits, as `length * direction`.

    Arguments:
        direction: Of norm 1.
        length: At least 0, in float64, where it does not vanish for a network that is too sure of itself for float32.
    """

    direction: Float64[Tensor, "n k"]
    length: Float64[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class Shown:
    """Images at one noise level, and what a classifier may see of them.

    Arguments:
        images: In [0, 1], or noisy versions of such.
        sigma: Their noise level; None where none is known.
        denoised: Their denoised twins; None where there are none.
        denoise: What made these, unclamped; None where nothing did, and a twin is the image itself.
        microbatch: Images whose gradients through the denoiser are held in memory at once.
    """

    images: Float[Tensor, "n c h w"]
    sigma: float | None = None
    denoised: Float[Tensor, "n c h w"] | None = None
    denoise: Denoise | None = None
    microbatch: int = 128


class Pulled(NamedTuple):
    """What came of a look.

    Arguments:
        logits: Of the images.
        gradients: Of `sum(vector * logits)`, one for each vector.
    """

    logits: Float[Tensor, "n k"]
    gradients: tuple[Float[Tensor, "n c h w"], ...]


def gradient_of(
    model: Model,
    output: Float[Tensor, "..."],
    inputs: Float[Tensor, "n ..."],
    direction: Float[Tensor, "..."] | None = None,
    again: bool = False,
) -> Float[Tensor, "n ..."]:
    """The gradient of `sum(direction * output)` to the inputs.

    Arguments:
        model: Whose output it is; errors name it.
        output: What was computed from the inputs with gradients enabled.
        inputs: A leaf that requires its gradient.
        direction: Of the output's shape; ones where it is left out.
        again: Whether another gradient of this output will be asked for.

    Raises:
        ValueError: If the network is not differentiable, or its gradient is not finite.
    """
    return _gradients(model, output, (inputs,), direction, again)[0]


def _gradients(
    model: Model, output: Tensor, inputs: tuple[Tensor, ...], direction: Tensor | None, again: bool
) -> tuple[Tensor, ...]:
    """The gradients to several leaves in one pass."""
    refusal = f"{model.id} is not differentiable in its input, and this evaluator needs its gradient"
    if not output.requires_grad:
        raise ValueError(f"{refusal}; list under checkpoints of the bench those that are")
    seed = torch.ones_like(output) if direction is None else direction.to(output.dtype)
    try:
        found = torch.autograd.grad(output, inputs, seed, retain_graph=again)
    except RuntimeError as error:  # an operation without a derivative, or an output that does not depend on the input
        raise ValueError(f"{refusal} ({str(error).splitlines()[0][:120]})") from error
    for gradient in found:
        finite = torch.isfinite(gradient).flatten(1).all(dim=1)
        if not bool(finite.all()):
            count = int((~finite).sum())
            raise ValueError(f"{model.id} has a NaN or infinite gradient for {count} of {len(gradient)} images")
    return found


def logits_of(
    model: Model,
    images: Float[Tensor, "n c h w"],
    sigma: float | None = None,
    denoised: Float[Tensor, "n c h w"] | None = None,
) -> Float[Tensor, "n k"]:
    """The logits of images, once they are found to be no probabilities; differentiable.

    Arguments:
        model: The classifier.
        images: In [0, 1], or noisy versions of such.
        sigma: Their noise level, for a network that wants it.
        denoised: Their denoised twins, for a network that wants them.

    Raises:
        ValueError: As `Model.logits`, and if the network has one class, or returns probabilities.
    """
    if model.classes < 2:
        raise ValueError(f"{model.id} has one class, whose probability is 1 whatever the image; two are needed")
    levels = None if sigma is None else torch.full((len(images),), sigma, dtype=torch.float64, device=images.device)
    logits = model.logits(images, levels, denoised)
    if are_probabilities(logits, model.dtype):
        raise ValueError(f"{model.id} returns probabilities, and gradients are of logits; leave out its last softmax")
    return logits


def rising(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Rising:
    """The gradient of `log p_y` to the logits: `(1 - p_y) (e_y - q)`, q being the other classes among themselves.

    Arguments:
        logits: Of two classes or more.
        labels: The class y of each image.
    """
    own = functional.one_hot(labels.long(), logits.shape[1]).bool()
    values = logits.detach().double()
    others = values.masked_fill(own, -torch.inf)
    vector = own.double() - others.softmax(dim=1)
    norm = vector.norm(dim=1)
    margin = others.logsumexp(dim=1) - values.gather(1, labels.long()[:, None])[:, 0]
    return Rising(vector / norm[:, None], margin.sigmoid() * norm)


def pulled(
    model: Model,
    shown: Shown,
    through: Through,
    vectors: Callable[[Float[Tensor, "m k"], slice], Iterable[Float[Tensor, "m k"]]],
) -> Pulled:
    """The gradients of `sum(vector * logits)` to what `through` names.

    A plain network sees the image for 'image', and its denoised twin D for 'denoised' and 'chain'. A network that wants
    the noise level always sees the noisy image, and its twin where it wants that. Then 'image' and 'denoised' are the
    gradients to one with the other held, and 'chain' is that to the noisy image by every way,
    `d/dx + (dD/dx)^T d/dD`, the first term of which a plain network has not.

    Networks are called in their one shape and run uncompiled, so no result depends on the images beside.

    Arguments:
        model: The classifier.
        shown: What it is shown.
        through: To what the gradient is taken.
        vectors: From the logits of some rows, and which rows these are, to what they are multiplied by.

    Raises:
        ValueError: As `gradient_of` and `logits_of`; if there is no denoised twin, or the network does not see it.
    """
    logits, direct, indirect = [], list[list[Tensor]](), list[list[Tensor]]()
    with torch.compiler.set_stance("force_eager"):
        for start in range(0, len(shown.images), model.microbatch):
            rows = slice(start, start + model.microbatch)
            scores, found = _look(model, shown, through, rows, vectors)
            logits.append(scores)
            direct += [[own for own, _ in found if own is not None]]
            indirect += [[twin for _, twin in found if twin is not None]]
        first = [torch.cat(parts) for parts in zip(*direct, strict=True)]
        second = [torch.cat(parts) for parts in zip(*indirect, strict=True)]
        if through == "chain" and second and shown.denoise is not None and shown.sigma is not None:
            second = list(pulled_back(shown.denoise, shown.images, shown.sigma, second, shown.microbatch))
    both = [own + twin for own, twin in zip(first, second, strict=True)] if first and second else first or second
    return Pulled(torch.cat(logits), tuple(both))


def _look(
    model: Model,
    shown: Shown,
    through: Through,
    rows: slice,
    vectors: Callable[[Tensor, slice], Iterable[Tensor]],
) -> tuple[Tensor, list[tuple[Tensor | None, Tensor | None]]]:
    """The logits of some rows, and for each vector the gradients to the image and to its twin, where they count."""
    image = shown.images[rows].detach().clone()
    twin = None if shown.denoised is None else shown.denoised[rows].detach().clone()
    to_image = through == "image" or (through == "chain" and bool(model.wants))
    to_twin = through == "denoised" or (through == "chain" and (not model.wants or "denoised" in model.wants))
    if to_twin and twin is None:
        raise ValueError(f"a gradient through {through} needs denoised images; name a denoiser")
    if through == "denoised" and model.wants and "denoised" not in model.wants:
        raise ValueError(f"{model.id} sees no denoised image, so it has no gradient to one")
    with torch.enable_grad():
        leaves = [
            leaf.requires_grad_() for leaf, asked in ((image, to_image), (twin, to_twin)) if asked and leaf is not None
        ]
        if model.wants:
            logits = logits_of(model, image, shown.sigma, twin)
        else:
            logits = logits_of(model, twin if to_twin and twin is not None else image)
        found = list[tuple[Tensor | None, Tensor | None]]()
        for vector in vectors(logits.detach(), rows):
            parts = iter(_gradients(model, logits, tuple(leaves), vector, again=True))
            found.append((next(parts) if to_image else None, next(parts) if to_twin else None))
    return logits.detach(), found


def pulled_back(
    denoise: Denoise,
    noisy: Float[Tensor, "n c h w"],
    sigma: float,
    vectors: Iterable[Float[Tensor, "n c h w"]],
    microbatch: int,
) -> tuple[Float[Tensor, "n c h w"], ...]:
    """`J^T v` of each vector, J being the Jacobian of `D(x, sigma)`: one forward, and one backward a vector.

    Arguments:
        denoise: D, unclamped: clamping zeroes rows of J.
        noisy: x, `x0 + sigma * eps`.
        sigma: The noise level.
        vectors: The vs.
        microbatch: Images whose graph is held in memory at once; a multiple of that of the network.

    Raises:
        ValueError: If the denoiser is not differentiable.
    """
    given = list(vectors)
    found: list[list[Tensor]] = [[] for _ in given]
    for start in range(0, len(noisy), microbatch):
        rows = slice(start, start + microbatch)
        with torch.enable_grad():
            leaf = noisy[rows].detach().clone().requires_grad_()
            mean = denoise(leaf, sigma).mean
            if not mean.requires_grad:
                raise ValueError("the denoiser is not differentiable, so no gradient passes through it; name another")
            for vector, parts in zip(given, found, strict=True):
                (gradient,) = torch.autograd.grad(mean, leaf, vector[rows].to(mean.dtype), retain_graph=True)
                parts.append(gradient)
    return tuple(torch.cat(parts) for parts in found)
