"""Suites from files: settings, more checkpoints, limits, and where relative paths start."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from torch import zeros

from robustbench_diffaug.checkpoints.timm_model import Timm
from robustbench_diffaug.data.sources import Arrays
from robustbench_diffaug.document import apply
from robustbench_diffaug.evaluators.shift import Shift
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.files import built_in, locate
from robustbench_diffaug.suite import Loaded, check, load

SMOKE = (Path(__file__).parent.parent / "suites/smoke.yaml").read_text()
NET = "{kind: timm, id: net, arch: resnet10t, classes: 4, weights: {uri: w.safetensors}}"


def certify(loaded: Loaded) -> Smoothing:
    evaluator = loaded.suite.benches[1].evaluator
    assert isinstance(evaluator, Smoothing)
    return evaluator


def test_the_smoke_suite() -> None:
    loaded = load("smoke")
    assert [entry.id for entry in loaded.suite.checkpoints] == ["bayes", "tilted"]
    assert certify(loaded).alpha == 0.001
    assert loaded.places["checkpoint", "tilted"].endswith("smoke.yaml:6: checkpoints.1")
    assert loaded.places["bench", "certify/0"].endswith("smoke.yaml:24: benches.1.datasets.0")
    assert check(loaded) == (
        "bench certify: radii 0.875, 1 are out of reach: with n=128, alpha=0.001 none exceeds 0.8104",
    )


def test_settings_go_by_position_name_and_id() -> None:
    assert certify(load("smoke", settings=["benches.certify.evaluator.n=64"])).n == 64
    assert certify(load("smoke", settings=["benches.1.evaluator.alpha=1e-2"])).alpha == 0.01
    assert certify(load("smoke", settings=["benches.certify.evaluator.sigmas=[0.5, 1]"])).sigmas == (0.5, 1.0)
    assert load("smoke", settings=["checkpoints.tilted.id=other"]).suite.checkpoints[1].id == "other"
    assert load("smoke", settings=["seed=3"], seed=4).suite.seed == 4


def test_a_setting_changes_one_place_and_not_its_aliases() -> None:
    loaded = load("smoke", settings=["benches.shift.evaluator.denoiser.clip=false"])
    shift = loaded.suite.benches[0].evaluator
    assert isinstance(shift, Shift)
    assert shift.denoiser
    assert not shift.denoiser.clip
    denoiser = certify(loaded).denoiser
    assert denoiser
    assert denoiser.clip


def test_all_parts_of_a_grid_are_looked_at(tmp_path: Path) -> None:
    np.save(tmp_path / "fog.npy", np.zeros((5, 8, 8, 1), np.uint8))
    np.save(tmp_path / "labels.npy", np.zeros(5, np.int64))
    grid = f"[{{kind: cifar-c, name: c, root: '{tmp_path}', corruptions: [fog, snow]}}]"
    with pytest.raises(ValueError, match=r"benches\.0\.datasets\.0: there is no .*snow\.npy"):
        check(load("smoke", settings=[f"benches.shift.datasets={grid}"]))


def test_the_weights_of_denoisers_are_looked_at() -> None:
    ddpm = f"{{kind: unet, folder: 'rdiff:zoo/mnist5k-ddpm', sha256: {'0' * 64}}}"
    with pytest.raises(ValueError, match=r"benches\.0\.evaluator: .*has sha256"):
        check(load("smoke", settings=[f"benches.shift.evaluator.denoiser={ddpm}"]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed", "needed is key=value"),
        ("=3", "needed is key=value"),
        ("benches.cert.evaluator.n=4", r"there is no item 'cert'; did you mean certify\?"),
        ("benchs.certify.n=4", r"there is no 'benchs'; did you mean benches\?"),
        ("seed.x=4", "'x' is below a plain value"),
        ("benches.7.name=x", "there is no item '7'; there are shift, certify"),
        ("seed=[1", "^--set seed=.1: not YAML"),
        ("seed={a: 1, a: 2}", "^--set seed={a: 1, a: 2}: key 'a' stands twice"),
        ("seed=x", "^--set seed=x: seed: needed is a whole number, not 'x'$"),
        ("benches.certify.evaluator.nn=4", r"^--set \S+: benches.1.evaluator.nn: unknown key 'nn'"),
        ("benches.certify.evaluator={kind: shft}", r"^--set .*: benches.1.evaluator.kind: .* did you mean shift\?"),
    ],
)
def test_settings_that_are_wrong(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("smoke", settings=[setting])


def test_apply_says_what_it_set() -> None:
    data = {"a": [{"name": "x", "b": 1}]}
    assert apply(data, "a.x.b=2e0") == ("a", 0, "b")
    assert data == {"a": [{"name": "x", "b": 2.0}]}


def test_limits_are_never_raised() -> None:
    text = ["benches.certify.datasets.mixture.limit=3"]
    limits = [bench.datasets[0].limit for bench in load("smoke", settings=text, limit=5).suite.benches]
    assert limits == [5, 3]
    assert [len(part.rows()) for part in load("smoke", limit=5).suite.benches[0].parts()] == [5, 5, 5]


def test_more_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    save_file({"x": zeros(1)}, tmp_path / "one/w.safetensors")
    (tmp_path / "one/net.yaml").write_text(NET)
    (tmp_path / "list.yaml").write_text("- {kind: mixture, id: b, classes: 4}\n- {kind: mixture, id: c, classes: 4}\n")
    loaded = load("smoke", extra=[tmp_path / "one/net.yaml", tmp_path / "list.yaml"])
    assert [entry.id for entry in loaded.suite.checkpoints] == ["bayes", "tilted", "net", "b", "c"]
    net = loaded.suite.checkpoints[2]
    assert isinstance(net, Timm)
    assert Path(net.weights.uri) == tmp_path / "one/w.safetensors"
    assert loaded.places["checkpoint", "net"] == f"{tmp_path}/one/net.yaml:1: weights"
    assert loaded.places["checkpoint", "c"] == f"{tmp_path}/list.yaml:2: 1"
    (tmp_path / "list.yaml").write_text("- {kind: mixture, id: bayes, classes: 4}\n")
    with pytest.raises(ValueError, match=r"list.yaml: two checkpoints are called 'bayes'; give each a name"):
        load("smoke", extra=[tmp_path / "list.yaml"])
    (tmp_path / "list.yaml").write_text("[]")
    with pytest.raises(ValueError, match=r"list.yaml:1: holds no checkpoint"):
        load("smoke", extra=[tmp_path / "list.yaml"])


def test_trust_does_not_spread_to_more_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{kind: local, id: x, classes: 4, arch: 'torch.nn:Identity'}")
    with pytest.raises(ValueError, match=r"c\.yaml:1: kind: kind local runs code .* add --trust"):
        load("smoke", extra=[tmp_path / "c.yaml"])
    assert load("smoke", extra=[tmp_path / "c.yaml"], trust=True).suite.checkpoints[2].id == "x"


def test_where_relative_paths_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "suites").mkdir()
    entry = "{kind: arrays, name: mine, file: a.npz}"
    text = SMOKE.replace("{kind: mixture, name: mixture, group: clean, size: 16}", entry)
    (tmp_path / "suites/s.yaml").write_text(text)

    def file(**more: Path) -> str | None:
        dataset = load("suites/s.yaml", **more).suite.benches[1].datasets[0]  # type: ignore[arg-type]
        assert isinstance(dataset, Arrays)
        return dataset.file

    assert file() == str(tmp_path / "suites/a.npz")
    assert file(data_dir=Path("data")) == str(tmp_path / "data/a.npz")


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()  # a folder of that name does not hide the suite
    assert locate("smoke") == (built_in()["smoke"], True)
    assert locate(os.path.relpath(built_in()["smoke"])) == (Path(os.path.relpath(built_in()["smoke"])), True)
    (tmp_path / "mine.yaml").write_text(SMOKE)
    assert locate("mine.yaml") == (Path("mine.yaml"), False)
    for name, message in (
        ("mini.yaml", r"there is no file mini.yaml; did you mean mine.yaml\?"),
        ("quickstrat", r"there is no suite called 'quickstrat'; did you mean quickstart\?"),
        ("zzz", "there are .*cifar10-c.*, quickstart, .*zoo; or give the path of a YAML file"),
    ):
        with pytest.raises(ValueError, match=message):
            locate(name)


def test_the_digest_is_of_what_the_suite_says() -> None:
    digest = load("smoke").suite.digest
    assert digest == load("smoke").suite.digest
    assert digest != load("smoke", settings=["checkpoints.bayes.id=b"]).suite.digest
    assert digest == load("smoke", settings=["benches.certify.evaluator.n=128"]).suite.digest
