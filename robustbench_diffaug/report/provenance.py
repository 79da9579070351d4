"""Who ran what, with which versions, on which device, from which files: manifest and costs, as a page has them."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from robustbench_diffaug.report.cells import Table, flat, plain, table_of

__all__ = ["costs_table", "facts", "suite", "tables_of"]

LISTS = (  # what the manifest lists, and the key that names each entry
    ("checkpoints", "id"),
    ("denoisers", "kind"),
    ("datasets", "name"),
)
ELSEWHERE = {"benches", "notices", "remarks", "failures", "keys"}
FIRST = ("suite", "started", "finished", "seconds", "rdiff", "versions", "device", "hardware", "platform", "threads")


def suite(metrics: pd.DataFrame, manifest: Mapping[str, Any]) -> dict[str, str]:
    """The name of what was run, its digest, and when it was."""
    found = manifest.get("suite")
    known = found if isinstance(found, Mapping) else {}
    name = plain(known["name"]) if "name" in known else ", ".join(str(name) for name in metrics["suite"].unique())
    when = plain(manifest.get("finished") or manifest.get("started") or "")
    return {"name": name or "no suite", "digest": plain(known.get("digest") or ""), "when": when}


def facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The scalars of the manifest: suite and seed, times, seconds, versions, device, and whatever else a run wrote."""
    shown = {key for key, _ in LISTS} | ELSEWHERE
    keys = [key for key in FIRST if key in manifest] + [key for key in manifest if key not in FIRST]
    rest = {str(key): list(flat(manifest[key])) for key in keys if key not in shown}
    return [(key, " · ".join(f"{name} {text}".strip() for name, text in leaves)) for key, leaves in rest.items()]


def tables_of(manifest: Mapping[str, Any]) -> list[Table]:
    """The lists of the manifest: weights, denoisers and datasets, with digests and how many samples of how many."""
    found = (table_of(manifest.get(key), key, name) for key, name in LISTS)
    return [table for table in found if table is not None]


def costs_table(costs: pd.DataFrame) -> Table | None:
    """Time and memory of each cell, as recorded."""
    entries = [
        {"": " · ".join(str(row[key]) for key in ("bench", "checkpoint", "dataset") if key in row)}
        | {str(key): _figure(value) for key, value in row.items() if key not in ("bench", "checkpoint", "dataset")}
        for row in costs.to_dict("records")
    ]
    return table_of(
        entries,
        "Cost of each cell: seconds of wall time (its share of denoising, its own classifying, for an image), samples "
        "a second, and peak memory in MB",
        "",
    )


def _figure(value: object) -> str:
    """A cost, to four digits; whole numbers in full."""
    if isinstance(value, float):
        return (
            "–" if value != value else f"{value:,.0f}" if abs(value) >= 1000 or value.is_integer() else f"{value:.4g}"
        )
    return plain(value)
