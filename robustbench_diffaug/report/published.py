"""Published figures, beside which measured ones are shown where a board has the same data: never ranked, never tested.

They stand in `reports/published/`, a YAML file for each table, with source, protocol and the slips that are known of
them; what is not known is empty. A figure is shown on a board that measured the same metric on the same benchmark, as
far as a manifest tells: by the kinds, names, groups and severities of a bench's datasets, and the number of classes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from functools import cache
from importlib.resources import files
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml
from pydantic import model_validator

from robustbench_diffaug.component import Value, suggest
from robustbench_diffaug.data.corruptions import COMMON, VALIDATION

__all__ = ["COLUMNS", "Publication", "publication", "publications", "rows", "table"]

COLUMNS = (
    "suite bench evaluator checkpoint group metric value low high n n_available better unit complete headline "
    "published printed head source url"
).split()
VARIANTS = re.compile(r"imagenet[-_](?P<variant>sketch|v2|[rsad])\b", re.IGNORECASE)
OUTSIDE = {
    "openood-imagenet": ({"ssb_hard", "ninco"}, {"inaturalist", "textures", "openimage_o"}),
    "openood-cifar10": ({"cifar100", "tin"}, {"mnist", "svhn", "textures", "places365"}),
}
"""The near and the far sets of OpenOOD v1.5."""


class Source(Value):
    """Where figures are from."""

    title: str
    authors: str
    year: int
    url: str
    place: str

    @property
    def text(self) -> str:
        """As a reference."""
        return f"{self.title} ({self.authors}, {self.year}), {self.place}"


class Column(Value):
    """A column of a published table.

    Arguments:
        head: Its heading.
        metric: Our name of it; `{group}` is that of the dataset. Left out, no metric of ours is the same figure.
        data: The benchmark, as `imagenet-c` or `openood-imagenet/near`.
        severities: Of the corruptions.
        unit: Where it is not that of the table.
    """

    head: str
    metric: str = ""
    data: str = ""
    severities: tuple[int, ...] = ()
    unit: str = ""


class Line(Value):
    """A row of a published table.

    Arguments:
        values: As printed, None where it is not known.
        zoo: The bundled network that is trained likewise.
        mode: Of the shift evaluator; empty for the plain network.
    """

    values: tuple[float | None, ...]
    zoo: str = ""
    mode: str = ""


class Averages(Value):
    """Means that are printed beside, over columns (a value for each row) or rows (a value for each column)."""

    values: tuple[float, ...]
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


class Difference(Value):
    """A row less another, as printed."""

    of: str
    less: str
    values: tuple[float, ...]


class Slip(Value):
    """What was printed of a number and what it is by the table's own numbers."""

    row: str
    column: str
    printed: float
    is_: float
    what: str

    @model_validator(mode="before")
    @classmethod
    def _word(cls, data: Any) -> Any:
        return {("is_" if key == "is" else key): value for key, value in data.items()}


class Same(Value):
    """A row of another file whose figures are the same, by column here and there."""

    row: str
    file: str
    other: str
    columns: dict[str, str]


class Publication(Value):
    """A published table.

    Arguments:
        title: What it shows.
        source: Where it stands.
        protocol: How the figures were measured.
        unit: 'percent', or another.
        columns: By key.
        rows: By name.
        averages: Over columns, by name.
        average_rows: Over rows, by name, of every column and then of `averages`.
        differences: Printed ones.
        slips: Printed numbers that are not what the table's own numbers give.
        notes: What a reader must know.
        same_as: Rows of other files with the same figures.
    """

    title: str
    source: Source
    protocol: str
    unit: str
    columns: dict[str, Column]
    rows: dict[str, Line]
    averages: dict[str, Averages] = {}
    average_rows: dict[str, Averages] = {}
    differences: tuple[Difference, ...] = ()
    slips: tuple[Slip, ...] = ()
    notes: tuple[str, ...] = ()
    same_as: tuple[Same, ...] = ()

    @model_validator(mode="after")
    def _whole(self) -> "Publication":
        for name, row in self.rows.items():
            if len(row.values) != len(self.columns):
                raise ValueError(f"row {name} has {len(row.values)} values, the table {len(self.columns)} columns")
        return self

    @property
    def remarks(self) -> tuple[str, ...]:
        """The protocol, the notes and the slips, in sentences."""
        slips = [f"Printed as {s.printed:g} is {s.is_:g}: {s.what}, row {s.row}." for s in self.slips]
        return (f"{self.protocol.rstrip('.')}.", *self.notes, *slips)


def _folder() -> Path:
    package = Path(str(files("robustbench_diffaug")))
    return next(place for place in (package / "published", package.parent / "reports/published") if place.is_dir())


@cache
def publications() -> Mapping[str, Publication]:
    """All published tables, by the name of their files."""
    paths = sorted(_folder().glob("*.yaml"))
    return {path.stem: Publication.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in paths}


def publication(name: str) -> Publication:
    """A published table.

    Raises:
        ValueError: If there is none of that name.
    """
    known = publications()
    if name not in known:
        raise ValueError(f"no published table is called {name!r}{suggest(name, list(known))}")
    return known[name]


def table(name: str) -> pd.DataFrame:
    """The values of a published table as printed, with its averages over columns, by the names of the zoo.

    Arguments:
        name: Of the table, as 'diffaug-table1'.

    Raises:
        ValueError: If there is none of that name.
    """
    found = publication(name)
    index = [row.zoo or name for name, row in found.rows.items()]
    frame = pd.DataFrame([row.values for row in found.rows.values()], index=index, columns=list(found.columns))
    return frame.assign(**{key: list(mean.values) for key, mean in found.averages.items()})


