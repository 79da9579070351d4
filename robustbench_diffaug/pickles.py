"""Says what a pickle of tensors holds, and what code it asks for, without unpickling it.

A pickle is a program for a stack machine. This one runs it on stand-ins: nothing is imported, called or allocated, and
a tensor is only a note of where its numbers lie. Python's own `pickletools` splits the file into instructions.

References:
    Python's pickletools, https://docs.python.org/3/library/pickletools.html
    What torch.load(weights_only=True) allows, https://pytorch.org/docs/stable/notes/serialization.html
"""

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from math import prod
from mmap import mmap
from typing import IO, Any, cast

__all__ = ["ALLOWED", "LONGEST", "Pickled", "Refused", "Storage", "Stored", "Thing", "look"]

LONGEST = 2**19
"""Instructions of a pickle; a training state of ResNet-50 with its optimiser has some 30 thousand."""

LARGEST = 2**24
"""Bytes that are made by encoding texts, such as the state of a generator of random numbers."""

SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2}
SIZES |= {"int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16}
"""Bytes of a number, by dtype."""

_STORAGES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64"},
    **{"ComplexDoubleStorage": "complex128"},
}
_QUANTISED = (
    *("QInt8Storage", "QUInt8Storage", "QInt32Storage", "qint8", "quint8", "qint32"),
    *("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric"),
)
_ODD = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch.serialization._get_layout": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without numbers (of the device meta)",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a device of its own",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a device of its own",
    "torch._utils._rebuild_parameter_with_state": "a parameter with attributes of its own",
    "torch._utils._rebuild_tensor_v3": "a tensor of a dtype that weights do not have",
    "torch._tensor._rebuild_from_type_v2": "a tensor of a class of its own",
    "torch.Tensor": "a tensor of an old version of torch",
    "torch.nn.parameter.Parameter": "a parameter of an old version of torch",
}
_PLAIN = {
    *("collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device", "_codecs.encode"),
    *("builtins.set", "builtins.complex", "builtins.bytearray", "torch._utils._rebuild_parameter"),
    *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"),
    *(f"torch.{name}" for name in (*_STORAGES, *SIZES, *_QUANTISED)),
}
ALLOWED = frozenset({*_PLAIN, *_ODD})
"""The names that need no code: a part of what torch's own safe loader allows."""

_TORCH = frozenset(
    (
        "PROTO STOP GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE "
        "NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 BINFLOAT BINUNICODE "
        "SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1"
    ).split()
)
"""The instructions that torch's safe loader knows."""


class Refused(ValueError):
    """What is wrong with a pickle; a whole clause, such as 'holds a sparse tensor'."""


@dataclass(frozen=True, slots=True)
class Thing:
    """Stands for an importable thing that is never imported, or for what it would make of its arguments."""

    name: str
    made: bool = False


