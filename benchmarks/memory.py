"""Peak memory of evaluating 50,000 images over that of the loaded networks: mapped arrays and a streamed folder.

python benchmarks/memory.py [--images 50000]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save_file

from robustbench_diffaug.checkpoints.timm_model import build

CHILD = """
import json, resource, sys
from pathlib import Path
import torch
from robustbench_diffaug import runs
from robustbench_diffaug.suite import load

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(1)
loaded, options = load(sys.argv[1]), runs.Options(Path(sys.argv[2]))
(bench,) = loaded.suite.benches
for checkpoint in loaded.suite.checkpoints:
    model = checkpoint.loaded(options.limits)
    model.logits(torch.zeros(model.microbatch, 3, 32, 32))
networks = peak()
last = []
def progress(outcome):
    assert not outcome.failures, outcome.failures
    last[:] = [peak()]
done = runs.execute(loaded, options, progress=progress)
assert not done.failures, done.failures
print(json.dumps([networks, last[0], peak(), int(done.metrics["n"].max())]))
"""


def suite(folder: Path, name: str, dataset: dict[str, object]) -> Path:
    """A shift bench with two small networks of random weights on one dataset."""
    weights = folder / "weights.safetensors"
    save_file(build("resnet10t", (("channels", (8, 8, 8, 8)),), 3, 10).state_dict(), weights)
    entry = {"kind": "timm", "arch": "resnet10t", "args": {"channels": [8, 8, 8, 8]}, "classes": 10}
    entry |= {"weights": {"uri": str(weights)}}
    path = folder / f"{name}.yaml"
    data = {
        "name": name,
        "checkpoints": [entry | {"id": f"n{number}"} for number in range(2)],
        "benches": [{"name": "shift", "evaluator": {"kind": "shift"}, "datasets": [{"name": name, **dataset}]}],
    }
    path.write_text(json.dumps(data))
    return path


def arrays(folder: Path, count: int) -> dict[str, object]:
    """One npy file of random pixels, written a part at a time, and one of labels."""
    rng = np.random.default_rng(0)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (count, 32, 32, 3))
    for start in range(0, count, 1000):
        images[start : start + 1000] = rng.integers(0, 256, images[start : start + 1000].shape, np.uint8)
    images.flush()
    np.save(folder / "labels.npy", rng.integers(0, 10, count))
    return {"kind": "arrays", "images": str(folder / "images.npy"), "labels": str(folder / "labels.npy")}


def folders(folder: Path, count: int) -> dict[str, object]:
    """JPEG files in ten folders: 2,000 of 160x120 pixels, each under many names, cropped to 32x32."""
    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / "jpeg" / f"{number % 10:02d}"
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{number:06d}.jpg"
        if number < 2000:
            Image.fromarray(rng.integers(0, 256, (120, 160, 3), np.uint8)).save(path, quality=80)
        else:
            os.link(folder / "jpeg" / f"{number % 10:02d}" / f"{number % 2000:06d}.jpg", path)
    return {"kind": "folder", "root": str(folder / "jpeg"), "resize": 36, "crop": 32}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=50_000)
    count = parser.parse_args().images
    print(
        "peak memory in MB: with networks loaded, and over that when all images are evaluated and when it is reported"
    )
    print(f"{'source':<10}{'images':>8}{'networks':>10}{'evaluated':>11}{'reported':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        for name, make in (("arrays", arrays), ("folder", folders)):
            folder = Path(temporary, name)
            folder.mkdir()
            path = suite(folder, name, make(folder, count))
            words = [sys.executable, "-c", CHILD, str(path), str(folder / "run")]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            networks, evaluated, reported, n = json.loads(done.stdout.splitlines()[-1])
            assert n == count
            print(f"{name:<10}{n:>8}{networks:>10.0f}{evaluated - networks:>11.0f}{reported - networks:>10.0f}")
    print(
        f"{platform.machine()}, Python {platform.python_version()}; a mapped file's pages count while they are cached"
    )


if __name__ == "__main__":
    main()
