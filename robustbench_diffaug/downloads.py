"""Files of weights from the network: only where the user allows it, whole and checked, into a folder that is kept."""

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from http.client import HTTPException
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from robustbench_diffaug.weight_files import no_page, sha256

__all__ = ["LIMIT", "allowing", "cached", "folder", "remote"]

TIMM = "timm:"
"""Prefix of timm's own weights: 'timm:resnet50.a1_in1k'."""
LIMIT = 20 * 2**30  # bytes: the largest published classifiers are near 8 GiB
SECONDS = 30  # without an answer
STALE = 86_400  # seconds after which a part of a file is one that a killed process left
OFFLINE = "HF_HUB_OFFLINE"  # what keeps the Hugging Face libraries from the network
UNPINNED = ("https",)
PINNED = ("https", "http")  # what is changed on its way is noticed by the digest

Look = Callable[[Path, str], object]
"""Raises ValueError if a file, called as in the second argument, is not what is needed."""

_allowed: ContextVar[bool] = ContextVar("allowed", default=False)


@contextmanager
def allowing(allow: bool) -> Iterator[None]:
    """Within it, weights may (or may not) be fetched from the network.

    Where they may not, the Hugging Face libraries are told so too, in this process and in those that it starts.
    """
    token, before = _allowed.set(allow), os.environ.get(OFFLINE)
    if not allow:
        os.environ[OFFLINE] = "1"
    try:
        yield
    finally:
        _allowed.reset(token)
        if before is None:
            os.environ.pop(OFFLINE, None)
        else:
            os.environ[OFFLINE] = before


def remote(uri: str) -> bool:
    """Whether a location is none of this machine: `https://...`, any other `scheme://`, or `timm:NAME`."""
    return uri.startswith(TIMM) or re.match("[A-Za-z][A-Za-z0-9+.-]*://", uri) is not None


