"""OpenOOD's results read into a run folder: its tables as they are, or figures of its scores, computed again.

From a table alone the figures are the source's. Where the scores of every image are there, all figures and their
intervals are computed from them, and what the tables beside them say is checked against that.

References:
    OpenOOD v1.5: Enhanced Benchmark for Out-of-Distribution Detection (Zhang et al., 2023),
        https://arxiv.org/abs/2306.09301; code: https://github.com/Jingkang50/OpenOOD
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import nan
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd

from robustbench_diffaug import stats, summary
from robustbench_diffaug.detection.curves import figures
from robustbench_diffaug.detection.intervals import RESAMPLES, Placements, Replicates
from robustbench_diffaug.evaluators.ood_metrics import Sheet
from robustbench_diffaug.exchange import folder
from robustbench_diffaug.exchange.openood_files import (
    COLUMNS,
    MEANS,
    NAMES,
    TABLES,
    Scored,
    Table,
    named,
    read_scores,
    read_table,
)
from robustbench_diffaug.records import Better, Declared, Metric, Records
from robustbench_diffaug.runs import Finished

__all__ = ["Found", "Imported", "figures_of", "import_run", "lines"]

BENCHMARKS: dict[str, dict[str, tuple[str, ...]]] = {
    "mnist": {"near": ("notmnist", "fashionmnist"), "far": ("texture", "cifar10", "tin", "places365")},
    "cifar10": {"near": ("cifar100", "tin"), "far": ("mnist", "svhn", "texture", "places365")},
    "cifar100": {"near": ("cifar10", "tin"), "far": ("mnist", "svhn", "texture", "places365")},
}
LARGE = {"near": ("ssb_hard", "ninco"), "far": ("inaturalist", "textures", "openimage_o")}
BENCHMARKS |= {"imagenet": LARGE, "imagenet200": LARGE}
"""OpenOOD's near and far datasets of each in-distribution one."""
OTHERWISE = {"openimage_o": "openimageo"}  # as its evaluator and its configs call the same
SHIFTED = tuple(
    "cifar10c cifar100c cinic10 svhn usps imagenet_v2 imagenet_c imagenet_r imagenet_es "
    "imagenetv2 imagenetc imagenetr imagenetes".split()
)
"""OpenOOD's in-distribution datasets of another look."""

HALF = 0.5e-4 + 1e-9  # of the last digit that a table prints
SCORE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,63}")
RECOMPUTED = "imported: scores of images, and no network; figures are computed from them, intervals are of the images"
SHOWN = 5  # findings of a kind that are written out


@dataclass(frozen=True)
class Imported:
    """What came of an import.

    Arguments:
        folder: What is in the run folder.
        findings: What cannot be true of the files, or cannot be known from them.
        summary: What was read.
    """

    folder: Finished
    findings: tuple[str, ...]
    summary: str


@dataclass
class Found:
    """What files say.

    Arguments:
        figures: Of the score.
        findings: What is wrong with the files.
        notices: What a reader of the figures must know.
        files: Those that were read of a folder, below it.
        summary: What they hold, in a few words.
        about: More for the manifest.
    """

    figures: list[Metric]
    findings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    summary: str = ""
    about: dict[str, object] = field(default_factory=dict)


def import_run(path: Path, root: Path, score: str = "", checkpoint: str = "", id: str = "") -> Imported:
    """Writes a run folder of OpenOOD's figures of one score; the suite has the folder's name.

    Arguments:
        path: A table, or a folder that holds `ood.csv`, or `scores` with array files, or both.
        root: The folder to write: not there, empty, or with an earlier import of a file or folder of that name.
        score: The name of the score; that of the table, or of the folder where the table is called ood or fsood.
        checkpoint: The name of the network; that of the folder above it where it is left out.
        id: The in-distribution test set, where it is not the only labelled one that is none of OpenOOD's shifted ones.

    Raises:
        ValueError: If the files are none of OpenOOD's, the folder holds other things, or a name is none.
    """
    source = path.resolve()
    own, above = _names(source)
    name, network = score or own, checkpoint or above
    if not SCORE.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no name of a score (letters, digits and ._:+-); give one, as --score msp")
    try:
        named("--checkpoint", network)
    except ValueError as error:
        raise ValueError(f"{network[:80]!r} is no name of a checkpoint; give --checkpoint") from error
    folder.claim(root, source)
    found = figures_of(path, name, id)
    about = {"suite": root.resolve().name or "openood", "bench": "ood", "evaluator": "openood", "checkpoint": network}
    rows = [
        asdict(figure) | {"metric": figure.name, "n": figure.n or nan, "n_available": nan} | about
        for figure in found.figures
    ]
    metrics = pd.DataFrame(rows, columns=pd.Index(summary.COLUMNS))
    more = {"score": name, "notices": [*found.notices, *found.findings], **found.about}
    done = folder.write(root, source, "openood", metrics, more, [source / file for file in found.files])
    return Imported(done, tuple(found.findings), found.summary)


