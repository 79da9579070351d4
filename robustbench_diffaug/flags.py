"""Flags that several commands take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["FILE", "FORMATS", "IMPORT_FLAGS", "RUN_FLAGS", "SUITE_FLAGS", "flag", "only"]

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


def flag(*names: str, **more: Any) -> Callable[[F], F]:
    """An option that is also the environment variable RDIFF_<NAME>."""
    variable = "RDIFF_" + names[0].removeprefix("--").replace("-", "_").upper()
    return click.option(*names, envvar=variable, show_default=True, **more)


def _flags(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


SUITE_FLAGS = _flags(
    flag("--with", "extra", type=FILE, multiple=True, help="A YAML file with more checkpoint entries."),
    flag("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Replaces a value of the suite."),
    flag("--limit", "-L", type=click.IntRange(1), help="At most so many samples of each dataset."),
    flag("--seed", type=click.IntRange(0, 10**18 - 1), help="Of all noise, instead of the suite's."),
    flag("--data-dir", type=FILE, help="Where relative paths of datasets start."),
    flag("--trust", is_flag=True, help="Lets the suite name code of yours, which then runs."),
    flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error."),
)
RUN_FLAGS = _flags(
    flag("--output", "-o", type=FILE, help="The run folder; default reports/<suite name>."),
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
    flag("--batch-size", "-b", type=click.IntRange(1), default=128, help="Samples read together; changes no result."),
    flag("--executor", type=click.Choice(["local", "processes"]), help="Default: processes if --workers is above 1."),
    flag("--workers", type=click.IntRange(1, 256), default=1, help="Processes."),
    flag("--compile", is_flag=True, help="Networks go through torch.compile; may change last digits."),
)
IMPORT_FLAGS = _flags(
    flag("--baseline", "baselines", multiple=True, help="robustbench: what mCE is relative to, if not its AlexNet."),
    flag("--sigma", type=float, help="cohen: the noise level of the certificates; needed."),
    flag("--n", type=int, help="cohen: draws of an estimate, if not certify.py's 100,000."),
    flag("--n0", type=int, help="cohen: draws of a selection, if not certify.py's 100."),
    flag("--alpha", type=float, help="cohen: the probability of a false certificate, if not certify.py's 0.001."),
    flag("--radius", "radii", type=float, multiple=True, help="cohen: of certified accuracy. Default: steps of 0.25."),
    flag("--checkpoint", help="cohen, openood: the network's name; default: that of the file, of the folder above."),
    flag("--score", help="openood: the score's name; default: that of the folder, or of the table."),
    flag("--id", help="openood: the in-distribution test set, where several files of scores have labels."),
)
FORMATS = {
    "robustbench": ("baselines",),
    "cohen": ("sigma", "n", "n0", "alpha", "radii", "checkpoint", "settings"),
    "openood": ("score", "checkpoint", "id", "settings"),
}
"""Of import and export, with the flags that are not for all."""


def only(format: str, flags: dict[str, Any]) -> None:
    """Finds that no flag is given that is for other formats.

    Arguments:
        format: One of `FORMATS`.
        flags: Values by name.

    Raises:
        ValueError: If there is one; it is named with what it is for.
    """
    for name, value in flags.items():
        owners = [owner for owner, own in FORMATS.items() if name in own]
        if value not in (None, "", ()) and format not in owners:
            shown = {"radii": "radius", "baselines": "baseline", "settings": "set"}.get(name, name)
            raise ValueError(f"--{shown} is for {' and '.join(owners)}, not for {format}")