@dataclass(frozen=True, slots=True)
class Storage:
    """Numbers in a row, somewhere in the file.

    Arguments:
        key: Its name in the file.
        dtype: Of the numbers, as in torch.
        count: How many.
    """

    key: str
    dtype: str
    count: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file: its shape and the numbers it looks at, all of which the storage has."""

    storage: Storage
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Pickled:
    """What a pickle holds.

    Arguments:
        value: Plain data with `Stored` for each tensor and `Thing` for what needs code.
        needs: The names of the code that it asks for, in order.
        storages: By key.
        odd: The first instruction that torch's safe loader does not know, or nothing.
        protocol: Of the pickle.
    """

    value: Any
    needs: tuple[str, ...]
    storages: dict[str, Storage] = field(default_factory=dict)
    odd: str = ""
    protocol: int = 0


def look(file: BytesIO | mmap) -> Pickled:
    """Follows one pickle from where the file stands to behind its end.

    Arguments:
        file: In memory, or a map of it: a length that a hostile file claims is then bounded by what is there.

    Raises:
        Refused: If it is damaged, longer than any of weights, or holds tensors that no network takes.
    """
    machine = _Machine()
    try:
        value = machine.run(file)
    except Refused as error:
        if not machine.needs:
            raise
        value = Thing(str(error), made=True)
    except Exception as error:  # whatever damage makes pickletools and the machine raise
        if not machine.needs:
            reason = " ".join(str(error).split())[:120]
            raise Refused(f"holds a damaged pickle ({type(error).__name__}: {reason})") from error
        value = Thing("damaged", made=True)
    return Pickled(value, tuple(machine.needs), machine.storages, machine.odd, machine.protocol)


class _Machine:
    """The stack, the memo and what each instruction does to them. Nothing here calls itself, however deep the data."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.needs: dict[str, None] = {}
        self.storages: dict[str, Storage] = {}
        self.odd = ""
        self.protocol = 0
        self.encoded = 0

    def run(self, file: BytesIO | mmap) -> object:
        """What is on the stack at the end."""
        for count, (code, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], file))):
            if count == LONGEST:
                raise Refused(f"holds a pickle of more than {LONGEST} instructions, which no weights need")
            if code.name not in _TORCH:
                self.odd = self.odd or code.name
            if code.name in _STEPS:
                _STEPS[code.name](self, argument)
            elif argument is not None and not code.stack_before:
                self.stack.append(argument)
            elif code.name != "STOP":
                raise Refused(f"holds a pickle with the instruction {code.name}, which no weights need")
        if len(self.stack) != 1 or self.marks:
            raise ValueError("the stack does not end with one value")
        return self.stack[0]

    def last(self, count: int) -> list[Any]:
        """Takes some values from the stack."""
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise ValueError("the stack holds too little")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def marked(self) -> list[Any]:
        """Takes the values above the last mark, and the mark."""
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def extend(self, values: list[Any]) -> None:
        """Appends to the list (or adds to the set) below."""
        target = self.top()
        if type(target) is list:
            target.extend(values)
        elif type(target) is not Thing:
            raise ValueError("only lists are appended to")

    def update(self, values: list[Any]) -> None:
        """Adds keys and values to the mapping below."""
        target = self.top()
        if type(target) is dict:
            target.update(_pairs(values[::2], values[1::2]))
        elif type(target) is not Thing:
            raise ValueError("only mappings are filled")

    def top(self) -> Any:
        """The value on top of the stack, which stays."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("the stack holds too little")
        return self.stack[-1]

    def put(self, key: object) -> None:
        """Remembers the top of the stack."""
        self.memo[int(str(key))] = self.top()

    def name(self, module: object, name: object) -> None:
        """A stand-in for what a name would import, by its name in Python 3; notes the ones that need code."""
        old = (str(module), str(name))
        full = ".".join(NAME_MAPPING.get(old) or (IMPORT_MAPPING.get(old[0], old[0]), old[1]))
        if full not in ALLOWED:
            self.needs.setdefault(full[:200])
        self.stack.append(Thing(full))

    def call(self, function: object, arguments: object) -> None:
        """What the call of a stand-in would give."""
        if type(function) is not Thing or type(arguments) is not tuple:
            if type(function) is Thing and type(arguments) is Thing:
                self.stack.append(Thing(function.name, made=True))
                return
            raise ValueError("something is called that is no function")
        if function.made or function.name not in ALLOWED:
            self.stack.append(Thing(function.name, made=True))
        elif function.name in _ODD:
            raise Refused(f"holds {_ODD[function.name]}, where plain tensors of numbers are needed")
        else:
            self.stack.append(self.plain(function.name, arguments))

    def plain(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What one of the functions gives that torch's safe loader calls, for the arguments that torch.save writes."""
        match name.rpartition(".")[2], arguments:
            case (("OrderedDict" | "Counter"), ()):
                return {}
            case "OrderedDict", (list(pairs),) if all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
                return _pairs([pair[0] for pair in pairs], [pair[1] for pair in pairs])
            case "Counter", (dict(counts),):
                return dict(counts)
            case "_rebuild_tensor_v2", (Storage() as storage, offset, shape, stride, bool(), dict(), *more):
                if not more or more == [{}] or more == [None]:
                    return _stored(storage, offset, shape, stride)
            case "_rebuild_tensor", (Storage() as storage, offset, shape, stride):
                return _stored(storage, offset, shape, stride)
            case "_rebuild_parameter", (Stored() as tensor, bool(), dict()):
                return tensor
            case "Size", (tuple(shape),) if all(type(side) is int for side in shape):
                return shape
            case "set", (list(values),):
                _pairs(values, values)
                return Thing(name, made=True)
            case "device", (str(), *index) if all(type(number) is int for number in index):
                return Thing(name, made=True)
            case "complex", (float(), float()):
                return Thing(name, made=True)
            case "encode", (str(text), "latin1" | "latin-1"):
                self.encoded += len(text)
                if self.encoded <= LARGEST:
                    return text.encode("latin-1")
            case "bytearray", (bytes(content),):
                return content
        raise Refused(f"calls {name} in a way that torch.save does not")

    def build(self, target: object, state: object) -> None:
        """Sets attributes: of a state_dict its versions, which are not needed; of a stand-in nothing."""
        if type(target) is not Thing and not (type(target) is dict and type(state) is dict):
            raise Refused("sets attributes of something that is no mapping")
        self.stack.append(target)

    def refer(self, identity: object) -> None:
        """The storage (or, in files of whole modules, the class) that a persistent id means."""
        match identity:
            case ("storage", Thing(kind, False), str(key), str(), int(count), *view) if (
                kind.removeprefix("torch.") in _STORAGES and view in ([], [None]) and 0 <= count < 2**62
            ):
                found = Storage(key, _STORAGES[kind.removeprefix("torch.")], count)
                if self.storages.setdefault(key, found) != found:
                    raise Refused(f"says two things of what it stores under {key[:40]!r}")
                self.stack.append(found)
            case ("storage", Thing(kind, False), *_) if kind.removeprefix("torch.") in _QUANTISED:
                raise Refused("holds a quantised tensor, where plain tensors of numbers are needed")
            case ("module", Thing() as module, *_):
                self.stack.append(module)
            case _:
                raise Refused("stores its numbers in a way that torch.save does not")

    def instance(self, argument: object, values: list[Any]) -> None:
        """The old way to make an object: its class as text, or below the arguments."""
        if isinstance(argument, str):
            self.name(*argument.split(" ", 1))
            self.call(self.stack.pop(), tuple(values))
        else:
            self.call(values[0], tuple(values[1:]))


