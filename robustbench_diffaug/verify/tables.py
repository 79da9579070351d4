"""Records against each other, and every figure of a report against the records."""

import csv
import io
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from math import isclose

import numpy as np
import pandas as pd

from robustbench_diffaug import shares
from robustbench_diffaug.engine import cells, lacking
from robustbench_diffaug.folder import PICTURES
from robustbench_diffaug.recorded import LOCK, Recorded
from robustbench_diffaug.records import INDEX
from robustbench_diffaug.report import tables
from robustbench_diffaug.runs import FORMATS, Results, recorded_failures, results
from robustbench_diffaug.store import Cell
from robustbench_diffaug.verify.check import Check, judged

__all__ = ["KEYS", "close", "figures", "records", "same_versions", "table_of"]

CLOSE = 1e-9  # of a figure, relative, where versions of packages are others
SHOWN = 20  # differences of one file that are told
FILES = [name for names in FORMATS.values() for name in names]
FIGURE = ("bench", "checkpoint", "group", "metric")
KEYS = {
    "metrics.csv": FIGURE,
    "metrics.parquet": FIGURE,
    "leaderboard.csv": ("checkpoint",),
    "costs.csv": ("bench", "checkpoint", "dataset"),
    "pairs.csv": ("bench", "metric", "group", "a", "b"),
}
"""The columns that name a row of a table."""


def records(run: Recorded) -> Check:
    """That records are whole and agree: ranges, and the label and pixels of one image under all checkpoints."""
    wrong, unseen, samples, files = list[str](), list[str](), 0, 0
    for bench in run.bare.benches:
        for dataset, row in cells(run.bare, bench):
            seen: dict[str, tuple[str, str, str]] = {}
            for cell in row:
                where = f"{bench.name} / {cell.checkpoint.id} / {dataset.name}"
                wrong += [f"{where}: {line}" for line in _ranges(run, cell, len(dataset.rows()))]
                files += len(run.archive.files(cell))
                found = run.archive.read((cell,))
                samples += len(found)
                unseen += _idle(run, cell, where)
                if len(found):
                    wrong += _disagreeing(found.columns, cell, where, seen)
    return judged("records", f"{samples:,} rows in {files:,} files are whole and agree", wrong, unseen)


def _ranges(run: Recorded, cell: Cell, size: int) -> Iterator[str]:
    """What is odd about the ranges of a cell's files."""
    end = -1
    for first, last, path in run.archive.files(cell):
        if first <= end:
            yield f"{path.name} repeats positions of the file before it"
        if not first <= last < size:
            yield f"{path.name} goes beyond the {size} samples of the dataset"
        end = max(end, last)


def _idle(run: Recorded, cell: Cell, where: str) -> Iterator[str]:
    """Records of a cell that do not count: of other weights, data or fields under the same names."""
    others = [key for key in run.archive.versions(cell) if key != run.archive.key(cell)]
    if others:
        yield f"{where}: records of {', '.join(others)} are no part of the report"


def _disagreeing(
    columns: Mapping[str, np.ndarray], cell: Cell, where: str, seen: dict[str, tuple[str, str, str]]
) -> Iterator[str]:
    """Rows that say otherwise of their dataset than it does, or of an image than another checkpoint's."""
    declared = cell.dataset.declared()
    missing = [name for name in INDEX if name not in columns]
    if missing:
        yield f"{where}: there is no column {missing[0]}"
        return
    for name in ("dataset", "origin", "group", "severity"):
        expected = declared.name if name == "dataset" else getattr(declared, name)
        for row in np.flatnonzero(columns[name] != expected)[:SHOWN]:
            yield f"{where}: sample {columns['sample'][row]} has {name} {columns[name][row]!r}, not {expected!r}"
    for id, label, image in zip(*(columns[name].tolist() for name in ("sample", "label", "image")), strict=True):
        here = (str(label), str(image), cell.checkpoint.id)
        label_there, image_there, other = seen.setdefault(id, here)
        if (label_there, image_there) != here[:2]:
            what = f"label {label} and pixels {image}; with {other} it has {label_there} and {image_there}"
            yield f"{where}: sample {id} has {what}"


def same_versions(run: Recorded) -> tuple[bool, str]:
    """Whether the run was made with the packages that are here, and the first that was not."""
    told = run.manifest.get("versions")
    if not run.current:
        return False, f"{LOCK} is of another version of rdiff, which has other fields"
    for name, there in (told if isinstance(told, dict) else {}).items():
        try:
            here = version(name) if name != "python" else there
        except PackageNotFoundError:
            here = "none"
        if here != there:
            return False, f"the run was made with {name} {there}, here is {here}"
    return (True, "") if isinstance(told, dict) else (False, "the manifest names no versions")


def figures(run: Recorded) -> list[Check]:
    """Tables, manifest, page and pictures, computed again from the records and compared with the files."""
    if partial := shares.partial(run.manifest, lacking(run.bare, run.archive)):
        there = [f"{name} is there, and samples are missing" for name in sorted(FILES) if (run.root / name).exists()]
        return [judged("figures", "", there, [f"there are none yet: {partial}"], 0)]
    made = results(run.bare, run.archive, run.manifest, recorded_failures(run.manifest))
    exact, why = same_versions(run)
    wrong, count = list[str](), 0
    for name in ("metrics.csv", "leaderboard.csv", "costs.csv", "pairs.csv"):
        count += made.files[name].count(b"\n") - 1
        if name == "pairs.csv" and not (run.root / name).exists():
            wrong.append("pairs.csv is not there; rdiff report RUN writes it")
            continue
        wrong += _rows(run, name, (run.root / name).read_bytes(), made.files[name], exact)
    wrong += _parquet(run, made, exact)
    note = [] if exact else [f"compared to {CLOSE:g}: {why}"]
    found = judged("figures", f"{count:,} rows of the tables follow from the records", wrong, note)
    if wrong and not exact:
        found = found._replace(said=f"{found.said}; {why}")
    return [found, _manifest(run, made), _page(run, made, exact, why), *_pictures(run, made, exact, why)]


