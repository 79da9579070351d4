"""The conformance suite catches the faults that are harder to see: state, aliases, files, markers."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from robustbench_diffaug import rng, testing
from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Component, Outside
from robustbench_diffaug.data.base import Dataset, Images
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Schedule, Sigma
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.files import Location, sha256
from robustbench_diffaug.records import Metric, Records
from robustbench_diffaug.stats import proportion
from robustbench_diffaug.testing.values import check_value


class Sound(Evaluator):
    """Nothing is wrong with it but what its fault says."""

    kind: Literal["sound"] = "sound"
    fault: str = ""
    denoiser: Denoiser = MixtureDenoiser()
    sigma: Annotated[float, Outside] = 0.5

    def views(self, batch: Batch) -> Iterator[View]:
        images = batch.images[:, None]
        if self.fault == "outside":
            images = images * self.sigma
        if self.fault == "numpy":
            images = images + float(np.random.rand())  # noqa: TID251
        if self.fault == "budget":
            images = images / batch.limits.budget
        yield View("clean", images)
        if self.fault == "denoiser":
            self.denoiser.loaded(batch.limits)(images, 0.1)

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        if self.fault == "place":
            view.images.zero_()
        probabilities = model.logits(view.images[:, 0]).softmax(1)
        columns = {"hit": probabilities.argmax(1) == batch.labels, "confidence": probabilities.amax(1)}
        if self.fault == "python":
            columns["confidence"] = columns["confidence"] * random.random()
        return {**columns, "label": batch.labels} if self.fault == "label" else columns

    def metrics(self, records: Records) -> Iterable[Metric]:
        if len(records):
            yield records.metric("hit", "all", proportion(records["hit"]))
            if self.fault == "infinite":
                yield Metric("odd", "all", float("inf"), complete=False)
            if self.fault == "resampled":
                yield Metric("odd", "all", random.random(), complete=False)

    def forwards(self) -> Forwards:
        return Forwards(0, 1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("outside", "depends on sigma, which is marked Outside"),
        ("numpy", "global random generator"),
        ("python", "depends on when it is run"),
        ("budget", "depends on a budget of 8 images"),
        ("denoiser", "denoises 1 images a sample"),
        ("place", "in place"),
        ("label", "which every record has"),
        ("infinite", "is inf"),
        ("resampled", "computed again"),
    ],
)
def test_evaluators(fault: str, message: str) -> None:
    state = rng.global_states()
    with rng.seeded(0), pytest.raises(AssertionError, match=message):
        testing.check_evaluator(Sound(fault=fault))
    assert rng.global_states() == state


def test_a_sound_evaluator_passes() -> None:
    testing.check_evaluator(Sound())


class Settings(Component):
    kind: Literal["settings"] = "settings"
    options: dict[str, int] | None = None


class Listed(Component):
    kind: Literal["listed"] = "listed"
    value: Any = 0


class Nameless(Component):
    kind: str


class Forgetful(Component):
    """A fingerprint without one of its fields."""

    kind: Literal["forgetful"] = "forgetful"
    draws: int = 3

    def identity(self) -> dict[str, object]:
        return {"kind": self.kind, "draws": 0}


class Unstable(Component):
    kind: Literal["unstable"] = "unstable"

    def contents(self) -> str:
        return str(id(self))


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (Settings(), "field options of settings is a dict"),
        (Listed(value=[1]), "cannot be hashed"),
        (Listed(value=(1, 2)), "another value after a round trip"),
        (Nameless(kind="x"), "no fixed kind"),
        (Forgetful(), "disagree with its marker"),
        (Unstable(), "changes through YAML"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_components(component: Component, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_value(component)


class Odd(Denoiser):
    """A denoiser with a fault of choice."""

    kind: Literal["odd"] = "odd"
    fault: str

    def sigmas(self) -> Any:
        sigmas = Schedule().sigmas()
        return {"nan": sigmas * np.nan, "flat": np.ones_like(sigmas)}.get(self.fault, sigmas)

    def load(self, device: torch.device) -> Denoise:
        def denoise(noisy: torch.Tensor, sigma: Sigma) -> Posterior:
            if self.fault == "place":
                noisy.clamp_(0, 1)
            if self.fault == "axes" and noisy.ndim == 5:
                noisy = noisy.flip(1).clone()
                noisy[:, 1] = 0
            mean = noisy.double() if self.fault == "dtype" else noisy
            if self.fault == "first level":
                mean = mean / (1 + torch.as_tensor(sigma).reshape(-1)[0].float())
            if self.fault == "clip" and self.clip:
                return Posterior(mean.sigmoid())
            return Posterior(mean.clamp(0, 1) if self.clip else mean)

        return denoise


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "do not increase"),
        ("flat", "do not increase"),
        ("place", "in place"),
        ("axes", "leading axes"),
        ("dtype", "float64"),
        ("first level", "order of the images|images beside"),
        ("clip", "more than clamp"),
    ],
)
def test_denoisers(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        testing.check_denoiser(Odd(fault=fault))
    testing.check_denoiser(Odd(fault=""))


class Network(torch.nn.Module):
    """A linear network with a fault of choice."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.weight = torch.nn.Parameter(torch.ones(4, 64))
        self.calls = torch.nn.Buffer(torch.zeros(1))
        if fault == "random weights":
            torch.nn.init.normal_(self.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.fault == "counts":
            self.calls.add_(1)
        if self.fault == "dropout":
            images = torch.nn.functional.dropout(images, training=True)
        if self.fault == "batch norm":
            images = images - images.mean(dim=0)
        if self.fault == "position":
            images = images + torch.arange(len(images))[:, None, None, None]
        return images.flatten(1) @ self.weight.T


class Strange(Checkpoint):
    """A checkpoint with a fault of choice."""

    kind: Literal["strange"] = "strange"
    classes: int = 4
    fault: str
    path: Location = ""

    def contents(self) -> str:
        if self.fault == "unread" or not self.path:
            return ""
        return self.path if self.fault == "moved" else sha256(Path(self.path))

    def load(self) -> torch.nn.Module:
        return Network(self.fault)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("random weights", "other weights each time"),
        ("counts", "changes its own weights or buffers"),
        ("dropout", "other logits the second time|global random"),
        ("batch norm", "images beside"),
        ("position", "order of the images"),
        ("unread", "goes unnoticed"),
        ("moved", "depends on where"),
    ],
)
def test_checkpoints(fault: str, message: str, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(8)}, tmp_path / "weights.safetensors")
    path = str(tmp_path / "weights.safetensors")
    with rng.seeded(0), pytest.raises(AssertionError, match=message):
        testing.check_checkpoint(Strange(id="s", fault=fault, path=path))
    testing.check_checkpoint(Strange(id="s", fault="", path=path))


