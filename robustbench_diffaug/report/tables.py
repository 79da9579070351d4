"""Tables made of metrics: the leaderboard, wide tables, and the bytes of CSV and Parquet files.

`metrics` is the long form throughout: one row per (bench, checkpoint, metric, group), with its value, its interval
`low` to `high` (NaN: none), `n` of `n_available` samples, `better` ("higher" or "lower"), `unit`, whether it is
`complete`, and whether it is a `headline`. Fractions stay fractions; only pages print percent.
"""

import io
import re
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robustbench_diffaug.pairs import places as tested_places

__all__ = ["Headline", "headlines", "leaderboard", "matching", "pairs_of", "rank_ranges", "to_csv", "to_parquet"]
__all__ += ["wide"]

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes a cell that begins so for a formula


class Headline(NamedTuple):
    """One measure of the leaderboard: its column's name, and the rows of metrics in it, one per checkpoint."""

    name: str
    rows: pd.DataFrame


def headlines(metrics: pd.DataFrame) -> list[Headline]:
    """The measures of the leaderboard, in order of first appearance.

    A name is the metric, with `[group]` where headlines have the metric for several groups, and `bench:` in front
    where two benches would give the same name.

    Raises:
        ValueError: A checkpoint has two values for one measure.
    """
    rows = metrics[metrics["headline"].astype(bool)]
    groups = rows.groupby("metric")["group"].nunique(dropna=False)
    keys = list(dict.fromkeys(zip(rows["bench"], rows["metric"], rows["group"], strict=True)))
    names = [f"{metric}[{group}]" if groups[metric] > 1 else str(metric) for _, metric, group in keys]
    found = []
    for (bench, metric, group), name in zip(keys, names, strict=True):
        chosen = rows[(rows["bench"] == bench) & (rows["metric"] == metric) & (rows["group"] == group)]
        full = f"{bench}:{name}" if names.count(name) > 1 else name
        twice = chosen["checkpoint"][chosen["checkpoint"].duplicated()]
        if len(twice):
            raise ValueError(f"{full} has several values for checkpoint {twice.iloc[0]!r}: merge the runs first")
        found.append(Headline(full, chosen))
    return found


def rank_ranges(low: NDArray[np.float64], high: NDArray[np.float64], better: str) -> list[tuple[int, int]]:
    """The best and the worst place of each checkpoint that its interval allows.

    With m checkpoints whose interval is strictly better, and k that are not strictly worse (itself among them), the
    places are m + 1 to k. An interval with a NaN end is never strictly better or worse than another: without an
    interval nothing tells two checkpoints apart.

    Arguments:
        low: Lower ends, of shape (c,).
        high: Upper ends, of shape (c,).
        better: "higher" or "lower".

    Raises:
        ValueError: `better` is another word.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"better is {better!r}, expected 'higher' or 'lower'")
    above = low[None, :] > high[:, None]  # [i, j]: all of j is above all of i
    beaten = above if better == "higher" else above.T
    return [(1 + int(m), int(k)) for m, k in zip(beaten.sum(axis=1), (~beaten).sum(axis=0), strict=True)]


def _ranks(rows: pd.DataFrame, pairs: pd.DataFrame | None) -> dict[str, str]:
    """Rank texts, "1" or "1-3", of the checkpoints that have a complete value: by tests if there are any of all pairs.

    Without those the intervals decide.
    """
    ranked = rows[rows["complete"].astype(bool) & rows["value"].notna()]
    if ranked.empty:
        return {}
    better, places = str(ranked["better"].iloc[0]), None
    if pairs is not None and len(pairs):
        measure = pd.Series(True, index=pairs.index)
        for column in ("bench", "metric", "group"):
            measure &= pairs[column] == ranked[column].iloc[0]
        places = tested_places(pairs[measure], [str(name) for name in ranked["checkpoint"]], better)
    if places is None:
        low, high = (ranked[end].to_numpy(dtype=np.float64) for end in ("low", "high"))
        places = rank_ranges(low, high, better)
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in places]
    return dict(zip(ranked["checkpoint"].astype(str), texts, strict=True))


def leaderboard(metrics: pd.DataFrame, pairs: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per checkpoint, and for each headline `<name>`, `<name>_low`, `<name>_high` and `<name>_rank`.

    Checkpoints keep their order of first appearance. A missing value is NaN, and it and an incomplete one have the
    empty rank. Places are those that the tests in `pairs` leave open, and of a measure that is not tested those that
    the intervals do.

    Arguments:
        metrics: The long form.
        pairs: The tests of checkpoints in pairs, with the columns `pairs.COLUMNS`.

    Raises:
        ValueError: Two columns would have one name, or a checkpoint has two values for one measure.
    """
    checkpoints = [str(checkpoint) for checkpoint in metrics["checkpoint"].unique()]
    columns: dict[str, list[object]] = {"checkpoint": list(checkpoints)}
    for name, rows in headlines(metrics):
        values = rows.set_index("checkpoint")[["value", "low", "high"]].astype(np.float64).reindex(checkpoints)
        ranks = _ranks(rows, pairs)
        made: dict[str, list[object]] = {
            name: values["value"].tolist(),
            f"{name}_low": values["low"].tolist(),
            f"{name}_high": values["high"].tolist(),
            f"{name}_rank": [ranks.get(checkpoint, "") for checkpoint in checkpoints],
        }
        if taken := made.keys() & columns.keys():
            raise ValueError(f"the leaderboard would have two columns {sorted(taken)[0]!r}: rename the metric {name!r}")
        columns |= made
    return pd.DataFrame(columns)


