"""RobustBench's accuracies under common corruptions: `unaggregated_results.csv`, a row for each model.

Two rows of headers, of corruptions and of severities, then the model's name and its accuracies as fractions. The file
says neither of which dataset they are nor of how many images (RobustBench has 10,000 of CIFAR, 5,000 of ImageNet). Its
mCE is relative to the row `AlexNet` of the same file, which only that of ImageNet has.

References:
    RobustBench: a standardized adversarial robustness benchmark (Croce et al., 2021),
        https://arxiv.org/abs/2010.09670
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import pyarrow as pa

from robustbench_diffaug.baselines import BASELINES, Baseline, Errors, mce
from robustbench_diffaug.component import suggest
from robustbench_diffaug.exchange import folder
from robustbench_diffaug.files import apart, atomic
from robustbench_diffaug.report import tables
from robustbench_diffaug.runs import Finished

__all__ = ["Results", "export_run", "import_run", "lines", "metrics", "read"]

LARGEST = 2**20  # bytes; RobustBench's files have some 10,000
CORRUPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?")
CELL = r"accuracy/(?!mean@)(?P<corruption>[^/@]+)@s(?P<severity>\d+)"
NEEDED = ["bench", "checkpoint", "metric", "value", "complete"]
OWN = "AlexNet"
"""The row that RobustBench's mCE is relative to."""


@dataclass(frozen=True)
class Results:
    """Accuracies of models under the same corruptions at the same severities.

    Arguments:
        models: By model, corruption and severity, in [0, 1], in the order of the file.
    """

    models: Mapping[str, Mapping[str, Mapping[int, float]]]

    def errors(self, model: str) -> Errors:
        """1 - accuracy of a model."""
        return {c: {s: 1 - accuracy for s, accuracy in row.items()} for c, row in self.models[model].items()}

    def baseline(self, name: str) -> Baseline:
        """A published baseline, or the one that a model of the file is.

        Raises:
            ValueError: If there is neither.
        """
        if name in BASELINES:
            return BASELINES[name]
        if name not in self.models:
            raise ValueError(f"no baseline and no model is called {name!r}{suggest(name, [*BASELINES, *self.models])}")
        return Baseline.of(name, self.errors(name))

    def baselines(self, names: Sequence[str] = ()) -> tuple[Baseline, ...]:
        """Those that are asked for; else the file's AlexNet, if there, under the name of those errors if published."""
        if names or OWN not in self.models:
            return tuple(self.baseline(name) for name in dict.fromkeys(names))
        own = self.baseline(OWN)
        rows, severities = dict(own.errors), own.severities
        known = [e for e in BASELINES.values() if (dict(e.errors), e.severities) == (rows, severities)]
        return (*known, own)[:1]


def read(path: Path) -> Results:
    """The accuracies of a file of RobustBench's.

    Raises:
        ValueError: If it is no such file; the message names the line.
    """
    what, give = "a file of RobustBench's", "the path of RobustBench's unaggregated_results.csv"
    rows = list(folder.rows(path, folder.text(path, LARGEST, what, give)))
    if len(rows) < 3:
        raise ValueError(
            f"{path}: needed are two rows of headers, corruptions and severities, and a row for each model"
        )
    columns = _columns(path, rows[0], rows[1])
    models: dict[str, dict[str, dict[int, float]]] = {}
    for line, row in rows[2:]:
        place = f"{path}:{line}"
        if len(row) != len(columns) + 1:
            raise ValueError(f"{place}: there are {len(row)} cells, and the headers have {len(columns) + 1}")
        name = _model(place, row[0])
        if name in models:
            raise ValueError(f"{place}: there are two rows of model {name}; remove one")
        found = models.setdefault(name, {})
        for (corruption, severity), text in zip(columns, row[1:], strict=True):
            value = _accuracy(f"{place}: {name}, {corruption}@s{severity}", text)
            found.setdefault(corruption, {})[severity] = value
    return Results(models)


def _columns(path: Path, first: tuple[int, list[str]], second: tuple[int, list[str]]) -> tuple[tuple[str, int], ...]:
    """Corruption and severity of each column, each of them once, and every corruption at the same severities."""
    (line, corruptions), (below, severities) = first, second
    if corruptions[0] or severities[0] or len(corruptions) < 2 or len(severities) != len(corruptions):
        raise ValueError(
            f"{path}:{line}: no headers of RobustBench's: an empty cell and corruptions, then an empty cell and "
            "as many severities"
        )
    found: dict[str, set[int]] = {}
    columns = []
    for name, text in zip(corruptions[1:], severities[1:], strict=True):
        if not CORRUPTION.fullmatch(name) or name == "mean":
            raise ValueError(f"{path}:{line}: {name[:80]!r} is no name of a corruption")
        if not re.fullmatch("[1-5]", text):
            raise ValueError(f"{path}:{below}: {text[:80]!r} is no severity, 1 to 5, of {name}")
        if int(text) in found.setdefault(name, set()):
            raise ValueError(f"{path}:{below}: {name} has severity {text} twice")
        found[name].add(int(text))
        columns.append((name, int(text)))
    every = set().union(*found.values())
    for name, known in found.items():
        if lacking := every - known:
            raise ValueError(f"{path}:{below}: {name} lacks severity {min(lacking)}, which other corruptions have")
    return tuple(columns)


def _model(place: str, name: str) -> str:
    """A name that is fit for a checkpoint's."""
    if not name.strip() or len(name) > 120 or not name.isprintable() or name.startswith(tables.FORMULA_STARTS):
        raise ValueError(f"{place}: {name[:80]!r} is no name of a model (1 to 120 characters, and no formula)")
    return name


