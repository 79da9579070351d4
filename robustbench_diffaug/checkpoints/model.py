"""A loaded classifier."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustbench_diffaug.batch import fixed_shape
from robustbench_diffaug.checkpoints.conditioning import Want, packed
from robustbench_diffaug.checkpoints.features import Last, capture, last_layer
from robustbench_diffaug.diffusion.base import Denoise

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
        head: The dotted name of its last layer; empty to find it.
        denoise: The denoiser, where that is what is analysed; then there are no logits.
        channels: Of the images that it takes, where that is known; grey ones are shown to three channels alike.
    """

    id: str
    network: nn.Module
    preprocess: Callable[[Tensor], Tensor]
    classes: int
    microbatch: int
    dtype: torch.dtype = torch.float32
    wants: tuple[Want, ...] = ()
    head: str = ""
    denoise: Denoise | None = None
    channels: int | None = None

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
        if self.denoise is not None:
            raise ValueError(f"{self.id} is a denoiser, which has no logits")
        flat = images.reshape(-1, *images.shape[-3:])
        if self.wants:
            flat = self._packed(flat, sigma, denoised)
        logits = self._checked(fixed_shape(self._forward, flat, self.microbatch))
        return logits.reshape(*images.shape[:-3], self.classes)

    def features(self, images: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n d"]]:
        """The logits of images in [0, 1], and the input of the last layer, in one pass; differentiable.

        Raises:
            ValueError: As `logits`, and if there is no layer whose linear function the logits are.
        """
        if self.wants:
            raise ValueError(f"{self.id} classifies noisy images and wants {' and '.join(self.wants)} with each")
        both = capture(self._forward, self.last(images).layer)
        joined = fixed_shape(lambda part: torch.cat(both(part), dim=1), images, self.microbatch)
        logits, features = joined[:, : self.classes], joined[:, self.classes :]
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{self.id} gives NaN or infinite features")
        return self._checked(logits), features

    def last(self, images: Float[Tensor, "n c h w"]) -> Last:
        """The last layer, found by showing the network some images.

        Raises:
            ValueError: If there is none.
        """
        if not self.found:
            try:
                self.found.append(last_layer(self.network, self._prepared(images[:1]), self.head or None))
            except ValueError as error:
                raise ValueError(f"{self.id}: {error}") from error
        return self.found[0]

    @cached_property
    def found(self) -> list[Last]:
        """The last layer, once it was found."""
        return []

    def _checked(self, logits: Tensor) -> Float[Tensor, "n k"]:
        if logits.ndim != 2 or logits.shape[1] != self.classes:
            found = tuple(logits.shape[1:])
            raise ValueError(f"{self.id} gives {found} outputs an image, not {self.classes}; correct `classes`")
        finite = torch.isfinite(logits).all(dim=1)
        if not bool(finite.all()):
            count = int((~finite).sum())
            raise ValueError(f"{self.id} gives NaN or infinite logits for {count} of {len(logits)} images")
        return logits

    def _packed(self, flat: Tensor, sigma: Tensor | None, denoised: Tensor | None) -> Tensor:
        if sigma is None or ("denoised" in self.wants and denoised is None):
            wanted = " and ".join(self.wants)
            raise ValueError(f"{self.id} classifies noisy images and wants {wanted} with each; this evaluator has none")
        twin = denoised.reshape(flat.shape) if denoised is not None and "denoised" in self.wants else None
        coloured = None if twin is None else self._coloured(twin)
        return packed(self._coloured(flat), sigma.reshape(-1).to(flat), coloured)

    def _coloured(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h w"]:
        """Grey images three times over for a network of three channels; their gradient is the sum over these."""
        return images.expand(-1, 3, -1, -1) if self.channels == 3 and images.shape[1] == 1 else images

    def _prepared(self, images: Tensor) -> Tensor:
        prepared = images if self.wants else self.preprocess(self._coloured(images))
        return prepared.to(dtype=self.dtype, memory_format=torch.channels_last)

    def _forward(self, images: Tensor) -> Tensor:
        output = self.network(self._prepared(images))
        if not isinstance(output, Tensor):
            raise ValueError(f"{self.id} returns {type(output).__name__}, not a tensor of logits")
        return output.float()
