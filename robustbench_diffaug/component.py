"""Everything a suite names is a `Component`: a frozen value whose fields are its YAML, found by its `kind`."""

import json
import sys
from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from functools import cache, lru_cache
from hashlib import blake2b
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import isabstract
from math import isfinite
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    PlainSerializer,
    WithJsonSchema,
    field_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

__all__ = [
    "Component",
    "Later",
    "Options",
    "Outside",
    "Value",
    "digest_of",
    "find",
    "fingerprint",
    "is_built_in",
    "kinds",
    "load_kind",
    "look_again",
    "offers",
    "suggest",
    "trusting",
]


class Outside:
    """Marks a field on which records do not depend: `alpha: Annotated[float, Outside] = 0.001`."""


class Later:
    """Marks a field that came after records were made: while it has its default, records do not depend on it."""


def _freeze(value: object) -> object:
    if isinstance(value, Mapping):
        return tuple(sorted(((str(k), _freeze(v)) for k, v in value.items()), key=lambda pair: pair[0]))
    if isinstance(value, list | tuple):
        return tuple(map(_freeze, value))
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"needed is a finite number, not {value}")
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"needed are plain texts, numbers, lists and mappings, not {type(value).__name__}")


Options = Annotated[
    tuple[tuple[str, Any], ...],
    BeforeValidator(_freeze),
    PlainSerializer(lambda pairs: dict(pairs), return_type=dict),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "array", "items": {"type": "array"}}]}),  # a lock has pairs
]
"""Keyword arguments of a library's constructor: a mapping in YAML, sorted pairs in the value, hence hashable."""

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """Within it, suites may (or may not) name kinds that run code of the user's."""
    token = _trusted.set(trust)
    try:
        yield
    finally:
        _trusted.reset(token)


def suggest(word: str, known: list[str]) -> str:
    """'; did you mean X?', or the list of what there is where nothing is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    more = ", ..." if len(known) > 24 else ""
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known[:24])}{more}" if known else ""


def digest_of(value: object, size: int = 8) -> str:
    """BLAKE2b of a JSON value, in hexadecimal, `2 * size` characters long."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return blake2b(text.encode(), digest_size=size).hexdigest()


def _identity(value: object) -> object:
    if isinstance(value, Value):
        return value.identity()
    if isinstance(value, tuple | list):
        return [_identity(item) for item in value]
    return value


def _complaint(message: str, key: object) -> PydanticCustomError:
    """An error about one key of a mapping, for `Document` to say where that key stands."""
    named = str(key).encode("utf-8", "backslashreplace").decode()
    return PydanticCustomError("at_key", "{message}", {"message": message, "key": named})


def _is_number(annotation: object) -> bool:
    """Whether a field holds a number (or nothing) and no boolean."""
    union = get_origin(annotation) in (Union, UnionType)
    types = {get_args(part)[0] if get_origin(part) is Annotated else part for part in get_args(annotation)}
    types = types if union else {annotation}
    return bool(types & {int, float}) and bool not in types


class Value(BaseModel):
    """A frozen, hashable group of fields that knows what of it records depend on."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        """Names an unknown key itself, since pydantic cannot say what was meant; and `true` is not 1."""
        if isinstance(data, Mapping) and not isabstract(cls):
            for key, value in data.items():
                if key not in cls.model_fields:
                    known = [name for name in cls.model_fields if name != "kind"]
                    raise _complaint(f"unknown key {key!r}{suggest(str(key), known)}", key)
                if isinstance(value, bool) and _is_number(cls.model_fields[key].annotation):
                    raise _complaint(f"needed is a number, not {str(value).lower()}", key)
        return data

    def contents(self) -> str:
        """A digest of what the value names but does not hold, such as a file. Default: nothing."""
        return ""

    def identity(self) -> dict[str, object]:
        """What records depend on: the contents, and all fields, recursively.

        Fields marked `Outside` are left out, and those marked `Later` while they have their default.
        """
        kept = {
            name: _identity(value)
            for name, field in type(self).model_fields.items()
            if Outside not in field.metadata
            and ((value := getattr(self, name)) != field.default or Later not in field.metadata)
        }
        contents = self.contents()
        return {**kept, "contents": contents} if contents else kept


class Component(Value, ABC):
    """A frozen, hashable value with behaviour, and an open family of kinds.

    Validating a mapping against an abstract family resolves its `kind` through the family's entry points, so
    `datasets: tuple[Dataset, ...]` in a pydantic model is the whole plug-in mechanism.
    """

    family: ClassVar[str]
    version: ClassVar[int] = 1
    """Bumped when equal fields would now give other records."""
    runs_code: ClassVar[bool] = False
    """Whether its YAML names code; such kinds need `--trust` or a suite that is installed with the package."""
    kind: str

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the identity."""
        return digest_of([self.version, self.identity()])

    @model_validator(mode="wrap")
    @classmethod
    def _resolve(cls, data: Any, handler: ModelWrapValidatorHandler["Component"], info: Any) -> "Component":
        if not isinstance(data, Mapping):
            return handler(data)
        kind = data.get("kind")
        if not isabstract(cls):
            if not (isinstance(kind, str) and _leads_to(kind, cls)):
                return handler(data)
            made = handler({**data, "kind": cls.model_fields["kind"].default})
            return made.model_copy(update={"kind": kind})  # so that a lock, and a fingerprint, say whose class it is
        if not isinstance(kind, str):
            raise ValueError(f"{_article(cls)} needs a kind, one of {', '.join(kinds(cls))}")
        try:
            found = find(cls, kind)
        except ValueError as error:
            raise _complaint(str(error), "kind") from error
        if found.runs_code and not _trusted.get():
            raise _complaint(f"kind {kind} runs code that this file names; if you trust it, add --trust", "kind")
        return found.model_validate(dict(data), context=info.context)

    @field_serializer("kind")
    def _written(self, kind: str) -> str:
        """As it is: 'package.module:Class' is not what the class calls itself."""
        return kind


