"""The conformance suite catches the faults that are harder to see: state, aliases, files, markers."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from robustbench_diffaug import rng, testing
from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints import base
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Component, Outside
from robustbench_diffaug.data.base import Dataset, Images
from robustbench_diffaug.diffusion.base import Denoise, Denoiser, Posterior, Schedule, Sigma
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.files import Location, sha256
from robustbench_diffaug.outcomes import Basis, Key, Rows
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
        if self.fault == "half":
            columns["confidence"] = columns["confidence"].bfloat16()
        if self.fault == "more columns" and len(batch.ids) == 1:
            columns["more"] = columns["hit"]
        if self.fault == "another type" and len(batch.ids) == 3:
            columns["confidence"] = columns["confidence"].double()
        if self.fault == "another shape" and len(batch.ids) == 1:
            columns["confidence"] = columns["confidence"][:, None]
        if self.fault == "labels":
            batch.labels.zero_()
        if self.fault == "mode":
            model.network.train()
        if self.fault == "weights":
            next(model.network.parameters()).mul_(2)
        LOOKED[:] = [model.id]
        return {**columns, "label": batch.labels} if self.fault == "label" else columns

    def metrics(self, records: Records) -> Iterable[Metric]:
        if self.fault == "empty":
            assert records["hit"].any()
        if len(records):
            hit = records.metric("hit", "all", proportion(records["hit"]))
            yield replace(hit, complete=True) if self.fault == "complete" else hit
            if self.fault == "remembers":
                yield Metric("odd", "all", float(LOOKED == ["a"]), complete=False)
            if self.fault == "half an interval":
                yield Metric("odd", "all", 0.5, 0.4, complete=False)
            if self.fault == "infinite":
                yield Metric("odd", "all", float("inf"), complete=False)
            if self.fault == "resampled":
                yield Metric("odd", "all", random.random(), complete=False)

    def outcomes(self, records: Records) -> Mapping[Key, Basis]:
        values = records["hit"] if self.fault != "outcomes" else ~records["hit"]
        name = "miss" if self.fault == "outcome of nothing" else "hit"
        return {(name, "all"): Rows(records).outcomes(values)}

    def forwards(self) -> Forwards:
        return Forwards(0, 1)


LOOKED: list[str] = []


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Networks that a fault spoilt are loaded anew."""
    base._loaded.cache_clear()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("half", "confidence of sound is of torch.bfloat16, which a record cannot hold"),
        ("more columns", "depends on batches of 1: the columns of sample"),
        ("another type", "depends on batches of 3: column confidence"),
        ("another shape", "depends on batches of 1: column confidence"),
        ("labels", "changes the images or labels of the batch in place"),
        ("mode", "changes the weights, buffers or mode of a network"),
        ("weights", "changes the weights, buffers or mode of a network"),
        ("empty", "fails on no records"),
        ("complete", "complete with a sample missing"),
        ("remembers", "after another checkpoint was looked at; they are of records alone"),
        ("half an interval", "half an interval"),
        ("outcomes", r"outcomes\) has the mean"),
        ("outcome of nothing", "says what miss of all rests on, and has no such metric"),
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


class Unsendable(Component):
    kind: Literal["unsendable"] = "unsendable"

    def __reduce__(self) -> Any:
        raise TypeError("a lock cannot be pickled")


class Replaced(Component):
    kind: Literal["replaced"] = "replaced"
    value: int = 0

    def __reduce__(self) -> Any:
        return Replaced, ()


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
        (Unsendable(), "unsendable cannot be sent to another process, as --workers does: a lock cannot"),
        (Replaced(value=1), "replaced is another value in another process"),
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
        if self.fault == "detached":
            images = images.detach()
        if self.fault == "infinite gradient":
            images = (images - images.detach()).sqrt()
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

    def takes(self) -> int | None:
        return 2 if self.fault == "channels" else None

    def fits(self, height: int, width: int) -> None:
        if self.fault == "size":
            raise ValueError(f"9x9 alone, not {width}x{height}")

    def load(self) -> torch.nn.Module:
        return Network(self.fault)


class Black(Strange):
    """Its networks have no gradient, and it says so."""

    differentiable: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("random weights", "other weights each time"),
        ("counts", "changes its own weights or buffers"),
        ("dropout", "other logits the second time|global random"),
        ("batch norm", "images beside"),
        ("position", "order of the images"),
        ("channels", "says that it takes images of 2 channels, not of 1"),
        ("size", "s does not take what it is checked on: 9x9 alone, not 8x8"),
        ("detached", "have no gradient; if they cannot, set differentiable = False"),
        ("infinite gradient", "gradient of the logits of s is not finite"),
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
    if fault == "detached":
        testing.check_checkpoint(Black(id="s", fault=fault, path=path))


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

        return Images(ids, read, labels=list(range(1, 9)) if self.fault == "told" else None)

    def covers(self) -> tuple[int, ...]:
        return {"covers": (0, 1, 2), "order of classes": (1, 0)}.get(self.fault, ())


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
        ("told", "tells other labels"),
        ("covers", "has the label 3, which is not among the classes that it covers"),
        ("order of classes", "covers do not increase"),
    ],
)
def test_datasets(fault: str, message: str) -> None:
    with rng.seeded(0), pytest.raises(AssertionError, match=message):
        testing.check_dataset(Doubtful(fault=fault))
    testing.check_dataset(Doubtful(fault=""))
