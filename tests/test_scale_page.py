"""Every command of docs/scale.md that needs no cluster is run, on a smaller suite, and does what the page says."""

import re
from collections.abc import Callable
from pathlib import Path

PAGE = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
SUITE = """
name: quickstart
checkpoints: [{kind: mixture, id: a, classes: 4}, {kind: mixture, id: b, classes: 4, tilt: 120}]
benches:
  - name: certify
    evaluator: {kind: smoothing, denoiser: {kind: mixture}, sigmas: [0.25], n0: 16, n: 4000}
    datasets: [{kind: mixture, name: m, size: 4}]
"""


def contents(root: Path) -> dict[str, bytes]:
    names = ("metrics.csv", "metrics.parquet", "leaderboard.csv")
    paths = [*root.rglob("records/**/*.parquet"), *(root / name for name in names)]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def test_the_commands_of_the_page(rdiff: Callable[..., tuple[int, str, str]]) -> None:
    Path("s.yaml").write_text(SUITE)
    commands = re.findall("^rdiff (.*)", PAGE, re.MULTILINE)
    assert commands.pop() == "run quickstart --executor ray --workers 16"
    assert commands.pop(0) == "run quickstart --workers 2"  # tests of its own are slow enough
    assert len(commands) == 7
    said = []
    for command in commands:
        words = ["s.yaml" if word == "quickstart" else word for word in command.split()]
        code, out, err = rdiff(*words, *(["-q"] if words[0] == "run" else []))
        assert code == 0, err
        said.append(out)
    assert "in all 1 tasks in shard 1/2" in said[0]
    assert "lack samples" in said[1]
    assert said[3].splitlines()[-2] == f"report  {Path('reports/quickstart/index.html')}"
    assert said[4].splitlines()[-1] == "nothing that was checked is wrong"
    assert "lack samples" in said[5]
    assert said[6].splitlines()[-2] == f"report  {Path('shared/index.html')}"
    assert contents(Path("shared")) == contents(Path("reports/quickstart"))
    assert rdiff("verify", "part1")[0] == 0
    assert rdiff("report", "part1")[0] == 2
