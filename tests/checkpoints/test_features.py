"""The last layer of a network is found, and what goes into it gives the logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustbench_diffaug import rng
from robustbench_diffaug.checkpoints.features import capture, last_layer, linear
from robustbench_diffaug.checkpoints.timm_model import build

SMALL_VIT = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet10t": ("fc", 32, {"channels": (8, 16, 24, 32)}),
    "vit_tiny_patch16_224": ("head", 32, SMALL_VIT),
    "vit_base_patch16_siglip_224": ("head", 32, SMALL_VIT),  # pools by attention
    "beit_base_patch16_224": ("head", 32, SMALL_VIT),  # a norm after the pool
    "cait_xxs24_224": ("head", 32, {"img_size": 32, "depth": 2}),
    "swin_tiny_patch4_window7_224": (
        "head.fc",
        28,
        {"img_size": 28, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16},
    ),
    "convnext_atto": ("head.fc", 32, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "mobilenetv3_small_050": ("classifier", 32, {"drop_rate": 0.2}),
    "efficientnet_b0": ("classifier", 32, {}),
    "regnetx_002": ("head.fc", 32, {}),
    "densenet121": ("classifier", 32, {"block_config": (1, 1, 1, 1)}),
    "inception_next_atto": ("head.fc2", 32, {"depths": (1, 1, 1, 1)}),  # the last of two linear layers
    "dla34": ("fc", 32, {"levels": (1,) * 6, "channels": (8,) * 6}),  # a convolution of one pixel
}


def images(count: int, size: int, channels: int = 3) -> Tensor:
    key = rng.key("features", size)
    return torch.from_numpy(rng.uniform(key, range(count), (channels, size, size))).float()


def network(arch: str, args: dict[str, Any], channels: int = 3) -> nn.Module:
    with rng.seeded(rng.key(arch)):
        made = build(arch, tuple(args.items()), channels, 10).eval().requires_grad_(False)
        for weight in made.parameters():
            if weight.ndim > 1 and not weight.any():  # timm begins some heads at zero
                nn.init.normal_(weight, std=0.05)
    return made


class Tail(nn.Module):
    """Features of 12 numbers, and what the test wants after them."""

    def __init__(self, tail: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        with rng.seeded(rng.key("tail")):
            self.body = nn.Linear(48, 12)
            self.head = nn.Linear(12, 5)
            self.other = nn.Linear(12, 5, bias=False)
            self.pixel = nn.Conv2d(3, 5, 1)
        self.tail = tail
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.tail(self, images)

    def features(self, images: Tensor) -> Tensor:
        return torch.relu(self.body(images.flatten(1)))


def usual(net: Any, images: Tensor) -> Tensor:
    found: Tensor = net.head(net.features(images))
    return found


@pytest.mark.parametrize("arch", TIMM)
def test_logits_are_linear_in_the_features_of(arch: str) -> None:
    expected, size, args = TIMM[arch]
    net, shown = network(arch, args), images(3, size)
    found = last_layer(net, shown[:2])
    assert found.name == expected
    weight, bias = linear(found.layer)
    logits, features = capture(net, found.layer)(shown)
    assert torch.equal(logits, net(shown))
    assert logits.abs().max() > 0
    assert torch.allclose(features @ weight.T + bias, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))
    if isinstance(found.layer, nn.Linear):  # timm's own way to the same, where it is linear
        with torch.no_grad():
            penultimate = net.forward_head(net.forward_features(shown), pre_logits=True)  # type: ignore[operator]
        if arch != "inception_next_atto":  # whose pre_logits are before the first of its two layers
            assert torch.equal(features, penultimate)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (usual, "head"),
        (lambda net, x: (net.other(net.features(x)), net.head(net.features(x)))[0], "other"),  # an auxiliary head
        (lambda net, x: (net.head(net.features(x)), net.other(net.features(x)))[0], "head"),
        (lambda net, x: net.head(nn.Dropout(0.5).eval()(net.features(x))), "head"),
        (lambda net, x: net.head(net.features(x)[:, None].expand(-1, 4, -1)).mean(1), "head"),  # pooled afterwards
        (lambda net, x: net.pixel(x).mean((2, 3)), "pixel"),
    ],
)
def test_the_layer_that_gives_the_logits_is_found(tail: Callable[[Any, Tensor], Tensor], expected: str) -> None:
    net, shown = Tail(tail), images(4, 4)
    found = last_layer(net, shown)
    assert found.name == expected
    weight, bias = linear(found.layer)
    logits, features = capture(net, found.layer)(shown)
    assert torch.allclose(features @ weight.T + bias, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "tail",
    [
        lambda net, x: 2 * net.head(net.features(x)),
        lambda net, x: torch.relu(net.head(net.features(x))),
        lambda net, x: (net.head(net.features(x)) + net.other(net.features(x))) / 2,
    ],
)
def test_a_head_is_asked_for_where_no_layer_gives_the_logits(tail: Callable[[Any, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"gives its logits as W z \+ b; say by `head: NAME` .* (other or )?head, or"):
        last_layer(Tail(tail), images(2, 4))


def test_two_heads_averaged_are_asked_for_and_a_named_one_is_taken() -> None:
    net = network("deit_tiny_distilled_patch16_224", SMALL_VIT)
    shown = images(2, 32)
    with pytest.raises(ValueError, match="by `head: NAME` which layer's inputs are the features, head_dist or head, "):
        last_layer(net, shown)
    found = last_layer(net, shown, "head_dist")
    assert found.layer is net.get_submodule("head_dist")
    _, features = capture(net, found.layer)(shown)
    weight, bias = linear(found.layer)
    with torch.no_grad():
        tokens = net.forward_features(shown)  # type: ignore[operator]
    assert torch.equal(features, tokens[:, 1])
    assert (weight.shape, bias.shape) == ((10, 32), (10,))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("haed", "no linear layer called 'haed'; did you mean head"),
        ("features", "no linear layer called 'features'"),
        ("body", "body has not one output an image for each logit; say by `head: NAME` .*, head, or"),
        ("other", "other has not one output an image"),  # it is never called
    ],
)
def test_a_wrong_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        last_layer(Tail(usual), images(2, 4), name)


def test_networks_without_a_linear_layer_or_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer has, so only scores of logits can be computed"):
        last_layer(Tail(lambda net, x: x.flatten(1)[:, :5]), images(2, 4))
    with pytest.raises(ValueError, match="gives tuple for 2 images, not a row of logits"):
        last_layer(Tail(lambda net, x: (x, x)), images(2, 4))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=r"gives \(2, 3, 4, 4\) for 2 images"):
        last_layer(Tail(lambda net, x: x), images(2, 4))


@pytest.mark.parametrize("arch", ["resnet10t", "vit_tiny_patch16_224", "dla34"])
def test_bfloat16_and_channels_last(arch: str) -> None:
    expected, size, args = TIMM[arch]
    net = network(arch, args).to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shown = images(2, size).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    found = last_layer(net, shown)
    assert found.name == expected
    logits, features = capture(net, found.layer)(shown)
    weight, bias = linear(found.layer)
    assert logits.dtype == features.dtype == weight.dtype == bias.dtype == torch.float32
    assert torch.equal(logits, net(shown).float())
    # one rounding to eight bits apart
    assert torch.allclose(features @ weight.T + bias, logits, rtol=2**-7, atol=2**-7 * float(logits.abs().max()))


def test_gradients_reach_the_images() -> None:
    net: Any = Tail(usual)
    shown = images(2, 4).requires_grad_()
    logits, features = capture(net, net.head)(shown)
    (through,) = torch.autograd.grad(features.sum(), shown, retain_graph=True)
    (expected,) = torch.autograd.grad(net.features(shown).sum(), shown)
    assert torch.equal(through, expected)
    assert logits.requires_grad
    with torch.no_grad():
        assert not capture(net, net.head)(shown)[1].requires_grad


def test_nothing_is_left_on_a_network_that_raises() -> None:
    def broken(net: Any, images: Tensor) -> Tensor:
        usual(net, images)
        raise RuntimeError("broken")

    net = Tail(broken)
    for work in (lambda: last_layer(net, images(2, 4)), lambda: capture(net, net.head)(images(2, 4))):
        with pytest.raises(RuntimeError, match="broken"):
            work()
        assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_layer_that_does_not_see_each_image_once_is_refused() -> None:
    net = Tail(usual)
    with pytest.raises(ValueError, match=r"given \[\] for 2 images"):
        capture(net, net.other)(images(2, 4))
    halved = Tail(lambda net, x: usual(net, x[:1]).expand(2, -1))
    with pytest.raises(ValueError, match=r"given \[\(1, 12\)\] for 2 images"):
        capture(halved, halved.head)(images(2, 4))


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_compiled_networks(called_before: bool, wrapped: bool) -> None:
    plain, net, shown = Tail(usual), Tail(usual), images(2, 4)
    expected = capture(plain, plain.head)(shown)
    torch._dynamo.reset()
    if wrapped:
        compiled: Any = torch.compile(net, backend="eager")
    else:
        net.compile(dynamic=False, backend="eager")
        compiled = net
    if called_before:  # so that its code exists, in which layers are not asked
        assert torch.allclose(compiled(shown), expected[0])
    found = last_layer(compiled, shown)
    assert found.layer is net.head
    assert compiled.get_submodule(found.name) is net.head
    for _ in range(2):
        logits, features = capture(compiled, found.layer)(shown)
        assert torch.equal(logits, expected[0])
        assert torch.equal(features, expected[1])
        compiled(shown)
