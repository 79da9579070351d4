"""Scores of out-of-distribution detection from one pass, beside the published loops, which take one pass for each.

    python benchmarks/ood.py [--images 2000] [--repetitions 3] [--threads 1] [--openood CHECKOUT]

A network of timm with random weights sees made-up PNG images of 32 pixels: `--images` of them for fitting, as many for
testing (half ID, a quarter each near and far), a quarter for validation. `rdiff` is a whole run: records, scores,
intervals, report. Its seconds for 1, 5 and 15 scores come first, then both sides for the same ten scores in turn; the
median of each counts. `cpu` is the processor's time, for a machine that does other things too. No hyper-parameter is
searched on either side.

`openood` is the evaluator of OpenOOD v1.5 itself where `--openood` names a checkout (`git archive` of commit 3c35632
does), once for each score; modules that it imports and does not use here are stubs. Without a checkout it is the loop
of that evaluator: images decoded and transformed twice, a pass over the images that a score is fitted to, one over each
test set, and a second one over the ID images for the accuracy. `pytorch-ood` is the loop of that package's benchmark: a
pass for fitting, then for each OOD set one over it and the ID images together. Where a loop stands for the package it
uses rdiff's own scores, which favours it: Mahalanobis distances are far dearer in both.

ODIN and GradNorm are timed apart, since ODIN needs passes of its own anywhere; OpenOOD takes them for GradNorm too.
"""

import argparse
import io
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import auc, precision_recall_curve, roc_curve
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from torch.utils.data import Dataset as TorchDataset

from robustbench_diffaug import rng
from robustbench_diffaug.checkpoints.features import capture, last_layer, linear
from robustbench_diffaug.checkpoints.timm_model import Timm, build
from robustbench_diffaug.data.lists import ImageList
from robustbench_diffaug.detection.rows import Rows, Scorer, Source
from robustbench_diffaug.detection.scores import SCORES
from robustbench_diffaug.engine import settle
from robustbench_diffaug.evaluators.ood import Odin, Ood
from robustbench_diffaug.runs import Options, execute, lock
from robustbench_diffaug.suite import Bench, Suite, load

TEN = {"msp": "msp", "maxlogit": "mls", "energy": "ebo", "gen": "gen", "react": "react", "ash": "ash"}
TEN |= {"scale": "scale", "mds": "mds", "rmds": "rmds", "vim": "vim"}  # rdiff's names and OpenOOD's
FIFTEEN = [*TEN, "entropy", "klm", "dice", "knn", "she"]
GRADIENTS = ("odin", "gradnorm")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH, CLASSES = 200, 10
ABSENT = ("faiss", "diffdist", "cv2", "imgaug", "libmr", "gdown", "statsmodels", "foolbox", "mmcv", "mmcls", "clip")


class Made(NamedTuple):
    """What both sides are given.

    Arguments:
        root: The folder of images and lists.
        sizes: The number of images of each role.
        network: The classifier.
        entry: The same as a suite has it.
    """

    root: Path
    sizes: dict[str, int]
    network: nn.Module
    entry: Timm


