"""Small runs for tests of boards, and changes to them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from robustbench_diffaug import runs
from robustbench_diffaug.boards import board
from robustbench_diffaug.component import digest_of
from robustbench_diffaug.folder import put
from robustbench_diffaug.recorded import LOCK, open_run
from robustbench_diffaug.suite import load

Edit = Callable[[dict[str, Any], dict[str, Any]], None]

EXACT = {"kind": "mixture"}
KEYS = ["bench", "checkpoint", "group", "metric"]


def entry(id: str, tilt: int = 0) -> dict[str, Any]:
    return {"kind": "mixture", "id": id, "classes": 4, "temperature": 0.0016, "tilt": tilt}


def suite_of(name: str, *entries: dict[str, Any]) -> dict[str, Any]:
    clean = {"kind": "mixture", "name": "mixture", "group": "clean", "size": 12}
    return {
        "name": name,
        "checkpoints": list(entries),
        "benches": [
            {"name": "shift", "evaluator": {"kind": "shift"}, "datasets": [clean]},
            {
                "name": "certify",
                "evaluator": {
                    "kind": "smoothing",
                    "denoiser": EXACT,
                    "sigmas": [0.25],
                    "n0": 8,
                    "n": 40,
                    "alpha": 0.01,
                },
                "datasets": [clean | {"size": 8}],
            },
        ],
    }


def execute(folder: Path, name: str, suite: dict[str, Any]) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(suite, sort_keys=False))
    done = runs.execute(load(str(file)), runs.Options(folder / name))
    assert not done.failures
    return done.root


def made_runs(folder: Path) -> Path:
    """A folder with a run of one checkpoint, one of another, and one of both."""
    execute(folder, "alice", suite_of("one", entry("bayes")))
    execute(folder, "bob", suite_of("two", entry("tilted", 120)))
    execute(folder, "both", suite_of("both", entry("bayes"), entry("tilted", 120)))
    return folder


def changed(root: Path, edit: Edit) -> Path:
    """A run of which the lock and the manifest say otherwise, its digests made anew."""
    lock, manifest = yaml.safe_load((root / LOCK).read_text()), json.loads((root / "manifest.json").read_text())
    edit(lock, manifest)
    manifest["suite"]["digest"] = digest_of(lock, 16)
    put(root, {LOCK: yaml.safe_dump(lock, sort_keys=False).encode(), "manifest.json": json.dumps(manifest).encode()})
    return root


def refreshed(root: Path) -> None:
    """The tables of a run anew, after its records or settings were changed; not its page."""
    run = open_run(root)
    put(root, runs.results(run.bare, run.archive, run.manifest, (), drawn=False).files)


def metrics_of(root: Path) -> pd.DataFrame:
    return pd.read_parquet(root / "metrics.parquet").set_index(KEYS).sort_index()


def said_of(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "board.json").read_text())
    return found


def refused(*folders: Path, match: str, separate: bool = False) -> str:
    """The one line with which a board is refused; nothing was written."""
    output = folders[0].parent / "out"
    with pytest.raises(ValueError, match=match) as caught:
        board.report(folders, output, separate, formats=["csv"])
    assert not output.exists() and "\n" not in str(caught.value)
    return str(caught.value)
