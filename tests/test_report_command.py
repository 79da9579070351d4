"""Reports made again from records: the same bytes, other settings, and no file that the suite names."""

import json
import shutil
from pathlib import Path

import pytest

from robustbench_diffaug import cli, runs
from robustbench_diffaug.files import sha256
from robustbench_diffaug.recorded import open_run
from robustbench_diffaug.suite import load
from tests.small_runs import certified

ALPHA = "benches.certify.evaluator.alpha=0.05"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a suite, its images, and a run of it."""
    folder = tmp_path_factory.mktemp("made")
    certified(folder, 10)
    return folder


@pytest.fixture
def root(tmp_path: Path, made: Path) -> Path:
    """A copy of the run on a machine that has no images."""
    text = (made / "run/suite.lock.yaml").read_text()
    shutil.copytree(made / "run", tmp_path / "run")
    lock = tmp_path / "run/suite.lock.yaml"
    lock.write_text(text.replace(str(made / "a.npz"), "/nowhere/a.npz"))
    assert lock.read_text() != text
    return tmp_path / "run"


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *map(str, words)])
    shown = capsys.readouterr()
    return int(str(ended.value.code)), shown.out, shown.err


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_the_same_records_give_the_same_bytes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.report(root)  # digests.txt is of the changed lock
    before = contents(root)
    for name in ("metrics.csv", "index.html", "leaderboard.csv", "costs.csv", "metrics.parquet"):
        (root / name).write_bytes(b"")
    code, out, _ = command(capsys, root)
    assert code == 0
    assert contents(root) == before
    assert f"report  {root / 'index.html'}" in out and sha256(root / "digests.txt") in out


def test_another_alpha_is_what_a_run_with_it_gives(
    root: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(root)
    radii = "benches.certify.evaluator.radii=[0, 0.05, 0.2]"
    code, _, _ = command(capsys, root, "-o", tmp_path / "out", "--set", ALPHA, "--set", radii)
    assert code == 0
    assert contents(root) == before
    loaded = load(str(made / "small.yaml"), settings=(ALPHA, radii))
    runs.execute(loaded, runs.Options(tmp_path / "run of it"))
    for name in ("metrics.csv", "leaderboard.csv", "metrics.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "run of it" / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() != before[name]


def test_the_report_names_every_setting(root: Path, tmp_path: Path) -> None:
    runs.report(root, tmp_path / "out", [ALPHA])
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    said = f"{ALPHA} (the suite says 0.001)"
    assert manifest["report"]["settings"] == [said]
    assert manifest["report"]["of"] == sha256(root / "digests.txt")
    assert manifest["notices"][0] == f"computed again from the records with --set {said}"
    assert manifest["benches"][0]["evaluator"]["alpha"] == 0.05
    assert said in (tmp_path / "out/index.html").read_text()
    assert not (tmp_path / "out/suite.lock.yaml").exists()
    assert (tmp_path / "out/digests.txt").read_bytes() == runs.digests(tmp_path / "out")


def test_a_report_replaces_an_earlier_one_alone(root: Path, tmp_path: Path) -> None:
    runs.report(root, tmp_path / "out", [ALPHA])
    done = runs.report(root, tmp_path / "out", formats=["csv"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"manifest.json", "digests.txt", "wide.csv", *runs.FORMATS["csv"]}
    assert sha256(tmp_path / "out/digests.txt") == done.digest
    (tmp_path / "out/thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and holds no report"):
        runs.report(root, tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("benches.certify.evaluator.n=400", "--set changes benches.0.evaluator.n, on which records depend"),
        ("seed=3", "--set changes seed, on which records depend: it needs new forwards"),
        ("name=other", "--set changes name,"),
        ("benches.certify.datasets.a.limit=3", "--set changes benches.0.datasets.0.limit"),
        ("checkpoints.bayes.id=b", "--set changes the id of a checkpoint"),
        ("checkpoints.bayes.tilt=1", "--set changes checkpoints.0.tilt"),
        ("benches.certify.evaluator.alpha=0.5", "--set benches.certify.evaluator.alpha=0.5: benches.0.evaluator.alpha"),
        ("benches.certify.evaluator.alhpa=0.1", "did you mean alpha?"),
    ],
)
def test_what_needs_forwards_cannot_be_set(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    code, out, err = command(capsys, root, "-o", tmp_path / "out", "--set", setting)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_subset_of_the_checkpoints(root: Path, tmp_path: Path) -> None:
    done = runs.report(root, tmp_path / "out", ["benches.certify.checkpoints=[tilted]"], ["csv"])
    assert done.leaderboard["checkpoint"].tolist() == ["tilted"]


def test_bad_usage(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ((root, root), "a board of 2 runs is none of them; say where it goes with --output"),
        ((tmp_path / "none",), "there is no folder"),
        ((tmp_path,), "is no finished run folder: it has no manifest.json"),
        ((root, "--format", "tex"), "no format is called 'tex'"),
        ((root, "--format", "csv"), "say where it goes with --output"),
        ((root, "--set", ALPHA), "say where it goes with --output"),
        ((root, "-o", root / "more"), "lies in the run folder"),
        ((root, "-o", root), "lies in the run folder"),
    ):
        code, out, err = command(capsys, *words)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1, err


def test_records_of_an_earlier_run_do_not_count(root: Path, tmp_path: Path) -> None:
    (folder,) = (root / "records/certify/bayes/a").iterdir()
    shutil.copytree(folder, folder.with_name("0" * 16))
    for path in folder.with_name("0" * 16).glob("*.parquet"):
        path.write_bytes(b"")
    before = (root / "metrics.csv").read_bytes()
    runs.report(root, tmp_path / "out", formats=["csv"])
    assert (tmp_path / "out/metrics.csv").read_bytes() == before
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["keys"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="holds 2 versions of these records"):
        runs.report(root)
    shutil.rmtree(folder.with_name("0" * 16))
    runs.report(root, tmp_path / "out", formats=["csv"])  # the only folder there is
    assert (tmp_path / "out/metrics.csv").read_bytes() == before


def test_a_cell_without_records_has_no_figures(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "records/certify/bayes")
    done = runs.report(root, tmp_path / "out", formats=["csv"])
    assert done.leaderboard["checkpoint"].tolist() == ["tilted"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keys": {"certify": {"a": {"bayes": "../../../x"}}}}, "keys has what is no key"),
        ({"keys": [1]}, "keys has what is no key"),
        ({"datasets": []}, "does not list dataset a of bench certify"),
        ({"datasets": [{"bench": "certify", "name": "a", "n": -1}]}, "is damaged: n, n_available of dataset a"),
        ({"datasets": [{"bench": "certify", "name": "a", "n": 10**12, "n_available": 1}]}, "damaged: n of dataset a"),
    ],
)
def test_a_hostile_manifest(root: Path, change: dict[str, object], said: str) -> None:
    manifest = json.loads((root / "manifest.json").read_text()) | change
    (root / "manifest.json").write_text(json.dumps(manifest))
    before = contents(root)
    with pytest.raises(ValueError, match=said.replace("[", r"\[")) as caught:
        runs.report(root)
    assert "\n" not in str(caught.value)
    assert contents(root) == before


def test_figures_of_another_tool_have_no_records(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"imported": {}}')
    with pytest.raises(ValueError, match="holds figures of another tool: there are no records"):
        open_run(tmp_path)
