"""ODIN and GradNorm against OpenOOD's own code, autograd, and their definitions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.checkpoints.base import Preprocess
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.detection import gradient_scores
from robustbench_diffaug.detection.rows import Rows
from robustbench_diffaug.evaluators.ood_gradients import odin

# OpenOOD's for cifar10
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR = Preprocess(mean=MEAN, std=STD)

# ODINPostprocessor and GradNormPostprocessor of OpenOOD at commit 3c35632, run with the dataset's name cifar10 on the
# network and the images below.
ODIN = {
    (1000.0, 0.0014): [0.10081622004508972, 0.10058947652578354, 0.10077469050884247, 0.10235870629549026],
    (1.0, 0.0028): [0.9642770886421204, 0.6035484671592712, 0.9552400708198547, 0.9993948936462402],
    (10.0, 0.1): [0.31971296668052673, 0.2547771632671356, 0.3057638108730316, 0.660685658454895],
}
GRADNORM = [222.15943908691406, 182.5738983154297, 172.9686737060547, 425.369873046875]


class Small(nn.Module):
    """A convolution and a linear layer, with weights that are the same everywhere."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 10)
        for index, weight in enumerate(self.parameters()):
            values = rng.normal(rng.key("ood-gradients", index), range(1), tuple(weight.shape))
            weight.data.copy_(torch.from_numpy(values[0]))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv(images).relu().mean((2, 3)))
        return logits


