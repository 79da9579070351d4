"""Classifiers of the library timm, by the name of the architecture, with local weights."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from torch import nn

from robustbench_diffaug.checkpoints.base import Checkpoint, Preprocess
from robustbench_diffaug.checkpoints.conditioning import Want, planes
from robustbench_diffaug.component import Options, suggest
from robustbench_diffaug.files import Weights
from robustbench_diffaug.state import load_state, shapes

__all__ = ["Timm", "build", "stated"]


class Timm(Checkpoint):
    """Any architecture of timm with weights from a file; nothing is downloaded.

    `classes` and `channels` may be left out: they are those of the weights. `preprocess` may be the word `timm`, for
    the input size, interpolation, mean and std that timm states for the architecture. All are written out in the value,
    and so in `suite.lock.yaml`.

    Arguments:
        arch: As in `timm.create_model`; a tag, as in 'vit_base_patch16_224.augreg_in1k', says whose preprocessing.
        args: More arguments of the architecture, such as `img_size`.
        channels: Of the input images; a network of three is shown grey images three times over.
        weights: The file.

    References:
        PyTorch Image Models (Wightman, 2019), https://github.com/huggingface/pytorch-image-models
    """

    kind: Literal["timm"] = "timm"
    may_normalise: ClassVar[bool] = False
    arch: str
    args: Options = ()
    channels: PositiveInt = 3
    weights: Weights

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, data: Any, info: Any) -> Any:
        """Puts numbers in place of what was left out, and of the word."""
        if not isinstance(data, Mapping):
            return data
        data = _of_weights(data, info.context)
        if data.get("preprocess") != "timm":
            return data
        if data.get("channels", 3) != 3:
            raise ValueError("preprocess: timm is for images of 3 channels; write size, mean and std out")
        size = dict(_pairs(data.get("args"))).get("img_size")
        return {**data, "preprocess": stated(str(data.get("arch")), size)}

    @model_validator(mode="after")
    def _normalises_its_channels(self) -> "Timm":
        means = len(self.preprocess.mean)
        if means not in (1, self.channels):
            raise ValueError(
                f"preprocess has mean and std of {means} channels, and the network takes {self.channels}; write as "
                "many, or one for all"
            )
        return self

    def check(self) -> None:
        """Looks at the file of weights."""
        self.weights.check()

    def fits(self, height: int, width: int) -> None:
        """Finds that images have the one size that the architecture takes, where it takes one."""
        try:
            config = _known(self.arch).models.get_pretrained_cfg(self.arch)
        except ValueError:  # the run says so, of this checkpoint alone
            return
        args = dict(self.args)
        if config is None or not config.fixed_input_size or args.get("dynamic_img_size"):
            return
        size = args.get("img_size") or config.input_size[-2:]
        needed = tuple(size) if isinstance(size, tuple | list) else (size, size)
        found = self.preprocess.sized(height, width)
        if found != needed:
            raise ValueError(
                f"{self.arch} takes images of {needed[1]}x{needed[0]} alone, and is given {found[1]}x{found[0]}; write "
                f"preprocess: {{size: {needed[0]}}}, or args: {{img_size: {found[0]}}} if it was trained so"
            )

    def about(self) -> tuple[tuple[str, str], ...]:
        """What timm states for the architecture's own weights, where that is another preprocessing."""
        with suppress(ValueError):
            own = stated(self.arch, dict(self.args).get("img_size"))
            if self.channels == 3 and Preprocess(**own) != self.preprocess:
                own["mean"], own["std"] = ([round(value, 4) for value in own[key]] for key in ("mean", "std"))
                text = ", ".join(f"{key}: {value}" for key, value in own.items())
                return (("timm states", f"preprocess: {{{text}}} for its own weights (preprocess: timm takes it)"),)
        return ()

    def load(self) -> nn.Module:
        """The network with its weights; every key must fit."""
        network = build(self.arch, self.args, planes(self.channels, self.wants), self.classes)
        load_state(network, self.weights)
        return network


def _pairs(args: object) -> tuple[tuple[str, Any], ...]:
    """The arguments of an architecture as they stand in a file or in a value."""
    return tuple(args.items() if isinstance(args, Mapping) else args if isinstance(args, tuple) else ())


