"""The report of several runs: tables, page, and board.json, which says where every row is from."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from robustbench_diffaug import summary
from robustbench_diffaug.boards.folders import Folder, open_folders
from robustbench_diffaug.boards.joined import Joined, join
from robustbench_diffaug.boards.marked import doubt, marks, relative
from robustbench_diffaug.files import apart
from robustbench_diffaug.folder import PICTURES, replaced, vacant
from robustbench_diffaug.recorded import BOARD, listed
from robustbench_diffaug.report import formats as more_formats
from robustbench_diffaug.report import tables
from robustbench_diffaug.report.marks import Mark
from robustbench_diffaug.runs import FORMATS, KNOWN, Finished, as_json, recorded_failures, rendered

__all__ = ["report"]

WRITTEN = {*KNOWN, BOARD, "digests.txt", PICTURES}
SAID = ("rdiff", "device", "hardware", "platform", "started", "finished")


def report(
    roots: Sequence[Path],
    output: Path | None,
    separate: bool = False,
    settings: Sequence[str] = (),
    formats: Sequence[str] = tuple(FORMATS),
    trust: bool = False,
    layouts: Sequence[str] = (),
) -> Finished:
    """Makes one board of several runs, from their records alone; the runs stay as they are.

    The order of the runs does not matter. Figures are computed from the records of all, and checkpoints of different
    runs are tested in pairs on the images that both have. Figures of imports, which have no records, are taken as they
    are. Each row is marked by where it is from.

    Arguments:
        roots: The run folders.
        output: Where the board is written: a new or empty folder, or that of an earlier board.
        separate: Whether what must not share columns or a row is shown apart, and not refused.
        settings: 'a.b=value', each of a field that records do not depend on, for every run that has records.
        formats: Which of `runs.ASKED`.
        trust: Whether the locks may name code of the user's.
        layouts: Tables of a paper, of `report.layouts.LAYOUTS`.

    Raises:
        ValueError: If a folder is no whole run, or given twice, or the runs must not share a board, the field that
            differs being named. Then nothing was written.
    """
    if output is None:
        raise ValueError(f"a board of {len(roots)} runs is none of them; say where it goes with --output")
    for root in roots:
        apart(root, output)
    vacant(output, WRITTEN, "board of rdiff report", (BOARD, "board"))
    folders = open_folders(roots, settings, trust)
    found = join(folders, separate)
    told = summary.metrics(found.suite, found.store, "html" in formats)
    metrics = _measured(told.metrics, found)
    doubts = {folder: doubt(folder, found, metrics) for folder in folders}
    metrics = pd.concat([each for each in (metrics, *_imported(found)) if len(each)] or [metrics], ignore_index=True)
    board = tables.leaderboard(metrics, told.pairs)
    kinds = marks(found, doubts, output)
    about = _manifest(folders, found, told)
    about["notices"] = [f"{folder.label}: {why}" for folder, why in doubts.items() if why] + about["notices"]
    costs = summary.costs(found.suite, found.store)
    drawn = "html" in formats
    made = rendered(metrics, board, costs, about, drawn, told.pictures, told.pairs, kinds)
    made[BOARD] = as_json({"board": _origins(folders, found, kinds, output), **about})
    more = more_formats.written(metrics, board, about, formats, layouts)
    kept = {BOARD, *more, *(name for form in formats for name in FORMATS.get(form, ()))}
    content = {name: content for name, content in made.items() if name in kept or name.startswith(f"{PICTURES}/")}
    digest = replaced(output, content | more, KNOWN)
    return Finished(output, digest, metrics, board, about["failures"])


def _measured(metrics: pd.DataFrame, found: Joined) -> pd.DataFrame:
    """The figures that follow from records, each under the suite of its run."""
    places = zip(metrics["bench"], metrics["checkpoint"], strict=True)
    suites = [str(_suite(found.sources[place].folder).get("name")) for place in places]
    return metrics.assign(suite=pd.Series(suites, index=metrics.index, dtype=object))


def _suite(folder: Folder) -> Mapping[str, Any]:
    about = folder.manifest.get("suite")
    return about if isinstance(about, Mapping) else {}


def _imported(found: Joined) -> Iterator[pd.DataFrame]:
    """The figures of imports, under the names of the board."""
    for (bench, checkpoint), source in found.sources.items():
        if source.folder.run is None:
            rows = source.folder.imported
            mine = rows[(rows["bench"] == source.bench) & (rows["checkpoint"] == source.id)]
            yield mine.assign(bench=bench, checkpoint=checkpoint)


def _manifest(folders: Sequence[Folder], found: Joined, told: summary.Told) -> dict[str, Any]:
    """What is said of the board: that of all runs, under the names of the board."""
    notices, failures = list(found.notices), list[dict[str, str]]()
    listings: dict[str, list[dict[str, Any]]] = {"checkpoints": [], "denoisers": [], "datasets": []}
    for folder in folders:
        manifest = dict(folder.manifest)
        benches = {s.bench: column.name for column in found.columns for s in column.sides if s.folder is folder}
        ids = {id: name for (where, id), name in found.names.items() if where is folder}
        notices += [f"{folder.label}: {said}" for said in manifest.get("notices") or ()]
        for failed in recorded_failures(manifest):
            there = {key: failed.get(key, "") for key in ("bench", "checkpoint", "dataset", "reason")}
            bench, checkpoint = benches.get(there["bench"], there["bench"]), ids.get(there["checkpoint"], "all")
            failures.append({**there, "bench": bench, "checkpoint": checkpoint})
        known = (entry for entry in listed(manifest, "checkpoints") if entry.get("id") in ids)
        listings["checkpoints"] += [{**entry, "id": ids[str(entry["id"])]} for entry in known]
        listings["denoisers"] += [dict(entry) for entry in listed(manifest, "denoisers")]
        for column in (column for column in found.columns if column.sides[0].folder is folder):
            named = (entry for entry in listed(manifest, "datasets") if entry.get("bench") == column.sides[0].bench)
            listings["datasets"] += [{**entry, "bench": column.name} for entry in named]
    return {
        "schema_version": 1,
        "rdiff": version("robustbench-diffaug"),
        "suite": {"name": found.suite.name, "digest": "", "seed": found.suite.seed},
        "runs": {folder.label: _said(folder) for folder in folders},
        "checkpoints": _distinct(listings["checkpoints"], ("id",)),
        "denoisers": _distinct(listings["denoisers"], ("kind", "contents", "fingerprint")),
        "datasets": listings["datasets"],
        "benches": list(_benches(found)),
        "notices": notices + _devices(folders),
        "failures": failures + told.failures,
        **({"remarks": told.remarks} if told.remarks else {}),
    }


def _benches(found: Joined) -> Iterator[dict[str, Any]]:
    """The benches of the board, with their settings where there are records, and which runs they are of."""
    evaluators = {bench.name: bench.evaluator for bench in found.suite.benches}
    for column in found.columns:
        evaluator = evaluators.get(column.name)
        settings = evaluator.model_dump(mode="json", serialize_as_any=True) if evaluator else {}
        yield {"name": column.name, "evaluator": settings, "runs": [side.folder.label for side in column.sides]}


def _distinct(entries: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The entries that differ in some of their fields; of others the first."""
    return list({tuple(str(entry.get(key)) for key in keys): entry for entry in reversed(entries)}.values())[::-1]


