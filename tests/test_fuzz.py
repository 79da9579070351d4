"""Suites that somebody has spoilt: exit code 0 or 2, one line, never a traceback; in bounded time and memory."""

import contextlib
import copy
import io
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robustbench_diffaug import cli
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.component import Component, find, kinds
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.diffusion.base import Denoiser
from robustbench_diffaug.evaluators.base import Evaluator
from robustbench_diffaug.files import built_in
from tests.test_hostile_suites import alarm

Draw = Callable[[st.SearchStrategy[Any]], Any]
JUNK: list[Any] = [
    *(None, True, False, -1, 0, 1, 7, 10**9, 10**17, 10**30, 2**63, -(2**63), 1e308, -1e-308, 0.5, -0.5, 1.5),
    *(
        float("nan"),
        float("inf"),
        "",
        " ",
        "x" * 500,
        "1e-3",
        "no",
        ".",
        "../..",
        "/",
        "/dev/zero",
        "~nobody/x",
        "a\0b",
    ),
    *("\u202e\U0001f600", "\ud800", "a\nb", "mixture", "rdiff:../../etc/passwd", "rdiff:", "os:system", "<script>"),
    *("https://192.0.2.1/w", "timm:resnet18", "file:///etc/passwd", "rdiff:zoo/mnist5k-ddpm", "gaussian_noise", "1-3"),
    *("rdiff:zoo/resnet-standard.safetensors", "imagenet-c", "mnist5k", "clean", "float32", "resnet18", "{a}", "%s"),
    *([], {}, [[]], [1, "a", None], [0.25, 0.5], [1, 1], [10**9], ["a", "a"], [-1], [{}], [[[[1]]]], {"kind": "local"}),
    *({"kind": "os:system"}, {"kind": None}, {"uri": "x"}, {"a": {"b": {"c": [1, 2, {"d": None}]}}}, {1: 2}, {"": ""}),
]
"""What nobody means: of each type, too large, too deep, elsewhere, and nearly right."""
NUMBERS = (0, -1, 1, 2, 3, 17, 255, 1000, 10**5, 10**7, 10**9, 10**12, 10**17, 0.0, 0.25, 1.0, 1e-300, 1e-9, 1e9, 1e300)
SPOILS = (
    ": :",
    "\t",
    "&a *a",
    "!!python/name:os.system",
    "- ",
    "\n",
    "#",
    "'",
    '"',
    "{",
    "]",
    "\ufeff",
    "\x07",
    "<<: *a",
    "|",
)
FAMILIES: dict[str, type[Component]] = {
    "checkpoints": Checkpoint,
    "datasets": Dataset,
    "base": Dataset,
    "denoiser": Denoiser,
    "evaluator": Evaluator,
}
"""By the key above a component."""


@cache
def sources() -> tuple[dict[str, Any], ...]:
    """All installed suites, of which the small ones come oftener, since they can be sound."""
    found = {name: yaml.safe_load(path.read_text()) for name, path in built_in().items()}
    small = ("smoke", "quickstart", "mnist", "gallery", "certify", "ood", "shift", "analyses", "zoo")
    return (*found.values(), *(found[name] for name in small for _ in range(5)))


@cache
def usual() -> dict[str, list[Any]]:
    """What installed suites say, by key."""
    found: dict[str, list[Any]] = {}
    for source in sources():
        for path in places(source):
            if isinstance(path[-1], str):
                said = found.setdefault(path[-1], [])
                if at(source, path) not in said:
                    said.append(at(source, path))
    return found


@cache
def classes(key: str = "") -> tuple[type[Component], ...]:
    """Every installed kind, of one family where the key above says which, that can be imported."""
    found = []
    for family in {FAMILIES[key]} if key in FAMILIES else dict.fromkeys(FAMILIES.values()):
        for kind in kinds(family):
            with contextlib.suppress(ValueError):
                found.append(find(family, kind))
    return tuple(found)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of nested mappings and lists."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(data: Any, path: Sequence[Any]) -> Any:
    """What stands at a place."""
    for key in path:
        data = data[key]
    return data


def some(draw: Draw, among: Sequence[Any]) -> Any:
    """One of several."""
    return copy.deepcopy(draw(st.sampled_from(among)))


def part(draw: Draw) -> Any:
    """Any part of any installed suite."""
    source = some(draw, sources())
    return at(source, some(draw, list(places(source))))


def component(draw: Draw, key: str = "") -> dict[str, Any]:
    """A kind with the fields that it needs and some more of its own, with what stands there elsewhere, or not."""
    found = some(draw, classes(key))
    names = [name for name in found.model_fields if name != "kind"]
    chosen = draw(st.lists(st.sampled_from(names), unique=True, max_size=5)) if names else []
    chosen += [name for name in names if found.model_fields[name].is_required() and name not in chosen]
    return {"kind": found.model_fields["kind"].default, **{name: of_key(name, draw) for name in chosen}}


def of_key(key: str, draw: Draw) -> Any:
    """What stands under such a key in an installed suite, a number, or anything."""
    return some(draw, [*usual().get(key, []), *NUMBERS]) if draw(st.integers(0, 3)) else value(draw)


def value(draw: Draw) -> Any:
    """Anything: junk, a part of a suite, a component, a number or a text."""
    made: Sequence[Callable[[], Any]] = (
        lambda: some(draw, JUNK),
        lambda: some(draw, JUNK),
        lambda: part(draw),
        lambda: component(draw),
        lambda: draw(st.integers(-3, 40) | st.integers() | st.floats()),
        lambda: draw(st.text(max_size=12)),
    )
    return made[draw(st.integers(0, len(made) - 1))]()


