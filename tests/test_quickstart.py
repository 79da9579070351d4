"""The main job as a new user runs it, `rdiff run quickstart`, and its figures; on fewer images without --full."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import pytest

Figures: TypeAlias = dict[tuple[str, str, str], dict[Any, Any]]
FEW = ("--limit", "64", "--set", "benches.certify.datasets.0.limit=12")
PAIRS = [("resnet-standard", "resnet-standard+diffaug"), ("vit-standard", "vit-standard+diffaug")]


def rdiff(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "robustbench_diffaug", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        # No proxy, no hub: whatever would reach out fails at once.
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "https_proxy": "http://127.0.0.1:9",
            "http_proxy": "http://127.0.0.1:9",
        },
    )


@pytest.fixture(scope="module")
def command(full: bool) -> tuple[str, ...]:
    return ("run", "quickstart", *(() if full else FEW))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, command: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("home")
    done = rdiff(*command, folder=folder)
    assert done.returncode == 0, done.stderr
    yield folder, done.stdout


@pytest.fixture(scope="module")
def figures(finished: tuple[Path, str]) -> Figures:
    frame = pd.read_csv(finished[0] / "reports/quickstart/metrics.csv")
    return {(row["checkpoint"], row["metric"], row["group"]): row for row in frame.to_dict("records")}


@pytest.mark.timeout(1500)
@pytest.mark.xdist_group("quickstart")
class TestQuickstart:
    def test_ends_with_the_page_and_the_digest(self, finished: tuple[Path, str]) -> None:
        root = finished[0] / "reports/quickstart"
        *_, page, digest = finished[1].splitlines()
        assert page.split() == ["report", "reports/quickstart/index.html"]
        assert digest.split() == ["digest", hashlib.sha256((root / "digests.txt").read_bytes()).hexdigest()]
        check = subprocess.run(["sha256sum", "--quiet", "-c", "digests.txt"], cwd=root, capture_output=True, text=True)
        assert check.returncode == 0, check.stdout

    def test_diffaug_beats_its_plain_twin(self, figures: Figures) -> None:
        for plain, diffaug in PAIRS:
            worse = figures[(plain, "accuracy/mean", "corruptions")]
            better = figures[(diffaug, "accuracy/mean", "corruptions")]
            assert better["low"] > worse["high"], (plain, worse, better)

    def test_the_ensemble_beats_the_plain_network_on_noise(self, figures: Figures) -> None:
        for _, diffaug in PAIRS:
            assert figures[(diffaug, "de/gain/mean-noise", "noise")]["low"] > 0

    def test_a_second_run_computes_nothing(self, finished: tuple[Path, str], command: tuple[str, ...]) -> None:
        root = finished[0] / "reports/quickstart"
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}
        started = time.monotonic()
        done = rdiff(*command, folder=finished[0])
        assert done.returncode == 0
        assert "nothing was left to do" in done.stderr
        assert time.monotonic() - started < 60  # 10 s on a free machine; the claim is measured elsewhere
        after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}
        assert after == before
        assert done.stdout == finished[1]
