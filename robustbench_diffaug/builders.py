"""Functions of the user's that build networks: 'module:function', or 'file.py:function' beside the suite."""

import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter
from torch import nn

from robustbench_diffaug.files import Location, existing, sha256

__all__ = ["Builder", "build", "digest", "name"]

_location: TypeAdapter[str] = TypeAdapter(Location)


def _resolved(arch: str, info: Any) -> str:
    place, colon, name = arch.rpartition(":")
    if not (place and colon and name.isidentifier()):
        raise ValueError(f"arch is 'file.py:function' or 'package.module:function', not {arch!r}")
    return f"{_location.validate_python(place, context=info.context)}:{name}" if _is_file(place) else arch


def _is_file(place: str) -> bool:
    return place.endswith(".py")


Builder = Annotated[str, AfterValidator(_resolved)]
"""'package.module:function', importable, or 'file.py:function', the file relative to the suite's."""


def name(builder: str) -> str:
    """What of it is part of an identity: all of a module's name, of a file its function's, since the file may move."""
    place, _, function = builder.rpartition(":")
    return f":{function}" if _is_file(place) else builder


def digest(builder: str) -> str:
    """SHA-256 of the file; nothing for a module. What the file imports is not looked at."""
    place = builder.rpartition(":")[0]
    return sha256(existing(place)) if _is_file(place) else ""


def build(builder: str, args: Mapping[str, Any]) -> nn.Module:
    """The network that the function returns; this runs the user's code.

    Raises:
        ValueError: If the module or the function is not there, fails, or returns something else.
    """
    place, _, function = builder.rpartition(":")
    file = existing(place) if _is_file(place) else None
    try:
        module = _executed(file, sha256(file)) if file else import_module(place)
        network = getattr(module, function)(**args)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"{builder} failed: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{builder} returns {type(network).__name__}, not a torch.nn.Module")
    return network


@lru_cache(maxsize=64)
def _executed(file: Path, digest: str) -> ModuleType:
    """The module of a file, executed once as long as the file is the same."""
    title = f"rdiff_local_{digest[:16]}"
    spec = spec_from_file_location(title, file)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = module_from_spec(spec)
    sys.modules[title] = module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[title]
        raise
    return module
