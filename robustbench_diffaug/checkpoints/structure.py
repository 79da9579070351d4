"""A digest of a network that exists in Python alone: of its numbers, of what it is made of, and of its code."""

import hashlib
import sys
from collections.abc import Iterator
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import CellType, CodeType, FunctionType, MethodType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["digest"]

LIBRARIES = {"torch", "torchvision", "timm", "transformers", "numpy", *sys.stdlib_module_names} - {"__main__"}
"""Whose classes are known by their names; the code of all others is looked at."""
DEPTH = 12  # of containers in containers, below which only types are told
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), PurePath, Enum)
NAMED = (torch.dtype, torch.Size)


def digest(network: nn.Module) -> str:
    """32 hexadecimal digits that change with the weights, the structure and the code of a network.

    Of each module: its name and class, the code of the class's own functions, its parameters and buffers, its hooks,
    and all its other attributes: plain values, tensors, arrays, functions, modules, containers of such, and objects of
    classes that are no library's. Not the training flag, the device, or what its code calls but it does not hold. Code
    is told by what Python compiles it to, so another version of Python can give another digest.

    Raises:
        ValueError: If weights are not initialised, or have no numbers.
    """
    told = hashlib.blake2b(digest_size=16)
    for word in _Teller().network(network):
        content = word.encode("utf-8", "backslashreplace")
        told.update(len(content).to_bytes(8, "little") + content)  # the length: 'ab', 'c' is not 'a', 'bc'
    return told.hexdigest()


class _Teller:
    """Texts that two values share only if they do the same, as far as that can be seen; without addresses."""

    def __init__(self) -> None:
        self.begun: dict[int, tuple[str, object]] = {}
        """What each object is called from then on, since they may hold each other; kept, so that no other takes its
        address."""

    def network(self, network: nn.Module) -> Iterator[str]:
        """All that is to be said of a network."""
        every = dict(network.named_modules(remove_duplicate=False))
        start = len(self.begun)
        for name, module in reversed(every.items()):  # so that of several names the first stays
            self.begun[id(module)] = (f"{start} {name}", module)
        for name, module in every.items():
            yield from ("module", name, *self.classes(type(module), nn.Module), *self.parts(name, module))

    def parts(self, name: str, module: nn.Module) -> Iterator[str]:
        """What a module holds, but for the modules in it, which come in their turn."""
        for key, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if is_lazy(value) or value.is_meta:
                raise ValueError(
                    f"its weights {f'{name}.{key}'.lstrip('.')} have no numbers yet; load or initialise them"
                )
            yield from ("tensor", key, self.said(value, DEPTH))
        if isinstance(module, torch.jit.ScriptModule):  # whose class says nothing
            yield from ("code", str(getattr(module, "code", "")))
        own = vars(nn.Module()).keys()
        for key, value in sorted(vars(module).items()):
            if key in HOOKS and value:
                yield from (key, self.said(list(value.values()), DEPTH))
            elif key not in own:
                yield from ("attribute", key, self.said(value, DEPTH))

    def classes(self, cls: type, root: type) -> Iterator[str]:
        """The names of a class and of those that it is derived from, and the code of those that are no library's."""
        for base in cls.__mro__[: cls.__mro__.index(root)]:
            yield f"{base.__module__}.{base.__qualname__}"
            if not _of_library(base) and not self.met(base):
                for key, value in sorted(vars(base).items()):
                    if not key.startswith("__") or isinstance(value, FunctionType):
                        yield from (key, self.said(value, DEPTH))

    def said(self, value: object, depth: int) -> str:
        """What is to be said of a value."""
        if isinstance(value, Tensor):
            return _numbers(value)
        if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
            content = hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).hexdigest()
            return f"array {value.dtype.str} {value.shape} {content}"
        if isinstance(value, PLAIN):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, NAMED):
            return str(value)
        if depth == 0:
            return type(value).__qualname__
        name, parts = self.opened(value)
        return f"{name} [{', '.join(self.said(part, depth - 1) for part in parts)}]"

    def opened(self, value: object) -> tuple[str, list[object]]:
        """What a value is, and what it is made of."""
        if isinstance(value, FunctionType):
            if met := self.met(value):
                return met, []
            cells = [_content(cell) for cell in value.__closure__ or ()]
            return "function", [value.__code__, value.__defaults__, value.__kwdefaults__, cells]
        if isinstance(value, CodeType):
            return "code", [value.co_code, value.co_names, value.co_varnames, value.co_consts]
        if isinstance(value, MethodType | staticmethod | classmethod):
            return "method", [value.__func__]
        if isinstance(value, property):
            return "property", [value.fget]
        if isinstance(value, partial):
            return "partial", [value.func, value.args, value.keywords]
        if isinstance(value, list | tuple):
            return type(value).__name__, list(value)
        if isinstance(value, set | frozenset):
            return "set", [*sorted(self.said(item, 1) for item in value)]
        if isinstance(value, dict):
            return "dict", [part for pair in value.items() for part in pair]
        if isinstance(value, type):
            return f"class {value.__module__}.{value.__qualname__}", []
        return self.instance(value)

    def instance(self, value: object) -> tuple[str, list[object]]:
        """Of an object of any other class: the class, its code and its attributes where it is no library's."""
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if met := self.met(value):
            return met, []
        if isinstance(value, nn.Module):  # in a list, say, where torch does not see it
            return name, [*self.network(value)]
        if _of_library(type(value)) and type(value).__name__ != "SimpleNamespace":
            return name, []
        slots = [getattr(value, key) for base in type(value).__mro__ for key in _slots(base) if hasattr(value, key)]
        return name, [*self.classes(type(value), object), sorted(getattr(value, "__dict__", {}).items()), slots]

    def met(self, value: object) -> str:
        """What a value is called that was told already; nothing the first time."""
        if id(value) in self.begun:
            return f"again {self.begun[id(value)][0]}"
        self.begun[id(value)] = (str(len(self.begun)), value)
        return ""


def _numbers(value: Tensor) -> str:
    if value.layout is not torch.strided or value.is_quantized:
        value = value.to_dense() if value.layout is not torch.strided else value.dequantize()
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.blake2b(content, digest_size=16).hexdigest()}"


def _of_library(cls: type) -> bool:
    made_by_exec = cls.__module__ == "builtins" and issubclass(cls, nn.Module)
    return cls.__module__.partition(".")[0] in LIBRARIES and not made_by_exec


def _slots(cls: type) -> tuple[str, ...]:
    """The attributes of a class that its objects have no dictionary for."""
    names = vars(cls).get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # of a name that has no value yet
        return None
