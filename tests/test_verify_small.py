"""Checks of small runs of their own: names that a table changes, and images that cannot be decoded."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from robustbench_diffaug import cli, runs
from robustbench_diffaug.diffusion.unet import WEIGHTS
from robustbench_diffaug.files import path_of, sha256
from robustbench_diffaug.recorded import open_run
from robustbench_diffaug.suite import load
from robustbench_diffaug.verify import files, recheck, whole
from robustbench_diffaug.verify.certificates import certificates
from robustbench_diffaug.verify.check import Check

BAYES = {"kind": "mixture", "id": "bayes", "classes": 4, "temperature": 0.0016}


def run_of(folder: Path, checkpoint: Mapping[str, object], bench: Mapping[str, object]) -> Path:
    """A run folder of one checkpoint and one bench."""
    (folder / "s.yaml").write_text(
        yaml.safe_dump({"name": "s", "checkpoints": [dict(checkpoint)], "benches": [dict(bench)]})
    )
    assert not runs.execute(load(str(folder / "s.yaml")), runs.Options(folder / "run")).failures
    return folder / "run"


@pytest.mark.parametrize("name", ["7", "-7"])
def test_figures_of_any_checkpoint_are_looked_at(tmp_path: Path, name: str) -> None:
    """A name may be a number, or begin as a formula does."""
    evaluator = {"kind": "smoothing", "sigmas": [0.25], "n0": 8, "n": 60}
    bench = {"name": "1", "evaluator": evaluator, "datasets": [{"kind": "mixture", "name": "m", "size": 4}]}
    root = run_of(tmp_path, BAYES | {"id": name}, bench)
    assert certificates(open_run(root)).state == "ok"
    frame = pd.read_csv(root / "metrics.csv", dtype=str, keep_default_na=False)
    frame.loc[frame["metric"] == "abstain", "value"] = "0.123"
    frame.to_csv(root / "metrics.csv", index=False)
    found = certificates(open_run(root))
    assert found.state == "FAILED"
    assert any("abstain is 0.123" in line for line in found.details)


def test_images_that_cannot_be_decoded_are_in_neither(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"images/{number}").mkdir(parents=True)
        Image.new("L", (8, 8), 50 * number).save(tmp_path / f"images/{number}/0.png")
    damaged = tmp_path / "images/2/0.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    dataset = {"kind": "folder", "name": "f", "root": "images", "mode": "L", "on_bad_image": "skip"}
    root = run_of(tmp_path, BAYES, {"name": "shift", "evaluator": {"kind": "shift"}, "datasets": [dataset]})
    found = [whole.verify_again(root, recheck.Again(0.25, seed)) for seed in range(12)]  # each chooses one image
    assert {check.state for check in found} == {"ok", "not checked"}
    alone = {check.said for check in found if check.state != "ok"}
    assert alone == {"shift / bayes / f: none of the chosen images can be decoded"}
    Image.new("L", (8, 8), 9).save(damaged)  # evaluated again it has a row, which was not recorded
    more = whole.verify_again(root, recheck.Again(1.0, 0))
    assert more.state == "FAILED"
    assert any("sample 2/0.png is not recorded" in line for line in more.details)


def test_weights_of_a_denoiser_that_were_changed_are_named(tmp_path: Path) -> None:
    """The suite says their digest, so it stands in the manifest whatever the file holds."""
    shutil.copytree(path_of("rdiff:zoo/mnist5k-ddpm"), tmp_path / "ddpm")
    weights = tmp_path / "ddpm" / WEIGHTS
    denoiser = {"kind": "unet", "folder": "ddpm", "sha256": sha256(weights), "microbatch": 2}
    evaluator = {"kind": "shift", "modes": ["de"], "denoiser": denoiser, "times": [0, 50]}
    bench = {"name": "shift", "evaluator": evaluator, "datasets": [{"kind": "mixture", "name": "m", "size": 2}]}
    root = run_of(tmp_path, BAYES, bench)

    def state() -> Check:
        (found,) = (check for check in files.contents(open_run(root)) if check.name == "denoisers")
        return found

    assert state().state == "ok"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert state().state == "FAILED"
    assert "another or a damaged file" in state().details[0]
    weights.unlink()
    assert state().state == "not checked"


def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name, said in (("none", "there is no folder"), ("empty", "is no folder of rdiff")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["verify", str(tmp_path / name)])
        shown = capsys.readouterr()
        assert ended.value.code == 2 and said in shown.err and shown.err.count("\n") == 1
