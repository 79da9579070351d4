"""Pictures of a report: as files that are shared alone, and as the part of the page that shows them.

In a file labels are drawn; in the page they are text beside strips of tiles, which a narrow window does not shrink. The
same picture gives the same bytes.
"""

import base64
import io
from collections.abc import Sequence
from functools import cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

import numpy as np
from jaxtyping import UInt8

from robustbench_diffaug.records import Picture
from robustbench_diffaug.shown import Shown

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

__all__ = ["Embedded", "Strip", "embedded", "file"]

LEAST = 56  # pixels of a tile's shorter side in a file
GAP = 3  # pixels between tiles of a file
MARGIN = 10  # pixels around a file
SIZE = 20  # pixels of a file's labels, to be read where it is shown at half its width
BUDGET = 3_000_000  # characters of a page that are pictures; the others are files alone
INK, PAPER = 27, 255


class Strip(NamedTuple):
    """A row of tiles in a page: its label, its picture as a data URI, and what a screen reader says of it."""

    label: str
    source: str
    alt: str


class Embedded(NamedTuple):
    """A picture in a page.

    Arguments:
        title: What it shows.
        caption: How to read it.
        of: The bench and the checkpoint.
        file: The name of its file in the run folder.
        link: The same as a relative address.
        across: The labels of the columns.
        columns: How many there are.
        strips: The rows; one for a drawing; none where the page would become too large.
        drawing: Whether it is a drawing.
    """

    title: str
    caption: str
    of: str
    file: str
    link: str
    across: tuple[str, ...]
    columns: int
    strips: tuple[Strip, ...]
    drawing: bool


def file(picture: Picture) -> bytes:
    """The file of a picture: a PNG of its tiles with their labels, or its drawing."""
    return _bytes(_sheet(picture, picture.tiles)) if picture.tiles is not None else picture.svg.encode()


def embedded(shown: Sequence[Shown], budget: int = BUDGET) -> list[Embedded]:
    """What a page shows of some pictures, in their order; those that it has no room for are named.

    Arguments:
        shown: The pictures.
        budget: The most characters that they may take together.
    """
    made = []
    for entry in shown:
        strips = _drawing(entry.picture) if entry.picture.tiles is None else _strips(entry.picture, entry.picture.tiles)
        size = sum(len(strip.source) for strip in strips)
        kept = strips if size <= budget else ()
        budget -= size if kept else 0
        picture = entry.picture
        columns = 1 if picture.tiles is None else picture.tiles.shape[1]
        about = (picture.title, picture.caption, f"{entry.bench} · {entry.checkpoint}", entry.path, quote(entry.path))
        made.append(Embedded(*about, picture.across, columns, kept, picture.tiles is None))
    return made


def _drawing(picture: Picture) -> tuple[Strip, ...]:
    return (Strip("", _uri("svg+xml", picture.svg.encode()), f"{picture.title}. {picture.caption}"),)


def _strips(picture: Picture, tiles: UInt8[np.ndarray, "r k h w c"]) -> tuple[Strip, ...]:
    """The rows of a grid, the tiles at their own size with clear pixels between them."""
    height, width, channels = tiles.shape[2:]
    gap = max(1, width // 16)  # in proportion, since a page scales strips as a whole
    made = []
    for row, cells in enumerate(tiles):
        strip = np.zeros((height, tiles.shape[1] * (width + gap) - gap, channels + 1), np.uint8)
        for column, cell in enumerate(cells):
            strip[:, column * (width + gap) :][:, :width] = np.dstack([cell, np.full((height, width), 255, np.uint8)])
        label = picture.down[row] if picture.down else ""
        said = ", ".join(part for part in (label, f"left to right: {', '.join(picture.across)}") if part)
        made.append(Strip(label, _uri("png", _bytes(_image(strip))), f"{picture.title}: {said}"))
    return tuple(made)


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _image(pixels: UInt8[np.ndarray, "h w c"]) -> "Image":
    """Pixels with 1 to 4 channels as an image of the mode that has as many."""
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def _bytes(image: "Image") -> bytes:
    """A PNG without a date or any other text."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


@cache
def _font() -> "FreeTypeFont":
    """DejaVu Sans, which comes with matplotlib, so that labels look the same everywhere."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    # The basic layout: the other one is a library that may be there or not, and sets texts differently.
    path = Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    return ImageFont.truetype(str(path), SIZE, layout_engine=ImageFont.Layout.BASIC)


class _Layout(NamedTuple):
    """Where things are in a file, in pixels."""

    scale: int
    left: int
    top: int
    across: int
    down: int


def _sheet(picture: Picture, tiles: UInt8[np.ndarray, "r k h w c"]) -> "Image":
    """All tiles, enlarged by a whole number, with their labels at the left and above."""
    from PIL import Image, ImageDraw

    rows, columns, height, width, channels = tiles.shape
    scale = max(1, ceil(LEAST / min(height, width)))
    heads = [_wrapped(text, width * scale) for text in picture.across]
    widths = [*(_size(text)[0] for text in heads), width * scale]
    left = MARGIN + max((_size(text)[0] + MARGIN for text in picture.down), default=0)
    top = MARGIN + max((_size(text)[1] + GAP for text in heads), default=0)
    down = max([height * scale, *(_size(text)[1] for text in picture.down)]) + GAP
    place = _Layout(scale, left, top, max(widths) + GAP, down)
    size = (left + columns * place.across - GAP + MARGIN, top + rows * down - GAP + MARGIN)
    image = Image.new("L" if channels == 1 else "RGB", size, PAPER if channels == 1 else (PAPER,) * 3)
    pen, ink = ImageDraw.Draw(image), INK if channels == 1 else (INK,) * 3
    inner = (place.across - GAP - width * scale) // 2
    for column, text in enumerate(heads):
        at = (left + column * place.across + (place.across - GAP) / 2, top - GAP)
        pen.multiline_text(at, text, ink, _font(), anchor="md", align="center")
    for row, cells in enumerate(tiles):
        if picture.down:
            at = (left - MARGIN, top + row * down + (down - GAP) / 2)
            pen.multiline_text(at, picture.down[row], ink, _font(), anchor="rm", align="right")
        for column, cell in enumerate(cells):
            tile = _image(cell.repeat(scale, axis=0).repeat(scale, axis=1))
            image.paste(tile, (left + column * place.across + inner, top + row * down))
    return image


def _size(text: str) -> tuple[int, int]:
    """Width and height of a text of one or more lines."""
    lines = text.split("\n")
    return ceil(max(_font().getlength(line) for line in lines)), len(lines) * (SIZE + 4)


def _wrapped(text: str, width: int) -> str:
    """A text in lines that are no wider than they may be, where it has spaces to be broken at."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and _font().getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return "\n".join(lines)
