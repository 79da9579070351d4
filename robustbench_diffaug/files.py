"""Files that users name: where they are and what they hold; and results, written so that none is ever half there."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Annotated, Any

from pydantic import AfterValidator

from robustbench_diffaug.component import Outside, Value, suggest

__all__ = [
    "BUNDLED",
    "DataLocation",
    "Digest",
    "Location",
    "Missing",
    "Weights",
    "apart",
    "atomic",
    "built_in",
    "existing",
    "locate",
    "path_of",
    "sha256",
]

BUNDLED = "rdiff:"
"""Prefix of files that are installed with the package: 'rdiff:zoo/resnet-standard.safetensors'."""


def _against(key: str) -> AfterValidator:
    def resolve(uri: str, info: Any) -> str:
        folder = (info.context or {}).get(key) or (info.context or {}).get("folder")
        if uri.startswith(BUNDLED) or folder is None:
            return uri
        try:
            return str(Path(folder, Path(uri).expanduser()))
        except RuntimeError as error:
            raise ValueError(f"{uri} begins with the home of a user that there is not; write the whole path") from error

    return AfterValidator(resolve)


Location = Annotated[str, _against("folder"), Outside]
"""A path, relative to the suite's file, or `rdiff:...`. No part of an identity: the digest of what lies there is."""
DataLocation = Annotated[str, _against("data"), Outside]
"""A path, relative to `--data-dir`, or to the suite's file where that is not given."""


def path_of(uri: str) -> Path:
    """The path that a location means."""
    if not uri.startswith(BUNDLED):
        return Path(uri)
    root = Path(str(files("robustbench_diffaug"))).resolve()
    path = (root / uri.removeprefix(BUNDLED)).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{uri} leads out of the package")
    return path


def built_in(kind: str = "suites") -> dict[str, Path]:
    """The suites (or recipes) that are installed with the package, by name; one in a folder is 'openood/mnist'."""
    package = Path(str(files("robustbench_diffaug")))
    folder = next(place for place in (package / kind, package.parent / kind) if place.is_dir())
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def locate(name: str, kind: str = "suites") -> tuple[Path, bool]:
    """The file that a name or a path on the command line means, and whether it is installed with the package.

    Raises:
        ValueError: If there is none.
    """
    path, known = Path(name), built_in(kind)
    if path.suffix in (".yaml", ".yml") or (path.exists() and not (path.is_dir() and name in known)):
        if not path.exists():
            near = get_close_matches(path.name, [other.name for other in path.parent.glob("*.y*ml")], n=1)
            meant = f"; did you mean {path.with_name(near[0])}?" if near else "; check the path"
            raise ValueError(f"there is no file {name}{meant}")
        return path, any(path.samefile(other) for other in known.values())
    if name in known:
        return known[name], True
    noun = kind.removesuffix("s")
    raise ValueError(f"there is no {noun} called {name!r}{suggest(name, list(known))}; or give the path of a YAML file")


class Missing(ValueError):
    """A file or folder that is not there."""


def existing(uri: str) -> Path:
    """The path of a file or folder that is there.

    Raises:
        Missing: If it is not.
    """
    path = path_of(uri)
    try:
        there = path.exists()
    except OSError as error:
        raise ValueError(f"{uri} cannot be read: {error.strerror}") from error
    if not there:
        raise Missing(f"there is no {uri}; check the path (relative ones start at the suite's folder)")
    return path


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, computed once per process for a file that does not change."""
    status = path.stat()
    return _sha256(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _sha256(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[IO[Any]]:
    """A binary file that appears under its name when the block ends, whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def apart(root: Path, output: Path) -> None:
    """Finds that what is about to be written lies in no run folder, whose files its digests name.

    Raises:
        ValueError: If it does.
    """
    if output.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{output} lies in the run folder {root}, whose files its digests name; give another --output")


def _hexadecimal(digest: str) -> str:
    if digest and not re.fullmatch("[0-9a-f]{64}", digest.lower()):
        raise ValueError(f"needed is a sha256, 64 hexadecimal digits (sha256sum FILE prints it), not {digest[:80]!r}")
    return digest.lower()


Digest = Annotated[str, AfterValidator(_hexadecimal), Outside]
"""SHA-256 of a file in hexadecimal, or nothing."""


class Weights(Value):
    """A file of weights and the SHA-256 that it must have.

    Arguments:
        uri: Path of a safetensors file.
        sha256: The digest, 64 hexadecimal digits; where it is left out, that of the file as it is counts.
    """

    uri: Location
    sha256: Digest = ""

    def contents(self) -> str:
        """The digest: records depend on the weights, not on where they lie."""
        return self.sha256 or sha256(existing(self.uri))

    def check(self) -> Path:
        """The path of the file, after its digest and its first bytes were checked.

        Raises:
            ValueError: If the file is missing, has another digest, or is no safetensors file.
        """
        path = existing(self.uri)
        if not path.is_file():
            raise ValueError(f"{self.uri} is a folder, not a file of weights")
        found = sha256(path)
        with path.open("rb") as file:
            start = file.read(512)
        reason = _not_safetensors(start, path.stat().st_size)
        if reason:
            raise ValueError(f"{self.uri} {reason}")
        _whole(path, self.uri)
        if self.sha256 and found != self.sha256:
            raise ValueError(
                f"{self.uri} has sha256 {found}, not {self.sha256}: another or a damaged file; get the right one, "
                "or write the new digest if the change is meant"
            )
        return path


def _whole(path: Path, uri: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return
    except SafetensorError as error:
        raise ValueError(f"{uri} is damaged or cut off: {error}") from error


def _not_safetensors(start: bytes, size: int) -> str:
    """What is wrong with a file that begins so; empty if it looks like safetensors."""
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is an HTML page, not weights (a download that failed?)"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights; run git lfs pull"
    if start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")):
        return (
            "is a pickle (torch.save), which can run code when it is read; convert it once where you trust it, with "
            "safetensors.torch.save_file(state_dict, path)"
        )
    if len(start) < 8:
        return f"holds only {size} bytes, no weights"
    header = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or header < 2:
        return "is no safetensors file"
    if 8 + header > size:
        return f"is cut off: its header says {header} bytes and the file has {size}"
    return ""
