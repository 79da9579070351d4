"""The command `rdiff`. Nothing heavy is imported before a command needs it."""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robustbench_diffaug import commands
from robustbench_diffaug.flags import (
    ALLOW_DOWNLOAD,
    FILE,
    FORMATS,
    IMPORT_FLAGS,
    RUN_FLAGS,
    SUITE_FLAGS,
    device_of,
    flag,
    only,
    workers_of,
)

if TYPE_CHECKING:
    from robustbench_diffaug.runs import Options
    from robustbench_diffaug.suite import Loaded

__all__ = ["main"]

LONGEST = 2000  # characters of an error
TABLES = click.Choice(["imagenet-c", "cifar-c"])


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
@flag("--quiet", "-q", is_flag=True, help="Shows no progress.")
def run(suite: str, quiet: bool, **flags: Any) -> int:
    """Runs what is missing of SUITE, then writes metrics and the report."""
    from robustbench_diffaug import runs, terminal

    loaded = _load(suite, flags)
    options = _options(loaded, flags)
    with terminal.progress(quiet, options.workers) as shown:
        done = runs.execute(loaded, options, shown.announce, shown.advance)
    for line in terminal.board(done):
        click.echo(line)
    if not done.computed and not done.failures:
        click.echo("nothing was left to do", err=True)
    _tell(done.failures)
    click.echo(done.partial or f"report  {done.root / 'index.html'}")
    click.echo(f"digest  {done.digest}")
    return 1 if done.failures else 0


@cli.command()
@click.argument("suite")
@SUITE_FLAGS
@RUN_FLAGS
@flag("--probe", is_flag=True, help="Times a few samples; says how long it will take and in how much memory.")
def plan(suite: str, probe: bool, **flags: Any) -> int:
    """Shows what `run` would do: cells, network forwards, what is there already, and the radii within reach."""
    from robustbench_diffaug import runs, terminal
    from robustbench_diffaug.suite import check

    loaded = _load(suite, flags)
    options = _options(loaded, flags)
    runs.own(options.root, loaded.suite)
    for warning in check(loaded):
        click.echo(f"warning: {warning}", err=True)
    for line in terminal.plan(loaded.suite, runs.tasks_of(loaded, options), options, probe):
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
@click.argument("runs", metavar="RUN...", type=FILE, nargs=-1, required=True)
@flag("--output", "-o", type=FILE, help="Where the report goes; default: it replaces that of RUN.")
@flag("--separate", is_flag=True, help="Shows apart what several runs must not share, such as other subsets.")
@flag("--set", "settings", multiple=True, metavar="A.B=VALUE", help="As alpha or radii; the report names it.")
@flag("--format", "formats", default="html,csv", help="Formats, with commas between: html, csv, md, latex, json.")
@flag("--layout", "layouts", multiple=True, metavar="NAME", help="A paper's table, as diffaug-table1; can be repeated.")
@flag("--trust", is_flag=True, help="Lets the lock of RUN name code of yours, which then runs.")
@flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
def report(runs: tuple[Path, ...], output: Path | None, settings: tuple[str, ...], formats: str, **flags: Any) -> int:
    """Computes metrics, leaderboard and page of the folder RUN again, from its records alone.

    Several RUNs make one board, in a folder of its own.
    """
    from robustbench_diffaug import runs as running
    from robustbench_diffaug import terminal
    from robustbench_diffaug.boards import board
    from robustbench_diffaug.component import suggest
    from robustbench_diffaug.report import layouts

    separate = flags["separate"]
    if separate and len(runs) == 1:
        raise ValueError("--separate is of several runs, and one is given")
    for word in formats.split(","):
        if word not in running.ASKED:
            raise ValueError(f"--format {formats}: no format is called {word!r}{suggest(word, list(running.ASKED))}")
    asked = list(dict.fromkeys(map(layouts.named, flags["layouts"])))
    with terminal.figures():
        asking = settings, formats.split(","), flags["trust"], asked
        joins = len(runs) > 1
        done = board.report(runs, output, separate, *asking) if joins else running.report(runs[0], output, *asking)
    for line in terminal.board(done):
        click.echo(line)
    _tell(done.failures)
    click.echo(f"report  {done.root / running.ASKED['html' if 'html' in formats else formats.split(',')[0]]}")
    for layout in asked:
        click.echo(f"layout  {done.root / layout}.md, .tex, .csv")
    click.echo(f"digest  {done.digest}")
    return 1 if done.failures else 0


