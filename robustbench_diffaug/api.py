"""rdiff in Python: a suite is run on networks of this process, and its results are data frames."""

import multiprocessing
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from pydantic import BaseModel

from robustbench_diffaug import document, handed, recorded, runs, terminal
from robustbench_diffaug import suite as suites
from robustbench_diffaug.checkpoints.base import forget
from robustbench_diffaug.checkpoints.module import Held
from robustbench_diffaug.component import suggest, trusting
from robustbench_diffaug.downloads import allowing
from robustbench_diffaug.engine import cells
from robustbench_diffaug.flags import device_of
from robustbench_diffaug.handed import Given, Network
from robustbench_diffaug.suite import Bench, Loaded, Suite

__all__ = ["Network", "Result", "load", "report", "run"]

Source: TypeAlias = str | Path | Mapping[str, Any] | Suite
"""A suite: the name of an installed one, the path of a file, what such a file holds, or a value."""


@dataclass(frozen=True)
class Result:
    """What came of a run; notebooks show its leaderboard.

    Arguments:
        root: The run folder, or that of a report.
        leaderboard: A row for each checkpoint: value, `_low`, `_high` and `_rank` of each headline metric.
        metrics: All figures, a row each, as in metrics.csv.
        failures: bench, checkpoint, dataset and reason of what failed; empty where all went well.
        digest: SHA-256 of digests.txt, which is what a paper cites.
        trust: Whether the suite may name code of the user's.
    """

    root: Path
    leaderboard: pd.DataFrame
    metrics: pd.DataFrame
    failures: tuple[Mapping[str, str], ...]
    digest: str
    trust: bool = False

    def records(self, bench: str, checkpoint: str) -> pd.DataFrame:
        """A row for each sample: dataset, sample, label, and the evaluator's columns; arrays where these are such.

        Raises:
            ValueError: If there is no such bench or checkpoint, or it has no records.
        """
        found = recorded.open_run(self.root, trust=self.trust)
        benches = {entry.name: entry for entry in found.bare.benches}
        if bench not in benches:
            raise ValueError(f"no bench is called {bench!r}{suggest(bench, list(benches))}")
        known = [entry.id for entry in benches[bench].chosen(found.bare.checkpoints)]
        if checkpoint not in known:
            raise ValueError(f"no checkpoint of bench {bench} is called {checkpoint!r}{suggest(checkpoint, known)}")
        rows = [
            cell for _, row in cells(found.bare, benches[bench]) for cell in row if cell.checkpoint.id == checkpoint
        ]
        columns = found.archive.read(rows, whole=True).columns
        return pd.DataFrame({name: list(value) if value.ndim > 1 else value for name, value in columns.items()})

    def _repr_html_(self) -> str:
        board, names = self.leaderboard, list(self.leaderboard.columns)
        shown = pd.DataFrame({"checkpoint": board["checkpoint"]} if "checkpoint" in names else {})
        for name in (name for name in names if f"{name}_low" in names):
            triples = board[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False, name=None)
            shown[name] = [
                "" if pd.isna(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in triples
            ]
        failed = "".join(f"<li>{escape(_failed(failure))}</li>" for failure in self.failures)
        table = shown.to_html(index=False, escape=True)
        return f"{table}<p>{escape(str(self.root))}</p>" + (f"<p>failed:</p><ul>{failed}</ul>" if failed else "")


def _failed(failure: Mapping[str, str]) -> str:
    return "{bench} / {checkpoint} / {dataset}: {reason}".format_map(failure)


def load(source: Source, *, trust: bool = False, data_dir: str | Path | None = None) -> Suite:
    """A suite as a value, every default written out.

    Arguments:
        source: Its name, the path of its file, or what such a file holds (relative paths start at the current folder).
        trust: Whether it may name code of the user's, which then runs.
        data_dir: Where relative paths of datasets start.

    Raises:
        ValueError: If something is wrong; one line.
    """
    with _in_python():
        return _loaded(source, {}, trust, (), None, None, data_dir).suite


def run(
    suite: Source,
    checkpoints: Mapping[str, Given] | None = None,
    *,
    output: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
    data_dir: str | Path | None = None,
    device: str = "auto",
    batch: int = 128,
    workers: int = 1,
    compile: bool = False,
    trust: bool = False,
    allow_download: bool = False,
    quiet: bool = False,
) -> Result:
    """Runs what is missing of a suite, then writes metrics and the report; as `rdiff run` does.

    Networks are copied: neither their mode, their weights nor their hooks change. What is finished of a network is
    found again by the digest of its weights and structure.

    Arguments:
        suite: Its name, the path of its file, what such a file holds, or a value.
        checkpoints: More checkpoints by their ids: networks, values, or entries as in a file.
        output: The run folder; default reports/<suite name>.
        limit: At most so many samples of each dataset.
        seed: Of all noise, instead of the suite's.
        settings: 'a.b=value', each replacing what the suite's file or mapping says.
        data_dir: Where relative paths of datasets start.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        batch: Samples read together; changes no result.
        workers: Processes; above 1 the networks must be picklable.
        compile: Whether networks go through torch.compile.
        trust: Whether the suite may name code of the user's, which then runs.
        allow_download: Whether weights of the network may be fetched.
        quiet: Whether no progress is shown.

    Raises:
        ValueError: If something is wrong; one line. What is finished is kept.
    """
    for name, number in (("limit", limit), ("batch", batch), ("workers", workers)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}: needed is at least 1")
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker runs the user's script again
        sys.exit("rdiff: put what the script does under  if __name__ == '__main__':  so that workers can import it")
    held: dict[str, Held] = {}
    with ExitStack() as after:
        after.enter_context(_in_python())
        after.enter_context(_as_it_was())
        after.enter_context(allowing(allow_download))
        after.callback(_forget, held)
        given = {} if checkpoints is None else checkpoints
        loaded = _loaded(suite, given, trust, settings, limit, seed, data_dir, held)
        if workers > 1:
            for id, network in held.items():
                with handed.named(id):
                    network.sendable()
        root = Path(output) if output is not None else Path("reports", loaded.suite.name)
        options = runs.Options(root, device_of(device), batch, workers, trust, compile)
        shown = after.enter_context(terminal.progress(quiet, workers))
        return _result(runs.execute(loaded, options, shown.announce, shown.advance), trust)


FLAGS = {"trust": "trust=True", "set": "settings", "data-dir": "data_dir", "allow-download": "allow_download=True"}


@contextmanager
def _in_python() -> Iterator[None]:
    """Within it messages name arguments where they would name flags of the command."""
    try:
        yield
    except ValueError as error:
        told = re.sub("--([a-z]+(?:-[a-z]+)*)", lambda flag: FLAGS.get(flag[1], flag[1]), str(error))
        if told == str(error):
            raise
        raise ValueError(told) from error


def _forget(held: Mapping[str, Held]) -> None:
    """Frees the memory of networks, also of those that were loaded from them."""
    for network in held.values():
        network.release()
    forget()


@contextmanager
def _as_it_was() -> Iterator[None]:
    """After it torch's settings and generator, which a run sets for the whole process, are the caller's again."""
    kept = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    current = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = flags
        if current is not None:
            torch.cuda.set_device(current)


def report(
    run: Result | str | Path,
    output: str | Path | None = None,
    *,
    settings: Sequence[str] = (),
    formats: Sequence[str] = tuple(runs.FORMATS),
    layouts: Sequence[str] = (),
    trust: bool = False,
) -> Result:
    """Computes metrics, leaderboard and page again from records alone; as `rdiff report` does.

    Arguments:
        run: What `run` returned, or a run folder.
        output: Where the report goes; left out, it replaces that of the run folder.
        settings: 'a.b=value', each of a field that records do not depend on, such as alpha. Needs `output`.
        formats: 'html', 'csv', and elsewhere than in the run folder also 'md', 'latex', 'json'.
        layouts: Tables of a paper, such as 'diffaug-table1'. Needs `output`.
        trust: Whether the folder's suite may name code of the user's, which then runs.

    Raises:
        ValueError: If the folder is no run's, or has nothing of a layout, or a setting would need forwards; one line.
    """
    for word in formats:
        if word not in runs.ASKED:
            raise ValueError(f"no format is called {word!r}{suggest(word, list(runs.ASKED))}")
    root, trusted = (run.root, trust or run.trust) if isinstance(run, Result) else (Path(run), trust)
    place = None if output is None else Path(output)
    with _in_python():
        return _result(runs.report(root, place, tuple(settings), tuple(formats), trusted, tuple(layouts)), trusted)


def _result(done: runs.Finished, trust: bool) -> Result:
    return Result(done.root, done.leaderboard, done.metrics, tuple(done.failures), done.digest, trust)


class _Benches(BaseModel, extra="ignore"):
    """The benches of a suite whose checkpoints are not known yet."""

    benches: tuple[Bench, ...]


def _loaded(
    source: Source,
    given: Mapping[str, Given],
    trust: bool,
    settings: Sequence[str],
    limit: int | None,
    seed: int | None,
    data_dir: str | Path | None,
    held: dict[str, Held] | None = None,
) -> Loaded:
    """A suite with more checkpoints; the networks among them are added to `held`."""
    kept = {} if held is None else held
    start = Path(data_dir) if data_dir is not None else None
    if isinstance(source, str | Path):
        found = suites.load(str(source), trust=trust, settings=settings, limit=limit, seed=seed, data_dir=start)
        entries = handed.entries(given, found.suite.benches, trust, kept)
        whole = _valid({**dict(found.suite), "checkpoints": (*found.suite.checkpoints, *entries)})
        return Loaded(whole, {**_places(whole), **found.places})
    if isinstance(source, Suite):
        if settings:
            raise ValueError("settings are for a suite by name, file or mapping; change the value itself")
        data = dict(source)
    else:
        if not isinstance(source, Mapping):
            raise ValueError(f"suite: needed is a name, a path, a mapping or a Suite, not {type(source).__name__}")
        data = document.unshared({**source})
        for setting in settings:
            document.apply(data, setting)
    context = {"folder": Path.cwd(), "data": start.resolve() if start else None}
    with trusting(trust):
        benches = document.Document(None, data, {}).validate(_Benches, context).benches
        entries = handed.entries(given, benches, trust, kept)
        data["checkpoints"] = [*(data.get("checkpoints") or ()), *entries]
        suite = document.Document(None, data, {}).validate(Suite, context)
    suite = suite if seed is None else _valid({**dict(suite), "seed": seed})
    suite = suite if limit is None else suites.limited(suite, limit)
    return Loaded(suite, _places(suite))


def _valid(fields: Mapping[str, object]) -> Suite:
    return document.Document(None, dict(fields), {}).validate(Suite, {})


def _places(suite: Suite) -> dict[tuple[str, str], str]:
    """What messages call the parts of a suite that stands in no file."""
    places = {("checkpoint", entry.id): f"checkpoint {entry.id}" for entry in suite.checkpoints}
    for bench in suite.benches:
        places["bench", bench.name] = f"bench {bench.name}"
        for index in range(len(bench.datasets)):
            places["bench", f"{bench.name}/{index}"] = f"bench {bench.name}: datasets.{index}"
    return places
