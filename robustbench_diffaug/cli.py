"""The command `rdiff`. Nothing heavy is imported before a command needs it."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from robustbench_diffaug.runs import Options
    from robustbench_diffaug.suite import Loaded

__all__ = ["main"]

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


def _flag(*names: str, **more: Any) -> Callable[[F], F]:
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
    _flag("--with", "extra", type=FILE, multiple=True, help="A YAML file with more checkpoint entries."),
    _flag("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Replaces a value of the suite."),
    _flag("--limit", "-L", type=click.IntRange(1), help="At most so many samples of each dataset."),
    _flag("--seed", type=click.IntRange(0, 10**18 - 1), help="Of all noise, instead of the suite's."),
    _flag("--data-dir", type=FILE, help="Where relative paths of datasets start."),
    _flag("--trust", is_flag=True, help="Lets the suite name code of yours, which then runs."),
    _flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error."),
)
RUN_FLAGS = _flags(
    _flag("--output", "-o", type=FILE, help="The run folder; default reports/<suite name>."),
    _flag("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
    _flag("--batch-size", "-b", type=click.IntRange(1), default=128, help="Samples read together; changes no result."),
    _flag("--executor", type=click.Choice(["local", "processes"]), help="Default: processes if --workers is above 1."),
    _flag("--workers", type=click.IntRange(1, 256), default=1, help="Processes."),
)


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "token_normalize_func": lambda token: token.replace("_", "-"),
    }
)
@click.version_option(package_name="robustbench-diffaug", prog_name="rdiff")
def cli() -> None:
    """Measures how robust image classifiers are, and proves it.

    SUITE is the path of a YAML file or the name of a built-in suite (see `rdiff ls suites`).
    Every flag can also be given as an environment variable, RDIFF_<FLAG>.
    """


@cli.command()
@click.argument("suite")
@SUITE_FLAGS
@RUN_FLAGS
@_flag("--quiet", "-q", is_flag=True, help="Shows no progress.")
def run(suite: str, quiet: bool, **flags: Any) -> int:
    """Runs what is missing of SUITE, then writes metrics and the report."""
    from robustbench_diffaug import runs, terminal

    loaded = _load(suite, flags)
    options = _options(loaded, flags)
    with terminal.progress(quiet) as shown:
        done = runs.execute(loaded, options, shown.announce, shown.advance)
    for line in terminal.board(done):
        click.echo(line)
    if not done.computed and not done.failures:
        click.echo("nothing was left to do", err=True)
    for failed in dict.fromkeys("{bench} / {checkpoint} / {dataset}: {reason}".format_map(f) for f in done.failures):
        click.echo(f"failed: {failed}", err=True)
    click.echo(f"report  {done.root / 'index.html'}")
    click.echo(f"digest  {done.digest}")
    return 1 if done.failures else 0


@cli.command()
@click.argument("suite")
@SUITE_FLAGS
@RUN_FLAGS
def plan(suite: str, **flags: Any) -> int:
    """Shows what `run` would do: cells, network forwards, what is there already, and the radii within reach."""
    from robustbench_diffaug import runs, terminal
    from robustbench_diffaug.suite import check

    loaded = _load(suite, flags)
    options = _options(loaded, flags)
    runs.own(options.root, loaded.suite)
    check(loaded)
    for line in terminal.plan(loaded.suite, runs.tasks_of(loaded, options), options):
        click.echo(line)
    return 0


@cli.command()
@click.argument("suite")
@SUITE_FLAGS
def validate(suite: str, **flags: Any) -> int:
    """Reads and checks SUITE, its files and their digests, without running it."""
    from robustbench_diffaug import suite as suites

    loaded = _load(suite, flags)
    for warning in suites.check(loaded):
        click.echo(f"warning: {warning}", err=True)
    found = loaded.suite
    parts = sum(len(bench.parts()) for bench in found.benches)
    counts = f"{len(found.checkpoints)} checkpoints, {len(found.benches)} benches, {parts} datasets"
    click.echo(f"suite {found.name} is sound: {counts}, digest {found.digest}")
    return 0


@cli.command()
@click.argument("recipe")
@_flag("--output", "-o", type=FILE, help="Where the results go; default trained/<recipe name>.")
@_flag("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Replaces a value of the recipe.")
@_flag("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@_flag("--data-dir", type=FILE, help="Where relative paths of datasets start.")
@_flag("--tensorboard", is_flag=True, help="Writes events for TensorBoard too.")
@_flag("--trust", is_flag=True, help="Lets the recipe name code of yours, which then runs.")
@_flag("--quiet", "-q", is_flag=True, help="Shows no progress.")
@_flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
def train(recipe: str, output: Path | None, device: str, quiet: bool, tensorboard: bool, **flags: Any) -> int:
    """Trains the network of RECIPE, a YAML file or the name of a built-in one; continues if it was stopped.

    In several processes: torchrun --nproc_per_node N -m robustbench_diffaug train RECIPE.
    """
    from robustbench_diffaug import files, terminal
    from robustbench_diffaug.train import output as training

    path, installed = files.locate(recipe, "recipes")
    found = training.load(
        path, trust=flags["trust"] or installed, data_dir=flags["data_dir"], settings=flags["settings"]
    )
    folder = output or Path("trained", found.name)
    for line in terminal.train(found, folder, _device(device), quiet, tensorboard):
        click.echo(line)
    return 0


@cli.command()
@click.argument("what", type=click.Choice(["checkpoints", "denoisers", "datasets", "evaluators", "suites", "recipes"]))
@_flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
def ls(what: str, verbose: bool) -> int:
    """Lists what is installed: kinds and where they come from, built-in suites, recipes and trained networks."""
    from robustbench_diffaug import listing

    for line in listing.lines(what):
        click.echo(line)
    return 0


def _load(suite: str, flags: dict[str, Any]) -> "Loaded":
    from robustbench_diffaug.suite import load

    names = ("trust", "settings", "extra", "limit", "seed", "data_dir")
    return load(suite, **{name: flags[name] for name in names})


def _options(loaded: "Loaded", flags: dict[str, Any]) -> "Options":
    from robustbench_diffaug.runs import Options

    if flags["executor"] == "local" and flags["workers"] > 1:
        raise ValueError("--executor local has one worker; use --executor processes")
    root = flags["output"] or Path("reports", loaded.suite.name)
    workers = flags["workers"] if flags["executor"] != "processes" else max(2, flags["workers"])
    return Options(root, _device(flags["device"]), flags["batch_size"], workers, flags["trust"])


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())) or name.endswith(":"):
        raise ValueError(f"--device {name}: needed is auto, cpu, cuda or cuda:N")
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"--device {name}: there is no such GPU; use --device cpu")
    return name


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits: 0 all done, 1 some cells failed, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(words, prog_name="rdiff", standalone_mode=False) or 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        _complain("interrupted; what is finished is kept, run again to continue")
        code = 130
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except BrokenPipeError:  # as of `rdiff ls suites | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        asked = os.environ.get("RDIFF_VERBOSE", "").lower() in ("1", "true", "yes", "on")
        if asked or {"--verbose", "-v"} & set(words):
            click.echo(traceback.format_exc().rstrip(), err=True)
        _complain(_sentence(error))
        code = 2
    sys.exit(code)


def _complain(sentence: str) -> None:
    """One line on standard error, in which what a terminal would obey, such as colours, is spelled out."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(sentence.split()))
    click.echo(f"rdiff: {''.join(shown)}", err=True)


def _sentence(error: Exception) -> str:
    """What an error says to the user."""
    if isinstance(error, click.UsageError):
        message, context = error.format_message().rstrip("."), error.ctx
        if context and isinstance(context.command, click.Group) and "No such command" in message:
            known = ", ".join(context.command.commands)
            message += f"; there are {known}"
        return f"{message}; see {context.command_path if context else 'rdiff'} --help"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ValueError):
        return str(error)
    return f"a fault of rdiff, please report it with what --verbose shows: {type(error).__name__}: {error}"
