"""The JSON schema of suites and of checkpoint entries, with every installed kind, for editors (`rdiff schema`)."""

import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, version
from inspect import cleandoc, isabstract
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from robustbench_diffaug.component import DISTRIBUTION, Component, is_built_in, load_kind, offers
from robustbench_diffaug.listing import FAMILIES, family, spelled
from robustbench_diffaug.suite import Suite

__all__ = ["broken", "schema", "text"]

LEFT_OUT = {"timm": ("classes",), "hf": ("classes",)}
"""Fields that a kind of checkpoint reads from its files where they are left out."""
WORDS = {"timm": "preprocess", "hf": "preprocess", "torchvision": "preprocess"}
"""Fields that take the name of the kind as a word, for what its library states."""


def schema() -> dict[str, Any]:
    """The schema, draft 2020-12: of a suite, of a checkpoint entry, or of a list of these, by what the file holds.

    `$defs` has each family (`Checkpoint`, `Dataset`, `Denoiser`, `Evaluator`), told apart by `kind`, and `Suite`. What
    it refuses is wrong, but for numbers in quotes, which rdiff takes; rdiff also looks at whether values fit together,
    and at files.

    References:
        JSON Schema: A Media Type for Describing JSON Documents (Wright et al., 2022),
        https://json-schema.org/draft/2020-12/json-schema-core
    """
    families = {what: family(what) for what in FAMILIES}
    found = {what: _found(what)[0] for what in FAMILIES}
    named = (kind for several in found.values() for kind in several.values())
    models: list[type[BaseModel]] = [Suite, *families.values(), *named]
    made, document = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(models)], schema_generator=_Generator
    )
    references = {model: reference["$ref"] for (model, _), reference in made.items()}
    definitions = document["$defs"]
    for what, several in found.items():
        branches = {}
        for name, kind in several.items():
            definition = _definition(definitions, references[kind])
            definition["title"] = f"{what.removesuffix('s')} {name}"
            if what == "checkpoints":
                _completed(name, definition)
            told = str(definition.get("description", "")).partition("\n")[0]
            branches[name] = references[kind], f"{told} Needs --trust." if kind.runs_code else told
        _definition(definitions, references[families[what]]).update(_told_apart(what.removesuffix("s"), branches))
        definitions.setdefault(families[what].__name__, {"$ref": references[families[what]]})
    entry, suite = ({"$ref": references[model]} for model in (families["checkpoints"], Suite))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "rdiff",
        "description": f"A suite of rdiff {version(DISTRIBUTION)}, a checkpoint entry, or a list of entries.",
        "if": {"type": "array"},
        "then": {"items": entry, "minItems": 1},
        "else": {"if": {"required": ["kind"]}, "then": entry, "else": suite},
        "$defs": definitions,
    }


def _definition(definitions: dict[str, dict[str, Any]], reference: str) -> dict[str, Any]:
    return definitions[reference.removeprefix("#/$defs/")]


def text() -> str:
    """The schema as a JSON file, the same for the same installed packages."""
    return json.dumps(schema(), indent=1, sort_keys=True) + "\n"


def broken() -> Iterator[str]:
    """A line for each installed kind that cannot be used, and hence is not in the schema."""
    for what in FAMILIES:
        yield from (spelled(f"left out of {what}: {reason}") for reason in _found(what)[1])


def _found(what: str) -> tuple[dict[str, type[Component]], tuple[str, ...]]:
    """The kinds of a family that can be used, by name, and why others cannot."""
    usable, reasons = {}, []
    above = family(what)
    for point in (point for several in offers(above.family).values() for point in several):
        try:
            found = load_kind(above, point)
            if not is_built_in(point):
                _describable(found, point)
        except ValueError as error:
            reasons.append(str(error))
        else:
            usable[point.name] = found
    return usable, tuple(reasons)


def _describable(found: type[Component], point: EntryPoint) -> None:
    """Finds that the fields of a plug-in have a JSON schema; one that has none may not spoil that of the others."""
    try:
        models_json_schema([(found, "validation")], schema_generator=_Generator)
    except Exception as error:  # whatever types of the plug-in's raise
        reason = f"{point.name} ({point.value}) has fields without a JSON schema: {error}"
        raise ValueError(reason.partition("\n")[0]) from error


def _told_apart(noun: str, branches: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The schema of a family: `kind`, then what that kind has, so that messages are about the kind that was meant.

    Arguments:
        noun: What one of the family is called.
        branches: The reference of each kind and what to say of it.
    """
    named = [{"const": name, "description": told} for name, (_, told) in branches.items()]
    code = {"pattern": ":", "description": "package.module:Class, a class of yours. Needs --trust."}
    return {
        "title": noun,
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"type": "string", "anyOf": [*named, code]}},
        "allOf": [
            {"if": {"properties": {"kind": {"const": name}}, "required": ["kind"]}, "then": {"$ref": reference}}
            for name, (reference, _) in branches.items()
        ],
    }


def _completed(kind: str, definition: dict[str, Any]) -> None:
    """What a kind of checkpoint puts in place of what its entry leaves out, or says in a word."""
    for name in LEFT_OUT.get(kind, ()):
        definition["required"].remove(name)
    if kind in WORDS:
        own = definition["properties"][WORDS[kind]]
        about = {key: own.pop(key) for key in ("default", "description") if key in own}
        definition["properties"][WORDS[kind]] = {**about, "anyOf": [own, {"const": kind}]}


class _Generator(GenerateJsonSchema):
    """Pydantic's, with descriptions from docstrings."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # a default that has no JSON is left out

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """Of a family nothing yet; of any other class its fields, and what its docstring says of them."""
        found: type[BaseModel] = schema["cls"]
        if issubclass(found, Component) and isabstract(found):
            return {} if "family" in vars(found) else self._family(found)
        made = super().model_schema(schema)
        told, lead = _arguments(found), _lead(found)
        mapping = next(each for each in (made, *made.get("anyOf", ())) if "properties" in each)
        if lead:
            mapping["description"] = lead
        for name, value in mapping["properties"].items():
            if name in told:
                value["description"] = told[name]
        return made

    def _family(self, found: type[Component]) -> JsonSchemaValue:
        """Of a class that only some kinds of a family are of: the family's."""
        families = (each for each in found.__mro__ if issubclass(each, Component) and "family" in vars(each))
        return self.generate_inner(next(families).__pydantic_core_schema__)

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never: it would only say the name again."""
        return False


def _lead(found: type) -> str:
    """What a class's own docstring says before its arguments, a line for each paragraph."""
    lead = re.split(r"^(?:Arguments|Args|Raises|References):", cleandoc(found.__doc__ or ""), flags=re.MULTILINE)[0]
    return "\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", lead) if part.strip())


def _arguments(found: type) -> dict[str, str]:
    """What the docstrings of a class and of those above it say of each field, the nearest first."""
    told: dict[str, str] = {}
    for each in found.__mro__:
        section = re.search(r"^Arg(?:ument)?s:\n((?: .*\n?|\n)*)", cleandoc(each.__doc__ or ""), re.MULTILINE)
        entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section[1] if section else "", re.MULTILINE)
        told = {name: " ".join(words.split()) for name, words in entries} | told
    return told
