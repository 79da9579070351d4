"""The Jacobian evaluator: what is recorded of exact denoisers, and what it refuses."""

import numpy as np
import pytest
import torch

from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.checkpoints.denoiser import DenoiserCheckpoint
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.evaluators.jacobian import FAMILIES, Jacobian
from robustbench_diffaug.mixture import MixtureSpec
from robustbench_diffaug.records import Records, from_table, to_table
from robustbench_diffaug.suite import Bench, Loaded, Suite, check
from robustbench_diffaug.testing import check_evaluator

CHEAP = {"times": (100, 400), "vectors": 3, "oversampling": 2, "iterations": 1, "probes": 4, "steps": 2}
CHECKPOINT = DenoiserCheckpoint(id="exact", denoiser=MixtureDenoiser(clip=False), microbatch=32)


def recorded(evaluator: Jacobian, checkpoint: DenoiserCheckpoint = CHECKPOINT, size: int = 6) -> Records:
    dataset = Mixture(name="mixture", group="clean", size=size)
    source = dataset.opened()
    images, labels = source.read(list(range(size)))
    batch = Batch(dataset.name, tuple(source.ids), images, labels, 0, Limits())
    with torch.no_grad():
        model = checkpoint.loaded(Limits())
        seen = {view.name: [evaluator.observe(model, view, batch)] for view in evaluator.views(batch)}
        table = to_table(batch, dataset.declared(), evaluator.record(seen, batch))
    return Records(from_table(table), (dataset.declared(),))


@pytest.mark.parametrize("settings", [{}, {"gallery": True}, {"exact": True}])
def test_it_conforms(settings: dict[str, bool]) -> None:
    check_evaluator(Jacobian(**CHEAP, **settings), Mixture(name="check", group="clean", size=4))


def test_the_exact_denoiser_keeps_to_the_theorem() -> None:
    records = recorded(Jacobian(times=(100, 300, 600), exact=True, vectors=64), size=24)
    assert np.abs(records["jacobian_asymmetry"]).max() < 1e-10
    assert records["jacobian_smallest"].min() > 0
    spectrum = records[
        "singular_values"
    ]  # of a symmetric matrix without negative eigenvalues, these are its eigenvalues
    assert np.allclose(spectrum.sum(axis=2), records["jacobian_trace"])
    assert np.allclose(spectrum.sum(axis=2) ** 2 / (spectrum**2).sum(axis=2), records["effective_rank"])
    assert np.allclose(spectrum[:, :, 0], records["jacobian_largest"])
    assert np.allclose(spectrum[:, :, -1], records["jacobian_smallest"])
    figures = {figure.name: figure for figure in Jacobian(times=(100, 300, 600)).metrics(records)}
    assert set(figures) == {f"{name}@t={t}" for name in (*FAMILIES, "trace_gap") for t in (100, 300, 600)}
    for t in (100, 300, 600):
        gap = figures[f"trace_gap@t={t}"]
        assert abs(gap.value) < 2 * (gap.high - gap.low)  # within four standard errors
        assert abs(gap.value) < 0.3 * figures[f"jacobian_trace@t={t}"].value


def test_estimates_are_near_the_whole() -> None:
    whole = recorded(Jacobian(times=(300,), exact=True))
    found = recorded(Jacobian(times=(300,), probes=400, iterations=4, steps=3))
    assert np.allclose(found["denoising_error"], whole["denoising_error"], rtol=1e-12)
    assert np.allclose(found["jacobian_trace"], whole["jacobian_trace"], rtol=0.2)
    assert np.allclose(found["effective_rank"], whole["effective_rank"], rtol=0.3)
    assert np.allclose(found["jacobian_largest"], whole["jacobian_largest"], rtol=1e-6)
    assert np.allclose(found["jacobian_smallest"], whole["jacobian_smallest"], rtol=0.01)
    assert found["jacobian_asymmetry"].max() < 1e-10


