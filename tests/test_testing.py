"""The conformance suite on everything that is built in, and on things that break each promise."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

import robustbench_diffaug.torchvision_guard  # noqa: F401  (before diffusers)
from robustbench_diffaug import rng, testing
from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.checkpoints.local import Local
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import kinds
from robustbench_diffaug.data.base import Dataset, Images, in_memory
from robustbench_diffaug.data.corrupted import Corrupted, Corruptions
from robustbench_diffaug.data.embedded import Digits, Mnist5k
from robustbench_diffaug.data.glyphs import Letters, Noise
from robustbench_diffaug.data.labels import Labels
from robustbench_diffaug.data.photographs import Patches
from robustbench_diffaug.data.sources import Arrays, Folder
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.base import ConditionalDenoise, Denoise, Denoiser, Posterior, Schedule, Sigma
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.diffusion.unet import UNet, save
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.evaluators.ood import Odin, Ood
from robustbench_diffaug.evaluators.shift import Shift
from robustbench_diffaug.evaluators.smoothing import Smoothing
from robustbench_diffaug.records import Metric, Records
from robustbench_diffaug.stats import proportion
from robustbench_diffaug.suite import load

BUNDLED = {entry.id: entry for entry in load("quickstart").suite.checkpoints}


def linear() -> torch.nn.Module:
    layer = torch.nn.Linear(64, 4)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return torch.nn.Sequential(torch.nn.Flatten(), layer)


def files(folder: Path) -> tuple[Folder, Arrays]:
    pixels = (np.arange(6 * 64).reshape(6, 8, 8) % 251).astype(np.uint8)
    for row in range(6):
        (folder / f"{row % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels[row]).save(folder / f"{row % 2}/{row}.png")
    np.savez(folder / "a.npz", images=pixels, labels=np.arange(6) % 2)
    return Folder(name="f", root=str(folder), mode="L"), Arrays(name="a", file=str(folder / "a.npz"))


EVALUATORS: dict[str, list[Evaluator]] = {
    # Each has conditions of its own: tests/evaluators/test_*.py of these names run check_evaluator.
    **{name: [] for name in ("gallery", "generation", "gradients", "jacobian", "noise")},
    "ood": [Ood(), Ood(odin=Odin(temperatures=(1, 1000))), Ood(features=False)],
    "shift": [Shift(), Shift(modes=("default", "de"), denoiser=MixtureDenoiser(), times=(0, 100, 300))],
    "smoothing": [
        Smoothing(sigmas=(0.25, 0.5), denoiser=MixtureDenoiser(), n0=5, n=23),
        Smoothing(sigmas=(0.1,), n0=4, n=16),
    ],
}
ROLES: dict[str, Dataset] = {"ood": Mixture(name="check", group="id", size=7)}
"""Of an evaluator that goes by the groups of datasets."""
UNET = UNet(folder="rdiff:zoo/mnist5k-ddpm", microbatch=4)
DENOISERS: dict[str, list[tuple[Denoiser, tuple[int, int, int]]]] = {
    "adm": [],  # needs a file of weights: tests/diffusion/test_adm.py runs check_denoiser
    "edm": [],  # needs a function of the user's: tests/diffusion/test_edm.py runs check_denoiser
    "mixture": [(MixtureDenoiser(), (1, 8, 8)), (MixtureDenoiser(clip=False), (1, 8, 8))],
    "unet": [(UNET, (1, 32, 32)), (UNET.model_copy(update={"precision": "bfloat16"}), (1, 32, 32))],
}
CHECKPOINTS: dict[str, list[tuple[Checkpoint, tuple[int, int, int]]]] = {
    "denoiser": [],  # has no logits
    # Each needs files of its own: tests/checkpoints/test_exported.py, test_hugging_face.py, test_onnx.py,
    # test_robustbench.py and test_torchvision.py run check_checkpoint.
    **{name: [] for name in ("export", "hf", "onnx", "robustbench", "torchscript", "torchvision")},
    "local": [(Local(id="l", arch=f"{__name__}:linear", classes=4), (1, 8, 8))],
    "mixture": [(Bayes(id="b", classes=4), (1, 8, 8))],
    "module": [],  # needs a network of this process: tests/test_api.py runs check_checkpoint
    "timm": [(entry, (1, 32, 32)) for entry in BUNDLED.values()],
}
FEW = Mnist5k(limit=6)
DATASETS: dict[str, Callable[[Path], list[Dataset]]] = {
    "arrays": lambda folder: [files(folder)[1]],
    # Each needs a tree of its published layout: tests/data/test_cifar.py, test_imagenet.py, test_lists.py and
    # test_tables.py run check_dataset.
    **dict.fromkeys(("cifar", "cifar-c", "cifar-c-part", "imagenet", "imagenet-c", "imglist", "table"), lambda _: []),
    "corrupted": lambda _: [Corrupted(name="c", base=FEW, corruption="fog", severity=3, constants="cifar-c")],
    "corruptions": lambda _: [
        Corruptions(base=FEW, corruptions=("shot_noise", "motion_blur"), severities=(1, 5), constants="imagenet-c")
    ],
    "digits": lambda _: [Digits(every=300)],
    "folder": lambda folder: [files(folder)[0]],
    "labels": lambda _: [Labels(classes=3, each=2, size=8)],
    "letters": lambda _: [Letters(limit=9)],
    "mixture": lambda _: [Mixture()],
    "noise": lambda _: [Noise(form="blobs", limit=5), Noise(form="gaussian", limit=5)],
    "patches": lambda _: [Patches(source="textures", limit=5)],
    "mnist5k": lambda _: [
        Mnist5k(),
        Mnist5k(split="train", limit=5),
        Mnist5k(digits=(6, 9), unlabelled=True, offset=3),
    ],
}


@pytest.mark.parametrize(
    ("family", "cases"),
    [(Evaluator, EVALUATORS), (Denoiser, DENOISERS), (Checkpoint, CHECKPOINTS), (Dataset, DATASETS)],
    ids=["evaluators", "denoisers", "checkpoints", "datasets"],
)
def test_every_installed_kind_has_a_case(family: Any, cases: Mapping[str, object]) -> None:
    assert set(kinds(family)) == set(cases)


@pytest.mark.parametrize("evaluator", [value for values in EVALUATORS.values() for value in values], ids=repr)
def test_evaluators(evaluator: Evaluator) -> None:
    testing.check_evaluator(evaluator, ROLES.get(evaluator.kind))


@pytest.mark.parametrize(("denoiser", "shape"), [case for cases in DENOISERS.values() for case in cases])
def test_denoisers(denoiser: Denoiser, shape: tuple[int, int, int]) -> None:
    testing.check_denoiser(denoiser, shape)


@pytest.mark.parametrize(("checkpoint", "shape"), [case for cases in CHECKPOINTS.values() for case in cases])
def test_checkpoints(checkpoint: Checkpoint, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(linear=linear))
    testing.check_checkpoint(checkpoint, shape)


@pytest.mark.parametrize("kind", DATASETS)
def test_datasets(kind: str, tmp_path: Path) -> None:
    for dataset in DATASETS[kind](tmp_path):
        testing.check_dataset(dataset)


class Sound(Evaluator):
    """The smallest evaluator; the broken ones differ from it in one point."""

    kind: Literal["sound"] = "sound"

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        return {"hit": model.logits(view.images[:, 0]).argmax(1) == batch.labels}

    def metrics(self, records: Records) -> Iterable[Metric]:
        if len(records):
            yield records.metric("hit", "all", proportion(records["hit"]))


class GlobalNoise(Sound):
    def views(self, batch: Batch) -> Iterator[View]:
        yield View("noisy", batch.images[:, None] + torch.randn(batch.images[:, None].shape))  # noqa: TID251


class BatchMean(Sound):
    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        return {"hit": view.images.flatten(1).mean(1) > view.images.mean()}


class WrongAxis(Sound):
    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        return {"hit": model.logits(view.images[:, 0]).T}


class NoDraws(Sound):
    def views(self, batch: Batch) -> Iterator[View]:
        yield View("flat", batch.images)  # type: ignore[arg-type, unused-ignore]


class Miscounted(Sound):
    def forwards(self) -> Forwards:
        return Forwards(0, 7)


class Twice(Sound):
    def metrics(self, records: Records) -> Iterable[Metric]:
        if len(records):
            yield from [records.metric("hit", "all", proportion(records["hit"]))] * 2


class Outlying(Sound):
    def metrics(self, records: Records) -> Iterable[Metric]:
        if len(records):
            yield Metric("hit", "all", 0.5, 0.6, 0.7, complete=False)


class FromNothing(Sound):
    def metrics(self, records: Records) -> Iterable[Metric]:
        yield Metric("hit", "all", 0.5, 0.4, 0.7, complete=False)


class Remembering(Sound):
    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        previous = SEEN[-1:]
        SEEN.append(model.id)
        return {"hit": torch.full((len(batch.ids),), previous == ["a"])}


SEEN: list[str] = []

BROKEN_EVALUATORS: list[tuple[Evaluator, str]] = [
    (GlobalNoise(), "global random generator"),
    (BatchMean(), "depends on batches of 1"),
    (WrongAxis(), "the sample is the first axis"),
    (NoDraws(), "has shape|Type-check"),
    (Miscounted(), "forwards"),
    (Twice(), "one name and group"),
    (Outlying(), "outside"),
    (FromNothing(), "complete|no records"),
    (Remembering(), "checkpoints beside"),
]


def test_a_sound_evaluator_passes() -> None:
    testing.check_evaluator(Sound())


@pytest.mark.parametrize(("evaluator", "message"), BROKEN_EVALUATORS, ids=lambda value: type(value).__name__)
def test_broken_evaluators_are_caught(evaluator: Evaluator, message: str) -> None:
    with pytest.raises((AssertionError, Exception), match=message):  # jaxtyping may see a wrong shape first
        testing.check_evaluator(evaluator)


class Odd(Denoiser):
    """A denoiser with a fault of choice."""

    kind: Literal["odd"] = "odd"
    fault: str

    def sigmas(self) -> np.ndarray:
        sigmas = Schedule().sigmas()
        return sigmas[::-1] if self.fault == "decreasing" else sigmas

    def size(self) -> int | None:
        return 9 if self.fault == "size" else None

    def level(self, time: float) -> float:  # type: ignore[misc]  # final, which Python does not enforce
        if self.fault == "steps":  # right at all discrete times, constant between them
            return self.sigma(max(0, round(time * 1000 + 0.499) - 1))
        return super().level(time) * (1.001 if self.fault == "level" else 1)

    def load(self, device: torch.device) -> Denoise:
        def denoise(noisy: torch.Tensor, sigma: Sigma) -> Posterior:
            mean = noisy.clamp(0, 1)
            if self.fault == "beside":
                mean = (noisy - noisy.mean()).clamp(0, 1)
            if self.fault == "unclipped":
                mean = noisy
            if self.fault == "infinite":
                mean = noisy / 0
            if self.fault == "noise":
                torch.rand(1)  # noqa: TID251
            return Posterior(mean)

        return denoise


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("decreasing", "do not increase"),
        ("beside", "images beside|order"),
        ("unclipped", "does not clip"),
        ("infinite", "NaN or infinite"),
        ("noise", "global random generator"),
        ("size", "images are 9 pixels high and wide, not 8 and 8"),
        ("level", "which is the same time, is not"),
        ("steps", "level of odd does not increase"),
    ],
)
def test_broken_denoisers_are_caught(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_denoiser(Odd(fault=fault))
    testing.check_denoiser(Odd(fault="none"))


class Told(Denoiser):
    """The exact denoiser of the mixture, told classes with a fault of choice."""

    kind: Literal["told"] = "told"
    fault: str

    def sigmas(self) -> np.ndarray:
        return Schedule().sigmas()

    def classes(self) -> int | None:
        return {"secret": None, "no class": 0}.get(self.fault, 4)

    def load(self, device: torch.device) -> Denoise:
        return MixtureDenoiser(clip=self.clip).load(device)

    def load_conditional(self, device: torch.device) -> ConditionalDenoise:
        exact = MixtureDenoiser(clip=self.clip).load_conditional(device)

        def denoise(noisy: torch.Tensor, sigma: Sigma, labels: torch.Tensor) -> Posterior:
            found = exact(noisy, sigma, self.misheard(labels, sigma))
            if self.fault in ("infinite", "unclipped"):
                factor = torch.where(labels < 0, 1, float("nan") if self.fault == "infinite" else 3)
                return Posterior(found.mean * factor[..., None, None, None])
            if self.fault == "dtype":
                return Posterior(found.mean.double())
            if self.fault == "stacked" and noisy.ndim == 5:
                return Posterior(found.mean.flip(0))
            if self.fault == "label in place":
                labels.zero_()
            if self.fault == "image in place" and 0 < int((labels < 0).sum()) < labels.numel():
                noisy.zero_()
            if self.fault == "noise":
                torch.rand(1)  # noqa: TID251
            return found

        return denoise

    def misheard(self, labels: torch.Tensor, sigma: Sigma) -> torch.Tensor:
        """The labels that are taken for those that were given."""
        levels = torch.as_tensor(sigma).reshape(-1)
        faults = {
            "none is a class": lambda: labels.clamp(min=0),
            "deaf": lambda: torch.full_like(labels, -1),
            "one for all": lambda: labels.reshape(-1)[-1].expand(labels.shape),
            "order": lambda: labels.flip(0) if levels[0] > levels[-1] else labels,
            "one per image": lambda: labels[:, :1].expand(labels.shape) if labels.ndim == 2 else labels,
            "above": lambda: labels.clamp(max=3),
            "below": lambda: labels.clamp(min=-1),
        }
        return faults.get(self.fault, lambda: labels)()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("secret", r"no classes\(\) and yet load_conditional"),
        ("no class", "has 0 classes"),
        ("none is a class", "another estimate for the label -1"),
        ("deaf", "same estimate for class 0 and 3"),
        ("label in place", "told classes, told changes its input in place"),
        ("dtype", "another estimate for the label -1"),
        ("image in place", "told classes, told changes its input in place"),
        ("infinite", "told classes, told gives NaN"),
        ("unclipped", "told classes, told does not clip"),
        ("one for all", "the labels beside"),
        ("order", "told classes, told depends on the order"),
        ("stacked", "told classes, told must take any leading axes"),
        ("one per image", "each other's labels"),
        ("above", "takes the label 4"),
        ("below", "takes the label -2"),
        ("noise", "global random generator"),
    ],
)
def test_denoisers_that_mishear_classes_are_caught(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_denoiser(Told(fault=fault))
    testing.check_denoiser(Told(fault="none"))


def test_a_network_that_is_told_classes_passes(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    with rng.seeded(rng.key("told")):
        network = UNet2DModel(
            sample_size=16, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            num_class_embeds=4,
        )  # fmt: skip
    save(tmp_path, network, Schedule())
    testing.check_denoiser(UNet(folder=str(tmp_path), microbatch=4), (1, 16, 16))
    with pytest.raises(AssertionError, match="images are 16 pixels high and wide, not 16 and 32"):
        testing.check_denoiser(UNet(folder=str(tmp_path), microbatch=4), (1, 16, 32))


class Strange(Dataset):
    """A dataset with a fault of choice."""

    kind: Literal["strange"] = "strange"
    name: str = "strange"
    fault: str

    def contents(self) -> str:
        return "" if self.fault == "digest" else "made up"

    def open(self) -> Images:
        images, labels = torch.arange(8).float()[:, None, None, None].expand(8, 1, 8, 8) / 8, torch.arange(8)
        ids = ["same"] * 8 if self.fault == "ids" else [str(row) for row in range(8)]
        whole = in_memory(ids, images * (2 if self.fault == "range" else 1), labels)

        def read(rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            found, classes = whole.read(rows)
            if self.fault == "beside":
                found = (found + found.mean()) / 2
            return found, classes.float() if self.fault == "labels" else classes

        return Images(ids, read)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ids", "two images of one id"),
        ("range", r"outside \[0, 1\]"),
        ("beside", "read beside"),
        ("labels", "integers"),
        ("digest", "digest"),
    ],
)
def test_broken_datasets_are_caught(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_dataset(Strange(fault=fault))
    testing.check_dataset(Strange(fault="none"))
