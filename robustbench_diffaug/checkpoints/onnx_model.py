"""Networks in ONNX files, run by onnxruntime on the CPU; they have no gradients."""

from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256 as hashed
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from robustbench_diffaug.batch import fixed_shape
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.exported import Sizes, check_sizes
from robustbench_diffaug.component import suggest
from robustbench_diffaug.files import Weights, sha256

__all__ = ["Onnx"]

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


class Onnx(Checkpoint):
    """An ONNX file from NCHW images to logits, with its external data beside it.

    It runs on the CPU in one setting: sequentially, deterministic kernels, graph optimisations of onnxruntime's level
    'basic', as many threads as torch has. A file is data; libraries of custom operators are never loaded. Where the
    file is for a fixed number of images, it is called with that many, the last call padded.

    Arguments:
        weights: The file.
        output: The name of the output that is the logits; left out, the file must have one output.

    References:
        Open Neural Network Exchange (2017), https://onnx.ai
    """

    kind: Literal["onnx"] = "onnx"
    differentiable: ClassVar[bool] = False
    layered: ClassVar[bool] = False
    may_normalise: ClassVar[bool] = False
    weights: Weights
    output: str = ""

    @model_validator(mode="after")
    def _own_precision(self) -> "Onnx":
        if self.precision != "float32":
            raise ValueError("an ONNX file has its own precision; leave precision out")
        return self

    def contents(self) -> str:
        """The digest of the files of external data; nothing where there are none."""
        beside = self._stated().beside
        return hashed("".join(map(sha256, beside)).encode()).hexdigest() if beside else ""

    def takes(self) -> int | None:
        """The channels that the file states, else as many as `preprocess` has means."""
        channels = self._stated().sizes[1:2]
        return channels[0] if channels and channels[0] else Checkpoint.takes(self)

    def fits(self, height: int, width: int) -> None:
        """Finds that images have the size that the file states, where it states one."""
        given = self.preprocess.sized(height, width)
        needed = self._stated().sizes[2:4]
        if any(size not in (None, found) for size, found in zip(needed, given, strict=False)):
            text = "x".join("any" if size is None else str(size) for size in reversed(needed))
            raise ValueError(
                f"{self.weights.uri} takes images of {text}, and is given {given[1]}x{given[0]}; write preprocess: "
                f"{{size: {needed[0] or needed[1]}}}"
            )

    def _stated(self) -> "_Stated":
        return _stated(self.weights.pinned())

    def check(self) -> None:
        """Reads the file and looks at its input and outputs.

        Raises:
            ValueError: As `load`.
        """
        self.load()

    def load(self) -> nn.Module:
        """The session of onnxruntime as a module."""
        path = self.weights.pinned()
        _stated(path)  # before onnxruntime reads files that this one names
        session = _session(path, self.weights.uri)
        return _Network(session, self.weights.uri, self.output, self.classes)


