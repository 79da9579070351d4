"""YAML files of users: safe, without surprises, and with the line of every key for messages."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

__all__ = ["Document", "Loader", "read"]

LARGEST = 2**20
NODES = 100_000

Place = tuple[str | int, ...]
T = TypeVar("T")


class Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, and reads `1e-3` as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader does, after a look for repeated keys."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            text = str(key.value)
            if key.tag != "tag:yaml.org,2002:merge" and text in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"{line}: key {text!r} stands twice, first in line {seen[text]}; delete one of them")
            seen[text] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass(frozen=True)
class Document:
    """What a file holds.

    Arguments:
        path: Of the file.
        data: Its content.
        lines: The line of each key and list item, by its place: ('benches', 0, 'name').
    """

    path: Path
    data: Any
    lines: Mapping[Place, int]

    def validate(self, into: type[T], context: Mapping[str, object]) -> T:
        """The content as a value.

        Raises:
            ValueError: If it is not one; one line with file, line and key, and what to type.
        """
        try:
            return TypeAdapter(into).validate_python(self.data, context=dict(context))
        except ValidationError as error:
            raise ValueError(self._explain(error)) from error

    def where(self, place: Sequence[str | int]) -> str:
        """'suite.yaml:12: benches.0.name', with the line of the nearest key that the file has."""
        known = tuple(place)
        while known and known not in self.lines:
            known = known[:-1]
        dotted = ".".join(map(str, place))
        return f"{self.path}:{self.lines.get(known, 1)}: {dotted}" if dotted else f"{self.path}:1"

    def _explain(self, error: ValidationError) -> str:
        errors = error.errors(include_url=False)
        first = errors[0]
        place, context = list(first["loc"]), first.get("ctx", {})
        if first["type"] == "unknown_key":
            place.append(context["key"])
        if first["type"] == "missing":
            message = f"key {place.pop()!r} is missing; add it"
        elif first["type"] in ("unknown_key", "value_error"):
            message = first["msg"].removeprefix("Value error, ")
        else:
            found = repr(first.get("input"))
            found = found if len(found) <= 60 else f"{found[:57]}..."
            message = f"needed is {_needed(first['type'], context, first['msg'])}, not {found}"
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        return f"{self.where(place)}: {' '.join(message.split())}{more}"


NEEDED = {
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "string_type": "a text (put it in quotes)",
    "string_pattern": "a name of letters, digits and . _ + - that begins with a letter or digit",
    "string_too_short": "a text that is not empty",
    "bool": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "model": "a mapping of keys to values",
    "dict": "a mapping of keys to values",
    "is_instance": "a mapping of keys to values with a kind",
    "literal": "{expected}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "a number above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "a number below {lt}",
}
"""What to write instead, by the beginning of pydantic's type of error."""


def _needed(type: str, context: Mapping[str, Any], message: str) -> str:
    for start in sorted(NEEDED, key=len, reverse=True):
        if type.startswith(start):
            return NEEDED[start].format_map(context)
    return message.removeprefix("Input should be ")


def read(path: Path) -> Document:
    """A YAML file; no tag of it runs code, and no anchor makes it grow without bounds.

    Raises:
        ValueError: If it is missing, too large, or not YAML, with its line.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path} is larger than {LARGEST} bytes, too large for a file of this kind")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
    try:
        node = yaml.compose(text, Loader)
        lines: dict[Place, int] = {}
        if node is not None:
            _walk(node, (), lines, [0])
        data = yaml.load(text, Loader)  # noqa: S506  (a subclass of SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}:{line}: not YAML that rdiff reads: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}:{error}") from error
    return Document(path, data, lines)


def _walk(node: yaml.Node, place: Place, lines: dict[Place, int], count: list[int]) -> None:
    count[0] += 1
    if count[0] > NODES:
        raise ValueError("1: its anchors expand to more than a suite can hold")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*place, str(key.value))
            lines[below] = key.start_mark.line + 1
            _walk(value, below, lines, count)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            below = (*place, index)
            lines[below] = value.start_mark.line + 1
            _walk(value, below, lines, count)