def _rows(run: Recorded, name: str, found: bytes, made: bytes, exact: bool) -> list[str]:
    """The rows and cells of a table that differ from what the records give."""
    if found == made:
        return []
    ours, theirs = (table_of(text) for text in (made, found))
    if list(ours[0]) != list(theirs[0]):
        return [f"{name} line 1: its columns are not those of the records' table"]
    right, said = ({tuple(row[k] for k in KEYS[name]): row for row in rows[1:]} for rows in (ours, theirs))
    wrong = [f"{name}: {' / '.join(key)} is not there" for key in right if key not in said]
    for line, row in enumerate(theirs[1:], 2):
        key = tuple(row[k] for k in KEYS[name])
        if key not in right:
            wrong.append(f"{name} line {line}: {' / '.join(key)} is no row that the records give")
            continue
        for column, one in right[key].items():
            if one != row[column] and (exact or not close(one, row[column])):
                where = f"{name} line {line}: {' / '.join(key)}"
                wrong.append(f"{where}: {column} is {row[column]}, the records give {one}")
    if exact and not wrong:
        wrong = [f"{name} holds the records' figures, but not as rdiff writes them"]
    return wrong[:SHOWN] + ([f"{name}: and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else [])


def table_of(text: bytes) -> list[dict[str, str]]:
    """The rows of a table as mappings, the first of which is its header's; a short row is filled up with nothing."""
    rows = list(csv.reader(io.StringIO(text.decode("utf-8", "replace"))))
    header = rows[0] if rows else []
    return [dict(zip_longest(header, row[: len(header)], fillvalue="")) for row in rows] or [{}]


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def close(one: str, other: str) -> bool:
    """Whether two cells are numbers that differ by no more than versions of packages explain."""
    return _number(one) and _number(other) and isclose(float(one), float(other), rel_tol=CLOSE, abs_tol=CLOSE * 1e-3)


def _parquet(run: Recorded, made: Results, exact: bool) -> list[str]:
    """The same figures in Parquet, whose bytes depend on pyarrow's version: they are compared as text."""
    frame = pd.read_parquet(run.root / "metrics.parquet")
    return _rows(run, "metrics.parquet", tables.to_csv(frame), made.files["metrics.csv"], exact)


def _manifest(run: Recorded, made: Results) -> Check:
    """The manifest's failures follow from the records, and its datasets have no more rows than it says."""
    wrong = []
    if (run.root / "manifest.json").read_bytes() != made.files["manifest.json"]:
        told = len(run.manifest.get("failures") or ())
        what = f"it has {told} failures" if told != len(made.failures) else "its bytes or its failures are others"
        wrong.append(f"manifest.json is not as rdiff writes it: {what}; there are {len(made.failures)} failures")
    spent = run.manifest.get("seconds")
    if isinstance(spent, dict):
        costs = pd.read_csv(io.BytesIO(made.files["costs.csv"]))
        total = float(costs["seconds"].sum()) if len(costs) else 0.0
        told_seconds = float(spent.get("cells", 0.0))
        if abs(total - told_seconds) > 0.001 * (len(costs) + 1):  # each cell is rounded to a millisecond
            wrong.append(f"manifest.json: seconds.cells is {told_seconds}, the records' costs add up to {total:.3f}")
    return judged("manifest", f"manifest.json follows from the records: {len(made.failures)} failures", wrong)


def _page(run: Recorded, made: Results, exact: bool, why: str) -> Check:
    """The page, byte for byte, where it was made with the same packages."""
    found, right = (run.root / "index.html").read_bytes(), made.files["index.html"]
    if found == right:
        return judged("page", f"index.html is what the figures give, byte for byte ({len(found):,} bytes)", [])
    if not exact:
        return Check("page", "not checked", f"index.html is another than here, and {why}")
    pairs = zip(found.splitlines(), right.splitlines(), strict=False)
    line, said = next(((n, one) for n, (one, other) in enumerate(pairs, 1) if one != other), (0, b""))
    shown = said.decode("utf-8", "replace").strip()[:100]
    return judged("page", "", [f"index.html line {line} is not what the records give: {shown!r}"])


def _pictures(run: Recorded, made: Results, exact: bool, why: str) -> list[Check]:
    """The files of pictures, byte for byte, where there are any and they were made with the same packages."""
    right = {name: content for name, content in made.files.items() if name.startswith(f"{PICTURES}/")}
    paths = [path for path in sorted((run.root / PICTURES).rglob("*")) if not path.is_dir()]
    found = {path.relative_to(run.root).as_posix(): path for path in paths if not path.name.startswith(".")}
    if not right and not found:
        return []
    wrong = [f"{name} is not there" for name in right if name not in found]
    wrong += [f"{name} is no picture that the records give" for name in found if name not in right]
    other = [name for name, path in found.items() if name in right and path.read_bytes() != right[name]]
    if exact:
        wrong += [f"{name} is not what the records give" for name in other]
    elif other and not wrong:
        return [Check("pictures", "not checked", f"{len(other)} of {len(right)} are others than here, and {why}")]
    said = f"{len(right)} files in {PICTURES} are what the records give, byte for byte"
    return [judged("pictures", said, wrong)]
