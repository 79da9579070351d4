"""The Bayes classifier of a Gaussian mixture: a linear network, for tests and the smoke suite."""

from typing import Literal

import torch
from torch import nn

from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.mixture import MixtureSpec

__all__ = ["Bayes"]


class Bayes(Checkpoint):
    """Logits `(m_k . x - |m_k|^2 / 2) / temperature` of the mixture's component means m_k; no file is needed.

    Arguments:
        spec: Which mixture.
        temperature: Of the logits; spread^2 makes them the true posterior.
        tilt: Added to the first logit, to have a worse classifier too.
    """

    kind: Literal["mixture"] = "mixture"
    spec: MixtureSpec = MixtureSpec()
    temperature: float = 1.0
    tilt: float = 0.0

    def load(self) -> nn.Module:
        """The linear network."""
        means = self.spec.means().flatten(1)
        layer = nn.Linear(means.shape[1], len(means))
        with torch.no_grad():
            layer.weight.copy_(means / self.temperature)
            layer.bias.copy_(-means.square().sum(1) / 2 / self.temperature)
            layer.bias[0] += self.tilt
        return nn.Sequential(nn.Flatten(), layer)