def made(root: Path, images: int, arch: str) -> Made:
    """Random images by role, their lists, and a network with random weights."""
    sizes = {"fit": images, "val": images // 4, "id": images // 2, "near": images // 4, "far": images // 4}
    for role, size in sizes.items():
        (root / role).mkdir(parents=True)
        coarse = rng.uniform(rng.key("ood", role), range(size), (8, 8, 3))
        labels = [index % CLASSES if role in ("fit", "val", "id") else -1 for index in range(size)]
        for index, each in enumerate(coarse):
            shown = Image.fromarray((each * 255).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
            shown.save(root / role / f"{index:05d}.png")
        lines = [f"{role}/{index:05d}.png {label}\n" for index, label in enumerate(labels)]
        (root / f"{role}.txt").write_text("".join(lines), "utf-8")
    with rng.seeded(rng.key("ood", arch)):
        network = build(arch, (), 3, CLASSES)
    save_file(network.state_dict(), root / "net.safetensors")
    fields = {"id": "net", "arch": arch, "classes": CLASSES, "weights": {"uri": str(root / "net.safetensors")}}
    entry = Timm.model_validate({**fields, "preprocess": {"mean": MEAN, "std": STD}})
    return Made(root, sizes, network.eval().requires_grad_(False), entry)


def ours(given: Made, scores: Sequence[str], **more: Any) -> None:
    """A whole run of rdiff."""
    lists = tuple(
        ImageList(name=f"{role}-images", group=role, list=str(given.root / f"{role}.txt"), root=str(given.root))
        for role in given.sizes
    )
    average = tuple(name for name in ("ash", "msp", "react", "scale") if name in scores)
    evaluator = Ood(scores=tuple(scores), average=average, sweep=False, **more)
    bench = Bench(name="ood", evaluator=evaluator, datasets=lists)
    suite = Suite(name="beside", checkpoints=(given.entry,), benches=(bench,))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "suite.yaml"
        path.write_bytes(lock(suite))
        finished = execute(load(str(path)), Options(Path(folder) / "run"))
        assert not finished.failures, finished.failures


class Seconds(NamedTuple):
    """Of the wall's clock and of the processors."""

    wall: float
    cpu: float


class Listed(TorchDataset[dict[str, Any]]):
    """Images of a list as both packages read them, decoded for every pass; OpenOOD transforms each a second time."""

    def __init__(self, given: Made, role: str, twice: bool) -> None:
        from torchvision import transforms

        lines = (given.root / f"{role}.txt").read_text("utf-8").split("\n")[:-1]
        self.root, self.entries, self.twice = given.root, [line.split(" ") for line in lines], twice
        resized = [transforms.Resize(32), transforms.CenterCrop(32)]
        self.transform = transforms.Compose([*resized, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, label = self.entries[index]
        image = Image.open(io.BytesIO((self.root / name).read_bytes())).convert("RGB")
        sample = {"data": self.transform(image), "label": int(label)}
        return {**sample, "data_aux": self.transform(image)} if self.twice else sample


class Loop:
    """A published evaluation loop, with rdiff's scores: every score reads and classifies all images again."""

    def __init__(self, given: Made, openood: bool) -> None:
        self.sets = {role: Listed(given, role, openood) for role in given.sizes}
        found = last_layer(given.network, torch.zeros(1, 3, 32, 32))
        self.call, (weight, bias) = capture(given.network, found.layer), linear(found.layer)
        self.head, self.openood = (weight.numpy(), bias.numpy()), openood

    def rows(self, *roles: str) -> Iterator[Rows]:
        """One pass of the network over some sets."""
        for batch in DataLoader(ConcatDataset([self.sets[role] for role in roles]), BATCH):
            with torch.no_grad():
                logits, features = self.call(batch["data"])
            yield Rows(logits.numpy(), features.numpy(), batch["label"].numpy())

    def __call__(self, name: str) -> None:
        """One score, from images to figures."""
        score = SCORES[name]
        kept = {role: list(self.rows(role)) for role in ("fit", "val") if role in score.needs}
        chunks = {role: (lambda rows=rows: iter(rows)) for role, rows in kept.items()}
        scorer = score.fit(Source(chunks.get("fit"), chunks.get("val"), *self.head), score.default)
        inside = self.scored(scorer, "id") if self.openood else []
        for odd in ("near", "far"):
            both = [*inside, *self.scored(scorer, odd)] if self.openood else self.scored(scorer, "id", odd)
            figures(*(np.concatenate(parts) for parts in zip(*both, strict=True)))
        if self.openood:  # the accuracy
            for rows in self.rows("id"):
                rows.logits.argmax(1)

    def scored(self, scorer: Scorer, *roles: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Scores and labels of one pass."""
        return [(scorer(rows), rows.labels) for rows in self.rows(*roles)]


def figures(scores: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    """AUROC and both AUPR, a sort for each."""
    odd = labels == -1
    false, true, _ = roc_curve(odd, -scores)
    curves = (precision_recall_curve(~odd, scores), precision_recall_curve(odd, -scores))
    return auc(false, true), *(auc(recall, precision) for precision, recall, _ in curves)


class Stubs(MetaPathFinder, Loader):
    """Modules that OpenOOD imports and that are not installed; the scores here use none of them."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return spec_from_loader(name, self, is_package=True) if name.partition(".")[0] in self.absent else None

    def __init__(self) -> None:
        self.absent = [name for name in ABSENT if find_spec(name) is None]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return MagicMock(__spec__=spec, __path__=[], __name__=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return


class Wrapped(nn.Module):
    """The network as OpenOOD calls it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        found = last_layer(network, torch.zeros(1, 3, 32, 32))
        self.network, self.fc = network, found.layer
        self.call, self.feature_size = capture(network, found.layer), linear(found.layer)[0].shape[1]

    def forward(self, x: torch.Tensor, return_feature: bool = False, return_feature_list: bool = False) -> Any:
        return self.call(x) if return_feature else self.network(x)

    def get_fc(self) -> tuple[np.ndarray, np.ndarray]:
        weight, bias = linear(self.fc)
        return weight.numpy(), bias.numpy()

    def get_fc_layer(self) -> nn.Module:
        return self.fc


def original(given: Made, checkout: Path) -> Callable[[str], None]:
    """OpenOOD's own evaluator for one score, by OpenOOD's name of it."""
    sys.path.insert(0, str(checkout))
    sys.meta_path.append(Stubs())
    unmoved: Any = lambda self, *_, **__: self  # noqa: E731  # it asks for a GPU in any case
    for kind in (torch.Tensor, nn.Module):
        kind.cuda = unmoved  # type: ignore[method-assign]  # a method of the class is replaced for the whole process
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator: Any = import_module("openood.evaluation_api.evaluator")
        datasets = import_module("openood.evaluation_api.datasets")
    evaluator.data_setup = lambda *_: None  # it would download
    place = {role: {"data_dir": "", "imglist_path": f"{role}.txt"} for role in given.sizes}
    splits = {"train": place["fit"], "val": place["val"], "test": place["id"]}
    odd = {"val": place["near"], **{role: {"datasets": [role], role: place[role]} for role in ("near", "far")}}
    described = {"num_classes": CLASSES, "id": splits, "csid": {"datasets": []}, "ood": odd}
    datasets.DATA_INFO["cifar10"] = described
    network, configs = Wrapped(given.network).eval(), str(checkout / "configs")

    def run(name: str) -> None:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            processor = evaluator.get_postprocessor(configs, name, "cifar10")
            processor.APS_mode = False
            arguments = {"postprocessor_name": name, "postprocessor": processor, "batch_size": BATCH, "num_workers": 0}
            evaluator.Evaluator(network, "cifar10", f"{given.root}/", configs, **arguments).eval_ood(progress=False)

    return run


def timed(work: Callable[[], Any]) -> Seconds:
    """What some work takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def in_turn(sides: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, Seconds]:
    """The median seconds of each side."""
    took: dict[str, list[Seconds]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, work in sides.items():
            took[name].append(timed(work))
    medians = {name: Seconds(*map(median, zip(*found, strict=True))) for name, found in took.items()}
    for name, found in medians.items():
        spread = f"{min(took[name]).wall:.2f} to {max(took[name]).wall:.2f}"
        print(f"  {name:<22}{found.wall:>8.2f} s wall ({spread}){found.cpu:>8.2f} s cpu", flush=True)
    return medians


def each(work: Callable[[str], None], names: Sequence[str]) -> None:
    for name in names:
        work(name)


def compared(given: Made, repetitions: int, checkout: Path | None) -> None:
    """Prints everything."""
    counts = {f"rdiff, {k} scores": partial(ours, given, FIFTEEN[:k]) for k in (1, 5, 15)}
    ours(given, FIFTEEN)  # networks are loaded, kernels chosen
    print("scores from one pass")
    took = list(in_turn(counts, repetitions).values())
    print(f"  15 scores take {took[2].wall / took[0].wall:.2f} (wall), {took[2].cpu / took[0].cpu:.2f} (cpu) times 1")
    published = original(given, checkout) if checkout else None
    loop, other = Loop(given, openood=True), Loop(given, openood=False)
    names = list(TEN.values()) if published else list(TEN)
    sides: dict[str, Callable[[], Any]] = {
        "rdiff": lambda: ours(given, list(TEN)),
        "openood" if published else "openood's loop": lambda: each(published or loop, names),
        "pytorch-ood's loop": lambda: each(other, list(TEN)),
    }
    print(f"ten scores: {', '.join(TEN)}")
    mine, *theirs = in_turn(sides, repetitions).values()
    for name, found in zip([*sides][1:], theirs, strict=True):
        print(f"  speed-up {found.wall / mine.wall:.1f} (wall), {found.cpu / mine.cpu:.1f} (cpu) over {name}")
    odin = Odin(temperatures=(1000.0,))
    gradients: dict[str, Callable[[], Any]] = {"rdiff": lambda: ours(given, ["msp", *GRADIENTS], odin=odin)}
    if published:
        gradients["openood"] = lambda: each(published, ["msp", *GRADIENTS])
    print("msp, odin and gradnorm")
    in_turn(gradients, repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("images", 2000), ("repetitions", 3), ("threads", os.cpu_count() or 1)):
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--arch", default="resnet18", help="an architecture of timm; default: %(default)s")
    parser.add_argument("--openood", type=Path, help="a checkout of OpenOOD, whose own code is then run")
    arguments = parser.parse_args()
    if arguments.images < 400:
        parser.error("--images must be 400 or more: ViM takes 256 directions of the images for fitting")
    settle("cpu", arguments.threads)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "numpy", "scikit-learn"))
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {platform.machine()}; {versions}")
    with tempfile.TemporaryDirectory() as folder:
        given = made(Path(folder), arguments.images, arguments.arch)
        print(f"{arguments.arch}, images: {', '.join(f'{size} {role}' for role, size in given.sizes.items())}")
        compared(given, arguments.repetitions, arguments.openood and arguments.openood.resolve())


if __name__ == "__main__":
    main()
