"""Flags, environment, exit codes, and what standard error shows."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from robustbench_diffaug import cli, runs
from robustbench_diffaug import suite as suites

SMOKE = (Path(__file__).parent.parent / "suites/smoke.yaml").read_text()
COMMANDS = ", ".join(cli.cli.commands)
RDIFF = [sys.executable, "-c", "from robustbench_diffaug.cli import main; main()"]


class Shell:
    """Commands in this process: exit code, standard output, standard error."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(list(words))
        shown = self.capsys.readouterr()
        return int(caught.value.code or 0), shown.out, shown.err


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


def test_the_real_command(tmp_path: Path) -> None:
    done = subprocess.run([*RDIFF, "validate", "none.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rdiff: there is no file none.yaml; check the path\n"
    (tmp_path / "s.yaml").write_text(SMOKE.replace("n: 128", "n: 8"))
    done = subprocess.run([*RDIFF, "validate", "s.yaml"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("rdiff: s.yaml:22: benches.1.evaluator: with n=8 and alpha=0.001")
    assert done.stderr.count("\n") == 1


def test_validate_and_plan_run_nothing(shell: Shell) -> None:
    code, out, err = shell("validate", "smoke")
    assert code == 0
    assert out.startswith("suite smoke is sound: 2 checkpoints, 2 benches, 4 datasets, digest ")
    assert err.startswith("warning: bench certify: radii")
    code, out, err = shell("plan", "smoke", "-L", "4", "--set", "benches.certify.evaluator.n=64")
    assert code == 0
    assert "suite smoke, seed 0, into reports/smoke" in out
    assert "bench certify: 1 datasets x 2 checkpoints = 2 cells" in out
    assert "sigma 0.5: largest reachable radius" in out
    assert "probed" not in out
    code, out, err = shell("plan", "smoke", "-L", "4", "--set", "benches.certify.evaluator.n=64", "--probe")
    assert code == 0
    assert err.startswith("warning: bench certify: radii") and err.count("\n") == 1
    assert re.fullmatch(
        r"about \d+ s \(shift \d+ s, certify \d+ s\), \d+\.\d GB; probed in \d+ s", out.splitlines()[-1]
    )
    assert not list(Path().iterdir())


Asked = list[dict[str, Any]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The arguments with which suites are loaded."""
    calls: Asked = []
    real = suites.load

    def load(name: str, **flags: Any) -> suites.Loaded:
        calls.append({"name": name, **flags})
        return real(name, **flags)

    monkeypatch.setattr(suites, "load", load)
    return calls


def test_underscores_are_hyphens(shell: Shell, asked: Asked) -> None:
    for spelling in ("--data-dir", "--data_dir"):
        assert shell("validate", "smoke", spelling, "data")[0] == 0
        assert asked.pop()["data_dir"] == Path("data")
    assert shell("plan", "smoke", "--batch_size", "7")[0] == 0


def test_a_flag_beats_the_environment_which_beats_the_file(
    shell: Shell, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("s.yaml").write_text(SMOKE.replace("seed: 0", "seed: 5"))
    assert "seed 5," in shell("plan", "s.yaml")[1]
    monkeypatch.setenv("RDIFF_SEED", "6")
    assert "seed 6," in shell("plan", "s.yaml")[1]
    assert "seed 7," in shell("plan", "s.yaml", "--seed", "7")[1]
    Path("s.yaml").write_text(SMOKE.replace("seed: 0\n", ""))
    monkeypatch.delenv("RDIFF_SEED")
    assert "seed 0," in shell("plan", "s.yaml")[1]


def test_every_flag_is_a_variable(shell: Shell, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("more.yaml").write_text("{kind: mixture, id: more, classes: 4}")
    variables = {
        "LIMIT": "3", "DATA_DIR": "data", "SET": "seed=1 benches.certify.evaluator.n=32", "WITH": "more.yaml",
        "TRUST": "1", "OUTPUT": "out", "DEVICE": "cpu", "BATCH_SIZE": "9", "WORKERS": "3", "COMPILE": "1",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(f"RDIFF_{name}", value)
    options: list[runs.Options] = []
    monkeypatch.setattr(runs, "own", lambda root, suite: None)

    def tasks_of(loaded: suites.Loaded, found: runs.Options) -> list[object]:
        options.append(found)
        return []

    monkeypatch.setattr(runs, "tasks_of", tasks_of)
    assert shell("plan", "smoke")[0] == 0
    assert asked == [
        {
            "name": "smoke", "trust": True, "settings": ("seed=1", "benches.certify.evaluator.n=32"), "limit": 3,
            "extra": (Path("more.yaml"),), "seed": None, "data_dir": Path("data"),
        }
    ]  # fmt: skip
    assert options == [runs.Options(Path("out"), "cpu", 9, 3, True, True)]
    monkeypatch.setenv("RDIFF_LIMIT", "many")
    code, _, err = shell("plan", "smoke")
    assert code == 2
    assert "--limit" in err
    assert "'many'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], f"No such command 'fly'; there are {COMMANDS}; see rdiff --help"),
        (["run"], "Missing argument 'SUITE'; see rdiff run --help"),
        (["run", "smoke", "--limt", "3"], None),
        (["run", "smoke", "--device", "gpu"], "--device gpu: needed is auto, cpu, cuda or cuda:N"),
        (["run", "smoke", "--device", "cpu:3"], "--device cpu:3: needed is auto, cpu, cuda or cuda:N"),
        (["run", "smoke", "--device", "cuda:99"], "--device cuda:99: there is no such GPU; use --device cpu"),
        (["run", "smoke", "--device", "cuda:\N{SUPERSCRIPT TWO}"], None),
    ],
)
def test_usage_takes_one_line(words: list[str], message: str | None, shell: Shell) -> None:
    code, _, err = shell(*words)
    assert code == 2
    assert err.count("\n") == 1
    assert message is None or err == f"rdiff: {message}\n"


def test_verbose_adds_the_traceback(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "rdiff: there is no file none.yaml; check the path"
    assert shell("validate", "none.yaml") == (2, "", f"{line}\n")
    code, _, err = shell("validate", "none.yaml", "-v")
    assert code == 2
    assert err.startswith("Traceback")
    assert err.splitlines()[-1] == line
    monkeypatch.setenv("RDIFF_VERBOSE", "true")
    assert shell("validate", "none.yaml")[2] == err.replace(" -v", "")


def test_a_fault_of_rdiff_says_so(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(loaded: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(suites, "check", fail)
    code, _, err = shell("validate", "smoke")
    assert code == 2
    assert err == "rdiff: a fault of rdiff, please report it with what --verbose shows: KeyError: 'x'\n"


def test_ctrl_c(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(loaded: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(suites, "check", stop)
    line = "rdiff: interrupted; what is finished is kept, run again to continue\n"
    code, out, err = shell("validate", "smoke")
    assert (code, out, err.lstrip()) == (130, "", line)


def test_what_a_terminal_would_obey_is_spelled_out(shell: Shell) -> None:
    Path("s.yaml").write_text(SMOKE.replace("seed: 0", '"\\e[31m\\u202e": 0'))
    code, _, err = shell("validate", "s.yaml")
    assert code == 2
    assert "\\x1b[31m\\u202e: unknown key" in err
    assert "\x1b" not in err
    assert "\u202e" not in err


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c 'from robustbench_diffaug.cli import main; main()' ls suites | true"],
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""


def test_a_long_run_says_how_long_it_will_take(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustbench_diffaug import probe

    Path("s.yaml").write_text(SMOKE)
    words = ("run", "s.yaml", "-L", "4", "--set", "benches.certify.evaluator.n=64", "-o")
    code, plain, err = shell(*words, "plain")
    assert code == 0
    assert "tasks: " in err
    assert "probed" not in err  # it is short
    monkeypatch.setattr(probe, "WORTH", 0)
    code, out, err = shell(*words, "probed")
    assert code == 0
    (line,) = (line for line in err.splitlines() if "probed in" in line)
    assert line.startswith("about ")
    assert out.splitlines()[:-2] == plain.splitlines()[:-2]
    found, expected = (
        {path.relative_to(name).as_posix(): path.read_bytes() for path in Path(name).rglob("*.parquet")}
        for name in ("probed", "plain")
    )
    assert found == expected
    assert "probed" not in shell(*words, "quiet", "-q")[2]


def test_a_failure_is_told_once(shell: Shell) -> None:
    text = SMOKE.replace("size: 64", "size: 300").replace("temperature: 0.0016}", "temperature: 1.0e-300}", 1)
    Path("s.yaml").write_text(text)
    code, out, err = shell("run", "s.yaml", "-q")
    lines = err.splitlines()
    assert code == 1
    assert len(set(lines)) == len(lines)
    assert all(line.startswith("failed: ") and " / bayes / " in line for line in lines)
    assert "tilted" in out
