"""The run folders of a board, opened and found whole."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from robustbench_diffaug import shares
from robustbench_diffaug.files import sha256
from robustbench_diffaug.recorded import LOCK, Recorded, manifest_of, open_run
from robustbench_diffaug.summary import COLUMNS
from robustbench_diffaug.verify.files import listing

__all__ = ["Folder", "open_folders"]

LONGEST = 40  # characters of a label
MOST = 1_000_000  # figures of an import; more are none of ours
TEXTS = ("suite", "bench", "evaluator", "checkpoint", "group", "metric", "better", "unit")
NUMBERS = ("value", "low", "high", "n", "n_available")


@dataclass(frozen=True, eq=False)
class Folder:
    """A run folder, whose files are as its digests say.

    Arguments:
        root: As it was given.
        label: What the board calls it: the name of the folder, and the beginning of its digest where two are alike.
        digest: SHA-256 of its digests.txt.
        manifest: Of the run.
        run: Its lock and records; None of an import, which has neither.
    """

    root: Path
    label: str
    digest: str
    manifest: Mapping[str, Any]
    run: Recorded | None

    @cached_property
    def imported(self) -> pd.DataFrame:
        """The figures of an import in long form.

        Raises:
            ValueError: If they are damaged.
        """
        path = self.root / "metrics.parquet"
        try:
            table = pq.read_table(path)
            if table.column_names != COLUMNS or not 0 < len(table) <= MOST:
                raise ValueError(f"it has {len(table)} rows, and its columns are not those of metrics")
            for name in COLUMNS:
                kind, column = table.schema.field(name).type, table[name]
                number = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)
                text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
                right = text if name in TEXTS else number if name in NUMBERS else pa.types.is_boolean(kind)
                if not right or (name not in NUMBERS and column.null_count):
                    raise ValueError(f"column {name} is of {kind}, with {column.null_count} empty cells")
            if not {*table["better"].to_pylist()} <= {"higher", "lower"}:
                raise ValueError("column better has other words than higher and lower")
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}; import the figures again") from error
        frame: pd.DataFrame = table.to_pandas(ignore_metadata=True).astype(dict.fromkeys(NUMBERS, "float64"))
        return frame


def open_folders(roots: Sequence[Path], settings: Sequence[str], trust: bool) -> list[Folder]:
    """Opens run folders, in the order of their labels and digests, whatever the order in which they are given.

    Arguments:
        roots: The folders.
        settings: 'a.b=value', each of a field that records do not depend on, for every run that has records.
        trust: Whether locks may name code of the user's.

    Raises:
        ValueError: If a folder is given twice, is no finished run, or of another schema, or its files are not as its
            digests say.
    """
    there: dict[Path, Path] = {}
    for root in roots:
        if (path := root.resolve()) in there:
            same = "is given twice" if root == there[path] else f"is the folder {there[path]} once more"
            raise ValueError(f"{root} {same}; give each run once")
        there[path] = root
    found = [_open(root, settings, trust) for root in roots]
    digests: dict[str, Folder] = {}
    for each in found:
        if each.digest in digests:
            raise ValueError(f"{each.root} and {digests[each.digest].root} are copies of one run; give one of them")
        digests[each.digest] = each
    names = [each.label for each in found]
    told = [_told(each) if names.count(each.label) > 1 else each for each in found]
    return sorted(told, key=lambda each: (each.label, each.digest))


def _told(folder: Folder) -> Folder:
    """A folder whose name another has too."""
    label = f"{folder.label}~{folder.digest[:8]}"
    return Folder(folder.root, label, folder.digest, folder.manifest, folder.run)


def _open(root: Path, settings: Sequence[str], trust: bool) -> Folder:
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; give the folder of a run, such as reports/quickstart")
    manifest, run = manifest_of(root), None
    if "imported" not in manifest or (root / LOCK).exists():
        run = shares.whole(open_run(root, trust=trust, settings=settings))
    whole = listing(root)
    if whole.state != "ok":
        said = whole.details[0] if whole.details else whole.said
        raise ValueError(f"{root} is damaged: {said}; rdiff verify {root} says all that is wrong")
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", root.resolve().name)[:LONGEST]
    return Folder(root, name or "run", sha256(root / "digests.txt"), manifest, run)
