"""Galleries against the denoiser, the samplers and the adaptation called by hand, and what their pictures hold."""

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from robustbench_diffaug.batch import Batch, Columns, Limits
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.checkpoints.denoiser import DenoiserCheckpoint
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.adaptation import Adaptation, Chain, adapt
from robustbench_diffaug.diffusion.base import Posterior, Schedule, Sigma
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.diffusion.samplers import dpm_solver_2
from robustbench_diffaug.diffusion.toy import Toy
from robustbench_diffaug.evaluators.gallery import Gallery
from robustbench_diffaug.records import Metric, Picture, Records, from_table, to_table
from robustbench_diffaug.shown import shown
from robustbench_diffaug.testing import check_evaluator

EXACT = MixtureDenoiser(clip=False)
DDA = Adaptation(respacing=10, N=4, D=2, variance="small")
ALL = Gallery(
    panels=("times", "solvers", "mixing", "adaptation", "toy"),
    times=(20, 50, 100),
    solver_time=100,
    mixing=(0.0, 0.25, 1.0, 2.0),
    mixing_time=100,
    conditional=EXACT,
    dda=DDA,
    steps=3,
    toy=Toy(points=5),
    shown=2,
)


def a_batch(rows: range = range(5), limits: Limits = Limits(), seed: int = 7) -> Batch:  # noqa: B008  (a frozen value)
    source = Mixture(name="m", size=5).opened()
    images, labels = source.read(rows)
    return Batch("m", tuple(source.ids[row] for row in rows), images, labels, seed, limits)


def observed(evaluator: Gallery, batch: Batch, checkpoint: Checkpoint | None = None) -> Columns:
    model = (checkpoint or DenoiserCheckpoint(id="d", denoiser=EXACT)).loaded(batch.limits)
    seen: dict[str, list[Columns]] = defaultdict(list)
    with torch.no_grad():
        for view in evaluator.views(batch):
            seen[view.name].append(evaluator.observe(model, view, batch))
    return evaluator.record(seen, batch)


def made(evaluator: Gallery, names: tuple[str, ...] = ("m",)) -> Records:
    """Records of the samples, under each of some datasets' names."""
    parts = []
    for name in names:
        batch, declared = replace(a_batch(), dataset=name), Mixture(name=name, size=5).declared()
        parts.append((from_table(to_table(batch, declared, observed(evaluator, batch))), declared))
    columns = {key: np.concatenate([part[key] for part, _ in parts]) for key in parts[0][0]}
    return Records(columns, tuple(declared for _, declared in parts))


def eight_bits(images: torch.Tensor) -> np.ndarray:
    return np.round(255 * images.double().clamp(0, 1).movedim(-3, -1).numpy()).astype(int)


def test_each_time_is_diffused_and_denoised_as_by_hand() -> None:
    batch, rows = a_batch(), observed(ALL, a_batch())
    denoise = EXACT.loaded(batch.limits)
    for at, t in enumerate(ALL.times):
        sigma = EXACT.sigma(t)
        (noise,) = batch.noise(f"gallery/t={t}", range(1))
        mean = denoise(batch.images + sigma * noise[:, 0], sigma).mean.clamp(0, 1)
        assert np.abs(eight_bits(mean) - rows["times"][:, 1, at].numpy()).max() <= 1
        expected = (mean - batch.images).double().square().mean(dim=(1, 2, 3)).sqrt()
        assert torch.allclose(rows["times_rms"][:, at], expected, rtol=1e-5)
    assert np.array_equal(rows["clean"].numpy(), eight_bits(batch.images))


def test_noisy_tiles_have_unit_variance_around_mid_grey() -> None:
    late = Gallery(panels=("times",), times=(999,))
    tiles = observed(late, a_batch())["times"][:, 0].double() / 255
    assert abs(float(tiles.mean()) - 0.5) < 0.05  # of 320 normals, cut at two standard deviations
    assert 0.19 < float(tiles.std()) < 0.28


