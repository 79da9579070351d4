"""ImageNet's validation set, the sets made after it, and ImageNet-C, from the folders as they are published."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from sys import intern
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import Field, PositiveInt, model_validator

from robustbench_diffaug.component import Outside, suggest
from robustbench_diffaug.data.base import Dataset, Images
from robustbench_diffaug.data.grids import Grid
from robustbench_diffaug.data.image_files import Geometry, Listing, class_folders, listed, opened
from robustbench_diffaug.data.imagenet_classes import CATEGORIES, VARIANTS, Variant, indices
from robustbench_diffaug.files import DataLocation, existing

__all__ = ["PRESETS", "ImageNet", "ImageNetC"]

Preset: TypeAlias = Literal["imagenet-val", "imagenet-c", "diffaug-paper", "robustbench"]
Interpolation: TypeAlias = Literal["bilinear", "bicubic"]
Resize: TypeAlias = PositiveInt | tuple[PositiveInt, PositiveInt]

Nuisance: TypeAlias = Literal["background", "material", "texture"]

NUISANCES: tuple[Nuisance, ...] = ("background", "material", "texture")


class Fitting(NamedTuple):
    """How images are resized and cropped."""

    resize: int | tuple[int, int] | None
    crop: int | None
    interpolation: Interpolation = "bilinear"


PRESETS: Mapping[str, Fitting] = MappingProxyType(
    {
        "imagenet-val": Fitting(256, 224),
        "imagenet-c": Fitting(None, 224),
        "diffaug-paper": Fitting(256, 224),
        "robustbench": Fitting((224, 224), None),
    }
)
"""Published preprocessings.

`imagenet-val` is the usual one of the validation set, `imagenet-c` that of ImageNet-C's own evaluation (its images are
224 px already), `diffaug-paper` that of the DiffAug paper, which enlarges ImageNet-C to 256 px first, and `robustbench`
RobustBench's Res224, which it takes for ImageNet-C.

References:
    hendrycks/robustness, ImageNet-C/test.py, https://github.com/hendrycks/robustness
    oore-lab/diffaug, eval_scripts/eval_imagenetc.py, https://github.com/oore-lab/diffaug
    RobustBench, robustbench/data.py and eval.py, https://github.com/RobustBench/robustbench
