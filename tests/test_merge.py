"""Shards, merged, are one run, and what is not the same run's is refused before anything is written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from robustbench_diffaug import folder as folders
from robustbench_diffaug import merge as merging
from robustbench_diffaug import runs
from robustbench_diffaug.files import sha256
from robustbench_diffaug.merge import merge
from robustbench_diffaug.report import page
from robustbench_diffaug.shards import Shard
from robustbench_diffaug.suite import load

SUITE = """
name: tiny
checkpoints: [{kind: mixture, id: a, classes: 4}, {kind: mixture, id: b, classes: 4, tilt: 120}]
benches:
  - name: certify
    evaluator: {kind: smoothing, denoiser: {kind: mixture}, sigmas: [0.25], n0: 16, n: 2000}
    datasets: [{kind: mixture, name: m, size: 14}]
"""
FIGURES = ("metrics.csv", "metrics.parquet", "leaderboard.csv")


def run(folder: Path, root: Path, shard: Shard | None = None) -> runs.Finished:
    options = runs.Options(root, shard=shard) if shard else runs.Options(root)
    return runs.execute(load(str(folder / "s.yaml")), options)


def contents(root: Path) -> dict[str, bytes]:
    """Records and figures: what must be equal, however it came to be."""
    paths = [path for path in root.rglob("*") if path.suffix == ".parquet" or path.name in FIGURES]
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    return {name: content for name, content in found.items() if not name.startswith(".")}


def tree(root: Path) -> dict[str, bytes]:
    """All that can be seen in a folder."""
    paths = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and three shards of it."""
    folder = tmp_path_factory.mktemp("merge")
    (folder / "s.yaml").write_text(SUITE)
    assert not run(folder, folder / "whole").partial
    for index in (1, 2, 3):
        done = run(folder, folder / f"part{index}", Shard(index, 3))
        assert done.computed
        assert done.partial.startswith("2 cells lack samples, first certify / a / m; here is shard")
        assert not (folder / f"part{index}/leaderboard.csv").exists()
    return folder


@pytest.fixture
def unpaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page takes the longest to make, and is another one's to test."""
    monkeypatch.setattr(page, "render", lambda *given: "")


@pytest.fixture
def parts(made: Path, tmp_path: Path) -> list[Path]:
    """Copies of the shards, to do harm to."""
    return [shutil.copytree(made / f"part{index}", tmp_path / f"part{index}") for index in (1, 2, 3)]


def test_merged_shards_are_one_run_in_any_order_and_any_number_of_times(made: Path, tmp_path: Path) -> None:
    parts = [made / f"part{index}" for index in (1, 2, 3)]
    done = merge(parts, tmp_path / "a")
    assert not done.partial
    assert contents(tmp_path / "a") == contents(made / "whole")
    again = merge(parts[::-1], tmp_path / "b")
    assert again.digest == done.digest == merge([tmp_path / "a", parts[1]], tmp_path / "a").digest
    manifest = json.loads((tmp_path / "a/manifest.json").read_bytes())
    assert sorted(entry["shard"] for entry in manifest["runs"]) == ["1/3", "2/3", "3/3"]
    assert manifest["notices"] == json.loads((made / "whole/manifest.json").read_bytes())["notices"]
    assert run(made, tmp_path / "a").computed == 0


@pytest.mark.usefixtures("unpaged")
def test_a_merge_that_lacks_a_shard_makes_no_leaderboard_until_it_comes(made: Path, tmp_path: Path) -> None:
    assert merge([made / "part1", made / "part3"], tmp_path / "a").partial
    assert not (tmp_path / "a/leaderboard.csv").exists()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert not merge([made / "part2"], tmp_path / "a").partial
    assert contents(tmp_path / "a") == contents(made / "whole")
    done = run(made, tmp_path / "b")  # a run makes what no shard has brought
    assert done.computed == 1
    assert contents(tmp_path / "b") == contents(made / "whole")
    entries = json.loads((tmp_path / "b/manifest.json").read_bytes())["runs"]
    assert {entry.get("shard") for entry in entries} == {"1/3", "3/3", None}  # their order is that of their seconds


class Stopped(Exception):
    pass


