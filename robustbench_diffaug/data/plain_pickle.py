"""Reads pickles of plain data and of arrays of bytes without Python's unpickler, so that no file can run code.

A pickle is a program for a stack machine. This machine knows only the instructions that build numbers, texts, lists,
tuples and mappings; the few functions that numpy's arrays are pickled with are replaced by data of ours, and every
other name is refused. Python's own `pickletools` splits the file into instructions and runs none.

References:
    Python's pickletools, https://docs.python.org/3/library/pickletools.html
"""

import mmap
import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from jaxtyping import UInt8

__all__ = ["read"]

LARGEST = 2**28
"""Bytes of a file, and of all that is made by encoding texts: the largest of CIFAR-100 has 155 million."""

LONGEST = 2**21
"""Instructions of a file: the longest of CIFAR-100 has some 400 thousand."""


class Refused(ValueError):
    """What a file wants and does not get; ends 'FILE wants ...'."""


@dataclass(frozen=True)
class _Name:
    """Stands for an importable thing that is never imported."""

    name: str


@dataclass(frozen=True)
class _Bytes:
    """Stands for numpy's dtype of bytes."""


class _Array:
    """Stands for an array between its creation and its filling."""

    values: UInt8[np.ndarray, "..."] | None = None


_KNOWN = {
    f"{module} {name}": _Name(name)
    for name, modules in {
        "_reconstruct": ("numpy.core.multiarray", "numpy._core.multiarray"),
        "ndarray": ("numpy",),
        "dtype": ("numpy",),
        "encode": ("_codecs",),
    }.items()
    for module in modules
}
_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = (
    "BININT BININT1 BININT2 LONG1 SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE SHORT_BINBYTES BINBYTES BINBYTES8"
).split()
_NOTHING = ("PROTO", "FRAME", "STOP")


def read(path: Path) -> dict[str, Any]:
    """The mapping that a pickle holds, mapped into memory; its arrays are views of the file.

    Arguments:
        path: A pickle of protocol 2 to 4 with texts (of Python 2 or 3) as keys; arrays in it must be of uint8.

    Returns:
        Values by key: None, booleans, integers, texts, bytes, lists, tuples, mappings, and arrays of uint8 (these not
        within the others). Python 2's texts of 256 bytes and more are memory views, shorter ones read as Latin-1.

    Raises:
        ValueError: If the file is anything else; where it wants code to be run, the message names which.
    """
    size = path.stat().st_size
    if not 0 < size <= LARGEST:
        raise ValueError(f"{path} has {size} bytes; needed is a pickle of 1 to {LARGEST}")
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        found = _Machine(memoryview(content)).run(_instructions(content))
    except Refused as error:
        raise ValueError(f"{path} is a pickle that {error}; nothing was run") from error
    except Exception as error:  # whatever damage makes pickletools and the machine raise
        raise ValueError(f"{path} is not a whole pickle of plain data: {_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not a mapping")
    texts = {key if type(key) is str else key.decode("latin-1"): value for key, value in found.items()}
    return {key: value.values if isinstance(value, _Array) else value for key, value in texts.items()}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _instructions(content: mmap.mmap) -> Iterator[tuple[str, Any, int]]:
    """The name, argument and position of each instruction."""
    for count, (code, argument, position) in enumerate(pickletools.genops(cast(IO[bytes], content))):
        if count == LONGEST:
            raise Refused(f"has more than {LONGEST} instructions")
        yield code.name, argument, position or 0


