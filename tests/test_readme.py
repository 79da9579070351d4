"""The README's example is true."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustbench_diffaug import cli, rng
from robustbench_diffaug.checkpoints.timm_model import build

QUICK = "benches=[{name: b, evaluator: {kind: shift, modes: [default]}, datasets: [{kind: mnist5k, group: clean}]}]"
README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_suite_is_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example, _ = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    Path("suite.yaml").write_text(example)
    with rng.seeded(0):
        network = build("resnet18", (), 1, 10)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, "my-resnet.safetensors")
    for command in ("validate", "plan"):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "suite.yaml"])
        assert not caught.value.code
    assert "largest reachable radius" in capsys.readouterr().out


def test_five_lines_and_a_file_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, own = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(own.splitlines()) == 1 + 5
    Path("mine.yaml").write_text(own)
    with rng.seeded(0):
        torch.save(build("resnet18", (("zero_init_last", False),), 3, 10).state_dict(), "mine.pth")
    for command in (["check", "mine.yaml"], ["validate", "quickstart", "--with", "mine.yaml"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(command)
        assert not caught.value.code
    shown = capsys.readouterr()
    assert "3 channels (grey images are shown three times over)" in shown.out
    assert "5 checkpoints" in shown.out
    assert "rdiff check mine.yaml\nrdiff run quickstart --with mine.yaml\n" in README


def test_three_lines_of_python_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) == 3
    call = 'run("quickstart", {"mine": network}'
    assert call in example
    with rng.seeded(0):
        names: dict[str, Any] = {"network": nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))}
    exec(example.replace(call, f"{call}, limit=1, settings=[{QUICK!r}], quiet=True"), names)
    assert "mine" in Path("reports/quickstart/leaderboard.csv").read_text()
    shown = eval(example.splitlines()[-1], names).set_index("checkpoint")["accuracy/clean"]
    assert list(shown.index)[-1] == "mine" and shown.between(0, 1).all()


def test_the_commands_are_those_of_tox_and_the_package() -> None:
    assert "pip install -c constraints.txt . && rdiff run quickstart" in README
    assert "pip install tox && tox" in README