def _pairs(keys: list[Any], values: list[Any]) -> dict[Any, Any]:
    """A mapping with plain keys; the hash of a deep or shared tuple could take for ever."""
    if not all(type(key) in (str, int, float, bool, bytes, type(None)) for key in keys):
        raise Refused("has keys that are no texts or numbers")
    return dict(zip(keys, values, strict=True))


def _stored(storage: Storage, offset: object, shape: object, stride: object) -> Stored:
    """A tensor, once it is clear that its storage has all its numbers, each for one place only."""
    numbers = (offset, *shape, *stride) if type(shape) is tuple and type(stride) is tuple else (None,)
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers) or len(shape) != len(stride):  # type: ignore[arg-type]
        raise Refused("holds a tensor whose shape is none")
    sides: tuple[int, ...] = shape  # type: ignore[assignment]
    if len(sides) > 16:
        raise Refused(f"holds a tensor of {len(sides)} dimensions")
    count = prod(sides)
    reach = offset + sum((side - 1) * step for side, step in zip(sides, stride, strict=True)) + 1  # type: ignore
    if count and (reach > storage.count or count > storage.count):
        raise Refused(f"holds a tensor that claims the shape {sides}, and {storage.count} numbers for it")
    return Stored(storage, sides)


_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, argument: setattr(m, "protocol", argument),
    "FRAME": lambda m, argument: None,
    "MARK": lambda m, argument: m.marks.append(len(m.stack)),
    "POP": lambda m, argument: m.last(1).clear(),
    "POP_MARK": lambda m, argument: m.marked().clear(),
    "DUP": lambda m, argument: m.stack.append(m.top()),
    "NONE": lambda m, argument: m.stack.append(None),
    "NEWTRUE": lambda m, argument: m.stack.append(True),
    "NEWFALSE": lambda m, argument: m.stack.append(False),
    "EMPTY_DICT": lambda m, argument: m.stack.append({}),
    "EMPTY_LIST": lambda m, argument: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, argument: m.stack.append(()),
    "EMPTY_SET": lambda m, argument: m.stack.append(Thing("builtins.set", made=True)),
    "TUPLE": lambda m, argument: m.stack.append(tuple(m.marked())),
    "TUPLE1": lambda m, argument: m.stack.append(tuple(m.last(1))),
    "TUPLE2": lambda m, argument: m.stack.append(tuple(m.last(2))),
    "TUPLE3": lambda m, argument: m.stack.append(tuple(m.last(3))),
    "LIST": lambda m, argument: m.stack.append(m.marked()),
    "DICT": lambda m, argument: m.stack.append((lambda new: _pairs(new[::2], new[1::2]))(m.marked())),
    "APPEND": lambda m, argument: m.extend(m.last(1)),
    "APPENDS": lambda m, argument: m.extend(m.marked()),
    "ADDITEMS": lambda m, argument: m.extend(m.marked()),
    "SETITEM": lambda m, argument: m.update(m.last(2)),
    "SETITEMS": lambda m, argument: m.update(m.marked()),
    "PUT": lambda m, argument: m.put(argument),
    "BINPUT": lambda m, argument: m.put(argument),
    "LONG_BINPUT": lambda m, argument: m.put(argument),
    "MEMOIZE": lambda m, argument: m.put(len(m.memo)),
    "GET": lambda m, argument: m.stack.append(m.memo[argument]),
    "BINGET": lambda m, argument: m.stack.append(m.memo[argument]),
    "LONG_BINGET": lambda m, argument: m.stack.append(m.memo[argument]),
    "GLOBAL": lambda m, argument: m.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda m, argument: m.name(*m.last(2)),
    "REDUCE": lambda m, argument: m.call(*m.last(2)),
    "NEWOBJ": lambda m, argument: m.call(*m.last(2)),
    "NEWOBJ_EX": lambda m, argument: m.call(*m.last(3)[:2]),
    "INST": lambda m, argument: m.instance(argument, m.marked()),
    "OBJ": lambda m, argument: m.instance(None, m.marked()),
    "BUILD": lambda m, argument: m.build(*m.last(2)),
    "BINPERSID": lambda m, argument: m.refer(m.last(1)[0]),
}
