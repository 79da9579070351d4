"""The shift evaluator against an independent loop, and its figures by hand."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from pydantic import ValidationError

from robustbench_diffaug import rng
from robustbench_diffaug.baselines import BASELINES, mce
from robustbench_diffaug.batch import Batch, Limits
from robustbench_diffaug.checkpoints.bayes import Bayes
from robustbench_diffaug.data.corruptions import COMMON
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.diffusion.adaptation import Adaptation, low_pass
from robustbench_diffaug.diffusion.adm import Adm
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.diffusion.samplers import dpm_solver_2
from robustbench_diffaug.diffusion.unet import UNet
from robustbench_diffaug.evaluators.shift import Shift
from robustbench_diffaug.evaluators.shift_metrics import against_checkpoints, against_published
from robustbench_diffaug.files import Weights
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
    assert evaluator.forwards().of(1, 1) == (1, 2, 0)


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
        "nll": np.full(len(names), 0.2),
        "brier": np.full(len(names), 0.3),
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
    with pytest.raises(ValidationError, match="mode dda-se needs a denoiser"):
        Shift(modes=("default", "dda-se"))
    with pytest.raises(ValidationError, match="one twice"):
        Shift(modes=("default", "default"))
    with pytest.raises(ValidationError, match="no one of times is a multiple"):
        Shift(times=(10, 20), steps=(25,))
    with pytest.raises(ValueError, match="class-conditional"):
        Shift(modes=("de",), denoiser=UNet(folder="rdiff:zoo/mnist5k-ddpm"), mixing=0.5).check()
    (warning,) = Shift(modes=("de",), denoiser=MixtureDenoiser(), mixing=0.5).check()
    assert "knows the answer" in warning
    with pytest.raises(ValueError, match="respacing is 2000"):
        Shift(modes=("dda",), denoiser=MixtureDenoiser(), dda=Adaptation(respacing=2000)).check()


def test_a_learned_variance_is_asked_for_before_a_run() -> None:
    ddpm = UNet(folder="rdiff:zoo/mnist5k-ddpm")
    with pytest.raises(ValueError, match="no learned variance; give dda variance: small"):
        Shift(modes=("dda",), denoiser=ddpm).check()
    Shift(modes=("dda",), denoiser=ddpm, dda=Adaptation(variance="small")).check()
    Shift(modes=("dda",), denoiser=Adm(weights=Weights(uri="none.pt"), architecture="imagenet-256")).check()


def test_only_the_ensemble_is_told_classes() -> None:
    told = Adm(weights=Weights(uri="none.pt"), architecture="imagenet-64-class")
    Shift(modes=("default", "de"), denoiser=told, mixing=1).check()
    for more in ({"mixing": 0.5}, {"modes": ("de", "dda"), "mixing": 1}):
        with pytest.raises(ValueError, match="needs the class of each image"):
            Shift.model_validate({"modes": ("de",), "denoiser": told, **more}).check()


def test_adaptation_is_an_independent_loop_on_the_same_noise() -> None:
    """Ancestral steps by diffusers' scheduler, and the gradient of one image's norm at a time."""
    settings, denoiser, batch = Adaptation(N=4, respacing=20, variance="small"), MixtureDenoiser(), a_batch()
    evaluator = Shift(modes=("default", "dda", "dda-se"), denoiser=denoiser, dda=settings)
    assert evaluator.forwards().of(1, 1) == (4, 2, 4)
    rows = observed(evaluator, batch)
    model = Bayes(id="b", classes=4, temperature=0.0016).loaded(batch.limits)
    denoise, times = denoiser.loaded(batch.limits), [round(i * 999 / 19) for i in range(20)]
    kept = 1 / (1 + 4 * denoiser.sigmas()[times] ** 2)
    betas = 1 - kept / np.append(1, kept[:-1])
    scheduler = DDPMScheduler(num_train_timesteps=20, trained_betas=betas, prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(20)
    adapted = []
    for image, id in zip(batch.images, batch.ids, strict=True):
        key = rng.key(batch.seed, "shift/dda", batch.dataset, id)
        noise = [torch.from_numpy(rng.normal(key, range(k, k + 1), tuple(image.shape))) for k in range(5)]
        reference = 2 * image[None] - 1
        state = kept[4] ** 0.5 * reference + (1 - kept[4]) ** 0.5 * noise[4]
        for step in (3, 2, 1, 0):
            state = state.detach().requires_grad_()
            seen = (state / kept[step] ** 0.5 + 1) / 2
            clean = 2 * denoise(seen, float(denoiser.sigmas()[times[step]])).mean - 1
            distance = torch.linalg.norm(low_pass(reference, 4) - low_pass(clean, 4))
            (gradient,) = torch.autograd.grad(distance, state)
            mean = scheduler.step(clean.detach(), step, state.detach(), generator=torch.Generator()).prev_sample
            mean = mean - _scheduler_noise(scheduler, clean, step)
            before = kept[step - 1] if step else 1
            deviation = (betas[step] * (1 - before) / (1 - kept[step])) ** 0.5 if step else 0.0
            state = (mean + deviation * noise[step] - settings.scale / 2 * gradient).detach()
        adapted.append(((state + 1) / 2).clamp(0, 1))
    shown = model.logits(torch.cat(adapted)).double().softmax(dim=1)
    plain = model.logits(batch.images).double().softmax(dim=1)
    assert torch.allclose(rows["dda_confidence"], shown.max(1).values, atol=1e-4)
    assert torch.equal(rows["dda_pred"], shown.argmax(1).int())
    assert torch.allclose(rows["dda_se_confidence"], ((shown + plain) / 2).max(1).values, atol=1e-4)
    assert torch.allclose(rows["dda_nll"], -shown.gather(1, batch.labels[:, None])[:, 0].log(), atol=1e-3)


def _scheduler_noise(scheduler: DDPMScheduler, clean: torch.Tensor, step: int) -> torch.Tensor:
    """What diffusers' step adds at random: it is drawn again from a generator of the same state."""
    if not step:
        return torch.zeros_like(clean)
    noise = torch.randn(clean.shape, generator=torch.Generator())  # noqa: TID251  (as diffusers drew it)
    added: torch.Tensor = scheduler._get_variance(step) ** 0.5 * noise
    return added


