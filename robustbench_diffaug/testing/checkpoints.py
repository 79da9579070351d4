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
    """A checkpoint's logits of an image do not depend on the images beside it.

    Arguments:
        checkpoint: Whose files are there.
        shape: Of an image that it takes: channels, height, width.
    """
    check_value(checkpoint)
    renamed = checkpoint.model_copy(update={"id": f"{checkpoint.id}-renamed"})
    assert renamed.fingerprint == checkpoint.fingerprint, "the fingerprint depends on the id"
    checkpoint.check()
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
    check_files(checkpoint, lambda moved: moved.load())


def _equal(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())
