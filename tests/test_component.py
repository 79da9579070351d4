"""Components: open families, fingerprints, trust."""

import pickle
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from robustbench_diffaug.component import Later, Options, Outside, Value, digest_of, find, kinds, suggest, trusting
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.evaluators.smoothing import Smoothing
from tests.installed import installing


def test_a_mapping_becomes_its_kind() -> None:
    found = TypeAdapter(Dataset).validate_python({"kind": "mixture", "size": 3})
    assert found == Mixture(size=3)
    assert hash(found) == hash(Mixture(size=3))
    assert TypeAdapter(Dataset).validate_python(found) is found


def test_wrong_kinds_say_what_there_is() -> None:
    with pytest.raises(ValidationError, match="no dataset is called 'mixtur'; did you mean mixture"):
        TypeAdapter(Dataset).validate_python({"kind": "mixtur"})
    with pytest.raises(ValidationError, match="a dataset needs a kind, one of arrays"):
        TypeAdapter(Dataset).validate_python({"size": 3})
    with pytest.raises(ValidationError, match=r"unknown key 'sise'; did you mean size\?"):
        TypeAdapter(Dataset).validate_python({"kind": "mixture", "sise": 3})


def test_paths_to_classes_need_trust() -> None:
    path = "robustbench_diffaug.data.synthetic:Mixture"
    with pytest.raises(ValueError, match="--trust"):
        find(Dataset, path)
    with trusting(True):
        assert find(Dataset, path) is Mixture
        assert isinstance(TypeAdapter(Dataset).validate_python({"kind": path}), Mixture)
        with pytest.raises(ValueError, match="not an evaluator"):
            find(Evaluator, path)
        with pytest.raises(ValueError, match="cannot be imported"):
            find(Dataset, "no.such.module:Thing")
        with pytest.raises(ValueError, match="cannot be imported"):
            find(Dataset, "os:Thing")
    with pytest.raises(ValueError, match="--trust"):
        find(Dataset, path)


def test_a_path_stays_the_kind_so_that_a_lock_leads_to_the_class_again() -> None:
    path = "robustbench_diffaug.data.synthetic:Mixture"
    with trusting(True):
        found = TypeAdapter(Dataset).validate_python({"kind": path, "size": 3})
    assert found.kind == path
    assert found != Mixture(size=3) and found.fingerprint != Mixture(size=3).fingerprint
    written = found.model_dump(mode="json", serialize_as_any=True)  # a warning of pydantic's would be an error here
    assert written["kind"] == path
    assert type(found).model_validate(written) == pickle.loads(pickle.dumps(found)) == found
    with trusting(True):
        assert TypeAdapter(Dataset).validate_python(written) == found
    with pytest.raises(ValidationError, match="--trust"):
        TypeAdapter(Dataset).validate_python(written)
    with pytest.raises(ValidationError, match="mixture"):
        Mixture.model_validate({"kind": "robustbench_diffaug.data.embedded:Digits"})


PLUG_INS = """
from typing import Literal

from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.data.synthetic import Mixture


class Fine(Mixture):
    kind: Literal["fine"] = "fine"


class Idle(Dataset):
    kind: Literal["idle"] = "idle"
    name: str = "idle"


class Nameless(Mixture):
    kind: str


function = print
"""
BROKEN = {
    "absent": (
        "nowhere_at_all:Thing",
        r"the plug-in absent \(nowhere_at_all:Thing\) cannot be imported: ModuleNotFound",
    ),
    "attribute": ("rdiff_a:Absent", "has no attribute 'Absent'"),
    "garbled": ("rdiff_a: 3", "the plug-in garbled"),
    "family": ("robustbench_diffaug.evaluators.shift:Shift", "family is not a dataset"),
    "function": ("rdiff_a:function", "function is not a dataset"),
    "idle": ("rdiff_a:Idle", "idle is abstract: Idle lacks contents, open"),
    "leaving": ("rdiff_leaving:Thing", "cannot be imported: SystemExit: 3"),
    "other": ("rdiff_a:Fine", "the kind of other is 'fine'; write kind: Literal"),
    "nameless": ("rdiff_a:Nameless", "the kind of nameless is missing; write kind: Literal"),
    "mixture": ("rdiff_a:Fine", ""),
}


