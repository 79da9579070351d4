"""The networks that DeepAugment perturbs: published names and shapes, and closed forms."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from robustbench_diffaug import rng
from robustbench_diffaug.train.deepaugment import FAMILIES, ImageNetwork
from robustbench_diffaug.train.image_networks import EDSR, build_image_network


def images(count: int, channels: int = 1, height: int = 16, width: int = 16) -> Tensor:
    drawn = rng.uniform(rng.key("images"), range(count), (channels, height, width))
    return torch.from_numpy(drawn).float()


def test_names_of_the_published_weights() -> None:
    # EDSR_distort_imagenet.py (body.*) and src/model/common.py of github.com/sanghyun-son/EDSR-PyTorch, whose
    # edsr_baseline_x4 has 1,517,571 weights and 24 constants of MeanShift
    edsr = build_image_network("edsr", (), 3)
    state = edsr.state_dict()
    expected = {"sub_mean", "add_mean", "head.0", "body.16", "tail.0.0", "tail.0.2", "tail.1"}
    expected |= {f"body.{block}.body.{part}" for block in range(16) for part in (0, 2)}
    assert {name.rpartition(".")[0] for name in state} == expected
    assert sum(value.numel() for name, value in state.items() if "mean" not in name) == 1_517_571
    assert state["tail.0.2.weight"].shape == (256, 64, 3, 3)
    assert torch.equal(state["sub_mean.weight"].flatten(1), torch.eye(3))
    assert torch.allclose(state["sub_mean.bias"], -255 * torch.tensor([0.4488, 0.4371, 0.4040]))
    # weight_keys of CAE_distort_imagenet.py, in their order
    cae = build_image_network("cae", (), 3)
    names = """e_conv_1.1 e_conv_2.1 e_block_1.1 e_block_1.4 e_block_2.1 e_block_2.4 e_block_3.1 e_block_3.4 e_conv_3.0
        d_up_conv_1.0 d_up_conv_1.3 d_block_1.1 d_block_1.4 d_block_2.1 d_block_2.4 d_block_3.1 d_block_3.4
        d_up_conv_2.0 d_up_conv_2.3 d_up_conv_3.0 d_up_conv_3.3""".split()
    found = cae.state_dict()
    assert list(found) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    # cae_32x32x32_zero_pad_bin.py
    assert found["e_conv_1.1.weight"].shape == (64, 3, 5, 5)
    assert found["e_conv_3.0.weight"].shape == (32, 128, 5, 5)
    assert found["d_up_conv_1.3.weight"].shape == (64, 128, 2, 2)
    assert found["d_up_conv_2.3.weight"].shape == (32, 256, 2, 2)
    assert found["d_up_conv_3.3.weight"].shape == (3, 16, 3, 3)


def test_a_network_of_zeros_gives_the_mean_colour() -> None:
    module = build_image_network("edsr", (("blocks", 4), ("scale", 2), ("width", 8)), 3)
    for name, value in module.state_dict().items():
        if "mean" not in name:
            value.zero_()
    found = module(images(1, 3, 4, 4))
    assert found.shape == (1, 3, 8, 8)
    assert torch.allclose(found, torch.tensor(EDSR.mean)[:, None, None].expand(3, 8, 8), atol=1e-6)


def test_the_cae_halves_twice_and_returns() -> None:
    module = build_image_network("cae", (("width", 8),), 1)
    latents: dict[str, Tensor] = {}

    def keep(place: str, features: Tensor, start: Tensor) -> Tensor:
        latents[place] = features
        return features

    assert module(images(2), keep).shape == (2, 1, 16, 16)
    assert latents["latent"].shape == (2, 4, 4, 4)
    assert float(latents["latent"].detach().abs().max()) < 1
    assert set(latents["bits"].unique().tolist()) <= {-1.0, 1.0}


def test_the_autoencoder_learns_to_reconstruct() -> None:
    with rng.seeded(0):
        module = build_image_network("autoencoder", (("width", 16), ("blocks", 1)), 1)
    waves = torch.linspace(0, 6, 16)
    batch = 0.5 + 0.5 * torch.sin(waves[:, None] * torch.arange(1.0, 9.0)[:, None, None] / 4 + waves)[:, None]
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(150):
        optimiser.zero_grad()
        loss = functional.mse_loss(module(batch), batch)
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.02 * float(batch.var())


@pytest.mark.parametrize(
    ("arch", "args", "channels", "message"),
    [
        ("edsrr", {}, 3, "no image network is called 'edsrr'; did you mean edsr?"),
        ("edsr", {"widht": 8}, 3, "edsr has no argument 'widht'; did you mean width?"),
        ("cae", {"blocks": 8}, 3, "cae has no argument 'blocks'"),
        ("edsr", {"width": 0}, 3, "width of edsr must be a whole number from 1 to 4096, not 0"),
        ("edsr", {"width": 8.5}, 3, "must be a whole number"),
        ("edsr", {"width": True}, 3, "must be a whole number"),
        ("edsr", {"scale": 3}, 3, "scale of edsr must be 1, 2, 4 or 8, not 3"),
        ("cae", {"width": 6}, 3, "width of cae must be a multiple of 4, not 6"),
        ("autoencoder", {"blocks": "two"}, 3, "blocks of autoencoder must be a whole number"),
    ],
)
def test_bad_architectures(arch: str, args: dict[str, Any], channels: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build_image_network(arch, tuple(args.items()), channels)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if arch in FAMILIES:
        with pytest.raises(ValidationError, match=r"must be|no argument"):
            ImageNetwork.model_validate({"arch": arch, "args": args, "weights": {"uri": "none.safetensors"}})


def loaded(state: dict[str, Tensor], arch: str, args: dict[str, int], folder: Path) -> nn.Module:
    path = folder / "published.safetensors"
    save_file(state, path)
    data = {"arch": arch, "args": args, "weights": {"uri": str(path)}}
    return ImageNetwork.model_validate(data).loaded("cpu")


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        outputs = shape[1] if name in ("d_up_conv_1.3", "d_up_conv_2.3") else shape[0]  # transposed ones
        for kind, size in (("weight", shape), ("bias", (outputs,))):
            state[f"{name}.{kind}"] = torch.from_numpy(rng.normal(rng.key(name, kind), range(1), size)[0]) / 8
    return state


def test_edsr_computes_what_its_names_say(tmp_path: Path) -> None:
    wide = (4, 4, 3, 3)
    shapes: dict[str, tuple[int, ...]] = {
        "head.0": (4, 3, 3, 3),
        "body.0.body.0": wide,
        "body.0.body.2": wide,
        "body.1": wide,
    }
    shapes |= {"tail.0.0": (16, 4, 3, 3), "tail.1": (3, 4, 3, 3)}
    state = filled(shapes)
    mean = torch.tensor([0.4488, 0.4371, 0.4040])
    for name, sign in (("sub_mean", -1), ("add_mean", 1)):
        state |= {f"{name}.weight": torch.eye(3)[:, :, None, None], f"{name}.bias": sign * 255 * mean}

    def convolve(name: str, x: Tensor) -> Tensor:
        return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    batch = images(2, 3, 6, 5)
    start = convolve("head.0", 255 * (batch - mean[:, None, None]))
    block = start + convolve("body.0.body.2", convolve("body.0.body.0", start).relu())
    larger = functional.pixel_shuffle(convolve("tail.0.0", start + convolve("body.1", block)), 2)
    expected = convolve("tail.1", larger) / 255 + mean[:, None, None]
    module = loaded(state, "edsr", {"width": 4, "blocks": 1, "scale": 2}, tmp_path)
    assert torch.allclose(module(batch), expected, atol=1e-5)


def test_cae_computes_what_its_names_say(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"e_conv_1.1": (4, 3, 5, 5), "e_conv_2.1": (8, 4, 5, 5)}
    for part in "ed":
        shapes |= {f"{part}_block_{block}.{layer}": (8, 8, 3, 3) for block in (1, 2, 3) for layer in (1, 4)}
    shapes |= {"e_conv_3.0": (2, 8, 5, 5), "d_up_conv_1.0": (4, 2, 3, 3), "d_up_conv_1.3": (4, 8, 2, 2)}
    shapes |= {"d_up_conv_2.0": (2, 8, 3, 3), "d_up_conv_2.3": (2, 16, 2, 2)}
    shapes |= {"d_up_conv_3.0": (1, 16, 3, 3), "d_up_conv_3.3": (3, 1, 3, 3)}
    state = filled(shapes)

    def convolve(name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)

    def residual(name: str, x: Tensor) -> Tensor:
        inner = functional.leaky_relu(convolve(f"{name}.1", x, padding=1), 0.01)
        return x + convolve(f"{name}.4", inner, padding=1)

    def rise(name: str, x: Tensor) -> Tensor:
        inner = functional.pad(functional.leaky_relu(convolve(f"{name}.0", x), 0.01), (1, 1, 1, 1))
        return functional.conv_transpose2d(inner, state[f"{name}.3.weight"], state[f"{name}.3.bias"], 2)

    batch = images(2, 3, 16, 20)
    x = batch
    for name in ("e_conv_1.1", "e_conv_2.1"):
        x = functional.leaky_relu(convolve(name, functional.pad(x, (1, 2, 1, 2)), stride=2), 0.01)
    for number in (1, 2, 3):
        x = residual(f"e_block_{number}", x)
    x = torch.where(convolve("e_conv_3.0", x, padding=2).tanh() >= 0, 1.0, -1.0)
    x = rise("d_up_conv_1", x)
    for number in (1, 2, 3):
        x = residual(f"d_block_{number}", x)
    x = functional.leaky_relu(convolve("d_up_conv_3.0", rise("d_up_conv_2", x)), 0.01)
    expected = convolve("d_up_conv_3.3", functional.pad(x, (2, 2, 2, 2), mode="reflect")).tanh()
    module = loaded(state, "cae", {"width": 4}, tmp_path)
    assert expected.shape == batch.shape
    assert torch.allclose(module(batch), expected, atol=1e-5)
