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

from robustbench_diffaug.report import (
    detection_sections,
    glossary,
    notices,
    overview,
    pictures,
    profiles,
    provenance,
    sections,
)
from robustbench_diffaug.report.axes import measures
from robustbench_diffaug.report.cells import flat, plain
from robustbench_diffaug.report.marks import Mark, origins
from robustbench_diffaug.report.marks import legend as mark_legend
from robustbench_diffaug.shown import Shown

__all__ = ["render"]


class Bench(NamedTuple):
    """A bench's settings."""

    name: str
    settings: list[tuple[str, str]]


def _mappings(manifest: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The entries of a list of the manifest."""
    found = manifest.get(key)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list | tuple) else []


def _summary(metrics: pd.DataFrame, manifest: Mapping[str, Any]) -> str:
    """One sentence on what the page holds."""

    def counted(count: int, noun: str) -> str:
        return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('h') else 's'}"

    kinds = ", ".join(str(kind) for kind in metrics["evaluator"].unique())
    declared = {plain(entry.get("id")): entry.get("kind") for entry in _mappings(manifest, "checkpoints")}
    there = [str(checkpoint) for checkpoint in metrics["checkpoint"].unique()]
    denoisers = sum(declared.get(checkpoint) == "denoiser" for checkpoint in there)
    classifiers = len(there) - denoisers
    known = all(checkpoint in declared for checkpoint in there)  # of others nobody said what they are
    parts = []
    if classifiers:
        noun = "image classifier" if known else "checkpoint"
        parts.append(f"How robust {counted(classifiers, noun)} {'is' if classifiers == 1 else 'are'}")
    if denoisers:
        does = "does" if denoisers == 1 else "do"
        parts.append(f"{'what' if parts else 'What'} {counted(denoisers, 'denoiser')} {does}")
    what = f"{counted(len(metrics), 'measurement')} on {counted(metrics['bench'].nunique(), 'bench')} ({kinds})"
    return f"{', and '.join(parts)}: {what}."


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


def _context(
    metrics: pd.DataFrame,
    manifest: Mapping[str, Any],
    costs: pd.DataFrame,
    pairs: pd.DataFrame | None,
    published: pd.DataFrame | None,
    marks: Mapping[tuple[str, str], Mark],
) -> dict[str, object]:
    """All that the template shows."""
    checkpoints = [str(checkpoint) for checkpoint in metrics["checkpoint"].unique()]
    styles = {checkpoint: style for style, checkpoint in enumerate(checkpoints)}
    printed = overview.printed(published)
    found = measures(metrics, pairs)
    used: set[Hashable] = {index for measure in found for index in measure.rows.index}
    seen: set[Hashable] = set()
    detection = detection_sections.detection(metrics, seen, styles, _detection_settings(manifest))
    rest = metrics.drop(index=list(seen))
    used |= seen
    shifts = sections.shifts(rest, used)
    curves = sections.curves(rest, used, styles)
    smoothing = sections.smoothing(rest, used)
    cards = profiles.profiles(found, checkpoints, manifest)
    return {
        "suite": provenance.suite(metrics, manifest),
        "summary": _summary(metrics, manifest) if len(metrics) else "This run has no metrics yet.",
        "notices": notices.notices(metrics, manifest),
        "board": overview.board(found, checkpoints, marks, printed),
        "marks": mark_legend(marks, bool(printed)),
        "published": overview.sources(printed),
        "shifts": shifts,
        "curves": curves,
        "legend": sections.legend(styles, "line") if curves else [],
        "detection": detection,
        "smoothing": smoothing,
        "others": sections.others(metrics, used),
        "profiles": cards,
        "numbers": {card.checkpoint: card.number for card in cards.cards},
        "benches": [
            Bench(plain(b.get("name", "")), list(flat(b.get("evaluator", {})))) for b in _mappings(manifest, "benches")
        ],
        "facts": provenance.facts(manifest),
        "provenance": provenance.tables_of(manifest),
        "origins": origins(marks),
        "costs": provenance.costs_table(costs),
        "glossary": glossary.entries(str(metric) for metric in metrics["metric"].unique()),
    }


def render(
    metrics: pd.DataFrame,
    manifest: Mapping[str, Any],
    costs: pd.DataFrame,
    shown: Sequence[Shown] = (),
    pairs: pd.DataFrame | None = None,
    published: pd.DataFrame | None = None,
    marks: Mapping[tuple[str, str], Mark] | None = None,
) -> str:
    """The page, self-contained, the same for the same input.

    Arguments:
        metrics: The long form that `tables` describes.
        manifest: What the run wrote down about itself. Any key may be missing.
        costs: Seconds, throughput and memory per cell: bench, checkpoint, dataset, samples, seconds, ...
        shown: The pictures.
        pairs: The tests of checkpoints in pairs.
        published: Published figures in the form of metrics, with the columns `source`, `link` (or `url`) and `note`;
            they stand beneath the measured ones, unranked.
        marks: Where figures are from, by bench and checkpoint.

    Raises:
        ValueError: If a mark is of no known kind, or a checkpoint has two values for one measure.
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
    context = _context(metrics.reset_index(drop=True), manifest, costs, pairs, published, marks or {})
    context |= {"pictures": pictures.embedded(shown)}
    page = environment.get_template("index.html.j2").render(context, script=script, script_digest=digest)
    return page.encode("utf-8", "replace").decode()  # a lone surrogate in a name must not break the writing of the file
