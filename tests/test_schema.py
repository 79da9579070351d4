"""`rdiff schema`: the schema of suites says what rdiff says."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from robustbench_diffaug import schema
from robustbench_diffaug.component import kinds
from robustbench_diffaug.document import Document, parse, read
from robustbench_diffaug.files import built_in
from robustbench_diffaug.listing import FAMILIES, family
from robustbench_diffaug.suite import Suite, entries, load
from tests.installed import installing

ROOT = Path(__file__).parent.parent
FREE = {"args", "parameters", "gains", "expected"}
"""Keys whose mappings hold anything."""


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return schema.schema()


@pytest.fixture(scope="module")
def validator(made: dict[str, Any]) -> Draft202012Validator:
    Draft202012Validator.check_schema(made)
    return Draft202012Validator(made)


def wrong(validator: Draft202012Validator, data: Any) -> list[str]:
    return [f"{list(error.absolute_path)}: {error.message}" for error in validator.iter_errors(data)]


@pytest.mark.parametrize("name", built_in())
def test_every_suite_is_valid(name: str, validator: Draft202012Validator) -> None:
    assert wrong(validator, read(built_in()[name]).data) == []


def test_so_is_every_suite_and_entry_of_the_documentation(validator: Draft202012Validator) -> None:
    seen = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        if page.name == "plugins.md":  # whose kinds are not installed here
            continue
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
            try:
                data, _ = parse(block)
            except ValueError:  # two ways to write a key, one below the other
                continue
            whole = [{"kind", "id"}, {"name", "checkpoints", "benches"}]  # other blocks are parts of suites
            if isinstance(data, dict) and any(keys <= data.keys() for keys in whole):
                seen += 1
                assert wrong(validator, data) == [], page.name
    assert seen > 4


def test_so_is_what_a_run_writes_of_a_suite(validator: Draft202012Validator) -> None:
    for name in ("smoke", "quickstart", "ood", "gallery"):
        locked = load(name).suite.model_dump(mode="json", serialize_as_any=True)
        assert wrong(validator, locked) == []


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Each mapping and key of what a suite holds, but for what may be anything."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        if isinstance(data, dict):
            yield data, key
        if key not in FREE:
            yield from places(value)


def changed(data: dict[str, Any], change: Callable[[Any, Any], None]) -> Iterator[tuple[Any, dict[str, Any]]]:
    for index in range(len(list(places(data)))):
        other = copy.deepcopy(data)
        mapping, key = list(places(other))[index]
        change(mapping, key)
        yield key, other


def refused(data: Any) -> bool:
    try:
        Document(None, data, {}).validate(Suite, {"folder": ROOT})
    except ValueError:
        return True
    return False


def misspell(mapping: Any, key: Any) -> None:
    mapping[f"{key}s"] = mapping.pop(key)


def garble(mapping: Any, key: Any) -> None:
    mapping[key] = {"nothing": "of the kind"}


def test_misspelled_keys_are_refused(validator: Draft202012Validator) -> None:
    data = copy.deepcopy(read(built_in()["smoke"]).data)
    tried = list(changed(json.loads(json.dumps(data)), misspell))
    assert len(tried) > 40
    for key, other in tried:
        assert wrong(validator, other), key
        assert refused(other)


def test_what_it_refuses_rdiff_refuses(validator: Draft202012Validator) -> None:
    data = json.loads(json.dumps(read(built_in()["smoke"]).data))
    data["checkpoints"].append(json.loads(json.dumps(read(built_in()["quickstart"]).data["checkpoints"][0])))
    counts = [0, 0]
    for change in (garble, lambda mapping, key: mapping.pop(key), lambda mapping, key: mapping.update({key: None})):
        for key, other in changed(data, change):
            valid = validator.is_valid(other)
            counts[valid] += 1
            assert valid or refused(other), (key, wrong(validator, other))
    assert counts[True] > 10 and counts[False] > 100


def test_every_kind_is_there_told_apart_and_described(made: dict[str, Any], validator: Draft202012Validator) -> None:
    for what in FAMILIES:
        above = made["$defs"][family(what).__name__]
        named = {each["const"]: each["description"] for each in above["properties"]["kind"]["anyOf"] if "const" in each}
        branches = {each["if"]["properties"]["kind"]["const"] for each in above["allOf"]}
        assert named.keys() == kinds(family(what)).keys() == branches
        assert all(named.values())
        for name, point in kinds(family(what)).items():
            assert named[name].endswith("Needs --trust.") == point.load().runs_code
    smoothing = made["$defs"]["Smoothing"]
    assert smoothing["properties"]["n"]["description"] and smoothing["additionalProperties"] is False
    assert wrong(validator, {"kind": "tim", "id": "a"}) and wrong(validator, {"kind": 3}) and wrong(validator, 3)


def test_entries_and_lists_of_them_are_known_by_their_kind(validator: Draft202012Validator, tmp_path: Path) -> None:
    entry = {"kind": "mixture", "id": "a", "classes": 4}
    assert wrong(validator, entry) == [] == wrong(validator, [entry, {**entry, "id": "b"}])
    assert wrong(validator, []) and wrong(validator, [entry, {}]) and wrong(validator, {**entry, "clases": 4})
    assert wrong(validator, {"kind": "my_module:Net", "id": "a", "anything": 3}) == []
    (first, *_) = read(built_in()["quickstart"]).data["checkpoints"]
    short = {key: value for key, value in first.items() if key not in ("classes", "channels")}
    short["weights"] = first["weights"]["uri"]
    path = tmp_path / "entry.yaml"
    path.write_text(json.dumps(short))
    assert wrong(validator, short) == [] and len(entries(path)) == 1
    for word, kind in (("timm", "timm"), ("hf", "hf"), ("torchvision", "torchvision")):
        told = {"kind": kind, "id": "a", "folder": "x"} if kind == "hf" else {**short, "kind": kind, "classes": 10}
        told = {key: value for key, value in told.items() if key != "preprocess"}
        assert wrong(validator, {**told, "preprocess": word}) == [] != wrong(validator, {**told, "preprocess": "word"})
    assert wrong(validator, {**short, "kind": "torchvision"})  # which does not read the classes from the weights


SOURCE = '''
from collections.abc import Callable
from typing import Literal

from robustbench_diffaug.evaluators.shift import Shift


class Told(Shift):
    """Says more.

    Args:
        more: What more
            it says.
        modes: Which.
    """

    kind: Literal["told"] = "told"
    more: int = 3


class Odd(Shift):
    kind: Literal["odd"] = "odd"
    call: Callable[[int], int] = abs
'''


def test_plug_ins_are_in_it_and_broken_ones_are_left_out(
    tmp_path: Path, rdiff: Callable[..., tuple[int, str, str]]
) -> None:
    points = {"told": "rdiff_a:Told", "odd": "rdiff_a:Odd", "gone": "rdiff_a:Gone", "shift": "rdiff_a:Told"}
    with installing(tmp_path) as install:
        install("rdiff-a", {"evaluators": points}, SOURCE)
        code, out, err = rdiff("schema")
        assert rdiff("schema", "-o", "new/rdiff.schema.json") == (0, "wrote   new/rdiff.schema.json\n", err)
    assert code == 0 and Path("new/rdiff.schema.json").read_text() == out
    said = sorted(err.splitlines())
    assert [line.split(": ")[1] for line in said] == ["left out of evaluators"] * 3
    assert "odd (rdiff_a:Odd) has fields without a JSON schema" in said[0]
    assert "shift is the name of a built-in evaluator" in said[1]
    assert "the plug-in gone (rdiff_a:Gone) cannot be imported" in said[2]
    made = json.loads(out)
    told = made["$defs"]["Told"]
    assert told["description"] == "Says more." and told["title"] == "evaluator told"
    assert told["properties"]["more"] == {"default": 3, "description": "What more it says.", "type": "integer"}
    assert told["properties"]["modes"]["description"] == "Which."
    assert told["properties"]["times"]["description"]  # of the class above
    validator = Draft202012Validator(made)
    bench = {"name": "b", "evaluator": {"kind": "told", "more": 4}, "datasets": [{"kind": "mixture"}]}
    suite = {"name": "s", "checkpoints": [{"kind": "mixture", "id": "a", "classes": 4}], "benches": [bench]}
    assert wrong(validator, suite) == []
    bench["evaluator"] = {"kind": "told", "mroe": 4}
    assert "mroe" in str(wrong(validator, suite))
    bench["evaluator"] = {"kind": "odd"}
    assert "odd" in str(wrong(validator, suite))
