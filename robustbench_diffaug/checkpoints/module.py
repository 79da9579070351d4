"""Networks that exist in Python alone, for notebooks; a suite file cannot name one."""

import copy
import pickle
import sys
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, PrivateAttr
from torch import nn

from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.structure import digest
from robustbench_diffaug.component import Outside
from robustbench_diffaug.document import Document

__all__ = ["Held", "Module"]


class Held:
    """A copy of a network as it was when it was handed over; the original is left as it is.

    Other processes get it by a file of a folder that is this user's alone, written once.

    Arguments:
        network: On any device, in any mode.

    Raises:
        ValueError: If it cannot be copied.
    """

    def __init__(self, network: nn.Module) -> None:
        plain = getattr(network, "_orig_mod", network)  # of torch.compile, whose wrapper would be compiled again
        if isinstance(plain, nn.DataParallel | nn.parallel.DistributedDataParallel):
            plain = plain.module
        copied = _copied(plain)
        self.digest = digest(copied)
        self.network: nn.Module | None = copied.cpu().eval().requires_grad_(False)
        self.folder: TemporaryDirectory[str] | None = None

    def copied(self) -> nn.Module:
        """A copy to use; what that does to it stays there.

        Raises:
            ValueError: If the network was forgotten.
        """
        if self.network is None:
            raise ValueError("the network is forgotten")
        return _copied(self.network)

    def release(self) -> None:
        """Forgets the network, whose memory is freed; and the file."""
        self.network = None
        if self.folder:
            self.folder.cleanup()

    def sendable(self) -> None:
        """Finds that other processes can have the network.

        Raises:
            ValueError: If they cannot.
        """
        try:
            if self.network is not None and not getattr(sys.modules["__main__"], "__file__", None):
                for module in self.network.modules():
                    if type(module).__module__ == "__main__":  # which another process could not import
                        raise TypeError(f"class {type(module).__name__} is defined in no file")
            pickle.dumps(self)
        except Exception as error:  # whatever parts of the user's raise
            raise ValueError(
                f"other processes cannot have the network ({type(error).__name__}: {error}); use workers=1, or define "
                "its classes and functions at the top of a module of their own"
            ) from error

    def __reduce__(self) -> tuple[object, ...]:
        if self.network is None:
            return _nothing, ()
        if self.folder is None:
            content = pickle.dumps(self.network)
            self.folder = TemporaryDirectory(prefix="rdiff-network-")
            Path(self.folder.name, "network").write_bytes(content)
        return _fetched, (str(Path(self.folder.name, "network")),)


def _copied(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except Exception as error:  # whatever parts of the user's raise
        reason = " ".join(str(error).split())
        raise ValueError(f"the network cannot be copied: {type(error).__name__}: {reason}") from error


def _nothing() -> None:
    return None


@lru_cache(maxsize=8)
def _fetched(path: str) -> Held | None:
    """The network in another process: what this package wrote a moment ago, for its own workers."""
    if not Path(path).is_file():  # the process that made it is gone, or on another machine
        return None
    found = object.__new__(Held)
    found.network, found.folder = pickle.loads(Path(path).read_bytes()), None  # noqa: S301  # not a user's file
    return found


class Module(Checkpoint):
    """A network that a Python process handed over; its records are known by the digest of the network.

    Arguments:
        digest: Of its weights, structure and code; see `structure.digest`.
        network: What it is, in words, for readers.
        channels: Of the images that it takes.
    """

    kind: Literal["module"] = "module"
    digest: str = Field(pattern="^[0-9a-f]{32}$")
    network: Annotated[str, Outside] = ""
    channels: PositiveInt
    _held: Held | None = PrivateAttr(None)

    @classmethod
    def of(cls, held: Held, **fields: object) -> "Module":
        """The checkpoint of a network.

        Arguments:
            held: The network.
            fields: Of the checkpoint; all but `digest` and `network`.
        """
        assert held.network is not None
        count = sum(parameter.numel() for parameter in held.network.parameters())
        about = f"{type(held.network).__name__}, {count:,} parameters"
        whole = {**fields, "digest": held.digest, "network": about}
        made = Document(None, whole, {}).validate(cls, {})
        made._held = held
        return made

    def check(self) -> None:
        """Finds that the network is in this process."""
        self._found()

    def load(self) -> nn.Module:
        """A copy of the network."""
        return self._found().copied()

    def _found(self) -> Held:
        if self._held is None or self._held.network is None:
            raise ValueError(
                f"the network of {self.id} ({self.network}) exists only in the Python process that made it; hand it to "
                "robustbench_diffaug.run there, or save its weights and name them with another kind"
            )
        return self._held
