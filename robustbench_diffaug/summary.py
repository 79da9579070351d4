"""Metrics, costs and provenance of a run folder, from its records and its suite alone."""

import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from math import prod
from typing import Any, NamedTuple, TypeAlias

import pandas as pd

from robustbench_diffaug import reading, resamples
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.engine import cells, reason
from robustbench_diffaug.files import Weights
from robustbench_diffaug.pairs import Pairs
from robustbench_diffaug.prefetch import ahead
from robustbench_diffaug.records import Metric, Records
from robustbench_diffaug.shown import Shown, shown
from robustbench_diffaug.state import shapes
from robustbench_diffaug.store import Cell, Store
from robustbench_diffaug.suite import Bench, Suite

__all__ = ["COLUMNS", "NO_METRICS", "NO_PAIRS", "NO_PICTURES", "Told", "costs", "counted", "manifest", "metrics"]

Figures: TypeAlias = Mapping[str, Sequence[Metric]]
"""Metrics by the id of the checkpoint."""

COLUMNS = (
    "suite bench evaluator checkpoint group metric value low high n n_available better unit complete headline".split()
)
NO_METRICS, NO_PICTURES = "its metrics cannot be computed", "its pictures cannot be drawn"
NO_PAIRS = "its figures cannot be tested in pairs"
LISTED = 10  # images that a notice names
PACKAGES = ("robustbench-diffaug", "torch", "timm", "diffusers", "numpy", "scipy", "statsmodels", "pillow")


class Told(NamedTuple):
    """What the records of a run say.

    Arguments:
        metrics: All figures in long form, with the columns `COLUMNS`.
        failures: Of each checkpoint of a bench whose records are there and whose metrics or pictures failed: bench,
            checkpoint, dataset 'all', and the reason.
        remarks: What evaluators say that a reader must know.
        pictures: What there is to see.
        pairs: The tests of checkpoints in pairs, with the columns `pairs.COLUMNS`.
    """

    metrics: pd.DataFrame
    failures: list[dict[str, str]]
    remarks: list[str]
    pictures: list[Shown]
    pairs: pd.DataFrame


def metrics(suite: Suite, store: Store, pictures: bool = True) -> Told:
    """All figures and pictures of a run, what an evaluator could make none of, and what it remarks.

    Arguments:
        suite: What was run.
        store: Its records.
        pictures: Whether those are made.

    Raises:
        ValueError: If records are damaged.
    """
    rows: list[dict[str, Any]] = []
    failures, remarks, drawn, tests = [], list[str](), list[Shown](), Pairs()
    for bench in suite.benches:
        with resamples.remembering():  # checkpoints share the resamples of a bench
            columns = {entry.id: column for entry, column in _by_checkpoint(suite, bench)}
            read = _reader(bench, store, columns)
            compared, odd = _compared(bench, read, tuple(columns))
            if odd:
                failures.append(_failure(bench, "all", odd))
            for id, records in ahead((id, read(id)) for id in columns):
                reading.begin(f"figures of {bench.name}, {id}")
                named = {"suite": suite.name, "bench": bench.name, "evaluator": bench.evaluator.kind, "checkpoint": id}
                try:
                    found = _figures(bench, records, compared.get(id, []))
                    rows += [asdict(figure) | {"metric": figure.name} | named for figure in found]
                    remarks += [f"{bench.name}, {id}: {remark}" for remark in bench.evaluator.notices(records)]
                except Exception as error:  # whatever the evaluator raises costs no other checkpoint its figures
                    failures.append(_failure(bench, id, reason(error)))
                    found = []
                try:
                    if found:
                        tests.add(bench.name, id, found, bench.evaluator.outcomes(records))
                except Exception as error:  # nor any figure
                    failures.append(_failure(bench, id, reason(error), NO_PAIRS))
                try:
                    drawn += list(shown(bench.name, id, bench.evaluator.pictures(records) if pictures else ()))
                except Exception as error:  # nor any metrics
                    failures.append(_failure(bench, id, reason(error), NO_PICTURES))
    return Told(pd.DataFrame(rows, columns=pd.Index(COLUMNS)), failures, remarks, drawn, tests.table())


def _reader(bench: Bench, store: Store, columns: Mapping[str, tuple[Cell, ...]]) -> Callable[[str], Records]:
    """Reads the records of a checkpoint; those whose heavy columns stay in files are kept."""
    held: dict[str, Records] = {}

    def read(id: str) -> Records:
        if not bench.evaluator.heavy:
            return store.read(columns[id])
        if id not in held:
            held[id] = store.read(columns[id])
        return held[id]

    return read


