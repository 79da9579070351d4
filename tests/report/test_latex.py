"""LaTeX against pylatexenc's parser, and against TeX itself where there is one."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pylatexenc.latex2text import LatexNodes2Text, MacroTextSpec, get_default_latex_context_db
from pylatexenc.latexwalker import (
    LatexEnvironmentNode,
    LatexGroupNode,
    LatexMacroNode,
    LatexMathNode,
    LatexNode,
    LatexWalker,
)

from robustbench_diffaug.report import latex, tables
from robustbench_diffaug.report.layouts import filled
from robustbench_diffaug.report.printed import Grid, Heading, Line, Name, blocks, spelled
from robustbench_diffaug.report.published import rows as published_rows

HOSTILE = (
    r"\input{/etc/passwd}", r"\end{tabular}", "a & b", r"a \\ b", "50 %", "$x$", "#1", "x_1^2", "{", "}", "~", '"', "'",
    "`", "``quoted''", "?`", "<<a>>", "a--b---c", "a,,b", "|", "[x]", "*", "é ü ß", "😀", "\u05d0", "\u202ex", "a\nb",
    "\\", "^^41", "\ud800", "", "–", "ﬁ",
)  # fmt: skip
ALLOWED = {
    "par", "medskip", "smallskip", "noindent", "section", "subsection", "texttt", "item", "footnotesize", "scriptsize",
    "tiny", "setlength", "tabcolsep", "toprule", "midrule", "bottomrule", "\\", "centering", "caption", "label",
    "textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater", "textbar", "textasciigrave",
    "textquotesingle", "char", "{", "}", "&", "%", "$", "#", "_", "infty", "uparrow", "downarrow",
}  # fmt: skip
CONTEXT = get_default_latex_context_db()
CONTEXT.add_context_category(
    "more",
    macros=[
        MacroTextSpec("texttt", "%s"),
        MacroTextSpec("textquotesingle", "'"),
        MacroTextSpec("textasciigrave", "`"),
        MacroTextSpec("textbar", "|"),
        MacroTextSpec("textless", "<"),
        MacroTextSpec("textgreater", ">"),
        MacroTextSpec("textasciicircum", "^"),
        MacroTextSpec("char", ""),
    ],
    prepend=True,
)


def nodes(data: bytes) -> list[LatexNode]:
    """The document, parsed strictly."""
    return list(LatexWalker(data.decode(), tolerant_parsing=False).get_latex_nodes()[0])


def flat(found: list[LatexNode | None]) -> Iterator[LatexNode]:
    for node in found:
        if node is None:
            continue
        yield node
        if isinstance(node, LatexEnvironmentNode | LatexGroupNode | LatexMathNode):
            yield from flat(node.nodelist)
        if isinstance(node, LatexEnvironmentNode | LatexMacroNode) and node.nodeargd and node.nodeargd.argnlist:
            yield from flat(node.nodeargd.argnlist)


def text_of(code: str) -> str:
    """What code is printed as."""
    found = LatexNodes2Text(latex_context=CONTEXT, strict_latex_spaces=True).latex_to_text(code)
    return str(found.replace("34", '"') if r"\char34" in code else found)


def shown(name: str) -> str:
    """A name as it should be printed: what no usual font has is spelled out."""
    return "".join(
        c if c.isascii() or ("\u00c0" <= c <= "\u00ff" and c.isalpha()) else f"U+{ord(c):04X}" for c in spelled(name)
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_printed_and_does_nothing(name: str) -> None:
    code = latex.escaped(name)
    if name not in ("–",):
        assert text_of(code) == shown(name)
    grid = Grid((name,), "network", [(Name(name),)], [((Name(name),), [("1.0", "[0.9, 1.1]")])], [(name,)], "x")
    found = list(flat(nodes(latex.document([Heading(1, (name,)), Line((name,), True), Line((Name(name),)), grid]))))
    assert {node.macroname for node in found if isinstance(node, LatexMacroNode)} <= ALLOWED
    environments = [node.environmentname for node in found if isinstance(node, LatexEnvironmentNode)]
    assert environments == ["itemize", "table", "tabular"]
    assert not any(isinstance(node, LatexMathNode) for node in found)


@given(st.text(max_size=40))
def test_any_text_is_printed_as_it_is(text: str) -> None:
    code = latex.escaped(text)
    assert code.isprintable() and all(c.isascii() or "\u00c0" <= c <= "\u00ff" for c in code)
    if not set(text) & set('"–−∞↑↓'):
        assert text_of(code) == shown(text)


def rows_of(found: list[LatexNode], code: str) -> list[list[str]]:
    """The cells of each row of the tables, by the ampersands that are not escaped."""
    made = []
    for table in found:
        if isinstance(table, LatexEnvironmentNode) and table.environmentname == "tabular":
            inner = "".join(node.latex_verbatim() for node in table.nodelist)
            for line in inner.split("\\\\\n"):
                body = line.replace("\\toprule", "").replace("\\midrule", "").replace("\\bottomrule", "").strip()
                if body:
                    made.append([cell.strip() for cell in body.replace(r"\&", "\0").split("&")])
    return made


def test_every_row_has_a_cell_for_each_column(metrics: pd.DataFrame, manifest: dict[str, Any]) -> None:
    said = blocks(metrics, tables.leaderboard(metrics), manifest, published_rows(metrics, manifest))
    code = latex.document(said).decode()
    found = list(flat(nodes(code.encode())))
    tabulars = [n for n in found if isinstance(n, LatexEnvironmentNode) and n.environmentname == "tabular"]
    assert len(tabulars) >= 3
    for table in tabulars:
        heads, *rows = rows_of([table], code)
        assert {len(row) for row in rows} == {len(heads)}
        specification = table.nodeargd.argnlist[-1].latex_verbatim()
        assert specification == "{l" + "r" * (len(heads) - 1) + "}"
    for rule in ("toprule", "midrule", "bottomrule"):
        assert code.count("\\" + rule) == len(tabulars)


def test_the_figures_are_those_of_the_metrics(metrics: pd.DataFrame, manifest: dict[str, Any]) -> None:
    grid = filled("diffaug-table1", metrics, manifest, published_rows(metrics, manifest)).grids[0]
    code = latex.document([grid]).decode()
    rows = rows_of(list(flat(nodes(code.encode()))), code)
    at = {(row["checkpoint"], row["metric"]): row for row in metrics.to_dict("records")}
    heads = {text_of(cell): index for index, cell in enumerate(rows[0])}
    for index, row in enumerate(rows):
        if text_of(row[0]) == "vit-standard" and "C: Default (%)" in heads:
            value = at["vit-standard", "accuracy/mean"]
            place = heads["C: Default (%)"]
            assert row[place] == f"{100 * value['value']:.1f}"
            assert f"[{100 * value['low']:.1f}, {100 * value['high']:.1f}]" in rows[index + 1][place]
            break
    else:
        pytest.fail("the network has no row")


def test_wide_and_long_tables_are_parted() -> None:
    columns = [(Name(f"a-rather-long-name-{number}"),) for number in range(9)]
    rows = [((Name(f"metric {number}"),), [(f"{number}.{index}", "") for index in range(9)]) for number in range(90)]
    code = latex.document([Grid((), "metric", columns, rows)]).decode()
    found = [n for n in flat(nodes(code.encode())) if isinstance(n, LatexEnvironmentNode)]
    parts = [rows_of([table], code) for table in found]
    assert {len(part) for part in parts} == {51, 41}
    cells = [cell for part in parts for row in part[1:] for cell in row[1:]]
    assert sorted(cells) == sorted(f"{number}.{index}" for number in range(90) for index in range(9))


def test_tex_accepts_it(tmp_path: Path, metrics: pd.DataFrame, manifest: dict[str, Any]) -> None:
    """The parser everywhere; TeX itself, without the right to run or read anything, where it is installed."""
    renamed = metrics.copy()
    names = dict(
        zip(
            renamed["checkpoint"].unique(), [r"\input{x} & 50 %", "é😀 --,, [x]", "\u202e{#", "_^~|<>'\"`"], strict=True
        )
    )
    renamed["checkpoint"] = renamed["checkpoint"].map(names)
    said = blocks(renamed, tables.leaderboard(renamed), manifest, published_rows(renamed, manifest))
    layout = filled("diffaug-table1", renamed, manifest, published_rows(renamed, manifest)).grids
    (tmp_path / "report.tex").write_bytes(latex.document([*said, *layout]))
    assert nodes((tmp_path / "report.tex").read_bytes())
    if tex := shutil.which("pdflatex"):
        (tmp_path / "main.tex").write_text(
            "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\input{report}\\end{document}\n"
        )
        command = [tex, "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "main.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
        assert done.returncode == 0, done.stdout[-1500:]
        assert (tmp_path / "main.pdf").exists()
