"""Gradients: closed forms of linear, quadratic and mixture networks, finite differences, refusals, figures by hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import one_hot

from robustbench_diffaug import rng
from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.base import Posterior, Sigma
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.diffusion.unet import UNet
from robustbench_diffaug.evaluators import gradients_metrics
from robustbench_diffaug.evaluators.differentiable import (
    Shown,
    Through,
    gradient_of,
    logits_of,
    pulled,
    pulled_back,
    rising,
)
from robustbench_diffaug.evaluators.gradients import Gradients
from robustbench_diffaug.evaluators.gradients_likeness import ascended, class_means
from robustbench_diffaug.mixture import MixtureSpec
from robustbench_diffaug.records import Declared, Metric, Records
from robustbench_diffaug.testing import check_evaluator

SHAPE = (1, 8, 8)
SIZE = 64


def normals(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(rng.key("gradients test", name), range(1), shape)[0].copy())


class Linear(nn.Module):
    """`W x`."""

    def __init__(self, classes: int = 4, planes: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(normals("weight", classes, planes * SIZE) / 8, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


class Quadratic(nn.Module):
    """`-|x - m_k|^2`, whose gradient to x is `-2 (x - m_k)`."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(normals("means", 3, SIZE) / 8 + 0.5, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = -(images.flatten(1)[:, None] - self.means).square().sum(dim=2)
        return found


class Lambda(nn.Module):
    """Any function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def model_of(network: nn.Module, classes: int = 4, wants: tuple[Any, ...] = ()) -> Model:
    return Model("net", network, lambda images: images, classes, microbatch=4, wants=wants)


def a_batch(count: int = 6, seed: int = 0, limits: Limits = Limits()) -> Batch:  # noqa: B008  (a frozen value)
    source = Mixture(size=count).opened()
    images, labels = source.read(range(count))
    return Batch("m", tuple(source.ids), images, labels, seed, limits)


def rows_of(evaluator: Gradients, model: Model, batch: Batch) -> dict[str, Tensor]:
    seen: dict[str, list[Mapping[str, Tensor]]] = {}
    with torch.no_grad():
        for view in evaluator.views(batch):
            seen.setdefault(view.name, []).append(evaluator.observe(model, view, batch))
    return dict(evaluator.record(seen, batch))


def direct(model: Model, shown: Shown, through: Through, labels: Tensor) -> Tensor:
    """The gradient of log p_y as `pulled` gives it."""
    found = pulled(model, shown, through, lambda logits, rows: [rising(logits, labels[rows]).direction])
    length = rising(found.logits, labels).length
    return found.gradients[0].double() * length[:, None, None, None]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def mixture_jacobian(images: Tensor, sigma: float, spec: MixtureSpec) -> Tensor:
    """`(s^2 I + sigma^2 / (s^2 + sigma^2) Cov(m)) / (s^2 + sigma^2)`: Theorem 1's Cov[x0 | x] / sigma^2."""
    flat, means = images.double().flatten(1), spec.means().flatten(1)
    spread, noise = spec.spread**2, sigma**2
    weights = torch.softmax(-(flat[:, None] - means).square().sum(dim=2) / (2 * (spread + noise)), dim=1)
    centre = weights @ means
    about = means - centre[:, None]
    covariance = torch.einsum("nk,nki,nkj->nij", weights, about, about)
    eye = torch.eye(flat.shape[1], dtype=torch.float64)
    return (spread * eye + noise / (spread + noise) * covariance) / (spread + noise)


# Gradients


def test_gradients_of_a_linear_network_are_its_rows() -> None:
    network, batch = Linear(), a_batch()
    model, weight = model_of(network), network.weight.double()
    found = rows_of(Gradients(probes=0), model, batch)
    p = (batch.images.double().flatten(1) @ weight.T).softmax(dim=1)
    expected = weight[batch.labels] - p @ weight
    assert np.allclose(found["image_gradient_norm"][:, 0], expected.norm(dim=1), rtol=1e-5)
    assert np.allclose(found["image_jacobian_square"][:, 0], weight.square().sum(), rtol=1e-5)
    gradient = direct(model, Shown(batch.images), "image", batch.labels)
    assert relative(gradient.flatten(1), expected) < 1e-5