def _failure(bench: Bench, checkpoint: str, why: str, what: str = NO_METRICS) -> dict[str, str]:
    return {
        "bench": bench.name,
        "checkpoint": checkpoint,
        "dataset": "all",
        "reason": f"{what}: {why}",
    }


def _compared(bench: Bench, read: Callable[[str], Records], ids: Sequence[str]) -> tuple[Figures, str]:
    """The figures that need the records of several checkpoints, by checkpoint, and why there are no more, if so."""
    found: dict[str, list[Metric]] = {}
    try:
        for id, figure in bench.evaluator.compare(ids, read):
            found.setdefault(id, []).append(figure)
    except Exception as error:  # damaged records among it: reading them again will say so
        return found, reason(error)
    return found, ""


def _figures(bench: Bench, records: Records, compared: Sequence[Metric]) -> list[Metric]:
    """What an evaluator makes of one checkpoint's records, and what these rest on; nothing of no records."""
    if not len(records):
        return []
    found = [*bench.evaluator.metrics(records), *compared, *_forwards(bench, len(records))]
    for figure in found:
        if not isinstance(figure, Metric):
            raise TypeError(
                f"the evaluator {bench.evaluator.kind} yields a {type(figure).__name__}, which is no Metric"
            )
    for (name, group), count in Counter((figure.name, figure.group) for figure in found).items():
        if count > 1:  # tables have one place for them
            raise ValueError(f"the evaluator {bench.evaluator.kind} gives two metrics {name} of the group {group}")
    return found


def _by_checkpoint(suite: Suite, bench: Bench) -> Iterable[tuple[Checkpoint, tuple[Cell, ...]]]:
    rows = [row for _, row in cells(suite, bench)]
    return zip(bench.chosen(suite.checkpoints), zip(*rows, strict=True), strict=True)


def _forwards(bench: Bench, samples: int) -> list[Metric]:
    """What the records of a checkpoint rest on: passes through the denoiser, shared ones too, and through itself."""
    each = bench.evaluator.forwards().of(1, 1)
    counts = {"forwards/denoiser": each.denoiser, "forwards/classifier": each.classifier}
    counts |= {"backwards/denoiser": each.backward} if each.backward else {}
    return [
        Metric(name, "cost", float(samples * count), n=samples, better="lower", unit="count")
        for name, count in counts.items()
    ]


def costs(suite: Suite, store: Store) -> pd.DataFrame:
    """Seconds, throughput and peak memory of each cell.

    `denoising_seconds` are the cell's share of what making the views took, `classifying_seconds` its own, and `seconds`
    both and its share of reading the images and keeping the rows.
    """
    rows = []
    for bench in suite.benches:
        for dataset, row in cells(suite, bench):
            for cell in row:
                named = {"bench": bench.name, "checkpoint": cell.checkpoint.id, "dataset": dataset.name}
                rows.append(named | _cost(store.costs(cell)))
    return pd.DataFrame(rows)


def _cost(parts: Sequence[Mapping[str, Any]]) -> dict[str, int | float]:
    """What a cell cost, from what its ranges did."""
    samples = sum(int(part["samples"]) - int(part.get("skipped", 0)) for part in parts)
    seconds = sum(float(part.get("seconds", 0)) for part in parts)
    denoising = sum(sum(part.get("views", {}).values()) / part.get("shared_by", 1) for part in parts)
    classifying = sum(float(part.get("classifying_seconds", 0)) for part in parts)
    memory = max((float(part.get("peak_memory_mb", 0)) for part in parts), default=0.0)
    return {
        "samples": samples,
        "seconds": round(seconds, 3),
        "samples_per_second": round(samples / seconds, 2) if seconds else 0.0,
        "peak_memory_mb": round(memory, 1),
        "seconds_per_image": round(seconds / samples, 6) if samples else 0.0,
        "denoising_seconds": round(denoising, 3),
        "classifying_seconds": round(classifying, 3),
    }