def _accuracy(place: str, text: str) -> float:
    """The number of a cell."""
    if not NUMBER.fullmatch(text):
        raise ValueError(f"{place}: {text[:80]!r} is no accuracy; needed is a fraction in [0, 1]")
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(f"{place}: {value:g} is no fraction in [0, 1]; divide percentages by 100")
    return value


def metrics(results: Results, name: str, baselines: Iterable[Baseline] = ()) -> pd.DataFrame:
    """The figures in long form: each accuracy, their means, and the mCE relative to each baseline.

    The mean and the mCE are RobustBench's: every corruption and severity weighs the same. There are no intervals, and
    how many images an accuracy is of is not known: both are NaN.

    Arguments:
        results: Of a file.
        name: Of the suite.
        baselines: Relative to what.

    Raises:
        ValueError: If a baseline needs more than there is.
    """
    chosen = tuple(baselines)
    rows = [
        {
            "suite": name, "bench": "corruptions", "evaluator": "robustbench", "checkpoint": model,
            "group": "corruptions", "metric": "", "value": nan, "low": nan, "high": nan, "n": nan, "n_available": nan,
            "better": "higher", "unit": "fraction", "complete": True, "headline": False,
        }
        | figure
        for model in results.models
        for figure in _figures(results, model, chosen)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _figures(results: Results, model: str, baselines: Iterable[Baseline]) -> Iterator[dict[str, Any]]:
    """What is particular to each figure of a model."""
    found = results.models[model]
    for corruption, row in found.items():
        for severity, accuracy in row.items():
            yield {"metric": f"accuracy/{corruption}@s{severity}", "group": corruption, "value": accuracy}
        yield {"metric": f"accuracy/{corruption}", "group": corruption, "value": fmean(row.values())}
    severities = sorted(next(iter(found.values())))
    for severity in severities if len(severities) > 1 else ():
        mean = fmean(row[severity] for row in found.values())
        yield {"metric": f"accuracy/mean@s{severity}", "value": mean}
    mean = fmean(accuracy for row in found.values() for accuracy in row.values())
    yield {"metric": "accuracy/mean", "value": mean, "headline": True}
    for baseline in baselines:
        value = mce(results.errors(model), baseline)
        yield {"metric": f"mce/{baseline.name}", "value": value, "better": "lower", "headline": True}


def import_run(path: Path, root: Path, baselines: Sequence[str] = ()) -> Finished:
    """Writes a run folder of the figures of a file of RobustBench's; the suite has the folder's name.

    Arguments:
        path: The file.
        root: The folder: not there, empty, or with an earlier import of a file of that name.
        baselines: Names of published baselines or of models of the file; without any, the model AlexNet, if there.

    Raises:
        ValueError: If the file is no such file, the folder holds other things, or there is no such baseline.
    """
    results = read(path)
    folder.claim(root, path)
    chosen = results.baselines(baselines)
    found = metrics(results, root.resolve().name or "robustbench", chosen)
    sources = {entry.name: entry.source or f"model {entry.name} of {path.name}" for entry in chosen}
    return folder.write(root, path, "robustbench", found, {"baselines": sources})


def export_run(root: Path, path: Path, bench: str = "") -> list[str]:
    """Writes the accuracies of a run, imported or not, as RobustBench has them; those of the plain network.

    Arguments:
        root: The run folder.
        path: The file to write.
        bench: Of the run; may be left out where only one has corruptions.

    Returns:
        The names of the models.

    Raises:
        ValueError: If the run has no such accuracies, or a checkpoint lacks some, or the file would lie in the run.
    """
    apart(root, path)
    found = _accuracies(root)
    benches = list(found["bench"].unique())
    if bench:
        found = found[found["bench"] == bench]
    elif len(benches) > 1:
        raise ValueError(f"{root} has several benches of corruptions; name one with --bench: {', '.join(benches)}")
    if found.empty:
        raise ValueError(f"{root} has no accuracies under corruptions" + (f" in bench {bench}" if bench else ""))
    columns = list(dict.fromkeys(zip(found["corruption"], found["severity"], strict=True)))
    rows = [["", *(corruption for corruption, _ in columns)], ["", *(severity for _, severity in columns)]]
    for model, row in found.groupby("checkpoint", sort=False):
        whole = row[row["complete"].astype(bool) & row["value"].notna()]
        values = dict(zip(zip(whole["corruption"], whole["severity"], strict=True), whole["value"], strict=True))
        for corruption, severity in columns:
            if (corruption, severity) not in values:
                lacking = f"{corruption}@s{severity}"
                raise ValueError(f"{root}: {model} has no complete accuracy under {lacking}; run the suite to its end")
        rows.append([str(model), *(float(values[column]) for column in columns)])
    table = pd.DataFrame(rows[1:], columns=pd.Index(rows[0], dtype=object), dtype=object)
    with atomic(path) as file:
        file.write(tables.to_csv(table))
    return [str(row[0]) for row in rows[2:]]


def _accuracies(root: Path) -> pd.DataFrame:
    """The accuracies of a run at each corruption and severity."""
    source = root / "metrics.parquet"
    if not source.is_file():
        raise ValueError(f"there is no {source}; give the folder of a run that is finished")
    try:
        return tables.matching(pd.read_parquet(source, columns=NEEDED), CELL)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{source} cannot be read as metrics; run the suite again") from error


def lines(board: pd.DataFrame) -> Iterator[str]:
    """The leaderboard as lines of text, in percent to the two digits that RobustBench publishes."""
    width = max(len(str(name)) for name in board["checkpoint"])
    for head in (name for name in board.columns if f"{name}_rank" in board.columns):
        yield f"{head} (%)"
        for name, value in zip(board["checkpoint"], board[head], strict=True):
            yield f"  {name!s:<{width}}  {100 * value:.2f}"