class Call(nn.Module):
    """A network that is a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def model(network: nn.Module | None = None, preprocess: Any = CIFAR, classes: int = 10, **more: Any) -> Model:
    net = (network or Small()).eval().requires_grad_(False)
    return Model("net", net, preprocess, classes, **{"microbatch": 4, **more})


def images(count: int = 4, size: int = 8) -> Tensor:
    found = torch.from_numpy(rng.uniform(rng.key("ood-gradients"), range(count), (3, size, size))).float()
    found[3:4] = 0
    return found


def gradnorm(model: Model, images: Tensor) -> Tensor:
    """Of images, by what is recorded of them."""
    with torch.no_grad():
        return of_arrays(*model.features(images))


def of_arrays(logits: Tensor, features: Tensor) -> Tensor:
    rows = Rows(logits.numpy(), features.numpy(), np.zeros(len(logits), np.int64))
    return torch.from_numpy(gradient_scores.gradnorm(rows))


def as_published(network: nn.Module, inputs: Tensor, temperature: float, noise: float, std: Tensor) -> Tensor:
    """ODIN of one normalised image after the other, in float64."""
    found = []
    for each in inputs.double()[:, None]:
        leaf = each.requires_grad_()
        logits = network(leaf) / temperature
        (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, logits.argmax(1)), leaf)
        moved = each.detach() - noise * torch.where(gradient >= 0, 1.0, -1.0) / std
        found.append((network(moved) / temperature).softmax(1).max())
    return torch.stack(found)


@pytest.mark.parametrize("setting", ODIN)
def test_odin_is_openoods(setting: tuple[float, float]) -> None:
    found = odin(model(), images(), *setting)
    assert found.dtype == torch.float64
    assert torch.allclose(found, torch.tensor(ODIN[setting], dtype=torch.float64), rtol=0, atol=1e-6)


def test_gradnorm_is_openoods() -> None:
    found = gradnorm(model(), images())
    assert found.dtype == torch.float64
    assert torch.allclose(found, torch.tensor(GRADNORM, dtype=torch.float64), rtol=1e-6, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    temperature=st.sampled_from([0.5, 1.0, 10.0, 1000.0]),
    noise=st.floats(0, 0.05),
    std=st.tuples(*[st.floats(0.1, 1.0)] * 3),
)
def test_odin_is_its_definition(temperature: float, noise: float, std: tuple[float, ...]) -> None:
    found = odin(model(preprocess=Preprocess(mean=MEAN, std=std)), images(), temperature, noise)
    planes = torch.tensor(std, dtype=torch.float64)[:, None, None]
    inputs = (images().double() - torch.tensor(MEAN, dtype=torch.float64)[:, None, None]) / planes
    expected = as_published(Small().double(), inputs, temperature, noise, planes)
    assert torch.allclose(found, expected, rtol=0, atol=2e-5)


@settings(max_examples=50, deadline=None)
@given(classes=st.integers(2, 12), width=st.integers(1, 9), spread=st.sampled_from([0.01, 1.0, 30.0]))
def test_gradnorm_is_the_norm_of_the_gradient(classes: int, width: int, spread: float) -> None:
    key = rng.key("gradnorm", classes, width)
    features = torch.from_numpy(rng.normal(key, range(5), (width,))).double()
    weight = spread * torch.from_numpy(rng.normal(key, range(5, 5 + classes), (width,))).double()
    layer = nn.Linear(width, classes, bias=False).double()
    layer.weight.data.copy_(weight)
    expected = []
    for row in features:
        loss = -functional.log_softmax(layer(row), dim=0).sum()
        (gradient,) = torch.autograd.grad(loss, layer.weight)
        expected.append(gradient.abs().sum())
    found = of_arrays(features @ weight.T, features)
    assert torch.allclose(found, torch.stack(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("score", [lambda net, x: odin(net, x, 1000.0, 0.01), gradnorm])
def test_scores_do_not_depend_on_the_images_beside(score: Callable[[Model, Tensor], Tensor]) -> None:
    net, shown = model(Small(16)), images(11)
    whole = score(net, shown)
    assert len(whole.unique()) == 11
    assert torch.equal(score(net, shown.flip(0)).flip(0), whole)
    for part in (shown[:1], shown[5:8], shown[2:11]):
        rows = [int((shown == each).flatten(1).all(1).nonzero()[0, 0]) for each in part]
        assert torch.equal(score(net, part), whole[rows])


def test_a_network_that_is_sure_of_itself_still_has_a_gradient() -> None:
    """With logits apart by thousands the softmax is 0 and 1 in any precision, and what counts is the runner-up."""
    small, seen = Small(), list[Tensor]()

    def sure(inputs: Tensor) -> Tensor:
        seen.append(inputs.detach())
        logits: Tensor = 1024 * small(inputs)
        return logits

    odin(model(Call(sure)), images(), 1.0, 0.01)
    leaf = CIFAR(images()).requires_grad_()
    first, second = small(leaf).topk(2, dim=1).values.T
    (gradient,) = torch.autograd.grad((first - second).sum(), leaf)
    assert torch.equal(seen[1] > seen[0], gradient > 0)
    assert 0.1 < float((gradient > 0).double().mean()) < 0.9


def test_a_pixel_without_influence_goes_down() -> None:
    """As in OpenOOD, where a gradient of 0 counts as positive."""

    def logits(inputs: Tensor) -> Tensor:
        first = torch.relu(0.5 - inputs[:, 0, 0, 0])
        return torch.stack([first, torch.zeros_like(first)], dim=1)

    shown = torch.full((1, 1, 1, 1), 0.501)
    found = odin(model(Call(logits), Preprocess(), 2), shown, 0.001, 0.0014)
    expected = torch.tensor([0.5 - (0.501 - 0.0014), 0]).double() / 0.001
    assert torch.allclose(found, expected.softmax(0)[:1], atol=1e-4)
    assert found > 0.55


def test_the_step_is_of_pixels_after_the_resize() -> None:
    resized = Preprocess(size=12, mean=MEAN, std=STD)
    large = Preprocess(size=12)(images())
    assert torch.allclose(
        odin(model(preprocess=resized), images(), 10.0, 0.02), odin(model(), large, 10.0, 0.02), rtol=1e-6
    )


def test_without_noise_it_is_the_softened_probability() -> None:
    net = model()
    expected = (net.logits(images()).double() / 10).softmax(1).amax(1)
    assert torch.equal(odin(net, images(), 10.0, 0.0), expected)


def test_nothing_is_left_behind() -> None:
    net, shown = model(), images()
    net.network.requires_grad_(True)
    before = shown.clone()
    found = odin(net, shown, 1000.0, 0.0014)
    assert not found.requires_grad
    assert torch.equal(shown, before)
    assert shown.grad is None
    assert all(weight.grad is None for weight in net.network.parameters())
    with torch.no_grad():  # as the engine calls it
        assert torch.equal(odin(net, shown, 1000.0, 0.0014), found)


def test_bfloat16() -> None:
    rough = model(Small().to(torch.bfloat16), dtype=torch.bfloat16)
    assert torch.allclose(odin(rough, images(), 10.0, 0.01), odin(model(), images(), 10.0, 0.01), atol=0.01)
    assert torch.allclose(gradnorm(rough, images()), gradnorm(model(), images()), rtol=0.05)


def test_compiled_networks() -> None:
    torch._dynamo.reset()
    net = model()
    net.network.compile(dynamic=False, backend="aot_eager")
    assert torch.allclose(odin(net, images(5), 10.0, 0.01), odin(model(), images(5), 10.0, 0.01), atol=1e-6)
    assert torch.allclose(gradnorm(net, images(5)), gradnorm(model(), images(5)), rtol=1e-6)


def apart(inputs: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = Small()(inputs)
    return logits


def counted(inputs: Tensor) -> Tensor:
    return functional.one_hot((inputs.flatten(1).sum(1) > 0).long(), 10).float()


def constant(inputs: Tensor) -> Tensor:
    return torch.ones(len(inputs), 10, requires_grad=True)


class OneWay(torch.autograd.Function):
    """An operation that has no derivative."""

    @staticmethod
    def forward(context: Any, inputs: Tensor) -> Tensor:
        return inputs.flatten(1)[:, :10].clone()


@pytest.mark.parametrize("network", [apart, counted, constant, OneWay.apply])
def test_a_network_that_is_not_differentiable_is_named(network: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^net is not differentiable in its input, which ODIN needs; leave odin out"):
        odin(model(Call(network)), images(), 1000.0, 0.0014)


def test_infinite_gradients_are_named() -> None:
    root = Call(lambda inputs: inputs.flatten(1)[:, :10].sqrt())
    with pytest.raises(ValueError, match="net has a NaN or infinite gradient for 1 of 4 images"):
        odin(model(root, Preprocess()), images(), 1000.0, 0.0014)


def test_what_it_cannot_score_is_refused() -> None:
    with pytest.raises(ValueError, match="net has one class, and ODIN needs two"):
        odin(model(Call(lambda x: x.flatten(1)[:, :1]), classes=1), images(), 1.0, 0.0)
    with pytest.raises(ValueError, match="net classifies noisy images and wants sigma"):
        odin(model(wants=("sigma",)), images(), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"net gives .* outputs an image, not 3"):
        odin(model(classes=3), images(), 1.0, 0.0)
    with pytest.raises(ValueError, match="gives its logits as W z"):
        gradnorm(model(Call(lambda x: x.flatten(1)[:, :10])), images())
