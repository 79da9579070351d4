"""The files of a report beside the page and the plain tables: Markdown, LaTeX, JSON, the wide table, and layouts."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from robustbench_diffaug.report import json_report, latex, markdown, tables
from robustbench_diffaug.report.layouts import filled
from robustbench_diffaug.report.paper_tables import LAYOUTS
from robustbench_diffaug.report.printed import blocks
from robustbench_diffaug.report.published import rows
from robustbench_diffaug.report.wide import wide

__all__ = ["FILES", "NAMES", "written"]

FILES = {"md": "report.md", "latex": "report.tex", "json": "report.json"}
WIDE = "wide.csv"
ENDINGS = ("csv", "md", "tex")
NAMES = frozenset([WIDE, *FILES.values(), *(f"{name}.{ending}" for name in LAYOUTS for ending in ENDINGS)])
"""The name of every file that can be written."""


def written(
    metrics: pd.DataFrame,
    board: pd.DataFrame,
    manifest: Mapping[str, Any],
    formats: Sequence[str],
    layouts: Sequence[str] = (),
) -> dict[str, bytes]:
    """The bytes of each file; the same for the same figures.

    Arguments:
        metrics: All figures of the run, in long form.
        board: Its leaderboard.
        manifest: What is said of them.
        formats: Of those of a report; 'html' has none of these files.
        layouts: Names of `LAYOUTS`, each of which is written as Markdown, LaTeX and CSV.

    Raises:
        ValueError: If a layout is not known, or the run has measured nothing of it.
    """
    published = rows(metrics, manifest)
    made: dict[str, bytes] = {}
    if "csv" in formats:
        made[WIDE] = tables.to_csv(wide(metrics, published))
    if "json" in formats:
        made[FILES["json"]] = json_report.document(metrics, board, manifest, published)
    said = list(blocks(metrics, board, manifest, published)) if {"md", "latex"} & {*formats} else []
    if "md" in formats:
        made[FILES["md"]] = markdown.document(said)
    if "latex" in formats:
        made[FILES["latex"]] = latex.document(said)
    for name in layouts:
        found = filled(name, metrics, manifest, published)
        contents = tables.to_csv(found.frame), markdown.document(found.grids), latex.document(found.grids)
        made |= {f"{name}.{ending}": content for ending, content in zip(ENDINGS, contents, strict=True)}
    return made
