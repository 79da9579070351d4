"""A look at classifiers before a run: its arithmetic is exact, and it stops what should be stopped alone."""

from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustbench_diffaug import gate as gates
from robustbench_diffaug import rng
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.data.base import Dataset, Images, in_memory
from robustbench_diffaug.data.embedded import Mnist5k
from robustbench_diffaug.engine import Task, plan
from robustbench_diffaug.evaluators.shift import Shift
from robustbench_diffaug.files import Weights
from robustbench_diffaug.gate import contradicted, gate, no_better_than_chance, samples
from robustbench_diffaug.store import Store
from robustbench_diffaug.suite import Bench, Suite

THOUSANDTH = Fraction(1, 1000)


def exactly(count: int, shown: int, p: Fraction) -> Fraction:
    return comb(shown, count) * p**count * (1 - p) ** (shown - count)


@settings(max_examples=80)
@given(shown=st.integers(1, 64), share=st.floats(0, 1), classes=st.integers(2, 1000))
def test_chance_is_that_of_the_binomial_distribution(shown: int, share: float, classes: int) -> None:
    right = round(share * shown)
    tail = sum(exactly(count, shown, Fraction(1, classes)) for count in range(right, shown + 1))
    could_tell = Fraction(1, classes) ** shown <= THOUSANDTH
    assert no_better_than_chance(right, shown, classes) == (could_tell and tail > THOUSANDTH)


@settings(max_examples=80)
@given(shown=st.integers(1, 64), share=st.floats(0, 1), percent=st.integers(1, 100))
def test_what_is_expected_is_contradicted_by_the_lower_tail_alone(shown: int, share: float, percent: int) -> None:
    right = round(share * shown)
    tail = sum(exactly(count, shown, Fraction(percent, 100)) for count in range(right + 1))
    assert contradicted(right, shown, percent / 100) == (tail < THOUSANDTH)


def test_examples() -> None:
    assert contradicted(11, 64, 0.95)
    assert not contradicted(57, 64, 0.95)  # P = 0.032
    assert not contradicted(64, 64, 0.5)
    assert contradicted(63, 64, 1.0)
    assert no_better_than_chance(14, 64, 10)  # P = 0.0024
    assert not no_better_than_chance(16, 64, 10)  # P = 0.0003
    assert not no_better_than_chance(0, 2, 10)  # two images cannot tell


