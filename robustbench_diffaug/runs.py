"""A run folder from start to end: check, plan, evaluate, and write what the records say."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from robustbench_diffaug import summary
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.component import look_again
from robustbench_diffaug.document import dump
from robustbench_diffaug.engine import Outcome, Task, hardware, plan
from robustbench_diffaug.executors import local, processes, threads
from robustbench_diffaug.files import apart, atomic, sha256
from robustbench_diffaug.folder import PICTURES, alone, digests, put
from robustbench_diffaug.recorded import LOCK, Recorded, keys_of, listed, open_run
from robustbench_diffaug.report import page, pictures, tables
from robustbench_diffaug.shown import Shown
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import Loaded, Suite, check

__all__ = ["FORMATS", "Finished", "Options", "Results", "digests", "execute", "lock", "own", "report", "results"]
__all__ += ["put", "recorded_failures", "rendered", "tasks_of"]

FORMATS = {"html": ("index.html",), "csv": ("metrics.csv", "metrics.parquet", "leaderboard.csv", "costs.csv")}
"""The files of each format of a report; to the page belongs the folder of pictures."""
DRAWING = ("jinja2", "matplotlib", "pandas", "pyarrow")  # packages on which the bytes of reports depend
UNCOMPUTED = summary.NO_METRICS  # how the reasons of failures begin that are not of a run but of metrics


@dataclass(frozen=True)
class Options:
    """How a suite is run; nothing of it changes what is recorded, but the device and `compile`, by rounding.

    Arguments:
        root: The run folder.
        device: 'cpu' or 'cuda[:N]'.
        batch: Samples read together.
        workers: Processes; 1 runs in this one.
        trust: Whether the suite may name code, for the manifest.
        compile: Whether networks go through torch.compile.
    """

    root: Path
    device: str = "cpu"
    batch: int = 128
    workers: int = 1
    trust: bool = False
    compile: bool = False

    @property
    def limits(self) -> Limits:
        """For the engine."""
        return Limits(batch=self.batch, device=self.device, compile=self.compile)


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
    """

    root: Path
    digest: str
    metrics: pd.DataFrame
    leaderboard: pd.DataFrame
    failures: list[dict[str, str]] = field(default_factory=list)
    computed: int = 0


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
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
            name, seed = found["name"], found["seed"]
        except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged; give another folder with --output") from error
        if (name, seed) != (suite.name, suite.seed):
            raise ValueError(
                f"{root} holds a run of suite {name} with seed {seed}, not of {suite.name} with seed {suite.seed}; "
                "give another folder with --output"
            )
    elif root.exists() and (not root.is_dir() or any(map(_foreign, root.iterdir()))) and not path.exists():
        raise ValueError(f"{root} is no run folder and not empty; give another one with --output")


def _foreign(path: Path) -> bool:
    """Whether a file is none that a run leaves in its folder before its lock."""
    return path.name != ".lock" and not (path.name.startswith(".") and path.name.endswith(".part"))


