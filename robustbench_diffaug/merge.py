"""Run folders of one suite, made on several machines, become one."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from robustbench_diffaug import shares
from robustbench_diffaug.engine import cells
from robustbench_diffaug.files import atomic, sha256
from robustbench_diffaug.folder import alone
from robustbench_diffaug.protocols import differing, is_path
from robustbench_diffaug.recorded import LOCK, Recorded, open_run
from robustbench_diffaug.runs import Finished, finish, own
from robustbench_diffaug.store import CONSTANTS, Cell
from robustbench_diffaug.suite import Suite
from robustbench_diffaug.summary import counted
from robustbench_diffaug.verify.files import listing

__all__ = ["merge"]

LISTING, JOURNAL, RECORDS = "digests.txt", ".merging", "records/"
SAME = ("schema_version", "keys")


@dataclass(frozen=True)
class _File:
    """A file of records in one of the folders."""

    path: Path
    name: str


def merge(roots: Sequence[Path], output: Path, trust: bool = False) -> Finished:
    """Unites run folders: the records of all, and figures of them once no sample is missing.

    Records are copied as they are. The result depends neither on the order of the folders nor on how often one is
    merged; a merge that is stopped can be started again, and `rdiff run` continues what was merged.

    Arguments:
        roots: Run folders of the same suite.
        output: The folder of the result, which may be one of them, or that of an earlier merge.
        trust: Whether the locks may name code of the user's.

    Raises:
        ValueError: If a folder is damaged, or of another suite, seed or version of records, or a sample was recorded
            twice with other results. Then nothing was written.
    """
    before = _listing(output)
    given = {root.resolve(): root for root in roots}
    for root in given.values():
        _apart(root, output)
    if before and (output / LOCK).is_file():
        given.setdefault(output.resolve(), output)
    found = sorted((_opened(root, path == output.resolve(), trust) for path, root in given.items()), key=_rank)
    first = found[0]
    for other in found[1:]:
        _same(first, other)
    text, united = (first.root / LOCK).read_bytes(), shares.united([each.manifest for each in reversed(found)])
    files = _united(found)
    own(output, first.suite)
    _agree(files, output)
    output.mkdir(parents=True, exist_ok=True)
    with alone(output):
        if _listing(output) != before:
            raise ValueError(f"{output} was written by another command meanwhile; run rdiff merge again")
        with suppress(FileNotFoundError):  # what is vouched for stays known, if this is stopped
            (output / LISTING).replace(output / JOURNAL)
        _put(output / LOCK, text)
        for name, file in files.items():
            _put(output / name, file.path.read_bytes())
        archive = replace(first.archive, root=output)
        spent, told = counted(first.bare, archive)
        about = {"seconds": {**united["seconds"], "cells": spent}, "notices": shares.retold(united, told)}
        done = finish(first.bare, archive, united | about, text)
        (output / JOURNAL).unlink(missing_ok=True)
        return done


def _listing(root: Path) -> dict[str, str]:
    """The digests of a folder's files, or those that it had before a merge that was stopped; nothing if it has none."""
    for name in (LISTING, JOURNAL):
        with suppress(FileNotFoundError, NotADirectoryError):
            lines = (root / name).read_text(encoding="utf-8", errors="replace").splitlines()
            return {line[66:]: line[:64] for line in lines}
    return {}


def _apart(root: Path, output: Path) -> None:
    """A run folder lies neither in another one nor around it."""
    one, other = root.resolve(), output.resolve()
    if one != other and (one.is_relative_to(other) or other.is_relative_to(one)):
        raise ValueError(f"{root} and {output} lie in each other; give another --output")


def _opened(root: Path, is_output: bool, trust: bool) -> Recorded:
    """A run folder whose files are as its digests say; in that of the result, of a merge that was stopped, records."""
    run = open_run(root, trust=trust)
    wrong = []
    if is_output and not (root / LISTING).is_file():
        for name, digest in _listing(root).items():
            if name.startswith(RECORDS) and not ((root / name).is_file() and sha256(root / name) == digest):
                wrong.append(f"{name} is not what it was before a merge that was stopped")
    else:
        check = listing(root)
        wrong += [] if check.state == "ok" else [*check.details, check.said]
    if wrong:
        raise ValueError(f"{root} is damaged: {wrong[0]}; copy it again, or run it to its end with rdiff run")
    if not isinstance(run.manifest.get("keys"), Mapping):
        raise ValueError(f"{root} was made by an earlier rdiff, which wrote no keys of cells; run rdiff run there once")
    run.archive  # noqa: B018  # its keys are looked at
    return run


def _rank(run: Recorded) -> tuple[bytes, bytes]:
    """An order of folders that does not depend on where they are."""
    return (run.root / LOCK).read_bytes(), (run.root / "manifest.json").read_bytes()


