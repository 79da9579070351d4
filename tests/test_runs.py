"""A run folder from start to end: resumed, interrupted, shared, and always the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image

from robustbench_diffaug import engine, rng, runs, summary
from robustbench_diffaug.evaluators.base import Forwards
from robustbench_diffaug.evaluators.shift import Shift
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import Loaded, load

SUITE = yaml.safe_load((Path(__file__).parent.parent / "suites/smoke.yaml").read_text())
RESULTS = ("metrics.csv", "metrics.parquet", "leaderboard.csv", "suite.lock.yaml")


def write_suite(folder: Path, draws: int = 120) -> Path:
    """The smoke suite, with `draws` a certificate in four files of a cell."""
    data = json.loads(json.dumps(SUITE))
    data["benches"][1]["evaluator"] |= {"n": draws, "n0": 8, "sigmas": [0.25]}
    data["benches"][1]["datasets"] = [{"kind": "mixture", "name": "mixture", "size": 70}]
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def command(path: Path, root: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "robustbench_diffaug", "run", str(path), "-o", str(root), "-q", *flags]


def results(root: Path) -> dict[str, bytes]:
    """The bytes of all that time, machine and order must not change."""
    paths = [*(root / "records").rglob("*.parquet"), *(root / name for name in RESULTS)]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """An unbroken run."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_suite(folder)
    done = runs.execute(load(str(path)), runs.Options(folder / "run"))
    assert not done.failures
    return path, results(folder / "run")


