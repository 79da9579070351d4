"""A run folder of figures that another tool made: tables, page and digests as of any run, and no records."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from robustbench_diffaug.files import atomic, sha256
from robustbench_diffaug.report import page, tables

__all__ = ["Imported", "claim", "write"]

FILES = ("metrics.csv", "metrics.parquet", "leaderboard.csv", "manifest.json", "index.html")
NOTICE = "imported: no records, no intervals; the figures are the source's and cannot be computed again"


@dataclass(frozen=True)
class Imported:
    """What is in a folder after an import.

    Arguments:
        root: The folder.
        digest: SHA-256 of its digests.txt, which holds that of every other file.
        metrics: All figures.
        leaderboard: A row for each checkpoint.
    """

    root: Path
    digest: str
    metrics: pd.DataFrame
    leaderboard: pd.DataFrame


def claim(root: Path, source: Path) -> None:
    """Finds that a folder is free for an import: not there, empty, or an earlier import of a file of that name.

    Raises:
        ValueError: If it holds anything else.
    """
    if not root.exists():
        return
    names = {path.name for path in root.iterdir()} if root.is_dir() else {""}
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


def write(root: Path, source: Path, form: str, metrics: pd.DataFrame, about: Mapping[str, Any]) -> Imported:
    """Writes the folder; each file appears whole or not at all, the digests last.

    Arguments:
        root: The folder, found free by `claim`.
        source: The file that the figures are from.
        form: Its format, 'robustbench'.
        metrics: The figures in long form, without intervals.
        about: More of the manifest.
    """
    board = tables.leaderboard(metrics)
    manifest = {
        "schema_version": 1,
        "rdiff": version("robustbench-diffaug"),
        "imported": {"format": form, "file": source.name, "sha256": sha256(source)},
        "suite": {"name": str(metrics["suite"].iloc[0]), "digest": "", "seed": None},
        "checkpoints": [{"id": str(name)} for name in metrics["checkpoint"].unique()],
        "denoisers": [],
        "datasets": [],
        "benches": [{"name": str(name)} for name in metrics["bench"].unique()],
        "notices": [NOTICE],
        "failures": [],
        **about,
    }
    contents = (
        tables.to_csv(metrics),
        tables.to_parquet(metrics),
        tables.to_csv(board),
        json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n",
        page.render(metrics, manifest, pd.DataFrame()).encode(),
    )
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in zip(FILES, contents, strict=True)}
    text = "".join(f"{digests[name]}  {name}\n" for name in sorted(FILES)).encode()
    for name, content in zip((*FILES, "digests.txt"), (*contents, text), strict=True):
        with atomic(root / name) as file:
            file.write(content)
    return Imported(root, hashlib.sha256(text).hexdigest(), metrics, board)
