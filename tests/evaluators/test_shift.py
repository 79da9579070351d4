"""The shift evaluator against an independent loop, and its figures by hand."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.evaluators.shift import Shift
from robustbench_diffaug.records import Declared, Metric, Records


def observed(evaluator: Shift, batch: Batch) -> dict[str, torch.Tensor]:
    model = Bayes(id="b", classes=4, temperature=0.0016).loaded(batch.limits)
    seen: dict[str, list[dict[str, torch.Tensor]]] = {}
    for view in evaluator.views(batch):
        seen.setdefault(view.name, []).append(dict(evaluator.observe(model, view, batch)))
    return dict(evaluator.record(seen, batch))


def a_batch() -> Batch:
    source = Mixture(size=12).opened()
    images, labels = source.read(range(12))
    return Batch("m", tuple(source.ids), images, labels, 7, Limits())


def test_ensemble_is_the_published_loop_on_the_same_noise() -> None:
    times, denoiser, batch = (0, 50, 100, 150), MixtureDenoiser(), a_batch()
    evaluator = Shift(modes=("default", "de"), denoiser=denoiser, times=times)
    rows = observed(evaluator, batch)
    model = Bayes(id="b", classes=4, temperature=0.0016).loaded(batch.limits)
    denoise = denoiser.loaded(batch.limits)
    probabilities = torch.zeros(12, 4, dtype=torch.float64)
    for count, t in enumerate(times, start=1):
        images = batch.images
        if t:
            (noise,) = batch.noise(f"shift/t={t}", range(1))
            images = denoise(images + denoiser.sigma(t) * noise[:, 0], denoiser.sigma(t)).mean
        single = torch.softmax(model.logits(images).double(), dim=1)
        probabilities += single
        mean = probabilities / count
        assert torch.equal(rows["t_pred"][:, count - 1], single.argmax(1).int())
        assert torch.equal(rows["de_pred"][:, count - 1], mean.argmax(1).int())
        assert torch.allclose(rows["de_confidence"][:, count - 1], mean.max(1).values, rtol=1e-12)
        entropy = -(single * single.clamp_min(1e-300).log()).sum(1)
        assert torch.allclose(rows["t_entropy"][:, count - 1], entropy, atol=1e-12)
    assert torch.equal(rows["pred"], rows["t_pred"][:, 0])


def test_without_time_zero_the_image_is_no_member() -> None:
    evaluator = Shift(modes=("de",), denoiser=MixtureDenoiser(), times=(100,))
    rows = observed(evaluator, a_batch())
    assert torch.equal(rows["t_entropy"], rows["de_entropy"])
    assert not torch.equal(rows["entropy"], rows["de_entropy"][:, 0])
    assert evaluator.forwards() == (1, 2)


def figures(hits: dict[str, list[int]], declared: tuple[Declared, ...]) -> dict[str, Metric]:
    names = [(dataset, str(i), hit) for dataset, row in hits.items() for i, hit in enumerate(row)]
    columns = {
        "dataset": np.array([name for name, _, _ in names]),
        "origin": np.array(["base"] * len(names)),
        "sample": np.array([sample for _, sample, _ in names]),
        "label": np.zeros(len(names), dtype=np.int64),
        "pred": np.array([1 - hit for _, _, hit in names]),
        "confidence": np.full(len(names), 0.9),
        "entropy": np.full(len(names), 0.1),
    }
    return {figure.name: figure for figure in Shift().metrics(Records(columns, declared))}


def test_accuracies_by_hand() -> None:
    declared = (
        Declared("c", "base", "clean", 0, 4, 40),
        Declared("fog3", "base", "fog", 3, 4, 40),
        Declared("fog5", "base", "fog", 5, 4, 40),
        Declared("gn5", "base", "gaussian_noise", 5, 4, 40),
    )
    found = figures({"c": [1, 1, 1, 0], "fog3": [1, 1, 0, 0], "fog5": [1, 0, 0, 0], "gn5": [0, 0, 0, 0]}, declared)
    assert found["accuracy/clean"].value == 0.75
    assert found["accuracy/fog@s3"].value == 0.5
    assert found["accuracy/fog@s5"].value == 0.25
    assert found["accuracy/fog"].value == pytest.approx(0.375)
    assert found["accuracy/mean"].value == pytest.approx(3 / 12)
    assert found["accuracy/mean-noise"].value == 0
    assert found["accuracy/mean-noise"].high > 0.3  # four images, none right: nothing is certain
    assert (found["accuracy/mean"].n, found["accuracy/mean"].n_available) == (4, 40)
    assert found["accuracy/clean"].headline
    assert all(figure.complete for figure in found.values())


def test_missing_datasets_make_means_incomplete() -> None:
    declared = (Declared("fog5", "base", "fog", 5, 2, 2), Declared("gn5", "base", "gaussian_noise", 5, 2, 2))
    found = figures({"fog5": [1, 0]}, declared)
    assert found["accuracy/fog@s5"].complete
    assert not found["accuracy/mean"].complete
    assert "accuracy/mean-noise" not in found


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="needs a denoiser"):
        Shift(modes=("de",))
    with pytest.raises(ValidationError, match="increase"):
        Shift(times=(50, 0))
    with pytest.raises(ValueError, match="outside the schedule"):
        Shift(modes=("de",), denoiser=MixtureDenoiser(), times=(0, 1000)).check()