def test_a_second_run_is_a_no_op(tmp_path: Path, whole: tuple[Path, dict[str, bytes]]) -> None:
    loaded, options = load(str(whole[0])), runs.Options(tmp_path / "run")
    first = runs.execute(loaded, options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    second = runs.execute(loaded, options)
    assert (first.computed, second.computed) == (len(runs.tasks_of(loaded, runs.Options(tmp_path / "new"))), 0)
    assert second.digest == first.digest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_deleted_records_are_all_that_is_computed_again(tmp_path: Path, whole: tuple[Path, dict[str, bytes]]) -> None:
    loaded, options = load(str(whole[0])), runs.Options(tmp_path / "run")
    runs.execute(loaded, options)
    files = sorted((tmp_path / "run/records").rglob("*.parquet"))
    gone = files[::3]
    kept = {path: path.stat().st_mtime_ns for path in files if path not in gone}
    for path in gone:
        path.unlink()
    done = runs.execute(loaded, options)
    assert 0 < done.computed <= len(gone)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert results(tmp_path / "run") == whole[1]


@pytest.mark.parametrize("flags", [["--batch-size", "1"], ["-b", "7"], ["-b", "64"], ["--workers", "2"]], ids=" ".join)
def test_batches_and_workers_change_nothing(
    flags: list[str], tmp_path: Path, whole: tuple[Path, dict[str, bytes]]
) -> None:
    done = subprocess.run(command(whole[0], tmp_path / "run", *flags), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run") == whole[1]


@pytest.mark.parametrize("moment", range(5))
def test_killed_at_any_moment(moment: int, tmp_path: Path, whole: tuple[Path, dict[str, bytes]]) -> None:
    root = tmp_path / "run"
    process = subprocess.Popen(command(whole[0], root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    share = float(rng.uniform(rng.key("kill", moment), range(1), (1,))[0, 0])
    files = int(share * sum(name.endswith(".parquet") for name in whole[1]))
    while process.poll() is None and len(list(root.rglob("*.parquet"))) < files:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (root / "index.html").exists() or process.returncode == 0
    done = subprocess.run(command(whole[0], root), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results(root) == whole[1]


def test_interrupted_with_the_keyboard(tmp_path: Path, whole: tuple[Path, dict[str, bytes]]) -> None:
    for flags in ([], ["--workers", "2"]):
        root = tmp_path / f"run{len(flags)}"
        process = subprocess.Popen(command(whole[0], root, *flags), stderr=subprocess.PIPE, text=True)
        while process.poll() is None and len(list(root.rglob("*.parquet"))) < 3:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:  # it was faster
            continue
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert errors.strip().splitlines()[-1].endswith("run again to continue")
        kept = len(list(root.rglob("*.parquet")))
        assert kept >= 3
        assert subprocess.run(command(whole[0], root)).returncode == 0
        assert results(root) == whole[1]


def test_two_runs_at_the_same_time_do_no_damage(tmp_path: Path, whole: tuple[Path, dict[str, bytes]]) -> None:
    root = tmp_path / "run"
    both = [subprocess.Popen(command(whole[0], root), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert results(root) == whole[1]
    check = subprocess.run(["sha256sum", "--quiet", "-c", "digests.txt"], cwd=root, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


def counted(loaded: Loaded, root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a suite; the number of tasks that it took."""
    calls: list[engine.Task] = []

    def run(task: engine.Task) -> engine.Outcome:
        calls.append(task)
        return engine.run(task)

    monkeypatch.setattr("robustbench_diffaug.executors.run", run)
    runs.execute(loaded, runs.Options(root))
    return len(calls)


def test_another_alpha_costs_no_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_suite(tmp_path)
    first = counted(load(str(path)), tmp_path / "run", monkeypatch)
    before = results(tmp_path / "run")
    settings = ["benches.certify.evaluator.alpha=0.05", "benches.certify.evaluator.radii=[0.1, 0.2]"]
    assert first > 0
    assert counted(load(str(path), settings=settings), tmp_path / "run", monkeypatch) == 0
    after = results(tmp_path / "run")
    assert b"certified@0.20" in after["metrics.csv"]
    assert b"certified@0.20" not in before["metrics.csv"]
    assert {k: v for k, v in after.items() if k.startswith("records")} == {
        k: v for k, v in before.items() if k.startswith("records")
    }


def test_another_checkpoint_computes_only_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_suite(tmp_path)
    counted(load(str(path)), tmp_path / "run", monkeypatch)
    before = results(tmp_path / "run")
    more = tmp_path / "more.yaml"
    more.write_text("{kind: mixture, id: third, classes: 4, temperature: 0.01}")
    loaded = load(str(path), extra=[more])
    tasks = runs.tasks_of(loaded, runs.Options(tmp_path / "run"))
    assert {cell.checkpoint.id for task in tasks for cell in task.cells} == {"third"}
    runs.execute(loaded, runs.Options(tmp_path / "run"))
    after = results(tmp_path / "run")
    assert all(after[name] == content for name, content in before.items() if name.startswith("records"))
    old, new = (set(table["metrics.csv"].splitlines()) for table in (before, after))
    assert old < new
    assert all(b",third," in line for line in new - old)


def test_what_a_run_folder_holds(tmp_path: Path, whole: tuple[Path, dict[str, bytes]]) -> None:
    root = tmp_path / "run"
    done = runs.execute(load(str(whole[0])), runs.Options(root))
    listed = {line.split("  ", 1)[1] for line in (root / "digests.txt").read_text().splitlines()}
    there = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert listed == {name for name in there if not name.startswith(".")} - {"digests.txt"}
    assert {"manifest.json", "suite.lock.yaml", "metrics.csv", "metrics.parquet", "leaderboard.csv", "costs.csv",
            "index.html"} <= listed  # fmt: skip
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["suite"] == {"name": "smoke", "digest": load(str(whole[0])).suite.digest, "seed": 0}
    for key in "versions device threads checkpoints denoisers datasets benches seconds notices".split():
        assert manifest[key] or key == "notices"
    assert manifest["failures"] == done.failures == []
    again = load(str(root / "suite.lock.yaml"))
    assert again.suite == load(str(whole[0])).suite
    columns = "suite,bench,evaluator,checkpoint,group,metric,value,low,high,n,n_available,better,unit"
    assert (root / "metrics.csv").read_text().startswith(columns)


def test_damaged_records_are_named(tmp_path: Path, whole: tuple[Path, dict[str, bytes]]) -> None:
    loaded, options = load(str(whole[0])), runs.Options(tmp_path / "run")
    runs.execute(loaded, options)
    path = sorted((tmp_path / "run/records").rglob("*.parquet"))[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        runs.execute(loaded, options)
    path.unlink()
    runs.execute(loaded, options)
    assert results(tmp_path / "run") == whole[1]


def picture(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), grey).save(path)


def of_folder(folder: Path, rule: str) -> Loaded:
    """A suite of one folder of 20 images, two of which are damaged."""
    for number in range(20):
        picture(folder / "images" / f"{number % 4}" / f"{number:02d}.png", 10 * number)
    for name in ("images/1/05.png", "images/3/19.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    dataset = {"kind": "folder", "name": "f", "root": "images", "mode": "L", "on_bad_image": rule}
    bench = {"name": "shift", "evaluator": {"kind": "shift"}, "datasets": [dataset]}
    data = {"name": "damaged", "checkpoints": SUITE["checkpoints"], "benches": [bench]}
    (folder / "s.yaml").write_text(yaml.safe_dump(data))
    return load(str(folder / "s.yaml"))


def test_damaged_images_are_left_out_and_told(tmp_path: Path) -> None:
    done = runs.execute(of_folder(tmp_path, "skip"), runs.Options(tmp_path / "run"))
    assert not done.failures
    *guesses, notice = json.loads((tmp_path / "run/manifest.json").read_text())["notices"]
    assert all("of 18 images of f right, which chance might give" in guess for guess in guesses)  # images of noise
    assert notice == "shift: 2 images of f could not be read and were left out: 1/05.png, 3/19.png"
    rows = done.metrics[done.metrics["metric"].str.startswith("accuracy")]
    assert set(rows["n"]) == {18}
    assert set(rows["n_available"]) == {20}
    assert not rows["complete"].any()
    costs = pd.read_csv(tmp_path / "run/costs.csv")
    assert costs["samples"].tolist() == [18, 18]
    for _, cost in costs.iterrows():
        assert cost["seconds_per_image"] == pytest.approx(cost["seconds"] / 18, abs=1e-4)
        assert cost["denoising_seconds"] + cost["classifying_seconds"] <= cost["seconds"] + 0.002
    assert runs.execute(of_folder(tmp_path, "skip"), runs.Options(tmp_path / "run")).computed == 0


def test_damaged_images_fail_their_cells_and_are_named(tmp_path: Path) -> None:
    done = runs.execute(of_folder(tmp_path, "fail"), runs.Options(tmp_path / "run"))
    assert [failure["checkpoint"] for failure in done.failures] == ["bayes", "tilted"]
    for failure in done.failures:
        assert "1/05.png is not a readable image" in failure["reason"]
        assert "2 of the 20 images read together cannot be decoded" in failure["reason"]


def test_backwards_are_a_metric_where_there_are_any(
    tmp_path: Path, whole: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(str(whole[0]))
    runs.execute(loaded, runs.Options(tmp_path / "run"))

    def counts() -> set[tuple[str, float, int]]:
        found = summary.metrics(loaded.suite, Store(tmp_path / "run")).metrics
        rows = found[(found["group"] == "cost") & (found["bench"] == "shift") & found["metric"].str.contains("wards/d")]
        return set(zip(rows["metric"], rows["value"], rows["n"], strict=True))

    assert {name for name, _, _ in counts()} == {"forwards/denoiser"}
    monkeypatch.setattr(Shift, "forwards", lambda self: Forwards(20, 3, 15, own=30, own_backward=25))
    ((n, denoised), (m, derived)) = sorted((n, (name, value)) for name, value, n in counts())
    assert n == m
    assert {denoised, derived} == {("forwards/denoiser", 50.0 * n), ("backwards/denoiser", 40.0 * n)}
