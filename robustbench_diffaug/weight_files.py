"""What a file of weights is, by its bytes, before anything in it is believed: no name of it counts, and no claim.

A file of torch.save is looked at whole except for its numbers: the pickle by `pickles`, and the zip (or the old form)
for members that would be anything else to another reader, or larger when unpacked. What passes can be given to
`torch.load(weights_only=True)`, which then allocates no more than the file holds.

References:
    safetensors, https://github.com/huggingface/safetensors#format
    PyTorch's file formats, https://pytorch.org/docs/stable/notes/serialization.html
"""

import hashlib
import mmap
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from robustbench_diffaug.pickles import Pickled, Refused, Storage, Stored, Thing, look

__all__ = ["Contents", "examine", "no_page", "sha256"]

HEADER = 2**24
"""Bytes of a safetensors header, of a zip's list of members, and 4 times that of a pickle: far above any of weights."""

_MAGIC = 0x1950A86A20F9469CFC6C
_CONVERT = "save its tensors alone where you trust it (docs/weights.md says how)"
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "is a gzip archive; unpack it with gunzip (or tar xzf) and name what is in it"),
    (b"BZh", "is a bzip2 archive; unpack it with bunzip2 (or tar xjf) and name what is in it"),
    (b"\xfd7zXZ\0", "is an xz archive; unpack it with unxz (or tar xJf) and name what is in it"),
    (b"\x28\xb5\x2f\xfd", "is a zstd archive; unpack it with unzstd and name what is in it"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it and name what is in it"),
    (b"Rar!", "is a rar archive; unpack it and name what is in it"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes it, not weights of torch; convert them there"),
    (b"\x93NUMPY", "is an array of numpy, not weights by name; save them with safetensors.numpy.save_file"),
    (b"GGUF", "is a GGUF file of a language model, not weights of a classifier"),
    (b"\x7fELF", "is a program, not weights"),
)


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, computed once per process for a file that does not change."""
    status = path.stat()
    return _sha256(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _sha256(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Contents(NamedTuple):
    """What a file of weights holds, without its numbers.

    Arguments:
        form: How it is to be read.
        tree: Of safetensors the tensors by name; of torch.save what was saved, with `Stored` for each tensor.
    """

    form: Literal["safetensors", "torch"]
    tree: Any


def examine(path: Path, uri: str) -> Contents:
    """Looks at a file that is there; its numbers are not read, and nothing in it is run.

    Raises:
        ValueError: If it is no whole file of safetensors or torch.save, or its pickle needs code; says what it is.
    """
    with path.open("rb") as file:
        start = file.read(512)
        size = path.stat().st_size
        reason = _other(start, size)
        if reason:
            raise ValueError(f"{uri} {reason}")
        try:
            if start.startswith(b"PK"):
                return Contents("torch", _fit(_zipped(file, size), uri).value)
            # A safetensors file may begin like a pickle, since its first bytes are a length.
            if start[8:9] != b"{" and (start[:1] == b"\x80" or re.match(rb"[c(\]}il]", start)):
                return Contents("torch", _fit(_old(file, size), uri).value)
        except Refused as error:
            raise ValueError(f"{uri} {error}") from error
    return Contents("safetensors", _safetensors(path, start, size, uri))


def no_page(path: Path, uri: str) -> None:
    """Finds that a file is none of what comes in place of one; it may be of any kind.

    Raises:
        ValueError: If it is an HTML page, a git-lfs pointer, or holds next to nothing.
    """
    with path.open("rb") as file:
        reason = _in_place(file.read(512), path.stat().st_size)
    if reason:
        raise ValueError(f"{uri} {reason}")


def _in_place(start: bytes, size: int) -> str:
    """What came in place of a file that begins so; empty if it may be one."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is an HTML page, not weights (a download that failed?)"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights; run git lfs pull"
    return f"holds only {size} bytes, no weights" if len(start) < 9 else ""


def _other(start: bytes, size: int) -> str:
    """What a file that begins so is instead of weights; empty if it may be some."""
    if reason := _in_place(start, size):
        return reason
    for magic, reason in _STARTS:
        if start.startswith(magic):
            return reason
    if start[257:262] == b"ustar":
        return "is a tar archive; unpack it with tar xf and name what is in it"
    if start[4:8] == b"TFL3":
        return "is a TensorFlow Lite file, not weights of torch"
    if start[0] == 8 and 0 < start[1] < 32 and start[2] in (0x12, 0x1A, 0x22, 0x2A, 0x30, 0x3A, 0x42):
        return "looks like an ONNX file; give kind: onnx for it"
    return ""


def _safetensors(path: Path, start: bytes, size: int, uri: str) -> dict[str, Stored]:
    header = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{" or header < 2:
        raise ValueError(f"{uri} is no safetensors file, and none of torch.save; check how it was made")
    if 8 + header > size:
        raise ValueError(f"{uri} is cut off: its header says {header} bytes and the file has {size}")
    if header > HEADER:
        raise ValueError(f"{uri} has a header of {header} bytes, more than any weights need; it is damaged or hostile")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            return {
                name: Stored(Storage(name, str(part.get_dtype()).lower(), 0), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{uri} is damaged or cut off: {' '.join(str(error).split())[:160]}") from error


def _mapped(file: BufferedReader, size: int) -> mmap.mmap:
    """The part of a file where its pickles are; no instruction can then ask for more."""
    return mmap.mmap(file.fileno(), min(size, 4 * HEADER), access=mmap.ACCESS_READ)


def _old(file: BufferedReader, size: int) -> Pickled:
    """A file of torch.save as before version 1.6: five pickles, then each storage after the count of its numbers."""
    content = _mapped(file, size)
    found = look(content)
    if found.value != _MAGIC:
        if found.needs:
            return found
        raise Refused(f"is a pickle, but not of torch.save; {_CONVERT}")
    version, system, saved, keys = (look(content) for _ in range(4))
    if version.value != 1001 or not (isinstance(system.value, dict) and system.value.get("little_endian") is True):
        raise Refused("is of another version of torch.save, or of a big-endian machine; save it again with torch.save")
    if any(part.needs for part in (version, system, keys)):
        raise Refused("asks for code before its weights; it is hostile, do not use it")
    if saved.needs:
        return saved
    if not isinstance(keys.value, list) or sorted(map(str, keys.value)) != sorted(saved.storages):
        raise Refused("is damaged: the list of what it stores is another than what it uses")
    end = content.tell()
    for key in keys.value:
        storage = saved.storages[key]
        file.seek(end)
        if int.from_bytes(file.read(8), "little") != storage.count:
            raise Refused(
                f"is damaged or cut off: {storage.key[:40]!r} does not hold the {storage.count} numbers it says"
            )
        end += 8 + storage.size
    if end > size:
        raise Refused(f"is cut off: it needs {end} bytes and has {size}")
    return saved


def _zipped(file: BufferedReader, size: int) -> Pickled:
    """A file of torch.save since version 1.6: a zip of `NAME/data.pkl` and of the numbers in `NAME/data/KEY`."""
    _listed(file, size)
    try:
        with ZipFile(file) as archive:
            members = _plain_members(archive, size)
            root = _root(members)
            if members[f"{root}/data.pkl"].file_size > 4 * HEADER:
                raise Refused("has a pickle larger than any weights need; it is damaged or hostile")
            order = members.get(f"{root}/byteorder")
            if order and (order.file_size > 8 or archive.read(order) != b"little"):
                raise Refused("was saved on a big-endian machine; save it as safetensors there")
            found = look(BytesIO(archive.read(f"{root}/data.pkl")))
    except (BadZipFile, OSError, NotImplementedError, RuntimeError, UnicodeError) as error:
        raise Refused(f"is damaged or cut off: {' '.join(str(error).split())[:120]}") from error
    if not found.needs:
        _stored_all(found.storages.values(), members, root)
    return found


def _listed(file: BufferedReader, size: int) -> None:
    """Finds the zip's end where it must be, so that every reader finds the same members, and not too many."""
    file.seek(max(size - 98, 0))
    tail = file.read(98)
    end = tail[-22:]
    if size < 22 or not end.startswith(b"PK\x05\x06") or end[20:] != b"\0\0":
        raise Refused("is a zip that is damaged or cut off: the list of its members is not at its end")
    length, wide = int.from_bytes(end[12:16], "little"), tail[-98:-42]
    if tail[-42:-38] == b"PK\x06\x07" and wide.startswith(b"PK\x06\x06"):
        length = int.from_bytes(wide[40:48], "little")
    elif b"PK\x06\x07" in tail:
        raise Refused("is a zip whose list of members is not where torch.save puts it")
    if length > HEADER // 2:
        raise Refused("is a zip of more members than any weights need; it is damaged or hostile")


def _plain_members(archive: ZipFile, size: int) -> dict[str, ZipInfo]:
    """The members by name: stored as they are, one after the other, and each in the archive's own folder."""
    members: dict[str, ZipInfo] = {}
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = info.orig_filename
        shown = repr(name[:80])
        if name in members:
            raise Refused(f"is a zip with two members {shown}; it is damaged or hostile")
        if re.match(r"[/\\]|.*(^|[/\\])\.\.([/\\]|$)|.:", name) or "\0" in name or "\\" in name:
            raise Refused(f"is a zip with a member {shown} that leads out of it; it is hostile")
        if info.external_attr >> 28 == 0xA:
            raise Refused(f"is a zip with a link, {shown}; it is hostile")
        if info.flag_bits & 1:
            raise Refused("is an encrypted zip; unpack it and name what is in it")
        if info.header_offset < end:
            raise Refused(f"is a zip whose members overlap, at {shown}; it is hostile")
        end = info.header_offset + 30 + len(info.filename.encode()) + info.compress_size
        members[name] = info
    if end > size:
        raise Refused(f"is a zip that is cut off: it needs {end} bytes and has {size}")
    return members


def _root(members: Mapping[str, ZipInfo]) -> str:
    """The folder of a zip that torch.save wrote.

    Raises:
        Refused: If it is another zip; says which.
    """
    names = list(members)
    roots = {name.partition("/")[0] for name in names}
    within = {name.partition("/")[2] for name in names}
    if any(name == "constants.pkl" or name.startswith("code/") for name in within):
        raise Refused("is a TorchScript archive, a program with its weights; give kind: torchscript for it")
    if {"archive_format", "models/model.json", "serialized_exported_program.json"} & (within | set(names)):
        raise Refused("is an archive of torch.export, a program with its weights; give kind: export for it")
    if "model.weights.h5" in names:
        raise Refused("is a Keras archive, not weights of torch; convert them there")
    if names and all(name.endswith(".npy") for name in names):
        raise Refused("is an npz file of numpy, not weights of torch; save them with safetensors.numpy.save_file")
    if len(roots) != 1 or "data.pkl" not in within:
        shown = ", ".join(name[:40] for name in names[:3]) or "nothing"
        raise Refused(f"is a zip, but not of torch.save (it holds {shown}); unpack it and name what is in it")
    packed = next((info for info in members.values() if info.compress_type != ZIP_STORED), None)
    if packed or any(info.file_size != info.compress_size for info in members.values()):
        raise Refused("is a zip that packs its members, as torch.save never does; save it again with torch.save")
    return roots.pop()


def _stored_all(storages: Iterable[Storage], members: Mapping[str, ZipInfo], root: str) -> None:
    """Finds that each storage has the bytes that its numbers need, and no more."""
    for storage in storages:
        held = members.get(f"{root}/data/{storage.key}")
        if held is None or held.file_size != storage.size:
            holds = "no" if held is None else held.file_size
            raise Refused(f"is damaged: {storage.key[:40]!r} says {storage.size} bytes of numbers and has {holds}")


def _fit(found: Pickled, uri: str) -> Pickled:
    """What was found, if torch's safe loader can read it.

    Raises:
        Refused: If it needs code, or instructions that the loader does not know.
    """
    if found.needs:
        raise Refused(_needs(found, uri))
    if found.odd:
        raise Refused(
            f"was saved with pickle protocol {found.protocol} ({found.odd}), which torch's safe loader does not read; "
            f"{_CONVERT}"
        )
    return found


_CODE = re.compile(
    r"(os|posix|nt|subprocess|sys|runpy|importlib|shutil|socket|pty|ctypes|codecs|_codecs|functools|operator|types|pickle|"
    r"_pickle|marshal|webbrowser|code|timeit|pdb|asyncio|multiprocessing|signal|tempfile|urllib|http|torch\.jit|torch\.hub|"
    r"torch\.storage|torch\.serialization|torch\.utils|torch\.package|torch\._jit_internal|io|platform|threading|inspect)"
    r"(\..*)?\.[^.]*|.*\.[A-Z]\w*\.[a-z_]\w*|builtins\.[^A-Z]*|torch\.load|__main__\.[a-z_]*|numpy\.(load|fromfile|memmap)|numpy\.testing\..*"
)
_BUILT_IN = ("builtins.object", "builtins.slice", "builtins.range", "builtins.frozenset", "builtins.dict")


def _needs(found: Pickled, uri: str) -> str:
    """Which code a pickle asks for, and what to do."""
    code = [name for name in found.needs if _CODE.fullmatch(name) and name not in _BUILT_IN]
    named = " and ".join((code or list(found.needs))[:3])
    more = len(found.needs) - 3
    if code:
        return f"needs {named}, which is code that would run as it is read; nothing was run: do not use this file"
    place = ".state_dict()" if isinstance(found.value, Thing) else ""
    if isinstance(found.value, dict):
        key = next((key for key in ("state_dict", "model", "net", "model_state_dict") if key in found.value), None)
        place = f"[{key!r}]" if key else ""
        place += ".state_dict()" if key and isinstance(found.value[key], Thing) else ""
    return (
        f"needs {named}{f' and {more} more' if more > 0 else ''}, no tensors but code, and was not read; where you "
        f"trust it, save its tensors alone: import torch; torch.save(torch.load({Path(uri).name!r}, weights_only=False)"
        f"{place}, 'plain.pth')"
    )