def test_a_trace_that_is_not_the_error_shows() -> None:
    """The posterior of another mixture is no posterior of these images: half of the noise is left in its trace."""
    wrong = MixtureDenoiser(spec=MixtureSpec(spread=0.01), clip=False)
    checkpoint = CHECKPOINT.model_copy(update={"id": "wrong", "denoiser": wrong})
    evaluator = Jacobian(times=(100,), exact=True, gains={"wrong": "exact"})
    records = {"exact": recorded(evaluator, size=24), "wrong": recorded(evaluator, checkpoint, size=24)}
    found = {figure.name: figure for figure in evaluator.metrics(records["wrong"])}
    assert found["trace_gap@t=100"].high < 0
    gains = {figure.name: (id, figure) for id, figure in evaluator.compare(["exact", "wrong"], records.__getitem__)}
    id, gain = gains["gain/jacobian_trace@t=100"]
    difference = records["wrong"]["jacobian_trace"] - records["exact"]["jacobian_trace"]
    assert id == "wrong"
    assert gain.value == pytest.approx(float(difference.mean()))
    assert gain.high < 0
    assert gain.n == 24


def test_pictures() -> None:
    evaluator = Jacobian(times=(100, 300), exact=True, vectors=5, gallery=True)
    records = recorded(evaluator)
    first, second = evaluator.pictures(records)
    assert first.name == "columns-of-u-t100"
    assert first.tiles is not None
    assert first.tiles.shape == (4, 8, 8, 8, 1)
    assert len(first.across) == 8
    assert first.across[3] == f"1: {records['singular_values'][:, 0, 0].mean():.2f}"
    assert first.down == tuple(records["sample"][:4])
    columns = first.tiles[:, 3:].astype(float)
    assert (np.abs(columns - 127.5).max(axis=(2, 3, 4)) == 127.5).all()  # stretched to the whole range
    assert (columns.max(axis=(2, 3, 4)) == 255).all()  # by an entry above zero
    images, _ = Mixture(name="mixture", group="clean", size=6).opened().read([0])
    assert np.array_equal(first.tiles[0, 0, :, :, 0], (255 * images[0, 0].double()).round().numpy().astype(np.uint8))
    assert second.tiles is not None
    assert not np.array_equal(first.tiles[:, 3], second.tiles[:, 3])


def test_a_clamped_denoiser_is_refused() -> None:
    clamped = CHECKPOINT.model_copy(update={"denoiser": MixtureDenoiser(spec=MixtureSpec(contrast=0.2), clip=True)})
    dark = Batch("dark", ("0",), torch.full((1, 1, 8, 8), -40.0), torch.zeros(1, dtype=torch.long), 0, Limits())
    evaluator = Jacobian(**CHEAP)
    (view, _) = evaluator.views(dark)
    with torch.no_grad(), pytest.raises(ValueError, match=r"exact clamps its estimate .* give it clip: false"):
        evaluator.observe(clamped.loaded(Limits()), view, dark)


def test_a_suite_with_a_clamped_denoiser_is_refused_before_it_runs() -> None:
    clamped = CHECKPOINT.model_copy(update={"denoiser": MixtureDenoiser(clip=True)})
    bench = Bench(name="jacobian", evaluator=Jacobian(times=(300,)), datasets=(Mixture(size=2),))
    places = {
        ("checkpoint", "exact"): "s.yaml:3",
        ("bench", "jacobian"): "s.yaml:9",
        ("bench", "jacobian/0"): "s.yaml:12",
    }
    with pytest.raises(ValueError, match=r"s.yaml:9: the denoiser of checkpoint exact is clamped .* set clip: false"):
        check(Loaded(Suite(name="s", checkpoints=(clamped,), benches=(bench,)), places))
    assert not check(Loaded(Suite(name="s", checkpoints=(CHECKPOINT,), benches=(bench,)), places))


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="time 1000 is outside the schedule, 0 to 999"):
        Jacobian(times=(1000,)).check()
    with pytest.raises(ValueError, match="times names one twice"):
        Jacobian(times=(1, 1)).check()
    large = Mixture(name="large", size=2, spec=MixtureSpec(size=33))
    with pytest.raises(ValueError, match=r"images of large have 1089 numbers.*set exact: false"):
        Jacobian(exact=True).fits([large], ["exact"])
    Jacobian().fits([large], ["exact"])
    with pytest.raises(ValueError, match="gains names checkpoint 'exakt'; did you mean exact"):
        Jacobian(gains={"exakt": "exact"}).fits([], ["exact", "other"])
