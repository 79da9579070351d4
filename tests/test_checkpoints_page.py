"""Every block of docs/checkpoints.md is true."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from robustbench_diffaug import rng
from robustbench_diffaug.checkpoints.timm_model import build

PAGE = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
SMALL = "test_efficientnet"  # in place of the page's network, since it is quick
CHEAP = "benches=[{name: b, evaluator: {kind: shift, modes: [default]}, datasets: [{kind: mnist5k, limit: 1}]}]"


def test_files_and_commands(rdiff: Callable[..., tuple[int, str, str]]) -> None:
    """The files are written, and each command is run; the one that runs a suite is given a smaller one."""
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        name = block.splitlines()[0].removeprefix("# ")
        assert name.endswith(".yaml")
        Path(name).write_text(block.replace("resnet18", SMALL))
    with rng.seeded(0):
        torch.save(build(SMALL, (), 1, 10).state_dict(), "mine.pth")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code.startswith("# network.py\n")
    Path("network.py").write_text(code)
    names: dict[str, Any] = {}
    exec(code, names)
    torch.save(names["build"]().state_dict(), "own.pth")
    commands = re.findall("^rdiff .*", PAGE, re.MULTILINE)
    assert len(commands) == 6
    said = []
    for command in commands:
        words = command.split()[1:]
        code, out, err = rdiff(*words, *(["--set", CHEAP, "-q"] if words[0] == "run" else []))
        assert code == 0, err
        said.append((out, err))
    assert "1 channel," in said[0][0]
    assert "\nmine," in Path("reports/quickstart/leaderboard.csv").read_text()
    assert rdiff("check", "small.yaml")[0] == 0
    code, _, err = rdiff("run", "quickstart", "--with", "sure.yaml", "--set", CHEAP, "-o", "sure", "-q")
    assert code == 2
    assert "expect_accuracy is 0.98" in err
