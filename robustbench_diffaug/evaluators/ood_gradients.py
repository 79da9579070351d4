"""ODIN, the out-of-distribution score that needs gradients of the network."""

from dataclasses import replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from robustbench_diffaug.checkpoints.model import Model

__all__ = ["odin"]


def odin(model: Model, images: Float[Tensor, "n c h w"], temperature: float, noise: float) -> Float64[Tensor, " n"]:
    """The largest softened probability after a step towards the predicted class, higher for in-distribution images.

    `max_k softmax(f(x') / T)_k` with `x' = x + noise * sign(d/dx log softmax(f(x) / T)_y)`, y the predicted class; a
    pixel without influence goes down. The step is one of pixels in [0, 1], taken after resize and crop: in the
    network's input that is `noise / std` of each channel. It costs two forwards and one backward of the classifier,
    whose calls have its one shape, so no score depends on the images beside it; one that was compiled is run as it is
    uncompiled, in which it is differentiated.

    Arguments:
        model: The classifier.
        images: In [0, 1].
        temperature: T, above 0.
        noise: The length of the step in every pixel, at least 0.

    Raises:
        ValueError: If the network has a single class, is not differentiable, or has a gradient that is not finite.

    References:
        Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks (Liang et al., 2018),
        https://arxiv.org/abs/1706.02690
        OpenOOD v1.5: Enhanced Benchmark for Out-of-Distribution Detection (Zhang et al., 2023),
        https://arxiv.org/abs/2306.09301
    """
    if model.classes < 2:
        raise ValueError(f"{model.id} has one class, and ODIN needs two; leave odin out of the scores")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        inputs = model.preprocess(images)
        step = noise * (model.preprocess(torch.ones_like(images[:1])) - model.preprocess(torch.zeros_like(images[:1])))
        bare = replace(model, preprocess=_unchanged)
        signs = [_rising(bare, part, temperature) for part in torch.split(inputs, model.microbatch)]
        logits = bare.logits(inputs + step * torch.cat(signs))
        return (logits.double() / temperature).softmax(dim=1).amax(dim=1)


def _rising(model: Model, inputs: Float[Tensor, "n c h w"], temperature: float) -> Float[Tensor, "n c h w"]:
    """Where the predicted class gains, as 1 and -1.

    The gradient of `log p_y` to the logits is `(1 - p_y) (e_y - q) / T`, q the probabilities of the other classes among
    themselves. Its length has no say in the signs, and without it no network is too sure of itself for float32.
    """
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        logits = model.logits(leaf)
        predicted = torch.nn.functional.one_hot(logits.argmax(dim=1), model.classes).bool()
        others = (logits.detach().double() / temperature).masked_fill(predicted, -torch.inf).softmax(dim=1)
        gradient = _gradient(model, logits, leaf, (predicted.double() - others).to(logits.dtype))
    finite = torch.isfinite(gradient).flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(
            f"{model.id} has a NaN or infinite gradient for {int((~finite).sum())} of {len(inputs)} images"
        )
    return torch.where(gradient > 0, 1.0, -1.0).to(inputs.dtype)


def _gradient(model: Model, logits: Tensor, leaf: Tensor, direction: Tensor) -> Tensor:
    """The gradient of `sum(direction * logits)` to the network's input."""
    refusal = f"{model.id} is not differentiable in its input, which ODIN needs; leave odin out of the scores"
    if not logits.requires_grad:
        raise ValueError(refusal)
    try:
        (gradient,) = torch.autograd.grad(logits, leaf, direction)
    except RuntimeError as error:  # an operation without a derivative, or logits that do not depend on the images
        raise ValueError(f"{refusal} ({str(error).splitlines()[0][:120]})") from error
    return gradient


def _unchanged(images: Tensor) -> Tensor:
    return images
