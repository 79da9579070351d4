"""Times our corruptions against imagecorruptions-imaug: severity 5, one thread, processor time per image.

Frost's textures are held in memory on both sides: imagecorruptions reads them from disk for each image, which is taken
out by giving it the decoded files. Ours are the same official files.

    python benchmarks/corruptions.py

References:
    Common Corruptions Python library, https://github.com/bethgelab/imagecorruptions (here the imaug fork of it)
"""

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import platform
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import process_time

import cv2
import numpy as np
import torch
from PIL import Image
from skimage.data import astronaut

from robustbench_diffaug.data.corruptions import COMMON, NAMES, corrupt
from robustbench_diffaug.rng import key

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import imagecorruptions

SECONDS = 0.5
BATCHES = {32: 64, 224: 8}


def milliseconds(call: Callable[[], object], images: int) -> float:
    """The median time of calls over half a second, three at least, per image; the first call only warms up."""
    call()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 3:
        start = process_time()
        call()
        times.append(process_time() - start)
    return 1000 * median(times) / images


def main() -> None:
    """Prints the table, one row per corruption, and the machine."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    textures = Path(imagecorruptions.__file__).parent / "frost"
    read = {path.name: cv2.imread(str(path)) for path in textures.iterdir()}
    cv2.imread = lambda path: read[Path(path).name]  # type: ignore[assignment]  # frost is given its textures from memory
    photograph = Image.fromarray(astronaut())  # type: ignore[no-untyped-call]  # scikit-image has no types
    sums = np.zeros(2 * len(BATCHES))
    heads = (f"{f'ours {side}':>12}{f'imaug {side}':>12}{'ratio':>8}" for side in BATCHES)
    print(f"{'ms per image':20}" + "".join(heads))
    for name in NAMES:
        row: list[float] = []
        for side, batch in BATCHES.items():
            picture = np.array(photograph.resize((side, side), Image.Resampling.BICUBIC))
            images = torch.from_numpy(picture).permute(2, 0, 1).div(255).repeat(batch, 1, 1, 1)
            keys = [key("benchmark", index) for index in range(batch)]
            row.append(milliseconds(partial(corrupt, images, name, 5, "imagenet-c", keys, textures), batch))
            row.append(milliseconds(partial(imagecorruptions.corrupt, picture, 5, name), 1))
        print(line(name, row))
        sums += row if name in COMMON else 0
        if name == COMMON[-1]:
            print(line("sum of the 15", sums.tolist()))
    packages = ("numpy", "scipy", "torch", "pillow", "imagecorruptions-imaug")
    load = f"load {os.getloadavg()[0]:.1f}"
    print(
        f"one thread of {os.cpu_count()} cores, {load}, {platform.machine()}, Python {platform.python_version()}, ",
        end="",
    )
    print(f"OpenCV {cv2.__version__}, " + ", ".join(f"{package} {version(package)}" for package in packages))


def line(name: str, row: list[float]) -> str:
    """One row of the table: ours, theirs and how many times faster ours is, per size."""
    pairs = zip(row[::2], row[1::2], strict=True)
    cells = (f"{ours:12.3f}{theirs:12.3f}{theirs / ours:8.1f}" for ours, theirs in pairs)
    return f"{name:20}" + "".join(cells)


if __name__ == "__main__":
    main()
