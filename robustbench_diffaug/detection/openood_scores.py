"""Post-processors of the package openood, where it is installed, on recorded arrays.

A post-processor calls a network on images. Here a row of recorded features and logits is the image, and the network
gives both back, so that its code runs as it is and no network is called again. What needs more than that, such as
gradients with respect to pixels or inner layers, is refused. All runs on the host, whatever device the code asks for;
what it draws from global generators has a stream of its own, and what it prints is dropped.

References:
    OpenOOD v1.5: Enhanced Benchmark for Out-of-Distribution Detection (Zhang et al., 2023),
        https://arxiv.org/abs/2306.09301; code: https://github.com/Jingkang50/OpenOOD
"""

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustbench_diffaug import rng
from robustbench_diffaug.component import suggest
from robustbench_diffaug.detection.rows import Chunks, Rows, Score, Scorer, Source

__all__ = ["PREFIX", "openood_score"]

PREFIX = "openood:"
"""How suites and metrics name such a score: 'openood:knn'."""

BATCH = 200  # rows in a call, as in openood's scripts; some post-processors hold a matrix of batch x batch
WRAPPERS = {
    "react": ("react_net", "ReactNet"),
    "ash": ("ash_net", "ASHNet"),
    "scale": ("scale_net", "ScaleNet"),
    "adascale_a": ("adascale_net", "AdaScaleANet"),
    "adascale_l": ("adascale_net", "AdaScaleLNet"),
}
"""The network of openood that its evaluator puts around the classifier for some post-processors."""

SPLITS = {"train": "fit", "val": "val"}
"""openood's names of what a score is fitted to, and ours."""

Combination = tuple[Any, ...]


@dataclass(frozen=True)
class Settings:
    """What openood's YAML file of a post-processor says of its search for hyper-parameters.

    Arguments:
        parameter: The name of the hyper-parameter; 'combination' where there are several, and a value is the position
            in openood's order; empty where nothing is searched.
        default: The value without a search, where it is a number.
        choices: What the post-processor is given for each value.
    """

    parameter: str = ""
    default: float | None = None
    choices: tuple[tuple[float, Combination], ...] = ()


