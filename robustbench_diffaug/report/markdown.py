"""A report in Markdown: CommonMark with GitHub's tables. Names are code or entities, so none is ever markup."""

import re
from collections.abc import Iterable

from robustbench_diffaug.report.printed import Block, Grid, Heading, Line, Name, Text, spelled

__all__ = ["document", "escaped"]

CODE = re.compile(r"[^`|\\\s]+( [^`|\\\s]+)*")
"""Names that can stand between backticks as they are: a table's cells end at pipes even there."""
MARKUP = re.compile(r"[\\`*_{}\[\]<>|~&$^!]|(?<=:)//|(?<=www)\.", re.IGNORECASE)
BEGINNING = re.compile(r"\d+(?=[.)])|[-+=#]")
"""What makes a line a list or a heading."""


def escaped(text: str, begins: bool = True) -> str:
    """A text as Markdown in which nothing is markup or a link.

    Arguments:
        text: Any.
        begins: Whether a line begins with it, which then is no list, heading or quotation either.
    """
    plain = MARKUP.sub(lambda found: "".join(map(_entity, found[0])), spelled(text))
    if not begins:
        return plain
    line = plain.lstrip(" ")
    return _entity(line[0]) + line[1:] if BEGINNING.match(line) else line


def _entity(character: str) -> str:
    return f"&#{ord(character)};"


def _inline(text: Text) -> str:
    """Prose with names."""
    return "".join(_name(part) if isinstance(part, Name) else escaped(part, not at) for at, part in enumerate(text))


def _name(name: str) -> str:
    text = spelled(name)
    return f"`{text}`" if CODE.fullmatch(text) else escaped(text)


def document(blocks: Iterable[Block]) -> bytes:
    """The bytes of a file.

    Arguments:
        blocks: What it says.
    """
    parts, listed = list[str](), False
    for block in blocks:
        item = isinstance(block, Line) and block.item
        if isinstance(block, Heading):
            text = f"{'#' * block.level} {_inline(block.text)}"
        elif isinstance(block, Line):
            text = f"{'- ' if item else ''}{_inline(block.text)}"
        else:
            text = _grid(block)
        parts += [text] if item and listed else ["", text] if parts else [text]
        listed = item
    return ("\n".join(parts) + "\n").encode("utf-8", "replace")


def _grid(grid: Grid) -> str:
    """A table, its title above and its notes below."""
    heads = [grid.corner, *(_inline(column) for column in grid.columns)]
    lines = [_row(heads), "|---|" + "--:|" * len(grid.columns)]
    for name, cells in grid.rows:
        lines.append(_row([_inline(name), *(_figure(*cell) for cell in cells)]))
    above = [f"**{_inline(grid.title)}**", ""] if grid.title else []
    below = [f"\n{_inline(note)}" for note in grid.notes]
    return "\n".join([*above, *lines, *below])


def _figure(value: str, interval: str) -> str:
    """A figure and what stands behind it: digits, brackets and signs of our own, of which a star alone is markup."""
    return f"{value} {interval}".strip().replace("*", r"\*").replace("|", r"\|")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