def test_solvers_begin_at_the_same_noise_and_ddim_is_the_denoiser() -> None:
    batch, rows = a_batch(), observed(ALL, a_batch())
    assert torch.equal(rows["solvers"][:, 1], rows["times"][:, 1, 2])  # both at t = 100
    assert torch.equal(rows["solvers"][:, 0], rows["times"][:, 0, 2])
    (noise,) = batch.noise("gallery/t=100", range(1))
    sigma = EXACT.sigma(100)
    other = dpm_solver_2(EXACT.loaded(batch.limits), batch.images + sigma * noise[:, 0], sigma, EXACT.level(1e-3))
    assert np.abs(eight_bits(other) - rows["solvers"][:, 2].numpy()).max() <= 1
    assert not torch.equal(rows["solvers"][:, 1], rows["solvers"][:, 2])


def test_mixing_is_affine_in_the_share_and_ends_at_the_two_denoisers() -> None:
    batch, rows = a_batch(), observed(ALL, a_batch())
    sigma = EXACT.sigma(100)
    (noise,) = batch.noise("gallery/t=100", range(1))
    noisy = batch.images + sigma * noise[:, 0]
    plain = EXACT.loaded(batch.limits)(noisy, sigma).mean
    told = EXACT.loaded_conditional(batch.limits)(noisy, sigma, batch.labels).mean
    for at, share in enumerate(ALL.mixing):
        expected = (1 - share) * plain + share * told
        assert np.abs(eight_bits(expected) - rows["mixing"][:, 1 + at].numpy()).max() <= 1


def test_the_adaptation_is_adapt_and_its_steps_are_on_the_way() -> None:
    batch, rows = a_batch(), observed(ALL, a_batch())
    chain = Chain.of(Schedule().sigmas(), DDA.respacing)

    def noise_of(step: int) -> torch.Tensor:
        (noise,) = batch.noise("gallery/dda", range(step, step + 1))
        return noise[:, 0]

    adapted = adapt(MixtureDenoiser().loaded(batch.limits), batch.images, noise_of, DDA, chain, 3)
    assert np.abs(eight_bits(adapted) - rows["adapted"][:, 1].numpy()).max() <= 1
    assert np.array_equal(rows["adapted"][:, 0].numpy(), eight_bits(batch.images))
    assert rows["adaptation"].shape[1:3] == (2, 3)  # steps 3, 2 and 0: the state, and the estimate
    start = chain.alpha[4] * (2 * batch.images - 1) + np.sqrt(1 - chain.alpha[4] ** 2) * noise_of(4)
    unit = 0.5 + start / chain.alpha[3] / (4 * np.sqrt(1 + 4 * chain.sigma[3] ** 2))
    assert np.abs(eight_bits(unit) - rows["adaptation"][:, 0, 0].numpy()).max() <= 1


def test_records_do_not_depend_on_the_batch_or_the_budget() -> None:
    whole = observed(ALL, a_batch())
    for rows in (range(1, 2), range(2, 5), range(4, -1, -2)):
        for limits in (Limits(), Limits(budget=2)):
            part = observed(ALL, a_batch(rows, limits))
            assert part.keys() == whole.keys()
            for name, column in part.items():
                assert torch.equal(column, whole[name][list(rows)]), name
    assert not torch.equal(observed(ALL, a_batch(seed=8))["times"], whole["times"])


def test_it_conforms() -> None:
    # Without mixing: what counts the forwards of conformance knows no classes.
    check_evaluator(ALL.model_copy(update={"panels": ("times", "solvers", "adaptation", "toy"), "conditional": None}))


def test_what_a_denoiser_is_given_is_what_is_stated() -> None:
    denoise, counts = EXACT.loaded(Limits()), []

    def counting(noisy: torch.Tensor, sigma: Sigma) -> Posterior:
        counts.append(noisy.shape[:-3].numel())
        return denoise(noisy, sigma)

    batch = a_batch()
    model = replace(DenoiserCheckpoint(id="d", denoiser=EXACT).loaded(Limits()), denoise=counting)
    with torch.no_grad():
        for view in ALL.views(batch):
            ALL.observe(model, view, batch)
    assert sum(counts) == 5 * ALL.forwards().classifier


@pytest.mark.parametrize("panel", ALL.panels)
def test_a_panel_alone_is_the_same_panel(panel: Any) -> None:
    alone = ALL.model_copy(update={"panels": (panel,)})
    whole, part = observed(ALL, a_batch()), observed(alone, a_batch())
    assert set(part) < set(whole)
    assert all(torch.equal(column, whole[name]) for name, column in part.items())
    expected = {
        "times": (0, 3, 0),
        "solvers": (0, 3, 0),
        "mixing": (6, 1, 0),
        "adaptation": (0, 4, 4),
        "toy": (0, 1, 0),
    }
    assert alone.forwards().of(1, 1) == expected[panel]
    records = made(alone)
    figures = list(alone.metrics(records))
    assert figures
    assert all(figure.low <= figure.value <= figure.high and figure.n == 5 for figure in figures)
    assert len(list(shown("bench", "d", alone.pictures(records)))) == (2 if panel == "toy" else 1)