"""


def _resolved(data: Any) -> Any:
    """The fields with what the preset says written out."""
    if not isinstance(data, Mapping) or data.get("preset") not in PRESETS:
        return data
    preset = PRESETS[data["preset"]]
    for name, value in preset._asdict().items():
        given = data.get(name, value)
        if (tuple(given) if isinstance(given, list) else given) != value:
            means = ", ".join(f"{key} {_plain(field)}" for key, field in preset._asdict().items())
            raise ValueError(
                f"preset {data['preset']} means {means}, and {name} {_plain(given)} is given beside it; leave one out"
            )
    return {**data, **preset._asdict()}


def _plain(value: object) -> str:
    return "none" if value is None else str(list(value)) if isinstance(value, tuple) else str(value)


class ImageNet(Dataset):
    """Images of ImageNet's classes, in the folders that each set is published in; labels are indices of 0 to 999.

    An id is `<folder of the class>/<name of the file without suffix>`, so that versions of one image have one id.
    ImageNet-D is published as `background`, `material` and `texture`, each with folders of its categories (not all of
    the 113 need be there), and an id has the nuisance in front. Its authors choose among all 1,000 classes, so
    `class_space` is 'full' there where it is left out. Nine of its categories stand for two or three classes of
    ImageNet, each of which they count as right; one label cannot say that, and `several` must say what to do.

    Arguments:
        root: The folder whose sub-folders are the classes (ImageNet-D: the nuisances).
        variant: 'val'; 'r', 'a', 'sketch'; 's' (Stylized-ImageNet); 'd'; 'v2' (its folders are 0, 1, ..., 999).
        classes: The names of the folders to read; left out, all of the variant must be there.
        nuisances: Which of ImageNet-D's three parts.
        several: ImageNet-D's images with several right classes: 'leave-out', or 'first', which takes the first class
            for the only right one and so makes accuracies too low.
        preset: A published preprocessing in place of the next three; see `PRESETS`.
        resize: The shorter side in pixels, or height and width; before the crop, antialiased.
        crop: Height and width of the crop from the centre; left out, all images must be of one size.
        interpolation: Of the resizing.

    References:
        ImageNet Large Scale Visual Recognition Challenge (Russakovsky et al., 2015), https://arxiv.org/abs/1409.0575
        Learning Robust Global Representations by Penalizing Local Predictive Power (Wang et al., NeurIPS 2019),
        https://arxiv.org/abs/1905.13549 (ImageNet-Sketch)
        ImageNet-trained CNNs are biased towards texture (Geirhos et al., ICLR 2019), https://arxiv.org/abs/1811.12231
        ImageNet-D (Zhang et al., CVPR 2024), https://arxiv.org/abs/2403.18775
    """

    kind: Literal["imagenet"] = "imagenet"
    root: DataLocation
    variant: Variant = "val"
    classes: tuple[str, ...] = ()
    nuisances: tuple[Nuisance, ...] = Field(NUISANCES, min_length=1)
    several: Literal["leave-out", "first"] | None = None
    preset: Annotated[Preset | None, Outside] = None
    resize: Resize | None = None
    crop: PositiveInt | None = None
    interpolation: Interpolation = "bilinear"
    threads: Annotated[int, Field(ge=1), Outside] = 4

    @model_validator(mode="before")
    @classmethod
    def _fields(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("variant") == "d":
            data = {"class_space": "full", **data}
        return _resolved(data)

    @model_validator(mode="after")
    def _known(self) -> "ImageNet":
        _check_classes(self.classes, self.variant)
        if self.variant == "d" and self.several is None:
            raise ValueError(
                "nine categories of ImageNet-D stand for several classes, each of which counts as right; write "
                "several: leave-out to leave their images out, or several: first to count the first class alone"
            )
        if self.variant != "d" and (self.several is not None or self.nuisances != NUISANCES):
            name = "several" if self.several else "nuisances"
            raise ValueError(f"{name} is about ImageNet-D, and the variant is {self.variant}; leave it out")
        if len(set(self.nuisances)) < len(self.nuisances):
            raise ValueError("nuisances names one twice; name each once")
        return self

    def covers(self) -> tuple[int, ...]:
        """The classes of the folders, where they are not all 1,000."""
        found = sorted(index for group in self._labels().values() for index in group)
        return () if len(found) == 1000 else tuple(found)

    def contents(self) -> str:
        """SHA-256 over the name and size of every file; the pixels of each image are digested in its record."""
        return self._listing().digest()

    def open(self) -> Images:
        """The images, read when they are needed."""
        geometry = Geometry("RGB", self.resize, self.crop, self.interpolation)
        return opened(self.name, self._listing(), geometry, self.threads)

    def _labels(self) -> Mapping[str, tuple[int, ...]]:
        """The folders to read, and the classes of each, in the order of the classes."""
        every = indices(self.variant)
        chosen = {name: every[name] for name in every if not self.classes or name in self.classes}
        return {name: group for name, group in chosen.items() if len(group) == 1 or self.several == "first"}

    def _listing(self) -> Listing:
        root = existing(self.root)
        paths: list[str] = []
        labels: list[int] = []
        for folder, label in self._folders(root).items():
            found = listed(root, folder)
            if not found:
                raise ValueError(f"{self.root}/{folder} holds no image; was the set unpacked to its end?")
            paths += map(intern, found)  # the same texts for each corruption of ImageNet-C
            labels += [label] * len(found)
        ids = [intern(path.rpartition(".")[0]) for path in paths]
        if len(set(ids)) < len(ids):
            twice = next(id for id, following in pairwise(sorted(ids)) if id == following)
            raise ValueError(f"{self.root} has two files {twice}.*, versions of one image; keep one of them")
        return Listing(root, paths, labels, ids)

    def _folders(self, root: Path) -> dict[str, int]:
        """The class folders, after a look at whether they are those of the variant, and their labels."""
        labels = {name: group[0] for name, group in self._labels().items()}
        there = class_folders(root, self.root)
        if self.variant == "d":
            return self._of_nuisances(root, there, labels)
        self._match(there, labels)
        return labels

    def _of_nuisances(self, root: Path, there: list[str], labels: Mapping[str, int]) -> dict[str, int]:
        found: dict[str, int] = {}
        for nuisance in self.nuisances:
            if nuisance not in there:
                raise ValueError(f"{self.root} has no folder {nuisance}; ImageNet-D has {', '.join(NUISANCES)}")
            names = class_folders(root / nuisance, f"{self.root}/{nuisance}")
            odd = [name for name in names if name not in CATEGORIES]
            if odd:
                raise ValueError(f"{self.root}/{nuisance} has a folder {odd[0]}, which is no category of ImageNet-D")
            found |= {f"{nuisance}/{name}": labels[name] for name in names if name in labels}
        categories = {folder.partition("/")[2] for folder in found}
        absent = [name for name in self.classes if name in labels and name not in categories]
        if absent or not found:
            raise ValueError(f"{self.root} has no folder of {absent[0] if absent else 'any category that counts'}")
        return found

    def _match(self, there: list[str], labels: Mapping[str, int]) -> None:
        """Refuses folders that are not of the variant, and a lack of some that are.

        Raises:
            ValueError: It says which, and which variant they would be of, if so.
        """
        known = indices(self.variant)
        odd = [name for name in there if name not in known]
        lacking = [name for name in labels if name not in there]
        if not (odd or lacking):
            return
        fitting = [other for other in VARIANTS if other != "d" and set(indices(other)) == set(there)]
        wrong = f"has a folder {odd[0]}{_more(odd)}" if odd else f"lacks the class folder {lacking[0]}{_more(lacking)}"
        if fitting and fitting[0] != self.variant:
            cure = f"its folders are those of {VARIANTS[fitting[0]]}, so write variant: {fitting[0]}"
        elif not there:
            cure = "the images must be sorted into such folders"
        elif not set(there) & set(known):
            cure = "root must be the folder in which the class folders lie"
        elif odd:
            cure = f"a class folder of {VARIANTS[self.variant]} is called {next(iter(known))} and the like"
        else:
            cure = "if it is meant to have these classes alone, name them under classes"
        raise ValueError(f"{self.root} is not {VARIANTS[self.variant]}: it {wrong}; {cure}")


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1:,} more" if len(names) > 1 else ""


def _check_classes(classes: tuple[str, ...], variant: Variant) -> None:
    known = indices(variant)
    for name in classes:
        if name not in known:
            raise ValueError(f"classes names {name!r}, no folder of {VARIANTS[variant]}{suggest(name, list(known))}")
    if len(set(classes)) < len(classes):
        raise ValueError("classes names one twice; name each once")


class ImageNetC(Grid):
    """ImageNet-C as published: one entry, a dataset for each `<root>/<corruption>/<severity>/<wnid>/*.JPEG`.

    An id is `<wnid>/<name of the file without suffix>`, the same for all versions of an image and in the validation
    set: with `origin` set to the name of the dataset of kind `imagenet`, intervals over both count an image once.

    Arguments:
        root: The folder of the corruptions.
        corruptions: Their names; the 15 of the benchmark where they are left out.
        severities: 1 to 5.
        classes: The wnids to read; left out, all 1,000 must be there.
        preset: A published preprocessing in place of the next three; see `PRESETS`.
        resize: The shorter side in pixels, or height and width; before the crop, antialiased.
        crop: Height and width of the crop from the centre; left out, all images must be of one size.
        interpolation: Of the resizing.

    References:
        Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks and Dietterich,
        ICLR 2019), https://arxiv.org/abs/1903.12261
    """

    kind: Literal["imagenet-c"] = "imagenet-c"
    name: str = "imagenet-c"
    root: DataLocation
    classes: tuple[str, ...] = ()
    preset: Annotated[Preset | None, Outside] = None
    resize: Resize | None = None
    crop: PositiveInt | None = None
    interpolation: Interpolation = "bilinear"
    threads: Annotated[int, Field(ge=1), Outside] = 4

    @model_validator(mode="before")
    @classmethod
    def _fields(cls, data: Any) -> Any:
        return _resolved(data)

    @model_validator(mode="after")
    def _known(self) -> "ImageNetC":
        _check_classes(self.classes, "val")
        return self

    def part(self, corruption: str, severity: int) -> ImageNet:
        """One dataset of kind `imagenet`."""
        fields = self.common(corruption, severity, self.name, self.origin or self.name)
        kept = ("classes", "preset", "resize", "crop", "interpolation", "threads")
        own = {field: getattr(self, field) for field in kept}
        return ImageNet.model_validate({**fields, **own, "root": f"{self.root}/{corruption}/{severity}"})

    def contents(self) -> str:
        """Those of its parts."""
        return ":".join(part.contents() for part in self.parts())
