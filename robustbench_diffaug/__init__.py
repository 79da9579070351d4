"""rdiff: measures how robust image classifiers are, and proves it."""

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustbench_diffaug.api import Network, Result, load, report, run
    from robustbench_diffaug.suite import Bench, Suite

__version__ = version("robustbench-diffaug")
__all__ = ["Bench", "Network", "Result", "Suite", "__version__", "load", "report", "run"]

_PLACES = dict.fromkeys(("Network", "Result", "load", "report", "run"), "api") | {"Bench": "suite", "Suite": "suite"}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: they need torch."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


class _Package(ModuleType):
    """The package; its subpackage `report` is imported by its whole name, and `report` alone is the function."""

    @property
    def report(self) -> Any:
        return __getattr__("report")

    @report.setter
    def report(self, subpackage: ModuleType) -> None:
        """Python would put the subpackage here once that is imported."""


sys.modules[__name__].__class__ = _Package