def _leads_to(kind: str, cls: type) -> bool:
    """Whether a kind is the path of a class, which something has imported."""
    module, colon, name = kind.partition(":")
    return bool(colon) and getattr(sys.modules.get(module), name, None) is cls


@lru_cache(maxsize=4096)
def fingerprint(component: Component) -> str:
    """`component.fingerprint`, its files looked at once until `look_again`; for loops over many cells."""
    return component.fingerprint


def look_again() -> None:
    """Forgets fingerprints, so that files that have changed since are noticed. Called when a run begins."""
    fingerprint.cache_clear()


C = TypeVar("C", bound=Component)


def _noun(family: type[Component]) -> str:
    return family.family.rpartition(".")[2].removesuffix("s")


def _article(family: type[Component]) -> str:
    return f"{'an' if _noun(family)[0] in 'aeiou' else 'a'} {_noun(family)}"


DISTRIBUTION = "robustbench-diffaug"


def is_built_in(point: EntryPoint) -> bool:
    """Whether an entry point is this package's own."""
    return point.dist is not None and point.dist.name.replace("_", "-").lower() == DISTRIBUTION


@cache
def offers(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """All entry points of a group by name, this package's own first, without importing any of them."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, not is_built_in(point), point.value)):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def kinds(family: type[Component]) -> dict[str, EntryPoint]:
    """The installed kinds of a family by name, without importing any of them."""
    return {name: points[0] for name, points in offers(family.family).items()}


def _clash(family: type[Component], point: EntryPoint) -> str:
    """Why an entry point may not have its name, which something else has too; empty where it may."""
    others = [other for other in offers(family.family).get(point.name, ()) if other is not point]
    if is_built_in(point) or not others:
        return ""
    if is_built_in(others[0]):
        return f"{point.name} is the name of a built-in {_noun(family)}, which stays what it is; take another name"
    names = " and ".join(sorted({_origin(each) for each in (point, *others)}))
    return f"{_article(family)} {point.name} comes from {names}, and only one can have the name; uninstall one"


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} ({point.value})" if point.dist else point.value


def load_kind(family: type[C], point: EntryPoint) -> type[C]:
    """The class of an entry point, imported and found fit.

    Raises:
        ValueError: If it cannot be imported, is no concrete class of the family, or has another kind or another's name.
    """
    if wrong := _clash(family, point):
        raise ValueError(wrong)
    try:
        found = point.load()
    except (Exception, SystemExit) as error:  # whatever the plug-in raises
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"the plug-in {point.name} ({point.value}) cannot be imported: {reason}") from error
    return _fit(family, found, point.name, point.name)


def _fit(family: type[C], found: object, called: str, kind: str | None) -> type[C]:
    """A class that a suite or an entry point names, once it is clear that it can be used."""
    if not (isinstance(found, type) and issubclass(found, family)):
        raise ValueError(f"{called} is not {_article(family)}")
    if isabstract(found):
        raise ValueError(f"{called} is abstract: {found.__name__} lacks {', '.join(sorted(found.__abstractmethods__))}")
    own = found.model_fields["kind"].default
    if not isinstance(own, str) or own != (kind or own):
        name = kind or "a-name"
        says = f"{own!r}" if isinstance(own, str) else "missing"
        raise ValueError(f'the kind of {called} is {says}; write kind: Literal["{name}"] = "{name}" in its class')
    return found


def find(family: type[C], kind: str) -> type[C]:
    """The class called `kind`: an entry point of the family's group, or a path 'package.module:Class'.

    Raises:
        ValueError: If there is none, or it is not of the family; the message names what is near.
    """
    if ":" not in kind:
        known = kinds(family)
        if kind not in known:
            raise ValueError(f"no {_noun(family)} is called {kind!r}{suggest(kind, list(known))}")
        return load_kind(family, known[kind])
    if not _trusted.get():
        raise ValueError(f"kind {kind} runs code that this file names; if you trust it, add --trust")
    module, _, name = kind.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ValueError(f"kind {kind} cannot be imported: {type(error).__name__}: {error}") from error
    return _fit(family, found, f"kind {kind}", None)
