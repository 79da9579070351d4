"""Markdown against markdown-it, a parser of CommonMark with GitHub's tables: names stay names, tables stay tables."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from robustbench_diffaug.report import markdown, tables
from robustbench_diffaug.report.cells import Cell
from robustbench_diffaug.report.printed import Grid, Heading, Line, Name, blocks, spelled
from robustbench_diffaug.report.published import rows as published_rows

HOSTILE = (
    "<script>alert(1)</script>", "a|b", r"a\|b", "`code`", "``", "[x](javascript:alert(1))", "![x](http://a.b/c.png)",
    "http://example.com/x", "www.example.com", "*bold* _it_ ~~no~~", "=cmd()", "# no heading", "- item", "1. one",
    "&lt;b&gt;", "a\nb",
    "a\u202eb", "\u05d0\u05d1", "😀", "👩\u200d💻", "$x^2$", "<!--", "\\", "a\\", "", " ", "\ud800",
)  # fmt: skip
PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
TEXTS = {"text", "code_inline", "softbreak", "text_special"}


def flat(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from flat(token.children or [])


def said(token: Token) -> str:
    """What a reader sees of an inline token, which must hold nothing but texts and code."""
    assert {part.type for part in token.children or []} <= TEXTS, token.content
    return "".join(part.content for part in token.children or [])


def parsed(data: bytes) -> list[list[list[str]]]:
    """The tables of a document, as rows of the texts of cells."""
    found: list[list[list[str]]] = []
    tokens = PARSER.parse(data.decode())
    for at, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append(said(tokens[at + 1]))
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown_and_does_nothing(name: str) -> None:
    grid = Grid((), "network", [(Name(name),)], [((Name(name),), [("1.0", "[0.9, 1.1]")])], [(name,)])
    data = markdown.document([Heading(1, (name,)), Line((name,), True), Line((name, Name(name))), grid])
    (table,) = parsed(data)
    shown = spelled(name).strip()
    assert table == [["network", shown], [shown, "1.0 [0.9, 1.1]"]]
    inlines = [token for token in PARSER.parse(data.decode()) if token.type == "inline"]
    assert [said(token).strip() for token in (inlines[0], inlines[-1]) if name.strip()] == [shown] * 2 * bool(
        name.strip()
    )
    kinds = {token.type for token in flat(PARSER.parse(data.decode()))}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "em_open", "strong_open", "s_open", "fence",
                        "ordered_list_open", "blockquote_open", "code_block", "hr"}  # fmt: skip
    assert sum(token.type == "heading_open" for token in PARSER.parse(data.decode())) == 1


@given(st.text(max_size=30))
def test_any_name_makes_one_cell(name: str) -> None:
    grid = Grid((), "network", [("x",)], [((Name(name),), [("1", "")]), ((Name("other"),), [("2", "")])])
    assert parsed(markdown.document([grid])) == [
        [["network", "x"], [" ".join(spelled(name).split(" ")).strip(" "), "1"], ["other", "2"]]
    ]


def test_metric_names_are_no_mail_addresses() -> None:
    """GitHub takes certified@0.50 for one, unless it is code."""
    data = markdown.document([Line(("of ", Name("certified@0.50")))])
    assert data == b"of `certified@0.50`\n"


def test_the_figures_are_those_of_the_metrics(metrics: pd.DataFrame, manifest: dict[str, Any]) -> None:
    board = tables.leaderboard(metrics)
    found = parsed(markdown.document(blocks(metrics, board, manifest, published_rows(metrics, manifest))))
    assert len(found) == 3  # the leaderboard and two benches
    leaders, shift, _ = found
    assert [row[0] for row in leaders[1:]] == list(board["checkpoint"])
    for record in metrics[metrics["headline"]].to_dict("records"):
        cell = Cell.of({str(k): v for k, v in record.items()})
        row = next(row for row in leaders if row[0] == record["checkpoint"])
        same = [text for head, text in zip(leaders[0], row, strict=True) if head.startswith(record["metric"])]
        assert any(text.startswith(cell.text + " ") for text in same), record["metric"]
    rows = {row[0]: row for row in shift[1:]}
    at = {(row["checkpoint"], row["metric"]): row for row in metrics.to_dict("records")}
    value = {key: 100 * at["vit-standard", "accuracy/fog@s5"][key] for key in ("value", "low", "high")}
    shown = dict(zip(shift[0], rows["accuracy/fog@s5 (%)"], strict=True))["vit-standard"]
    assert shown == "{value:.1f} [{low:.1f}, {high:.1f}]".format_map(value)
    assert not any("@t" in row for row in rows)
    assert {"ece clean (%)", "ece corruptions (%)"} <= rows.keys()


def test_ranks_and_partial_figures_are_marked(metrics: pd.DataFrame, manifest: dict[str, Any]) -> None:
    changed = metrics.copy()
    chosen = (changed["metric"] == "accuracy/clean") & (changed["checkpoint"] == "vit-standard")
    changed.loc[chosen, "complete"] = False
    board = tables.leaderboard(changed)
    text = markdown.document(blocks(changed, board, manifest, published_rows(changed, manifest))).decode()
    leaders = parsed(text.encode())[0]
    column = next(index for index, head in enumerate(leaders[0]) if head.startswith("accuracy/clean"))
    cells = {row[0]: row[column] for row in leaders[1:]}
    assert cells["vit-standard"].startswith("89.4* [") and "#" not in cells["vit-standard"]
    assert cells["resnet-standard"].endswith("#" + str(board["accuracy/clean_rank"][0]))
    assert "from a part of the declared samples, and not ranked" in text


def test_a_run_without_metrics_says_so(metrics: pd.DataFrame) -> None:
    empty = metrics.iloc[:0]
    failed = {"failures": [{"bench": "b", "checkpoint": "c", "dataset": "all", "reason": "it | broke"}]}
    text = markdown.document(blocks(empty, tables.leaderboard(empty), failed, published_rows(empty, {}))).decode()
    assert "- failed: `b` / `c` / `all`: it &#124; broke\n" in text and "no metrics yet" in text
