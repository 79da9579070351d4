"""What a reader must know before the figures: failures, parts, unequal samples and devices, abstentions, notes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from robustbench_diffaug.report.cells import Cell, plain

__all__ = ["Notice", "notices"]

NAMED = 3  # checkpoints that a notice names; of more it tells how many


class Notice(NamedTuple):
    """What a reader must know before the figures."""

    label: str
    text: str


def _mappings(manifest: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The entries of a list of the manifest."""
    found = manifest.get(key)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list | tuple) else []


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= NAMED else f"{len(names)} checkpoints"


def _failed(manifest: Mapping[str, Any]) -> Iterator[Notice]:
    for failure in _mappings(manifest, "failures"):
        told = [plain(failure[key]) for key in ("bench", "checkpoint", "dataset", "reason") if key in failure]
        yield Notice("failed", " · ".join(told))


def _partial(metrics: pd.DataFrame) -> Iterator[Notice]:
    """Which checkpoints have figures of a part of the samples, those of as many figures together."""
    rows = metrics[~metrics["complete"].astype(bool)]
    found: dict[tuple[str, int], list[str]] = {}
    for (bench, checkpoint), part in rows.groupby(["bench", "checkpoint"], sort=False):
        found.setdefault((str(bench), len(part)), []).append(str(checkpoint))
    for (bench, count), names in found.items():
        each = f" {'each ' if len(names) > 1 else ''}from a part of the declared samples; not ranked."
        yield Notice("partial", f"{_listed(names)}, {bench}: {count} metric{'s' if count > 1 else ''}{each}")


def _unequal(metrics: pd.DataFrame) -> Iterator[Notice]:
    """Which headlines compare checkpoints that were measured on different numbers of samples."""
    complete = metrics[metrics["headline"].astype(bool) & metrics["complete"].astype(bool)]
    for (bench, metric, group), rows in complete.groupby(["bench", "metric", "group"], sort=False):
        if len(counts := sorted(rows["n"].dropna().unique())) > 1:
            text = " and ".join(f"{count:,.0f}" for count in counts)
            yield Notice("unequal", f"{bench}, {metric} ({group}): checkpoints were measured on {text} samples.")


def _abstaining(metrics: pd.DataFrame) -> Iterator[Notice]:
    """On how many samples smoothed classifiers return no class, a noise level at a time."""
    rows = metrics[(metrics["metric"] == "abstain") & (metrics["value"] > 0)]
    for (bench, group), part in rows.groupby(["bench", "group"], sort=False):
        cells = [Cell.of({str(key): value for key, value in record.items()}) for record in part.to_dict("records")]
        least, most = min(cells, key=lambda cell: cell.value), max(cells, key=lambda cell: cell.value)
        share = f"{least.text} %" if least.text == most.text else f"{least.text} to {most.text} %"
        names = _listed([str(name) for name in part["checkpoint"]])
        yield Notice("abstains", f"{bench}, {group}: {names}, on {share} of the samples, which count as not certified.")


def notices(metrics: pd.DataFrame, manifest: Mapping[str, Any]) -> list[Notice]:
    """What failed, what is partial, what was measured on different samples, and what the run itself has to say."""
    made = [*_failed(manifest), *_partial(metrics), *_unequal(metrics), *_abstaining(metrics)]
    devices = manifest.get("device")
    if isinstance(devices, list | tuple) and len(devices) > 1:
        made.append(Notice("devices", f"measured on several devices: {plain(devices)}."))
    lists = (manifest.get("notices"), manifest.get("remarks"))
    told = [notice for found in lists if isinstance(found, list | tuple) for notice in found]
    return made + [Notice("note", plain(notice)) for notice in told]
