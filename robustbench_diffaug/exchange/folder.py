"""What imports and exports share: run folders of another tool's figures, files for other tools, their tables."""

import csv
import hashlib
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from robustbench_diffaug.component import suggest
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.files import atomic, sha256
from robustbench_diffaug.recorded import Recorded
from robustbench_diffaug.report import tables
from robustbench_diffaug.report.marks import Mark
from robustbench_diffaug.runs import Finished, put, rendered
from robustbench_diffaug.suite import Bench, Suite

__all__ = ["PARAMETERS", "bench_of", "claim", "export", "free", "rows", "text", "write"]

E = TypeVar("E", bound=Evaluator)

PARAMETERS = "parameters.json"

FILES = ("manifest.json", "metrics.csv", "metrics.parquet", "leaderboard.csv", "index.html")
NOTICE = "imported: no records, no intervals; the figures are the source's and cannot be computed again"


def claim(root: Path, source: Path) -> None:
    """Finds that a folder is free for an import: not there, empty, or an earlier import of a file of that name.

    Raises:
        ValueError: If it holds anything else.
    """
    if not root.exists():
        return
    # What a killed import has left half written is nobody's.
    names = {path.name for path in root.iterdir() if path.suffix != ".part"} if root.is_dir() else {""}
    if not names:
        return
    if names <= {*FILES, "digests.txt"} and (root / "manifest.json").is_file():
        try:
            manifest = json.loads((root / "manifest.json").read_bytes())
            if manifest["imported"]["file"] == source.name:
                return
        except (ValueError, TypeError, KeyError):  # damaged, or of a run
            pass
    raise ValueError(f"{root} is not empty and no import of {source.name}; give another folder with --output")


def free(path: Path, files: Collection[Path]) -> None:
    """Finds that a folder holds nothing but files that an export is about to write.

    Raises:
        ValueError: If it is a file, or holds others.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a folder with --output")
    other = [file for file in path.rglob("*") if not file.is_dir() and file not in files]
    if other:
        raise ValueError(f"{path} holds other files, such as {other[0].name}; give another folder with --output")


def bench_of(root: Path, suite: Suite, kind: type[E], name: str) -> tuple[Bench, E]:
    """The bench of a kind of evaluator that is meant, and the evaluator.

    Arguments:
        root: The run folder, for messages.
        suite: Its suite.
        kind: Of the evaluator.
        name: Of the bench; empty where only one is of that kind.

    Raises:
        ValueError: If there is none, or several and none is named.
    """
    word = kind.model_fields["kind"].default
    found = {bench.name: (bench, bench.evaluator) for bench in suite.benches if isinstance(bench.evaluator, kind)}
    if not found:
        raise ValueError(f"{root} has no bench of kind {word}, and nothing else can be exported so")
    if name and name not in found:
        raise ValueError(f"{root} has no bench of kind {word} called {name!r}{suggest(name, list(found))}")
    if not name and len(found) > 1:
        raise ValueError(f"{root} has several benches of kind {word}; name one with --bench: {', '.join(found)}")
    return found[name or next(iter(found))]


def export(path: Path, contents: Mapping[Path, bytes], run: Recorded, bench: str, about: Mapping[str, Any]) -> None:
    """Writes the files of an export, and beside them in parameters.json how they were made.

    Arguments:
        path: The folder: not there, empty, or with an earlier export of the same files.
        contents: The files and their bytes.
        run: The run that they are of.
        bench: Its bench.
        about: More of the parameters.

    Raises:
        ValueError: If the folder holds other files; nothing is written then.
    """
    listing = run.root / "digests.txt"
    parameters = {
        "suite": run.manifest.get("suite"),
        "bench": bench,
        **about,
        "settings": list(run.given),
        "digest": sha256(listing) if listing.is_file() else "",
        "files": {
            file.relative_to(path).as_posix(): hashlib.sha256(content).hexdigest() for file, content in contents.items()
        },
    }
    last = {path / PARAMETERS: json.dumps(parameters, indent=1, ensure_ascii=False).encode() + b"\n"}
    written = {**contents, **last}
    free(path, written)
    for file, content in written.items():
        with atomic(file) as opened:
            opened.write(content)


def text(path: Path, largest: int, what: str, give: str) -> str:
    """A text file of another tool.

    Arguments:
        path: The file.
        largest: The most bytes that are read.
        what: What it should be, for messages, as 'a file of certificates'.
        give: What to give where it is not there.

    Raises:
        ValueError: If it is not there, too large, or no UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give {give}")
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path} has {size:,} bytes, too many for {what}; give the right one")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: byte {error.start} is not UTF-8") from error


def rows(path: Path, found: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of the CSV text of a file that are not empty, with the numbers of their lines.

    Raises:
        ValueError: If it is no CSV; the line is named.
    """
    reader = csv.reader(io.StringIO(found, newline=""), strict=True)
    try:
        yield from ((reader.line_num, row) for row in reader if row)
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: no CSV: {error}") from error


def write(
    root: Path, source: Path, form: str, metrics: pd.DataFrame, about: Mapping[str, Any], read: Sequence[Path] = ()
) -> Finished:
    """Writes the folder; the manifest, by which `claim` knows it again, comes first.

    Arguments:
        root: The folder, found free by `claim`.
        source: The file or folder that the figures are from.
        form: Its format, 'robustbench', 'cohen' or 'openood'.
        metrics: The figures in long form.
        about: More of the manifest.
        read: The files that were read of a folder.
    """
    digests = {file.relative_to(source).as_posix(): sha256(file) for file in read}
    board = tables.leaderboard(metrics)
    manifest = {
        "schema_version": 1,
        "rdiff": version("robustbench-diffaug"),
        "imported": {"format": form, "file": source.name, "sha256": digests or sha256(source)},
        "suite": {"name": str(metrics["suite"].iloc[0]), "digest": "", "seed": None},
        "checkpoints": [{"id": str(name)} for name in metrics["checkpoint"].unique()],
        "denoisers": [],
        "datasets": [],
        "benches": [{"name": str(name)} for name in metrics["bench"].unique()],
        "notices": [NOTICE],
        "failures": [],
        **about,
    }
    places = dict.fromkeys(zip(metrics["bench"].astype(str), metrics["checkpoint"].astype(str), strict=True))
    marks = dict.fromkeys(places, Mark("imported"))
    files = rendered(metrics, board, pd.DataFrame(), manifest, marks=marks)
    return Finished(root, put(root, {name: files[name] for name in FILES}), metrics, board)
