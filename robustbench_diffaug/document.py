"""YAML files of users: safe, without surprises, and with the line of every key for messages."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

__all__ = ["Document", "parse", "read"]

LARGEST = 2**20
NODES = 100_000
DIGITS = 18  # of a whole number: what fits into 64 bits

Place = tuple[str | int, ...]
T = TypeVar("T")


class Loader(yaml.SafeLoader):
    """YAML without surprises: YAML 1.2's plain values, so that `no` is a text and `1e-3` a number; and no tags."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As SafeLoader does, after a look for tags."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            problem = f"tag {event.tag} is not allowed; write the plain value"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


PLAIN = {
    "merge": (r"<<", "<"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""What an unquoted text means, by its form and the letters it may begin with."""

for _name, (_form, _first) in PLAIN.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^({_form})$"), list(_first))


@dataclass(frozen=True)
class Document:
    """What a file holds.

    Arguments:
        path: Of the file.
        data: Its content.
        lines: The line of each key and list item, by its place: ('benches', 0, 'name').
        given: What the command line put at a place, as it was typed.
    """

    path: Path
    data: Any
    lines: Mapping[Place, int]
    given: Mapping[Place, str] = field(default_factory=dict)

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
        """'suite.yaml:12: benches.0.name', with the line of the nearest key that the file has, or what was typed."""
        parts, dotted = [tuple(place[:size]) for size in range(len(place), -1, -1)], ".".join(map(str, place))
        for typed in (self.given[part] for part in parts if part in self.given):
            return f"{typed}: {dotted}"
        known = next((part for part in parts if part in self.lines), ())
        return f"{self.path}:{self.lines.get(known, 1)}: {dotted}" if dotted else f"{self.path}:1"

    def _explain(self, error: ValidationError) -> str:
        errors = error.errors(include_url=False)
        first = errors[0]
        place, context = list(first["loc"]), first.get("ctx", {})
        if first["type"] == "at_key":
            place.append(context["key"])
        if first["type"] == "missing":
            message = f"key {place.pop()!r} is missing; add it"
        elif first["type"] in ("at_key", "value_error"):
            message = first["msg"].removeprefix("Value error, ")
        else:
            message = f"needed is {_needed(first['type'], context, first['msg'])}, not {_shown(first.get('input'))}"
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        return f"{self.where(place)}: {' '.join(message.split())}{more}"


NEEDED = {
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "string_type": "a text (put it in quotes)",
    "string_pattern": "a name of letters, digits and . _ + - that begins with a letter or digit",
    "string_too_short": "a text that is not empty",
    "string_too_long": "a text of at most {max_length} characters",
    "string_unicode": "a text of Unicode characters",
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


def _shown(value: object) -> str:
    """A value as it stands in YAML, cut where it is long."""
    plain = value is None or isinstance(value, bool)
    text = json.dumps(value) if plain else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read(path: Path) -> Document:
    """A YAML file; no tag of it runs code, and no anchor makes it grow without bounds.

    Raises:
        ValueError: If it is missing, too large, or not YAML, with its line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"{path} is larger than {LARGEST} bytes, too large for a file of this kind")
        text = content.decode()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error
    try:
        return Document(path, *parse(text))
    except ValueError as error:
        raise ValueError(f"{path}:{error}") from error


def parse(text: str) -> tuple[Any, dict[Place, int]]:
    """What a YAML text holds, and the line of each place in it.

    Raises:
        ValueError: If it is not YAML, has a key twice, or grows without bounds: 'LINE: what is wrong'.
    """
    lines: dict[Place, int] = {}
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _walk(node, (), lines, [0])
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{line}: not YAML that rdiff reads: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"1: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError("1: nested too deeply") from error


def _walk(node: yaml.Node, place: Place, lines: dict[Place, int], count: list[int]) -> None:
    """Notes the line of each place; refuses what no suite has: repeated keys, huge numbers, endless anchors."""
    count[0] += 1
    if count[0] > NODES:
        raise ValueError("1: its anchors expand to more than a suite can hold")
    line = node.start_mark.line + 1
    if node.tag == "tag:yaml.org,2002:int" and len(node.value) > DIGITS:
        raise ValueError(f"{line}: {'.'.join(map(str, place))}: {node.value[:DIGITS]}... is too large a number")
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            text, line = str(key.value), key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{line}: a key must be a plain text")
            if text in seen and key.tag != "tag:yaml.org,2002:merge":
                raise ValueError(f"{line}: key {text!r} stands twice, first in line {seen[text]}; delete one of them")
            seen[text] = lines[(*place, text)] = line
            _walk(value, (*place, text), lines, count)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*place, index)] = value.start_mark.line + 1
            _walk(value, (*place, index), lines, count)
