"""Flags that several commands take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["FILE", "RUN_FLAGS", "SUITE_FLAGS", "flag"]

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
