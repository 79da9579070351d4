"""A run folder of figures that another tool made: tables, page and digests as of any run, and no records."""

import json
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from robustbench_diffaug.files import sha256
from robustbench_diffaug.report import tables
from robustbench_diffaug.runs import Finished, put, rendered

__all__ = ["claim", "free", "write"]

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
    files = rendered(metrics, board, pd.DataFrame(), manifest)
    return Finished(root, put(root, {name: files[name] for name in FILES}), metrics, board)
