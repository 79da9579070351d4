"""Components: open families, fingerprints, trust."""

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
        assert TypeAdapter(Dataset).validate_python({"kind": path}) == Mixture()
        with pytest.raises(ValueError, match="not an evaluator"):
            find(Evaluator, path)
        with pytest.raises(ValueError, match="cannot be imported"):
            find(Dataset, "no.such.module:Thing")
        with pytest.raises(ValueError, match="cannot be imported"):
            find(Dataset, "os:Thing")
    with pytest.raises(ValueError, match="--trust"):
        find(Dataset, path)


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
