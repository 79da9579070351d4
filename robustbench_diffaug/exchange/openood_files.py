"""Files that OpenOOD leaves: `ood.csv`, a row for each dataset, and `scores/<dataset>.npz`, a number for each image.

The table is `dataset,FPR@95,AUROC,AUPR_IN,AUPR_OUT,ACC` in percent, with the row `nearood` after the near datasets and
`farood` after the far ones: means over them, each with the same weight. The script eval_ood.py leaves the head of the
first column empty, and prints the mean over training runs and their standard deviation, '92.35 ± 0.10'. An array file
has `pred` and `label`, classes, the label -1 out of distribution, and `conf`, higher for in-distribution images.

References:
    OpenOOD v1.5: Enhanced Benchmark for Out-of-Distribution Detection (Zhang et al., 2023),
        https://arxiv.org/abs/2306.09301; code: https://github.com/Jingkang50/OpenOOD
"""

import io
import re
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from robustbench_diffaug.exchange import folder
from robustbench_diffaug.report import tables

__all__ = ["COLUMNS", "MEANS", "NAMES", "TABLES", "Line", "Scored", "Table", "named", "read_scores", "read_table"]

COLUMNS = ("FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT", "ACC")
NAMES = ("fpr95_ood_positive", "auroc", "aupr_in", "aupr_out", "accuracy")
"""The metrics that the columns are; OpenOOD's FPR@95 has out-of-distribution images as the positive ones."""
MEANS = {"nearood": "near", "farood": "far"}
"""The rows of means, and the roles that they are of."""
TABLES = ("ood.csv", "fsood.csv")
"""The table, and that of the full spectrum, where images of another look are in-distribution too."""

LARGEST = 2**20  # bytes of a table, which has ten lines
LARGEST_ARRAY = 2**26  # bytes: 8 million images
MOST_FILES = 256
PERCENT = re.compile(r"(?P<value>[0-9]{1,3}(\.[0-9]{1,12})?)( ± (?P<spread>[0-9]{1,3}(\.[0-9]{1,12})?))?")


class Line(NamedTuple):
    """A row of a table.

    Arguments:
        name: Of the dataset, or 'nearood' or 'farood'.
        figures: In the order of `COLUMNS`, in [0, 1].
        spread: Their standard deviations over training runs, where these are printed.
    """

    name: str
    figures: tuple[float, ...]
    spread: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Table:
    """An `ood.csv`.

    Arguments:
        lines: By name, in the order of the file.
        roles: 'near' or 'far', of each dataset.
    """

    lines: dict[str, Line]
    roles: dict[str, str]

    def of(self, role: str) -> list[str]:
        """The datasets that a mean is over."""
        return [name for name, found in self.roles.items() if found == role]


@dataclass(frozen=True)
class Scored:
    """The scores of one dataset.

    Arguments:
        name: Of the dataset, by the name of the file.
        file: Its name.
        pred: Predicted classes, of shape (n,).
        conf: Scores, of shape (n,), higher for in-distribution images; some may be no finite numbers.
        label: Classes, of shape (n,), -1 out of distribution.
        odd: What is strange about the arrays.
    """

    name: str
    file: str
    pred: NDArray[np.int64]
    conf: NDArray[np.float64]
    label: NDArray[np.int64]
    odd: tuple[str, ...] = ()


def read_table(path: Path) -> Table:
    """Reads a table.

    Raises:
        ValueError: If it is none; one line with file and line number.
    """
    content = folder.text(path, LARGEST, "a table of OpenOOD's", "OpenOOD's ood.csv, or the folder that it is in")
    rows = list(folder.rows(path, content))
    line, head = rows[0] if rows else (1, [])
    if head[:1] not in (["dataset"], [""]) or tuple(head[1:]) != COLUMNS:
        raise ValueError(f"{path}:{line}: no header of OpenOOD's, dataset,{','.join(COLUMNS)}")
    lines: dict[str, Line] = {}
    roles: dict[str, str] = {}
    pending: list[str] = []
    for line, row in rows[1:]:
        found = _line(f"{path}:{line}", row)
        if found.name in lines:
            raise ValueError(
                f"{path}:{line}: names {found.name} a second time, as where a run was repeated into the same folder; "
                "keep the rows of one"
            )
        lines[found.name] = found
        if found.name not in MEANS:
            pending.append(found.name)
            continue
        if not pending:
            raise ValueError(f"{path}:{line}: {found.name} is a mean over the datasets before it, and there are none")
        roles |= dict.fromkeys(pending, MEANS[found.name])
        pending = []
    if pending:
        raise ValueError(f"{path} ends with {pending[-1]}, without the mean after it; let OpenOOD run to its end")
    if not lines:
        raise ValueError(f"{path} has no row of a dataset")
    return Table(lines, roles)


