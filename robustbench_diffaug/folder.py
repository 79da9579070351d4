"""The files of a run folder: each written whole or not at all, and all of them listed with their digests."""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from robustbench_diffaug.files import atomic, sha256

__all__ = ["PICTURES", "alone", "digests", "put"]

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