def _same(one: Recorded, other: Recorded) -> None:
    """Two runs are of the same suite, and their records of the same weights, images and versions.

    Raises:
        ValueError: If they are not; it names the first field that differs.
    """
    for odd in differing("", other.suite, one.suite, is_path):
        raise ValueError(f"{odd.said(other.root, one.root)}: these are runs of different suites")
    for name in SAME:
        if one.manifest.get(name) != other.manifest.get(name):
            what = _changed(one.manifest, other.manifest) or name
            raise ValueError(f"{other.root} and {one.root} have records of different things: {what} differs")


def _changed(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Which checkpoint, denoiser or dataset has other contents."""
    for part, key, names in (
        ("checkpoints", "id", ("sha256", "fingerprint")),
        ("denoisers", "kind", ("contents", "fingerprint")),
        ("datasets", "name", ("digest", "n")),
    ):
        for mine, theirs in zip(one.get(part, []), other.get(part, []), strict=False):
            for name in names:
                if mine.get(name) != theirs.get(name):
                    return f"{name} of {part.removesuffix('s')} {mine.get(key)}"
    return ""


def _united(runs: Sequence[Recorded]) -> dict[str, _File]:
    """The files of all runs by their names below a run folder.

    Raises:
        ValueError: If a sample was recorded twice with other results, or a file is damaged.
    """
    found: dict[str, _File] = {}
    for run in runs:
        known = _listing(run.root)
        for cell in _cells(run.bare):
            total = cell.dataset.declared().n
            for first, last, path in run.archive.files(cell):
                if path.relative_to(run.root).as_posix() not in known:
                    continue  # copied by a merge that was stopped: it must come again
                _look(path, first, last, total)
                _add(found, run.root, path)
                if (beside := path.with_suffix(".json")).is_file():
                    _cheaper(found, run.root, beside)
                if (constants := path.parent / CONSTANTS).is_file():
                    _add(found, run.root, constants)
    _overlap(found)
    return found


def _cells(suite: Suite) -> Iterator[Cell]:
    return (cell for bench in suite.benches for _, row in cells(suite, bench) for cell in row)


def _add(found: dict[str, _File], root: Path, path: Path) -> None:
    name = path.relative_to(root).as_posix()
    there = found.setdefault(name, _File(path, name))
    if there.path != path and there.path.read_bytes() != path.read_bytes():
        raise ValueError(
            f"{path} and {there.path} are records of the same samples and differ (made on different devices?); "
            "delete one of them, and make the digests of its folder new with rdiff run"
        )


def _overlap(found: dict[str, _File]) -> None:
    """No file may hold a part of another's samples."""
    before: tuple[Path, int, _File] | None = None
    for name in sorted(name for name in found if name.endswith(".parquet")):
        file = found[name]
        first, last = map(int, file.path.stem.split("-"))
        if before and before[0] == Path(name).parent and first <= before[1]:
            raise ValueError(f"{file.path} and {before[2].path} hold the same samples; delete one of them")
        before = Path(name).parent, last, file


def _cheaper(found: dict[str, _File], root: Path, path: Path) -> None:
    """What a file cost: where two machines made it, one of the two, always the same."""
    name, content = path.relative_to(root).as_posix(), path.read_bytes()
    try:
        sound = isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{path} is damaged: it holds no mapping")
    there = found.setdefault(name, _File(path, name))
    if content < there.path.read_bytes():
        found[name] = _File(path, name)


def _look(path: Path, first: int, last: int, total: int) -> None:
    """A file of records has as many rows as its name says, or a note of what was left out."""
    count = last - first + 1
    if not first <= last < total:
        raise ValueError(f"{path} is damaged: its dataset has {total} samples, its name says {first} to {last}")
    try:
        about = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if about.num_rows > count or (about.num_rows < count and b"skipped" not in (about.metadata or {})):
        raise ValueError(f"{path} is damaged: it has {about.num_rows} rows, its name says {count}")


def _agree(files: dict[str, _File], output: Path) -> None:
    """What the folder of the result has already is what will be there."""
    known = _listing(output)
    for path in output.rglob("*"):
        name = path.relative_to(output).as_posix()
        if path.is_symlink():
            raise ValueError(f"{path} is a link; a run folder holds none")
        if (
            path.is_file()
            and name.startswith(RECORDS)
            and not path.name.startswith(".")
            and name not in {**files, **known}
        ):
            raise ValueError(
                f"{path} is of none of these runs and in no digests.txt; name its run too, or give another --output"
            )
    for name, file in files.items():
        path = output / name
        if path.is_file() and not name.endswith(".json") and path.read_bytes() != file.path.read_bytes():
            raise ValueError(f"{path} and {file.path} are records of the same samples and differ; delete one of them")


def _put(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all, unless it is there."""
    if not path.is_file() or path.read_bytes() != content:
        with atomic(path) as file:
            file.write(content)