def test_a_subset_of_classes_is_reported_beside_all() -> None:
    """Of four classes the images can be of classes 1 and 3; class 0 has the largest logit of all."""
    logits = torch.tensor([[9.0, 1.0, 8.0, 2.0], [9.0, 3.0, 8.0, 2.0]]).double()
    batch = Batch("r", ("a", "b"), torch.zeros(2, 1, 8, 8), torch.tensor([3, 1]), 0, Limits(), (1, 3))
    rows = Shift().record({"t=0": [{"logits": logits}]}, batch)
    assert rows["pred"].tolist() == [3, 1]
    assert rows["other_pred"].tolist() == [0, 0]
    chance = torch.sigmoid(torch.tensor([1.0, 1.0]).double())
    assert torch.allclose(rows["confidence"], chance)
    assert torch.allclose(rows["nll"], -chance.log())
    assert torch.allclose(rows["brier"], 2 * (1 - chance) ** 2)
    whole = Shift().record({"t=0": [{"logits": logits}]}, replace(batch, class_space="full"))
    assert whole["pred"].tolist() == [0, 0]
    assert whole["other_pred"].tolist() == [3, 1]
    with pytest.raises(ValueError, match="without a label"):
        Shift().record({"t=0": [{"logits": logits}]}, replace(batch, labels=torch.tensor([3, -1])))


def test_each_class_space_is_told_of_its_own_datasets() -> None:
    declared = (Declared("s", "s", "r", 0, 2, 2, 200, "subset"), Declared("f", "f", "r", 0, 2, 2, 200, "full"))
    columns = {
        "dataset": np.array(["s", "s", "f", "f"]),
        "origin": np.array(["s", "s", "f", "f"]),
        "sample": np.array(["0", "1", "0", "1"]),
        "label": np.zeros(4, dtype=np.int64),
        "pred": np.zeros(4, dtype=np.int64),
        "other_pred": np.array([0, 0, 0, 1]),
        **{name: np.full(4, 0.5) for name in ("confidence", "entropy", "nll", "brier")},
    }
    found = {figure.name: figure for figure in Shift().metrics(Records(columns, declared))}
    assert found["accuracy/r/classes=full"].value == 1
    assert found["accuracy/r/classes=subset"].value == 0.5