class Recorded(nn.Module):
    """Stands for the classifier: rows of features and logits, side by side, are its images.

    Arguments:
        weight: Of the last layer, of shape (k, d).
        bias: Of shape (k,).
    """

    def __init__(self, weight: NDArray[Any], bias: NDArray[Any]) -> None:
        super().__init__()
        classes, self.feature_size = weight.shape
        self.fc = nn.Linear(self.feature_size, classes)
        with torch.no_grad():
            self.fc.weight.copy_(torch.from_numpy(np.asarray(weight)))
            self.fc.bias.copy_(torch.from_numpy(np.asarray(bias)))

    def forward(self, x: Tensor, return_feature: bool = False, return_feature_list: bool = False) -> Any:
        """Logits as they were recorded, and features where they are asked for; copies, since some change them."""
        if x.requires_grad:
            raise ValueError("it needs gradients with respect to images, and only logits and features are recorded")
        features, logits = x[:, : self.feature_size].clone(), x[:, self.feature_size :].clone()
        if return_feature:
            return logits, features
        return (logits, [features]) if return_feature_list else logits

    def get_fc(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Weight and bias of the last layer."""
        return self.fc.weight.detach().numpy(), self.fc.bias.detach().numpy()

    def get_fc_layer(self) -> nn.Linear:
        """The last layer."""
        return self.fc


@dataclass(frozen=True)
class Loader:
    """A loader of batches, as post-processors take it.

    Arguments:
        chunks: Reads the rows.
        batch_size: Rows in a batch, whatever the chunks.
    """

    chunks: Chunks
    batch_size: int = BATCH

    @cached_property
    def dataset(self) -> range:
        """As long as the dataset."""
        return range(sum(len(rows.labels) for rows in self.chunks()))

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        images, labels = torch.empty(0), torch.empty(0, dtype=torch.int64)
        for rows in self.chunks():
            images = torch.cat([images, _images(rows)]) if len(images) else _images(rows)
            labels = torch.cat([labels, torch.from_numpy(rows.labels.astype(np.int64))])
            whole = len(images) // self.batch_size * self.batch_size
            yield from _batches(images[:whole], labels[:whole], self.batch_size)
            images, labels = images[whole:], labels[whole:]
        yield from _batches(images, labels, self.batch_size)


def _batches(images: Tensor, labels: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(images), size):
        yield {"data": images[start : start + size].clone(), "label": labels[start : start + size].clone()}


def _images(rows: Rows) -> Tensor:
    """Features and logits, side by side."""
    if rows.features is None:
        raise ValueError("it needs features, which were not recorded")
    return torch.from_numpy(np.concatenate([rows.features, rows.logits], axis=1, dtype=np.float32))


class Loaders(dict[str, Loader]):
    """Loaders by openood's names of the splits; one that is not there is named as suites name it."""

    def __missing__(self, split: str) -> Loader:
        if split not in SPLITS:
            raise ValueError(f"it reads the {split} images when it is set up, and scores are fitted to no such images")
        raise ValueError(f"it reads the {split} images, and there are none; add a dataset of group {SPLITS[split]}")


class OnHost(TorchFunctionMode):
    """Within it tensors and modules stay on the host, wherever code would have them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls the function, without the device."""
        if func is Tensor.cuda:
            return args[0]
        args = tuple("cpu" if _is_cuda(value) else value for value in args)
        kept = {name: "cpu" if _is_cuda(value) else value for name, value in (kwargs or {}).items()}
        return func(*args, **kept)


def _is_cuda(value: object) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


def openood_score(name: str) -> Score:
    """The score of a post-processor of the package openood, by the name that the package has for it, such as 'knn'.

    With a search in its settings (APS_mode), the values are openood's; where it searches several hyper-parameters at
    once, a value is the position of a combination in openood's order.

    Arguments:
        name: One of `openood.evaluation_api.postprocessor.postprocessors`.

    Raises:
        ValueError: If the package cannot be imported, has no such post-processor, or no file of settings for it.
    """
    folder = _package(name)
    settings = _settings(folder / "postprocessors" / f"{name}.yml", name)

    def fit(source: Source, value: float | None) -> Scorer:
        return _fitted(name, folder, settings, source, value)

    return Score(
        name=PREFIX + name,
        fit=fit,
        needs=frozenset({"features", "head"}),
        parameter=settings.parameter,
        default=settings.default,
        sweep=tuple(value for value, _ in settings.choices),
    )


def _package(name: str) -> Path:
    """The folder of openood's settings, once it is clear that the package has a post-processor of that name."""
    try:
        with _quiet(name, 0):
            import_module("robustbench_diffaug.torchvision_guard")  # openood imports torchvision
            module = import_module("openood.evaluation_api.postprocessor")
    except Exception as error:  # whatever its imports raise: it needs many packages
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"score {PREFIX}{name} needs the package openood, which cannot be imported ({why}); install it, or take a "
            "score of rdiff's own"
        ) from error
    if name not in module.postprocessors:
        raise ValueError(f"openood has no post-processor {name!r}{suggest(name, sorted(module.postprocessors))}")
    return Path(str(module.__file__)).resolve().parents[2] / "configs"  # where its own evaluator looks


