"""Flags that several commands take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from robustbench_diffaug.downloads import allowing
from robustbench_diffaug.shards import WHOLE, Shard

__all__ = ["ALLOW_DOWNLOAD", "FILE", "FORMATS", "IMPORT_FLAGS", "RUN_FLAGS", "SUITE_FLAGS", "device_of", "flag", "only"]
__all__ += ["workers_of"]

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


def _shard(context: click.Context, parameter: click.Parameter, value: str | None) -> Shard:
    return Shard.parse(value) if value is not None else WHOLE


def _allowing(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """For as long as the command runs."""
    context.with_resource(allowing(value))
    return value


ALLOW_DOWNLOAD = flag(
    "--allow-download",
    is_flag=True,
    expose_value=False,
    callback=_allowing,
    help="Fetches weights given as https://... or timm:NAME; kept in RDIFF_CACHE or ~/.cache/rdiff.",
)
SUITE_FLAGS = _flags(
    flag("--with", "extra", type=FILE, multiple=True, help="A YAML file with more checkpoint entries."),
    flag("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Replaces a value of the suite."),
    flag("--limit", "-L", type=click.IntRange(1), help="At most so many samples of each dataset."),
    flag("--seed", type=click.IntRange(0, 10**18 - 1), help="Of all noise, instead of the suite's."),
    flag("--data-dir", type=FILE, help="Where relative paths of datasets start."),
    flag("--trust", is_flag=True, help="Lets the suite name code of yours, which then runs."),
    ALLOW_DOWNLOAD,
    flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error."),
)
RUN_FLAGS = _flags(
    flag("--output", "-o", type=FILE, help="The run folder; default reports/<suite name>."),
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
    flag("--batch-size", "-b", type=click.IntRange(1), default=128, help="Samples read together; changes no result."),
    flag(
        "--executor",
        type=click.Choice(["local", "processes", "ray"]),
        help="Default: processes if --workers is above 1.",
    ),
    flag(
        "--workers",
        type=click.IntRange(1, 256),
        help="Processes, with --device cuda on all GPUs in turn. Default: 1; with --executor one for each GPU, or 2.",
    ),
    flag("--shard", callback=_shard, metavar="I/N", help="Only every N-th task, from the I-th; see merge."),
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


def workers_of(executor: str | None, asked: int | None, device: str) -> int:
    """The number of workers: what is asked for, or of an executor of several one for each GPU, and at least two.

    Arguments:
        executor: local, processes, ray, or none.
        asked: The number, if it is given.
        device: 'cpu', or 'cuda' for all GPUs, or 'cuda:N'.

    Raises:
        ValueError: If the executor cannot have so many.
    """
    if executor == "local" and (asked or 1) > 1:
        raise ValueError("--executor local has one worker; use --executor processes")
    if executor == "processes" and asked == 1:
        raise ValueError("--executor processes has at least two workers; use --executor local")
    if asked or executor in (None, "local"):
        return asked or 1
    import torch

    return max(2, torch.cuda.device_count() if device == "cuda" else 0)


def device_of(name: str) -> str:
    """The device that a word means.

    Arguments:
        name: auto, cpu, cuda or cuda:N.

    Raises:
        ValueError: If it is none of these, or there is no such GPU.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())) or name.endswith(":"):
        raise ValueError(f"--device {name}: needed is auto, cpu, cuda or cuda:N")
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {name}: there is no such GPU; use --device cpu")
    return name
