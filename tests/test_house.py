"""What holds for every file of the project."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for name in ("robustbench_diffaug", "tests", "benchmarks") for path in (ROOT / name).rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_fit_a_screenful_of_minutes(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 430


HEAVY = {"torch", "numpy", "pandas", "timm", "diffusers", "matplotlib", "rich"}


@pytest.mark.parametrize(
    ("words", "heavy"),
    [(["--help"], HEAVY | {"pydantic", "yaml"}), (["ls", "suites"], HEAVY), (["ls", "denoisers"], HEAVY)],
)
def test_what_is_not_needed_is_not_imported(words: list[str], heavy: set[str]) -> None:
    code = (
        "import sys; from robustbench_diffaug import cli\n"
        f"try: cli.main({words!r})\n"
        "except SystemExit: pass\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "click" in loaded
    assert not loaded & heavy


def test_every_command_has_help_and_stands_in_the_readme() -> None:
    from robustbench_diffaug.cli import cli

    readme = (ROOT / "README.md").read_text()
    for name, command in cli.commands.items():
        assert command.help
        assert f"rdiff {name}" in readme


def test_suites_name_the_constants_of_their_corruptions() -> None:
    for path in (ROOT / "suites").glob("*.yaml"):
        text = path.read_text()
        assert ("corruptions:" in text) <= bool(re.search(r"constants: (imagenet-c|cifar-c)", text))