def figures_of(path: Path, score: str, id: str = "") -> Found:
    """What files say of one score.

    Arguments:
        path: As in `import_run`.
        score: Its name.
        id: As in `import_run`.

    Raises:
        ValueError: If the files are none of OpenOOD's.
    """
    if (path / "scores").is_dir():
        return _of_scores(path, score, id)
    if id:
        raise ValueError("--id is for a folder with scores; a table says by its rows what is near and far")
    return _of_table(path / TABLES[0] if path.is_dir() else path, score)


def _names(source: Path) -> tuple[str, str]:
    """What a score and a network are called by where their files lie: network/score/ood.csv, or network/score.csv."""
    if source.suffix == ".csv" and source.name not in TABLES:
        return source.stem, source.parent.name
    place = source.parent if source.suffix == ".csv" else source
    return place.name, place.parent.name


def _of_table(path: Path, score: str) -> Found:
    """The figures of a table, as they are."""
    table = read_table(path)
    found = Found([], _means(path, table), [folder.NOTICE])
    accuracies = {line.figures[-1] for line in table.lines.values()}
    if len(accuracies) > 1:
        found.findings.append(f"{path.name}: ACC differs between rows, though all have the same in-distribution images")
    found.figures.append(Metric("accuracy", "id", next(iter(table.lines.values())).figures[-1], n=0, headline=True))
    for line in table.lines.values():
        place = MEANS.get(line.name, line.name)
        estimates = [stats.Estimate(value, nan, nan, 0) for value in line.figures]
        found.figures += [_metric(*pair, score, place) for pair in zip(NAMES[:-1], estimates[:-1], strict=True)]
    runs = [line for line in table.lines.values() if line.spread]
    if runs:
        found.notices.append(f"{path.name} has means over training runs; their standard deviations are no intervals")
        found.about["deviations"] = {line.name: dict(zip(COLUMNS, line.spread or (), strict=True)) for line in runs}
    found.findings += _reversed({name: table.lines[name].figures[1] for name in table.roles})
    found.summary = f"{path.name}: {len(table.of('near'))} near and {len(table.of('far'))} far datasets, no scores"
    return found


def _metric(metric: str, estimate: stats.Estimate, score: str, place: str) -> Metric:
    """A figure under the name that the evaluator gives it."""
    better: Better = "lower" if metric.startswith(("fpr95", "detection_error")) else "higher"
    headline = metric == "auroc" and place in MEANS.values()
    return Metric(f"{metric}/{score}/{place}", place, *estimate, better=better, headline=headline)


def _means(path: Path, table: Table) -> list[str]:
    """Means that are not those of the rows before them; each figure and the mean were rounded."""
    odd = [
        f"{path.name}: {column} of {name} is {100 * value:.2f}, and the mean of its datasets {100 * mean:.2f}"
        for name, role in MEANS.items()
        if name in table.lines
        for index, column in enumerate(COLUMNS)
        for value in (table.lines[name].figures[index],)
        for mean in (fmean(table.lines[dataset].figures[index] for dataset in table.of(role)),)
        if abs(value - mean) > 2 * HALF
    ]
    return _short(odd)


def _reversed(areas: Mapping[str, float]) -> list[str]:
    """Whether the scores look as if they were lower for in-distribution images."""
    if not areas or fmean(areas.values()) >= 0.5:
        return []
    return [
        f"the mean AUROC is {100 * fmean(areas.values()):.2f}, worse than chance: is conf lower for in-distribution "
        "images here? OpenOOD's is higher for them"
    ]


def _short(sentences: Sequence[str]) -> list[str]:
    """The first few of some findings of a kind."""
    more = [f"and {len(sentences) - SHOWN} more such"] if len(sentences) > SHOWN else []
    return [*sentences[:SHOWN], *more]


