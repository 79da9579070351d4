"""Certificates in the form of the code of Cohen et al. and of DDS, from their files and from a run's votes.

Without votes no radius can be recomputed: an import takes radii as they are printed, and says in findings (see
`cohen_findings`) what cannot be true of them. An export has radii rounded down, and beside them what the form has no
place for.

References:
    Certified Adversarial Robustness via Randomized Smoothing (Cohen et al., 2019),
        https://arxiv.org/abs/1902.02918; code: https://github.com/locuslab/smoothing
    (Certified!!) Adversarial Robustness for Free! (Carlini et al., 2022), https://arxiv.org/abs/2206.10550; code:
        https://github.com/ethz-spylab/diffusion_denoised_smoothing
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from decimal import ROUND_FLOOR, Decimal
from math import isfinite, nan
from pathlib import Path

import pandas as pd

from robustbench_diffaug import rng, stats, summary
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.engine import cells
from robustbench_diffaug.evaluators.certificates import certify
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.evaluators.smoothing_metrics import named
from robustbench_diffaug.exchange import folder
from robustbench_diffaug.exchange.cohen_findings import findings
from robustbench_diffaug.exchange.cohen_rows import COLUMNS, FARTHEST, Protocol, Rows, read
from robustbench_diffaug.files import apart
from robustbench_diffaug.recorded import Archive, open_run
from robustbench_diffaug.records import Metric
from robustbench_diffaug.report import tables
from robustbench_diffaug.runs import Finished
from robustbench_diffaug.store import Cell

__all__ = ["Certified", "Protocol", "export_run", "grid", "import_run", "lines", "metrics"]

STEP = 0.25  # of the radii that papers print
RADII = 40  # so many at most where none are asked for
PLACES = Decimal("0.0001")  # of a radius that is written
NOTICE = "imported: no votes, so radii are the source's and cannot be computed again; intervals are of the images alone"


@dataclass(frozen=True)
class Certified:
    """What came of an import.

    Arguments:
        folder: What is in the run folder.
        findings: What cannot be true of the file, or cannot be known from it.
        summary: How many rows there are, which, and how far their radii go.
    """

    folder: Finished
    findings: tuple[str, ...]
    summary: str


def grid(rows: Rows) -> tuple[float, ...]:
    """The radii at which certified accuracy is given where none are asked for: steps of 1/4 to the largest one."""
    top, step = float(rows.radius.max()), STEP
    while top / step > RADII:
        step *= 2
    return tuple(index * step for index in range(int(top / step) + 1))


def metrics(rows: Rows, protocol: Protocol, radii: Sequence[float], suite: str, checkpoint: str) -> pd.DataFrame:
    """The figures in long form: certified accuracy, as analyze.py has it, abstention, and the average certified radius.

    Intervals are of the images: Clopper and Pearson's of shares, the bootstrap's of the mean radius. What certificates
    may be wrong about, with probability alpha each, is not in them. How many images there could be is not known: NaN.

    Arguments:
        rows: Of a file.
        protocol: How it was made.
        radii: At which certified accuracy is given.
        suite: Its name.
        checkpoint: Its name.
    """
    group, right = f"sigma={protocol.sigma:g}", rows.right
    reach = max(protocol.ceiling, float(rows.radius.max())) or 1.0
    share = stats.mean(right * rows.radius / reach, rng.key(0, "bootstrap", "cohen", group), bounded=True)
    mean = stats.Estimate(share.value * reach, share.low * reach, share.high * reach, share.n)
    figures = [
        Metric(f"certified@{named(radius)}", group, *estimate, headline=radius == protocol.sigma)
        for radius in radii
        for estimate in (stats.exact_proportion(right & (rows.radius >= radius)),)
    ]
    figures.append(Metric("abstain", group, *stats.exact_proportion(rows.predict < 0), better="lower"))
    figures.append(Metric("acr", group, *mean, unit="pixels", headline=True))
    about = {"suite": suite, "bench": "certify", "evaluator": "cohen", "checkpoint": checkpoint, "n_available": nan}
    found = [asdict(figure) | {"metric": figure.name} | about for figure in figures]
    return pd.DataFrame(found, columns=pd.Index(summary.COLUMNS))


def import_run(
    path: Path, root: Path, protocol: Protocol, radii: Sequence[float] = (), checkpoint: str = ""
) -> Certified:
    """Writes a run folder of the figures of a file of certificates; the suite has the folder's name.

    Arguments:
        path: The file.
        root: The folder: not there, empty, or with an earlier import of a file of that name.
        protocol: How it was made.
        radii: At which certified accuracy is given; without any, those of `grid`.
        checkpoint: The name of what was certified; the file's where it is left out.

    Raises:
        ValueError: If the file is no such file, the folder holds other things, or a radius or the name is none.
    """
    rows, name = read(path), _name(checkpoint or path.name.removesuffix(".tsv"))
    for radius in radii:
        if not (isfinite(radius) and 0 <= radius <= FARTHEST):
            raise ValueError(f"--radius {radius:g}: needed is a number in [0, {FARTHEST}]")
    folder.claim(root, path)
    chosen = tuple(sorted(set(radii))) or grid(rows)
    found = findings(rows, protocol, chosen)
    figures = metrics(rows, protocol, chosen, root.resolve().name or "cohen", name)
    about = (
        f"{len(rows.idx):,} rows, idx {rows.idx.min()} to {rows.idx.max()}; the largest radius is "
        f"{rows.radius.max():g} = {rows.radius.max() / protocol.sigma:.2f} sigma"
    )
    more = {"protocol": protocol.stated, "rows": about, "notices": [NOTICE, *found]}
    return Certified(folder.write(root, path, "cohen", figures, more), found, about)


def _name(name: str) -> str:
    """A name that is fit for a checkpoint's."""
    if not name.strip() or len(name) > 120 or not name.isprintable() or name.startswith(tables.FORMULA_STARTS):
        raise ValueError(
            f"{name[:80]!r} is no name of a checkpoint (1 to 120 characters, no formula); give --checkpoint"
        )
    return name