def test_ensembles_of_other_steps() -> None:
    times = (0, 25, 50, 75, 100)
    evaluator = Shift(modes=("de",), denoiser=MixtureDenoiser(), times=times, steps=(25, 50, 75))
    coarse = Shift(modes=("de",), denoiser=MixtureDenoiser(), times=(0, 50, 100))
    rows, other = observed(evaluator, a_batch()), observed(coarse, a_batch())
    assert torch.equal(rows["de_step25_pred"], rows["de_pred"])
    assert torch.equal(rows["de_step50_pred"], other["de_pred"])
    assert rows["de_step75_pred"].shape == (12, 2)


def test_conditional_and_second_order_denoising() -> None:
    """With mixing the class is the label; the solver's step is `samplers.dpm_solver_2` of the bare denoiser."""
    batch, denoiser = a_batch(), MixtureDenoiser()
    second = Shift(modes=("de",), denoiser=denoiser, times=(0, 200), sampler="dpm-solver-2")
    assert second.forwards().of(1, 1) == (2, 2, 0)
    views = {view.name: view.images[:, 0] for view in second.views(batch)}
    (noise,) = batch.noise("shift/t=200", range(1))
    sigma = denoiser.sigma(200)
    bare = denoiser.model_copy(update={"clip": False}).loaded(batch.limits)
    noisy = batch.images[:, None] + sigma * noise
    expected = dpm_solver_2(bare, noisy, sigma, denoiser.level(1e-3))[:, 0].clamp(0, 1)
    assert torch.equal(views["t=200"], expected)
    assert Shift(modes=("de",), denoiser=denoiser, times=(200,), mixing=0.3).forwards().of(1, 1) == (2, 2, 0)


ALL = [(corruption, severity) for corruption in COMMON for severity in range(1, 6)]


def of_errors(errors: dict[tuple[str, int], list[int]], clean: list[int]) -> Records:
    """Records of images by whether they are wrong."""
    declared = [Declared("c", "c", "clean", 0, len(clean), len(clean))]
    rows = [("c", "c", str(i), wrong, "clean", 0) for i, wrong in enumerate(clean)]
    for (group, severity), row in errors.items():
        name = f"{group}@s{severity}"
        declared.append(Declared(name, "c", group, severity, len(row), len(clean)))
        rows += [(name, "c", str(i), wrong, group, severity) for i, wrong in enumerate(row)]
    columns = dict(
        zip(("dataset", "origin", "sample", "pred", "group", "severity"), zip(*rows, strict=True), strict=True)
    )
    arrays = {name: np.array(column) for name, column in columns.items()}
    return Records({**arrays, "label": np.zeros(len(rows), dtype=np.int64)}, tuple(declared))


