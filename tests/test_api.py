"""rdiff in Python: networks of this process on the leaderboard, found again by what they are."""

import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import robustbench_diffaug
from robustbench_diffaug import Network, Suite, load, report, rng, run
from robustbench_diffaug.checkpoints import base
from robustbench_diffaug.data.embedded import Mnist5k
from robustbench_diffaug.evaluators.shift import Shift

MNIST = {"kind": "mnist5k", "group": "clean", "limit": 3}
BENCH = {"name": "b", "evaluator": {"kind": "shift", "modes": ["default"]}, "datasets": [MNIST]}
THREADS: list[threading.Thread] = []
"""Of the test runner and of other tests."""
SMALL: dict[str, Any] = {"name": "small", "benches": [BENCH]}
QUICK = "benches=[{name: shift, evaluator: {kind: shift, modes: [default]}, datasets: [{kind: mnist5k, group: clean}]}]"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    THREADS[:] = threading.enumerate()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    Path("tmp").mkdir()


def linear(channels: int = 1, classes: int = 10, side: int = 32) -> nn.Sequential:
    with rng.seeded(0):
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes))


def bias(network: nn.Sequential) -> Tensor:
    layer = network[1]
    assert isinstance(layer, nn.Linear)
    return layer.bias


def nothing_stays() -> None:
    """No process, thread or file is left, and no network in memory."""
    assert set(threading.enumerate()) <= set(THREADS)
    assert multiprocessing.active_children() == []
    assert list(Path("tmp").iterdir()) == []
    assert base._loaded.cache_info().currsize == 0


def test_a_network_is_on_the_leaderboard_of_the_quickstart() -> None:
    network = linear()
    result = run("quickstart", {"mine": network}, limit=3, settings=[QUICK], quiet=True)
    assert result.root == Path("reports/quickstart")
    board = result.leaderboard.set_index("checkpoint")
    assert len(board) == 5
    images, labels = Mnist5k(limit=3).opened().read(range(3))
    right = int((network(images).argmax(dim=1) == labels).sum())
    assert board["accuracy/clean"]["mine"] == right / 3
    assert 0 <= board["accuracy/clean_low"]["mine"] <= right / 3 < board["accuracy/clean_high"]["mine"]
    pd.testing.assert_frame_equal(result.leaderboard, pd.read_csv(result.root / "leaderboard.csv"), check_dtype=False)
    assert result.failures == ()
    nothing_stays()


def test_records_are_what_the_network_says() -> None:
    network = linear()
    rows = run(SMALL, {"mine": network}, quiet=True).records("b", "mine")
    images, labels = Mnist5k(limit=3).opened().read(range(3))
    assert rows["label"].tolist() == labels.tolist()
    expected = nn.functional.cross_entropy(network(images), labels, reduction="none")
    assert torch.allclose(torch.tensor(rows["nll"].to_list()), expected, atol=1e-5)


def test_a_second_run_is_a_no_op_and_changed_weights_are_computed_anew() -> None:
    network = linear()
    original = bias(network).detach().clone()
    first = run(SMALL, {"mine": network, "twin": linear()}, quiet=True)
    files = {path: path.stat().st_mtime_ns for path in first.root.rglob("*") if path.is_file()}
    assert run(SMALL, {"mine": network, "twin": linear()}, quiet=True).digest == first.digest
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with torch.no_grad():
        bias(network)[3] += 100
    second = run(SMALL, {"mine": network, "twin": linear()}, quiet=True)
    assert second.digest != first.digest
    assert set(second.records("b", "mine")["pred"]) == {3}
    kept = [path for path in files if "records/b/twin" in path.as_posix()]
    assert kept and all(path.stat().st_mtime_ns == files[path] for path in kept)
    with torch.no_grad():
        bias(network).copy_(original)
    before = {path: path.stat().st_mtime_ns for path in (first.root / "records").rglob("*.parquet")}
    run(SMALL, {"mine": network, "twin": linear()}, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in (first.root / "records").rglob("*.parquet")} == before


