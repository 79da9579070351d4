"""Diffusion models of guided-diffusion (ADM) and improved-diffusion, from their own files of weights."""

from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from robustbench_diffaug.diffusion.adm_mapping import PUBLISHED, Flags, Told, mapped, unet
from robustbench_diffaug.diffusion.base import ConditionalDenoise, Denoise, Denoiser, Posterior, Sigma
from robustbench_diffaug.diffusion.unet import as_conditional, as_denoise
from robustbench_diffaug.files import Weights
from robustbench_diffaug.state import read_state

__all__ = ["Adm"]


class Adm(Denoiser):
    """A published network of guided-diffusion or improved-diffusion, or another one by its flags.

    The network is convolutional: that of 256 pixels is run on crops of 224, as DiffAug does. Sides must be multiples of
    two to the number of its halvings. A class-conditional one knows no embedding of no class, so it denoises images
    with labels only.

    Arguments:
        weights: The published `.pt`, of which nothing but tensors is read, or the same weights in safetensors.
        architecture: The name of a published network.
        config: The flags of another one, instead of a name.
        microbatch: The number of images in every call of the network: that of the published samplers. At 256 pixels on
            a CPU 1 needs the least memory, and a large GPU is better used by 32 or more.

    References:
        Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, 2021), https://arxiv.org/abs/2105.05233
        Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), https://arxiv.org/abs/2102.09672
    """

    kind: Literal["adm"] = "adm"
    weights: Weights
    architecture: (
        Literal[
            "imagenet-64-class",
            "imagenet-128-class",
            "imagenet-256-class",
            "imagenet-256",
            "imagenet-512-class",
            "imagenet-64",
            "cifar10",
        ]
        | None
    ) = None
    config: Flags | None = None
    microbatch: Annotated[int, Field(ge=1)] = 4

    @model_validator(mode="after")
    def _either(self) -> "Adm":
        if (self.architecture is None) == (self.config is None):
            raise ValueError(
                f"an adm denoiser needs either architecture, one of {', '.join(PUBLISHED)}, or config with its flags"
            )
        return self

    def flags(self) -> Flags:
        """What the network was trained with."""
        return self.config or PUBLISHED[self.architecture or ""]

    def sigmas(self) -> Float[np.ndarray, " t"]:
        """The noise levels of the training."""
        return self.flags().schedule().sigmas()

    def channels(self) -> int | None:
        """Three."""
        return 3

    def classes(self) -> int | None:
        """The number of classes of a class-conditional network."""
        flags = self.flags()
        return flags.num_classes if flags.class_cond else None

    def learned_variance(self) -> bool:
        """What the flags say."""
        return self.flags().learn_sigma

    def unconditional(self) -> bool:
        """Whether the network has no classes: those that have some know no label for none."""
        return self.classes() is None

    def check(self) -> None:
        """Looks at the file of weights and its digest.

        Raises:
            ValueError: If it is missing, has another digest, or is no file of weights.
        """
        self.weights.check()

    def load(self, device: torch.device) -> Denoise:
        """The network in evaluation mode.

        Raises:
            ValueError: If it is class-conditional, or its file is missing, damaged, or of another architecture.
        """
        flags = self.flags()
        if flags.class_cond:
            raise ValueError(
                f"{self._name()} is class-conditional and was trained with no label for none; give a denoiser of "
                "classes where labels are known, or an unconditional one such as architecture: imagenet-256"
            )
        return as_denoise(self._network(flags, device), flags.schedule(), self.precision, self.clip, self.microbatch)

    def load_conditional(self, device: torch.device) -> ConditionalDenoise:
        """The network that is told the class, which must be one: a label of -1, for none, is a ValueError.

        Raises:
            ValueError: If it knows no classes, or its file is missing, damaged, or of another architecture.
        """
        flags = self.flags()
        if not flags.class_cond:
            raise ValueError(f"{self._name()} knows no classes; give a class-conditional one, with class_cond: true")
        network, schedule = self._network(flags, device), flags.schedule()
        told = as_conditional(network, schedule, flags.num_classes, self.precision, self.clip, self.microbatch)

        def denoise(noisy: Float[Tensor, "*n c h w"], sigma: Sigma, labels: Int[Tensor, "*n"]) -> Posterior:
            if labels.numel() and int(labels.min()) < 0:
                last = flags.num_classes - 1
                raise ValueError(f"{self._name()} has no label for no class; labels must be 0 to {last}, not -1")
            return told(noisy, sigma, labels)

        return denoise

    def _name(self) -> str:
        return f"the adm denoiser {self.architecture or self.weights.uri}"

    def _network(self, flags: Flags, device: torch.device) -> nn.Module:
        state = read_state(self.weights).tensors
        whole = [name for name, value in state.items() if not value.is_floating_point()]
        if whole:
            raise ValueError(f"{self.weights.uri} holds whole numbers under {whole[0][:80]!r}, and needed are weights")
        with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced
            network = unet(flags)
        try:
            found = mapped(state, flags, network)
        except ValueError as error:
            raise ValueError(f"{self.weights.uri} does not fit {self.architecture or 'config'}: {error}") from error
        # The tensors of the file become the network's own, so that its weights are in memory once.
        network.load_state_dict({name: value.to(device, torch.float32) for name, value in found.items()}, assign=True)
        return Told(network, flags)