def _of_weights(data: Mapping[str, Any], context: Any) -> Mapping[str, Any]:
    """An entry with the classes and channels of its weights, where they are left out.

    Raises:
        ValueError: If `classes` are left out and cannot be read.
    """
    lacking = [name for name in ("classes", "channels") if name not in data]
    if not lacking or "weights" not in data or not isinstance(data.get("arch"), str):
        return data
    try:
        weights = Weights.model_validate(data["weights"], context=context)
        found = shapes(weights)
    except ValidationError:  # whose place the field itself tells
        return data
    except (ValueError, OSError) as error:
        if "classes" in lacking:
            raise _of_file(str(error)) from error
        return data  # without channels they are 3; the file is found wanting where it is looked at
    wants = data.get("wants", ())
    read = {
        "classes": _last(data["arch"], found),
        "channels": _first(data["arch"], found, wants if isinstance(wants, tuple | list) else ()),
    }
    if read["classes"] is None and "classes" in lacking:
        raise _of_file(_no_classes(data["arch"], found, weights.uri))
    return {**data, **{name: read[name] for name in lacking if read[name] is not None}}


def _of_file(message: str) -> PydanticCustomError:
    """An error that says where the weights stand."""
    return PydanticCustomError("at_key", "{message}", {"message": message, "key": "weights"})


def _no_classes(arch: str, found: Mapping[str, tuple[int, ...]], uri: str) -> str:
    """Why the number of classes cannot be read from weights, and what to write."""
    names = getattr(_known(arch).models.get_pretrained_cfg(arch), "classifier", None) or ()
    needed = [f"{name}.weight" for name in ((names,) if isinstance(names, str) else names)]
    within = sorted({name.removesuffix(last) for name in found for last in needed if name.endswith(f".{last}")})
    if within:
        return f"{uri} holds more than one network; say which by entry: {within[0]}" + (
            f" (or {', '.join(within[1:12])})" if within[1:] else ""
        )
    shown = ", ".join([*found][:2] + [*found][-1:])
    lacks = f"has no {' or '.join(needed)} among {len(found)} names ({shown[:160]})" if needed else "does not say them"
    return f"the classes of {arch} cannot be read: {uri} {lacks}; correct arch, or write classes, the number"


def _named(arch: str, what: str, found: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of the weight that timm calls the architecture's `classifier` or `first_conv`."""
    names = getattr(_known(arch).models.get_pretrained_cfg(arch), what, None) or ()
    every = [found.get(f"{name}.weight") for name in ((names,) if isinstance(names, str) else names)]
    return next((shape for shape in every if shape), None)


def _last(arch: str, found: Mapping[str, tuple[int, ...]]) -> int | None:
    shape = _named(arch, "classifier", found)
    return shape[0] if shape else None


def _first(arch: str, found: Mapping[str, tuple[int, ...]], wants: Sequence[Want]) -> int | None:
    """The channels of images, of one to four; other numbers are of networks that rearrange pixels first."""
    shape = _named(arch, "first_conv", found)
    fits = [count for count in range(1, 5) if shape and len(shape) == 4 and planes(count, wants) == shape[1]]
    return fits[0] if fits else None


def build(arch: str, args: Options, channels: int, classes: int) -> nn.Module:
    """A timm architecture with random weights.

    Raises:
        ValueError: If timm has none of that name, or it does not take these arguments.
    """
    timm = _known(arch)
    options: dict[str, Any] = dict(args)
    try:
        network: nn.Module = timm.create_model(
            arch, pretrained=False, in_chans=channels, num_classes=classes, **options
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"timm cannot build {arch} with {options}: {error}") from error
    return network


def _known(arch: str) -> Any:
    """The module timm, once it is clear that it has an architecture."""
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
    import timm

    if not timm.is_model(arch):
        raise ValueError(f"timm has no architecture {arch!r}{suggest(arch, timm.list_models())[:200]}")
    return timm


def stated(arch: str, size: int | None = None) -> dict[str, Any]:
    """What timm states for the images of an architecture (its `pretrained_cfg`), as the fields of `Preprocess`.

    Arguments:
        arch: With or without the tag of some weights; timm's first weights count where it is left out.
        size: In pixels, in place of the stated input size.

    Raises:
        ValueError: If timm has no such architecture or tag, or states a size of unequal height and width.
    """
    models = _known(arch).models
    try:
        config = models.get_pretrained_cfg(arch, allow_unregistered=False)
    except RuntimeError as error:
        tags = ", ".join(models.list_pretrained(f"{arch.partition('.')[0]}.*")[:12])
        raise ValueError(f"timm has no weights {arch!r}; there are {tags}") from error
    if config is None:
        raise ValueError(f"timm states no preprocessing for {arch}; write size, mean and std out")
    height, width = config.input_size[1:]
    if size is None and height != width:
        raise ValueError(f"timm's input of {arch} is {width}x{height}, not square; write the preprocessing out")
    return {
        "size": size or height,
        "interpolation": config.interpolation,
        "mean": config.mean,
        "std": config.std,
    }
