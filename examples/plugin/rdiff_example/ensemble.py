# rdiff_example/ensemble.py
"""Several classifiers as one."""

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from robustbench_diffaug.checkpoints.base import Checkpoint


class Ensemble(Checkpoint):
    """A deep ensemble: the logarithm of the mean of its members' probabilities.

    Arguments:
        members: Checkpoints of any kind, with the same classes; each has its own `preprocess`.

    References:
        Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles (Lakshminarayanan et al., NeurIPS
        2017), https://arxiv.org/abs/1612.01474
    """

    kind: Literal["ensemble"] = "ensemble"
    layered: ClassVar[bool] = False
    members: tuple[Checkpoint, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _alike(self) -> "Ensemble":
        for member in self.members:
            if member.classes != self.classes:
                raise ValueError(f"member {member.id} has {member.classes} classes, and the ensemble {self.classes}")
            if member.wants:
                raise ValueError(f"member {member.id} wants the noise level; an ensemble is shown images alone")
        return self

    def check(self) -> None:
        """Looks at the files of all members."""
        for member in self.members:
            member.check()

    def takes(self) -> int | None:
        """The channels of the members' images, where they agree."""
        channels = {member.takes() for member in self.members}
        return channels.pop() if len(channels) == 1 else None

    def load(self) -> nn.Module:
        """All members, each behind its preprocessing."""
        return _Mean(self.members)


class _Mean(nn.Module):
    def __init__(self, members: tuple[Checkpoint, ...]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(member.load() for member in members)
        self.preprocesses = [member.preprocess for member in members]

    def forward(self, images: Tensor) -> Tensor:
        pairs = zip(self.networks, self.preprocesses, strict=True)
        logs = torch.stack([network(prepare(images)).log_softmax(dim=1) for network, prepare in pairs])
        return logs.logsumexp(dim=0) - torch.tensor(float(len(logs))).log()
