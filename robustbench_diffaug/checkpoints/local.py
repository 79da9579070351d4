"""Networks that a function of the user's builds."""

from typing import ClassVar, Literal

from torch import nn

from robustbench_diffaug import builders
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.component import Options
from robustbench_diffaug.files import Weights
from robustbench_diffaug.state import load_state

__all__ = ["Local"]


class Local(Checkpoint):
    """The network that `file.py:function` or `module:function` returns, with weights from a file.

    Runs the user's code, hence only with `--trust` or in a suite that is installed with the package. What the file of
    the function holds is part of the identity; what it imports is not.

    Arguments:
        arch: 'file.py:function', the file relative to the suite's, or 'package.module:function', importable.
        args: Its keyword arguments.
        weights: The file; left out, the network is taken as the function returns it.
    """

    kind: Literal["local"] = "local"
    runs_code: ClassVar[bool] = True
    arch: builders.Builder
    args: Options = ()
    weights: Weights | None = None

    def contents(self) -> str:
        """The digest of the function's file, where it is one."""
        return builders.digest(self.arch)

    def identity(self) -> dict[str, object]:
        """As of every value, but without the folder of the function's file."""
        return {**Checkpoint.identity(self), "arch": builders.name(self.arch)}

    def check(self) -> None:
        """Looks at the function's file, which is not run, and at the weights."""
        builders.digest(self.arch)
        if self.weights:
            self.weights.check()

    def load(self) -> nn.Module:
        """Calls the function and loads the weights; every key must fit."""
        network = builders.build(self.arch, dict(self.args))
        if self.weights:
            load_state(network, self.weights)
        return network
