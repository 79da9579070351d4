"""Guided generation: labels without images, classifiers that lead a denoiser, and what their records say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from robustbench_diffaug import rng, runs
from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.data.labels import Labels
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.base import Schedule
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.evaluators.generation import Generation
from robustbench_diffaug.mixture import MixtureSpec
from robustbench_diffaug.records import Declared, Metric, Records
from robustbench_diffaug.samples import frechet, neighbourhoods
from robustbench_diffaug.stats import proportion
from robustbench_diffaug.suite import load
from robustbench_diffaug.testing import check_dataset, check_evaluator

SPEC = MixtureSpec(classes=4, size=8)
BAYES = Bayes(id="bayes", classes=4, temperature=SPEC.spread**2)
DENOISER = MixtureDenoiser(schedule=Schedule(steps=50), microbatch=5)


def generation(**fields: Any) -> Generation:
    rest = {"features": BAYES, "judge": BAYES.model_copy(update={"id": "judge"}), "through": "denoised", "steps": 12}
    return Generation.model_validate({"denoiser": DENOISER, "scales": (0.0, 1.0), **rest, **fields})


def batch_of(dataset: Labels | Mixture, rows: range) -> Batch:
    source = dataset.opened()
    images, labels = source.read(list(rows))
    return Batch(dataset.name, tuple(source.ids[row] for row in rows), images, labels, 0, Limits())


def observed(evaluator: Generation, model: Model, batch: Batch) -> Mapping[str, torch.Tensor]:
    (view,) = evaluator.views(batch)
    return evaluator.observe(model, view, batch)


def test_labels_are_blank_images_of_each_class_in_turn() -> None:
    labels = Labels(classes=3, each=4, size=5, channels=2)
    check_dataset(labels)
    images, found = labels.opened().read([0, 1, 5, 11])
    assert images.shape == (4, 2, 5, 5)
    assert not images.any()
    assert found.tolist() == [0, 1, 2, 2]
    more = Labels(classes=7, each=9, size=5).opened()
    assert {f"{label}-{index}" for label in range(3) for index in range(4)} == set(labels.opened().ids)
    assert set(labels.opened().ids) < set(more.ids)


def test_it_conforms() -> None:
    check_evaluator(generation(steps=2), Labels(name="check", classes=4, each=1, size=8))


def test_a_classifier_leads_images_to_the_class_asked_for() -> None:
    labels = Labels(classes=4, each=4, size=8)
    for sampler in ("ancestral", "ddim"):
        found = observed(generation(sampler=sampler, steps=25), BAYES.loaded(Limits()), batch_of(labels, range(16)))
        asked = torch.arange(16) % 4
        right = (found["probabilities"].argmax(dim=2) == asked[:, None]).float().mean(dim=0)
        assert right[0] < 0.6  # of four classes, by chance
        assert right[1] > 0.9


def test_images_seen_are_those_kept_and_only_the_scale_differs() -> None:
    batch, model = batch_of(Labels(classes=4, each=2, size=8), range(8)), BAYES.loaded(Limits())
    found = observed(generation(), model, batch)
    assert found["made"].dtype == torch.uint8
    logits, features = model.features(found["made"].flatten(0, 1) / 255)
    assert torch.equal(features, found["features"].flatten(0, 1))
    assert torch.equal(logits.softmax(dim=1), found["probabilities"].flatten(0, 1))
    other = Bayes(id="tilted", classes=4, temperature=0.01, tilt=3.0).loaded(Limits())
    beside = observed(generation(scales=(2.0, 0.0)), other, batch)
    assert torch.equal(beside["made"][:, 1], found["made"][:, 0])  # without guidance it is nobody's
    assert not torch.equal(beside["made"][:, 0], found["made"][:, 1])
    real = batch_of(Mixture(name="real", size=6), range(6))
    shown = observed(generation(real="real"), model, real)
    assert torch.equal(shown["made"][:, 1], (real.images * 255).round().to(torch.uint8))
    assert torch.equal(shown["features"][:, 0], shown["features"][:, 1])


def test_noisy_classifiers_see_the_noisy_image_and_its_twin() -> None:
    seen: list[torch.Tensor] = []

    class Watched(torch.nn.Module):
        def forward(self, planes: torch.Tensor) -> torch.Tensor:
            seen.append(planes.detach())
            return planes.flatten(1)[:, :4]

    batch = batch_of(Labels(classes=4, each=1, size=8), range(4))
    for wants, count in ((("sigma",), 2), (("sigma", "denoised"), 3)):
        model = Model("noisy", Watched(), torch.nn.Identity(), 4, 5, wants=wants)  # type: ignore[arg-type]
        observed(generation(scales=(1.0,), through=None), model, batch)
        assert seen[-1].shape == (5, count, 8, 8)
    assert float(seen[-1][0, 2, 0, 0]) == pytest.approx(np.log(2 * DENOISER.sigma(0)) / 4, rel=1e-5)
    x = (seen[-1][:4, :1] * (1 + 4 * DENOISER.sigma(0) ** 2) ** 0.5 + 1) / 2
    twin = DENOISER.load(torch.device("cpu"))(x, DENOISER.sigma(0)).mean
    assert torch.allclose((seen[-1][:4, 1:2] + 1) / 2, twin, atol=1e-5)


def records_of(name: str, real: int = 40, made: int = 30, shift: float = 0.5) -> Records:
    """Records as two datasets leave them, with features of three numbers."""
    count = real + made
    normals = rng.normal(rng.key("test", name), range(1), (count, 2, 3))[0]
    normals[:real] = normals[:real, :1]
    normals[real:, 1] += shift
    spread = np.exp(rng.normal(rng.key("test", name, "logits"), range(1), (count, 2, 4))[0])
    pixels = (rng.uniform(rng.key("test", "pixels"), range(1), (count, 2, 1, 2, 2))[0] * 255).astype(np.uint8)
    columns = {
        "dataset": np.array(["real"] * real + ["labels"] * made),
        "origin": np.array(["real"] * real + ["labels"] * made),
        "sample": np.array([f"{row:03d}" for row in range(count)]),
        "label": np.arange(count) % 4,
        "features": normals,
        "probabilities": (spread / spread.sum(axis=2, keepdims=True)).astype(np.float32),
        "made": pixels,
    }
    declared = (Declared("real", "real", "real", 0, real, 99), Declared("labels", "labels", "labels", 0, made, made))
    return Records(columns, declared)


def test_metrics_are_those_of_the_columns() -> None:
    records, evaluator = records_of("a"), generation(real="real", neighbours=3, resamples=100)
    found = {figure.name: figure for figure in evaluator.metrics(records)}
    for index, scale in enumerate((0, 1)):
        real, made = records["features"][:40, 0], records["features"][40:, index]
        assert found[f"frechet@scale={scale}"].value == pytest.approx(frechet(real, made))
        assert found[f"frechet@scale={scale}"].group == "bayes"
        for name, values in neighbourhoods(real, made, 3)._asdict().items():
            figure = found[f"{name}@scale={scale}"]
            assert figure.value == pytest.approx(values.mean())
            assert figure.n == len(values)
        right = records["probabilities"][40:, index].argmax(axis=1) == records["label"][40:]
        agreement = found[f"agreement@scale={scale}"]
        assert (agreement.value, agreement.low, agreement.high, agreement.n) == tuple(proportion(right))
        assert agreement.group == "judge"
    assert {name for name, figure in found.items() if figure.headline} == {"agreement@scale=1", "frechet@scale=1"}
    assert {"agreement/real", "score/real", "score@scale=1"} < set(found)
    assert all(figure.low <= figure.value <= figure.high and figure.complete for figure in found.values())
    assert found["frechet@scale=1"].better == "lower"


def test_without_enough_real_images_the_judge_alone_is_heard() -> None:
    evaluator = generation(real="real", neighbours=3, resamples=100)
    few = records_of("few", real=3)
    assert {figure.group for figure in evaluator.metrics(few)} == {"judge"}
    assert "too few" in next(iter(evaluator.notices(few)))
    assert "no FID" in next(iter(evaluator.notices(records_of("a"))))
    assert not list(evaluator.metrics(records_of("none", made=0)))


def test_gains_are_differences_over_the_same_rows() -> None:
    one, other = records_of("a", shift=0.1), records_of("a", shift=1.0)
    evaluator = generation(real="real", neighbours=3, resamples=100, gains={"one": "other"})
    pairs = list(evaluator.compare(["one", "other"], {"one": one, "other": other}.__getitem__))
    assert {id for id, _ in pairs} == {"one"}
    found: dict[str, Metric] = {figure.name: figure for _, figure in pairs}
    values = [{figure.name: figure.value for figure in evaluator.metrics(each)} for each in (one, other)]
    for name in ("agreement", "frechet", "precision", "recall", "density", "coverage"):
        gain = found[f"gain/{name}@scale=1"]
        assert gain.value == pytest.approx(values[0][f"{name}@scale=1"] - values[1][f"{name}@scale=1"])
        assert gain.low <= gain.value <= gain.high
    assert found["gain/frechet@scale=1"].high < 0
    assert found["gain/frechet@scale=1"].better == "lower"
    assert not [name for name in found if name.endswith("scale=0")]  # the same images


def test_pictures_are_the_first_images_of_each_class() -> None:
    records, evaluator = records_of("a"), generation(real="real")
    found = {picture.name: picture for picture in evaluator.pictures(records)}
    assert set(found) == {"made.scale-0", "made.scale-1", "real"}
    tiles = found["made.scale-1"].tiles
    assert tiles is not None
    assert tiles.shape == (4, 7, 2, 2, 1)  # 30 rows of four classes, at least seven of each
    rows = [row for row in range(40, 70) if row % 4 == 2]
    assert np.array_equal(tiles[2, 1], records["made"][rows[1], 1].transpose(1, 2, 0))
    assert found["made.scale-1"].down == ("class 0", "class 1", "class 2", "class 3")
    assert not list(generation(keep_images=False).pictures(records))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scales": (1.0, 1.0)}, "give each once"),
        ({"scales": (1e-7,)}, "at most four decimals"),
        ({"scales": (0.0,)}, "asks no classifier"),
        ({"judge": Bayes(id="n", classes=4, wants=("sigma",))}, "judge looks at made images"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        generation(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": 50}, "the denoiser's last time is 49"),
        ({"start": 5}, "steps is 12; there are 6 times"),
    ],
)
def test_times_must_be_the_denoisers(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generation(**fields).check()
    generation(start=20).check()


@pytest.mark.parametrize(
    ("fields", "datasets", "message"),
    [
        ({"real": "reel"}, "real labels", "did you mean real"),
        ({}, "real labels", "one dataset of labels"),
        ({"real": "real"}, "real", "one dataset of labels"),
        ({"real": "real", "gains": {"a": "c"}}, "real labels", "gains names checkpoint 'c'"),
        ({"real": "real"}, "real large", "different shapes"),
        ({}, "large", "makes images of size 8"),
    ],
)
def test_benches_that_do_not_fit_are_refused(fields: dict[str, Any], datasets: str, message: str) -> None:
    known = {
        "real": Mixture(name="real"),
        "labels": Labels(classes=4, each=1, size=8),
        "large": Labels(name="large", classes=4, each=1, size=9),
    }
    with pytest.raises(ValueError, match=message):
        generation(**fields).fits([known[name] for name in datasets.split()], ["a", "b"])
    generation(real="real", gains={"a": "b"}).fits([known["real"], known["labels"]], ["a", "b"])


def test_who_cannot_guide_is_named() -> None:
    batch, model = batch_of(Labels(classes=4, each=1, size=8), range(4)), BAYES.loaded(Limits())
    with pytest.raises(ValueError, match="bayes classifies images without noise; give through: denoised"):
        observed(generation(through=None), model, batch)

    class Probabilities(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :4].softmax(dim=1)

    class Steps(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :4].detach().round()

    for network, message in ((Probabilities(), "odd returns probabilities"), (Steps(), "odd is not differentiable")):
        with pytest.raises(ValueError, match=message):
            observed(generation(), Model("odd", network, torch.nn.Identity(), 4, 5), batch)
    with pytest.raises(ValueError, match="the judge knows 4 classes"):
        observed(generation(), model, batch_of(Labels(classes=5, each=1, size=8), range(5)))


SUITE = """
name: made
checkpoints:
  - {kind: mixture, id: guide, classes: 4, temperature: 0.0016}
benches:
  - name: generation
    evaluator:
      kind: generation
      denoiser: {kind: mixture, schedule: {steps: 25}}
      scales: [0, 1]
      steps: 5
      through: denoised
      features: &bayes {kind: mixture, id: bayes, classes: 4}
      judge: *bayes
      real: real
      neighbours: 2
      resamples: 100
    datasets:
      - {kind: labels, classes: 4, each: 2, size: 8}
      - {kind: mixture, name: real, size: 8}
"""


def test_a_run_leaves_figures_and_pictures(tmp_path: Path) -> None:
    path = tmp_path / "made.yaml"
    path.write_text(SUITE)
    done = runs.execute(load(str(path)), runs.Options(tmp_path / "run"))
    assert not done.failures
    assert {"frechet@scale=1", "coverage@scale=0", "agreement@scale=1"} < set(done.metrics["metric"])
