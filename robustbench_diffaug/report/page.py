"""The report as one HTML page that makes no request: metrics, how they were measured, and what they mean.

Names, notices and settings come from suites and checkpoints of anybody. Each is escaped by Jinja and isolated by <bdi>,
and a content security policy lets no script run but the page's own.
"""

import base64
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from robustbench_diffaug.report import detection_sections, glossary, pictures, sections
from robustbench_diffaug.report.cells import Table, flat, plain, table_of
from robustbench_diffaug.shown import Shown

__all__ = ["render"]

PROVENANCE = (  # what the manifest lists, and the key that names each entry
    ("checkpoints", "id"),
    ("denoisers", "kind"),
    ("datasets", "name"),
)


class Notice(NamedTuple):
    """What a reader must know before the figures."""

    label: str
    text: str


class Bench(NamedTuple):
    """A bench's settings."""

    name: str
    settings: list[tuple[str, str]]


def _mappings(manifest: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The entries of a list of the manifest."""
    found = manifest.get(key)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list | tuple) else []


def _notices(metrics: pd.DataFrame, manifest: Mapping[str, Any]) -> list[Notice]:
    """What failed, what is partial, what was measured on different samples, and what the run itself has to say."""
    made = [
        Notice(
            "failed",
            " · ".join(plain(failure[key]) for key in ("bench", "checkpoint", "dataset", "reason") if key in failure),
        )
        for failure in _mappings(manifest, "failures")
    ]
    partial = metrics[~metrics["complete"].astype(bool)]
    for (bench, checkpoint), rows in partial.groupby(["bench", "checkpoint"], sort=False):
        count = f"{len(rows)} metric{'s' if len(rows) > 1 else ''}"
        made.append(
            Notice("partial", f"{checkpoint}, {bench}: {count} from a part of the declared samples; not ranked.")
        )
    complete = metrics[metrics["headline"].astype(bool) & metrics["complete"].astype(bool)]
    for (bench, metric, group), rows in complete.groupby(["bench", "metric", "group"], sort=False):
        if len(counts := sorted(rows["n"].dropna().unique())) > 1:
            text = " and ".join(f"{count:,.0f}" for count in counts)
            made.append(Notice("unequal", f"{bench}, {metric} ({group}): checkpoints were measured on {text} samples."))
    devices = manifest.get("device")
    if isinstance(devices, list | tuple) and len(devices) > 1:
        made.append(Notice("devices", f"measured on several devices: {plain(devices)}."))
    lists = (manifest.get("notices"), manifest.get("remarks"))
    told = [notice for notices in lists if isinstance(notices, list | tuple) for notice in notices]
    return made + [Notice("note", plain(notice)) for notice in told]


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The scalars of the manifest: seed, versions, device, threads, seconds and whatever else a run wrote there."""
    shown = {key for key, _ in PROVENANCE} | {"benches", "notices", "remarks", "failures"}
    rest = {str(key): list(flat(value)) for key, value in manifest.items() if key not in shown}
    return [(key, " · ".join(f"{name} {text}".strip() for name, text in leaves)) for key, leaves in rest.items()]


def _costs(costs: pd.DataFrame) -> Table | None:
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


def _manifest_tables(manifest: Mapping[str, Any]) -> list[Table]:
    found = (table_of(manifest.get(key), key, name) for key, name in PROVENANCE)
    return [table for table in found if table is not None]


def _suite(metrics: pd.DataFrame, manifest: Mapping[str, Any]) -> dict[str, str]:
    """The name of what was run, its digest, and when it was."""
    suite = manifest.get("suite")
    known = suite if isinstance(suite, Mapping) else {}
    name = plain(known["name"]) if "name" in known else ", ".join(str(name) for name in metrics["suite"].unique())
    when = plain(manifest.get("finished") or manifest.get("started") or "")
    return {"name": name or "no suite", "digest": plain(known.get("digest") or ""), "when": when}


def _summary(metrics: pd.DataFrame) -> str:
    """One sentence on what the page holds."""

    def counted(column: str, noun: str) -> str:
        count = metrics[column].nunique()
        return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('h') else 's'}"

    kinds = ", ".join(str(kind) for kind in metrics["evaluator"].unique())
    verb = "is" if metrics["checkpoint"].nunique() == 1 else "are"
    how = f"How robust {counted('checkpoint', 'image classifier')} {verb}"
    return f"{how}: {len(metrics):,} measurements on {counted('bench', 'bench')} ({kinds})."


