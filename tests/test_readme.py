"""The README's example is true."""

import re
from pathlib import Path

import pytest
from safetensors.torch import save_file

from robustbench_diffaug import cli, rng
from robustbench_diffaug.checkpoints.timm_model import build

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_suite_is_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    Path("suite.yaml").write_text(example)
    with rng.seeded(0):
        network = build("resnet18", (), 1, 10)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, "my-resnet.safetensors")
    for command in ("validate", "plan"):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "suite.yaml"])
        assert not caught.value.code
    assert "largest reachable radius" in capsys.readouterr().out


def test_the_commands_are_those_of_tox_and_the_package() -> None:
    assert "pip install -c constraints.txt . && rdiff run quickstart" in README
    assert "pip install tox && tox" in README