def _settings(path: Path, name: str) -> Settings:
    """What a file of settings says; openood would download one that is not there."""
    if not path.is_file():
        raise ValueError(
            f"score {PREFIX}{name}: there is no {path}; put openood's configs/postprocessors/{name}.yml there, which "
            "pip leaves out"
        )
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["postprocessor"]
        given, swept = dict(found.get("postprocessor_args") or {}), dict(found.get("postprocessor_sweep") or {})
        lists = {key.removesuffix("_list"): list(values) for key, values in swept.items()}
        searched = bool(found.get("APS_mode")) and bool(lists)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} holds no settings of a post-processor of openood") from error
    if not searched:
        return Settings()
    # In openood's order the first hyper-parameter changes fastest.
    combinations = [tuple(reversed(values)) for values in product(*reversed(lists.values()))]
    (parameter, *more), default = lists, given.get(next(iter(lists)))
    numbers = [values[0] for values in combinations]
    if more or not all(map(_is_number, numbers)) or len(set(numbers)) < len(numbers):
        return Settings("combination", None, tuple((float(i), values) for i, values in enumerate(combinations)))
    choices = tuple((float(values[0]), values) for values in combinations)
    return Settings(parameter, float(default) if _is_number(default) else None, choices)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fitted(name: str, folder: Path, settings: Settings, source: Source, value: float | None) -> Scorer:
    """A post-processor that was set up on a source."""
    if source.weight is None or source.bias is None:
        raise ValueError(f"score {PREFIX}{name} needs the last layer, which is not known")
    combination = dict(settings.choices).get(value) if value is not None else None
    if value not in (None, settings.default) and combination is None:
        known = ", ".join(f"{known:g}" for known, _ in settings.choices) or "none"
        raise ValueError(f"score {PREFIX}{name}: openood does not search {value:g}; there are {known}")
    given = zip(SPLITS, (source.fit, source.val), strict=True)
    loaders = Loaders({split: Loader(chunks) for split, chunks in given if chunks})
    with _told(name), _quiet(name, source.key):
        processor = _made(name, folder, len(source.weight))
        network = _wrapped(name, Recorded(source.weight, source.bias))
        network.eval()
        processor.setup(network, loaders, {})
        if combination is not None:
            processor.set_hyperparam(list(combination))
    return _scorer(name, processor, network, source.key)


def _made(name: str, folder: Path, classes: int) -> Any:
    """The post-processor; by its dataset's name openood knows the number of classes, and nothing else."""
    module = import_module("openood.evaluation_api.postprocessor")
    counts = import_module("openood.postprocessors.info").num_classes_dict
    dataset = next((known for known, count in counts.items() if count == classes), f"{classes} classes")
    counts.setdefault(dataset, classes)
    return module.get_postprocessor(str(folder), name, dataset)


def _wrapped(name: str, network: nn.Module) -> nn.Module:
    """The network as openood's evaluator gives it to a post-processor."""
    if name not in WRAPPERS:
        return network
    module, wrapper = WRAPPERS[name]
    found: nn.Module = getattr(import_module(f"openood.networks.{module}"), wrapper)(network)
    return found


def _scorer(name: str, processor: Any, network: nn.Module, key: int) -> Scorer:
    def scorer(rows: Rows) -> NDArray[np.float64]:
        found = []
        with _told(name), _quiet(name, key):
            for batch in Loader(lambda: iter([rows])):
                _, scores = processor.postprocess(network, batch["data"])
                found.append(np.asarray(torch.as_tensor(scores).detach(), dtype=np.float64).reshape(-1))
        scores = np.concatenate(found) if found else np.empty(0)
        if len(scores) != len(rows.labels):
            raise ValueError(f"score {PREFIX}{name}: {len(scores)} scores of {len(rows.labels)} images")
        return scores

    return scorer


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever a post-processor raises is one line."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"score {PREFIX}{name}: {kind}{' '.join(str(error).split())[:300]}") from error


@contextmanager
def _quiet(name: str, key: int) -> Iterator[None]:
    """Code of openood within it prints and warns to nobody, stays on the host, and draws from a stream of its own."""
    with ExitStack() as stack:
        for context in (redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings()):
            stack.enter_context(context)
        warnings.simplefilter("ignore")
        stack.enter_context(rng.seeded(rng.key(key, PREFIX, name)))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(OnHost())
        yield
