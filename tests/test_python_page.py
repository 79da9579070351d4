"""Every block of docs/python.md is true."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustbench_diffaug import rng, run
from robustbench_diffaug.checkpoints.timm_model import build

PAGE = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
SMALL = "test_efficientnet"  # in place of the page's network, since it is quick
CHEAP = "benches=[{name: b, evaluator: {kind: shift, modes: [default]}, datasets: [{kind: mnist5k, limit: 1}]}]"
SHORTER = {
    'run("quickstart", {"mine": network})': f'run("quickstart", {{"mine": network}}, settings=[{CHEAP!r}], quiet=True)',
    '"mine.pth"}})': '"mine.pth"}}, quiet=True)',
    "resnet18": SMALL,
}


def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are run in turn; the last, which is for scripts, is only as if it were imported."""
    monkeypatch.chdir(tmp_path)
    with rng.seeded(0):
        torch.save(build(SMALL, (), 1, 10).state_dict(), "mine.pth")
        network = nn.Sequential(nn.AdaptiveAvgPool2d(28), nn.Flatten(), nn.Linear(784, 10))
    names: dict[str, Any] = {"network": network, "__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        for text, shorter in SHORTER.items():
            block = block.replace(text, shorter)
        exec(block, names)
    result, certified, strict = names["result"], names["certified"], names["strict"]
    assert result.root == Path("reports/quickstart")
    for name in re.findall(r"result\.\w+(?:\(.*?\))?", PAGE):
        assert eval(name.replace("result", "certified"), names) is not None
    assert len(certified.records("certify", "small")) == 2
    assert set(certified.leaderboard["checkpoint"]) == {"small", "zoo"}
    assert strict.root == Path("strict") and (strict.root / "index.html").exists()
    assert strict.digest != certified.digest


def test_every_argument_is_named() -> None:
    listed = PAGE.partition("Arguments are those of the command")[2].partition(".\n")[0]
    parameters = set(inspect.signature(run).parameters) - {"suite", "checkpoints"}
    assert set(re.findall("`([a-z_]+)`", listed)) == parameters
