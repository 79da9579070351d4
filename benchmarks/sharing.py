"""Seconds of the same certificates for 1, 2 and 4 classifiers that share denoised images, and for one at a time.

python benchmarks/sharing.py
"""

import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from robustbench_diffaug.engine import run, settle
from robustbench_diffaug.runs import Options, tasks_of
from robustbench_diffaug.suite import Loaded, load

SETTINGS = ["benches.certify.evaluator.n=224", "benches.certify.datasets.0.limit=8"]


def seconds(loaded: Loaded, ids: list[str]) -> float:
    """The wall time of the certificates of some classifiers in one run."""
    chosen = tuple(entry for entry in loaded.suite.checkpoints if entry.id in ids)
    bench = next(bench for bench in loaded.suite.benches if bench.name == "certify")
    suite = loaded.suite.model_copy(update={"checkpoints": chosen, "benches": (bench,)})
    with tempfile.TemporaryDirectory() as folder:
        tasks = tasks_of(Loaded(suite, loaded.places), Options(Path(folder)))
        started = time.perf_counter()
        for task in tasks:
            assert not run(task).failures
        return time.perf_counter() - started


def main() -> None:
    settle("cpu")
    loaded = load("quickstart", settings=SETTINGS)
    ids = [entry.id for entry in loaded.suite.checkpoints]
    seconds(loaded, ids)  # networks are loaded, kernels chosen
    alone = {id: min(seconds(loaded, [id]) for _ in range(3)) for id in ids}
    print(f"{'classifiers':<14}{'shared (s)':>12}{'one at a time (s)':>20}{'ratio':>8}")
    for count in (1, 2, 4):
        chosen = ids[:count]
        together = min(seconds(loaded, chosen) for _ in range(3))
        apart = sum(alone[id] for id in chosen)
        print(f"{count:<14}{together:>12.2f}{apart:>20.2f}{apart / together:>8.2f}")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "diffusers"))
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {platform.machine()}, {versions}")


if __name__ == "__main__":
    main()