@cli.command()
@click.argument("run", type=FILE)
@flag("--recheck", metavar="SHARE", help="Evaluates such a share of the samples again, as 1%.")
@flag("--seed", type=click.IntRange(0, 10**18 - 1), help="Chooses the samples; default: one that nobody can foresee.")
@flag("--note", is_flag=True, help="Notes a recheck that has passed in RUN, for boards; its digests stay as they are.")
@flag("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@flag("--data-dir", type=FILE, help="Where files of datasets are, if they are not where they were.")
@flag("--trust", is_flag=True, help="Lets the lock of RUN name code of yours, which then runs.")
@ALLOW_DOWNLOAD
@flag("--quiet", "-q", is_flag=True, help="Shows no progress.")
@flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
def verify(run: Path, recheck: str | None, seed: int | None, quiet: bool, **flags: Any) -> int:
    """Checks the folder RUN: digests, settings, records, certificates, every figure; 1 if anything is wrong."""
    import secrets

    from robustbench_diffaug import verdict
    from robustbench_diffaug.verify.recheck import Again, share_of

    again, failed = None, 0
    if flags["note"] and not recheck:
        raise ValueError("--note notes a recheck; give --recheck too, such as --recheck 1%")
    if recheck:
        unforeseen = secrets.randbelow(10**12)  # samples that can be foreseen can be spared by a forger
        again = Again(share_of(recheck), unforeseen if seed is None else seed, device_of(flags["device"]))
    checks = verdict.checks(run, again, flags["trust"], flags["data_dir"], quiet)
    for line, wrong in verdict.printed(verdict.noted(run, again, checks) if again and flags["note"] else checks):
        failed += wrong
        click.echo(line)
    click.echo(f"{failed} check{'s' if failed > 1 else ''} failed" if failed else "nothing that was checked is wrong")
    return 1 if failed else 0


@cli.command()
@click.argument("recipe")
@flag("--output", "-o", type=FILE, help="Where the results go; default trained/<recipe name>.")
@flag("--set", "settings", multiple=True, metavar="A.B=VALUE", help="Replaces a value of the recipe.")
@flag("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@flag("--data-dir", type=FILE, help="Where relative paths of datasets start.")
@flag("--tensorboard", is_flag=True, help="Writes events for TensorBoard too.")
@flag("--trust", is_flag=True, help="Lets the recipe name code of yours, which then runs.")
@ALLOW_DOWNLOAD
@flag("--quiet", "-q", is_flag=True, help="Shows no progress.")
@flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
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
    for line in terminal.train(found, folder, device_of(device), quiet, tensorboard):
        click.echo(line)
    return 0


@cli.command()
@click.argument("dataset", type=FILE)
@flag("--output", "-o", type=FILE, required=True, help="The folder of the copy.")
@flag("--corruption", "corruptions", multiple=True, help="Its name, can be repeated. Default: the 15 common ones.")
@flag("--severity", "severities", type=click.IntRange(1, 5), multiple=True, help="Can be repeated. Default: all.")
@flag("--format", "form", type=TABLES, default="imagenet-c", help="Folders of JPEG files, or npy arrays.")
@flag("--constants", type=TABLES, help="The table of strengths; default: of the same name as the format.")
@flag("--draw", type=int, default=0, help="Another number gives other random streams.")
@flag("--textures", type=FILE, help="The folder of frost's official textures; without it they are drawn.")
@flag("--data-dir", type=FILE, help="Where relative paths of the dataset start.")
@flag("--trust", is_flag=True, help="Lets the file name code of yours, which then runs.")
@flag("--quiet", "-q", is_flag=True, help="Shows no progress.")
@flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
def corrupt(dataset: Path, output: Path, quiet: bool, **flags: Any) -> int:
    """Writes a corrupted copy of DATASET, a YAML file with one dataset entry; continues if it was stopped."""
    from rich.console import Console
    from rich.progress import Progress

    from robustbench_diffaug import terminal
    from robustbench_diffaug.data import copies

    console = Console(stderr=True, quiet=quiet)
    source = copies.load(dataset, trust=flags["trust"], data_dir=flags["data_dir"])
    versions = copies.ordered(flags["corruptions"]), tuple(sorted(set(flags["severities"]))) or (1, 2, 3, 4, 5)
    form, constants = flags["form"], flags["constants"] or flags["form"]
    copy = copies.Copy(source, output, form, *versions, constants, flags["draw"], flags["textures"])
    cost, skipped = copies.estimate(copy), 0
    line = f"{cost.images:,} images of {len(copy.versions)} versions are left"
    if cost.images:
        size = f"{cost.bytes / 1e6:,.0f} MB"
        line += f": about {terminal.duration(cost.seconds)} and {size}, timed on {cost.timed} images"
    console.print(line, highlight=False, soft_wrap=True)
    with Progress(console=console, disable=quiet) as bar:
        job = bar.add_task(source.name, total=len(copy.rows) * len(copy.versions))
        for done in copies.write(copy):
            bar.advance(job, done.images)
            for message in done.skipped:
                skipped += 1
                console.print(f"skipped: {message}", markup=False, highlight=False, soft_wrap=True)
    click.echo(f"copy    {output}" + (f", without {skipped} images that cannot be decoded" if skipped else ""))
    return 0


@cli.command("import")
@click.argument("format", type=click.Choice(list(FORMATS)))
@click.argument("path", type=FILE)
@flag("--output", "-o", type=FILE, required=True, help="The run folder; its name is the suite's.")
@IMPORT_FLAGS
@flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
def import_(format: str, path: Path, output: Path, verbose: bool, **flags: Any) -> int:
    """Makes a run folder of PATH, figures of another tool.

    PATH is RobustBench's unaggregated_results.csv (robustbench), a file that certify.py of locuslab/smoothing or DDS
    wrote (cohen), or OpenOOD's ood.csv, or a folder with its scores (openood).
    """
    only(format, flags)
    if format == "openood":
        from robustbench_diffaug.exchange import openood

        found = openood.import_run(path, output, *(flags[name] or "" for name in ("score", "checkpoint", "id")))
        shown, done = openood.lines(found), found.folder
    elif format == "cohen":
        from robustbench_diffaug.exchange import cohen

        if flags["sigma"] is None:
            raise ValueError("the file does not say its noise level; give it with --sigma")
        protocol = cohen.Protocol(flags["sigma"], flags["n"], flags["alpha"], flags["n0"])
        certified = cohen.import_run(path, output, protocol, flags["radii"], flags["checkpoint"] or "")
        shown, done = cohen.lines(certified), certified.folder
    else:
        from robustbench_diffaug.exchange import robustbench

        done = robustbench.import_run(path, output, flags["baselines"])
        shown = robustbench.lines(done.leaderboard)
    for line in shown:
        click.echo(line)
    click.echo(f"report  {done.root / 'index.html'}")
    click.echo(f"digest  {done.digest}")
    return 0


@cli.command()
@click.argument("format", type=click.Choice(list(FORMATS)))
@click.argument("run", type=FILE)
@flag("--output", "-o", type=FILE, required=True, help="The file to write; of cohen and openood, the folder.")
@flag("--bench", default="", help="Which bench, where several would do.")
@flag("--set", "settings", multiple=True, metavar="A.B=VALUE", help="cohen, openood: another alpha, as in report.")
@flag("--trust", is_flag=True, help="Lets the run's suite name code of yours, which then runs.")
@flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
def export(format: str, run: Path, output: Path, bench: str, settings: tuple[str, ...], **flags: Any) -> int:
    """Writes figures of the folder RUN as another tool has them.

    robustbench: accuracies under corruptions as CSV; cohen: certificates, a file for each checkpoint and noise level;
    openood: scores, a table and array files for each checkpoint and score.
    """
    if format != "robustbench":
        module, what = ("openood_export", "tables") if format == "openood" else ("cohen", "files of certificates")
        files = import_module(f"robustbench_diffaug.exchange.{module}").export_run(
            run, output, bench, settings, flags["trust"]
        )
        click.echo(f"wrote   {output}, {len(files)} {what}")
        return 0
    only(format, {"settings": settings})
    from robustbench_diffaug.exchange import robustbench

    models = robustbench.export_run(run, output, bench)
    click.echo(f"wrote   {output}, {len(models)} checkpoints")
    return 0


def _tell(failures: Sequence[dict[str, str]]) -> None:
    """A line for each cell that failed."""
    for failed in dict.fromkeys("{bench} / {checkpoint} / {dataset}: {reason}".format_map(f) for f in failures):
        click.echo(f"failed: {failed}", err=True)


def _load(suite: str, flags: dict[str, Any]) -> "Loaded":
    from robustbench_diffaug.suite import load

    names = ("trust", "settings", "extra", "limit", "seed", "data_dir")
    return load(suite, **{name: flags[name] for name in names})


def _options(loaded: "Loaded", flags: dict[str, Any]) -> "Options":
    from robustbench_diffaug.runs import Options

    root = flags["output"] or Path("reports", loaded.suite.name)
    where = device_of(flags["device"])
    workers = workers_of(flags["executor"], flags["workers"], where)
    more = (flags["trust"], flags["compile"], flags["executor"] == "ray", flags["shard"])
    return Options(root, where, flags["batch_size"], workers, *more)


cli.add_command(commands.check)
cli.add_command(commands.compare)
cli.add_command(commands.ls)
cli.add_command(commands.merge)
cli.add_command(commands.schema)


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
    words = " ".join(sentence.split())
    cut = words if len(words) <= LONGEST else f"{words[:LONGEST]}..."  # as of a name of a million letters
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
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