def _of_scores(path: Path, score: str, id: str) -> Found:
    """Figures of the scores of all images, and what tables say otherwise."""
    scored = {one.name: one for one in read_scores(path)}
    tables = {name: read_table(path / name) for name in TABLES if (path / name).is_file()}
    found = Found([], notices=[RECOMPUTED], files=[*(f"scores/{one.file}" for one in scored.values()), *tables])
    found.findings += [f"{one.name}.npz: {odd}" for one in scored.values() for odd in one.odd]
    inside, shifted = _inside(path, scored, next(iter(tables.values()), None), id)
    known = next(iter(tables.values())).roles if tables else _benchmark(inside.name, scored)
    outside = {name: one for name, one in scored.items() if one is not inside and one not in shifted}
    for name in list(outside):
        if name not in known:
            found.findings.append(f"{name}.npz is left out: no table here says whether it is near or far")
            del outside[name]
    found.findings += [
        f"{name} is {known[name]} and has no scores: there is no mean of these" for name in known.keys() - scored
    ]
    found.findings += _labels(outside.values())
    odd = {one.name for one in (inside, *shifted, *outside.values()) if not np.isfinite(one.conf).all()}
    found.findings += [_infinite(scored[name]) for name in sorted(odd)]
    if inside.name in odd:
        raise ValueError(f"{path}: {_infinite(inside)}; without them there is no figure")
    sound = {role: [o for n, o in outside.items() if known[n] == role and n not in odd] for role in MEANS.values()}
    lacking = {known[name] for name in known if name in odd or name not in scored}
    parts = [inside, *(() if odd & {one.name for one in shifted} else shifted)]
    records = _records(parts[0], parts[1:], sound)
    _measured(found, score, [*parts, *sound["near"], *sound["far"]], records, lacking)
    if not any(figure.name.startswith("auroc") for figure in found.figures):
        raise ValueError(
            f"{path} has no scores of a dataset that is near or far; add its ood.csv, which says which are"
        )
    pools = [[inside], *([parts] if len(parts) > 1 else [])]
    tested = {one.name: one for ones in sound.values() for one in ones}
    found.findings += [odd for name, table in tables.items() for odd in _checked(path / name, table, pools, tested)]
    counts = ", ".join(f"{len(ones)} {role}" for role, ones in sound.items())
    found.summary = f"{len(inside.conf):,} images of {inside.name}, {counts} and {len(shifted)} shifted datasets"
    return found


def _benchmark(name: str, there: Collection[str]) -> dict[str, str]:
    """The roles of OpenOOD's datasets for one of its in-distribution ones."""
    found = {dataset: role for role, names in BENCHMARKS.get(name, {}).items() for dataset in names}
    return {OTHERWISE.get(n, n) if OTHERWISE.get(n) in there else n: role for n, role in found.items()}


def _inside(
    path: Path, scored: Mapping[str, Scored], table: Table | None, id: str
) -> tuple[Scored, tuple[Scored, ...]]:
    """The in-distribution test set, and those of another look."""
    rows = table.roles if table else {}
    labelled = {name: one for name, one in scored.items() if (one.label >= 0).any() and name not in rows}
    for one in labelled.values():
        if count := int((one.label < 0).sum()):
            raise ValueError(
                f"{path}: {one.file} has {count} labels of -1 among {len(one.label)}; needed is all or none"
            )
    names = [id] if id else [name for name in labelled if name not in SHIFTED] or list(labelled)
    if len(names) != 1 or names[0] not in labelled:
        there = ", ".join(labelled) or "none"
        raise ValueError(f"{path}: which is the in-distribution test set? Give it with --id; labelled are {there}")
    (chosen,) = names
    return labelled.pop(chosen), tuple(labelled.values())


def _labels(outside: Iterable[Scored]) -> list[str]:
    """Images that are out of distribution by their table, and have a class."""
    counts = {one.name: int((one.label >= 0).sum()) for one in outside}
    return [f"{name}.npz: {count} labels are not -1, as OpenOOD has them" for name, count in counts.items() if count]


def _infinite(one: Scored) -> str:
    rows = np.flatnonzero(~np.isfinite(one.conf))
    return f"{one.name}.npz: conf is {one.conf[rows[0]]} at row {rows[0]}, and no number in {len(rows)} rows in all"