class Doubtful(Dataset):
    """A dataset with a fault of choice."""

    kind: Literal["doubtful"] = "doubtful"
    name: str = "doubtful"
    fault: str

    def contents(self) -> str:
        return "made up"

    def open(self) -> Images:
        whole = torch.arange(8.0)[:, None, None, None].expand(8, 1, 8, 8) / 8
        images = whole.double() if self.fault == "dtype" else whole.contiguous()
        opened = COUNTER.setdefault(self.fault, 0)
        COUNTER[self.fault] += self.fault == "ids"
        ids = ["0"] if self.fault == "thinned" and self.every > 1 else [f"{row + opened}" for row in range(8)]

        def read(rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            if self.fault == "numpy":
                np.random.rand()  # noqa: TID251
            if self.fault == "alias" and list(rows) == list(range(len(rows))):
                return images[: len(rows)], torch.tensor(rows)
            index = torch.tensor(sorted(rows) if self.fault == "order" else list(rows))
            return images[index], index

        return Images(ids, read)


COUNTER: dict[str, int] = {}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dtype", "float64"),
        ("ids", "change when it is opened again"),
        ("numpy", "global random generator"),
        ("alias", "read again"),
        ("order", "order in which they are read"),
        ("thinned", "every 2nd image"),
    ],
)
def test_datasets(fault: str, message: str) -> None:
    with rng.seeded(0), pytest.raises(AssertionError, match=message):
        testing.check_dataset(Doubtful(fault=fault))
    testing.check_dataset(Doubtful(fault=""))