def _detection_settings(manifest: Mapping[str, Any]) -> dict[str, detection_sections.Settings]:
    """What the part on out-of-distribution detection needs to know of each bench, by its name."""
    found = {}
    for bench in _mappings(manifest, "benches"):
        settings, chosen = bench.get("evaluator"), detection_sections.Settings()
        known: Mapping[str, Any] = settings if isinstance(settings, Mapping) else {}
        if isinstance(average := known.get("average"), list | tuple):
            chosen = chosen._replace(averaged=[plain(score) for score in average])
        gains = known.get("gains")
        pairs = gains if isinstance(gains, list | tuple) else ()  # as a value holds a mapping
        bases = {plain(pair[0]): plain(pair[1]) for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2}
        chosen = chosen._replace(bases=bases)
        found[plain(bench.get("name", ""))] = chosen
    return found


def _context(metrics: pd.DataFrame, manifest: Mapping[str, Any], costs: pd.DataFrame) -> dict[str, object]:
    """All that the template shows."""
    checkpoints = [str(checkpoint) for checkpoint in metrics["checkpoint"].unique()]
    styles = {checkpoint: style for style, checkpoint in enumerate(checkpoints)}
    used: set[Hashable] = set()
    detection = detection_sections.detection(metrics, used, styles, _detection_settings(manifest))
    rest = metrics.drop(index=list(used))
    board = sections.board(metrics, used)
    shifts = sections.shifts(rest, used)
    curves = sections.curves(rest, used, styles)
    smoothing = sections.smoothing(rest, used)
    return {
        "suite": _suite(metrics, manifest),
        "summary": _summary(metrics) if len(metrics) else "This run has no metrics yet.",
        "notices": _notices(metrics, manifest),
        "board": board,
        "shifts": shifts,
        "curves": curves,
        "legend": sections.legend(styles, "line") if curves else [],
        "detection": detection,
        "smoothing": smoothing,
        "others": sections.others(metrics, used),
        "benches": [
            Bench(plain(b.get("name", "")), list(flat(b.get("evaluator", {})))) for b in _mappings(manifest, "benches")
        ],
        "facts": _facts(manifest),
        "provenance": _manifest_tables(manifest),
        "costs": _costs(costs),
        "glossary": glossary.entries(str(metric) for metric in metrics["metric"].unique()),
    }


def render(metrics: pd.DataFrame, manifest: Mapping[str, Any], costs: pd.DataFrame, shown: Sequence[Shown] = ()) -> str:
    """The page, self-contained, the same for the same input.

    Arguments:
        metrics: The long form that `tables` describes.
        manifest: What the run wrote down about itself. Any key may be missing.
        costs: Seconds, throughput and memory per cell: bench, checkpoint, dataset, samples, seconds, ...
        shown: The pictures.
    """
    environment = Environment(
        loader=PackageLoader("robustbench_diffaug", "report/templates"),
        autoescape=True,  # always: select_autoescape goes by suffix, and knows none that ends in .j2
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    context = _context(metrics.reset_index(drop=True), manifest, costs) | {"pictures": pictures.embedded(shown)}
    page = environment.get_template("index.html.j2").render(context, script=script, script_digest=digest)
    return page.encode("utf-8", "replace").decode()  # a lone surrogate in a name must not break the writing of the file