def manifest(
    suite: Suite,
    store: Store,
    failures: Sequence[Mapping[str, str]],
    warnings: Sequence[str],
    run: Mapping[str, object],
) -> dict[str, Any]:
    """Who ran what, on what and with what.

    Arguments:
        suite: What was run.
        store: Its records.
        failures: What failed in this run: bench, checkpoint, dataset (or 'all'), reason.
        warnings: What `check` warned of.
        run: Of this run: started, finished, seconds, device, threads, trust.
    """
    datasets, notices = [], list(warnings)
    for bench in suite.benches:
        for dataset, row in cells(suite, bench):
            declared = dataset.declared()
            about = {"bench": bench.name, "kind": dataset.kind, **asdict(declared), "digest": dataset.contents()}
            datasets.append(about | {"constants": getattr(dataset, "constants", "")})
            notices += _left_out(bench, dataset, row, store)
    spent, told = counted(suite, store)
    return {
        "schema_version": 1,
        "rdiff": version("robustbench-diffaug"),
        "suite": {"name": suite.name, "digest": suite.digest, "seed": suite.seed},
        **run,
        "seconds": {"cells": spent, "last_run": run.get("seconds", 0)},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "platform": f"{sys.platform} {platform.machine()}",
        "checkpoints": [_checkpoint(entry) for entry in suite.checkpoints],
        "denoisers": _denoisers(suite),
        "datasets": datasets,
        "benches": [_bench(bench) for bench in suite.benches],
        "notices": notices + told,
        "failures": list(failures),
    }


def counted(suite: Suite, store: Store) -> tuple[float, list[str]]:
    """The seconds that all records took, and the notices that follow from what is there.

    Arguments:
        suite: What was run.
        store: Its records.
    """
    spent, told, devices = 0.0, list[str](), set[str]()
    for bench in suite.benches:
        for dataset, row in cells(suite, bench):
            wanted = dataset.declared().n
            for cell in row:
                parts = store.costs(cell)
                spent += sum(float(str(part.get("seconds", 0))) for part in parts)
                devices |= {_made_on(part) for part in parts if "device" in part}
                if (done := sum(int(str(part["samples"])) for part in parts)) < wanted:
                    told.append(f"{bench.name}: {cell.checkpoint.id} has {done} of {wanted} samples of {dataset.name}")
    if len(devices) > 1:
        named = "; ".join(sorted(devices))
        told.append(f"records were made on different devices or versions ({named}): last digits may differ")
    return round(spent, 3), told


def _left_out(bench: Bench, dataset: Dataset, row: Sequence[Cell], store: Store) -> list[str]:
    """Says which images of a dataset could not be read, if any; they are the same for every checkpoint."""
    if dataset.on_bad_image == "fail":
        return []
    ids = list(dict.fromkeys(id for cell in row for id, _ in store.skipped(cell)))
    if not ids:
        return []
    named = ", ".join(ids[:LISTED]) + (f" and {len(ids) - LISTED} more" if len(ids) > LISTED else "")
    images = "1 image" if len(ids) == 1 else f"{len(ids)} images"
    were = "was" if len(ids) == 1 else "were"
    return [f"{bench.name}: {images} of {dataset.name} could not be read and {were} left out: {named}"]


def _made_on(part: Mapping[str, object]) -> str:
    """What the last digits of a file of records depend on."""
    more = [str(part["hardware"])] if "hardware" in part else []
    more += ["compiled"] if part.get("compile") else []
    return ", ".join([f"{part.get('device')} with torch {part.get('torch')}", *more])


def _checkpoint(entry: Checkpoint) -> dict[str, Any]:
    about = entry.model_dump(mode="json", serialize_as_any=True) | {"fingerprint": entry.fingerprint}
    weights = getattr(entry, "weights", None)
    if isinstance(weights, Weights):
        about |= {"sha256": weights.contents(), "parameters": _parameters(weights)}
    return about


def _parameters(weights: Weights) -> int:
    """Numbers in a file of weights, without reading them; 0 in files of other kinds, which bring their code."""
    try:
        found = shapes(weights)
    except ValueError:
        return 0
    return sum(map(prod, found.values()))


def _denoisers(suite: Suite) -> list[dict[str, Any]]:
    distinct = dict.fromkeys(denoiser for bench in suite.benches for denoiser in bench.evaluator.denoisers())
    return [
        denoiser.model_dump(mode="json", serialize_as_any=True)
        | {"contents": denoiser.contents(), "fingerprint": denoiser.fingerprint}
        for denoiser in distinct
    ]


def _bench(bench: Bench) -> dict[str, Any]:
    settings = bench.evaluator.model_dump(mode="json", serialize_as_any=True)
    forwards = bench.evaluator.forwards()._asdict()
    return {"name": bench.name, "evaluator": settings, "version": bench.evaluator.version, "forwards": forwards}
