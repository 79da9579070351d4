"""Memory of a matrix-free singular value decomposition of an ADM's Jacobian at 224 pixels, over the network's own.

python benchmarks/jacobian.py [--network imagenet-64] [--width 128] [--vectors 16] [--size 224]
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
import torch
from torch.profiler import ProfilerActivity, profile

from robustbench_diffaug import rng
from robustbench_diffaug.diffusion.adm_mapping import PUBLISHED, Told, unet
from robustbench_diffaug.diffusion.jacobian import Jacobian, svd
from robustbench_diffaug.diffusion.unet import as_denoise


def peak(work: Callable[[], object]) -> tuple[int, float]:
    """The most bytes that torch held at once beyond those at the start, and seconds."""
    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    seconds = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        watched.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held, most = 0, 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"])):
        held += int(event["args"]["Bytes"])
        most = max(most, held)
    return most, seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="imagenet-64")
    parser.add_argument("--width", type=int, help="of the first level; that of the published network by default")
    parser.add_argument("--vectors", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    given = parser.parse_args()
    flags = PUBLISHED[given.network]
    flags = flags.model_copy(update={"num_channels": given.width} if given.width else {})
    with rng.seeded(rng.key("benchmark")):
        network = unet(flags)
    denoise = as_denoise(Told(network, flags), flags.schedule(), clip=False, microbatch=1)
    sigma, size = float(flags.schedule().sigmas()[300]), given.size
    noisy = 0.5 + sigma * torch.from_numpy(rng.normal(rng.key("x"), range(1), (3, size, size)))
    count = 3 * size * size
    start = torch.from_numpy(rng.normal(rng.key("start"), range(given.vectors), (count,)))[None]
    vector = start[:, :1].clone()

    def once() -> None:
        jacobian = Jacobian(denoise, noisy, sigma)
        jacobian.jvp(vector)
        jacobian.vjp(vector)

    own, _ = peak(once)
    found, seconds = peak(lambda: svd(Jacobian(denoise, noisy, sigma), start, given.vectors, iterations=0))
    beyond = (found - own) / (4 * count)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(value.numel() for value in network.parameters())
    print(
        f"{given.network}, width {flags.num_channels}, {parameters / 1e6:.0f} million weights, {size} x {size} pixels"
    )
    print(f"the network's own, one product each way: {own / 2**30:.2f} GiB")
    print(f"{given.vectors} vectors: {found / 2**30:.2f} GiB, {beyond:.1f} x d floats more, in {seconds:.0f} s")
    print(f"peak resident memory of the process: {resident:.2f} GiB")


if __name__ == "__main__":
    main()
