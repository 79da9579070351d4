"""Files that attack whoever reads them: made from a seed, named, and the same every time."""

import io
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

LONGEST = 40_000
"""Instructions of a pickle that the tests let pass, so that they are quick."""
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


def good() -> dict[str, torch.Tensor]:
    """Weights of `torch.nn.Linear(3, 2)`."""
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)}


class Call:
    """A value whose pickle calls a function by name."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def zipped(content: bytes, storages: dict[str, bytes] | None = None, more: dict[str, bytes] | None = None) -> bytes:
    """A zip as torch.save writes it, around any pickle."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        for key, value in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", value)
        for name, value in (more or {}).items():
            archive.writestr(name, value)
    return made.getvalue()


def old(content: bytes) -> bytes:
    """A file of torch.save's old form, around any pickle."""
    head = b"".join(pickle.dumps(value, protocol=2) for value in (MAGIC, 1001, SYSTEM))
    return head + content + pickle.dumps([], protocol=2)


def calls(canary: Path) -> dict[str, Call]:
    """What would leave a canary behind, or take all memory, if it were run."""
    import builtins
    import codecs
    import functools
    import os
    import subprocess

    text = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {canary}"),
        "os.mkdir": Call(os.mkdir, str(canary)),
        "eval": Call(builtins.eval, f"open({str(canary)!r}, 'w')"),
        "exec": Call(builtins.exec, text),
        "import": Call(builtins.__import__, "antigravity"),
        "open": Call(builtins.open, str(canary), "w"),
        "popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "partial": Call(functools.partial, os.mkdir, str(canary)),
        "getattr": Call(builtins.getattr, Path(canary), "touch"),
        "codecs": Call(codecs.encode, "x", "rot13"),
        "loads": Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(canary)))),
        "torch.load": Call(torch.load, str(canary)),
        "storage": Call(torch.storage._load_from_bytes, b"0"),
        "jit": Call(torch.jit.load, str(canary)),
        "type_v2": Call(torch._tensor._rebuild_from_type_v2, os.mkdir, torch.Tensor, (str(canary),), {}),
        "bytearray": Call(bytearray, 10**12),
        "numpy": Call(__import__("numpy").ndarray, (10**9,)),
    }