def tasks_of(loaded: Loaded, options: Options) -> list[Task]:
    """What is left to do in a run folder."""
    return list(plan(loaded.suite, Store(options.root), options.limits))


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
    if not tasks and (done := _unchanged(options.root, text)):
        return done
    announce(tasks, warnings)
    with atomic(options.root / LOCK) as file:
        file.write(text)
    executor = local(options.device) if options.workers == 1 else processes(options.device, options.workers)
    failures: list[dict[str, str]] = []
    with closing(executor(tasks)) as outcomes:
        for outcome in outcomes:
            failures += [failure for failure in _failed(outcome) if failure not in failures]
            progress(outcome)
    about = {
        "device": options.device,
        "compile": options.compile,
        "threads": threads(options.workers),
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
    return write(loaded.suite, store, found, failures, len(tasks))


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
    board, told = tables.leaderboard(found.metrics), [dict(failure) for failure in (*failures, *found.failures)]
    said = {"remarks": found.remarks} if found.remarks else {}
    rest = {key: value for key, value in manifest.items() if key != "remarks"}
    files = rendered(found.metrics, board, costs, {**rest, "failures": told, **said}, drawn, found.pictures)
    return Results(found.metrics, board, told, files)


def rendered(
    metrics: pd.DataFrame,
    board: pd.DataFrame,
    costs: pd.DataFrame,
    manifest: Mapping[str, Any],
    drawn: bool = True,
    shown: Sequence[Shown] = (),
) -> dict[str, bytes]:
    """The bytes of each file of a report.

    Arguments:
        metrics: All figures.
        board: A row for each checkpoint.
        costs: Of each cell.
        manifest: What is said of them.
        drawn: Whether the page and the pictures are made.
        shown: The pictures.
    """
    facts = {key: value for key, value in manifest.items() if key != "keys"}  # these would tell nobody anything
    files = {
        "metrics.csv": tables.to_csv(metrics),
        "metrics.parquet": tables.to_parquet(metrics),
        "leaderboard.csv": tables.to_csv(board),
        "costs.csv": tables.to_csv(costs),
        "manifest.json": json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n",
    }
    if drawn:
        files["index.html"] = page.render(metrics, facts, costs, shown).encode()
        files |= {entry.path: pictures.file(entry.picture) for entry in shown}
    return files


def report(
    root: Path,
    output: Path | None = None,
    settings: Sequence[str] = (),
    formats: Sequence[str] = tuple(FORMATS),
    trust: bool = False,
) -> Finished:
    """Computes metrics, leaderboard and page again from the records of a run folder, without a forward pass.

    Neither weights nor images are read. The suite's lock and the records stay as they are.

    Arguments:
        root: The run folder.
        output: Where the report is written; left out, it replaces that of the run folder.
        settings: 'a.b=value', each of a field that records do not depend on; the report names them. Needs `output`.
        formats: Which of `FORMATS`; all, where `output` is left out.
        trust: Whether the lock may name code of the user's.

    Raises:
        ValueError: If the folder is no run's, or a setting would need forwards, or the output is not free.
    """
    found = open_run(root, trust=trust, settings=settings)
    if output is None and (settings or set(formats) != set(FORMATS)):
        raise ValueError("a report with --set or --format is not the run's own; say where it goes with --output")
    failures = recorded_failures(found.manifest)
    if output is None:
        with alone(root):
            made = results(found.bare, found.archive, found.manifest, failures)
            digest = put(root, made.files)
        return Finished(root, digest, made.metrics, made.leaderboard, made.failures)
    _free(root, output)
    made = results(found.bare, found.archive, _retold(found), failures, "html" in formats)
    kept = {"manifest.json", *(name for form in formats for name in FORMATS[form])}
    for name in {name for names in FORMATS.values() for name in names} - kept:
        (output / name).unlink(missing_ok=True)  # of an earlier report with other formats
    files = {name: content for name, content in made.files.items() if name in kept or name.startswith(f"{PICTURES}/")}
    digest = put(output, files)
    return Finished(output, digest, made.metrics, made.leaderboard, made.failures)


def recorded_failures(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    """The failures in a manifest that are of the run itself; those of metrics and pictures follow from records."""
    found = [{str(k): str(v) for k, v in failure.items()} for failure in listed(manifest, "failures")]
    return [failure for failure in found if not failure.get("reason", "").startswith((UNCOMPUTED, summary.NO_PICTURES))]


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


def _free(root: Path, output: Path) -> None:
    """Finds that a folder may hold a report: it is new, empty, or holds an earlier one."""
    apart(root, output)
    if not output.exists():
        return
    names = {path.name for path in output.iterdir() if _foreign(path)} if output.is_dir() else {""}
    known = {"manifest.json", "digests.txt", PICTURES, *(name for files in FORMATS.values() for name in files)}
    if names and not (names <= known and _is_report(output / "manifest.json")):
        raise ValueError(f"{output} is not empty and holds no report of rdiff report; give another --output")


def _is_report(path: Path) -> bool:
    try:
        return "report" in json.loads(path.read_bytes())
    except (ValueError, OSError, TypeError):
        return False


def _unchanged(root: Path, text: bytes) -> Finished | None:
    """What the folder holds, if it is finished, of this very suite, and as its digests say."""
    if not (root / LOCK).exists() or (root / LOCK).read_bytes() != text or not (root / "digests.txt").exists():
        return None
    if (root / "digests.txt").read_bytes() != digests(root):
        return None
    manifest = json.loads((root / "manifest.json").read_bytes())
    if manifest["failures"]:
        return None
    metrics = pd.read_parquet(root / "metrics.parquet")
    return Finished(root, sha256(root / "digests.txt"), metrics, tables.leaderboard(metrics))
