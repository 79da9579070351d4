r"""A report in LaTeX with booktabs' rules, for `\input`. Names are escaped; what no usual font has is spelled out."""

import re
from collections.abc import Iterable, Iterator, Sequence

from robustbench_diffaug.report.printed import Block, Grid, Heading, Line, Name, Text, spelled

__all__ = ["document", "escaped"]

COMMANDS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\char34{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
    "–": "--", "−": "$-$", "∞": r"$\infty$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
}  # fmt: skip
PLAIN = re.compile(r"[A-Za-z0-9 .:;!?()\[\]*+/=@,-]|[\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff]")
WIDTH, LINES = 345, 50  # points and lines of a table that fits a page of the class article
CODE, PROSE, SMALL, GAP = 4.3, 3.8, 2.7, 6  # points of a character in \footnotesize, in \tiny, and between columns
PREAMBLE = r"% \usepackage{booktabs} is needed. Intervals stand below the figures." + "\n"


def escaped(text: str) -> str:
    """A text in which nothing is a command, and no two characters become one sign.

    Characters that no usual font has are spelled, as U+1F600.
    """
    apart = re.sub("(?<=-)-|(?<=,),", "\0\\g<0>", spelled(text))  # a dash and a low quotation mark are not meant
    return "".join("{}" if c == "\0" else COMMANDS.get(c) or (c if PLAIN.fullmatch(c) else _code(c)) for c in apart)


def _code(character: str) -> str:
    return f"U+{ord(character):04X}"


def _inline(text: Text) -> str:
    return "".join(rf"\texttt{{{escaped(part)}}}" if isinstance(part, Name) else escaped(part) for part in text)


def document(blocks: Iterable[Block]) -> bytes:
    """The bytes of a file.

    Arguments:
        blocks: What it says.
    """
    parts, listed = list[str](), False
    for block in blocks:
        item = isinstance(block, Line) and block.item
        if item != listed:
            parts.append(r"\begin{itemize}" if item else r"\end{itemize}")
        listed = item
        parts.append(_block(block))
    parts += [r"\end{itemize}"] if listed else []
    return (PREAMBLE + "\n".join(parts) + "\n").encode()


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return rf"\{'sub' * (block.level - 1)}section*{{{_inline(block.text)}}}"
    if isinstance(block, Line):  # braces, since a text in brackets would be the item's sign
        return rf"\item{{}} {_inline(block.text)}" if block.item else f"{_inline(block.text)}\n"
    return "\n".join(_tables(block))


def _tables(grid: Grid) -> Iterator[str]:
    """Tables of a part of the columns and rows each; they float where the table has a label."""
    most = LINES // (2 if any(below for _, cells in grid.rows for _, below in cells) else 1)
    rows = [grid.rows[first : first + most] for first in range(0, len(grid.rows), most)] or [()]
    parts = [(chosen, part) for part in rows for chosen in _fitting(grid)]
    notes = "\n\n\\smallskip\n{\\scriptsize " + " ".join(map(_inline, grid.notes)) + "\\par}" if grid.notes else ""
    for number, (chosen, part) in enumerate(parts, 1):
        title = _inline(grid.title) + (f" ({number} of {len(parts)})" if len(parts) > 1 else "")
        inner = _tabular(grid, chosen, part) + (notes if number == len(parts) else "")
        if grid.label:
            label = rf"\label{{tab:{grid.label}{f'-{number}' if number > 1 else ''}}}"
            yield f"\\begin{{table}}[htbp]\n\\centering\n\\caption{{{title.strip()}}}\n{label}\n{inner}\n\\end{{table}}"
        else:
            yield f"\\par\\medskip\\noindent{title}\\par\\noindent\n{inner}\\par"


def _fitting(grid: Grid) -> list[list[int]]:
    """The columns of each table that is as wide as a page, if its names and one column are not wider."""
    first = max((_width(name) for name, _ in grid.rows), default=0.0)
    parts, room = [list[int]()], WIDTH - first
    for index, column in enumerate(grid.columns):
        cells = [cells[index] for _, cells in grid.rows]
        needed = max([_width(column), *(max(PROSE * len(a), SMALL * len(b)) for a, b in cells)]) + GAP
        if needed > room and parts[-1]:
            parts.append([])
            room = WIDTH - first
        parts[-1].append(index)
        room -= needed
    return parts


def _width(text: Text) -> float:
    return sum(len(part) * (CODE if isinstance(part, Name) else PROSE) for part in text)


def _tabular(grid: Grid, chosen: Sequence[int], rows: Sequence[tuple[Text, Sequence[tuple[str, str]]]]) -> str:
    """Rules, headings and rows; below each row one of the intervals, if it has any."""
    lines = [
        r"{\footnotesize\setlength{\tabcolsep}{3pt}%",
        rf"\begin{{tabular}}{{l{'r' * len(chosen)}}}",
        r"\toprule",
        " & ".join([escaped(grid.corner), *(_inline(grid.columns[index]) for index in chosen)]) + r" \\",
        r"\midrule",
    ]
    for name, cells in rows:
        lines.append(" & ".join([_inline(name), *(escaped(cells[index][0]) for index in chosen)]) + r" \\")
        below = [escaped(cells[index][1]) for index in chosen]
        if any(below):
            lines.append(" & ".join(["", *(rf"{{\tiny {text}}}" if text else "" for text in below)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}"])