def by_name(figures: list[Metric]) -> dict[str, float]:
    return {figure.name: figure.value for figure in figures}


def test_figures_are_means_of_the_records() -> None:
    records = made(ALL)
    figures = by_name(list(ALL.metrics(records)))
    assert figures["denoised-rms@t=50"] == pytest.approx(records["times_rms"][:, 1].mean())
    assert figures["dpm-solver-2-rms@t=100"] == pytest.approx(records["solvers_rms"][:, 1].mean())
    assert figures["mixed-rms@lambda=0.25"] == pytest.approx(records["mixing_rms"][:, 1].mean())
    assert figures["toy-distance/denoised"] < figures["toy-distance/noisy"]
    assert not list(ALL.metrics(Records({}, records.declared))) + list(ALL.pictures(Records({}, records.declared)))


def grids(evaluator: Gallery, records: Records) -> dict[str, Picture]:
    return {picture.name: picture for picture in evaluator.pictures(records)}


def test_pictures_show_the_first_samples_of_each_dataset() -> None:
    found = grids(ALL, records := made(ALL, ("m", "corrupted/fog@s5")))
    assert set(found) == {"times", "solvers", "mixing", "adaptation", "toy-points", "toy-step"}
    times = found["times"]
    assert times.tiles is not None
    assert times.tiles.shape == (8, 4, 8, 8, 1)
    assert times.across == ("x₀", "t=20", "t=50", "t=100")
    assert times.down[:2] == (f"m\nclass {records['label'][0]}\nnoisy", "denoised")
    assert times.down[4] == f"fog@s5\nclass {records['label'][5]}\nnoisy"
    assert np.array_equal(times.tiles[5, 1:], records["times"][5, 1])  # the second dataset's first sample
    solvers = found["solvers"].tiles
    assert solvers is not None and np.array_equal(solvers[3, 0], records["solvers"][0, 2])


def test_drawings_are_the_same_again_and_ask_for_nothing() -> None:
    records = made(ALL)
    one, other = grids(ALL, records), grids(ALL, records)
    for name in ("toy-points", "toy-step"):
        assert one[name].svg == other[name].svg
        assert not re.search(r"https?://(?!www\.w3\.org/)|<script|DOCTYPE", one[name].svg)


def test_a_class_less_image_is_named_by_its_id_and_has_no_mixture() -> None:
    batch = replace(a_batch(), labels=torch.full((5,), -1))
    with pytest.raises(ValueError, match="m has images without a label"):
        list(ALL.views(batch))
    evaluator = ALL.model_copy(update={"panels": ("times",)})
    columns = from_table(to_table(batch, Mixture(name="m", size=5).declared(), observed(evaluator, batch)))
    found = grids(evaluator, Records(columns, (Mixture(name="m", size=5).declared(),)))
    assert found["times"].down[0] == f"{batch.ids[0]}\nnoisy"


def test_a_classifier_is_named() -> None:
    with pytest.raises(ValueError, match="bayes is a classifier"):
        observed(ALL, a_batch(), Bayes(id="bayes", classes=4))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"panels": ("times", "times")}, "panels names one twice"),
        ({"panels": ()}, "at least 1"),
        ({"times": (100, 50)}, "times must increase"),
        ({"times": (1000,)}, "times has 1000, and the schedule has the times 0 to 999"),
        ({"solver_time": 1200}, "solver_time has 1200"),
        ({"panels": ("mixing",)}, "needs a class-conditional denoiser"),
        ({"mixing": (0.5, 0.5)}, "mixing must increase"),
    ],
)
def test_settings_that_cannot_be_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Gallery(**fields)


def test_a_chain_longer_than_the_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="respacing is 100 and the denoiser has 50 times"):
        Gallery(panels=("adaptation",), schedule=Schedule(steps=50), times=(10,), solver_time=20, mixing_time=5).check()
