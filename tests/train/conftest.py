"""Tiny recipes on synthetic images."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from robustbench_diffaug import rng
from robustbench_diffaug.train.recipe import AutoencoderRecipe, ClassifierRecipe, DenoiserRecipe, GuidanceRecipe
from robustbench_diffaug.train.samples import Samples

COMMON = {
    "dataset": {"kind": "mixture", "size": 24},
    "channels": 1,
    "steps": 6,
    "batch": 8,
    "ema": 0.5,
    "save_every": 2,
}
TIMM = {"classes": 4, "arch": "resnet10t", "args": {"channels": [4, 4, 8, 8], "stem_width": 4}}
TEST = {"kind": "mixture", "size": 12, "draw": 1}
UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


@pytest.fixture
def classifier() -> Callable[..., ClassifierRecipe]:
    def make(**more: Any) -> ClassifierRecipe:
        data = {"kind": "classifier", "name": "tiny", "test": TEST, "augment": {"degrees": 5, "pixels": 1}}
        return ClassifierRecipe.model_validate(COMMON | TIMM | data | more)

    return make


@pytest.fixture
def denoiser() -> Callable[..., DenoiserRecipe]:
    def make(**more: Any) -> DenoiserRecipe:
        return DenoiserRecipe.model_validate(COMMON | {"kind": "denoiser", "name": "tiny-ddpm", "unet": UNET} | more)

    return make


@pytest.fixture
def guidance() -> Callable[..., GuidanceRecipe]:
    def make(**more: Any) -> GuidanceRecipe:
        data = {"kind": "guidance", "name": "tiny-guide", "denoiser": {"kind": "mixture"}, "sees": "noisy"}
        return GuidanceRecipe.model_validate(COMMON | TIMM | data | {"test": TEST} | more)

    return make


@pytest.fixture
def autoencoder() -> Callable[..., AutoencoderRecipe]:
    def make(**more: Any) -> AutoencoderRecipe:
        return AutoencoderRecipe.model_validate(COMMON | {"kind": "autoencoder", "name": "tiny-ae"} | more)

    return make


@pytest.fixture
def some() -> Callable[[int], Samples]:
    """Some samples of random images, 8x8."""

    def make(count: int) -> Samples:
        images = 0.5 + 0.1 * torch.from_numpy(rng.normal(rng.key("samples"), range(count), (1, 8, 8)))
        return Samples(images.clamp(0, 1), torch.arange(count) % 4, [(0, 0, f"{row}") for row in range(count)])

    return make
