"""Random affine maps of images, the ordinary augmentation of small images."""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn import functional

from robustbench_diffaug.component import Value

__all__ = ["Affine", "affine"]


class Affine(Value):
    """A random affine map of each image, uniform in each range.

    Arguments:
        degrees: Rotation, at most, either way.
        pixels: Shift along each axis, at most, either way.
        zoom: Change of size, at most, either way: 0.1 is from 0.9 to 1.1.
    """

    degrees: NonNegativeFloat = 0.0
    pixels: NonNegativeFloat = 0.0
    zoom: Annotated[float, Field(ge=0, lt=1)] = 0.0


def affine(images: Float[Tensor, "b c h w"], chance: Float[Tensor, "b 4"], ranges: Affine) -> Float[Tensor, "b c h w"]:
    """Each image rotated, shifted and zoomed by amounts that its four uniforms choose; bilinear, black outside."""
    centred = (2 * chance - 1).float()
    angle = centred[:, 0] * (ranges.degrees * torch.pi / 180)
    scale = 1 / (1 + centred[:, 1] * ranges.zoom)
    # In grid coordinates the image is two units wide.
    shift = centred[:, 2:] * ranges.pixels * 2 / centred.new_tensor([images.shape[3], images.shape[2]])
    cos, sin = angle.cos() * scale, angle.sin() * scale
    maps = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)