class _Machine:
    """The stack, the memo and what each instruction does to them. Nothing here calls itself, however deep the data."""

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.encoded = 0
        self.steps: Mapping[str, Callable[[Any, int], None]] = {
            "MARK": lambda _, at: self.stack.append(_MARK),
            "BINSTRING": self.text,
            "EMPTY_DICT": lambda _, at: self.stack.append({}),
            "EMPTY_LIST": lambda _, at: self.stack.append([]),
            "EMPTY_TUPLE": lambda _, at: self.stack.append(()),
            "TUPLE": lambda _, at: self.stack.append(tuple(self.marked())),
            "TUPLE1": lambda _, at: self.stack.append(self.last(1)),
            "TUPLE2": lambda _, at: self.stack.append(self.last(2)),
            "TUPLE3": lambda _, at: self.stack.append(self.last(3)),
            "APPEND": lambda _, at: self.extend(self.last(1)),
            "APPENDS": lambda _, at: self.extend(self.marked()),
            "SETITEM": lambda _, at: self.update(self.last(2)),
            "SETITEMS": lambda _, at: self.update(self.marked()),
            "BINPUT": self.put,
            "LONG_BINPUT": self.put,
            "MEMOIZE": lambda _, at: self.put(len(self.memo), at),
            "BINGET": lambda key, at: self.stack.append(self.memo[key]),
            "LONG_BINGET": lambda key, at: self.stack.append(self.memo[key]),
            "GLOBAL": self.name,
            "STACK_GLOBAL": lambda _, at: self.name(" ".join(self.last(2)), at),
            "REDUCE": self.call,
            "BUILD": self.build,
        }

    def run(self, instructions: Iterator[tuple[str, Any, int]]) -> object:
        """What is on the stack at the end."""
        for name, argument, position in instructions:
            if name in self.steps:
                self.steps[name](argument, position)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _ARGUMENTS:
                self.stack.append(argument)
            elif name not in _NOTHING:
                what = f" {str(argument)[:80]!r}" if argument is not None else ""
                raise Refused(f"wants the instruction {name}{what}, which plain data does not need")
        (found,) = self.stack
        return found

    def last(self, count: int) -> tuple[Any, ...]:
        """Takes some values from the stack."""
        if len(self.stack) < count or any(value is _MARK for value in self.stack[-count:]):
            raise ValueError("the stack holds too little")
        taken = tuple(self.stack[-count:])
        del self.stack[-count:]
        return taken

    def marked(self) -> list[Any]:
        """Takes the values above the last mark, and the mark."""
        taken = []
        while (value := self.stack.pop()) is not _MARK:
            taken.append(value)
        return taken[::-1]

    def text(self, argument: str, position: int) -> None:
        """A long text of Python 2: a view of the file, since arrays' bytes are such."""
        start = position + 5  # the instruction and four bytes of the length
        self.stack.append(self.content[start : start + len(argument)])

    def extend(self, values: list[Any] | tuple[Any, ...]) -> None:
        """Appends to the list below."""
        if type(self.stack[-1]) is not list:
            raise ValueError("only lists are appended to")
        self.stack[-1].extend(values)

    def update(self, values: list[Any] | tuple[Any, ...]) -> None:
        """Adds keys and values to the mapping below; deep keys would be hashed by recursion."""
        if type(self.stack[-1]) is not dict or not all(type(key) in (str, bytes) for key in values[::2]):
            raise ValueError("only mappings with texts as keys are filled")
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def put(self, key: int, position: int) -> None:
        """Remembers the top of the stack."""
        if self.stack[-1] is _MARK:
            raise ValueError("a mark is no value")
        self.memo[key] = self.stack[-1]

    def name(self, wanted: str, position: int) -> None:
        """A stand-in for what a name would import; all that is not known is refused."""
        if wanted not in _KNOWN:
            raise Refused(f"wants {'.'.join(wanted.split())[:80]!r}, which plain data does not need")
        self.stack.append(_KNOWN[wanted])

    def call(self, argument: object, position: int) -> None:
        """What the call of a stand-in gives."""
        function, arguments = self.last(2)
        match function, arguments:
            case _Name("_reconstruct"), (_Name("ndarray"), (0,), "b" | b"b"):
                self.stack.append(_Array())
            case _Name("dtype"), ("u1" | "uint8", 0, 1):
                self.stack.append(_Bytes())
            case _Name("encode"), (str(text), "latin1" | "latin-1"):
                self.encoded += len(text)
                if self.encoded > LARGEST:
                    raise Refused(f"makes more than {LARGEST} bytes")
                self.stack.append(text.encode("latin-1"))
            case _Name("dtype"), (str(code), *_):
                raise Refused(f"holds an array of dtype {code[:20]!r}, where bytes (u1) are needed")
            case _:
                raise Refused("wants a call that plain data does not need")

    def build(self, argument: object, position: int) -> None:
        """Fills an array; a dtype of bytes has nothing to be filled with."""
        target, state = self.last(2)
        self.stack.append(target)
        match target, state:
            case _Bytes(), (int(), "|" | b"|", *_):
                return
            case _Array(), (1, tuple(shape), _Bytes(), bool(fortran), content):
                target.values = _array(shape, content, fortran)
            case _:
                raise Refused("fills something that is not an array of bytes")


def _array(shape: tuple[Any, ...], content: object, fortran: bool) -> UInt8[np.ndarray, "..."]:
    """An array over a buffer; nothing is allocated for what a shape claims."""
    # Texts of Python 2 that are no views are short; a long one could be copied again and again.
    raw = content.encode("latin-1") if type(content) is str and len(content) < 256 else content
    if not isinstance(raw, bytes | memoryview) or not all(type(side) is int and 0 <= side < 2**31 for side in shape):
        raise ValueError("an array is not made of bytes and a shape")
    if len(shape) > 4 or prod(shape) != len(raw):
        raise ValueError(f"an array of shape {shape[:8]} has {len(raw)} bytes")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