class Counting(nn.Module):
    """Leaves something behind in each call, drops out while it is trained, and has a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout, self.calls = linear(), nn.Dropout(0.5), 0
        self.register_forward_hook(lambda module, images, outputs: outputs + 1)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return torch.as_tensor(self.inner(self.dropout(images)))


def test_the_caller_s_network_and_torch_stay_as_they_were() -> None:
    network = Counting().train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    drawn = torch.get_rng_state()
    result = run(SMALL, {"mine": network}, quiet=True)
    assert network.training and network.dropout.training and network.calls == 0
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert len(network._forward_hooks) == 1
    assert filled == torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert flags == (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert run(SMALL, {"mine": network}, quiet=True).digest == result.digest


@pytest.mark.parametrize(
    ("network", "channels", "classes"),
    [
        (linear(1, 4), 1, 4),
        (linear(3), 3, 10),
        (Network(linear(3, side=64), preprocess={"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}), 3, 10),
        (Network(linear(1, side=28), preprocess={"crop": 28}, classes=10, microbatch=16), 1, 10),
        (linear().to(torch.bfloat16), 1, 10),
        (nn.DataParallel(linear()), 1, 10),
    ],
)
def test_channels_and_classes_are_found(network: nn.Module | Network, channels: int, classes: int) -> None:
    evaluator = {"kind": "shift", "modes": ["default"]}
    few = {"name": "few", "benches": [{"name": "b", "evaluator": evaluator, "datasets": [MNIST | {"digits": [0, 1]}]}]}
    result = run(few, {"mine": network}, quiet=True)
    (entry,) = json.loads((result.root / "manifest.json").read_text())["checkpoints"]
    assert result.failures == ()
    assert result.metrics["value"].notna().all()
    lock = (result.root / "suite.lock.yaml").read_text()
    assert f"channels: {channels}\n" in lock and f"classes: {classes}\n" in lock
    assert entry


def test_torchvision_s_transforms_are_understood() -> None:
    class Preset:
        """As torchvision.transforms._presets.ImageClassification is."""

        mean, std, resize_size, crop_size, interpolation = [0.5], [0.25], [40], [32], None

    run(SMALL, {"mine": Network(linear(), preprocess=Preset())}, quiet=True)
    run(
        SMALL,
        {"mine": Network(linear(), preprocess={"mean": [0.5], "std": [0.25], "size": 40, "crop": 32})},
        quiet=True,
    )
    assert len(list(Path("reports/small/records").rglob("*.parquet"))) == 1  # the same, so nothing was computed


def test_two_processes_give_the_same_bytes() -> None:
    one = run(SMALL, {"mine": linear(), "twin": linear()}, output="one", quiet=True)
    two = run(SMALL, {"mine": linear(), "twin": linear()}, output="two", quiet=True, workers=2)
    for path in one.root.rglob("*.parquet"):
        assert (two.root / path.relative_to(one.root)).read_bytes() == path.read_bytes()
    assert two.failures == ()
    nothing_stays()


def test_what_other_processes_cannot_have_is_named() -> None:
    network = linear()
    network.register_forward_hook(lambda module, images, outputs: outputs)
    told = r"checkpoint mine: other processes cannot have the network \(.*use workers=1, or define its classes"
    with pytest.raises(ValueError, match=told):
        run(SMALL, {"mine": network}, quiet=True, workers=2)
    assert run(SMALL, {"mine": network}, quiet=True).failures == ()
    nothing_stays()


class Stopped(nn.Module):
    """The user presses Ctrl-C while it is evaluated."""

    def __init__(self, microbatch: int) -> None:
        super().__init__()
        self.layer, self.microbatch = linear(), microbatch

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == self.microbatch:
            raise KeyboardInterrupt
        return torch.as_tensor(self.layer(images))


def test_it_can_be_interrupted_and_run_again() -> None:
    kept: dict[str, Any] = {"first": linear(), "second": Network(Stopped(7), microbatch=7)}
    before = torch.are_deterministic_algorithms_enabled()  # which other tests may have left on
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, kept, quiet=True)
    nothing_stays()
    assert torch.are_deterministic_algorithms_enabled() == before
    assert run(SMALL, {"first": linear()}, quiet=True).failures == ()


def wrong(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("reports").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"": linear()}, "checkpoint : id: needed is a text that is not empty"),
        ({"m": linear().state_dict()}, "checkpoint m: needed is a torch.nn.Module, not its state_dict; load that into"),
        ({"m": {"kind": "tim"}}, "checkpoint m: kind: no checkpoint is called 'tim'; did you mean timm?"),
        ({"m": {"kind": "local", "arch": "a.py:b"}}, "runs code that this file names; if you trust it, add trust=True"),
        ({"m": Network(linear(), microbatch=0)}, "checkpoint m: microbatch: needed is a number above 0, not 0"),
        ({"m": Network(linear(), classes=3)}, "checkpoint m: the network has 10 outputs, not 3; correct its classes"),
        ({"m": Network(linear(), preprocess={"men": [0]})}, "unknown key 'men'; did you mean mean?"),
        (
            {"m": Network(linear(), preprocess="timm")},
            "preprocess: needed is a Preprocess, a mapping of its fields, or",
        ),
        (
            {"m": linear(side=64)},
            "fails on an image of shape 1x32x32 (RuntimeError: mat1 and mat2 shapes cannot be mul",
        ),
        ({"m": nn.Sequential(nn.Flatten(), nn.LazyLinear(10))}, "its weights 1.weight have no numbers yet; load or"),
        ({"m": nn.Conv2d(1, 4, 3)}, "the network makes (1, 4, 30, 30) of one image; needed is (1, classes)"),
        ({"m": nn.Sequential(linear(), nn.Softmax(1))}, "returns probabilities; return logits (leave the softmax out)"),
        ({"m": linear(), "n": linear(1, 7)}, "checkpoint m has 10 classes and n 7"),
    ],
)
def test_what_is_no_checkpoint_is_told_in_one_line(given: Any, message: str) -> None:
    wrong(message, lambda: run(SMALL, given, quiet=True))


def test_other_arguments_are_told_in_one_line() -> None:
    wrong("there is no suite called 'quikstart'; did you mean quickstart?", lambda: run("quikstart"))
    wrong("workers=0: needed is at least 1", lambda: run(SMALL, workers=0))
    wrong("device gpu: needed is auto, cpu, cuda or cuda:N", lambda: run(SMALL, {"m": linear()}, device="gpu"))
    wrong("checkpoints: needed is a list of at least 1", lambda: run(SMALL))
    wrong("there is no folder nowhere", lambda: report("nowhere"))
    wrong("settings are for a suite by name", lambda: run(load("quickstart"), settings=["seed=1"]))
    wrong("key 'benches' is missing", lambda: load({"name": "x"}))


class Named(nn.Sequential):
    """A class with a name that HTML would obey."""


Named.__name__ = "<script>"


def test_notebooks_show_the_leaderboard_escaped() -> None:
    id = "<img src=x onerror=alert(1)>"
    result = run(SMALL, {id: Named(*linear())}, quiet=True)
    shown = result._repr_html_()
    assert "<img" not in shown and "&lt;img src=x onerror=alert(1)&gt;" in shown
    value, low = (result.leaderboard[f"accuracy/clean{end}"][0] for end in ("", "_low"))
    assert f"{value:.3f} [{low:.3f}, " in shown
    assert (result.root / "index.html").read_text().count("<script>") == 1  # its own
    broken = linear()
    with torch.no_grad():
        bias(broken)[0] = torch.nan
    failed = run(SMALL, {"<b>": broken}, output="failed", quiet=True)
    assert "&lt;b&gt; gives NaN or infinite logits for 3 of 3 images" in failed._repr_html_()
    assert [failure["checkpoint"] for failure in failed.failures] == ["<b>"]


def test_reports_of_other_settings_need_no_network() -> None:
    certify = {"kind": "smoothing", "sigmas": [0.25], "n0": 4, "n": 40, "radii": [0.0]}
    result = run({"name": "c", "benches": [BENCH | {"evaluator": certify}]}, {"mine": linear()}, quiet=True, limit=2)
    other = report(result, "other", settings=["benches.b.evaluator.alpha=0.4"])
    best = result.metrics.set_index("metric")["value"]["acr"], other.metrics.set_index("metric")["value"]["acr"]
    assert best[1] >= best[0]
    assert (Path("other") / "index.html").exists()
    assert report(result.root).digest == result.digest
    with pytest.raises(ValueError, match="no bench is called 'shift'"):
        result.records("shift", "mine")
    with pytest.raises(ValueError, match="no checkpoint of bench b is called 'min'; did you mean mine"):
        result.records("b", "min")


def test_a_suite_is_a_value() -> None:
    suite = load("quickstart")
    assert isinstance(suite, Suite)
    assert [bench.name for bench in suite.benches] == ["shift", "certify"]
    bench = suite.benches[0].model_copy(update={"evaluator": Shift(modes=("default",))})
    only = suite.model_copy(update={"benches": (bench.model_copy(update={"datasets": bench.datasets[:1]}),)})
    again = run(only, limit=1, seed=5, quiet=True, output="value")
    assert len(again.leaderboard) == 4
    assert "seed: 5" in (again.root / "suite.lock.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "suite: needed is a name, a path, a mapping or a Suite, not NoneType"),
        ((SMALL, linear()), "checkpoints: needed is a mapping such as {'mine': network}, not Sequential"),
        ((SMALL, {"m": "mine.pth"}), "checkpoint m: needed is a torch.nn.Module, not str; for a file of weights give"),
        ((SMALL, {3: linear()}), "checkpoint 3: id: needed is a text (put it in quotes), not 3"),
    ],
)
def test_arguments_of_other_types_are_told(arguments: Any, message: str) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # the type checker of the tests would say it first
    try:
        wrong(message, lambda: run(*arguments, quiet=True))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_the_import_is_light() -> None:
    code = (
        "import sys, robustbench_diffaug\nprint(robustbench_diffaug.__version__, {'torch', 'pandas'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith(" set()\n")


def test_the_function_report_is_not_the_package_report() -> None:
    """Whatever was imported before; the package is reached by its whole name."""
    from robustbench_diffaug.report import page

    assert "page" in sys.modules["robustbench_diffaug.report"].__dict__
    assert page.__name__ == "robustbench_diffaug.report.page"
    assert robustbench_diffaug.report is report and callable(report)
    with pytest.raises(AttributeError, match="module 'robustbench_diffaug' has no attribute 'runn'"):
        robustbench_diffaug.runn  # noqa: B018


def test_a_worker_that_runs_the_script_again_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit, match="rdiff: put what the script does under  if __name__ == '__main__':"):
        run(SMALL, {"mine": linear()}, quiet=True)