def test_gradients_of_a_quadratic_network() -> None:
    network, images = Quadratic(), a_batch().images
    labels = torch.arange(6) % 3
    flat, means = images.double().flatten(1), network.means.double()
    p = (-(flat[:, None] - means).square().sum(dim=2)).softmax(dim=1)
    expected = 2 * (means[labels] - p @ means)  # the x in -2 (x - m_k) cancels
    gradient = direct(model_of(network, 3), Shown(images), "image", labels)
    assert relative(gradient.flatten(1), expected) < 1e-5


def test_hutchinson_is_the_exact_norm_on_average() -> None:
    model, batch = model_of(Quadratic(), 3), replace(a_batch(), labels=torch.zeros(6, dtype=torch.long))
    exact = rows_of(Gradients(probes=0), model, batch)["image_jacobian_square"]
    many = rows_of(Gradients(probes=300), model, batch)["image_jacobian_square"]
    assert torch.allclose(many, exact, rtol=0.3) and not torch.allclose(many, exact, rtol=1e-4)


@pytest.mark.parametrize("t", [100, 400, 900])
def test_chain_is_the_jacobian_of_a_mixture_times_the_gradient(t: int) -> None:
    denoiser, batch = MixtureDenoiser(clip=False), a_batch()
    sigma, network = denoiser.sigma(t), Linear()
    noisy = batch.images + sigma * normals("noise", 6, *SHAPE)
    denoise = denoiser.loaded(Limits())
    shown = Shown(noisy, sigma, denoise(noisy, sigma).mean, denoise, 4)
    model = model_of(network)
    assert shown.denoised is not None
    p = (shown.denoised.double().flatten(1) @ network.weight.double().T).softmax(dim=1)
    inner = network.weight.double()[batch.labels] - p @ network.weight.double()
    outer = torch.einsum("nij,ni->nj", mixture_jacobian(noisy, sigma, denoiser.spec), inner)
    assert relative(direct(model, shown, "denoised", batch.labels).flatten(1), inner) < 1e-5
    assert relative(direct(model, shown, "chain", batch.labels).flatten(1), outer) < 1e-5
    exact = pulled_back(denoise, noisy.double(), sigma, [inner.reshape(6, *SHAPE)], 4)[0]  # in float64 throughout
    assert relative(exact.flatten(1), outer) < 1e-12


@cache
def bundled(precision: Any, microbatch: int) -> UNet:
    return UNet(folder="rdiff:zoo/mnist5k-ddpm", precision=precision, clip=False, microbatch=microbatch)


