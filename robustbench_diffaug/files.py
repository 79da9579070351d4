"""Files that users name: where they are and what they hold; and results, written so that none is ever half there."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from glob import escape
from importlib.resources import files
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Annotated, Any

from pydantic import AfterValidator, ConfigDict, model_validator

from robustbench_diffaug.component import Later, Outside, Value, suggest
from robustbench_diffaug.downloads import cached, remote
from robustbench_diffaug.weight_files import examine, no_page, sha256

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
    "sweep",
]

BUNDLED = "rdiff:"
"""Prefix of files that are installed with the package: 'rdiff:zoo/resnet-standard.safetensors'."""


def _against(key: str) -> AfterValidator:
    def resolve(uri: str, info: Any) -> str:
        folder = (info.context or {}).get(key) or (info.context or {}).get("folder")
        if uri.startswith(BUNDLED) or remote(uri) or folder is None:
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


def sweep(path: Path) -> None:
    """Removes what `atomic` left of a file when its process was killed; nobody else may be writing it."""
    for left in path.parent.glob(f"{escape(f'.{path.name[:40]}.')}*.part"):
        left.unlink(missing_ok=True)


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


@contextmanager
def _readable(uri: str) -> Iterator[None]:
    """Names the file of which the system says that it cannot be read, which the error itself may not."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{uri} cannot be read: {error.strerror or error}") from error


def _or_text(schema: dict[str, Any]) -> None:
    """In the JSON schema, too, a text may stand in place of the mapping."""
    mapping = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string"}, mapping]


class Weights(Value):
    """A file of weights and the SHA-256 that it must have; a text in its place is the `uri`.

    Arguments:
        uri: Path of a safetensors file, or of one of torch.save that holds tensors and plain data; or `https://...`, or
            `timm:NAME` for timm's own weights, which are fetched where the user allows it.
        sha256: The digest, 64 hexadecimal digits; where it is left out, that of the file as it is counts.
        entry: Where in the file the weights are, such as 'model_ema' ('a/b' is 'b' in 'a'); found by rule if left out.
    """

    model_config = ConfigDict(json_schema_extra=_or_text)

    uri: Location
    sha256: Digest = ""
    entry: Annotated[str, Later] = ""

    @model_validator(mode="before")
    @classmethod
    def _text(cls, data: Any) -> Any:
        return {"uri": data} if isinstance(data, str) else data

    def contents(self) -> str:
        """The digest: records depend on the weights, not on where they lie."""
        with _readable(self.uri):
            return self.sha256 or sha256(self.path())

    def path(self) -> Path:
        """The path of the file, fetched if it is of the network and that is allowed; it may be a file of any kind.

        Raises:
            ValueError: If the file is missing, a folder or a device, or cannot be fetched.
        """
        with _readable(self.uri):
            return self._looked_at(no_page)

    def _looked_at(self, look: Callable[[Path, str], object]) -> Path:
        """The path of the file, looked at before it is kept if it is fetched."""
        path = cached(self.uri, self.sha256, look) if remote(self.uri) else existing(self.uri)
        if not path.is_file():
            raise ValueError(f"{self.uri} is a folder or a device, not a file of weights")
        return path

    def pinned(self) -> Path:
        """The path of the file, after its digest was checked; it may be a file of any kind.

        Raises:
            ValueError: As of `path`, or if it has another digest.
        """
        with _readable(self.uri):
            return self._as_pinned(self.path())

    def _as_pinned(self, path: Path) -> Path:
        if self.sha256 and sha256(path) != self.sha256:
            raise ValueError(
                f"{self.uri} has sha256 {sha256(path)}, not {self.sha256}: another or a damaged file; get the right "
                "one, or write the new digest if the change is meant"
            )
        return path

    def check(self) -> Path:
        """The path of the file, after its bytes and its digest were checked; nothing in it is run.

        Raises:
            ValueError: As of `pinned`, or if it is no file of tensors; says what it is instead.
        """
        with _readable(self.uri):
            path = self._looked_at(examine)
            examine(path, self.uri)
            return self._as_pinned(path)
