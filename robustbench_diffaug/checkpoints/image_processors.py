"""What transformers' image processors do to an image, as the fields of `Preprocess`, from their JSON alone."""

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["PREPROCESSOR", "stated"]

PREPROCESSOR = "preprocessor_config.json"
MODES = {2: "bilinear", 3: "bicubic"}  # of PIL
PLAIN = ("ViT", "DeiT", "Beit", "Bit", "CLIP", "Siglip", "ConvNext", "MobileNetV1", "MobileNetV2", "Segformer", "Pvt")
"""Processors that resize, crop from the centre, scale by 1/255 and normalise, and do nothing else to one image.

Others round sizes in ways of their own (Levit, PoolFormer), normalise twice (EfficientNet) or turn colours (MobileViT).
"""
CROPPING = ("DeiT", "Bit", "CLIP", "MobileNetV1", "MobileNetV2")  # where do_center_crop is left out
WARPED = 384  # pixels: from here on ConvNext's does not crop
SHARE = 224 / 256


def stated(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The fields of `Preprocess` that do what an image processor does to a square image.

    Arguments:
        config: What `preprocessor_config.json` holds.
        place: Of the file, for messages.

    Raises:
        ValueError: If it does something that `Preprocess` has no word for, or leaves open what it does.
    """
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    kind = re.sub("(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", str(name))
    if kind not in PLAIN:
        raise _unclear(place, f"is of an image processor {str(name)[:80]}, which is none that rdiff knows")
    odd = [key for key in ("do_flip_channel_order", "do_pad", "rescale_offset") if config.get(key)]
    if odd:
        raise _unclear(place, f"has {odd[0]}")
    factor = config.get("rescale_factor", 1 / 255)
    if not config.get("do_rescale", True) or not _is_number(factor) or abs(factor * 255 - 1) > 1e-6:
        raise _unclear(place, "does not scale pixels by 1/255")
    found: dict[str, Any] = {}
    if config.get("do_resize", True):
        found |= _resized(config, place, kind)
    if config.get("do_center_crop", kind in CROPPING):
        found["crop"] = _side(config.get("crop_size"), place, "crop_size")
    if config.get("do_normalize", True):
        means, stds = config.get("image_mean"), config.get("image_std")
        if not all(isinstance(each, list) and each and all(map(_is_number, each)) for each in (means, stds)):
            raise _unclear(place, "has no image_mean and image_std")
        found |= {"mean": means, "std": stds}
    return found


def _resized(config: Mapping[str, Any], place: str, kind: str) -> dict[str, Any]:
    mode = config.get("resample")
    if not isinstance(mode, int) or mode not in MODES:
        raise _unclear(place, f"has resample: {str(mode)[:40]}, and needed is 2 (bilinear) or 3 (bicubic)")
    found: dict[str, Any] = {"interpolation": MODES[mode], "size": (side := _side(config.get("size"), place, "size"))}
    share = config.get("crop_pct", SHARE)
    if kind == "ConvNext" and side < WARPED:
        if not _is_number(share) or not 0 < share <= 1:
            raise _unclear(place, f"has crop_pct: {str(share)[:40]}")
        found |= {"size": int(side / share), "crop": side}
    return found


def _side(size: Any, place: str, key: str) -> int:
    """Height and width in pixels."""
    names = ("height", "width", "shortest_edge")
    sides = [size[name] for name in names if size.get(name) is not None] if isinstance(size, Mapping) else [size]
    side = sides[0] if sides else None
    if not isinstance(side, int) or isinstance(side, bool) or side < 1 or any(other != side for other in sides):
        raise _unclear(place, f"has no square {key}")
    return side


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unclear(place: str, why: str) -> ValueError:
    return ValueError(f"{place} {why}; write preprocess out, with size, mean and std")