def lines(done: Certified) -> Iterator[str]:
    """What an import found, as lines of text."""
    yield done.summary
    found = done.folder.metrics
    for name, unit, *estimate in found[["metric", "unit", "value", "low", "high"]].itertuples(index=False):
        value, low, high = (float(number) * (100 if unit == "fraction" else 1) for number in estimate)
        yield f"  {name:<16} {value:8.4g}{' %' if unit == 'fraction' else ''}  [{low:.4g}, {high:.4g}]"
    yield from (f"finding: {sentence}" for sentence in done.findings)


def export_run(
    root: Path, path: Path, bench: str = "", settings: Sequence[str] = (), trust: bool = False
) -> list[Path]:
    """Writes the certificates of a run's smoothing bench, a file for each checkpoint and noise level.

    The files are `<checkpoint>/noise_<sigma>.tsv`, or `<checkpoint>/<dataset>/noise_<sigma>.tsv` where the bench has
    several datasets, with radii rounded down to four decimals; `parameters.json` says how they were made. No network is
    called, and weights and images are not read.

    Arguments:
        root: The run folder.
        path: The folder to write: not there, empty, or with an earlier export of the same files.
        bench: Of the run; may be left out where only one is of smoothing.
        settings: 'a.b=value', each of a field that records do not depend on, such as alpha.
        trust: Whether the run's suite may name code of the user's.

    Returns:
        The paths of the tables.

    Raises:
        ValueError: If the run has no such bench, a checkpoint lacks some images, or the folder is not free or lies in
            the run's; nothing is written then.
    """
    apart(root, path)
    found = open_run(root, trust=trust, settings=settings)
    chosen, evaluator = folder.bench_of(root, found.suite, Smoothing, bench)
    (bare,) = (other for other in found.bare.benches if other.name == chosen.name)
    several = len(chosen.parts()) > 1
    contents: dict[Path, bytes] = {}
    for dataset, (_, row) in zip(chosen.parts(), cells(found.bare, bare), strict=True):
        for cell in row:
            for place, sigma, table in _tables(found.archive, cell, evaluator, dataset):
                contents[path / (place if several else place.parent) / f"noise_{named(sigma)}.tsv"] = table
    about = {name: getattr(evaluator, name) for name in ("sigmas", "n0", "n", "alpha")}
    folder.export(path, contents, found, chosen.name, about)
    return list(contents)


def _tables(
    archive: Archive, cell: Cell, evaluator: Smoothing, dataset: Dataset
) -> Iterator[tuple[Path, float, bytes]]:
    """Of each noise level of a cell: the folder of checkpoint and dataset, fit for any file system, level and table."""
    records, files = archive.read([cell]), archive.files(cell)
    left_out, declared = len(archive.skipped(cell)), cell.dataset.declared().n
    who = f"{archive.root}: {cell.checkpoint.id} on {dataset.name}"
    if not len(records) or len(records) + left_out != declared:
        raise ValueError(f"{who} has certificates of {len(records)} of {declared} images; run the suite to its end")
    if (records["label"] < 0).any():
        raise ValueError(f"{who} has images without a label, and the form has no place for them")
    if left_out:  # which positions these have is known from the images alone
        positions = {id: position for position, id in enumerate(dataset.opened().ids)}
        idx = [positions[id] for id in records["sample"].tolist()]
    else:
        idx = [row * dataset.every for first, last, _ in files for row in range(first, last + 1)]
    seconds = sum(float(part.get("seconds", 0)) for part in archive.costs(cell))
    time = timedelta(seconds=round(seconds / len(records) / len(evaluator.sigmas), 6))
    place = Path(*files[0][2].parts[-4:-2])
    for index, sigma in enumerate(evaluator.sigmas):
        found = certify(records["select"][:, index], records["estimate"][:, index], sigma, evaluator.alpha)
        rows = zip(idx, records["label"].tolist(), found.prediction.tolist(), found.radius.tolist(), strict=True)
        body = "".join(
            f"{position}\t{label}\t{predict}\t{_floor(radius)}\t{int(predict == label)}\t{time}\n"
            for position, label, predict, radius in rows
        )
        yield place, sigma, ("\t".join(COLUMNS) + "\n" + body).encode()


def _floor(radius: float) -> Decimal:
    """A radius with four decimals that is never above it; a float is a decimal number, so nothing is rounded before."""
    return Decimal(radius).quantize(PLACES, ROUND_FLOOR)
