"""A run folder from start to end: check, plan, evaluate, and write what the records say."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from robustbench_diffaug import shares, summary
from robustbench_diffaug.component import look_again
from robustbench_diffaug.document import dump, read
from robustbench_diffaug.engine import Outcome, Task, hardware, lacking, plan
from robustbench_diffaug.executors import Options, threads
from robustbench_diffaug.files import apart, atomic, sha256
from robustbench_diffaug.folder import PICTURES, alone, digests, foreign, put, replaced, vacant
from robustbench_diffaug.gate import gate
from robustbench_diffaug.recorded import LOCK, Recorded, keys_of, listed, open_run
from robustbench_diffaug.report import formats as more_formats
from robustbench_diffaug.report import page, pictures, published, tables
from robustbench_diffaug.report.marks import Mark
from robustbench_diffaug.shards import Shard
from robustbench_diffaug.shown import Shown
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import Loaded, Suite, check

__all__ = [
    "ASKED",
    "FORMATS",
    "KNOWN",
    "Finished",
    "Options",
    "Results",
    "as_json",
    "digests",
    "execute",
    "finish",
    "lock",
    "own",
]
__all__ += ["put", "recorded_failures", "rendered", "report", "results", "tasks_of"]

TABLES = ("metrics.csv", "metrics.parquet", "leaderboard.csv", "costs.csv", "pairs.csv")
FORMATS = {"html": ("index.html",), "csv": TABLES}
"""The files of each format of a run's own report; to the page belongs the folder of pictures."""
ASKED = {**{form: names[0] for form, names in FORMATS.items()}, **more_formats.FILES}
"""All formats that a report elsewhere can have, each with its first file."""
KNOWN = {*more_formats.NAMES, *(name for names in FORMATS.values() for name in names)}
"""All files of reports that depend on their formats."""
DRAWING = ("jinja2", "matplotlib", "pandas", "pyarrow")  # packages on which the bytes of reports depend
UNCOMPUTED = summary.NO_METRICS  # how the reasons of failures begin that are not of a run but of metrics
FOLLOWING = (UNCOMPUTED, summary.NO_PAIRS, summary.NO_PICTURES)  # likewise, of all that follows from records


@dataclass(frozen=True)
class Finished:
    """What is in a run folder at the end.

    Arguments:
        root: The folder.
        digest: SHA-256 of its digests.txt, which holds that of every other file.
        metrics: All figures.
        leaderboard: A row for each checkpoint.
        failures: bench, checkpoint, dataset and reason of each cell that failed; the dataset is 'all' where the
            records are there and their metrics failed.
        computed: The number of tasks that were run.
        partial: What is not there, where the run was one of several shares; then there are no figures yet.
    """

    root: Path
    digest: str
    metrics: pd.DataFrame
    leaderboard: pd.DataFrame
    failures: list[dict[str, str]] = field(default_factory=list)
    computed: int = 0
    partial: str = ""


def lock(suite: Suite) -> bytes:
    """The suite as it was resolved, every default written out."""
    return dump(suite.model_dump(mode="json", serialize_as_any=True))