def test_a_plug_in_that_is_broken_is_refused_in_a_line_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "rdiff_leaving.py").write_text("raise SystemExit(3)")
    values = {name: value for name, (value, _) in BROKEN.items()}
    with installing(tmp_path) as install:
        install("rdiff-a", {"datasets": {"fine": "rdiff_a:Fine", **values}}, PLUG_INS)
        assert find(Dataset, "fine").model_validate({"kind": "fine"}).fingerprint
        assert find(Dataset, "mixture") is Mixture
        for name, (_, message) in BROKEN.items():
            if message:
                with pytest.raises(ValidationError, match=message):
                    TypeAdapter(Dataset).validate_python({"kind": name})
        assert TypeAdapter(Dataset).validate_python({"kind": "mixture"}) == Mixture()
    with pytest.raises(ValueError, match="no dataset is called 'fine'"):
        find(Dataset, "fine")


def test_of_two_packages_neither_has_the_kind(tmp_path: Path) -> None:
    with installing(tmp_path) as install:
        install("rdiff-a", {"datasets": {"fine": "rdiff_a:Fine"}}, PLUG_INS)
        install("rdiff-b", {"datasets": {"fine": "rdiff_b:Fine"}}, PLUG_INS)
        message = r"a dataset fine comes from rdiff-a \(rdiff_a:Fine\) and rdiff-b \(rdiff_b:Fine\), and only one can"
        with pytest.raises(ValueError, match=message):
            find(Dataset, "fine")
        assert find(Dataset, "mixture") is Mixture


class Sample(Value):
    inside: int = 0
    outside: Annotated[int, Outside] = 0
    options: Options = ()


def test_identity_leaves_out_what_is_marked() -> None:
    assert Sample(outside=1).identity() == Sample().identity()
    assert Sample(inside=1).identity() != Sample().identity()
    assert Smoothing(alpha=0.01).fingerprint == Smoothing().fingerprint
    assert Smoothing(n=1000).fingerprint != Smoothing().fingerprint


def test_options_are_hashable_and_ordered() -> None:
    one = Sample.model_validate({"options": {"b": [1, 2], "a": {"c": 1}}})
    other = Sample.model_validate({"options": {"a": {"c": 1}, "b": [1, 2]}})
    assert one == other
    assert hash(one) == hash(other)
    assert one.model_dump(mode="json")["options"]["b"] == [1, 2]


def test_versions_count() -> None:
    class Bumped(Smoothing):
        version = 2
        kind: Literal["smoothing"] = "smoothing"

    assert Bumped().fingerprint != Smoothing().fingerprint


def test_fingerprints_are_fixed() -> None:
    assert digest_of({"b": 1, "a": [1.5, None, "x"]}) == digest_of({"a": [1.5, None, "x"], "b": 1})
    assert len(Mixture().fingerprint) == 16


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=10), max_size=5))
def test_suggestions_never_fail(word: str, known: list[str]) -> None:
    assert isinstance(suggest(word, known), str)


def test_kinds_are_listed_without_importing_them() -> None:
    assert list(kinds(Evaluator)) == sorted(kinds(Evaluator)) and {"ood", "shift", "smoothing"} <= set(kinds(Evaluator))


def test_a_field_that_came_later_counts_once_it_is_used() -> None:
    class Grown(Smoothing):
        extra: Annotated[int, Later] = 0

    assert "extra" not in Grown().identity() and Grown().fingerprint == Smoothing().fingerprint
    assert Grown(extra=1).identity()["extra"] == 1 and Grown(extra=1).fingerprint != Grown().fingerprint
