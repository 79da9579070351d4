"""ADM networks mapped onto UNet2DModel, against outputs of the original code and against its names and shapes.

`golden/adm-outputs.npz` was made with `guided_diffusion.unet.UNetModel` of openai/guided-diffusion at 22e0df8 (MIT)
and, in the cases named improved, with `improved_diffusion.unet.UNetModel` of openai/improved-diffusion at 1bc7bbb
(MIT), built with the flags of CASES, in evaluation mode (float32, torch 2.13 on a CPU), each weight replaced by
`weight(key, shape)`, called with `inputs(case)`; times are rescaled as in `GaussianDiffusion._scale_timesteps` where
the flags say so. `golden/adm-keys.json.gz` holds the names and shapes in `state_dict()` of these networks, and of
those that the two `create_model` make of the flags in their READMEs.
"""

import gzip
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from robustbench_diffaug import rng, testing
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.diffusion.adm import Adm
from robustbench_diffaug.diffusion.adm_mapping import PUBLISHED, Flags, Told, mapped, unet
from robustbench_diffaug.files import Weights

GOLDEN = Path(__file__).with_name("golden")
SMALL: dict[str, Any] = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": (4,)}
HALVED = SMALL | {"channel_mult": (1, 2)}
CASES: dict[str, dict[str, Any]] = {
    "plain": HALVED | {"num_heads": 1, "use_scale_shift_norm": False},
    "scale-shift": HALVED | {"num_heads": 1, "learn_sigma": True},
    "several-heads": HALVED | {"num_heads": 4, "channel_mult": (1, 2, 3), "attention_resolutions": (4, 2)},
    "heads-by-width": HALVED | {"num_head_channels": 16, "attention_resolutions": (8, 4), "learn_sigma": True},
    "new-order": HALVED | {"num_heads": 4, "use_new_attention_order": True},
    "resblocks": HALVED | {"resblock_updown": True, "num_heads": 2, "attention_resolutions": ()},
    "resblocks-attention": HALVED | {"resblock_updown": True, "num_head_channels": 32, "attention_resolutions": (8, 4)},
    "resblocks-added": HALVED | {"resblock_updown": True, "use_scale_shift_norm": False, "num_res_blocks": 2},
    "classes": HALVED | {"class_cond": True, "num_classes": 7, "learn_sigma": True},
    "half-width": SMALL | {"num_channels": 64, "channel_mult": (0.5, 1), "num_head_channels": 32, "learn_sigma": True},
    "everything": SMALL | {
        "channel_mult": (1, 1, 3), "num_res_blocks": 2, "num_head_channels": 16, "attention_resolutions": (4, 2),
        "resblock_updown": True, "use_new_attention_order": True, "class_cond": True, "num_classes": 5,
        "learn_sigma": True,
    },
    "improved": HALVED | {"num_heads": 4, "learn_sigma": True, "diffusion_steps": 4000, "rescale_timesteps": True},
    "improved-plain": HALVED | {"num_heads": 4, "use_scale_shift_norm": False, "class_cond": True, "num_classes": 3},
}  # fmt: skip
TIMES = (0, 7, 250, 999)


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """A value of the size that training would leave, of its name and shape alone."""
    drawn = torch.from_numpy(rng.normal(rng.key("adm weight", key), range(1), shape)[0])
    if len(shape) > 1:
        return drawn / float(np.sqrt(np.prod(shape[1:])))
    return 0.1 * drawn + (1.0 if key.endswith(".weight") else 0.0)


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images of 8 x 16 pixels, times and labels."""
    images = torch.from_numpy(rng.normal(rng.key("adm images", case), range(4), (3, 8, 16)))
    return images, torch.tensor(TIMES), torch.tensor([0, 2, 1, 2])


@cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an original network's weights."""
    found: dict[str, dict[str, list[int]]] = json.loads(gzip.decompress((GOLDEN / "adm-keys.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in found[name].items()}


@cache
def state(case: str) -> Mapping[str, Tensor]:
    return {key: weight(key, shape) for key, shape in shapes(case).items()}


def flags(case: str) -> Flags:
    return Flags.model_validate(CASES[case])


def network(case: str) -> nn.Module:
    with torch.device("meta"):
        made = unet(flags(case))
    made.load_state_dict(mapped(state(case), flags(case), made), assign=True)
    return Told(made, flags(case)).eval().requires_grad_(False)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_original_code(case: str) -> None:
    images, times, labels = inputs(case)
    told = {"class_labels": labels} if CASES[case].get("class_cond") else {}
    found = network(case)(images, times, **told).sample
    expected = torch.from_numpy(np.load(GOLDEN / "adm-outputs.npz")[case])
    assert found.shape == expected.shape
    assert float(expected.std()) > 0.3
    assert float((found - expected).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("new-order", {"use_new_attention_order": False}),
        ("several-heads", {"num_heads": 2}),
        ("improved", {"rescale_timesteps": False}),
    ],
)
def test_what_weights_do_not_show_is_taken_from_the_flags(case: str, change: dict[str, Any]) -> None:
    """Weights fit other flags too, so that a golden output is the only thing to tell them apart."""
    wrong = Flags.model_validate(CASES[case] | change)
    made = unet(wrong)
    made.load_state_dict(mapped(state(case), wrong, made))
    images, times, _ = inputs(case)
    with torch.no_grad():
        found = Told(made, wrong).eval()(images, times).sample
    expected = torch.from_numpy(np.load(GOLDEN / "adm-outputs.npz")[case])
    assert float((found - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_weight_has_its_place(name: str) -> None:
    flags = PUBLISHED[name]
    with torch.device("meta"):
        made = unet(flags)
        original = {key: torch.empty(shape) for key, shape in shapes(name).items()}
    found = mapped(original, flags, made)
    made.load_state_dict(found, strict=True, assign=True)
    assert sum(value.numel() for value in found.values()) == sum(value.numel() for value in original.values())
    assert sum("qkv" in key for key in original) * 2 == len(found) - len(original)
    # The originals have GroupNorm32(32, channels), with eps as in torch: another would hide in the rounding of outputs.
    norms = [module for module in made.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == sum(len(shape) == 1 for key, shape in shapes(name).items() if key.endswith(".weight"))
    assert all((norm.eps, norm.num_groups, norm.affine) == (1e-5, 32, True) for norm in norms)


README = {  # MODEL_FLAGS and DIFFUSION_FLAGS, less what changes no output: dropout and use_fp16
    "imagenet-64-class": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 64 "
    "--learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 --num_res_blocks 3 "
    "--resblock_updown True --use_new_attention_order True --use_scale_shift_norm True",
    "imagenet-128-class": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 128 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True",
    "imagenet-256-class": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 256 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True",
    "imagenet-256": "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --image_size 256 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True",
    "imagenet-512-class": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 512 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_scale_shift_norm True",
    # improved-diffusion, and its preset of rescale_timesteps
    "imagenet-64": "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True --diffusion_steps 4000 "
    "--noise_schedule cosine --rescale_timesteps True",
    "cifar10": "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --diffusion_steps 4000 "
    "--noise_schedule cosine --rescale_timesteps True",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_flags_of_the_readmes(name: str) -> None:
    """Neither the number of heads nor the order of queries, keys and values nor the schedule is seen in the weights."""
    words = README[name].split()
    given: dict[str, Any] = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    if "attention_resolutions" in given:
        given["attention_resolutions"] = given["attention_resolutions"].split(",")
    assert Flags.model_validate(given) == PUBLISHED[name]


def test_published_networks_have_their_published_size_and_levels() -> None:
    """Millions of parameters: the appendix of Dhariwal and Nichol (2021), table 'hyperparameters'."""
    sizes = {"imagenet-64-class": 296, "imagenet-128-class": 422, "imagenet-256-class": 554, "imagenet-512-class": 559}
    for name, millions in sizes.items():
        assert round(sum(float(np.prod(shape)) for shape in shapes(name).values()) / 1e6) == millions
    # Times at which diffusion denoised smoothing denoises sigma 0.25, and their levels, of both schedules.
    for architecture, time, level in (("cifar10", 1158, 0.2501), ("imagenet-256", 145, 0.2516)):
        denoiser = Adm(weights=Weights(uri="none.pt"), architecture=architecture)
        assert denoiser.time(0.25) == time
        assert denoiser.sigma(time) == pytest.approx(level, abs=1e-4 if architecture == "cifar10" else 5e-4)
    assert Adm(weights=Weights(uri="none.pt"), architecture="imagenet-64-class").classes() == 1000


def saved(path: Path, case: str, dtype: torch.dtype = torch.float32) -> Weights:
    """Weights in a file; of torch.save, as published, where its name ends so."""
    tensors = OrderedDict((key, value.to(dtype)) for key, value in state(case).items())
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=path.stem != "old")
    return Weights(uri=str(path))


@pytest.mark.parametrize("file", ["a.safetensors", "a.pt", "old.pt"])
@pytest.mark.parametrize("case", ["heads-by-width", "improved"])
def test_estimates_are_those_of_the_original_code(tmp_path: Path, file: str, case: str) -> None:
    """D = (z - 2 sigma eps + 1) / 2, where the network sees z / sqrt(1 + 4 sigma^2) and predicts the golden eps."""
    denoiser = Adm(weights=saved(tmp_path / file, case), config=flags(case), clip=False)
    images, times, _ = inputs(case)
    levels = torch.tensor(denoiser.sigmas()[times.numpy()])
    doubled = 2 * levels.float()[:, None, None, None]
    signed = images * (1 + doubled**2).sqrt()
    found = denoiser.loaded(Limits())((signed + 1) / 2, levels)
    golden = torch.from_numpy(np.load(GOLDEN / "adm-outputs.npz")[case])
    expected = (signed - doubled * golden[:, :3] + 1) / 2
    assert float(((found.mean - expected) / (1 + doubled)).abs().max()) < 2e-5
    assert found.spread is not None and torch.allclose(found.spread, golden[:, 3:], atol=2e-5)


def test_the_kind_keeps_what_a_denoiser_promises(tmp_path: Path) -> None:
    denoiser = Adm(weights=saved(tmp_path / "a.pt", "scale-shift"), config=flags("scale-shift"))
    testing.check_denoiser(denoiser, (3, 8, 16))
    half = Adm(weights=saved(tmp_path / "half.pt", "scale-shift", torch.float16), config=flags("scale-shift"))
    noisy = inputs("scale-shift")[0] / 4 + 0.5
    exact, of_half, bfloat = (
        made.loaded(Limits())(noisy, 0.3).mean
        for made in (denoiser, half, denoiser.model_copy(update={"precision": "bfloat16"}))
    )
    assert 0 < float((exact - of_half).abs().max()) < 2e-3 and 0 < float((exact - bfloat).abs().max()) < 0.05
    noisy.requires_grad_()
    denoiser.loaded(Limits())(noisy, 0.3).mean.sum().backward()
    assert noisy.grad is not None and float(noisy.grad.abs().max()) > 0


def test_a_class_conditional_network_is_told_classes_and_nothing_else(tmp_path: Path) -> None:
    denoiser = Adm(weights=saved(tmp_path / "a.pt", "classes"), config=flags("classes"), clip=False)
    assert (denoiser.classes(), denoiser.channels(), denoiser.size()) == (7, 3, None)
    conditional = denoiser.loaded_conditional(Limits())
    images, times, labels = inputs("classes")
    levels = torch.tensor(denoiser.sigmas()[times.numpy()])
    doubled = 2 * levels.float()[:, None, None, None]
    signed = images * (1 + doubled**2).sqrt()
    found = conditional((signed + 1) / 2, levels, labels).mean
    golden = torch.from_numpy(np.load(GOLDEN / "adm-outputs.npz")["classes"])[:, :3]
    assert float(((found - (signed - doubled * golden + 1) / 2) / (1 + doubled)).abs().max()) < 2e-5
    alone = conditional((signed[2] + 1) / 2, float(levels[2]), labels[2]).mean
    assert torch.equal(alone, found[2])
    with pytest.raises(ValueError, match="has no label for no class"):
        conditional(images, 0.3, torch.tensor([0, 1, -1, 2]))
    with pytest.raises(ValueError, match="labels go from 0 to 7, the denoiser has the classes 0 to 6"):
        conditional(images, 0.3, torch.tensor([0, 1, 7, 2]))
    with pytest.raises(ValueError, match="is class-conditional and was trained with no label for none"):
        denoiser.loaded(Limits())
    with pytest.raises(ValueError, match="has no label for no class"):
        denoiser.loaded_mixed(Limits(), 2.0)(images, 0.3, labels)
    plain = Adm(weights=saved(tmp_path / "b.pt", "plain"), config=flags("plain"))
    with pytest.raises(ValueError, match="knows no classes; give a class-conditional one"):
        plain.loaded_conditional(Limits())


class Trap:
    """A value whose pickle runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def refusal(path: Path, **more: str) -> str:
    """What loading a file says, of one line."""
    with pytest.raises(ValueError) as caught:
        Adm(weights=Weights(uri=str(path), **more), config=flags("plain")).load(torch.device("cpu"))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 600
    return message


@pytest.mark.parametrize("old", [False, True])
def test_a_hostile_file_runs_nothing(tmp_path: Path, old: bool) -> None:
    trap, path = tmp_path / "sprung", tmp_path / "hostile.pt"
    torch.save({**state("plain"), "more": Trap(trap)}, path, _use_new_zipfile_serialization=not old)
    assert "needs posix.mkdir" in refusal(path)
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=not old)  # a whole module
    assert "needs torch.nn.modules.linear.Linear" in refusal(path)
    assert not trap.exists()
    path.write_bytes(pickle.dumps(Trap(trap)))  # a bare pickle
    assert "needs posix.mkdir" in refusal(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": torch.ones(1)}, "step": 3}, "does not fit config: a has no place in this architecture"),
        ({1: torch.ones(1)}, "under '1', a tensor of shape (1,); needed are tensors by name"),
        (torch.ones(3), "holds a tensor of shape (3,), not weights by name"),
        ({}, "holds nothing; it has no weights by name"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "holds whole numbers under 'a', and needed are weights"),
        ({"a": torch.eye(2).to_sparse()}, "holds a sparse tensor"),
        ({"a": torch.empty(2, device="meta")}, "holds a tensor without numbers"),
        ({"a": torch.ones(1).expand(1_000_000, 1_000_000)}, "claims the shape"),  # one number that claims 4 TB
        ({"a": torch.ones(2)}, "does not fit config: a has no place in this architecture"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert message in refusal(tmp_path / "other.pt")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.pt"
    saved(good, "plain")
    for length in (len(good.read_bytes()) // 2, 200):
        (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:length])
        assert "is a zip that is damaged or cut off" in refusal(tmp_path / "cut.pt")
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>")
    assert "is an HTML page" in refusal(tmp_path / "page.pt")
    assert "has sha256" in refusal(good, sha256="0" * 64)
    assert "is a folder" in refusal(tmp_path)
    assert "there is no" in refusal(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match=r"there is no .*absent\.pt"):  # known before a run, without loading it
        Adm(weights=Weights(uri=str(tmp_path / "absent.pt"), sha256="0" * 64), config=flags("plain")).check()
    with pytest.raises(ValueError, match="has sha256"):
        Adm(weights=Weights(uri=str(good), sha256="0" * 64), config=flags("plain")).check()
    right = Weights(uri=str(good)).contents()
    Adm(weights=Weights(uri=str(good), sha256=right), config=flags("plain")).load(torch.device("cpu"))


def without(key: str) -> Mapping[str, Tensor]:
    return {name: value for name, value in state("plain").items() if name != key}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (without("out.0.bias"), "1 weights are missing, first what is conv_norm_out.bias in UNet2DModel"),
        ({**state("plain"), "label_emb.weight": torch.ones(5, 128)}, "label_emb.weight has no place"),
        ({**state("plain"), "input_blocks.1.0.extra.weight": torch.ones(5)}, "extra.weight has no place"),
        ({**state("plain"), "input_blocks.9.0.op.weight": torch.ones(5)}, "input_blocks.9.0.op.weight has no place"),
        ({**state("plain"), "out.2.bias": torch.ones(6)}, r"out.2.bias is \(6,\), which becomes \(6,\), not \(3,\)"),
        ({**state("plain"), "middle_block.1.qkv.weight": torch.ones(7, 64, 1)}, "not queries, keys and values"),
        ({**state("plain"), "middle_block.1.qkv.bias": torch.ones(())}, "not queries, keys and values"),
        ({**state("plain"), "input_blocks.2.0.conv.bias": torch.ones(32)}, "input_blocks.2.0.conv.bias has no place"),
        (state("classes"), "is .* which becomes|label_emb.weight has no place"),
    ],
)
def test_weights_of_another_architecture_are_named(given: Mapping[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mapped(given, flags("plain"), unet(flags("plain")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 48, "channel_mult": ()}, "image_size 48 has no usual channel_mult"),
        ({"image_size": 9}, "image_size 9 cannot be halved 1 times"),
        ({"attention_resolutions": (4, 2)}, "attention_resolutions has 2; the levels have sides 8, 4"),
        ({"num_channels": 48}, "a level is 48 channels wide; num_channels x channel_mult must be multiples of 32"),
        ({"num_heads": 3}, "a level with attention is 64 channels wide, which its heads do not divide"),
        ({"num_head_channels": 48}, "a level with attention is 64 channels wide, which its heads do not divide"),
        ({"dropout": 0.1}, "unknown key 'dropout'"),
        ({"diffusion_steps": 10}, "greater than or equal to 25"),
    ],
)
def test_flags_that_make_no_network_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Flags.model_validate(CASES["plain"] | change)


def test_one_of_a_name_and_flags_is_needed() -> None:
    weights = Weights(uri="a.pt")
    for more in ({}, {"architecture": "cifar10", "config": flags("plain")}):
        with pytest.raises(ValidationError, match="needs either architecture, one of imagenet-64-class"):
            Adm.model_validate({"weights": weights, **more})


def test_images_that_cannot_be_halved_are_refused(tmp_path: Path) -> None:
    denoiser = Adm(weights=saved(tmp_path / "a.pt", "everything"), config=flags("everything"))
    images = torch.full((1, 3, 12, 10), 0.5)
    with pytest.raises(ValueError, match="10x12; this network halves them 2 times, so sides must be multiples of 4"):
        denoiser.loaded_conditional(Limits())(images, 0.3, torch.tensor([0]))