def own(root: Path, suite: Suite) -> None:
    """Makes the folder this suite's, or finds that it is.

    Raises:
        ValueError: If the folder is another suite's, by name or seed, or holds other things.
    """
    path = root / LOCK
    if path.exists():
        try:
            found = read(path).data
            name, seed = found["name"], found["seed"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged; give another folder with --output") from error
        if (name, seed) != (suite.name, suite.seed):
            raise ValueError(
                f"{root} holds a run of suite {name} with seed {seed}, not of {suite.name} with seed {suite.seed}; "
                "give another folder with --output"
            )
    elif root.exists() and (not root.is_dir() or any(map(foreign, root.iterdir()))) and not path.exists():
        raise ValueError(f"{root} is no run folder and not empty; give another one with --output")


def tasks_of(loaded: Loaded, options: Options) -> list[Task]:
    """What is left to do in a run folder."""
    return list(plan(loaded.suite, Store(options.root), options.limits, options.shard))


def execute(
    loaded: Loaded,
    options: Options,
    announce: Callable[[Sequence[Task], Sequence[str]], None] = lambda tasks, warnings: None,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Finished:
    """Runs what is missing of a suite, then writes metrics and the report; with nothing missing, a no-op.

    Arguments:
        loaded: The suite.
        options: Where and how.
        announce: Told the tasks and the warnings before the first task.
        progress: Told each outcome.

    Raises:
        ValueError: If something is wrong with the suite or the folder; what is finished is kept.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    look_again()
    warnings = check(loaded)
    own(options.root, loaded.suite)
    store, text = Store(options.root), lock(loaded.suite)
    tasks = tasks_of(loaded, options)
    if not tasks and (done := _unchanged(loaded.suite, store, text)):
        return done
    warnings += gate(loaded.suite, tasks, options.limits, options.workers == 1)
    announce(tasks, warnings)
    with atomic(options.root / LOCK) as file:
        file.write(text)
    failures: list[dict[str, str]] = []
    with closing(options.executor(tasks)) as outcomes:
        for outcome in outcomes:
            failures += [failure for failure in _failed(outcome) if failure not in failures]
            progress(outcome)
    about = {
        "device": options.device,
        "compile": options.compile,
        "threads": 1 if options.ray else threads(options.workers),
        "workers": options.workers,
        "hardware": hardware(options.device),
        "trusted": options.trust,
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - clock, 1),
    }
    found = summary.manifest(loaded.suite, store, failures, warnings, about)
    found["versions"] |= {name: version(name) for name in DRAWING}
    found["keys"] = keys_of(loaded.suite)
    if options.shard.count > 1 or shares.several(options.root, found):
        return _write_share(loaded.suite, store, found, options.shard, len(tasks))
    return write(loaded.suite, store, found, failures, len(tasks))


def _write_share(suite: Suite, store: Store, manifest: dict[str, Any], shard: Shard, computed: int) -> Finished:
    """Writes the manifest of a share, beside what others of the same folder have said; figures once all is there."""
    with alone(store.root):
        found = shares.united([*shares.earlier(store.root, manifest), shares.of_shard(manifest, shard)])
        return replace(finish(suite, store, found, lock(suite)), computed=computed)


def finish(suite: Suite, store: Store, manifest: dict[str, Any], text: bytes) -> Finished:
    """Writes the figures of records that several runs have made; only the manifest while samples are missing.

    The caller holds the folder `alone`.

    Arguments:
        suite: What was run.
        store: Its records.
        manifest: That of all runs.
        text: The lock.
    """
    missing = lacking(suite, store)
    failures, partial = shares.standing(manifest, missing), shares.partial(manifest, missing)
    if not partial:
        made = results(suite, store, manifest, failures)
        digest = put(store.root, {LOCK: text, **made.files})
        return Finished(store.root, digest, made.metrics, made.leaderboard, made.failures)
    for name in (name for names in FORMATS.values() for name in names):
        (store.root / name).unlink(missing_ok=True)  # of an earlier run: not of what is there now
    digest = put(store.root, {LOCK: text, "manifest.json": as_json({**manifest, "failures": failures})})
    return Finished(store.root, digest, pd.DataFrame(), pd.DataFrame(), failures, 0, partial)


def as_json(found: Mapping[str, Any]) -> bytes:
    """The bytes of a file of JSON; a lone surrogate in a name does not break its writing."""
    return json.dumps(found, indent=1, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _failed(outcome: Outcome) -> list[dict[str, str]]:
    named = ((outcome.task.cells[index], reason) for index, reason in outcome.failures.items())
    return [
        {"bench": cell.bench, "checkpoint": cell.checkpoint.id, "dataset": cell.dataset.name, "reason": reason}
        for cell, reason in named
    ]


def write(
    suite: Suite, store: Store, manifest: dict[str, object], failures: list[dict[str, str]], computed: int
) -> Finished:
    """Writes metrics, leaderboard, costs, manifest, page and digests from the records of a run folder.

    Metrics that cannot be computed are failures beside those that are given, and stand in the manifest with them.
    """
    with alone(store.root):
        made = results(suite, store, manifest, failures)
        digest = put(store.root, {LOCK: lock(suite), **made.files})
    return Finished(store.root, digest, made.metrics, made.leaderboard, made.failures, computed)


class Results(NamedTuple):
    """What the records of a folder say.

    Arguments:
        metrics: All figures.
        leaderboard: A row for each checkpoint.
        failures: Those that were given, and of metrics that cannot be computed.
        files: The bytes of each file of the report, the manifest among them.
    """

    metrics: pd.DataFrame
    leaderboard: pd.DataFrame
    failures: list[dict[str, str]]
    files: dict[str, bytes]


def results(
    suite: Suite,
    store: Store,
    manifest: Mapping[str, Any],
    failures: Sequence[Mapping[str, str]],
    drawn: bool = True,
) -> Results:
    """All files of a report, from records alone; the same bytes for the same records.

    Arguments:
        suite: Whose records they are.
        store: The records.
        manifest: Of the run.
        failures: Those of the run itself: bench, checkpoint, dataset, reason.
        drawn: Whether the page and the pictures are made, which takes the longest.
    """
    found, costs = summary.metrics(suite, store, drawn), summary.costs(suite, store)
    board = tables.leaderboard(found.metrics, found.pairs)
    told = [dict(failure) for failure in (*failures, *found.failures)]
    said = {"remarks": found.remarks} if found.remarks else {}
    rest = {key: value for key, value in manifest.items() if key != "remarks"}
    about = {**rest, "failures": told, **said}
    files = rendered(found.metrics, board, costs, about, drawn, found.pictures, found.pairs)
    return Results(found.metrics, board, told, files)


def rendered(
    metrics: pd.DataFrame,
    board: pd.DataFrame,
    costs: pd.DataFrame,
    manifest: Mapping[str, Any],
    drawn: bool = True,
    shown: Sequence[Shown] = (),
    pairs: pd.DataFrame | None = None,
    marks: Mapping[tuple[str, str], Mark] | None = None,
) -> dict[str, bytes]:
    """The bytes of each file of a report.

    Arguments:
        metrics: All figures.
        board: A row for each checkpoint.
        costs: Of each cell.
        manifest: What is said of them.
        drawn: Whether the page and the pictures are made.
        shown: The pictures.
        pairs: The tests of checkpoints in pairs, where there are records to test.
        marks: Where figures are from, where they are of several runs or imported.
    """
    facts = {key: value for key, value in manifest.items() if key != "keys"}  # these would tell nobody anything
    files = {
        "metrics.csv": tables.to_csv(metrics),
        "metrics.parquet": tables.to_parquet(metrics),
        "leaderboard.csv": tables.to_csv(board),
        "costs.csv": tables.to_csv(costs),
        "manifest.json": as_json(manifest),
    }
    if pairs is not None:
        files["pairs.csv"] = tables.to_csv(pairs)
    if drawn:
        printed = published.rows(metrics, manifest)
        files["index.html"] = page.render(metrics, facts, costs, shown, pairs, printed, marks).encode()
        files |= {entry.path: pictures.file(entry.picture) for entry in shown}
    return files


def report(
    root: Path,
    output: Path | None = None,
    settings: Sequence[str] = (),
    formats: Sequence[str] = tuple(FORMATS),
    trust: bool = False,
    layouts: Sequence[str] = (),
) -> Finished:
    """Computes metrics, leaderboard and page again from the records of a run folder, without a forward pass.

    Neither weights nor images are read. The suite's lock and the records stay as they are.

    Arguments:
        root: The run folder.
        output: Where the report is written; left out, it replaces that of the run folder.
        settings: 'a.b=value', each of a field that records do not depend on; the report names them. Needs `output`.
        formats: Which of `ASKED`; those of `FORMATS`, where `output` is left out.
        trust: Whether the lock may name code of the user's.
        layouts: Tables of a paper, of `report.layouts.LAYOUTS`. Needs `output`.

    Raises:
        ValueError: If the folder is no run's, or a setting would need forwards, or the output is not free, or the run
            has nothing of a layout.
    """
    found = shares.whole(open_run(root, trust=trust, settings=settings))
    if output is None and (settings or layouts or set(formats) != set(FORMATS)):
        with_ = "--layout" if layouts else "--set or --format"
        raise ValueError(f"a report with {with_} is not the run's own; say where it goes with --output")
    failures = recorded_failures(found.manifest)
    if output is None:
        with alone(root):
            made = results(found.bare, found.archive, found.manifest, failures)
            digest = put(root, made.files)
        return Finished(root, digest, made.metrics, made.leaderboard, made.failures)
    apart(root, output)
    vacant(
        output,
        {"manifest.json", "digests.txt", PICTURES, *KNOWN},
        "report of rdiff report",
        ("manifest.json", "report"),
    )
    made = results(found.bare, found.archive, _retold(found), failures, "html" in formats)
    said = json.loads(made.files["manifest.json"])
    more = more_formats.written(made.metrics, made.leaderboard, said, formats, layouts)
    kept = {"manifest.json", *more, *(name for form in formats for name in FORMATS.get(form, ()))}
    files = {name: content for name, content in made.files.items() if name in kept or name.startswith(f"{PICTURES}/")}
    digest = replaced(output, {**files, **more}, KNOWN)
    return Finished(output, digest, made.metrics, made.leaderboard, made.failures)


def recorded_failures(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    """The failures in a manifest that are of the run itself; those of metrics and pictures follow from records."""
    found = [{str(k): str(v) for k, v in failure.items()} for failure in listed(manifest, "failures")]
    return [failure for failure in found if not failure.get("reason", "").startswith(FOLLOWING)]


def _retold(found: Recorded) -> dict[str, Any]:
    """The manifest of a report: of which run it is, by what settings, and the evaluators as they are now."""
    now = {bench.name: bench.evaluator.model_dump(mode="json", serialize_as_any=True) for bench in found.suite.benches}
    benches = [{**entry, "evaluator": now.get(str(entry.get("name")))} for entry in listed(found.manifest, "benches")]
    told = found.manifest.get("notices")
    notices = [f"computed again from the records with --set {setting}" for setting in found.given]
    listing = found.root / "digests.txt"
    about = {"of": sha256(listing) if listing.is_file() else "", "rdiff": version("robustbench-diffaug")}
    return {
        **found.manifest,
        "benches": benches,
        "notices": [*notices, *(told if isinstance(told, list) else [])],
        "report": about | {"settings": list(found.given)},
    }


def _unchanged(suite: Suite, store: Store, text: bytes) -> Finished | None:
    """What the folder holds, if it is finished (or a share is), of this very suite, and as its digests say."""
    root = store.root
    if not (root / LOCK).exists() or (root / LOCK).read_bytes() != text or not (root / "digests.txt").exists():
        return None
    if (root / "digests.txt").read_bytes() != digests(root):
        return None
    manifest = json.loads((root / "manifest.json").read_bytes())
    if manifest["failures"]:
        return None
    if not (root / "metrics.parquet").exists():
        partial = shares.partial(manifest, lacking(suite, store))
        done = Finished(root, sha256(root / "digests.txt"), pd.DataFrame(), pd.DataFrame(), partial=partial)
        return done if partial else None
    if not (root / "pairs.csv").exists():  # the report is of a version of rdiff that had no tests
        return None
    metrics, pairs = pd.read_parquet(root / "metrics.parquet"), tables.pairs_of((root / "pairs.csv").read_bytes())
    return Finished(root, sha256(root / "digests.txt"), metrics, tables.leaderboard(metrics, pairs))
