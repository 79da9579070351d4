"""Denoisers that are `D(x, sigma)` already, as networks of EDM are, built by a function of the user's."""

from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from robustbench_diffaug import builders
from robustbench_diffaug.batch import fixed_shape
from robustbench_diffaug.component import Options
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Schedule, Sigma
from robustbench_diffaug.files import Weights
from robustbench_diffaug.state import load_state

__all__ = ["Edm"]


class Edm(Denoiser):
    """A network with EDM's preconditioning: `network(x, sigma)` is the clean image, both in units of [-1, 1].

    Images in [0, 1] are half of that: `D(x, sigma) = (network(2 x - 1, 2 sigma) + 1) / 2`, where `sigma` is one number
    for each image. It runs the user's code, hence only with `--trust` or in a suite that is installed with the package.
    The identity covers the function's file and `weights`; not what the function itself reads.

    Arguments:
        arch: 'file.py:function', the file relative to the suite's, or 'package.module:function', importable.
        args: Its keyword arguments.
        weights: The file, found and repaired as that of a checkpoint is; left out, the network is taken as returned.
        schedule: The noise levels of discrete times; the network itself takes any.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), equation 7,
        https://arxiv.org/abs/2206.00364
    """

    kind: Literal["edm"] = "edm"
    runs_code: ClassVar[bool] = True
    arch: builders.Builder
    args: Options = ()
    weights: Weights | None = None
    schedule: Schedule = Schedule()

    def contents(self) -> str:
        """The digest of the function's file, where it is one."""
        return builders.digest(self.arch)

    def identity(self) -> dict[str, object]:
        """As of every value, but without the folder of the function's file."""
        return {**Denoiser.identity(self), "arch": builders.name(self.arch)}

    def check(self) -> None:
        """Looks at the function's file, which is not run, and at the weights."""
        builders.digest(self.arch)
        if self.weights:
            self.weights.check()

    def sigmas(self) -> Float[np.ndarray, " t"]:
        """The noise levels of the schedule."""
        return self.schedule.sigmas()

    def load(self, device: torch.device) -> Denoise:
        """The network that the function returns, in evaluation mode, with its weights.

        Raises:
            ValueError: As every `load`; and when it is called, if it returns anything but an image for each image.
        """
        dtype: torch.dtype = getattr(torch, self.precision)
        exact = torch.float64 if self.precision == "float64" else torch.float32
        network = builders.build(self.arch, dict(self.args))
        if self.weights:
            load_state(network, self.weights)
        network = network.eval().requires_grad_(False).to(device, dtype)

        def call(rows: Tensor) -> Tensor:
            images = rows[:, :-1].to(dtype)
            found: object = network(images, rows[:, -1, 0, 0].to(dtype))
            if not isinstance(found, Tensor) or found.shape != images.shape:
                given = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"the network of {self.arch} returns {given} for {tuple(images.shape)}, not the image")
            return found.to(exact)

        def denoise(noisy: Float[Tensor, "*n c h w"], sigma: Sigma) -> Posterior:
            flat = noisy.reshape(-1, *noisy.shape[-3:]).to(exact)
            levels = (
                torch.as_tensor(sigma, dtype=torch.float64, device=flat.device)
                .to(exact)
                .expand(noisy.shape[:-3])
                .reshape(-1)
            )
            # The level rides along as a plane, so that one tensor passes through `fixed_shape`.
            plane = (2 * levels)[:, None, None, None].expand(-1, 1, *flat.shape[2:])
            clean = (fixed_shape(call, torch.cat([2 * flat - 1, plane], dim=1), self.microbatch) + 1) / 2
            clean = clean.clamp(0, 1) if self.clip else clean
            return Posterior(clean.reshape(noisy.shape).to(noisy.dtype))

        return denoise