class _Part(NamedTuple):
    """The datasets of a bench that are of a benchmark: the group of their metrics, and their severities."""

    group: str
    severities: tuple[int, ...]


def _part(data: str, datasets: Sequence[Mapping[str, Any]], classes: set[int]) -> _Part | None:
    """What of a bench's datasets is of a benchmark, if anything."""
    benchmark, _, role = data.partition("/")
    if benchmark in OUTSIDE:
        near, far = ({_plain(entry) for entry in datasets if entry.get("group") == group} for group in ("near", "far"))
        alike = near == OUTSIDE[benchmark][0] if role == "near" else far == OUTSIDE[benchmark][1]
        return _Part(role, ()) if alike else None
    corrupted = [e for e in datasets if _severity(e) and e.get("group") not in VALIDATION]
    clean = [e for e in datasets if not _severity(e)]
    if benchmark in ("imagenet-c", "cifar10-c"):
        kind = "imagenet" if benchmark == "imagenet-c" else "cifar-c-part"
        of = {e.get("kind") for e in corrupted} == {kind} and {e.get("group") for e in corrupted} == set(COMMON)
        known = benchmark == "imagenet-c" or classes == {10}
        return _Part("corruptions", tuple(sorted({_severity(e) for e in corrupted}))) if of and known else None
    if benchmark == "cifar10":
        groups = {str(e.get("group")) for e in clean if e.get("kind") == "cifar" and classes == {10}}
    else:
        variant = benchmark.partition("-")[2]
        groups = {str(e.get("group")) for e in clean if e.get("kind") == "imagenet" and _variant(e) == variant}
    return _Part(groups.pop(), ()) if len(groups) == 1 else None


def _severity(entry: Mapping[str, Any]) -> int:
    found = entry.get("severity")
    return found if isinstance(found, int) else 0


def _plain(entry: Mapping[str, Any]) -> str:
    """The name of a set of images out of distribution, as OpenOOD has it."""
    name = str(entry.get("name")).lower().replace("-", "_")
    return "textures" if name == "texture" else name


def _variant(entry: Mapping[str, Any]) -> str:
    """Which set made after ImageNet a dataset is by its name or group; nothing for the validation set."""
    found = VARIANTS.search(f"{entry.get('name')} {entry.get('group')}")
    return found["variant"].lower() if found else ""


def _metric(column: Column, mode: str, part: _Part) -> str:
    """Our name of a column's metric on a bench; empty where the bench has none that is the same."""
    name = f"{mode}/{column.metric}" if mode else column.metric
    if not column.severities or column.severities == part.severities:
        return name.replace("{group}", part.group)
    single = len(column.severities) == 1 and column.severities[0] in part.severities
    return f"{name}@s{column.severities[0]}" if single and name.endswith("accuracy/mean") else ""


def rows(metrics: pd.DataFrame, manifest: Mapping[str, Any]) -> pd.DataFrame:
    """The published figures of metrics that a run has measured on the same benchmark, in the long form of metrics.

    Beside the columns of metrics: `published` (the name of the table), `printed` (the figure as printed), `head` (the
    heading of its column), `source` (title, authors, year, place) and `url`. There are neither intervals nor counts.

    Arguments:
        metrics: The figures of the run.
        manifest: That of the run; its datasets say which benchmarks the benches are.
    """
    benches: dict[str, list[Mapping[str, Any]]] = {}
    for entry in _entries(manifest, "datasets"):
        benches.setdefault(str(entry.get("bench")), []).append(entry)
    classes = {found for entry in _entries(manifest, "checkpoints") if isinstance(found := entry.get("classes"), int)}
    records = metrics.drop_duplicates(["bench", "metric"]).to_dict("records")
    there = {(r["bench"], r["metric"]): {str(key): value for key, value in r.items()} for r in records}
    parts = cache(lambda data, bench: _part(data, benches[bench], classes))

    @cache
    def place(column: Column, mode: str) -> tuple[str, str] | None:
        """The first bench that has measured a column, and the metric."""
        found = ((bench, _metric(column, mode, part)) for bench in benches if (part := parts(column.data, bench)))
        return next((key for key in found if key in there), None)

    made: list[dict[str, Any]] = []
    for name, known in publications().items():
        for line, row in known.rows.items():
            for column, value in zip(known.columns.values(), row.values, strict=True):
                at = place(column, row.mode) if column.metric and value is not None else None
                if value is not None and at:
                    own = {"bench": at[0], "metric": at[1], "checkpoint": line, "published": name}
                    made.append({**there[at], **own, **_figure(value, known, column)})
    return pd.DataFrame(made, columns=pd.Index(COLUMNS))


def _figure(value: float, known: Publication, column: Column) -> dict[str, Any]:
    """A published figure, percentages as fractions."""
    percent = (column.unit or known.unit) == "percent"
    exact = float(Decimal(repr(value)) / 100) if percent else value
    unknown = dict.fromkeys(("low", "high", "n", "n_available"), nan)
    return {
        "value": exact,
        **unknown,
        "complete": True,
        "headline": False,
        "printed": f"{value:g}",
        "head": column.head,
        "source": known.source.text,
        "url": known.source.url,
    }


def _entries(manifest: Mapping[str, Any], key: str) -> Iterable[Mapping[str, Any]]:
    found = manifest.get(key)
    return [entry for entry in found if isinstance(entry, Mapping)] if isinstance(found, list | tuple) else []
