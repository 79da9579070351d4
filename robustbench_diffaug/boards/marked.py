"""Whether the figures of a run may be called verified on a board, and the marks of its rows."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from robustbench_diffaug.boards.folders import Folder
from robustbench_diffaug.boards.joined import Joined, Source
from robustbench_diffaug.report import tables
from robustbench_diffaug.report.marks import Mark
from robustbench_diffaug.verify import files, notes
from robustbench_diffaug.verify.tables import KEYS, close, same_versions, table_of

__all__ = ["doubt", "marks", "relative"]


def doubt(folder: Folder, found: Joined, metrics: pd.DataFrame) -> str:
    """Why the figures of a run cannot be called verified; nothing if they can.

    Its digests are right, or it would not have been opened. Looked at are the agreement of lock and manifest, and
    whether its metrics.csv has the figures that its records give here.

    Arguments:
        folder: The run.
        found: The board that it is part of.
        metrics: The figures of the board that follow from records.
    """
    run = folder.run
    if run is None:
        return ""
    if run.given:
        return f"not verified: the figures are of other settings than its own, {', '.join(run.given)}"
    agree = files.suite(run)
    if agree.state != "ok":
        return f"not verified: {agree.details[0] if agree.details else agree.said}"
    if not (folder.root / "metrics.csv").is_file():
        return "not verified: it has no metrics.csv"
    odd = next(_odd(folder, found, metrics), "")
    return f"not verified: {odd}" if odd else ""


def _odd(folder: Folder, found: Joined, metrics: pd.DataFrame) -> Iterator[str]:
    """The rows of a run's metrics.csv that the board takes from it, where they are not what the records give."""
    run, named = folder.run, {}
    assert run is not None
    for place, source in found.sources.items():
        if source.folder is folder:
            named[place] = (source.bench, source.id)
    places = list(zip(metrics["bench"], metrics["checkpoint"], strict=True))
    mine = metrics[[place in named for place in places]]
    own = [named[place] for place in places if place in named]
    mine = mine.assign(bench=[bench for bench, _ in own], checkpoint=[id for _, id in own])
    right = _keyed(tables.to_csv(mine))
    taken = {tuple(map(_cell, place)) for place in named.values()}
    said = {
        key: row for key, row in _keyed((folder.root / "metrics.csv").read_bytes()).items() if (key[0], key[1]) in taken
    }
    exact, _ = same_versions(run)
    alone = all(column.sides[0].folder is folder or not column.of(folder) for column in found.columns)
    for key, row in right.items():
        if key not in said:
            if alone or not key[3].rpartition("/")[0].endswith(("mce", "gain")):
                yield f"metrics.csv lacks {' / '.join(key)}"
            continue
        for column, value in row.items():
            if value != said[key].get(column) and (exact or not close(value, said[key].get(column, ""))):
                where = " / ".join(key)
                yield f"metrics.csv has {column} {said[key].get(column)} of {where}, the records give {value}"
    for key in said:
        if key not in right:
            yield f"metrics.csv has {' / '.join(key)}, which the records do not give"


def _keyed(content: bytes) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of metrics.csv by bench, checkpoint, group and metric."""
    return {tuple(row.get(key, "") for key in KEYS["metrics.csv"]): row for row in table_of(content)[1:]}


def _cell(text: str) -> str:
    """As `tables.to_csv` has it."""
    return f"'{text}" if text.startswith(tables.FORMULA_STARTS) else text


def marks(found: Joined, doubts: Mapping[Folder, str], output: Path) -> dict[tuple[str, str], Mark]:
    """The mark of each bench and checkpoint of a board, with links to the run.

    Arguments:
        found: The board.
        doubts: Why figures of a run cannot be called verified.
        output: The folder of the page.
    """
    return {place: _mark(source, doubts[source.folder], output) for place, source in found.sources.items()}


def _mark(source: Source, why: str, output: Path) -> Mark:
    folder = source.folder
    if folder.run is None:
        kind = "imported"
    elif why:
        kind = "unverified"
    else:
        kind = "rechecked" if notes.holds(folder.root, folder.digest) else "verified"
    run = relative(folder.root, output)
    return Mark(kind, run, f"{run}/manifest.json", folder.digest)


def relative(root: Path, output: Path) -> str:
    """Where a run is, seen from the folder of the page."""
    return Path(os.path.relpath(root.resolve(), output.resolve())).as_posix()
