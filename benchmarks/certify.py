"""Certificates beside the published loop: seconds, votes and certified accuracy on the same networks and images.

    python benchmarks/certify.py [--images 4] [--n 1000] [--repetitions 5] [--threads 2]
    python benchmarks/certify.py --profile

`published` is what core.py of locuslab/smoothing does around DRM.py of DDS: one image and one classifier at a time, n0
and n draws in batches of torch.randn, one call of the denoiser and one of the classifier a batch, counts by numpy. It
leaves out what would only slow it down: the second noise tensor of p_sample, counting in a Python loop. `rdiff` are the
tasks of a run. Both are timed in turn, the median counts; `cpu` is the processor's time, for a machine that does other
things too.

With `--profile`: the share of the evaluation loop's wall time that is spent inside the networks' forwards.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import beta, norm
from torch.nn.modules import module as modules

from robustbench_diffaug.batch import Limits
from robustbench_diffaug.data.embedded import Mnist5k
from robustbench_diffaug.diffusion.unet import UNet
from robustbench_diffaug.engine import Task, run, settle
from robustbench_diffaug.evaluators.certificates import certify
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.files import path_of
from robustbench_diffaug.runs import Options, tasks_of
from robustbench_diffaug.suite import Bench, Loaded, Suite, load

FOLDER = "rdiff:zoo/mnist5k-ddpm"
IDS = ["resnet-standard", "resnet-standard+diffaug", "resnet-augmix", "resnet-augmix+diffaug"]
IDS += ["vit-standard", "vit-standard+diffaug"]
BATCHES = (100, 200, 400, 1000)


class Seconds(NamedTuple):
    """Of the wall's clock and of the processors."""

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> tuple[Seconds, Any]:
    """What some work takes, and what it gives."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), found


class Published:
    """The published loop for one classifier; `certify` gives votes, of n0 and of n draws, of each image."""

    def __init__(self, classifier: torch.nn.Module, denoiser: torch.nn.Module, level: float) -> None:
        self.classifier, self.denoiser = classifier, denoiser
        signed = 2 * level  # images are in [-1, 1] here
        self.signal, self.noise = 1 / (1 + signed**2) ** 0.5, signed / (1 + signed**2) ** 0.5

    def sample(self, image: torch.Tensor, num: int, batch_size: int, time_step: int) -> np.ndarray:
        """The votes of some noisy copies of an image."""
        counts = np.zeros(10, dtype=int)
        while num > 0:
            this = min(batch_size, num)
            num -= this
            batch = image.repeat((this, 1, 1, 1)) * 2 - 1
            noisy = self.signal * batch + self.noise * torch.randn_like(batch)
            predicted = self.denoiser(noisy, torch.tensor([time_step] * this)).sample
            clean = ((noisy - self.noise * predicted) / self.signal).clamp(-1, 1)
            counts += np.bincount(self.classifier(clean).argmax(1).cpu().numpy(), minlength=10)
        return counts

    @torch.no_grad()
    def certify(self, images: torch.Tensor, n0: int, n: int, alpha: float, batch: int, step: int) -> list[np.ndarray]:
        """As core.py's: a class by n0 draws, its bound by n others, image by image."""
        found = []
        for image in images:
            select = self.sample(image, n0, batch, step)
            estimate = self.sample(image, n, batch, step)
            votes = int(estimate[select.argmax()])
            norm.ppf(beta.ppf(alpha, votes, n - votes + 1))  # its radius; the tables below take one rule for both
            found.append(np.stack([select, estimate]))
        return found


def evaluated(suite: Suite, ids: list[str], folder: Path) -> list[Task]:
    """The tasks of a run of some classifiers, after they were run."""
    chosen = tuple(entry for entry in suite.checkpoints if entry.id in ids)
    tasks = tasks_of(Loaded(suite.model_copy(update={"checkpoints": chosen}), {}), Options(folder))
    for task in tasks:
        failures = run(task).failures
        assert not failures, failures
    return tasks


def ours(suite: Suite, ids: list[str]) -> np.ndarray:
    """The votes of a run, of shape (checkpoint, image, 2, class)."""
    with tempfile.TemporaryDirectory() as folder:
        first, *_ = evaluated(suite, ids, Path(folder))
        records = [first.store.read([cell]) for cell in first.cells]
    return np.stack([np.stack([each["select"][:, 0], each["estimate"][:, 0]], axis=1) for each in records])


