"""The files of a run folder: each written whole or not at all, and all of them listed with their digests."""

import fcntl
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from robustbench_diffaug.files import atomic, sha256

__all__ = ["PICTURES", "alone", "digests", "foreign", "put", "replaced", "vacant"]

PICTURES = "pictures"
"""The folder of a report's pictures; whatever else lies in it is an earlier report's."""
STALE = 3600  # seconds after which a half-written file is a killed run's: writing one takes less than a second


def put(root: Path, files: Mapping[str, bytes]) -> str:
    """Writes files, each whole or not at all, and the digests of all that the folder then holds; gives their digest.

    Pictures that are not among them are removed, with the folders that this leaves empty.

    Arguments:
        root: The folder.
        files: The content of each file by its path below the folder.
    """
    _clear(root, files)
    for name, content in files.items():
        with atomic(root / name) as file:
            file.write(content)
    digest = _write_digests(root)
    _sweep(root)
    return digest


def replaced(root: Path, files: Mapping[str, bytes], known: Collection[str]) -> str:
    """Writes files as `put` does, in place of all that an earlier report may have left.

    Arguments:
        root: The folder.
        files: The content of each file by its path below the folder.
        known: The names of files that a report may have.
    """
    for name in set(known) - files.keys():
        (root / name).unlink(missing_ok=True)
    root.mkdir(parents=True, exist_ok=True)
    return put(root, files)


def vacant(root: Path, known: Collection[str], what: str, mark: tuple[str, str] | None = None) -> None:
    """Finds that a folder may hold a report: it is new, empty, or holds an earlier one.

    Arguments:
        root: The folder.
        known: The names of files and folders that a report may have.
        what: It is and who writes it, in words.
        mark: A file of JSON that every report has, and a key of it; none where the names say enough.

    Raises:
        ValueError: If it holds something else.
    """
    names = {path.name for path in root.iterdir() if foreign(path)} if root.is_dir() else {""} if root.exists() else ()
    if names and not (set(names) <= set(known) and (mark is None or _marked(root / mark[0], mark[1]))):
        raise ValueError(f"{root} is not empty and holds no {what}; give another --output")


def foreign(path: Path) -> bool:
    """Whether a file is none that a command leaves behind when it is killed before it has written anything."""
    return path.name != ".lock" and not (path.name.startswith(".") and path.name.endswith(".part"))


def _marked(path: Path, key: str) -> bool:
    try:
        return key in json.loads(path.read_bytes())
    except (ValueError, OSError, TypeError):
        return False


def _clear(root: Path, files: Mapping[str, bytes]) -> None:
    """Removes pictures of an earlier report, and links, behind which are files that are none of the run's."""
    if (root / PICTURES).is_symlink():
        (root / PICTURES).unlink()
    for folder, folders, names in os.walk(root / PICTURES, topdown=False):
        for path in (Path(folder, name) for name in (*folders, *names)):
            old = path.is_file() and path.relative_to(root).as_posix() not in files and not path.name.startswith(".")
            if old or path.is_symlink():
                path.unlink(missing_ok=True)
        with suppress(OSError):  # it is not empty
            Path(folder).rmdir()


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Within it no other run writes the report of this folder; two runs may compute records side by side."""
    with (root / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(root: Path) -> None:
    """Removes what killed runs left half written, and nothing that a run which is still going is writing."""
    now = (root / "digests.txt").stat().st_mtime  # the file system's clock, which may differ from ours
    for path in root.rglob(".*.part"):
        with suppress(FileNotFoundError):
            if now - path.stat().st_mtime > STALE:
                path.unlink()


def _files(root: Path) -> list[Path]:
    """All files of a run folder but digests.txt and hidden ones, in the order of their names."""
    found = []
    for folder, _, names in os.walk(root):
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path != root / "digests.txt")


def digests(root: Path) -> bytes:
    """What digests.txt should say: SHA-256 and name of every other file, by name; hidden ones are none of the run's."""
    return "".join(f"{sha256(path)}  {path.relative_to(root).as_posix()}\n" for path in _files(root)).encode()


def _write_digests(root: Path) -> str:
    text = digests(root)
    with atomic(root / "digests.txt") as file:
        file.write(text)
    return hashlib.sha256(text).hexdigest()
