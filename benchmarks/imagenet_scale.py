"""A DiffAug ensemble at ImageNet's scale: 224 pixels, 1,000 classes, random weights of ResNet-50, ViT-B/16 and ADM-256.

python benchmarks/imagenet_scale.py [images] [device]
"""

import gzip
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

KEYS = Path(__file__).parents[1] / "tests/diffusion/golden/adm-keys.json.gz"  # of the original networks
WNIDS = ("n01440764", "n01443537")
SUITE = """
name: imagenet-scale
checkpoints:
  - {{kind: timm, id: resnet50, arch: resnet50, classes: 1000, microbatch: 1, weights: {{uri: resnet50.safetensors}}}}
  - {{kind: timm, id: vit-b16, arch: vit_base_patch16_224, classes: 1000, microbatch: 1,
      weights: {{uri: vit_base_patch16_224.safetensors}}}}
benches:
  - name: de
    evaluator:
      kind: shift
      modes: [default, de]
      times: [0, 50, 100]
      denoiser: {{kind: adm, architecture: imagenet-256, microbatch: {microbatch}, weights: {{uri: adm.pt}}}}
    datasets: [{{kind: folder, name: made-up, root: images, resize: 256, crop: 224}}]
"""


def make(folder: Path, images: int) -> None:
    """Images of photographs' sizes in folders of two classes, and weights that keep activations near one."""
    torch.manual_seed(0)
    for index in range(images):
        place = folder / "images" / WNIDS[index % 2] / f"{index}.JPEG"
        place.parent.mkdir(parents=True, exist_ok=True)
        coarse = torch.rand(1, 3, 25, 30)
        fine = torch.nn.functional.interpolate(coarse, size=(375, 500), mode="bicubic").clamp(0, 1)[0]
        Image.fromarray((255 * fine).byte().permute(1, 2, 0).numpy()).save(place, quality=90)
    for arch in ("resnet50", "vit_base_patch16_224"):
        save_file(timm.create_model(arch, num_classes=1000).state_dict(), folder / f"{arch}.safetensors")
    shapes = json.loads(gzip.decompress(KEYS.read_bytes()))["imagenet-256"]
    state = {}
    for key, shape in shapes.items():
        drawn = torch.randn(shape)
        level = 1.0 if key.endswith(".weight") else 0.0
        state[key] = drawn / float(np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else level + 0.1 * drawn
    torch.save(state, folder / "adm.pt")


def main() -> None:
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, images)
        suite = folder / "suite.yaml"
        suite.write_text(SUITE.format(microbatch=1 if device == "cpu" else images))
        started = time.perf_counter()
        command = [sys.executable, "-m", "robustbench_diffaug", "run", str(suite), "-o", str(folder / "run")]
        subprocess.run([*command, "--device", device], check=True)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        held = sum(path.stat().st_size for path in (*folder.glob("*.safetensors"), *folder.glob("*.pt"))) / 2**30
        print((folder / "run/costs.csv").read_text())
    print(f"{images} images, 2 denoiser forwards each: {seconds:.0f} s in all, {peak:.2f} GiB at most")
    print(f"the weights on disk are {held:.2f} GiB")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "diffusers"))
    print(f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {platform.machine()}, {versions}")


if __name__ == "__main__":
    main()
