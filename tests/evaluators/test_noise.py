"""The noise evaluator: closed forms of a Gaussian mixture, the shift evaluator beside it, and figures by hand."""

from collections.abc import Hashable
from math import log, sqrt

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import chisquare, norm
from torch import Tensor, nn

from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.checkpoints.conditioning import Want
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.base import Denoiser, Schedule
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.evaluators.noise import Noise
from robustbench_diffaug.evaluators.shift import Shift
from robustbench_diffaug.mixture import MixtureSpec
from robustbench_diffaug.records import Declared, Metric, Records, from_table, to_table
from robustbench_diffaug.report import glossary, sections
from robustbench_diffaug.testing import check_evaluator

TWO = MixtureSpec(classes=2, size=4, spread=0.05, contrast=0.2)
FOUR = MixtureSpec(size=4)


def a_batch(spec: MixtureSpec, size: int, limits: Limits = Limits(), start: int = 0) -> Batch:  # noqa: B008
    source = Mixture(spec=spec, size=start + size).opened()
    images, labels = source.read(range(start, start + size))
    return Batch("m", tuple(source.ids[start:]), images, labels, 5, limits)


def rows_of(evaluator: Noise | Shift, model: Model, batch: Batch) -> dict[str, Tensor]:
    seen = {view.name: [evaluator.observe(model, view, batch)] for view in evaluator.views(batch)}
    return dict(evaluator.record(seen, batch))


def figures_of(evaluator: Noise, model: Model, batch: Batch) -> tuple[Records, dict[str, Metric]]:
    count = len(batch.ids)
    declared = Declared("m", "m", "clean", 0, count, count)
    columns = from_table(to_table(batch, declared, rows_of(evaluator, model, batch)))
    records = Records(columns, (declared,), 5, evaluator.constants(model))
    return records, {figure.name: figure for figure in evaluator.metrics(records)}


class Posterior(nn.Module):
    """The exact posterior of a noised mixture, from the planes that a network which wants the level is shown."""

    def __init__(self, spec: MixtureSpec) -> None:
        super().__init__()
        self.means, self.variance = spec.means(), spec.spread**2

    def forward(self, planes: Tensor) -> Tensor:
        doubled = (4 * planes[:, -1:].double()).exp()
        images = (planes[:, :1].double() * (1 + doubled**2).sqrt() + 1) / 2
        squares = (images[:, None] - self.means).square().sum(dim=(2, 3, 4))
        return -squares / (2 * (self.variance + doubled[:, :, 0, 0] ** 2 / 4))


def informed(spec: MixtureSpec, wants: tuple[Want, ...] = ("sigma",)) -> Model:
    return Model("informed", Posterior(spec), lambda images: images, spec.classes, 64, wants=wants)


def test_it_conforms() -> None:
    denoiser = MixtureDenoiser()
    check_evaluator(Noise(denoiser=denoiser, times=(0, 300), random_time=True))
    check_evaluator(Noise(look="denoised", denoiser=denoiser, times=(0, 300)))


def test_accuracy_of_the_bayes_classifier_is_the_closed_form() -> None:
    """For two classes with means m and n, P(right) at noise s is Phi(|m - n| / 2 sqrt(spread^2 + s^2))."""
    count, schedule = 500, Schedule()
    denoiser = MixtureDenoiser(spec=TWO, schedule=schedule)
    evaluator = Noise(denoiser=denoiser, times=(100, 300, 600), random_time=True)
    model = Bayes(id="b", classes=2, spec=TWO).loaded(Limits())
    _, found = figures_of(evaluator, model, a_batch(TWO, count))
    first, second = TWO.means()
    half = float((first - second).norm()) / 2
    exact = norm.cdf(half / np.sqrt(TWO.spread**2 + schedule.sigmas() ** 2))
    for t in evaluator.times:
        error = 4 * sqrt(exact[t] * (1 - exact[t]) / count)
        assert found[f"noisy/accuracy@t={t}"].value == pytest.approx(exact[t], abs=error)
    mean = float(exact.mean())  # the time is uniform over the schedule
    accuracy = found["noisy/random-time/accuracy/clean"]
    assert accuracy.value == pytest.approx(mean, abs=4 * sqrt(mean * (1 - mean) / count))
    assert accuracy.headline and accuracy.n == count
    assert exact[100] > 0.9 and 0.6 < mean < 0.9 and exact[600] < 0.7  # the check has something to tell apart


