"""All figures with a row for each checkpoint and a column for each metric, published rows marked as such."""

import pandas as pd

__all__ = ["wide"]

KEYS = ["bench", "metric", "group"]


def wide(metrics: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """A row for each checkpoint, then one for each published row; `source` says 'measured', or where it is from.

    A column is called as its metric, with `[group]` behind where the metric has several groups, and `bench:` in front
    where several benches would give one name.

    Arguments:
        metrics: The figures of the run, in long form.
        published: As `published.rows` gives them; only of metrics that the run has.
    """
    keys = metrics[KEYS].drop_duplicates()
    groups = keys.drop_duplicates(["metric", "group"])["metric"].value_counts()
    names = [f"{m}[{g}]" if groups[m] > 1 else str(m) for m, g in zip(keys["metric"], keys["group"], strict=True)]
    counts = pd.Series(names, dtype=object).value_counts()
    columns = {
        key: f"{key[0]}:{name}" if counts[name] > 1 else name
        for key, name in zip(keys.itertuples(index=False, name=None), names, strict=True)
    }
    measured = _table(metrics.assign(source="measured"), columns)
    others = published.assign(source=[f"published, {name}" for name in published["published"]])
    return pd.concat([measured, _table(others, columns)], ignore_index=True) if len(others) else measured


def _table(rows: pd.DataFrame, columns: dict[tuple[str, str, str], str]) -> pd.DataFrame:
    """Values by row and column, both in order of first appearance."""
    named = [columns[key] for key in rows[KEYS].itertuples(index=False, name=None)]
    lines = rows[["checkpoint", "source"]].drop_duplicates()
    table = rows.assign(column=named).pivot(index=["checkpoint", "source"], columns="column", values="value")
    table = table.reindex(index=pd.MultiIndex.from_frame(lines), columns=list(columns.values())).astype(float)
    return table.rename_axis(columns=None).reset_index()