def named(place: object, name: str) -> None:
    """Finds that a name fits a table and a metric.

    Raises:
        ValueError: If it does not.
    """
    if not name.strip() or len(name) > 120 or not name.isprintable() or name.startswith(tables.FORMULA_STARTS):
        raise ValueError(f"{place}: {name[:80]!r} is no name of a dataset (1 to 120 characters, and no formula)")
    if "/" in name or "@" in name:
        raise ValueError(f"{place}: {name[:80]!r} has / or @, which names of metrics are cut at; rename the dataset")
    if name in MEANS.values():
        raise ValueError(f"{place}: {name} is what means are called, and no dataset; rename it")


def _line(place: str, row: list[str]) -> Line:
    """A row of a dataset."""
    name, *cells = row
    named(place, name)
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{place}: {name} has {len(cells)} figures; needed are {', '.join(COLUMNS)}")
    matches = [PERCENT.fullmatch(cell.strip()) for cell in cells]
    for column, cell, match in zip(COLUMNS, cells, matches, strict=True):
        if not match or float(match["value"]) > 100:
            raise ValueError(f"{place}: {column} of {name} is {cell[:80]!r}; needed is a percentage, as 92.35")
    figures = tuple(float(match["value"]) / 100 for match in matches if match)
    spread = tuple(float(match["spread"]) / 100 for match in matches if match and match["spread"])
    return Line(name, figures, spread if len(spread) == len(COLUMNS) else None)


def read_scores(folder: Path) -> list[Scored]:
    """Reads the array files of a folder, in the order of their names; no pickle is run and no size is believed.

    Arguments:
        folder: That holds `scores`.

    Raises:
        ValueError: If there are none, or one is no such file.
    """
    paths = sorted((folder / "scores").glob("*.npz"))
    if not paths:
        raise ValueError(f"{folder / 'scores'} holds no npz file; run OpenOOD with --recorder.save_scores True")
    if len(paths) > MOST_FILES:
        raise ValueError(f"{folder / 'scores'} holds {len(paths)} files; needed is one for each dataset")
    return [_scored(path) for path in paths]


def _scored(path: Path) -> Scored:
    name = unquote(path.stem)
    named(path, name)
    if name in MEANS:
        raise ValueError(f"{path}: {name} is a mean in OpenOOD's tables, and no dataset; rename the file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry.filename for entry in archive.infolist()]
            if sorted(names) != ["conf.npy", "label.npy", "pred.npy"]:
                raise ValueError(f"it has {', '.join(names[:6])}; needed are pred, conf and label")
            found = {key: _array(archive, key) for key in ("pred", "conf", "label")}
        if len({len(array) for array in found.values()}) > 1 or not len(found["conf"]):
            sizes = ", ".join(f"{len(array)} {key}" for key, array in found.items())
            raise ValueError(f"it has {sizes}; needed is one of each for every image")
        odd = tuple(filter(None, (_odd(key, array) for key, array in found.items())))
        pred, label = (_classes(key, found[key]) for key in ("pred", "label"))
    except Exception as error:  # whatever a damaged or hostile file makes zipfile and numpy raise
        raise ValueError(f"{path} is no file of scores: {' '.join(str(error).split())[:300]}") from error
    if label.min() < -1:
        raise ValueError(f"{path} is no file of scores: a label is {label.min()}; needed are classes, and -1 for none")
    return Scored(name, path.name, pred, found["conf"].astype(np.float64), label, odd)


def _array(archive: zipfile.ZipFile, key: str) -> NDArray[np.number]:
    """An array of numbers; its size is that of the bytes that are there."""
    entry = archive.getinfo(f"{key}.npy")
    if entry.file_size > LARGEST_ARRAY:
        raise ValueError(f"{key} would have {entry.file_size:,} bytes unpacked; at most {LARGEST_ARRAY:,} are read")
    with archive.open(entry) as member:
        content = io.BytesIO(member.read(LARGEST_ARRAY + 1))
    version = np.lib.format.read_magic(content)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(content)
    left = len(content.getbuffer()) - content.tell()
    if dtype.kind not in "iufb" or dtype.itemsize > 8:
        raise ValueError(f"{key} holds {dtype}; needed are numbers")
    if len(shape) != 1 or prod(shape) * dtype.itemsize != left:
        raise ValueError(f"{key} says it has the shape {shape} of {dtype}, and holds {left} bytes; needed is (n,)")
    return np.frombuffer(content.getbuffer()[content.tell() :], dtype).astype(dtype.newbyteorder("="))


def _odd(key: str, array: NDArray[np.number]) -> str:
    """What is strange about the type of an array; nothing of those that OpenOOD writes."""
    usual = ("float32", "float64") if key == "conf" else ("int64", "int32")
    return "" if array.dtype.name in usual else f"{key} is {array.dtype.name}, where OpenOOD has {usual[0]}"


def _classes(key: str, array: NDArray[np.number]) -> NDArray[np.int64]:
    """Classes as integers; the largest number of an unsigned type is a -1 that was stored in it."""
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.floor(array)) & (abs(array) < 2**31)).all():
        raise ValueError(f"{key} has what is no class")
    whole = array.astype(np.int64)
    return np.where(array == 256**array.dtype.itemsize - 1, -1, whole) if array.dtype.kind == "u" else whole
