"""DeepAugment: who shares a perturbation, and what nothing else may depend on."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.train.deepaugment import (
    FAMILIES,
    DeepAugment,
    Family,
    ImageNetwork,
    deepaugment,
    distort,
    perturbed,
    runs,
)
from robustbench_diffaug.train.image_networks import build_image_network

SMALL: dict[str, dict[str, int]] = {
    "autoencoder": {"width": 8, "blocks": 2, "patch": 2},
    "edsr": {"width": 8, "blocks": 4, "scale": 2},
    "cae": {"width": 8},
}


def values(*shape: int, key: int = 0) -> Tensor:
    return torch.from_numpy(rng.normal(rng.key("deepaugment", key), range(1), shape)[0])


def images(count: int = 6, channels: int = 1, height: int = 16, width: int = 16) -> Tensor:
    drawn = rng.uniform(rng.key("images"), range(count), (channels, height, width))
    return torch.from_numpy(drawn).float()


def network(folder: Path, arch: str = "autoencoder", channels: int = 1, **more: Any) -> ImageNetwork:
    path = folder / f"{arch}-{channels}.safetensors"
    with rng.seeded(rng.key("weights", arch)):
        module = build_image_network(arch, tuple(SMALL[arch].items()), channels)
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)
    data = {"arch": arch, "args": SMALL[arch], "channels": channels, "weights": {"uri": str(path)}, **more}
    return ImageNetwork.model_validate(data)


@pytest.mark.parametrize("arch", SMALL)
def test_every_option_changes_what_it_says_and_nothing_else(arch: str) -> None:
    with rng.seeded(1):
        module = build_image_network(arch, tuple(SMALL[arch].items()), 3)
    own = {name: value.clone() for name, value in module.state_dict().items()}
    blocks: Any = module.blocks
    family = FAMILIES[arch]
    for name, option in family.perturbations.items():
        found = perturbed(module, Family({name: option}, 1, ()), 7)
        changed = {key for key in own if not torch.equal(found[key], own[key])}
        assert changed, name
        allowed = {f"{layer}.{kind}" for block in blocks for layer in block for kind in ("weight", "bias")}
        assert changed <= allowed, name
        assert option.bias or not any(key.endswith("bias") for key in changed), name
        assert all(found[key].shape == own[key].shape and found[key].isfinite().all() for key in own)
    for key, value in module.state_dict().items():
        assert torch.equal(value, own[key])


def test_published_numbers_of_options() -> None:
    # EDSR_distort_imagenet.py draws 3 of 17, 1 of 4 `pre` and 1 of 5 `body`; CAE_distort_imagenet.py 1 of 8, and the
    # network itself 1 of 9, in github.com/hendrycks/imagenet-r
    edsr, cae = FAMILIES["edsr"], FAMILIES["cae"]
    assert (len(edsr.perturbations), edsr.drawn, [len(group) for group in edsr.groups]) == (17, 3, [4, 5])
    assert (len(cae.perturbations), cae.drawn, [len(group) for group in cae.groups]) == (8, 1, [9, 1])


def test_a_draw_is_that_many_distinct_options() -> None:
    def add(power: int) -> Any:
        return lambda weight, key: weight + 10.0**power

    module = build_image_network("autoencoder", (("blocks", 1), ("width", 2)), 1)
    zeros = {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
    module.load_state_dict(zeros)
    options = {f"{power}": FAMILIES["edsr"].perturbations["negate"]._replace(first=add(power)) for power in range(5)}
    seen = set()
    for key in range(40):
        total = round(float(perturbed(module, Family(options, 3, ()), key)["body.0.body.0.weight"][0, 0, 0, 0]))
        assert sorted(f"{total:05d}") == ["0", "0", "1", "1", "1"]  # three powers of ten, each once
        seen.add(total)
    assert len(seen) == 10  # all choices of 3 of 5


@given(redraw=st.floats(0, 1), count=st.integers(1, 40), seed=st.integers(0, 99))
def test_runs_cover_the_batch_in_order(redraw: float, count: int, seed: int) -> None:
    found = runs(count, redraw, (seed,))
    assert [position for run in found for position in run] == list(range(count))
    assert all(len(run) for run in found)
    longer = runs(count + 5, redraw, (seed,))  # the images that follow do not move what went before
    assert [run.start for run in longer if run.start < count] == [run.start for run in found]


def test_run_lengths_by_redraw() -> None:
    assert runs(9, 0.0, (0,)) == [range(9)]
    assert runs(3, 1.0, (0,)) == [range(1), range(1, 2), range(2, 3)]
    assert runs(0, 0.5, (0,)) == []
    starts = len(runs(20_001, 0.05, (0,))) - 1
    assert stats.binomtest(starts, 20_000, 0.05).pvalue > 1e-4


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_range_and_shape_and_what_it_may_depend_on(arch: str, channels: int, tmp_path: Path) -> None:
    net = network(tmp_path, arch, channels)
    term = DeepAugment(networks=(net,), redraw=0.3)
    before = rng.global_states()
    own = {name: value.clone() for name, value in net.loaded("cpu").state_dict().items()}
    for height, width in ((16, 16), (17, 13), (12, 15)):
        batch = images(5, channels, height, width)
        kept = batch.clone()
        found = deepaugment(batch, net, term, (0, "deepaugment", 1, 0))
        assert found.shape == batch.shape
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
        assert not found.requires_grad
        assert torch.equal(found, deepaugment(batch, net, term, (0, "deepaugment", 1, 0)))
        assert not torch.equal(found, deepaugment(batch, net, term, (0, "deepaugment", 2, 0)))
        assert torch.equal(batch, kept)
    assert rng.global_states() == before
    for name, value in net.loaded("cpu").state_dict().items():
        assert torch.equal(value, own[name])


@pytest.mark.parametrize("arch", SMALL)
def test_a_run_is_a_call_with_its_weights(arch: str, tmp_path: Path) -> None:
    net = network(tmp_path, arch)
    term, batch, key = DeepAugment(networks=(net,), redraw=0.4), images(8), (3, "deepaugment", 5, 0)
    found, module = deepaugment(batch, net, term, key), net.loaded("cpu")
    chance = rng.uniform(rng.key(*key, "redraw"), range(8), ())
    starts = [0] + [position for position in range(1, 8) if chance[position] < 0.4] + [8]
    assert len(starts) > 3
    for start, stop in pairwise(starts):
        state = perturbed(module, FAMILIES[arch], rng.key(*key, "weights", start))
        keys = [rng.key(*key, "features", position) for position in range(start, stop)]
        with torch.no_grad():
            direct = functional_call(module, state, (batch[start:stop], distort(FAMILIES[arch], keys)))
        if direct.shape != batch[start:stop].shape:
            direct = functional.interpolate(direct, size=(16, 16), mode="bilinear", antialias=True)
        assert torch.allclose(found[start:stop], direct.clamp(0, 1), atol=1e-6)


def test_all_or_each_share_a_perturbation(tmp_path: Path) -> None:
    net = network(tmp_path)
    plain = net.loaded("cpu")
    same = images(1).expand(6, -1, -1, -1).contiguous()
    family = FAMILIES["autoencoder"]
    shared = [perturbed(plain, family, rng.key(0, "weights", run.start)) for run in runs(6, 0.0, (0,))]
    each = [perturbed(plain, family, rng.key(0, "weights", run.start)) for run in runs(6, 1.0, (0,))]
    assert (len(shared), len(each)) == (1, 6)
    term = DeepAugment(networks=(net,), redraw=1.0)
    found = deepaugment(same, net, term, (0,))
    assert len({tuple(image.flatten().tolist()) for image in found}) == 6


def test_distortions_are_each_images_own() -> None:
    family, keys = FAMILIES["edsr"], [rng.key("features", position) for position in range(9)]
    features, start = values(9, 8, 5, 5), values(9, 8, 5, 5, key=1)
    whole = distort(family, keys)
    for place in ("head", "body", "end"):
        together = whole(place, features, start)
        for row, key in enumerate(keys):
            alone = distort(family, [key])(place, features[row : row + 1], start[row : row + 1])
            assert torch.equal(together[row], alone[0])
    changed = [
        not torch.equal(distort(family, [rng.key("count", number)])("end", features[:1], start[:1]), features[:1])
        for number in range(400)
    ]
    assert stats.binomtest(sum(changed), 400, 0.2).pvalue > 1e-4  # one in five leaves the blocks out


def test_images_are_resized_to_the_size_and_back(tmp_path: Path) -> None:
    net = network(tmp_path, size=24)
    seen: list[tuple[int, ...]] = []
    module = net.loaded("cpu")
    handle = module.register_forward_pre_hook(lambda module, arguments: seen.append(tuple(arguments[0].shape)))
    try:
        found = deepaugment(images(2, 1, 12, 18), net, DeepAugment(networks=(net,), redraw=0.0), (0,))
    finally:
        handle.remove()
    assert seen == [(2, 1, 24, 36)]
    assert found.shape == (2, 1, 12, 18)


def test_the_weights_of_a_changed_file_are_loaded_anew(tmp_path: Path) -> None:
    net = network(tmp_path)
    first = net.loaded("cpu")
    assert net.loaded("cpu") is first
    state = {name: value + 1 for name, value in first.state_dict().items()}
    save_file(state, net.weights.uri)
    again = net.loaded("cpu")
    assert torch.equal(again.state_dict()["body.0.body.0.bias"], first.state_dict()["body.0.body.0.bias"] + 1)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert not again.training
    assert isinstance(again, nn.Module)


def test_overflow_is_clamped(tmp_path: Path) -> None:
    net = network(tmp_path)
    state = {name: torch.full_like(value, 1e38) for name, value in net.loaded("cpu").state_dict().items()}
    save_file(state, net.weights.uri)
    found = deepaugment(images(4), net, DeepAugment(networks=(net,)), (0,))
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_identity_covers_the_weights_not_their_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = network(tmp_path / "a"), network(tmp_path / "b")
    assert one.identity() == other.identity()
    assert network(tmp_path / "b", size=20).identity() != one.identity()
    before = rng.global_states()
    hash(DeepAugment(networks=(one, other)))
    assert rng.global_states() == before


def test_bad_values(tmp_path: Path) -> None:
    net = network(tmp_path)
    for wrong in ({"networks": ()}, {"networks": (net,), "redraw": 1.5}, {"networks": (net,), "weight": 0.0}):
        with pytest.raises(ValidationError):
            DeepAugment.model_validate(wrong)
    with pytest.raises(ValidationError, match="size must be at least 12 for cae, not 11"):
        network(tmp_path, "cae", size=11)
    term = DeepAugment(networks=(net,))
    with pytest.raises(ValueError, match="the image network is for 1 channels and the images have 3"):
        deepaugment(images(2, 3), net, term, (0,))
    small = network(tmp_path, "cae")
    with pytest.raises(ValueError, match="cae needs images of 12 pixels or more; give the image network a size"):
        deepaugment(images(2, 1, 8, 20), small, term, (0,))
    missing = ImageNetwork.model_validate({"weights": {"uri": str(tmp_path / "none.safetensors")}})
    with pytest.raises(ValueError, match="there is no"):
        missing.loaded("cpu")
    other = {"arch": "edsr", "args": SMALL["edsr"], "channels": 1, "weights": {"uri": net.weights.uri}}
    with pytest.raises(ValueError, match="does not fit the network"):
        ImageNetwork.model_validate(other).loaded("cpu")
