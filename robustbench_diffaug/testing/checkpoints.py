"""What a checkpoint promises: the same weights each time, and logits that depend on the image alone."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.testing.values import check_files, check_value, generators_unmoved

__all__ = ["check_checkpoint"]


def check_checkpoint(checkpoint: Checkpoint, shape: tuple[int, int, int] = (1, 8, 8)) -> None:
    """A checkpoint has the same weights each time, and its logits of an image depend on that image alone.

    Checked are, besides what every component promises (`check_value`): a fingerprint that depends on what its files
    hold, and neither on where they lie nor on the id; `check`, `takes` and `fits` that accept such images; the same
    weights each time; `classes` finite logits, the same the second time, in another order and for an image alone;
    gradients, unless its kind says that it has none; no draw from a global generator, and no buffer changed in use.

    Arguments:
        checkpoint: Whose files are there.
        shape: Of an image that it takes: channels, height, width.

    Raises:
        AssertionError: With the promise that is broken.
    """
    check_value(checkpoint)
    renamed = checkpoint.model_copy(update={"id": f"{checkpoint.id}-renamed"})
    assert renamed.fingerprint == checkpoint.fingerprint, "the fingerprint depends on the id"
    _check_shape(checkpoint, shape)
    first, second = (checkpoint.load().state_dict() for _ in range(2))
    assert _equal(first, second), f"{checkpoint.id} loads other weights each time"
    images = rng.uniform(rng.key("check", "images"), range(5), shape).astype(np.float32)
    batch = torch.from_numpy(images)
    model = checkpoint.loaded(Limits())
    state = {name: value.clone() for name, value in model.network.state_dict().items()}
    with generators_unmoved(checkpoint.kind), torch.no_grad():
        logits = model.logits(batch)
        assert logits.shape == (5, checkpoint.classes), f"{checkpoint.id} gives logits of shape {tuple(logits.shape)}"
        assert torch.equal(model.logits(batch), logits), f"{checkpoint.id} gives other logits the second time"
        turned = model.logits(batch.flip(0)).flip(0)
        assert torch.equal(turned, logits), f"the logits of {checkpoint.id} depend on the order of the images"
        alone = torch.cat([model.logits(image[None]) for image in batch])
        assert torch.equal(alone, logits), f"the logits of {checkpoint.id} depend on the images beside"
    assert _equal(model.network.state_dict(), state), f"{checkpoint.id} changes its own weights or buffers in use"
    if checkpoint.differentiable:
        _check_gradients(checkpoint, batch)
    check_files(checkpoint, lambda moved: moved.load())


def _check_shape(checkpoint: Checkpoint, shape: tuple[int, int, int]) -> None:
    """Its files are fit, and so are images of this shape, by its own word."""
    try:
        checkpoint.check()
        checkpoint.fits(*shape[1:])
    except ValueError as error:
        raise AssertionError(f"{checkpoint.id} does not take what it is checked on: {error}") from error
    takes = checkpoint.takes()
    assert takes in (None, shape[0]) or (takes, shape[0]) == (3, 1), (
        f"{checkpoint.id} says that it takes images of {takes} channels, not of {shape[0]}"
    )


def _check_gradients(checkpoint: Checkpoint, batch: Tensor) -> None:
    model, images = checkpoint.loaded(Limits()), batch.clone().requires_grad_()
    try:
        (gradient,) = torch.autograd.grad(model.logits(images).sum(), images)
    except RuntimeError as error:
        raise AssertionError(
            f"the logits of {checkpoint.id} have no gradient; if they cannot, set differentiable = False in its class"
        ) from error
    assert bool(torch.isfinite(gradient).all()), f"the gradient of the logits of {checkpoint.id} is not finite"


def _equal(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())