def test_an_exact_posterior_is_calibrated_at_every_level() -> None:
    """E[-ln p(y | x)] is E[H(p(. | x))] for the posterior itself; any other level or scale of x breaks this."""
    evaluator = Noise(denoiser=MixtureDenoiser(spec=FOUR), times=(100, 300, 950), random_time=True)
    rows = rows_of(evaluator, informed(FOUR), a_batch(FOUR, 600))
    for index, t in enumerate(evaluator.times):
        lacking = (rows["t_nll"] - rows["t_entropy"])[:, index].numpy()
        assert abs(lacking.mean()) < 4 * lacking.std() / sqrt(len(lacking)), t
    at_random = (rows["random_nll"] - rows["random_entropy"]).numpy()
    assert abs(at_random.mean()) < 4 * at_random.std() / sqrt(len(at_random))
    entropy = rows["t_entropy"].mean(0)
    assert bool((entropy.diff() > 0).all()) and float(entropy[-1]) == pytest.approx(log(4), abs=1e-3)


def test_entropy_of_denoised_images_tends_to_ln_k() -> None:
    """Denoised at the end of the schedule, every image is the mean of both classes, which are then equally likely."""
    evaluator = Noise(look="denoised", denoiser=MixtureDenoiser(spec=TWO), times=(0, 400, 999))
    model = Bayes(id="b", classes=2, spec=TWO, temperature=TWO.spread**2).loaded(Limits())
    _, found = figures_of(evaluator, model, a_batch(TWO, 64))
    assert found["entropy/uniform"].value == pytest.approx(log(2), abs=1e-15)
    assert found["entropy@t=999"].value == pytest.approx(log(2), abs=2e-2)
    assert found["entropy@t=0"].value < found["entropy@t=400"].value < found["entropy@t=999"].value
    for t in evaluator.times:
        gap, entropy = found[f"entropy_gap@t={t}"], found[f"entropy@t={t}"]
        assert gap.value == pytest.approx(log(2) - entropy.value, abs=1e-12) and gap.low <= gap.value <= gap.high
    early, late = found["entropy/early"], found["entropy/late"]
    assert early.value == pytest.approx((found["entropy@t=0"].value + found["entropy@t=400"].value) / 2)
    assert late.value == pytest.approx(found["entropy@t=999"].value)


def test_denoised_images_are_those_of_the_ensemble() -> None:
    denoiser, times, batch = MixtureDenoiser(), (0, 150, 600), a_batch(MixtureSpec(), 20)
    model = Bayes(id="b", classes=4, temperature=0.0016).loaded(batch.limits)
    ours = rows_of(Noise(look="denoised", denoiser=denoiser, times=times), model, batch)
    theirs = rows_of(Shift(modes=("de",), denoiser=denoiser, times=times), model, batch)
    assert torch.equal(ours["t_pred"], theirs["t_pred"])
    torch.testing.assert_close(ours["t_entropy"], theirs["t_entropy"], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours["t_nll"][:, 0], theirs["nll"], rtol=1e-9, atol=1e-12)


def test_noisy_views_carry_level_and_twin() -> None:
    denoiser, batch = MixtureDenoiser(), a_batch(MixtureSpec(), 6)
    evaluator = Noise(denoiser=denoiser, times=(0, 500), random_time=True)
    denoise = denoiser.loaded(batch.limits)
    levels = [denoiser.sigma(0), denoiser.sigma(500)]
    for view, level in zip(evaluator.views(batch), [*levels, None], strict=True):
        assert view.sigma is not None and view.denoised is not None
        if level is not None:
            assert torch.equal(view.sigma, torch.full((6, 1), level, dtype=torch.float32))
        torch.testing.assert_close(view.denoised, denoise(view.images, view.sigma).mean, atol=1e-6, rtol=0)
        noise = (view.images - batch.images[:, None]) / view.sigma[..., None, None, None]
        assert 0.8 < float(noise.std()) < 1.2
    assert float(view.images.min()) < 0 and float(view.images.max()) > 1  # not clamped


def test_random_times_are_uniform_and_the_images_own() -> None:
    schedule = Schedule(steps=25)
    evaluator = Noise(denoiser=MixtureDenoiser(spec=TWO, schedule=schedule), times=(), random_time=True)
    batch = a_batch(TWO, 600)
    models = [Bayes(id=id, classes=2, spec=TWO, tilt=tilt).loaded(Limits()) for id, tilt in (("a", 0.0), ("b", 9.0))]
    (view,) = evaluator.views(batch)
    both = [evaluator.record({view.name: [evaluator.observe(model, view, batch)]}, batch) for model in models]
    one = both[0]["random_t"]
    assert torch.equal(one, both[1]["random_t"]) and not torch.equal(both[0]["random_nll"], both[1]["random_nll"])
    assert view.sigma is not None
    assert torch.equal(
        view.sigma[:, 0].double(), torch.from_numpy(schedule.sigmas().copy())[one.long()].float().double()
    )
    assert chisquare(np.bincount(one.numpy(), minlength=25)).pvalue > 1e-3
    assert int(one.min()) == 0 and int(one.max()) == 24
    part = rows_of(evaluator, models[0], a_batch(TWO, 7, start=100))["random_t"]
    assert torch.equal(part, one[100:107])


