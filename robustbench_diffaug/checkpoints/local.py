"""Networks that a function of the user's builds."""

from importlib import import_module
from typing import ClassVar, Literal

from pydantic import field_validator
from torch import nn

from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.timm_model import load_state
from robustbench_diffaug.component import Options
from robustbench_diffaug.files import Weights

__all__ = ["Local"]


class Local(Checkpoint):
    """The network that `module:function` returns, with weights from a safetensors file.

    Runs the user's code, hence only with `--trust` or in a suite that is installed with the package.

    Arguments:
        arch: 'package.module:function'; the module must be importable.
        args: Its keyword arguments.
        weights: The file; left out, the network is taken as the function returns it.
    """

    kind: Literal["local"] = "local"
    runs_code: ClassVar[bool] = True
    arch: str
    args: Options = ()
    weights: Weights | None = None

    @field_validator("arch")
    @classmethod
    def _named(cls, arch: str) -> str:
        module, colon, name = arch.partition(":")
        if not (module and colon and name.isidentifier()):
            raise ValueError(f"arch of a local checkpoint is 'package.module:function', not {arch!r}")
        return arch

    def check(self) -> None:
        """Looks at the file of weights."""
        if self.weights:
            self.weights.check()

    def load(self) -> nn.Module:
        """Calls the function and loads the weights; every key must fit."""
        module, _, name = self.arch.partition(":")
        try:
            network = getattr(import_module(module), name)(**dict(self.args))
        except Exception as error:  # whatever the user's code raises
            raise ValueError(f"{self.arch} failed: {type(error).__name__}: {error}") from error
        if not isinstance(network, nn.Module):
            raise ValueError(f"{self.arch} returns {type(network).__name__}, not a torch.nn.Module")
        if self.weights:
            load_state(network, self.weights)
        return network