OTHERS = ("text", "other", "add", "list")


def change(data: Any, draw: Draw) -> None:
    """One change of one kind at one place."""
    found = list(places(data))
    if not found:
        return
    *parents, last = some(draw, found)
    place = at(data, parents)
    kind = draw(st.sampled_from([*("key", "number", "component") * 3, "value", "delete", "rename", "twice", *OTHERS]))
    if kind == "value":
        place[last] = value(draw)
    elif kind == "key":
        place[last] = of_key(str(last), draw)
    elif kind == "number":
        numbers = [path for path in found if isinstance(at(data, path), int | float)]
        if numbers:
            *parents, last = some(draw, numbers)
            at(data, parents)[last] = some(draw, NUMBERS)
    elif kind == "component":
        whole = [path for path in found if isinstance(at(data, path), dict) and "kind" in at(data, path)]
        *parents, last = some(draw, whole or found)
        above = next((key for key in reversed((*parents, last)) if isinstance(key, str)), "")
        at(data, parents)[last] = component(draw, above)
    elif kind == "delete":
        del place[last]
    elif kind == "rename" and isinstance(place, dict):
        place[draw(st.sampled_from([f"{last}s", str(last)[:-1], str(last).upper(), "kind", "id", "name"]))] = place.pop(
            last
        )
    elif kind == "twice":
        place[last] = [place[last], copy.deepcopy(place[last])]
    elif kind == "text":
        place[last] = str(place[last])
    elif kind == "other":
        place[last] = copy.deepcopy(at(data, some(draw, found)))
    elif kind == "add" and isinstance(place, dict):
        place[draw(st.text(max_size=5) | st.sampled_from(["limit", "every", "args", "draw", "sigmas"]))] = value(draw)
    elif kind == "list" and isinstance(place, list):
        place.insert(0, value(draw))


@st.composite
def spoilt(draw: Draw) -> bytes:
    """The bytes of a suite of some checkpoints and benches of the installed ones, changed in a few places."""
    source, other = some(draw, sources()), some(draw, sources())
    benches = [some(draw, source["benches"]), some(draw, other["benches"])][: draw(st.sampled_from([1, 1, 1, 2]))]
    for index, bench in enumerate(benches):
        bench["name"] += str(index)
        if draw(st.integers(0, 7)):
            bench.pop("checkpoints", None)  # there are others
    start = draw(st.integers(0, len(source["checkpoints"]) - 1))
    chosen = source["checkpoints"][start : start + draw(st.integers(1, 2))]
    data = {"name": source["name"], "checkpoints": chosen, "benches": benches}
    for _ in range(draw(st.integers(0, 3))):
        change(data, draw)
    text = yaml.safe_dump(data, allow_unicode=draw(st.booleans()), sort_keys=False)
    for _ in range(draw(st.sampled_from([0] * 9 + [1, 3]))):  # and sometimes the text itself
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.sampled_from([0, 1, 1, 40]))
        put = draw(st.sampled_from(SPOILS) | st.text(max_size=4)) if draw(st.booleans()) else text[end : end + 80]
        text = text[:start] + put + text[end:]
    return text.encode("utf-8", "surrogatepass")


def complaint(code: object, errors: str) -> str:
    """What is wrong with an answer; empty for 0 without a word, or 2 with one line, warnings aside."""
    lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    if code not in (0, 2) or len(lines) != (code == 2) or "a fault of rdiff" in errors or "Traceback" in errors:
        return f"code {code}: {errors[-3000:]}"
    return "" if all(len(line) < 2100 and line.isprintable() for line in lines) else f"an odd line: {lines}"


def answer(words: list[str]) -> tuple[object, str]:
    """The exit code of a command in this process, and its errors."""
    errors = io.StringIO()
    try:
        with alarm(120), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            cli.main(words)
    except SystemExit as error:
        return error.code, errors.getvalue()
    except BaseException as error:
        return type(error).__name__, errors.getvalue()
    return None, errors.getvalue()


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """Looks all up before the examples: what is imported may use `random`, which hypothesis forbids in strategies."""
    usual()
    for key in ("", *FAMILIES):
        classes(key)


def quiet(count: int) -> settings:
    """So many examples, however long each takes."""
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.timeout(3600)
def test_spoilt_suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    codes: list[object] = []
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @quiet(2000 if full else 60)
    @given(spoilt())
    def holds(content: bytes) -> None:
        Path("suite.yaml").write_bytes(content)
        for command in ("validate", "plan"):
            code, errors = answer([command, "suite.yaml"])
            codes.append(code)
            assert not complaint(code, errors), complaint(code, errors)
        assert [path.name for path in tmp_path.iterdir()] == ["suite.yaml"]

    holds()
    assert 0.02 < codes.count(0) / len(codes) < 0.9  # some changes do no harm, most do
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest < 2**20  # KiB


@pytest.mark.timeout(3600)
def test_spoilt_suites_by_the_real_command(tmp_path: Path, full: bool) -> None:
    environment: Mapping[str, str] = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    seen: list[int] = []

    @quiet(50 if full else 3)
    @given(spoilt())
    def holds(content: bytes) -> None:
        (tmp_path / "suite.yaml").write_bytes(content)
        words = [sys.executable, "-m", "robustbench_diffaug", ("validate", "plan")[len(seen) % 2], "suite.yaml"]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        seen.append(done.returncode)
        assert not complaint(done.returncode, done.stderr), complaint(done.returncode, done.stderr)

    holds()
    assert len(seen) >= 3
