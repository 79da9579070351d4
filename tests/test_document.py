"""YAML without surprises, and the line of every key."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from robustbench_diffaug.component import Value
from robustbench_diffaug.document import Document, dump, parse, read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E3", 1000.0), ("-2.5e+1", -25.0), ("1.", 1.0), (".5", 0.5), ("10_000", 10_000), ("-7", -7),
        ("0x1f", 31), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("on", "on"), ("yes", "yes"), ("010", "010"), ("12:30", "12:30"), ("2020-01-01", "2020-01-01"),
        ("1e-3x", "1e-3x"), ("'1e-3'", "1e-3"), ("[1e-3, a]", [0.001, "a"]), ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)  # fmt: skip
def test_plain_values(text: str, value: Any) -> None:
    found, _ = parse(text)
    assert found == value
    assert type(found) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_as_python_prints_them(number: float) -> None:
    assert parse(repr(number))[0] == number


def test_lines_are_those_of_the_keys() -> None:
    _, lines = parse("a: 1\nb:\n  - c: 2\n    d: 3\n  - e\n")
    assert lines == {("a",): 1, ("b",): 2, ("b", 0): 3, ("b", 0, "c"): 3, ("b", 0, "d"): 4, ("b", 1): 5}


def test_merged_keys_are_no_repetitions() -> None:
    found, _ = parse("x: {y: &q {<<: {a: 1}, a: 2}}\nz: {<<: *q, b: 3}\n")
    assert found["z"] == {"a": 2, "b": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"^3: key 'a' stands twice, first in line 1; delete one of them$"),
        ("a: 1\nb: {c: 1, c: 1}", r"^2: key 'c' stands twice, first in line 2"),
        ("a: 1\nb: !!python/name:os.system", r"^2: .*tag .*python/name:os.system is not allowed; write the plain"),
        ("a: !!bool x", r"^1: .*is not allowed"),
        ("a: !local x", r"^1: .*!local is not allowed"),
        ("a: 1\nb: [", r"^2: not YAML"),
        ("a: 1\n\tb: 2", r"^2: not YAML"),
        ("a: *nothing", r"^1: .*nothing"),
        ("a: 1\n--- \nb: 1", r"^2: "),
        ("a: " + "9" * 5000, r"^1: a: 999999999999999999\.\.\. is too large a number$"),
        ("? [a, b]\n: 1", r"^1: a key must be a plain text$"),
        ("\x00", r"^1: not YAML"),
        ("[" * 5000, r"^1: nested too deeply$"),
        ("a: &a [*a, *a]", r"^1: "),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


TEXTS = st.text() | st.from_regex(r"[-+.0-9_:eExobanfyNrultsTR~<=]{0,8}", fullmatch=True)
NUMBERS = st.integers(1 - 10**17, 10**18 - 1) | st.floats(allow_nan=False, allow_infinity=False)
NESTED = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(TEXTS, inside, max_size=4),
    max_leaves=10,
)


@given(NESTED)
def test_what_is_written_is_read(data: Any) -> None:
    """By our reader and by one of YAML 1.1, PyYAML's; repr tells 1 from 1.0 and true, and the order of keys."""
    text = dump(data).decode()
    assert repr(parse(text)[0]) == repr(data)
    assert repr(yaml.safe_load(text)) == repr(data)


@pytest.mark.parametrize(
    "text",
    [
        "1e-3", "1E3", "1e5", "-2.5e+1", "10_000", "0x1f", "0o7", "010", "0b1", "12:30", "1:30.5", "2020-01-01", ".5",
        "1.", ".inf", ".NaN", "true", "no", "On", "~", "Null", "", "<<", "=", "- a", "a: b", "# a", " a", "*a",
    ],
)  # fmt: skip
def test_texts_that_a_reader_takes_for_something_else_are_quoted(text: str) -> None:
    written = dump({"a": text, text: "b"}).decode()
    assert written.count(f"'{text}'") == 2
    assert parse(written)[0] == yaml.safe_load(written) == {"a": text, text: "b"}


def test_what_needs_no_quotes_has_none() -> None:
    data = {"z": ["ä b", 3, 0.001, 1e-7, 1e20, None, True], "a": {"rdiff:zoo/x": "v1.2-3", "of": (1, 2)}}
    listed = "z:\n- ä b\n- 3\n- 0.001\n- 1.0e-07\n- 1.0e+20\n- null\n- true\n"
    assert dump(data).decode() == listed + "a:\n  rdiff:zoo/x: v1.2-3\n  of:\n  - 1\n  - 2\n"


@pytest.mark.parametrize("value", [b"x", {1, 2}, Path("x"), object, 1j], ids=lambda value: type(value).__name__)
def test_what_is_no_plain_value_is_not_written(value: object) -> None:
    with pytest.raises(ValueError, match="cannot be written as YAML; give mappings, lists, texts, numbers, true"):
        dump({"a": [value]})


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with pytest.raises(ValueError, match=r"a\.yaml cannot be read: No such file"):
        read(path)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read(tmp_path)
    path.write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.yaml:2: not UTF-8 text; save the file as UTF-8"):
        read(path)
    path.write_bytes(b"# " + b"x" * 2**20)
    with pytest.raises(ValueError, match="larger than 1048576 bytes"):
        read(path)
    path.write_bytes("\ufeffa: ä\n".encode())
    assert read(path).data == {"a": "ä"}


class Inner(Value):
    number: float = 0.0
    whole: int | None = None
    flag: bool = False


class Outer(Value):
    name: str
    inner: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner: []", "f.yaml:1: key 'name' is missing; add it"),
        ("name: 5", "f.yaml:1: name: needed is a text (put it in quotes), not 5"),
        ("name: true", "f.yaml:1: name: needed is a text (put it in quotes), not true"),
        ("name: a\nname2: b", "f.yaml:2: name2: unknown key 'name2'; did you mean name?"),
        ("name: a\ninner: 1", "f.yaml:2: inner: needed is a list, not 1"),
        ("name: a\ninner:\n- 1", "f.yaml:3: inner.0: needed is a mapping of keys to values, not 1"),
        ("name: a\ninner:\n- number: x", "f.yaml:3: inner.0.number: needed is a number, not 'x'"),
        ("name: a\ninner:\n- number: true", "f.yaml:3: inner.0.number: needed is a number, not true"),
        ("name: a\ninner:\n- whole: false", "f.yaml:3: inner.0.whole: needed is a number, not false"),
        ("name: a\ninner:\n- number: .inf", "f.yaml:3: inner.0.number: needed is a finite number, not inf"),
        ("name: a\ninner:\n- {}\n- whole: 1.5", "f.yaml:4: inner.1.whole: needed is a whole number, not 1.5"),
        ("name: a\ninner:\n- flag: maybe", "f.yaml:3: inner.0.flag: needed is true or false, not 'maybe'"),
        ("name: 1\ninner: 2", "f.yaml:1: name: needed is a text (put it in quotes), not 1 (and 1 more)"),
    ],
)  # fmt: skip
def test_explanations(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Document(Path("f.yaml"), *parse(text)).validate(Outer, {})
    assert str(caught.value) == message