@pytest.mark.usefixtures("unpaged")
@pytest.mark.parametrize("into", ["a new folder", "one of them"])
def test_a_merge_that_is_stopped_anywhere_can_be_started_again(
    into: str, made: Path, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped after each file that it writes, in turn."""
    output = tmp_path / "a" if into == "a new folder" else parts[0]
    left = [0]

    def counted(write: Callable[..., object]) -> Callable[..., object]:
        def instead(*given: object) -> object:
            if left[0] == 0:
                raise Stopped
            left[0] -= 1
            return write(*given)

        return instead

    monkeypatch.setattr(merging, "_put", counted(merging._put))
    monkeypatch.setattr(folders, "_write_digests", counted(folders._write_digests))
    stops = 0
    while True:
        left[0] = stops
        try:
            done = merge(parts, output)
            break
        except Stopped:
            stops += 1
            assert not (output / "digests.txt").exists()
    assert stops > 5
    assert not done.partial
    assert contents(output) == contents(made / "whole")
    assert not (output / merging.JOURNAL).exists()
    left[0] = 1000
    fresh = merge([made / f"part{index}" for index in (1, 2, 3)], tmp_path / "fresh")
    assert done.digest == fresh.digest


def test_a_merge_that_is_killed_can_be_started_again(made: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from robustbench_diffaug import merge\n"
        "put, left = merge._put, [5]\n"
        "def dying(path, content):\n"
        "    left[0] -= 1\n"
        "    put(path, content) if left[0] else os.kill(os.getpid(), signal.SIGKILL)\n"
        "merge._put = dying\n"
        "merge.merge([*map(Path, sys.argv[1:])], Path('a'))\n"
    )
    parts = [str(made / f"part{index}") for index in (1, 2, 3)]
    assert subprocess.run([sys.executable, "-c", code, *parts], cwd=tmp_path, check=False).returncode == -9
    assert 0 < len(list((tmp_path / "a").rglob("*.parquet"))) < len(list((made / "whole/records").rglob("*.parquet")))
    assert not merge([*map(Path, parts)], tmp_path / "a").partial
    assert contents(tmp_path / "a") == contents(made / "whole")


def refused(runs: list[Path], output: Path, message: str) -> None:
    """A merge fails with this message, in one line, and writes nothing."""
    before = tree(output) if output.exists() else None
    with pytest.raises(ValueError, match=message) as caught:
        merge(runs, output)
    assert "\n" not in str(caught.value)
    assert (tree(output) if output.exists() else None) == before


def relisted(root: Path) -> None:
    """Makes the digests new, as a forger would."""
    (root / "digests.txt").write_bytes(runs.digests(root))


def test_damaged_folders_are_refused(parts: list[Path], tmp_path: Path) -> None:
    output, (record, *_) = tmp_path / "a", sorted(parts[1].rglob("*.parquet"))
    content, digests = record.read_bytes(), (parts[1] / "digests.txt").read_bytes()
    (parts[1] / "digests.txt").unlink()
    refused(parts, output, "part2 is damaged: digests.txt is not there")
    (parts[1] / "digests.txt").write_bytes(digests)
    record.write_bytes(content[:-1] + b"x")
    refused(parts, output, f"part2 is damaged: records.*{record.name} was changed")
    record.write_bytes(content[:100])
    relisted(parts[1])
    refused(parts, output, f"{record.name} is damaged")
    record.unlink()
    (parts[1] / "digests.txt").write_bytes(digests)
    refused(parts, output, f"{record.name} is listed and not there")
    record.symlink_to(sorted(parts[0].rglob("*.parquet"))[0])
    refused(parts, output, f"{record.name} is a link")
    record.unlink()
    record.with_name("0000100-0000103.parquet").write_bytes(content)
    relisted(parts[1])
    refused(parts, output, "its dataset has 14 samples, its name says 100 to 103")
    refused([tmp_path / "none"], output, "there is no folder")
    (tmp_path / "empty").mkdir()
    refused([tmp_path / "empty"], output, "no finished run folder")


@pytest.mark.usefixtures("unpaged")
def test_damaged_manifests_are_refused(parts: list[Path], tmp_path: Path) -> None:
    path = parts[1] / "manifest.json"
    sound = json.loads(path.read_bytes())

    def with_changes(**changes: object) -> None:
        path.write_text(json.dumps(sound | changes))
        relisted(parts[1])

    with_changes(keys=None)
    refused(parts, tmp_path / "a", "part2 was made by an earlier rdiff")
    with_changes(keys={"certify": {"m": {"a": "../../.."}}})
    refused(parts, tmp_path / "a", "keys has what is no key of a cell")
    key = dict.fromkeys("ab", "0" * 16)
    with_changes(keys={"certify": {"m": key}})
    refused(parts, tmp_path / "a", "have records of different things: keys differs")
    for seconds in ("many", float("nan"), None, [1]):
        with_changes(runs=[{"shard": "2/3", "seconds": seconds}])
        refused(parts, tmp_path / "a", r"a manifest\.json is damaged: the seconds of a run are")
    with_changes(failures=[{"bench": "certify", "checkpoint": "a", "dataset": "m"}, 3], notices=3, runs=[3])
    assert not merge(parts, tmp_path / "a").failures  # of a cell that lacks nothing


@pytest.mark.usefixtures("unpaged")
def test_other_suites_and_seeds_are_refused(made: Path, parts: list[Path], tmp_path: Path) -> None:
    for change, message in (
        (("seed", 5), "seed is 5 in .*other and 0 in .*part1: these are runs of different suites"),
        (("name", "tall"), "name is 'tall' in .*other and 'tiny' in .*part1"),
    ):
        data = yaml.safe_load(SUITE) | dict([change])
        data["benches"][0]["datasets"][0]["size"] = 2
        data["benches"][0]["evaluator"]["n"] = 40
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(data))
        run(tmp_path, tmp_path / "other", Shard(1, 1))
        swapped = "(" + message + "|.* in .*part1 and .* in .*other: these are runs of different suites)"
        refused([parts[0], tmp_path / "other"], tmp_path / "a", swapped)
        refused([parts[0]], tmp_path / "other", "runs of different suites")
        shutil.rmtree(tmp_path / "other")


@pytest.mark.usefixtures("unpaged")
def test_records_of_the_same_samples_that_differ_are_refused(made: Path, parts: list[Path], tmp_path: Path) -> None:
    record, other = (next(path for path in sorted(part.rglob("*.parquet")) if "/a/" in str(path)) for part in parts[:2])
    double = parts[1] / record.relative_to(parts[0])
    double.write_bytes(other.read_bytes())
    relisted(parts[1])
    refused(parts, tmp_path / "a", f"{record.name} are records of the same samples and differ")
    double.unlink()
    relisted(parts[1])
    assert not merge(parts, tmp_path / "a").partial
    shutil.copy(other, double.with_name("0000001-0000004.parquet"))
    relisted(parts[1])
    refused(parts, tmp_path / "b", "hold the same samples")


@pytest.mark.usefixtures("unpaged")
def test_the_result_is_no_place_for_other_things(made: Path, parts: list[Path], tmp_path: Path) -> None:
    refused(parts, parts[0] / "inside", "lie in each other")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").touch()
    refused(parts, tmp_path / "b", "no run folder and not empty")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="no run folder"):
        merge(parts, tmp_path / "file")
    merge(parts[:1], tmp_path / "a")
    (tmp_path / "a/index.html").symlink_to(tmp_path / "file")
    refused(parts[1:], tmp_path / "a", "index.html is a link")
    (tmp_path / "a/index.html").unlink()
    (tmp_path / "a/digests.txt").unlink()
    (record, *_) = (path for path in parts[0].rglob("*.parquet"))
    refused(parts[1:], tmp_path / "a", "in no digests.txt; name its run too")
    assert record.is_file()
    assert not merge(parts, tmp_path / "a").partial  # which names it
    assert contents(tmp_path / "a") == contents(made / "whole")


def test_nothing_is_written_into_what_another_command_is_writing(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agree = merging._agree

    def meanwhile(files: dict[str, merging._File], output: Path) -> None:
        agree(files, output)
        shutil.copytree(parts[2], output)

    monkeypatch.setattr(merging, "_agree", meanwhile)
    with pytest.raises(ValueError, match="written by another command meanwhile; run rdiff merge again"):
        merge(parts[:2], tmp_path / "a")
    assert tree(tmp_path / "a") == tree(parts[2])


def test_the_command(made: Path, parts: list[Path], rdiff: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = rdiff("merge", str(parts[0]), str(parts[1]), "-o", "a")
    assert (code, err) == (0, "")
    assert "2 cells lack samples" in out
    code, out, err = rdiff("merge", str(parts[2]), "-o", "a")
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == [f"report  {Path('a/index.html')}", f"digest  {sha256(Path('a/digests.txt'))}"]
    assert contents(Path("a")) == contents(made / "whole")
    code, out, err = rdiff("merge", str(parts[2]), "-o", os.devnull)
    assert (code, out, err.count("\n")) == (2, "", 1)
