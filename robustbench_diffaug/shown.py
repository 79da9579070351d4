"""The pictures that evaluators make of records, found to be what can be drawn, each with its place in a run folder."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from robustbench_diffaug.folder import PICTURES
from robustbench_diffaug.records import Picture
from robustbench_diffaug.store import quoted

__all__ = ["Shown", "shown"]

FORBIDDEN = ("script", "foreignobject", "iframe", "object", "embed", "set", "animate")
"""Elements of SVG that act, or hold what is no drawing; nothing here moves."""


class Shown(NamedTuple):
    """A picture of a checkpoint's records under a bench."""

    bench: str
    checkpoint: str
    picture: Picture

    @property
    def path(self) -> str:
        """Its file below the run folder; names are quoted, so that none leads elsewhere."""
        ending = "svg" if self.picture.tiles is None else "png"
        names = "/".join(map(quoted, (self.bench, self.checkpoint, self.picture.name)))
        return f"{PICTURES}/{names}.{ending}"


def shown(bench: str, checkpoint: str, pictures: Iterable[Picture]) -> Iterator[Shown]:
    """An evaluator's pictures of one checkpoint.

    Raises:
        TypeError: If one is no `Picture`.
        ValueError: If one cannot be drawn, has no name for a file, or that of another.
    """
    names = set()
    for picture in pictures:
        if not isinstance(picture, Picture):
            raise TypeError(f"a picture is a {type(picture).__name__}, which is no Picture")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", picture.name):
            raise ValueError(f"a picture is called {picture.name!r}; needed are letters, digits, hyphens and dots")
        if picture.name in names:
            raise ValueError(f"two pictures are called {picture.name}")
        if (picture.tiles is None) == (not picture.svg):
            raise ValueError(f"picture {picture.name} needs tiles or a drawing, one of them")
        if picture.tiles is None:
            _harmless(picture)
        else:
            _tiled(picture, picture.tiles)
        names.add(picture.name)
        yield Shown(bench, checkpoint, picture)


def _tiled(picture: Picture, tiles: np.ndarray) -> None:
    """Tiles are a grid of pictures of 8 bits, with a label for every row and column, or for none."""
    if tiles.dtype != np.uint8 or tiles.ndim != 5 or not tiles.size or tiles.shape[-1] not in (1, 3):
        found = f"{tiles.dtype} of shape {tiles.shape}"
        raise ValueError(f"picture {picture.name} has tiles {found}; needed is uint8 (rows, columns, h, w, 1 or 3)")
    for labels, count, what in ((picture.down, tiles.shape[0], "rows"), (picture.across, tiles.shape[1], "columns")):
        if labels and len(labels) != count:
            raise ValueError(f"picture {picture.name} has {len(labels)} labels for {count} {what}")


def _harmless(picture: Picture) -> None:
    """A drawing is well-formed, runs nothing and asks for no other file."""
    if "<!entity" in picture.svg.lower():  # of which a few lines can stand for gigabytes
        raise ValueError(f"the drawing of picture {picture.name} declares entities, which drawings may not have")
    try:
        root = ElementTree.fromstring(picture.svg)  # noqa: S314  (without entities it is as large as its text)
    except ElementTree.ParseError as error:
        raise ValueError(f"the drawing of picture {picture.name} is damaged: {error}") from error
    if root.tag.rpartition("}")[2] != "svg":
        raise ValueError(f"the drawing of picture {picture.name} is no SVG document")
    for element in root.iter():
        tag = str(element.tag).rpartition("}")[2].lower()
        if tag.startswith(FORBIDDEN):
            raise ValueError(f"the drawing of picture {picture.name} has an element {tag}, which drawings may not have")
        texts = [*element.attrib.items(), *([("style", element.text or "")] if tag == "style" else [])]
        for key, value in texts:
            name = key.rpartition("}")[2].lower()
            elsewhere = name in ("href", "src") and not value.startswith(("#", "data:image/png;"))
            if name.startswith("on") or elsewhere or re.search(r"url\((?!['\"]?#)|@import", value):
                what = f"{name}={value!r:.60}"
                raise ValueError(f"the drawing of picture {picture.name} has {what}, which acts or leads elsewhere")