def folder() -> Path:
    """Where downloads are kept: RDIFF_CACHE, or `rdiff` in XDG_CACHE_HOME or in ~/.cache.

    Raises:
        ValueError: If none of these is set and the user has no home.
    """
    own, general = os.environ.get("RDIFF_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own or general:
        return Path(own) if own else Path(str(general), "rdiff")
    try:
        return Path.home() / ".cache" / "rdiff"
    except RuntimeError as error:
        raise ValueError("downloads have no folder; set RDIFF_CACHE to one") from error


def cached(uri: str, digest: str = "", look: Look = no_page) -> Path:
    """The file that a remote location means: the one that is kept, or else, where that is allowed, fetched.

    Arguments:
        uri: `https://...`, `http://...` where a digest is given, or `timm:NAME`.
        digest: The SHA-256 that it must have, 64 hexadecimal digits; empty to take it as it is.
        look: Looks at a file that was fetched before it is kept.

    Raises:
        ValueError: If it is neither kept nor may be fetched, cannot be fetched, has another digest, or is something
            else.
    """
    if uri.startswith(TIMM):
        return _of_timm(uri)
    _check(uri, bool(digest))
    path = folder() / f"{hashlib.sha256(uri.encode()).hexdigest()[:16]}-{_name(uri)}"
    there = path.is_file()
    if there and (not digest or sha256(path) == digest):
        return path
    if not _allowed.get():
        kept = "the file that was fetched before has another sha256" if there else "it was not fetched before"
        raise ValueError(f"{_short(uri)} is on the network, and {kept}; to fetch it, add --allow-download")
    _fetch(uri, path, digest, look)
    return path


def _short(url: str) -> str:
    """An address in a message."""
    return url if len(url) <= 200 else f"{url[:200]}..."


def _check(url: str, pinned: bool) -> None:
    """Finds that an address is one that is fetched from."""
    scheme = url.partition(":")[0].lower()
    if scheme not in PINNED:
        raise ValueError(f"{_short(url)} is not fetched; needed is https://..., or the path of a file")
    if not pinned and scheme not in UNPINNED:
        raise ValueError(f"{_short(url)} can be changed on its way; write https://, or pin its sha256")
    try:
        parts = urlsplit(url)
        sound = bool(parts.hostname) and parts.port != 0 and url.isascii() and url.isprintable() and " " not in url
    except ValueError:  # of a port that is no number, or of brackets
        sound = False
    if not sound:
        raise ValueError(f"{_short(url)} is no address; write it as a browser copies it, with %20 for a space")
    if parts.username is not None:
        raise ValueError(f"the address at {parts.hostname} holds a user's name, which reports would show; leave it out")


def _name(url: str) -> str:
    """The last part of the path, in letters that no file system minds."""
    return re.sub("[^A-Za-z0-9._-]", "_", urlsplit(url).path.rpartition("/")[2])[-80:] or "weights"


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to addresses that are fetched from, and to no other.

    Arguments:
        pinned: Whether the digest is known.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned

    def redirect_request(  # the name and the arguments are the library's
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        """The next request.

        Raises:
            ValueError: If it would go to an address that is not fetched from.
        """
        try:
            _check(newurl, self.pinned)
        except ValueError:
            fp.close()
            raise
        return HTTPRedirectHandler.redirect_request(self, req, fp, code, msg, headers, newurl)


def _fetch(url: str, path: Path, digest: str, look: Look) -> None:
    """Puts a file under its name once it is whole, has its digest, and was looked at."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        with NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
            part = Path(file.name)
            try:
                found = _copied(url, file, bool(digest))
                if digest and found != digest:
                    differs = f"has sha256 {found}, not {digest}: another file, or a damaged one"
                    raise ValueError(f"{_short(url)} {differs}; nothing was kept")
                file.flush()
                os.fsync(file.fileno())
                look(part, _short(url))
                part.chmod(0o644)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{_short(url)} cannot be kept in {path.parent}: {error.strerror or error}") from error
    if not digest:
        logging.getLogger("robustbench_diffaug").warning("fetched %s; pin it: sha256: %s", _short(url), found)


def _sweep(place: Path) -> None:
    """Removes parts of files that killed processes left."""
    for part in place.glob(".*.part"):
        if time.time() - part.stat().st_mtime > STALE:
            part.unlink(missing_ok=True)


def _copied(url: str, file: IO[bytes], pinned: bool) -> str:
    """The SHA-256 of what was written."""
    digest, size = hashlib.sha256(), 0
    try:
        request = Request(url, headers={"User-Agent": "rdiff"})  # noqa: S310  # its scheme was checked
        with build_opener(_Redirects(pinned)).open(request, timeout=SECONDS) as answer:
            said = answer.headers.get("Content-Length") or ""
            expected = int(said) if said.isdecimal() and len(said) < 30 else None
            _check_size(url, expected or 0, file)
            while block := answer.read(2**20):
                size += len(block)
                _check_size(url, size, file)
                digest.update(block)
                file.write(block)
    except HTTPError as error:
        error.close()
        said = " ".join(f"{error.code} {error.reason}".split())[:200]
        raise ValueError(f"{_short(url)} cannot be fetched: the server says {said}") from error
    except (OSError, HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise ValueError(f"{_short(url)} cannot be fetched: {reason[:200]}") from error
    if expected is not None and size != expected:
        raise ValueError(f"{_short(url)} broke off after {size} of {expected} bytes; try again")
    return digest.hexdigest()


def _check_size(url: str, size: int, file: IO[bytes]) -> None:
    """Finds that so many bytes may come, and have room."""
    if size > LIMIT:
        raise ValueError(f"{_short(url)} is larger than {LIMIT / 2**30:g} GiB, the most that is fetched")
    place = Path(file.name).parent
    if file.tell() == 0 and size > (free := shutil.disk_usage(place).free):
        raise ValueError(f"{_short(url)} has {size} bytes, and {place} has room for {free}; set RDIFF_CACHE to another")


def _of_timm(uri: str) -> Path:
    """The safetensors file of pretrained weights that timm knows by a name and its tag, of the hub or its cache."""
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
    import timm
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    name = uri.removeprefix(TIMM)
    try:
        config = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise ValueError(f"timm has no weights called {name[:80]!r}; timm.list_pretrained() names all") from error
    if config is None or not config.hf_hub_id:
        raise ValueError(f"timm has no weights of {name} on the hub; give a file or an https:// address")
    file = config.hf_hub_filename or "model.safetensors"
    if not file.endswith(".safetensors"):
        raise ValueError(f"timm's weights of {name} are {file}, no safetensors file; give a file of your own")
    found = try_to_load_from_cache(config.hf_hub_id, file)
    if isinstance(found, str):
        return Path(found)
    if not _allowed.get():
        raise ValueError(f"{uri} is not in the Hugging Face cache; to fetch it, add --allow-download")
    try:
        return Path(hf_hub_download(config.hf_hub_id, file))
    except Exception as error:  # whatever the hub's client raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{uri} cannot be fetched: {type(error).__name__}: {reason}") from error