def radii(votes: np.ndarray, sigma: float, alpha: float, labels: np.ndarray) -> np.ndarray:
    """The certified radius of each image, below 0 where the certified class is wrong or there is none."""
    found = certify(votes[:, 0], votes[:, 1], sigma, alpha)
    return np.where(found.prediction == labels, found.radius, -1.0)


def most_apart(one: np.ndarray, other: np.ndarray, n: int) -> tuple[float, float]:
    """The largest |z| of the differences between votes for the top class, and what it exceeds once in 1,000 runs."""
    top = (one + other)[..., 1, :].argmax(-1)[..., None]
    first, second = (np.take_along_axis(votes[..., 1, :], top, -1)[..., 0] for votes in (one, other))
    share = (first + second) / (2 * n)
    spread = np.sqrt(np.maximum(share * (1 - share), 0.5 / n) * 2 / n)
    return float((abs(first - second) / n / spread).max()), float(norm.isf(0.0005 / top.size))


@contextmanager
def inside(spent: list[float]) -> Iterator[None]:
    """Within it the seconds of every forward of a network, not of its parts again, are added to the list."""
    depth, begun = 0, 0.0

    def enter(*_: Any) -> None:
        nonlocal depth, begun
        depth, begun = depth + 1, begun if depth else time.perf_counter()

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        if not depth:
            spent.append(time.perf_counter() - begun)

    hooks = [modules.register_module_forward_pre_hook(enter), modules.register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def profile(suite: Suite, ids: list[str]) -> None:
    """Prints the share of the loop that is spent in networks."""
    ours(suite, ids)
    spent: list[float] = []
    with tempfile.TemporaryDirectory() as folder, inside(spent):
        took, _ = timed(lambda: evaluated(suite, ids, Path(folder)))
    share = sum(spent) / took.wall
    print(
        f"{len(ids)} classifiers: {sum(spent):.2f} of {took.wall:.2f} s in {len(spent)} forwards, {100 * share:.1f} %"
    )


class Compared(NamedTuple):
    """Everything that is compared."""

    suite: Suite
    sigma: float
    loops: dict[str, Published]
    images: torch.Tensor
    labels: np.ndarray
    protocol: dict[str, Any]

    def theirs(self, ids: list[str]) -> np.ndarray:
        """The votes of the published loop, one classifier after another."""
        return np.stack([np.stack(self.loops[id].certify(self.images, **self.protocol)) for id in ids])


def prepared(arguments: argparse.Namespace) -> Compared:
    """The same networks, images and settings for both."""
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
    from diffusers import UNet2DModel

    denoiser = UNet(folder=FOLDER)
    evaluator = Smoothing(sigmas=(arguments.sigma,), denoiser=denoiser, n0=arguments.n0, n=arguments.n)
    dataset = Mnist5k(limit=arguments.images)
    known = {entry.id: entry for entry in load("certify").suite.checkpoints}
    entries = tuple(known[id] for id in IDS)
    bench = Bench(name="certify", evaluator=evaluator, datasets=(dataset,))
    suite = Suite(name="beside", checkpoints=entries, benches=(bench,))
    images, labels = dataset.opened().read(dataset.rows())
    network = UNet2DModel.from_pretrained(path_of(FOLDER), subfolder="unet", low_cpu_mem_usage=False).eval()
    step = denoiser.time(arguments.sigma)
    loops = {entry.id: Published(entry.load().eval(), network, denoiser.sigma(step)) for entry in entries}
    protocol = {"n0": arguments.n0, "n": arguments.n, "alpha": evaluator.alpha, "step": step, "batch": 100}
    return Compared(suite, arguments.sigma, loops, images, labels.numpy(), protocol)


def best_batch(compared: Compared) -> int:
    """The published loop's fastest batch size, on one image."""
    one = compared._replace(images=compared.images[:1])
    took = {}
    for batch in BATCHES:
        one.protocol["batch"] = batch
        took[batch] = min(timed(lambda: one.theirs(IDS[:1]))[0].cpu for _ in range(2))
    print("published, cpu s an image:", ", ".join(f"{seconds:.2f} at batch {size}" for size, seconds in took.items()))
    return min(took, key=lambda size: took[size])


def costs(compared: Compared) -> tuple[float, float]:
    """Processor milliseconds an image of a denoise and of the mean classifier, in the shape of a run."""
    images = compared.images[:1].repeat(128, 1, 1, 1)
    denoise = compared.suite.benches[0].evaluator.denoisers()[0].loaded(Limits())
    models = [entry.loaded(Limits()) for entry in compared.suite.checkpoints]
    calls = [lambda: denoise(images, compared.sigma), *(partial(model.logits, images) for model in models)]
    with torch.no_grad():
        found = [median(timed(call)[0].cpu for _ in range(8)) * 1000 / 128 for call in calls]
    return found[0], sum(found[1:]) / len(found[1:])


def beside(compared: Compared, ids: list[str], repetitions: int) -> tuple[Seconds, np.ndarray, np.ndarray]:
    """Prints the seconds of both for some classifiers; gives how many times theirs are ours, and the votes of both."""
    sides = {"published": lambda: compared.theirs(ids), "rdiff": lambda: ours(compared.suite, ids)}
    took: dict[str, list[Seconds]] = {name: [] for name in sides}
    votes = {}
    for _ in range(repetitions):
        for name, work in sides.items():
            seconds, votes[name] = timed(work)
            took[name].append(seconds)
    for name, found in took.items():
        for clock, values in (("wall", [each.wall for each in found]), ("cpu", [each.cpu for each in found])):
            low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
            print(f"{len(ids):<13}{name:<12}{clock:<6}{median(values):>9.2f} s   {low:.2f} to {high:.2f}")
    # Of each pair: what the machine does beside this falls on both alike.
    pairs = list(zip(took["published"], took["rdiff"], strict=True))
    ratio = Seconds(*(median(one[clock] / other[clock] for one, other in pairs) for clock in (0, 1)))
    return ratio, votes["published"], votes["rdiff"]


def curves(compared: Compared, theirs: np.ndarray, mine: np.ndarray, alpha: float) -> None:
    """Prints certified accuracies of both and how far apart their votes are."""
    grid = (0.0, 0.25, 0.5, 0.75)
    print(f"{'certified accuracy':<26}{'published at r = ' + ', '.join(map(str, grid)):<44}rdiff")
    for id, one, other in zip(IDS, theirs, mine, strict=True):
        each = [radii(votes, compared.sigma, alpha, compared.labels) for votes in (one, other)]
        rows = ["  ".join(f"{float((found >= r).mean()):.3f}" for r in grid) for found in each]
        print(f"{id:<26}{rows[0]:<44}{rows[1]}")
    apart, bound = most_apart(theirs, mine, compared.protocol["n"])
    print(f"votes: largest |z| {apart:.2f}, 1 in 1,000 beyond {bound:.2f} of {theirs[..., 0, 0].size} comparisons")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("images", 4), ("n0", 100), ("n", 1000), ("repetitions", 5), ("threads", os.cpu_count() or 1)):
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--sigma", type=float, default=0.25, help="default: %(default)s")
    parser.add_argument("--profile", action="store_true", help="the share of time in networks, and nothing else")
    arguments = parser.parse_args()
    settle("cpu", arguments.threads)
    compared = prepared(arguments)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "diffusers"))
    cores = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {platform.machine()}"
    print(
        f"{arguments.images} images, {arguments.n0} + {arguments.n} draws at {arguments.sigma:g}; {cores}, {versions}"
    )
    if arguments.profile:
        for ids in (IDS[:1], IDS):
            profile(compared.suite, ids)
        return
    compared.protocol["batch"] = best_batch(compared)
    ours(compared.suite, IDS)  # networks are loaded, kernels chosen
    d, c = costs(compared)
    print(f"{'classifiers':<13}{'':<12}{'clock':<6}{'median':>11}   quartiles")
    single, _, _ = beside(compared, IDS[:1], arguments.repetitions)
    several, theirs, mine = beside(compared, IDS, arguments.repetitions)
    count = len(IDS)
    ceiling = count * (d + c) / (d + count * c)
    print(f"one classifier: published / rdiff {single.wall:.3f} (wall), {single.cpu:.3f} (cpu)")
    print(
        f"{count} classifiers: speed-up {several.wall:.2f} (wall), {several.cpu:.2f} (cpu); ceiling {ceiling:.2f} with "
        f"d = {d:.2f} and c = {c:.2f} ms: {100 * several.wall / ceiling:.0f} % (wall), "
        f"{100 * several.cpu / ceiling:.0f} % (cpu)"
    )
    curves(compared, theirs, mine, compared.suite.benches[0].evaluator.alpha)


if __name__ == "__main__":
    main()