def test_alexnets_own_errors_give_an_mce_of_one() -> None:
    """As many of 1,000 images wrong as published, to a thousandth; and twice as many of one corruption."""
    alexnet = BASELINES["robustbench-alexnet"]
    wrong = {name: round(1000 * alexnet.error(name)) for name in COMMON}
    clean = [int(i < round(1000 * (alexnet.clean or 0))) for i in range(1000)]
    records = of_errors({(c, s): [int(i < wrong[c]) for i in range(1000)] for c, s in ALL}, clean)
    found = {m.name: m for m in against_published(records, ("default",), ("robustbench-alexnet",))}
    assert found["mce/robustbench-alexnet"].value == pytest.approx(1, abs=1e-3)
    assert found["relative-mce/robustbench-alexnet"].value == pytest.approx(1, abs=2e-3)
    assert found["mce/robustbench-alexnet"].better == "lower"
    half = of_errors({(c, s): [int(i < wrong[c] // 2) for i in range(1000)] for c, s in ALL}, clean)
    (figure, *_) = against_published(half, ("default",), ("robustbench-alexnet",))
    errors = {c: dict.fromkeys(range(1, 6), (wrong[c] // 2) / 1000) for c in COMMON}
    assert figure.value == pytest.approx(mce(errors, alexnet), rel=1e-12)  # the formula itself, without an interval
    assert figure.value == pytest.approx(0.5, abs=1e-3)
    assert figure.low <= figure.value <= figure.high


def test_a_checkpoint_as_baseline() -> None:
    base = of_errors({("fog", 5): [1, 1, 1, 0], ("snow", 5): [1, 0, 0, 0]}, [0, 0, 0, 0])
    other = of_errors({("fog", 5): [1, 1, 0, 0], ("snow", 5): [1, 1, 0, 0]}, [0, 0, 0, 1])
    by_id = {"a": base, "b": other}
    found = {(id, m.name): m for id, m in against_checkpoints(("a", "b"), by_id.__getitem__, ("default",), ("a",))}
    assert found["a", "mce/a"].value == 1
    assert found["b", "mce/a"].value == pytest.approx((2 / 3 + 2) / 2)
    assert found["b", "relative-mce/a"].value == pytest.approx((1 / 3 + 1) / 2)
    never = of_errors({("fog", 5): [0, 0, 0, 0]}, [0, 0, 0, 0])
    with pytest.raises(ValueError, match="under fog the baseline makes no error"):
        list(against_checkpoints(("n", "b"), {"n": never, "b": never}.__getitem__, ("default",), ("n",)))


def without(records: Records, dataset: str) -> Records:
    """The records before a dataset was measured."""
    kept = records["dataset"] != dataset
    return replace(records, columns={name: column[kept] for name, column in records.columns.items()})


def test_a_run_that_is_not_finished_has_no_mce_yet() -> None:
    """Of the last corruption all severities but one are there; and clean images are there, but not of these."""
    whole = of_errors({version: [1, 0, 1, 1] for version in ALL}, [0, 1, 0, 0])
    names = ("hendrycks-alexnet",)
    assert len(list(against_published(whole, ("default",), names))) == 2
    assert not list(against_published(without(whole, "jpeg_compression@s5"), ("default",), names))
    (figure,) = against_published(without(whole, "c"), ("default",), names)
    assert figure.name == "mce/hendrycks-alexnet"
    later = {**whole.columns, "sample": np.where(whole["dataset"] == "c", "later", whole["sample"])}
    assert len(list(against_published(replace(whole, columns=later), ("default",), names))) == 1
    by_id = {"a": without(whole, "fog@s5"), "b": whole}
    for base in ("a", "b"):
        found = list(against_checkpoints(("a", "b"), by_id.__getitem__, ("default",), (base,)))
        assert {id for id, _ in found} <= {base}


def test_other_corruptions_leave_the_mce_as_it_is() -> None:
    whole = {version: [1, 0, 1, 1] for version in ALL}
    records = of_errors({**whole, ("my_own", 5): [1, 1, 1, 1]}, [0, 1, 0, 0])
    (mce, relative), (same, alike) = (
        against_published(found, ("default",), ("robustbench-alexnet",))
        for found in (records, of_errors(whole, [0, 1, 0, 0]))
    )
    assert (mce.value, relative.value) == (same.value, alike.value)
    found = dict(against_checkpoints(("a",), {"a": records}.__getitem__, ("default",), ("a",)))
    assert found["a"].value == 1


def test_a_relative_mce_that_is_not_defined_comes_after_all_others() -> None:
    records = of_errors({("fog", 5): [1, 0, 0, 0]}, [1, 0, 0, 0])
    figures = against_checkpoints(("a", "b"), {"a": records, "b": records}.__getitem__, ("default",), ("a", "b"))
    found = [(id, figure.name) for id, figure in islice(figures, 4)]
    assert found == [("a", "mce/a"), ("b", "mce/a"), ("a", "mce/b"), ("b", "mce/b")]
    with pytest.raises(ValueError, match="no more than on clean images"):
        next(figures)


def test_baselines_must_fit_the_bench() -> None:
    with pytest.raises(ValueError, match="74 are missing: gaussian_noise@s1"):
        Shift(baselines=("hendrycks-alexnet",)).fits([Mixture(group="gaussian_noise", severity=5)], ["a"])
    with pytest.raises(ValueError, match="did you mean resnet"):
        Shift(baselines=("resnat",)).fits([], ["resnet"])
    Shift(baselines=("resnet",)).fits([], ["resnet"])
    unnamed = [Mixture(name=c, severity=s) for c, s in ALL]  # a group that is left out is the name
    Shift(baselines=("hendrycks-alexnet",)).fits(unnamed, ["a"])
