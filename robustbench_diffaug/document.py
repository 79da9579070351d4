"""YAML files of users: safe, without surprises, and with the line of every key for messages."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from robustbench_diffaug.component import suggest

__all__ = ["Document", "apply", "dump", "parse", "read", "unshared"]

LARGEST = 2**20
NODES = 50_000  # values, anchors expanded; some seconds to read
DEEPEST = 60  # levels, far below what recursion bears in any reader or writer
DIGITS = 18  # of a whole number: what fits into 64 bits; of a hexadecimal one two stand for 0x

Place = tuple[str | int, ...]
T = TypeVar("T")


class Loader(yaml.SafeLoader):
    """YAML without surprises: YAML 1.2's plain values, so that `no` is a text and `1e-3` a number; and no tags."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As SafeLoader does, after a look for tags and at how many values there are already."""
        event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's stub lacks its type
        self.composed += 1
        if self.composed > NODES:
            raise ValueError(f"{event.start_mark.line + 1}: holds more than {NODES} values, which no suite needs")
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


class Dumper(yaml.SafeDumper):
    """YAML that readers take alike: a text is quoted where ours, PyYAML's of 1.1 or one of 1.2 would see no text."""

    yaml_representers = {
        kind: represent
        for kind, represent in yaml.SafeDumper.yaml_representers.items()
        if kind in (dict, list, tuple, str, int, float, bool, type(None), None)  # None: refuses all others
    }

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """As SafeDumper does, but line breaks of Unicode are escaped: PyYAML itself reads them as other breaks."""
        style = '"' if re.search("[\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


for _name, (_form, _first) in PLAIN.items():
    for _one in (Loader, Dumper):
        _one.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^({_form})$"), list(_first))
Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("^0o[0-7]+$"), ["0"])  # 1.2's, which 1.1 lacks
Dumper.add_representer(str, Dumper.represent_text)


@dataclass(frozen=True)
class Document:
    """What a file holds.

    Arguments:
        path: Of the file; None for what stands in none.
        data: Its content.
        lines: The line of each key and list item, by its place: ('benches', 0, 'name').
        given: What the command line put at a place, as it was typed.
    """

    path: Path | None
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
        if self.path is None:
            return dotted or "the mapping"
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
        with open(path, "rb", opener=_opened) as file:
            if not S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"{path} is no file but a pipe or a device; give the path of a YAML file")
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


def _opened(path: str, flags: int) -> int:
    """Opens without waiting, which a pipe that nobody writes to would make us do for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


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


def dump(data: Any) -> bytes:
    """Data as a YAML file, keys in their order; `read`, PyYAML and readers of YAML 1.2 take it for the same.

    Arguments:
        data: Mappings with texts as keys, lists, tuples (read again as lists), texts, numbers, booleans and None.

    Raises:
        ValueError: If a value of another type is in it.
    """
    try:
        return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True).encode()
    except yaml.representer.RepresenterError as error:
        needed = "give mappings, lists, texts, numbers, true, false or null"
        raise ValueError(f"{_shown(error.args[-1])} cannot be written as YAML; {needed}") from error


def _walk(node: yaml.Node, place: Place, lines: dict[Place, int], count: list[int]) -> None:
    """Notes the line of each place; refuses what no suite has: repeated keys, huge numbers, endless anchors."""
    count[0] += 1
    if count[0] > NODES:
        raise ValueError("1: its anchors expand to more than a suite can hold")
    line = node.start_mark.line + 1
    if len(place) > DEEPEST:
        raise ValueError(f"{line}: nested too deeply")
    if node.tag == "tag:yaml.org,2002:int" and len(node.value) > DIGITS - node.value.startswith("0x"):
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


def unshared(data: Any) -> Any:
    """A copy in which an anchor and its aliases are values of their own, so that each can be set alone."""
    if isinstance(data, dict):
        return {key: unshared(value) for key, value in data.items()}
    return [unshared(value) for value in data] if isinstance(data, list) else data


def apply(data: Any, setting: str) -> tuple[str | int, ...]:
    """Applies 'a.b=value' to what a file holds; items of lists go by position, name or id.

    Returns:
        The place that was set.

    Raises:
        ValueError: If there is no such place, or the value is not YAML.
    """
    dotted, equals, text = setting.partition("=")
    parts = dotted.split(".")
    if not equals or not all(parts):
        raise ValueError(f"--set {setting}: needed is key=value, such as --set benches.certify.evaluator.n=1000")
    try:
        value, _ = parse(text)
    except ValueError as error:
        raise ValueError(f"--set {setting}: {str(error).partition(': ')[2]}") from error
    place, path = data, list[str | int]()
    for part in parts[:-1]:
        key = _key(place, part, setting)
        if isinstance(place, dict) and key not in place:
            raise ValueError(f"--set {setting}: there is no {part!r}{suggest(part, list(map(str, place)))}")
        place = place[key]
        path.append(key)
    path.append(_key(place, parts[-1], setting))
    place[path[-1]] = value
    return tuple(path)


def _key(place: Any, part: str, setting: str) -> str | int:
    if isinstance(place, dict):
        return part
    if not isinstance(place, list):
        raise ValueError(f"--set {setting}: {part!r} is below a plain value")
    names = [str(item.get("name", item.get("id", ""))) if isinstance(item, dict) else "" for item in place]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(place):
        return int(part)
    raise ValueError(f"--set {setting}: there is no item {part!r}{suggest(part, [name for name in names if name])}")