def _session(path: Path, uri: str) -> Any:
    runtime = _needed("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors, which are raised too
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each status
        line = str(error).strip().partition("\n")[0]
        raise ValueError(f"{uri} cannot be run by onnxruntime: {line[:400]}") from error


def _needed(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"kind onnx needs {name}, which is not installed; pip install 'robustbench-diffaug[onnx]'"
        ) from error


class _Stated(NamedTuple):
    """What a file says without being run.

    Arguments:
        beside: The files of external data, which were looked for in its folder alone.
        sizes: Of its one input; empty where there are several, or it states none.
    """

    beside: tuple[Path, ...]
    sizes: Sizes


def _stated(path: Path) -> _Stated:
    """Reads a file whose external data, if any, lies in its folder.

    Raises:
        ValueError: If it is no ONNX file, or names files elsewhere or that are not there.
    """
    named, sizes = _named(path, sha256(path))
    for location in named:
        beside = (path.parent / location).resolve()
        if not beside.is_relative_to(path.parent.resolve()):
            raise ValueError(f"{path} names the file {location[:200]!r}, which lies outside its folder; it is not read")
        if not beside.is_file():
            raise ValueError(
                f"{path} has its weights in the file {location[:200]}, which is not beside it; copy it there"
            )
    return _Stated(tuple(path.parent / location for location in named), sizes)


@lru_cache(maxsize=64)
def _named(path: Path, digest: str) -> tuple[list[str], Sizes]:
    """The files that a file names, and the sizes of its one input; read once for a file that does not change."""
    onnx = _needed("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
        named = sorted({location for graph in _graphs(model) for location in _locations(onnx, graph)})
        given = {tensor.name for tensor in model.graph.initializer}  # which old files list among the inputs
        inputs = [each for each in model.graph.input if each.name not in given]
        dimensions = inputs[0].type.tensor_type.shape.dim if len(inputs) == 1 else ()
        sizes = tuple(int(dim.dim_value) if dim.dim_value > 0 else None for dim in dimensions)
    except Exception as error:  # protobuf's and onnx's own
        raise ValueError(f"{path} is no ONNX file, or is cut off: {type(error).__name__}") from error
    if not model.graph.node:
        raise ValueError(f"{path} is no ONNX file, or is cut off: it has no operations")
    return named, sizes


def _graphs(model: Any) -> Iterator[Any]:
    """The graph, the functions, and all graphs within their nodes."""
    waiting = [model.graph, *model.functions]
    while waiting:
        found = waiting.pop()
        yield found
        for attribute in (attribute for node in found.node for attribute in node.attribute):
            waiting += [attribute.g] if attribute.HasField("g") else []
            waiting += attribute.graphs


def _locations(onnx: Any, graph: Any) -> Iterator[str]:
    """The files in which tensors of a graph lie."""
    tensors = [*getattr(graph, "initializer", ())]
    sparse = [*getattr(graph, "sparse_initializer", ())]
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        tensors += [attribute.t, *attribute.tensors]
        sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
    tensors += [part for each in sparse for part in (each.values, each.indices)]
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


class _Network(nn.Module):
    """A session, called on the CPU whatever the device of the images."""

    def __init__(self, session: Any, uri: str, output: str, classes: int) -> None:
        super().__init__()
        self.session, self.uri = session, uri
        inputs, outputs = session.get_inputs(), [found.name for found in session.get_outputs()]
        if len(inputs) != 1:
            names = ", ".join(found.name for found in inputs)
            raise ValueError(f"{uri} has {len(inputs)} inputs ({names}), not one of images")
        if output and output not in outputs:
            raise ValueError(f"{uri} has no output {output!r}{suggest(output, outputs)}")
        if not output and len(outputs) != 1:
            raise ValueError(f"{uri} has the outputs {', '.join(outputs)}; say by `output: NAME` which are the logits")
        self.output = output or outputs[0]
        self.input, shape = inputs[0].name, inputs[0].shape
        if inputs[0].type not in TYPES:
            raise ValueError(f"{uri} takes {inputs[0].type}, not images of floating-point numbers")
        self.dtype = TYPES[inputs[0].type]
        _check_layout(uri, shape)
        self.sizes: Sizes = tuple(size if isinstance(size, int) else None for size in shape)
        self.rows = self.sizes[0] or 0
        last = next(found.shape for found in session.get_outputs() if found.name == self.output)
        if len(last) == 2 and isinstance(last[1], int) and last[1] != classes:
            raise ValueError(f"{uri} gives {last[1]} logits, not {classes}; correct `classes`")

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no type
    def forward(self, images: Tensor) -> Tensor:
        """The logits, float32, on the device of the images."""
        check_sizes(self.uri, self.sizes, images)
        given = images.detach().cpu().contiguous()
        found = fixed_shape(self._run, given, self.rows) if self.rows else self._run(given)
        return found.to(images.device)

    def _run(self, images: Tensor) -> Tensor:
        try:
            (found,) = self.session.run([self.output], {self.input: images.numpy().astype(self.dtype)})
            return torch.from_numpy(np.asarray(found, np.float32))
        except Exception as error:  # onnxruntime has a class for each status
            line = " ".join(str(error).split())
            raise ValueError(f"{self.uri} cannot be run on images of {tuple(images.shape)}: {line[:400]}") from error


def _check_layout(uri: str, shape: list[Any]) -> None:
    """Images are (n, channels, height, width)."""
    if len(shape) != 4:
        raise ValueError(f"{uri} takes an input of shape {shape}, not (n, channels, height, width)")
    if shape[3] in (1, 3) and shape[1] not in (1, 3):
        raise ValueError(f"{uri} takes images as (n, height, width, channels); export it with channels first (NCHW)")
