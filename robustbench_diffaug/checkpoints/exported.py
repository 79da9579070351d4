"""Networks that were exported with their code: TorchScript files and programs of torch.export."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.files import Weights

__all__ = ["Brought", "Exported", "Program", "TorchScript", "check_sizes"]


Sizes: TypeAlias = tuple[int | None, ...]
"""Of images as a file states them: number, channels, height, width; None where it takes any."""


class Program(nn.Module):
    """A network that brought its code, as an ordinary module; it is in evaluation mode for good.

    Arguments:
        program: What is called; its weights are this module's.
        uri: The file, for messages.
        sizes: Of the images that it takes, where the file states them.
    """

    def __init__(self, program: nn.Module, uri: str, sizes: Sizes = ()) -> None:
        super().__init__()
        self.program, self.uri, self.sizes = program, uri, sizes
        self.training = False

    def forward(self, images: Tensor) -> Any:
        """Whatever the program returns."""
        check_sizes(self.uri, self.sizes, images)
        try:
            return self.program(images)
        except AssertionError as error:  # a guard of an exported program
            raise ValueError(f"{self.uri} cannot take images of {tuple(images.shape)}: {_line(error)}") from error

    def train(self, mode: bool = True) -> "Program":
        """Nothing: exported programs have one mode, that in which they were exported."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        return self  # neither sort can be copied, and none changes


def check_sizes(uri: str, sizes: Sizes, images: Tensor) -> None:
    """Finds that images have the channels, height and width that a file states; their number is another's affair.

    Raises:
        ValueError: If they have not; the message says what to write.
    """
    if any(needed not in (None, given) for needed, given in zip(sizes[1:], images.shape[1:], strict=False)):
        stated = "x".join("any" if size is None else str(size) for size in sizes[1:])
        given = "x".join(map(str, images.shape[1:]))
        raise ValueError(
            f"{uri} takes images of {stated} (channels, height, width), and is given {given}; preprocess: size is the "
            "height and width; with channels: 3 or three means it shows grey images three times over"
        )


class Brought(Checkpoint):
    """A network that brings its code, hence only with `--trust` or in a suite that is installed with the package.

    Arguments:
        channels: Of the images that it takes; left out, as many as `preprocess` has means, if these are several.
        weights: The file.
    """

    runs_code: ClassVar[bool] = True
    layered: ClassVar[bool] = False
    channels: PositiveInt | None = None
    weights: Weights


class TorchScript(Brought):
    """A file of `torch.jit.save`, run by `torch.jit.load`."""

    kind: Literal["torchscript"] = "torchscript"

    def check(self) -> None:
        """Looks at the file's digest and at whether it is an archive of that sort."""
        _archive(self.weights, "/constants.pkl", "TorchScript", "torch.jit.save(torch.jit.script(network), path)")

    def load(self) -> nn.Module:
        """The network, in evaluation mode.

        Raises:
            ValueError: As every `load`, and if it was traced in training mode.
        """
        self.check()
        program = _loaded(self.weights, _jit).eval()
        _check_mode(self.weights, _trains_script(program))
        return Program(program, self.weights.uri)


class Exported(Brought):
    """A file of `torch.export.save`, run by `torch.export.load`.

    A program that was exported for one number of images needs that number as `microbatch`.
    """

    kind: Literal["export"] = "export"

    def check(self) -> None:
        """Looks at the file's digest and at whether it is an archive of that sort."""
        _archive(self.weights, "/models/model.json", "torch.export", "torch.export.save(program, path)")

    def load(self) -> nn.Module:
        """The network.

        Raises:
            ValueError: As every `load`, and if the program is of another number of images, or of training.
        """
        self.check()
        program = _loaded(self.weights, torch.export.load)
        inputs = program.graph_signature.user_inputs
        found = [node.meta.get("val") for node in program.graph.nodes if node.name in inputs]
        if len(inputs) != 1 or len(found) != 1 or not isinstance(found[0], Tensor) or found[0].ndim != 4:
            shapes = ", ".join(str(tuple(getattr(each, "shape", ()))) for each in found)
            raise ValueError(f"{self.weights.uri} takes {len(inputs)} inputs ({shapes[:160]}), not one of images")
        sizes = tuple(size if isinstance(size, int) else None for size in found[0].shape)
        if sizes[0] not in (None, self.microbatch):
            raise ValueError(
                f"{self.weights.uri} was exported for {sizes[0]} images at once; write microbatch: {sizes[0]}, or "
                "export it with a dynamic first axis"
            )
        _check_mode(self.weights, _trains_export(program))
        return Program(program.module(), self.weights.uri, sizes)


def _check_mode(weights: Weights, trains: str) -> None:
    if trains:
        raise ValueError(
            f"{weights.uri} was exported in training mode: its {trains} uses the batch, or chance; call network.eval() "
            "before the export"
        )


def _trains_script(program: Any) -> str:
    """The first operation that is fixed to behave as in training; empty for none."""
    graph = program.inlined_graph
    for kind in ("aten::batch_norm", "aten::dropout"):
        for node in graph.findAllNodes(kind, True):
            names = [argument.name for argument in torch._C.parse_schema(node.schema()).arguments]
            values = dict(zip(names, node.inputs(), strict=True))
            if any(values[name].toIValue() is True for name in ("training", "train") if name in values):
                return kind
    return ""


def _trains_export(program: Any) -> str:
    """The first operation that behaves as in training; empty for none."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        values = {**dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)), **node.kwargs}
        if any(values.get(name) is True for name in ("training", "train")):
            return str(node.target)
    return ", ".join(program.graph_signature.buffers_to_mutate.values())


def _jit(path: Path) -> Any:
    with warnings.catch_warnings():
        # Files that were exported before the word of deprecation are read all the same.
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
        return torch.jit.load(path, map_location="cpu")


def _loaded(weights: Weights, read: Callable[[Path], Any]) -> Any:
    try:
        return read(weights.pinned())
    except Exception as error:  # whatever a reader of archives raises
        raise ValueError(f"{weights.uri} cannot be loaded: {type(error).__name__}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """The first line of a message that has something in it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


def _archive(weights: Weights, member: str, sort: str, how: str) -> None:
    """Finds that the file is a zip archive with a member that ends so."""
    from zipfile import BadZipFile, ZipFile

    path = weights.pinned()
    try:
        with ZipFile(path) as archive:
            names = archive.namelist()
    except (BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{weights.uri} is no {sort} file, or is cut off; such a file is written by {how}") from error
    if not any(name.endswith(member) for name in names):
        raise ValueError(f"{weights.uri} is an archive, but no {sort} file; such a file is written by {how}")
