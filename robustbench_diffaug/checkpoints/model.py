"""A loaded classifier."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustbench_diffaug.batch import fixed_shape
from robustbench_diffaug.checkpoints.conditioning import Want, packed

__all__ = ["Model"]


@dataclass(frozen=True, eq=False)
class Model:
    """A network behind its preprocessing, called in one shape.

    Arguments:
        id: The checkpoint's.
        network: From preprocessed images to logits, in evaluation mode.
        preprocess: From images in [0, 1] to the network's input.
        classes: The number of outputs that it must have.
        microbatch: The number of images in every call.
        dtype: Of the network's weights and input.
        wants: What it sees besides the image.
    """

    id: str
    network: nn.Module
    preprocess: Callable[[Tensor], Tensor]
    classes: int
    microbatch: int
    dtype: torch.dtype = torch.float32
    wants: tuple[Want, ...] = ()

    def logits(
        self,
        images: Float[Tensor, "*n c h w"],
        sigma: Float[Tensor, "*n"] | None = None,
        denoised: Float[Tensor, "*n c h w"] | None = None,
    ) -> Float[Tensor, "*n k"]:
        """The logits of images in [0, 1]; differentiable.

        Arguments:
            images: In [0, 1], or noisy versions of such.
            sigma: Their noise levels, for a network that wants them.
            denoised: Their denoised twins, for a network that wants them.

        Raises:
            ValueError: If the network wants more than it is given, has another number of outputs, or one of them is
                not finite.
        """
        flat = images.reshape(-1, *images.shape[-3:])
        if self.wants:
            flat = self._packed(flat, sigma, denoised)
        logits = fixed_shape(self._forward, flat, self.microbatch)
        if logits.ndim != 2 or logits.shape[1] != self.classes:
            found = tuple(logits.shape[1:])
            raise ValueError(f"{self.id} gives {found} outputs an image, not {self.classes}; correct `classes`")
        finite = torch.isfinite(logits).all(dim=1)
        if not bool(finite.all()):
            raise ValueError(f"{self.id} gives NaN or infinite logits for {int((~finite).sum())} of {len(flat)} images")
        return logits.reshape(*images.shape[:-3], self.classes)

    def _packed(self, flat: Tensor, sigma: Tensor | None, denoised: Tensor | None) -> Tensor:
        if sigma is None or ("denoised" in self.wants and denoised is None):
            wanted = " and ".join(self.wants)
            raise ValueError(f"{self.id} classifies noisy images and wants {wanted} with each; this evaluator has none")
        twin = denoised.reshape(flat.shape) if denoised is not None and "denoised" in self.wants else None
        return packed(flat, sigma.reshape(-1).to(flat), twin)

    def _forward(self, images: Tensor) -> Tensor:
        prepared = images if self.wants else self.preprocess(images)
        output = self.network(prepared.to(dtype=self.dtype, memory_format=torch.channels_last))
        if not isinstance(output, Tensor):
            raise ValueError(f"{self.id} returns {type(output).__name__}, not a tensor of logits")
        return output.float()
