"""Suites that somebody has spoilt: exit code 0 or 2, one line, never a traceback."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from robustbench_diffaug import cli, rng

SMOKE = yaml.safe_load((Path(__file__).parent.parent / "suites/smoke.yaml").read_text())
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    7,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 500,
    "1e-3",
    "no",
    "../..",
    "\u202e\U0001f600",
    "mixture",
    "rdiff:../../etc/passwd",
    "os:system",
    [],
    {},
    [[]],
    {"kind": "local"},
    {"kind": "os:system"},
    [1, "a", None],
    "gaussian_noise",
    "imagenet-c",
    -0.5,
    0.5,
    2**63,
    "<script>",
    {"a": {"b": {"c": [1, 2, {"d": None}]}}},
]


class Choice:
    """Small random choices from one stream."""

    def __init__(self, number: int) -> None:
        self.stream, self.draw = rng.key("fuzz", number), 0

    def below(self, count: int) -> int:
        self.draw += 1
        return int(rng.uniform(self.stream, range(self.draw, self.draw + 1), (1,))[0, 0] * count)


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


def spoil(data: Any, choice: Choice) -> None:
    """One change of one kind at one place."""
    found = list(places(data))
    if not found:
        return
    *parents, last = found[choice.below(len(found))]
    place = at(data, parents)
    value, kind = place[last], choice.below(6)
    if kind == 0:
        place[last] = JUNK[choice.below(len(JUNK))]
    elif kind == 1:
        del place[last]
    elif kind == 2 and isinstance(place, dict):
        place[str(last) + "s"] = place.pop(last)
    elif kind == 3:
        place[last] = [value, value]
    elif kind == 4:
        place[last] = str(value)
    else:
        other = at(data, found[choice.below(len(found))])
        place[last] = yaml.safe_load(yaml.safe_dump(other))  # a copy: a value inside itself would have no end


def test_spoilt_suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(tmp_path)
    codes = []
    for number in range(2000 if request.config.getoption("--full") else 150):
        data, choice = yaml.safe_load(yaml.safe_dump(SMOKE)), Choice(number)
        for _ in range(1 + choice.below(3)):
            spoil(data, choice)
        text = yaml.safe_dump(data, allow_unicode=True)
        if choice.below(8) == 0:  # and sometimes the text itself
            cut = choice.below(len(text))
            text = (
                text[:cut] + ("[", ": :", "\t", "&a *a", "!!python/name:os.system")[choice.below(5)] + text[cut + 1 :]
            )
        Path("suite.yaml").write_text(text)
        for command in ("validate", "plan"):
            errors = io.StringIO()
            with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(errors):
                cli.main([command, "suite.yaml"])
            lines = [line for line in errors.getvalue().splitlines() if not line.startswith("warning: ")]
            assert caught.value.code in (0, 2), (number, lines)
            assert "a fault of rdiff" not in errors.getvalue(), (number, lines)
            assert len(lines) == (caught.value.code == 2), (number, lines)
            codes.append(caught.value.code)
    assert 0.02 < codes.count(0) / len(codes) < 0.9  # some changes do no harm, most do