class Answers(nn.Module):
    """Logits by what is asked for, of the mean of an image alone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.anything = how, nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        label = (images.flatten(1)[:, 0] * 10).round().long().clamp(0, 9)
        right = 9 * nn.functional.one_hot(label, 10).float() + images.flatten(1)[:, 1:2].expand(-1, 10) / 100
        right[:, 0] += 1e-2
        if self.how == "broken":
            raise RuntimeError("broken")
        if self.how == "nan":
            return right / 0
        return {
            "right": right,
            "shifted": right.roll(1, dims=1),
            "probabilities": right.softmax(dim=1),
            "constant": 0 * right,
            "log": right.log_softmax(dim=1),
        }[self.how]


class Answering(Checkpoint):
    kind: str = "answering"
    how: str
    weights: Weights | None = None

    def load(self) -> nn.Module:
        return Answers(self.how)


class Coded(Dataset):
    """Images of one value, a tenth of their label; the labels come in order, or there are none."""

    kind: str = "coded"
    labelled: bool = True

    def contents(self) -> str:
        return "coded"

    def open(self) -> Images:
        labels = torch.arange(10).repeat_interleave(40)
        images = (labels.float() / 10)[:, None, None, None].expand(-1, 1, 4, 4)
        return in_memory([f"{row}" for row in range(400)], images, labels if self.labelled else 0 * labels - 1)


def looked_at(tmp_path: Path, *datasets: Dataset, **fields: Any) -> tuple[str, ...]:
    entry = Answering.model_validate({"id": "net", "classes": 10} | fields)
    bench = Bench(name="b", evaluator=Shift(modes=("default",)), datasets=datasets or (Coded(name="coded"),))
    suite = Suite(name="s", checkpoints=(entry,), benches=(bench,))
    return gate(suite, tasks_of(suite, tmp_path), Limits())


def tasks_of(suite: Suite, folder: Path) -> list[Task]:
    return list(plan(suite, Store(folder), Limits()))


def test_what_is_stopped(tmp_path: Path) -> None:
    assert looked_at(tmp_path, how="right") == ()
    assert looked_at(tmp_path, how="right", expect_accuracy=0.98) == ()
    told = "checkpoint net: 0 of 64 images of coded right where expect_accuracy is 0.95, and class . predicted for"
    with pytest.raises(ValueError, match=told):
        looked_at(tmp_path, how="shifted", expect_accuracy=0.95)
    (warning,) = looked_at(tmp_path, how="shifted")
    assert warning.startswith("checkpoint net: 0 of 64 images of coded right, which chance might give")
    with pytest.raises(ValueError, match="checkpoint net: the network returns probabilities"):
        looked_at(tmp_path, how="probabilities")
    with pytest.raises(ValueError, match="checkpoint net: the network returns the same for 64 different images"):
        looked_at(tmp_path, how="constant")
    (warning,) = looked_at(tmp_path, how="log")
    assert "log-probabilities" in warning


def test_what_is_left_to_the_run(tmp_path: Path) -> None:
    assert looked_at(tmp_path, how="broken") == looked_at(tmp_path, how="nan", expect_accuracy=0.9) == ()


def test_what_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    logits = Model.logits

    def counted(model: Model, images: Tensor) -> Tensor:
        shown.append(len(images))
        return logits(model, images)

    monkeypatch.setattr(Model, "logits", counted)
    looked_at(tmp_path, how="right")
    assert shown.pop() == 64
    looked_at(tmp_path, how="right", wants=("sigma",))
    zoo = {"uri": "rdiff:zoo/resnet-standard.safetensors"}
    looked_at(tmp_path, how="shifted", weights=zoo)
    looked_at(tmp_path, Coded(name="unlabelled", labelled=False), how="shifted")
    looked_at(tmp_path, Coded(name="fog", severity=3), Coded(name="version", origin="coded"), how="shifted")
    entry = Answering(id="net", classes=10, how="shifted")
    bench = Bench(name="b", evaluator=Shift(modes=("default",)), datasets=(Coded(name="coded"),))
    assert gate(Suite(name="s", checkpoints=(entry,), benches=(bench,)), [], Limits()) == ()
    assert shown == []
    looked_at(tmp_path, how="right", weights=zoo, expect_accuracy=0.9)
    looked_at(tmp_path, Coded(name="fog", severity=3), Coded(name="coded"), how="right")
    assert shown == [64, 64]


def test_the_images_are_of_the_whole_dataset_whatever_is_declared() -> None:
    images, labels = samples(Coded(name="coded"))
    assert len(set(labels.tolist())) == 10  # though they come in order
    few, same = samples(Coded(name="coded", limit=3, every=2))
    assert torch.equal(few, images)
    assert torch.equal(same, labels)
    assert len(samples(Mnist5k(digits=(1, 2)))[0]) == gates.SHOWN
    other, _ = samples(Coded(name="other"))
    assert not torch.equal(other, images)


def test_only_classes_that_the_dataset_covers_are_predicted(tmp_path: Path) -> None:
    class Few(Coded):
        kind: str = "few"

        def covers(self) -> tuple[int, ...]:
            return (0, 1)

        def open(self) -> Images:
            labels = torch.arange(400) % 2
            images = torch.from_numpy(rng.uniform(rng.key("few"), range(400), (1, 4, 4))).float()
            images[:, :, 0, 0] = 0.5  # class 5, after which class 0 is the likeliest of the two
            return in_memory([f"{row}" for row in range(400)], images, labels)

    (warning,) = looked_at(tmp_path, Few(name="few"), how="right")
    assert "and class 0 predicted for 64" in warning
    (warning,) = looked_at(tmp_path, Few(name="few", class_space="full"), how="right")
    assert "0 of 64" in warning
    assert "and class 5 predicted for 64" in warning
