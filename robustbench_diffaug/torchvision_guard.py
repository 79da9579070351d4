"""Makes `import torchvision` work where its C++ operators are missing, as beside a CPU build of torch.

timm and diffusers import torchvision; rdiff itself uses none of its operators. Import this module before either.
"""

import sys

import torch

__all__: list[str] = []

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[torch.library.Library] = []  # the operators vanish when their library object is collected

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    # FRAGMENT, not DEF: a second DEF anywhere in the process is an error.
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _library.define(name + _SCHEMA)
    _kept.append(_library)
    import torchvision  # noqa: F401