def _said(folder: Folder) -> dict[str, Any]:
    """Who made a run, in a few words."""
    about = {"suite": folder.manifest.get("suite")}
    about |= {key: folder.manifest[key] for key in (*SAID, "imported") if key in folder.manifest}
    return about | {"digest": folder.digest}


def _devices(folders: Sequence[Folder]) -> list[str]:
    """That runs are of different devices or versions of torch, if so."""
    made: dict[str, list[str]] = {}
    for folder in (folder for folder in folders if folder.run):
        versions = folder.manifest.get("versions")
        torch = versions.get("torch") if isinstance(versions, Mapping) else None
        said = f"{folder.manifest.get('hardware') or folder.manifest.get('device')} with torch {torch}"
        made.setdefault(said, []).append(folder.label)
    named = "; ".join(f"{', '.join(labels)}: {said}" for said, labels in made.items())
    said = f"runs were made on different devices or versions ({named}): last digits may differ"
    return [said] if len(made) > 1 else []


def _origins(
    folders: Sequence[Folder], found: Joined, kinds: Mapping[tuple[str, str], Mark], output: Path
) -> dict[str, Any]:
    """Which runs the board is of, and of which of them every row is."""
    rows = [
        {"bench": bench, "checkpoint": checkpoint, "run": source.folder.label, "mark": kinds[bench, checkpoint].kind}
        | {"bench_there": source.bench, "checkpoint_there": source.id}
        for (bench, checkpoint), source in found.sources.items()
    ]
    runs = [{"label": each.label, "folder": relative(each.root, output), "digest": each.digest} for each in folders]
    settings = {given for each in folders if each.run for given in each.run.given}
    return {"runs": runs, "rows": rows, "settings": sorted(settings)}
