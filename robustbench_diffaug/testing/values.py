"""What every component promises: a hash, a life in YAML, and a fingerprint of all that records depend on."""

import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar, get_args, get_origin

from pydantic import ValidationError

from robustbench_diffaug import rng
from robustbench_diffaug.component import Component, Later, Outside, Value, trusting
from robustbench_diffaug.document import dump, parse
from robustbench_diffaug.files import path_of

__all__ = ["changed", "check_files", "check_value", "generators_unmoved"]

V = TypeVar("V", bound=Value)


def check_value(component: Component) -> None:
    """A component is hashable, survives YAML and pickling, and its fingerprint covers all but what is marked `Outside`.

    Raises:
        AssertionError: With the promise that is broken.
    """
    fields = type(component).model_fields
    for name, field in fields.items():
        assert not _mutable(field.annotation), (
            f"field {name} of {component.kind} is a dict, list or set, which has no hash; use a tuple, or Options"
        )
    try:
        hash(component)
        dumped = component.model_dump(mode="json", serialize_as_any=True)
        data, _ = parse(dump(dumped).decode())
        with trusting(True):
            again = type(component).model_validate(data)
    except (TypeError, ValueError) as error:
        raise AssertionError(
            f"{component.kind} cannot be hashed, or written as YAML and read again: {error}"
        ) from error
    assert again == component, f"{component.kind} is another value after a round trip through YAML"
    assert again.fingerprint == component.fingerprint, f"the fingerprint of {component.kind} changes through YAML"
    assert component.kind == fields["kind"].default, f"{component.kind} has no fixed kind"
    _check_pickle(component)
    identity = component.identity()
    for name, field in fields.items():
        late = Later in field.metadata and getattr(component, name) == field.default
        inside = Outside not in field.metadata and not late
        assert (name in identity) == inside, f"field {name} of {component.kind} is not where its marker says"
    for outside in (True, False):
        for name, other in changed(component, outside):
            same = other.fingerprint == component.fingerprint
            assert same == outside, f"the fingerprint of {component.kind} and its field {name} disagree with its marker"


def _check_pickle(component: Component) -> None:
    try:
        sent = pickle.loads(pickle.dumps(component))  # noqa: S301  # made a moment ago
    except Exception as error:  # whatever parts of the author's raise
        raise AssertionError(
            f"{component.kind} cannot be sent to another process, as --workers does: {error}; define its class at the "
            "top of a module"
        ) from error
    same = sent == component and sent.fingerprint == component.fingerprint
    assert same, f"{component.kind} is another value in another process"


def _mutable(annotation: object) -> bool:
    origin = get_origin(annotation) or annotation
    wrong = isinstance(origin, type) and issubclass(origin, Mapping | Set | list | bytearray)
    return wrong or any(map(_mutable, get_args(annotation)))


def changed(value: V, outside: bool) -> Iterator[tuple[str, V]]:
    """The value with another number or tuple in a field, where that is a valid one."""
    for name, field in type(value).model_fields.items():
        now = getattr(value, name)
        if (Outside in field.metadata) != outside or isinstance(now, bool) or not isinstance(now, int | float | tuple):
            continue
        other = now[:-1] if isinstance(now, tuple) else now + 1 if isinstance(now, int) else now / 2
        try:
            made = type(value).model_validate({**dict(value), name: other})
        except ValidationError:
            continue
        if made != value:
            yield name, made


def check_files(component: V, load: Callable[[V], object]) -> None:
    """Where its files lie changes no fingerprint; what they hold does, or is refused."""
    for fields, place in _located(component):
        with TemporaryDirectory() as folder:
            copy = Path(folder, place.name)
            (shutil.copytree if place.is_dir() else shutil.copy2)(place, copy)
            moved = _replaced(component, fields, str(copy))
            assert moved.identity() == component.identity(), f"the fingerprint depends on where {place.name} lies"
            files = [path for path in (copy, *copy.rglob("*")) if path.is_file()]
            largest = max(files, key=lambda path: path.stat().st_size)
            content = largest.read_bytes()
            largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            try:
                noticed = moved.identity() != component.identity() or load(moved) is None
            except ValueError:
                noticed = True
            assert noticed, f"another {largest.name} goes unnoticed; its digest belongs to contents()"


def _located(value: Value) -> Iterator[tuple[tuple[str, ...], Path]]:
    """The fields that say where files are."""
    for name, field in type(value).model_fields.items():
        found = getattr(value, name)
        if isinstance(found, Value):
            yield from (((name, *fields), place) for fields, place in _located(found))
        elif isinstance(found, str) and found and name != "id" and Outside in field.metadata:
            yield from [((name,), path_of(found))] if path_of(found).exists() else []


def _replaced(value: V, fields: Sequence[str], new: str) -> V:
    first, *below = fields
    return value.model_copy(update={first: _replaced(getattr(value, first), below, new) if below else new})


@contextmanager
def generators_unmoved(kind: str) -> Iterator[None]:
    """The global generators of torch and numpy must be where they were: noise comes from the batch."""
    before = rng.global_states()
    yield
    assert rng.global_states() == before, f"{kind} draws from a global random generator; use Batch.noise or rng"