def matching(metrics: pd.DataFrame, pattern: str) -> pd.DataFrame:
    """The rows whose metric is matched in full by a regular expression, with a column for each of its named groups.

    A group that took no part in the match is the empty text.
    """
    compiled = re.compile(pattern)
    matches = [compiled.fullmatch(str(metric)) for metric in metrics["metric"]]
    found = metrics[np.array([match is not None for match in matches], dtype=bool)]
    named = {key: [match[key] or "" for match in matches if match] for key in compiled.groupindex}
    return found.assign(**named)


def wide(metrics: pd.DataFrame, pattern: str, rows: str, columns: str, of: str = "value") -> pd.DataFrame:
    """The metrics that `matching` finds as a table of one column against another, both in order of first appearance.

    Arguments:
        metrics: The long form, cut down to what is unique in (`rows`, `columns`).
        pattern: A regular expression of metrics; its named groups are columns.
        rows: The column whose values name the rows, such as "checkpoint".
        columns: The column whose values name the columns, such as a named group.
        of: The column that fills the table.

    Raises:
        ValueError: A cell of the table has two values.
    """
    found = matching(metrics, pattern)
    table = found.pivot(index=rows, columns=columns, values=of)
    return table.reindex(index=found[rows].unique(), columns=found[columns].unique())


def _field(cell: object) -> str:
    """A cell of CSV. The csv module leaves a lone carriage return unquoted, which would end the row for a reader."""
    if not isinstance(cell, str):
        return "" if pd.isna(cast(Any, cell)) else repr(float(cell)) if isinstance(cell, float) else str(cell)
    text = f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\r\n') else text


def to_csv(frame: pd.DataFrame) -> bytes:
    r"""UTF-8 CSV without the index: floats as the shortest text that reads back the same, lines end in "\n".

    NaN is an empty cell. Texts that begin as a formula does, in cells and in the header, get an apostrophe in front.
    """
    rows = [list(frame.columns), *frame.astype(object).to_numpy().tolist()]
    text = "".join(",".join(map(_field, row)) + "\n" for row in rows)
    return text.encode("utf-8", "replace")


def pairs_of(content: bytes) -> pd.DataFrame:
    """The tests of pairs that `to_csv` has written, as they were."""
    frame = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    texts = [name for name in frame.columns if name in ("bench", "metric", "group", "a", "b", "test")]
    escaped = tuple(f"'{start}" for start in FORMULA_STARTS)
    for name in frame.columns:
        if name in texts:
            frame[name] = [cell.removeprefix("'") if cell.startswith(escaped) else cell for cell in frame[name]]
        else:
            frame[name] = frame[name].replace("", "nan").astype(int if name == "n" else float)
    return frame


def to_parquet(frame: pd.DataFrame) -> bytes:
    """The bytes of a Parquet file without the index, the same for the same frame and version of pyarrow."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, engine="pyarrow", index=False, compression="zstd")
    return buffer.getvalue()