def bombs(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Pickles that call something, in each protocol, in both forms and bare, at several places of what was saved."""
    for name, call in calls(canary).items():
        for protocol in range(6):
            for place, value in {"root": call, "weights": {"state_dict": {"weight": call}}, "epoch": [call]}.items():
                content = pickle.dumps(value, protocol=protocol)
                form = {"root": zipped(content), "weights": old(content), "epoch": content}[place]
                yield f"{name}-{protocol}-{place}", form


def rebuild(shape: tuple[int, ...], stride: tuple[int, ...], count: int, offset: int = 0) -> bytes:
    """The pickle of a tensor that claims a shape, of a storage that claims a count of numbers."""

    def number(value: int) -> bytes:
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu" + number(count) + b"tQ"
    sides = (b"(" + b"".join(map(number, part)) + b"t" for part in (shape, stride))
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + b"".join(sides) + b"\x89}tR"
    return b"\x80\x02}U\x06weight" + rebuilt + b"s."


def tricks(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Pickles that reach code by what torch's own files use, or by instructions that torch.save does not write."""
    name, argument = b"cposix\nsystem\n", b"U" + bytes([len(str(canary)) + 6]) + f"touch {canary}".encode()
    call = name + argument + b"\x85R"
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x02tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x02\x85K\x01\x85\x89"
    contents = {
        "hooks": tensor + call + b"tR",
        "metadata": tensor + b"}" + call + b"tR",
        "shape": tensor.replace(b"K\x02\x85K\x01", call + b"K\x01") + b"}tR",
        "storage-type": tensor.replace(b"ctorch\nFloatStorage\n", call) + b"}tR",
        "storage-key": tensor.replace(b"U\x010", call) + b"}tR",
        "storage-by-name": tensor.replace(b"ctorch\nFloatStorage\n", name) + b"}tR",
        "persistent": b"(U\x06module" + name + b"U\x01xU\x01ytQ" + argument + b"\x85R",
        "type": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + name + b"ctorch\nTensor\n" + argument + b"\x85}tR",
        "parameter-state": b"ctorch._utils\n_rebuild_parameter_with_state\n(" + tensor + b"}tR\x89}" + call + b"tR",
        "state": b"ctorch.nn.modules.linear\nLinear\n)\x81}U\x08trainingcposix\nsystem\nsb",
        "set-state": b"ccollections\nOrderedDict\n)R}U\x0c__setstate__" + name + b"sb" + argument + b"b",
        "ordered": b"ccollections\nOrderedDict\n]" + call + b"a\x85R",
        "key": b"}" + call + b"K\x01s",
        "instance": b"(" + argument + b"iposix\nsystem\n",
        "object": b"(" + name + argument + b"o",
        "new": name + argument + b"\x85\x81",
        "new-with-names": name + argument + b"\x85}\x92",
        "dotted": b"\x8c\x05torch\x8c\x10_utils.os.system\x93" + argument + b"\x85R",
        "dotted-plain": b"ctorch._utils\nannotations.os.system\n" + argument + b"\x85R",
        "made-name": b"U\x05posixU\x06system\x93" + argument + b"\x85R",
        "popped": call + b"0}",
        "reduced-class": b"ctorch\nTensor\n" + argument + b"\x85R",
        "renamed": b"c__builtin__\neval\n" + argument + b"\x85R",
        "second": b"}.\x80\x02" + call,
        "device": b"ctorch\ndevice\n" + call + b"\x85R",
        "allocated": b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x40\x85R",
        "encoded": b"c_codecs\nencode\n(U\x01xU\x08rot_13__tR",
        "size": b"ctorch\nSize\n(\x8a\x05\x00\x00\x00\x00\x40ttR",
        "loader": b"ctorch.storage\n_load_from_bytes\nC\x02K.\x85R",
        "layout": b"ctorch.serialization\n_get_layout\n" + call + b"\x85R",
        "dataclass": b"ctorch._C\n_jit_get_operation\n" + argument + b"\x85R",
    }
    for key, content in contents.items():
        whole = b"\x80\x02" + content + b"."
        yield f"trick-zip-{key}", zipped(whole, {"0": b"\0" * 8})
        yield f"trick-old-{key}", old(whole)


def claims() -> Iterator[tuple[str, bytes]]:
    """Tensors that claim more than the file holds."""
    eight = {"0": b"\0" * 8}
    yield "storage-of-1e9", zipped(rebuild((10**9,), (1,), 10**9), eight)
    yield "shape-of-1e9", zipped(rebuild((10**9,), (1,), 2), eight)
    yield "stride-of-1e9", zipped(rebuild((2,), (10**9,), 2), eight)
    yield "expanded-to-1e18", zipped(rebuild((10**9, 10**9), (0, 0), 2), eight)
    yield "offset-of-1e9", zipped(rebuild((2,), (1,), 2, 10**9), eight)
    yield "negative", zipped(rebuild((-2,), (1,), 2), eight)
    yield "no-storage", zipped(rebuild((2,), (1,), 2))
    yield "old-storage-of-1e9", old(rebuild((10**9,), (1,), 10**9))
    for name, claim in {"elements": [10**9], "overflow": [2**62, 8], "negative": [-1]}.items():
        header = f'{{"weight":{{"dtype":"F32","shape":{claim},"data_offsets":[0,8]}}}}'.encode()
        yield f"safetensors-{name}", len(header).to_bytes(8, "little") + header + b"\0" * 8
    two = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    yield "safetensors-overlap", len(two).to_bytes(8, "little") + two + b"\0" * 12
    odd = b'{"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}'
    yield "safetensors-dtype", len(odd).to_bytes(8, "little") + odd + b"\0" * 8
    yield "safetensors-header", (2**25).to_bytes(8, "little") + b"{" + b" " * 2**25
    deep = b'{"a":' * 5000
    yield "safetensors-deep", len(deep).to_bytes(8, "little") + deep


def archives() -> Iterator[tuple[str, bytes]]:
    """Zips that no torch.save wrote."""
    plain = pickle.dumps({}, protocol=2)
    for name in ("../evil", "/evil", "archive/../../evil", "C:evil", "archive\\..\\evil"):
        yield f"slip-{name}", zipped(plain, more={name: b"x"})
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    yield "packed", made.getvalue()
    link = zipfile.ZipInfo("archive/data/0")
    link.external_attr = 0o120777 << 16
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", plain)
        archive.writestr(link, "/etc/passwd")
    yield "link", made.getvalue()
    yield "twice", zipped(plain, more={"archive/data.pkX": b"x"}).replace(b"data.pkX", b"data.pkl")
    yield "other", zipped(plain, more={"elsewhere/a": b"x"})
    yield "script", zipped(plain, more={"archive/constants.pkl": plain})
    yield "comment", zipped(plain)[:-2] + b"\x03\0abc"
    yield "big-endian", zipped(plain, more={"archive/byteorder": b"big"})


def pickles() -> Iterator[tuple[str, bytes]]:
    """Pickles that are deep, shared, long or broken."""
    pairs = b"\x80\x02" + b")" + b"q\0" + b"h\0h\0\x86q\0" * 60
    contents = {
        "deep-tuple": b"\x80\x02)" + b"\x85" * 15_000 + b".",
        "deep-list": b"\x80\x02" + b"]" * 15_000 + b"a" * 14_999 + b".",
        "shared-key": b"\x80\x02}" + pairs[2:] + b"N" + b"s.",
        "too-long": b"\x80\x02" + b"N" * (LONGEST + 1) + b".",
        "long-integer": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"1" * 100 + b".",
        "long-decimal": b"L" + b"9" * 100_000 + b"L\n.",
        "long-text": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",
        "memo": b"\x80\x02]r\xff\xff\xff\xff.",
        "no-memo": b"\x80\x02h\x07.",
        "no-end": b"\x80\x02}",
        "nothing": b"\x80\x02.",
        "extension": b"\x80\x02\x82\x01.",
        "number": pickle.dumps(3, protocol=2),
        "persistent": b"\x80\x02K\x01Q.",
        "marks": b"\x80\x02((((t.",
    }
    for name, content in contents.items():
        yield f"zip-{name}", zipped(content)
        yield f"old-{name}", old(content)


def others() -> Iterator[tuple[str, bytes]]:
    """What people name by mistake, and weights that are none."""
    starts: tuple[bytes, ...] = (
        b"",
        b"x",
        b"\0" * 8,
        b"<!DOCTYPE html><p>404",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"PK",
    )
    starts += (
        b"\x1f\x8b" + b"0" * 99,
        b"BZh91AY&SY" + b"0" * 99,
        b"7z\xbc\xaf\x27\x1c" + b"0" * 99,
        b"\x89HDF\r\n\x1a\n00",
    )
    starts += (b"\x93NUMPY" + b"0" * 99, b"\x08\x07\x12\x07pytorch" + b"0" * 99, b"\0" * 257 + b"ustar\0" + b"0" * 99)
    for start in starts:
        yield f"start-{start[:9]!r}", start
    state = good()
    for name, values in {
        "nan": state | {"bias": torch.tensor([0.0, torch.nan])},
        "infinite": state | {"bias": torch.tensor([0.0, torch.inf])},
        "overflow": state | {"bias": torch.tensor([0.0, 1e300], dtype=torch.float64)},
        "integers": state | {"bias": torch.zeros(2, dtype=torch.int64)},
        "complex": state | {"bias": torch.zeros(2, dtype=torch.complex64)},
        "boolean": state | {"bias": torch.zeros(2, dtype=torch.bool)},
        "shape": state | {"bias": torch.zeros(3)},
        "more": state | {"scale": torch.zeros(3)},
    }.items():
        yield f"safetensors-{name}", save(values)
        yield f"torch-{name}", saved(values)
    yield "sparse", saved(state | {"bias": torch.eye(2).to_sparse()})
    yield "meta", saved(state | {"bias": torch.empty(2, device="meta")})
    with warnings.catch_warnings():  # torch says of these that they will go
        warnings.simplefilter("ignore")
        yield "quantised", saved(state | {"bias": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)})
    yield "module", saved(torch.nn.Linear(3, 2))
    yield "tensor", saved(torch.zeros(2))
    yield "text", saved(state | {"bias": "zero"})