def test_predictions_are_among_the_datasets_classes() -> None:
    whole = a_batch(FOUR, 16)
    kept = whole.labels % 2 == 0
    ids = tuple(id for id, keep in zip(whole.ids, kept.tolist(), strict=True) if keep)
    batch = Batch("m", ids, whole.images[kept], whole.labels[kept], 5, Limits(), (0, 2))
    evaluator = Noise(look="denoised", denoiser=MixtureDenoiser(spec=FOUR), times=(0, 950))
    model = Bayes(id="b", classes=4, spec=FOUR, temperature=0.0016).loaded(Limits())
    rows = rows_of(evaluator, model, batch)
    assert set(rows["t_pred"].flatten().tolist()) <= {0, 2}
    assert float(rows["t_entropy"].max()) <= log(2) + 1e-12
    assert bool(torch.isfinite(rows["t_nll"]).all())
    declared = Declared("m", "m", "clean", 0, len(ids), len(ids), classes=2)
    records = Records(from_table(to_table(batch, declared, rows)), (declared,), 5, {"classes": np.array([4])})
    found = {figure.name: figure.value for figure in evaluator.metrics(records)}
    assert found["entropy/uniform"] == pytest.approx(log(2))


def made(pred: list[list[int]], entropy: list[list[float]], random: list[int], first: int = 0) -> Records:
    """Records of images of label 1 at the times 0, 450 and 500."""
    count = len(pred)
    columns = {
        "dataset": np.array(["m"] * count),
        "origin": np.array(["m"] * count),
        "sample": np.array([f"{first + row}" for row in range(count)]),
        "label": np.ones(count, np.int32),
        "t_pred": np.array(pred),
        "t_confidence": np.full((count, 3), 0.5),
        "t_entropy": np.array(entropy),
        "t_nll": np.full((count, 3), 0.7),
        "random_pred": np.array(random),
    }
    return Records(columns, (Declared("m", "m", "clean", 0, count, count),), 0, {"classes": np.array([10])})


FIXED = {"denoiser": MixtureDenoiser(), "times": (0, 450, 500), "random_time": True}


def test_figures_by_hand() -> None:
    records = made([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]], [[0.1, 0.5, 1.0], [0.3, 0.7, 2.0]] * 2, [1, 0, 1, 1])
    found = {figure.name: figure for figure in Noise(**FIXED).metrics(records)}
    assert [found[f"noisy/accuracy@t={t}"].value for t in (0, 450, 500)] == [0.75, 0.5, 0]
    assert found["noisy/entropy@t=450"].value == pytest.approx(0.6)
    assert found["noisy/entropy_gap@t=450"].value == pytest.approx(log(10) - 0.6)
    assert found["noisy/entropy/early"].value == pytest.approx(0.4)
    assert found["noisy/entropy/late"].value == pytest.approx(1.5)
    assert found["noisy/nll@t=0"].value == pytest.approx(0.7)
    assert found["noisy/ece@t=500"].value == pytest.approx(0.5)
    at_random = found["noisy/random-time/accuracy/clean"]
    # Wilson's interval of 3 of 4, from statsmodels 0.14.
    assert (at_random.value, at_random.low, at_random.high) == pytest.approx((0.75, 0.300642, 0.954413), abs=1e-6)
    assert all(figure.complete for figure in found.values())