def test_gradients_through_the_bundled_denoiser_are_finite_differences() -> None:
    denoiser = bundled("float64", 2)
    denoise, sigma = denoiser.loaded(Limits()), denoiser.sigma(300)
    noisy = 0.2 + sigma * normals("noisy", 2, 1, 32, 32).double()
    vector, way = (normals(name, 2, 1, 32, 32).double() for name in ("vector", "way"))
    (found,) = pulled_back(denoise, noisy, sigma, [vector], 2)
    step = 1e-5
    with torch.no_grad():
        ends = [(denoise(noisy + s * step * way, sigma).mean * vector).sum(dim=(1, 2, 3)) for s in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    assert torch.allclose((found * way).sum(dim=(1, 2, 3)), expected, rtol=1e-4)


def test_a_network_that_wants_the_level_and_the_twin_has_the_total_derivative() -> None:
    """`W_1 z + W_2 (2 D - 1) + W_3 level` with z = (2 x - 1) / sqrt(1 + 4 sigma^2), D a linear map."""
    network, batch, sigma = Linear(planes=3), a_batch(), 0.7
    images, level = batch.images, 2 / (1 + 4 * sigma**2) ** 0.5
    mixed = normals("mixed", SIZE, SIZE) / 8

    def denoise(noisy: Tensor, sigma: Sigma) -> Posterior:
        return Posterior((noisy.flatten(1) @ mixed.T).reshape(noisy.shape))

    shown = Shown(images, sigma, denoise(images, sigma).mean, denoise, 4)
    model = model_of(network, wants=("sigma", "denoised"))
    logits = logits_of(model, images, sigma, shown.denoised)
    first, second = network.weight[:, :SIZE].double() * level, network.weight[:, SIZE : 2 * SIZE].double() * 2
    one = one_hot(batch.labels, 4).double()
    lead = one - logits.double().softmax(dim=1)
    partial = {"image": lead @ first, "denoised": lead @ second, "chain": lead @ (first + second @ mixed.double())}
    for through, expected in partial.items():
        found = direct(model, shown, through, batch.labels)  # type: ignore[arg-type]
        assert relative(found.flatten(1), expected) < 1e-5
    noisy_only = model_of(Linear(planes=2), wants=("sigma",))
    ways: tuple[Through, Through] = ("image", "chain")
    one_way, other_way = (direct(noisy_only, shown, through, batch.labels) for through in ways)
    assert torch.equal(one_way, other_way)
    with pytest.raises(ValueError, match="net sees no denoised image"):
        direct(noisy_only, shown, "denoised", batch.labels)


# What is refused


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda x: one_hot(x.flatten(1).argmax(dim=1) % 4, 4).float() * 3, "net is not differentiable"),
        (lambda x: x.flatten(1)[:, :4].detach() + 0, "net is not differentiable"),
        (lambda x: x.flatten(1)[:, :4].softmax(dim=1), "net returns probabilities"),
        (lambda x: (0 * x.flatten(1)[:, :4]).sqrt() + x.flatten(1)[:, 4:8], "net has a NaN or infinite"),
    ],
)  # fmt: skip
def test_networks_without_a_gradient_of_logits_are_named(network: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        rows_of(Gradients(), model_of(Lambda(network)), a_batch())
    assert "\n" not in str(caught.value)


def test_log_probabilities_are_logits() -> None:
    linear = Linear()
    one, other = (
        rows_of(Gradients(), model_of(network), a_batch())["image_gradient_norm"]
        for network in (linear, Lambda(lambda images: linear(images).log_softmax(dim=1)))
    )
    assert torch.allclose(one, other, rtol=1e-5)


def test_gradient_of_sums_the_output() -> None:
    leaf = normals("leaf", 3, 5).requires_grad_()
    model = model_of(Linear())
    output = leaf.square()
    assert torch.allclose(gradient_of(model, output, leaf, again=True), 2 * leaf)
    assert torch.allclose(gradient_of(model, output, leaf, torch.full((3, 5), 3.0)), 6 * leaf)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"times": (0, 100)}, "need a denoiser"),
        ({"through": ("chain",)}, "need a denoiser"),
        ({"denoiser": MixtureDenoiser(), "times": (100, 0)}, "times must increase"),
        ({"denoiser": MixtureDenoiser(), "through": ("chain", "chain")}, "one twice"),
        ({"denoiser": MixtureDenoiser(), "through": ("chain",)}, "take 0 out"),
        ({"denoiser": MixtureDenoiser(clip=True)}, "clip: true zeroes rows"),
        ({"judge": Bayes(id="j", classes=4), "judge_times": (7,)}, "judge_times has 7"),
        ({"judge": Bayes(id="j", classes=4), "judge_times": ()}, "judge needs judge_times"),
        ({"judge": Bayes(id="j", classes=4, wants=("sigma",))}, "judge j is no classifier of plain images"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Gradients(**settings)


def test_more_is_refused_when_files_and_data_are_looked_at() -> None:
    with pytest.raises(ValueError, match="outside the schedule"):
        Gradients(denoiser=MixtureDenoiser(), times=(0, 1000)).check()
    with pytest.raises(ValueError, match="did you mean net-b"):
        Gradients(gains={"net-b": "net-c"}).fits((), ["net-a", "net-b"])
    with pytest.raises(ValueError, match="without a label"):
        rows_of(Gradients(), model_of(Linear()), replace(a_batch(), labels=torch.full((6,), -1)))
    other = Mixture(name="r", size=8, spec=MixtureSpec(size=9))
    with pytest.raises(ValueError, match="reference r has images of 1x9x9, m of 1x8x8"):
        rows_of(Gradients(reference=other), model_of(Linear()), a_batch())
    with pytest.raises(ValueError, match="judge j knows 3 classes and net 4"):
        rows_of(Gradients(judge=Bayes(id="j", classes=3, spec=MixtureSpec(classes=3))), model_of(Linear()), a_batch())


def test_class_means_and_their_differences() -> None:
    reference = Mixture(name="r", size=40)
    images, labels = reference.opened().read(range(40))
    means = class_means(reference, 5)
    for label in range(4):
        assert torch.allclose(means[label], images[labels == label].mean(dim=0), atol=1e-6)
    assert bool(means[4].isnan().all())
    with pytest.raises(ValueError, match="classes 0 to 2"):
        class_means(reference, 3)
    batch, network = a_batch(), Linear()
    found = rows_of(Gradients(reference=reference), model_of(network), batch)["image_pag_class_cosine"][:, 0]
    logits = batch.images.flatten(1) @ network.weight.T
    for row, label in enumerate(batch.labels.tolist()):
        rival = max((k for k in range(4) if k != label), key=lambda k: float(logits[row, k]))
        gradient = network.weight[label] - logits[row].softmax(dim=0) @ network.weight
        expected = torch.cosine_similarity(gradient, (means[label] - means[rival]).flatten(), dim=0)
        assert float(found[row]) == pytest.approx(float(expected), abs=1e-5)


def test_the_bayes_classifier_of_two_classes_is_aligned_with_their_means() -> None:
    spec = MixtureSpec(classes=2)
    source = Mixture(size=6, spec=spec).opened()
    images, labels = source.read(range(6))
    batch = Batch("m", tuple(source.ids), images, labels, 0, Limits())
    reference = Mixture(name="r", size=400, spec=spec)
    model = Bayes(id="b", classes=2, spec=spec, temperature=0.01).loaded(batch.limits)
    found = rows_of(Gradients(reference=reference), model, batch)["image_pag_class_cosine"]
    assert float(found.min()) > 0.99


def test_steps_go_up_and_are_as_long_as_said() -> None:
    network, batch = Linear(), a_batch()
    model, targets = model_of(network), (batch.labels + 1) % 4
    near = ascended(model, Shown(batch.images), "image", targets, 1, 0.01)
    assert torch.allclose((near - batch.images).flatten(1).norm(dim=1), torch.tensor(0.01), rtol=1e-3)
    before, after = (model.logits(images).softmax(dim=1).gather(1, targets[:, None]) for images in (batch.images, near))
    assert bool((after > before).all())
    bayes = Bayes(id="b", classes=4, temperature=0.0016)
    evaluator = Gradients(judge=bayes, steps=6, step=0.5, denoiser=MixtureDenoiser(), times=(0, 300))
    found = rows_of(evaluator, bayes.loaded(batch.limits), batch)
    assert bool((found["image_generated"] == 1).all())  # the best there is: its own steps convince it
    wrong = rows_of(evaluator, Bayes(id="w", classes=4, temperature=-0.0016).loaded(batch.limits), batch)
    assert bool((wrong["image_generated"] == 0).all())
    assert float(found["chain_generated"][:, 1].mean()) > 0.5 > float(wrong["chain_generated_confidence"][:, 1].max())


# Records and figures


def test_it_conforms() -> None:
    denoiser, reference = MixtureDenoiser(microbatch=4), Mixture(name="r", size=12)
    judge = Bayes(id="j", classes=4, temperature=0.0016)
    check_evaluator(
        Gradients(denoiser=denoiser, times=(0, 300), draws=2, reference=reference, judge=judge, steps=1, gallery=True),
        Mixture(name="check", group="clean", size=3),
    )
    check_evaluator(
        Gradients(denoiser=denoiser, times=(100,), through=("chain",), probes=0), Mixture(name="check", size=2)
    )


def test_bundled_networks_do_not_depend_on_the_batch() -> None:
    """A residual network that sees the twin, and its denoiser, in their one shapes."""
    from robustbench_diffaug.checkpoints.timm_model import Timm
    from robustbench_diffaug.data.embedded import Mnist5k

    root = Path(__file__).parents[2] / "robustbench_diffaug" / "zoo"
    entry = yaml.safe_load((root / "resnet-denoise-assisted.yaml").read_text())
    entry["weights"]["uri"] = str(root / entry["weights"]["uri"])
    model = Timm.model_validate({**entry, "microbatch": 2}).loaded(Limits())
    source = Mnist5k().opened()
    images, labels = source.read(range(3))
    batch = Batch("mnist5k", tuple(source.ids[:3]), images, labels, 0, Limits())
    evaluator = Gradients(denoiser=bundled("float32", 2), times=(300,))
    whole = rows_of(evaluator, model, batch)
    last = rows_of(evaluator, model, replace(batch, ids=batch.ids[2:], images=images[2:], labels=labels[2:]))
    assert {name: column[2:].tolist() for name, column in whole.items()} == {n: c.tolist() for n, c in last.items()}
    assert "denoised_gradient_norm" in whole and float(whole["chain_gradient_norm"].min()) > 0


def records_of(columns: Mapping[str, np.ndarray], ids: Sequence[str]) -> Records:
    index = {
        "dataset": np.array(["d"] * len(ids)),
        "origin": np.array(["d"] * len(ids)),
        "group": np.array(["clean"] * len(ids)),
        "sample": np.array(ids),
        "label": np.zeros(len(ids), np.int32),
    }
    return Records({**index, **columns}, (Declared("d", "d", "clean", 0, len(ids), 100),))


def table(found: Sequence[Metric]) -> dict[str, Metric]:
    return {figure.name: figure for figure in found}


def test_figures_are_means_roots_of_means_and_paired_differences() -> None:
    ids = [f"{row}" for row in range(30)]
    base = np.abs(normals("column", 30, 2).numpy())
    columns = {"image_gradient_norm": base, "image_jacobian_square": base, "chain_pag_cosine": base * [np.nan, 1]}
    records = records_of(columns, ids)
    found = table(list(gradients_metrics.metrics(records, (0, 300))))
    assert found["gradient_norm@t=0"].value == pytest.approx(base[:, 0].mean(), rel=1e-6)
    assert found["gradient_norm@t=0"].headline and not found["gradient_norm@t=300"].headline
    assert found["jacobian_norm@t=300"].value == pytest.approx(np.sqrt(base[:, 1].mean()), rel=1e-6)
    assert found["jacobian_norm@t=300"].low < found["jacobian_norm@t=300"].value < found["jacobian_norm@t=300"].high
    assert found["chain/pag_cosine@t=300"].headline and "chain/pag_cosine@t=0" not in found
    assert found["gradient_norm@t=0"].better == "lower" and found["chain/pag_cosine@t=300"].better == "higher"
    shuffled = slice(None, None, -1)  # other rows, in another order: pairs go by name
    less = records_of(
        {n: (c - 0.25 * (n != "image_jacobian_square"))[shuffled][:20] for n, c in columns.items()}, ids[shuffled][:20]
    )
    gains = table(list(gradients_metrics.gains(records, less, (0, 300))))
    assert gains["gain/gradient_norm@t=0"].value == pytest.approx(0.25, rel=1e-6)
    assert gains["gain/chain/pag_cosine@t=300"].n == 20
    assert gains["gain/jacobian_norm@t=0"].value == 0 and np.isinf(gains["gain/jacobian_norm@t=0"].low)
    more = records_of({"image_jacobian_square": 4 * base}, ids)
    gain = table(list(gradients_metrics.gains(more, records, (0, 300))))["gain/jacobian_norm@t=0"]
    assert gain.value == pytest.approx(np.sqrt(base[:, 0].mean()), rel=1e-6) and 0 < gain.low < gain.value < gain.high


def test_zero_gradients_are_told_and_left_out() -> None:
    network = Lambda(lambda images: (images.flatten(1)[:, :4] - 0.5).relu() * 9 * (images.mean() > -1))
    batch = replace(a_batch(), images=torch.cat([torch.zeros(2, *SHAPE), a_batch().images[2:]]))
    rows = rows_of(Gradients(), model_of(network), batch)
    records = records_of({name: column.numpy() for name, column in rows.items()}, batch.ids)
    said = list(Gradients().notices(records))
    assert any("is 0 for" in line for line in said)
    found = table(list(Gradients().metrics(records)))
    assert found["gradient_norm@t=0"].n == 6 > found["gradient_sparsity@t=0"].n


def test_pictures_are_grids_of_what_was_seen() -> None:
    evaluator = Gradients(denoiser=MixtureDenoiser(), times=(0, 300), gallery=True)
    batch = a_batch(10)
    rows = rows_of(evaluator, model_of(Linear()), batch)
    records = records_of({name: column.numpy() for name, column in rows.items()}, batch.ids)
    clean, noisy = evaluator.pictures(records)
    assert clean.name == "gradients-t0" and clean.across == ("image", "gradient")
    assert noisy.across == ("image", "x_t", "D(x_t)", "gradient", "gradient at D(x_t)", "gradient through D")
    assert noisy.tiles is not None and noisy.tiles.shape == (8, 6, 8, 8, 1) and len(noisy.down) == 8
    assert np.array_equal(noisy.tiles[:, 0, :, :, 0], (batch.images[:8, 0] * 255).round().byte().numpy())
    assert all(noisy.tiles[:, column].min() == 0 and noisy.tiles[:, column].max() == 255 for column in (3, 4, 5))
    assert not list(Gradients().pictures(records))
