"""The classes of ImageNet and of the sets made after it: which folders each has, and their indices of 0 to 999."""

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

__all__ = ["CATEGORIES", "VARIANTS", "Variant", "indices", "synsets"]

Variant: TypeAlias = Literal["val", "r", "a", "sketch", "s", "d", "v2"]

VARIANTS: Mapping[str, str] = MappingProxyType(
    {
        "val": "ImageNet",
        "r": "ImageNet-R",
        "a": "ImageNet-A",
        "sketch": "ImageNet-Sketch",
        "s": "Stylized-ImageNet",
        "d": "ImageNet-D",
        "v2": "ImageNetV2",
    }
)
"""The name of each variant."""


def _list(name: str) -> tuple[str, ...]:
    """The lines of one of the lists that timm is installed with; timm itself, which is slow, is not imported."""
    spec = find_spec("timm")
    assert spec is not None and spec.submodule_search_locations, "timm is a dependency"
    return tuple(Path(spec.submodule_search_locations[0], "data", "_info", name).read_text("utf-8").split())


@cache
def synsets() -> tuple[str, ...]:
    """The 1,000 WordNet ids in the order of the classes."""
    return _list("imagenet_synsets.txt")


@cache
def indices(variant: Variant) -> Mapping[str, tuple[int, ...]]:
    """The folders of a variant in the order of their classes, and the classes that each stands for.

    All stand for one class but some of ImageNet-D. The folders of ImageNetV2 are numbers, and as texts they would sort
    wrongly: 0, 1, 10, 100, ...

    References:
        The Many Faces of Robustness (Hendrycks et al., ICCV 2021), https://arxiv.org/abs/2006.16241 (ImageNet-R)
        Natural Adversarial Examples (Hendrycks et al., CVPR 2021), https://arxiv.org/abs/1907.07174 (ImageNet-A)
        Do ImageNet Classifiers Generalize to ImageNet? (Recht et al., ICML 2019), https://arxiv.org/abs/1902.10811
    """
    if variant == "d":
        return CATEGORIES
    if variant == "v2":
        return MappingProxyType({str(index): (index,) for index in range(len(synsets()))})
    chosen = (
        range(len(synsets()))
        if variant in ("val", "sketch", "s")
        else map(int, _list(f"imagenet_{variant}_indices.txt"))
    )
    return MappingProxyType({synsets()[index]: (index,) for index in chosen})


_CATEGORIES = """
alarm_clock:409,530 backpack:414 banana:954 band_aid:419 bath_towel:434 beer_bottle:440 bench:703 bicycle:671,444
binder_closed:446 bottle_cap:455 bread_loaf:930 broom:462 bucket:463 can_opener:473 candle:470 cellphone:487
chair:423,559,765 cleaver:499 clothes_hamper:588 coffee_or_french_press:550 combination_lock:507 computer_mouse:673
desk_lamp:846 dishcloth:533 doormat:539 dress_shoe_men:630 drill:740 drying_rack_for_plates:729 envelope:549 fan:545
frying_pan:567 gown:578 hair_dryer:589 hammer:587 helmet:560,518 iron_for_clothes:606 jeans:608 keyboard:508 ladle:618
lampshade:619 laptop_open:620 lemon:951 letter_opener:623 lighter:626 lipstick:629 matchstick:644 measuring_cup:647
microwave:651 mixing_or_salad_bowl:659 monitor:664 mug:504 nail_fastener:677 necklace:679 orange:950 padlock:695
paintbrush:696 paper_towel:700 pen:418,749,563 pill_bottle:720 pillow:721 pitcher:725 plastic_bag:728 plate:923
plunger:731 pop_can:737 portable_heater:811 printer:742 remote_control:761 ruler:769 running_shoe:770 safety_pin:772
salt_shaker:773 sandal:774 screw:783 shopping_basket:790 shovel:792 skirt:601,655,689 sleeping_bag:797
soap_dispenser:804 sock:806 soup_bowl:809 spatula:813 speaker:632 still_camera:732,759 strainer:828 suit_jacket:834
sunglasses:837 sweater:841 swimming_trunks:842 t_shirt:610 tea_cup:968 teapot:849 teddy_bear:850 tennis_racket:752
tie:457,906 toaster:859 toilet_paper_roll:999 trash_bin:412 tray:868 tv:851 umbrella:879 vacuum_cleaner:882 vase:883
wallet:893 watch:531 water_bottle:898 weight_exercise:543 weight_scale:778 wheel:479,694 whistle:902 wine_bottle:907
winter_glove:658 wok:909
"""

CATEGORIES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {name: tuple(map(int, classes.split(","))) for name, _, classes in (e.partition(":") for e in _CATEGORIES.split())}
)
"""The 113 categories of ImageNet-D, by the names of their folders, and the classes that count as right for each.

References:
    ImageNet-D: Benchmarking Neural Network Robustness on Diffusion Synthetic Object (Zhang et al., CVPR 2024),
    https://arxiv.org/abs/2403.18775; preprocessing/imgnet_d2imgnet_id.txt of its repository (MIT)
"""