def _records(inside: Scored, shifted: Sequence[Scored], outside: Mapping[str, Sequence[Scored]]) -> Records:
    """The images as records have them; positions are their names."""
    parts = [("id", inside), *(("csid", one) for one in shifted)]
    parts += [(role, one) for role, ones in outside.items() for one in ones]
    sizes = [len(one.conf) for _, one in parts]
    names, groups = ([*column] for column in zip(*((one.name, role) for role, one in parts), strict=True))
    columns = {
        "dataset": np.repeat(names, sizes),
        "origin": np.repeat(names, sizes),
        "group": np.repeat(groups, sizes),
        "sample": np.concatenate([np.arange(size) for size in sizes]).astype(np.str_),
        "pred": np.concatenate([one.pred for _, one in parts]),
        "label": np.concatenate([one.label for _, one in parts]),
    }
    sets = zip(names, groups, sizes, strict=True)
    return Records(columns, tuple(Declared(name, name, group, 0, size, size) for name, group, size in sets))


def _measured(found: Found, score: str, parts: Sequence[Scored], records: Records, lacking: Collection[str]) -> None:
    """Adds all figures but means over datasets of which some are lacking."""
    conf = np.concatenate([one.conf for one in parts])
    sheet = Sheet(records, {score: conf}, RESAMPLES)
    for role, name in (("id", "accuracy"), ("csid", "accuracy/csid")):
        mask = sheet.rows([role], "group")
        if mask.any():
            share = stats.proportion(sheet.correct[mask])
            found.figures.append(Metric(name, role, *share, headline=role == "id"))
    areas = {}
    for chosen in sheet.sets():
        if chosen.name.removesuffix("-fs") in lacking:
            continue
        area = sheet.area(score, chosen)
        made: dict[str, Placements | Replicates] = {"auroc": area}
        made |= {**sheet.rates(score, chosen), "auoscr": sheet.area(score, chosen, oscr=True)}
        found.figures += [_metric(metric, part.estimate(), score, chosen.name) for metric, part in made.items()]
        if chosen.name not in (*MEANS.values(), "near-fs", "far-fs"):
            areas[chosen.name] = area.value
    found.findings += _reversed(areas)


def _checked(path: Path, table: Table, pools: Sequence[Sequence[Scored]], outside: Mapping[str, Scored]) -> list[str]:
    """What a table says otherwise than the scores; either of the test set or of the full spectrum."""
    if any(line.spread for line in table.lines.values()):
        return [f"{path.name} has means over training runs, which scores of one run cannot give"]
    found = [_differences(path, table, pool, outside) for pool in pools]
    return [*_means(path, table), *(_short(min(found, key=len)) if all(found) else [])]


def _differences(path: Path, table: Table, pool: Sequence[Scored], outside: Mapping[str, Scored]) -> list[str]:
    """The figures of a table that are not those of the scores."""
    conf = np.concatenate([one.conf for one in pool])
    accuracy = float(np.concatenate([one.pred == one.label for one in pool]).mean())
    odd, earlier = [], 0
    for name in table.roles:
        if name not in outside:
            continue
        row = figures(conf, outside[name].conf)
        expected = (row.fpr95_ood_positive, row.auroc, row.aupr_in, row.aupr_out, accuracy)
        for column, said, value in zip(COLUMNS, table.lines[name].figures, expected, strict=True):
            if abs(said - value) <= HALF:
                continue
            earlier += column == "FPR@95" and abs(said - row.fpr95_id_positive) <= HALF
            odd.append(f"{path.name}: {column} of {name} is {100 * said:.2f}, and the scores give {100 * value:.2f}")
    if earlier and earlier == len(odd):
        return [f"{path.name}: FPR@95 has in-distribution images as the positive ones, as before OpenOOD v1.5"]
    return odd


def lines(done: Imported) -> Iterator[str]:
    """What an import found, as lines of text."""
    yield done.summary
    found = done.folder.metrics
    for name, value, low, high in found[["metric", "value", "low", "high"]].itertuples(index=False):
        if name == "accuracy" or name.endswith(("/near", "/far", "/near-fs", "/far-fs")):
            ends = "" if np.isnan(low) else f"  [{100 * low:.2f}, {100 * high:.2f}]"
            yield f"  {name:<40} {100 * value:6.2f} %{ends}"
    yield from (f"finding: {sentence}" for sentence in done.findings)
