"""Models of RobustBench, by its own definitions, from a local folder."""

from collections.abc import Callable
from hashlib import sha256 as hashed
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.files import Location, existing, sha256

__all__ = ["RobustBench"]


class RobustBench(Checkpoint):
    """`robustbench.utils.load_model` of the installed package; its files must be there, nothing is downloaded.

    It runs code of that package, and reads pickles by it, hence only with `--trust` or in a suite that is installed
    with the package. Its networks take images in [0, 1] and normalise them themselves.

    Arguments:
        model: The model's name in RobustBench, such as 'Hendrycks2020AugMix_ResNeXt'.
        dataset: On which it was trained.
        threat_model: Of RobustBench's table.
        folder: RobustBench's `model_dir`, with `<dataset>/<threat_model>/<model>.pt` in it.

    References:
        RobustBench: a standardized adversarial robustness benchmark (Croce et al., 2021),
        https://arxiv.org/abs/2010.09670
    """

    kind: Literal["robustbench"] = "robustbench"
    runs_code: ClassVar[bool] = True
    model: str
    dataset: Literal["cifar10", "cifar100", "imagenet"] = "cifar10"
    threat_model: Literal["Linf", "L2", "corruptions"] = "Linf"
    folder: Location

    def contents(self) -> str:
        """The digest of its file, or of those of all members of an ensemble."""
        digests = [sha256(path) for path in self._files()]
        return digests[0] if len(digests) == 1 else hashed("".join(digests).encode()).hexdigest()

    def check(self) -> None:
        """Finds the files and the package.

        Raises:
            ValueError: If one is missing.
        """
        self._files()
        _reader()

    def load(self) -> nn.Module:
        """What RobustBench makes of the files."""
        found = self._files()  # else RobustBench would fetch them
        try:
            network = _reader()(
                model_name=self.model, model_dir=self.folder, dataset=self.dataset, threat_model=self.threat_model
            )
        except Exception as error:  # whatever a third party's loader raises
            line = " ".join(str(error).split())[:300]
            raise ValueError(f"robustbench cannot load {self.model}: {type(error).__name__}: {line}") from error
        if self._files() != found:  # more members of an ensemble, whose digests are in no record
            raise ValueError(
                f"robustbench fetched more files of {self.model} into {self.folder}; look at them, run again"
            )
        if not isinstance(network, nn.Module):
            raise ValueError(f"robustbench gives {type(network).__name__} for {self.model}, not a torch.nn.Module")
        return network

    def _files(self) -> list[Path]:
        place = existing(self.folder) / self.dataset / self.threat_model
        if Path(self.model).name != self.model:
            raise ValueError(f"model is a name of RobustBench, not the path {self.model!r}")
        if self.dataset == "imagenet" and "Standard" in self.model:  # RobustBench reads no file for these
            raise ValueError(f"{self.model} is a network of torchvision with its own weights; use kind torchvision")
        single = place / f"{self.model}.pt"
        if single.is_file():
            return [single]
        members: list[Path] = []
        while (member := place / f"{self.model}.pt_m{len(members)}.pt").is_file():
            members.append(member)
        if not members:
            raise ValueError(
                f"there is no {single}; RobustBench's files lie in <folder>/<dataset>/<threat_model>/<model>.pt"
            )
        return members


def _reader() -> Callable[..., Any]:
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip

    try:
        found: Callable[..., Any] = import_module("robustbench.utils").load_model
    except Exception as error:  # its own imports fail in several ways
        raise ValueError(
            f"kind robustbench needs the package robustbench, which cannot be imported ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); install it from its repository, or give the network as kind local"
        ) from error
    return found
