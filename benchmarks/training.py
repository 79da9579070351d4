"""Seconds of a DiffAug step beside those of its parts: a plain step on the doubled batch, and a denoiser forward.

python benchmarks/training.py
"""

import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from robustbench_diffaug.batch import Limits
from robustbench_diffaug.engine import settle
from robustbench_diffaug.files import built_in
from robustbench_diffaug.train import output
from robustbench_diffaug.train.diffaug import shaped
from robustbench_diffaug.train.loop import train

STEPS = 12


class Clock:
    """The steps of a recipe, one at a time."""

    def __init__(self, name: str, *settings: str) -> None:
        recipe = output.load(built_in("recipes")[name], settings=("save_every=1000000", *settings))
        self.folder = tempfile.TemporaryDirectory()
        self.steps = train(recipe, Path(self.folder.name, "state.pt"))
        next(self.steps)  # networks are loaded, kernels chosen
        self.seconds: list[float] = []

    def tick(self) -> None:
        """Times one step."""
        started = time.perf_counter()
        next(self.steps)
        self.seconds.append(time.perf_counter() - started)


def main() -> None:
    settle("cpu")
    for net in ("resnet-standard", "vit-standard"):
        both, doubled = Clock(f"{net}+diffaug"), Clock(net, "batch=128")
        recipe = output.load(built_in("recipes")[f"{net}+diffaug"])
        denoise = shaped(recipe.diffaug.denoiser, 64).loaded(Limits())
        images = torch.full((64, 1, 32, 32), 0.5)
        forwards = []
        for _ in range(STEPS):  # in turns, so that whatever else the machine does falls on all alike
            both.tick()
            doubled.tick()
            started = time.perf_counter()
            with torch.no_grad():
                denoise(images, 0.5)
            forwards.append(time.perf_counter() - started)
        step, plain, forward = (sorted(times)[len(times) // 2] for times in (both.seconds, doubled.seconds, forwards))
        print(
            f"{net}: DiffAug step {step:.4f} s; plain step on the doubled batch {plain:.4f} s, denoiser {forward:.4f} s"
        )
        print(f"  ratio {step / (plain + forward):.3f} (medians of {STEPS})")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "diffusers"))
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {platform.machine()}, {versions}")


if __name__ == "__main__":
    main()