def saved(value: Any, **more: Any) -> bytes:
    """What torch.save writes."""
    made = io.BytesIO()
    torch.save(value, made, **more)
    return made.getvalue()


def cut() -> Iterator[tuple[str, bytes]]:
    """Good files that end too early, at places of a seed."""
    forms = {"zip": saved(good()), "old": saved(good(), _use_new_zipfile_serialization=False), "safe": save(good())}
    places = random.Random(8)
    for name, content in forms.items():
        for length in sorted(places.sample(range(len(content)), 12)):
            yield f"cut-{name}-{length}", content[:length]


def flipped() -> Iterator[tuple[str, bytes]]:
    """Good files in which some bytes are others, at places of a seed; a few are still good."""
    forms = {"zip": saved(good()), "old": saved(good(), _use_new_zipfile_serialization=False), "safe": save(good())}
    places = random.Random(9)
    for name, content in forms.items():
        for number in range(60):
            changed = bytearray(content)
            for _ in range(places.choice((1, 1, 2, 8))):
                changed[places.randrange(len(changed))] = places.choice((0, 1, 0x2E, 0x52, 0x7F, 0x80, 0xFF))
            yield f"flipped-{name}-{number}", bytes(changed)


def cases(canary: Path) -> dict[str, bytes]:
    """All of them by name."""
    makers = (partial(bombs, canary), partial(tricks, canary), claims, archives, pickles, others, cut)
    return {f"{name}": content for maker in makers for name, content in maker()}


__all__ = ["cases", "flipped", "good", "old", "saved", "zipped"]
