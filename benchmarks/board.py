"""A board of many checkpoints and records: what it takes to make the report from the records.

    python benchmarks/board.py [--checkpoints 50] [--samples 10000000] [--runs 1] [--keep FOLDER]

The records are made up: a shift bench, plain and with an ensemble of two times, of the fifteen common corruptions at
five severities and of clean images, in the layout that `rdiff run` leaves. Then `rdiff report` makes metrics,
leaderboard, tests in pairs and page in a process of its own. Processor time is what counts on a machine that does other
things too; with `--runs` the checkpoints are in so many folders, which one board joins.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from robustbench_diffaug import runs, summary
from robustbench_diffaug.data.corruptions import COMMON
from robustbench_diffaug.engine import cells
from robustbench_diffaug.folder import put
from robustbench_diffaug.recorded import LOCK, keys_of
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import Suite

SEVERITIES = (1, 2, 3, 4, 5)
VERSIONS = 1 + len(COMMON) * len(SEVERITIES)
TIMES = (0, 100)


def suite(name: str, ids: list[str], images: int) -> Suite:
    """Checkpoints times one bench."""
    exact = {"kind": "mixture"}
    clean = {"kind": "mixture", "name": "clean", "group": "clean", "size": images}
    grid = {"kind": "corruptions", "base": clean, "constants": "imagenet-c", "severities": list(SEVERITIES)}
    shift = {"kind": "shift", "modes": ["default", "de"], "denoiser": exact, "times": list(TIMES)}
    datasets = [clean, grid | {"corruptions": list(COMMON)}]
    return Suite.model_validate({
        "name": name,
        "checkpoints": [{"kind": "mixture", "id": id, "classes": 10, "tilt": index} for index, id in enumerate(ids)],
        "benches": [{"name": "shift", "evaluator": shift, "datasets": datasets}],
    })  # fmt: skip


def records(declared: object, right: float, images: int, draws: np.random.Generator) -> pa.Table:
    """The rows of one cell."""
    label = np.arange(images) % 10
    columns: dict[str, pa.Array] = {
        name: pa.array([str(getattr(declared, name))] * images) for name in ("name", "origin", "group")
    }
    columns = {"dataset": columns["name"], "origin": columns["origin"], "group": columns["group"]}
    columns |= {
        "severity": pa.array(np.full(images, getattr(declared, "severity")), pa.int8()),  # noqa: B009
        "sample": pa.array([f"{row:05d}" for row in range(images)]),
        "label": pa.array(label, pa.int32()),
        "image": pa.array([f"{word:016x}" for word in draws.integers(1 << 62, size=images)]),
    }
    fields = [pa.field(name, array.type) for name, array in columns.items()]

    def add(name: str, values: np.ndarray) -> None:
        flat = pa.array(values.reshape(-1))
        columns[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        shape = {"shape": str(values.shape[1])} if values.ndim == 2 else None
        fields.append(pa.field(name, columns[name].type, metadata=shape))

    for front, shape in (("", ()), ("t_", (len(TIMES),)), ("de_", (len(TIMES),))):
        hits = draws.random((images, *shape)) < right
        wrong = (label.reshape(-1, *(1 for _ in shape)) + 1) % 10
        add(f"{front}pred", np.where(hits, wrong - 1 + 10 * (wrong == 0), wrong).astype(np.int32))
        add(f"{front}confidence", 0.1 + 0.9 * draws.random((images, *shape)))
        add(f"{front}entropy", draws.random((images, *shape)))
    for front in ("", "de_"):
        add(f"{front}nll", draws.exponential(size=images))
        add(f"{front}brier", draws.random(images))
        add(f"{front}other_pred", label.astype(np.int32))
    return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields))


def made_up(root: Path, ids: list[str], images: int) -> None:
    """A run folder without a report, as a run leaves it that `rdiff report` is to finish."""
    found, store = suite(root.name, ids, images), Store(root)
    for dataset, row in cells(found, found.benches[0]):
        declared = dataset.declared()
        for place, cell in enumerate(row):
            draws = np.random.default_rng([place, *dataset.name.encode()])
            right = 0.97 - 0.1 * declared.severity + 0.002 * place
            cost = {"samples": images, "seconds": 1.0, "device": "cpu", "torch": version("torch")}
            store.write(cell, range(images), records(declared, right, images, draws), cost)
    about = {"device": "cpu", "hardware": "made up", "started": "", "finished": "", "seconds": 0.0}
    manifest = summary.manifest(found, store, [], [], about) | {"keys": keys_of(found)}
    text = json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n"
    put(root, {LOCK: runs.lock(found), "manifest.json": text})


def main() -> None:
    """Prints what a report takes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=int, default=50)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="where the folders are made, or were")
    chosen = parser.parse_args()
    images = chosen.samples // (chosen.checkpoints * VERSIONS)
    base = chosen.keep or Path(tempfile.mkdtemp())
    roots = [base / f"run-{number}" for number in range(chosen.runs)]
    ids = [f"resnet50-recipe-{number:02d}" for number in range(chosen.checkpoints)]
    for number, root in enumerate(roots):
        if not root.exists():
            made_up(root, ids[number :: chosen.runs], images)
    began = time.perf_counter()
    words = ["report", *map(str, roots), "-o", str(base / "board")]
    subprocess.run([sys.executable, "-m", "robustbench_diffaug", *words], check=True, stdout=subprocess.DEVNULL)
    wall, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = (base / "board" / "metrics.csv").read_bytes().count(b"\n") - 1
    page = (base / "board" / "index.html").stat().st_size
    print(f"{platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}, numpy {version('numpy')}")
    print(f"{chosen.checkpoints} checkpoints of {chosen.runs} runs, {images * VERSIONS * chosen.checkpoints:,} records")
    print(f"{figures:,} figures, {figures / chosen.checkpoints:.0f} a checkpoint; page of {page / 1e6:.2f} MB")
    print(f"{wall:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of the processor, {used.ru_maxrss / 1e6:.2f} GB")
    if not chosen.keep:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
