"""A report in JSON: every figure of metrics.csv, the leaderboard, and published figures."""

import json
from collections.abc import Mapping
from math import isfinite, isnan
from typing import Any

import numpy as np
import pandas as pd

from robustbench_diffaug.report import tables

__all__ = ["SCHEMA_VERSION", "document"]

SCHEMA_VERSION = 1
SAID = ("failures", "notices", "remarks")


def document(metrics: pd.DataFrame, board: pd.DataFrame, manifest: Mapping[str, Any], published: pd.DataFrame) -> bytes:
    """The bytes of a file; numbers are the texts of metrics.csv, NaN is null, infinities are 'inf' and '-inf'.

    Arguments:
        metrics: All figures of the run, in long form.
        board: Its leaderboard.
        manifest: What is said of them.
        published: As `published.rows` gives them.
    """
    found = {
        "schema_version": SCHEMA_VERSION,
        "suite": manifest.get("suite"),
        **{key: manifest.get(key, []) for key in SAID},
        "leaderboard": _leaderboard(metrics, board),
        "metrics": _rows(metrics),
        "published": _rows(published),
    }
    text = json.dumps(_plain(found), indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace") + b"\n"


def _rows(frame: pd.DataFrame) -> list[dict[str, object]]:
    columns = [str(column) for column in frame.columns]
    return [dict(zip(columns, row, strict=True)) for row in frame.astype(object).to_numpy().tolist()]


def _leaderboard(metrics: pd.DataFrame, board: pd.DataFrame) -> list[dict[str, object]]:
    """For each checkpoint its headlines by name: value, low, high, rank ('' for none)."""
    names = [name for name, _ in tables.headlines(metrics)]
    ends = {"value": "", "low": "_low", "high": "_high", "rank": "_rank"}
    return [
        {
            "checkpoint": row["checkpoint"],
            "headlines": {name: {key: row[name + end] for key, end in ends.items()} for name in names},
        }
        for row in board.to_dict("records")
    ]


def _plain(value: object) -> object:
    """A value with what JSON does not have replaced."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not isfinite(value):
        return None if isnan(value) else str(value)
    return value
