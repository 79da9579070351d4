"""A run's scores of out-of-distribution detection as OpenOOD leaves its own: tables, and an array file a dataset.

References:
    OpenOOD v1.5: Enhanced Benchmark for Out-of-Distribution Detection (Zhang et al., 2023),
        https://arxiv.org/abs/2306.09301; code: https://github.com/Jingkang50/OpenOOD
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from robustbench_diffaug.detection.curves import figures
from robustbench_diffaug.engine import cells
from robustbench_diffaug.evaluators.ood import Ood
from robustbench_diffaug.evaluators.ood_scored import TESTED, scored
from robustbench_diffaug.exchange import folder
from robustbench_diffaug.exchange.openood_files import COLUMNS, MEANS, TABLES, named
from robustbench_diffaug.files import apart
from robustbench_diffaug.recorded import Archive, open_run
from robustbench_diffaug.records import Records
from robustbench_diffaug.store import Cell

__all__ = ["export_run"]


class Part(NamedTuple):
    """What is written of one dataset.

    Arguments:
        name: Of the dataset.
        role: 'id', 'near', 'far' or 'csid'.
        pred: Predicted classes.
        conf: Scores.
        label: Classes, -1 out of distribution.
    """

    name: str
    role: str
    pred: NDArray[np.int64]
    conf: NDArray[np.float64]
    label: NDArray[np.int64]


def export_run(
    root: Path, path: Path, bench: str = "", settings: Sequence[str] = (), trust: bool = False
) -> list[Path]:
    """Writes the scores of a run's bench of detection, a folder for each checkpoint and score.

    The files are `<checkpoint>/<score>/ood.csv`, `<checkpoint>/<score>/scores/<dataset>.npz`, and where there are
    images of another look `<checkpoint>/<score>/fsood.csv`; `parameters.json` says how they were made. Scores are
    float64, where OpenOOD's are mostly float32, so that no two images tie that did not in the run. No network is
    called, and weights and images are not read.

    Arguments:
        root: The run folder.
        path: The folder to write: not there, empty, or with an earlier export of the same files.
        bench: Of the run; may be left out where only one is of detection.
        settings: 'a.b=value', each of a field that records do not depend on, such as the scores.
        trust: Whether the run's suite may name code of the user's.

    Returns:
        The paths of the tables.

    Raises:
        ValueError: If the run has no such bench, a checkpoint lacks some images, a score cannot be had, or the folder
            is not free or lies in the run's; nothing is written then.
    """
    apart(root, path)
    found = open_run(root, trust=trust, settings=settings)
    chosen, evaluator = folder.bench_of(root, found.suite, Ood, bench)
    (bare,) = (other for other in found.bare.benches if other.name == chosen.name)
    columns = zip(*(row for _, row in cells(found.bare, bare)), strict=True)
    for part in bare.parts():
        named(root, part.name)
        if part.name in MEANS:
            raise ValueError(f"{root}: dataset {part.name} has the name of a mean of OpenOOD's; rename it")
    contents: dict[Path, bytes] = {}
    for column in columns:
        contents |= {path / file: content for file, content in _files(found.archive, column, evaluator)}
    about = {"scores": list(evaluator.scores), "datasets": {part.name: part.group for part in bare.parts()}}
    folder.export(path, contents, found, chosen.name, about)
    return [file for file in contents if file.suffix == ".csv"]


def _files(archive: Archive, column: Sequence[Cell], evaluator: Ood) -> Iterator[tuple[Path, bytes]]:
    """The files of one checkpoint, below the folder that is written."""
    who, places = f"{archive.root}: {column[0].checkpoint.id}", {}
    for cell in column:
        files, declared = archive.files(cell), cell.dataset.declared().n
        done = sum(last - first + 1 for first, last, _ in files)
        if not files or done != declared:
            where = f"{who} on {cell.dataset.name}"
            raise ValueError(f"{where} has records of {done} of {declared} images; run the suite to its end")
        places[cell.dataset.name] = files[0][2].parts[-4:-2]  # names that are fit for any file system
    records = archive.read(column)
    made = scored(records, evaluator.protocol)
    for score, why in made.refused.items():
        raise ValueError(f"{who}: score {score} cannot be had ({why}); leave it out with --set")
    checkpoint = next(iter(places.values()))[0]
    for score, scores in made.scores.items():
        place = Path(checkpoint, quote(score, safe="@+=,"))
        parts = list(_parts(records, scores))
        for part in parts:
            yield place / "scores" / f"{places[part.name][1]}.npz", _arrays(part)
        yield place / TABLES[0], _table(parts, ("id",))
        if any(part.role == "csid" for part in parts):
            yield place / TABLES[1], _table(parts, ("id", "csid"))


def _parts(records: Records, scores: NDArray[np.float64]) -> Iterator[Part]:
    """The tested datasets, in the order of the suite."""
    for declared in records.declared:
        if declared.group in TESTED:
            mask = records["dataset"] == declared.name
            pred, label = (records[name][mask].astype(np.int64) for name in ("pred", "label"))
            outside = declared.group in MEANS.values()
            yield Part(declared.name, declared.group, pred, scores[mask], np.full_like(label, -1) if outside else label)


def _arrays(part: Part) -> bytes:
    """An npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, pred=part.pred, conf=part.conf, label=part.label)
    return buffer.getvalue()


def _table(parts: Sequence[Part], inside: Sequence[str]) -> bytes:
    """A table, with images of some roles as the in-distribution ones."""
    pool = [part for part in parts if part.role in inside]
    conf = np.concatenate([part.conf for part in pool])
    accuracy = float(np.concatenate([part.pred == part.label for part in pool]).mean())
    rows: dict[str, tuple[float, ...]] = {}
    for mean, role in MEANS.items():
        found: Mapping[str, tuple[float, ...]] = {
            part.name: (one.fpr95_ood_positive, one.auroc, one.aupr_in, one.aupr_out, accuracy)
            for part in parts
            if part.role == role
            for one in (figures(conf, part.conf),)
        }
        if found:
            rows |= {**found, mean: tuple(np.mean(list(found.values()), axis=0).tolist())}
    text = io.StringIO(newline="")
    writer = csv.writer(text)  # with its "\r\n", as OpenOOD's
    writer.writerow(["dataset", *COLUMNS])
    writer.writerows([name, *(f"{100 * value:.2f}" for value in row)] for name, row in rows.items())
    return text.getvalue().encode()
