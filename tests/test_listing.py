"""`rdiff ls`: what is installed, from where, and what of it is broken."""

from collections.abc import Callable
from pathlib import Path

import pytest

from robustbench_diffaug import __version__, listing
from robustbench_diffaug.component import kinds
from tests.installed import installing

SOURCE = '''
from typing import Literal

from robustbench_diffaug.evaluators.shift import Shift


class Told(Shift):
    """One sentence
    over two lines.

    More of it.
    """

    kind: Literal["told"] = "told"


class Untold(Shift):
    kind: Literal["untold"] = "untold"
'''


@pytest.mark.parametrize("what", listing.FAMILIES)
def test_of_every_built_in_kind_there_is_a_sentence_and_the_version(what: str) -> None:
    lines = list(listing.lines(what))
    for name in kinds(listing.family(what)):
        (line,) = [line for line in lines if line.split()[0] == name]
        _, _, told = line.partition(" ")
        assert told.endswith(f"  (robustbench-diffaug {__version__})")
        said = told.removesuffix(f"  (robustbench-diffaug {__version__})").strip()
        assert len(said.split()) > 2
        found = kinds(listing.family(what))[name].load()
        assert " ".join(found.__doc__.strip().partition("\n\n")[0].split()) == said  # of the source, yet the same


def test_a_plug_in_says_its_package_version_and_class(tmp_path: Path) -> None:
    points = {"evaluators": {"told": "rdiff_a:Told", "untold": "rdiff_a:Untold"}}
    with installing(tmp_path) as install:
        install("rdiff-a", points, SOURCE)
        lines = {line.split()[0]: line for line in listing.lines("evaluators")}
    assert lines["told"].split(maxsplit=1)[1] == "One sentence over two lines.  (rdiff-a 2.5, rdiff_a:Told)"
    assert lines["untold"].split(maxsplit=1)[1] == "(rdiff-a 2.5, rdiff_a:Untold)"
    assert "told" not in "".join(listing.lines("datasets"))


def test_a_broken_plug_in_is_a_line_among_the_others(
    tmp_path: Path, rdiff: Callable[..., tuple[int, str, str]]
) -> None:
    source = SOURCE + "raise RuntimeError('two\\nlines \\x1b[31m and red')"
    with installing(tmp_path) as install:
        install("rdiff-a", {"evaluators": {"told": "rdiff_a:Told", "shift": "rdiff_a:Told"}}, source)
        install("rdiff-b", {"evaluators": {"untold": "rdiff_c:X"}})
        install("rdiff-c", {"evaluators": {"untold": "rdiff_c:X"}})
        code, out, err = rdiff("ls", "evaluators")
        assert (code, err) == (0, "")
        (told,) = [line for line in out.splitlines() if line.startswith("told ")]
        assert "broken: the plug-in told (rdiff_a:Told) cannot be imported: RuntimeError: two lines" in told
        assert "\x1b" not in told and r"\x1b[31m" in told and told.endswith("(rdiff-a 2.5, rdiff_a:Told)")
        own, other = [line for line in out.splitlines() if line.startswith("shift ")]
        assert "Accuracy, calibration" in own
        assert "broken: shift is the name of a built-in evaluator, which stays what it is" in other
        two = [line for line in out.splitlines() if line.startswith("untold ")]
        assert len(two) == 2
        assert all("broken: an evaluator untold comes from rdiff-b" in line for line in two)
        assert rdiff("validate", "smoke")[0] == 0
        suite = tmp_path / "suite.yaml"
        bench = "{name: b, evaluator: {kind: told}, datasets: [{kind: mixture}]}"
        suite.write_text(f"name: s\ncheckpoints: [{{kind: mixture, id: a, classes: 4}}]\nbenches: [{bench}]\n")
        code, _, err = rdiff("validate", "suite.yaml")
        assert code == 2 and len(err.splitlines()) == 1
        assert "suite.yaml:3: benches.0.evaluator.kind: the plug-in told (rdiff_a:Told) cannot be imported" in err