def test_gains_are_paired_over_the_images_that_both_have() -> None:
    one = made([[1, 1, 0], [1, 1, 0], [1, 0, 0]], [[0.1, 0.2, 2.0], [0.2, 0.4, 2.0], [9, 9, 9]], [1, 1, 0])
    base = made([[1, 1, 1], [1, 0, 1], [0, 0, 1]], [[9, 9, 9], [0.3, 0.6, 1.5], [0.4, 0.7, 1.0]], [0, 0, 1], first=-1)
    read = {"one": one, "base": base}
    evaluator = Noise(**FIXED, gains={"one": "base"})
    pairs = list(evaluator.compare(["one", "base"], read.__getitem__))
    assert {id for id, _ in pairs} == {"one"}
    found = {figure.name: figure for _, figure in pairs}
    assert [found[f"noisy/gain/accuracy@t={t}"].value for t in (0, 450, 500)] == [0.5, 1.0, -1.0]
    assert found["noisy/gain/entropy@t=0"].value == pytest.approx(-0.2)
    assert found["noisy/gain/entropy/early"].value == pytest.approx(((0.15 - 0.45) + (0.3 - 0.55)) / 2)
    assert found["noisy/gain/entropy/late"].value == pytest.approx(0.75)
    assert found["noisy/gain/random-time/clean"].value == pytest.approx(0.5)
    assert all(figure.n == 2 and not figure.complete for figure in found.values())  # a third image is one's alone
    assert not list(evaluator.compare([], lambda _: Records({}, one.declared)))


def test_charts_of_entropy_have_the_line_of_a_uniform_prediction() -> None:
    records = made([[1, 1, 0]] * 4, [[0.1, 0.5, 1.0], [0.3, 0.7, 2.0]] * 2, [1, 0, 1, 1])
    rows = [
        {"bench": "b", "checkpoint": "c", "metric": figure.name, "n_available": 4, **vars(figure)}
        for figure in Noise(**FIXED).metrics(records)
    ]
    metrics = pd.DataFrame(rows)
    used: set[Hashable] = set()
    ((_, variable, panels),) = sections.curves(metrics, used, {"c": 0})
    assert variable == "t"
    titles = [panel.title for panel in panels]
    (entropy,) = [panel for panel in panels if panel.title == "Entropy on images diffused to t (ln K = 2.303 nats)"]
    assert "ln K</text>" in entropy.svg
    assert sum("ln K</text>" in panel.svg for panel in panels) == 1
    assert not set(titles) & set(metrics["metric"].str.partition("=")[0] + "=")  # each family has a title in words
    left = set(metrics.drop(index=list(used))["metric"])
    assert left == {"noisy/entropy/early", "noisy/entropy/late", "noisy/random-time/accuracy/clean"}
    terms = {entry.term for entry in glossary.entries(metrics["metric"])}
    assert {"noisy/…@t=<t>", "entropy/early, entropy/late", "random-time/accuracy/<group>"} <= terms
    differences = [entry.term for entry in glossary.entries(["noisy/gain/entropy@t=50", "gain/random-time/clean"])]
    assert "gain/<figure>" in differences and "…/gain/…" not in differences


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="increase"):
        Noise(denoiser=MixtureDenoiser(), times=(50, 0))
    with pytest.raises(ValidationError, match="random_time: true"):
        Noise(denoiser=MixtureDenoiser(), times=())
    with pytest.raises(ValueError, match="outside the schedule"):
        Noise(denoiser=MixtureDenoiser(), times=(1000,)).check()
    with pytest.raises(ValueError, match=r"gains names checkpoint 'b\+'"):
        Noise(denoiser=MixtureDenoiser(), gains={"b+": "b"}).fits((), ["a", "b"])
    batch, evaluator = a_batch(FOUR, 2), Noise(look="denoised", denoiser=MixtureDenoiser(spec=FOUR), times=(100,))
    with pytest.raises(ValueError, match="informed classifies noisy images, and look: denoised shows none"):
        rows_of(evaluator, informed(FOUR), batch)
    unlabelled = Batch("m", batch.ids, batch.images, torch.tensor([0, -1]), 5, Limits())
    with pytest.raises(ValueError, match="without a label"):
        rows_of(evaluator, Bayes(id="b", classes=4, spec=FOUR).loaded(Limits()), unlabelled)


def test_a_network_of_both_wants_sees_both() -> None:
    seen: list[Tensor] = []

    class Looking(Posterior):
        def forward(self, planes: Tensor) -> Tensor:
            seen.append(planes)
            return super().forward(planes)

    model = Model("both", Looking(FOUR), lambda images: images, 4, 3, wants=("sigma", "denoised"))
    denoiser: Denoiser = MixtureDenoiser(spec=FOUR)
    batch = a_batch(FOUR, 3)
    (view,) = Noise(denoiser=denoiser, times=(250,)).views(batch)
    Noise(denoiser=denoiser, times=(250,)).observe(model, view, batch)
    assert view.denoised is not None and seen[0].shape[1] == 3
    torch.testing.assert_close((seen[0][:, 1:2] + 1) / 2, view.denoised[:, 0], atol=1e-6, rtol=0)
    assert float((4 * seen[0][0, 2, 0, 0]).exp()) == pytest.approx(2 * denoiser.sigma(250), rel=1e-5)
