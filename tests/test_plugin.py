"""The example of a plug-in, installed as users do: docs/plugins.md shows it as it is, and the page's commands work."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "plugin"
PAGE = (ROOT / "docs" / "plugins.md").read_text()
SESSION = """
import contextlib, io, json, sys
import pytest
from robustbench_diffaug import cli

said = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(words[1:]) if words[0] == "rdiff" else sys.exit(pytest.main(words[1:]))
        except SystemExit as left:
            said.append([int(left.code or 0), out.getvalue(), err.getvalue()])
print(json.dumps(said))
"""


def test_the_page_shows_the_files_of_the_example() -> None:
    blocks = re.findall(r"```(?:python|toml|yaml)\n(.*?)```", PAGE, re.DOTALL)
    shown = {block.splitlines()[0].removeprefix("# "): block for block in blocks}
    paths = [path.relative_to(EXAMPLE) for path in EXAMPLE.rglob("*.*") if path.is_file() and path.suffix != ".pyc"]
    files = [path.as_posix() for path in paths if not path.as_posix().startswith(".")]  # no caches of tools
    unshown = {"README.md", "rdiff_example/__init__.py"}
    for name in set(files) - unshown:
        assert shown.pop(name) == (EXAMPLE / name).read_text()
    assert shown.keys() == {"by-path.yaml", "yaml-language-server: $schema=rdiff.schema.json"}


def test_its_commands_work_where_it_is_installed(tmp_path: Path) -> None:
    """In one process, since each would import torch anew."""
    installed, work = tmp_path / "installed", tmp_path / "work"
    shutil.copytree(EXAMPLE, work, ignore=shutil.ignore_patterns("__pycache__"))
    (by_path,) = re.findall(r"```yaml\n# by-path.yaml\n(.*?)```", PAGE, re.DOTALL)
    (work / "by-path.yaml").write_text(by_path)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", installed, work], check=True)
    commands = [line.split() for line in re.findall("^(?:rdiff|pytest) .*", PAGE, re.MULTILINE)]
    assert len(commands) == 7
    more = {"run": ["-q", "--limit", "20"], "tests": ["-q", "-W", "error", "-p", "no:cacheprovider", "--assert=plain"]}
    words = [[*command, *more.get(command[1], [])] for command in commands]
    words.append(["rdiff", "verify", "reports/by-path", "--trust", "-q"])
    path = {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}  # not the source, which the current folder has
    done = subprocess.run(
        [sys.executable, "-c", SESSION, json.dumps(words)],
        cwd=work,
        env=os.environ | path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {" ".join(command[:3]): answer for command, answer in zip(words, json.loads(done.stdout), strict=True)}
    for command, (code, out, err) in found.items():
        assert code == 0, f"{command}: {out}{err}"
    listed = found["rdiff ls evaluators"][1]
    assert re.search(
        r"\ntranslation +Accuracy and .*\(rdiff-example 0.1.0, rdiff_example.translation:Translation\)", listed
    )
    schema = json.loads((work / "rdiff.schema.json").read_text())
    consts = [each.get("const") for each in schema["$defs"]["Evaluator"]["properties"]["kind"]["anyOf"]]
    assert "translation" in consts and schema["$defs"]["Translation"]["properties"]["pixels"]["description"]
    board = pd.read_csv(work / "reports" / "translation" / "leaderboard.csv", index_col="checkpoint")
    assert list(board.index) == ["standard", "augmix", "both"]
    assert board["consistency"].between(0.9, 1).all() and (board["consistency_low"] < board["consistency"]).all()
    assert "accuracy/translated_high" in board
    assert "5 passed" in found["pytest tests -q"][1]
    assert "kind: rdiff_example.translation:Translation" in (work / "reports/by-path/suite.lock.yaml").read_text()
    assert "nothing that was checked is wrong" in found["rdiff verify reports/by-path"][1]
