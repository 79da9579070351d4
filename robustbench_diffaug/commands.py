"""More commands of `rdiff`; the command line adds them. Nothing heavy is imported before a command needs it."""

from pathlib import Path
from typing import Any

import click

from robustbench_diffaug.flags import ALLOW_DOWNLOAD, FILE, device_of, flag

__all__ = ["check", "compare", "ls", "merge", "schema"]


@click.command()
@click.argument("file", metavar="FILE.yaml", type=FILE)
@flag("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@flag("--trust", is_flag=True, help="Lets the file name code of yours, which then runs.")
@ALLOW_DOWNLOAD
@flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
def check(file: Path, device: str, trust: bool, verbose: bool) -> int:
    """Loads the checkpoints of FILE.yaml, shows them images, and says what was found and repaired.

    The file holds one entry, a list of them, or a suite.
    """
    from rich.console import Console

    from robustbench_diffaug import checked

    for place, entry in checked.entries(file, trust).items():
        try:
            found = checked.look(entry, file.resolve().parent, device_of(device))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        checked.show(found, Console())
    return 0


@click.command()
@click.argument("runs", metavar="RUN...", type=FILE, nargs=-1, required=True)
@flag("--a", required=True, metavar="ID", help="A checkpoint; of the first RUN where there are two.")
@flag("--b", required=True, metavar="ID", help="Another, or the same in another run.")
@flag("--metric", default="*", metavar="PATTERN", help="Which metrics, as 'accuracy/*'.")
@flag("--output", "-o", type=FILE, help="A folder for the table and the page.")
@flag("--format", "formats", help="What is written there, with commas between; default: csv,html.")
@flag("--trust", is_flag=True, help="Lets the lock of a run name code of yours, which then runs.")
@flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
def compare(runs: tuple[Path, ...], a: str, b: str, output: Path | None, formats: str | None, **flags: Any) -> int:
    """Tests two checkpoints in pairs, in every figure that both have: of one RUN, or one of each of two."""
    from robustbench_diffaug import compare as comparison
    from robustbench_diffaug.component import suggest
    from robustbench_diffaug.report import compared

    chosen = formats.split(",") if formats is not None else list(comparison.FORMATS)
    for word in chosen:
        if word not in comparison.FORMATS:
            known = suggest(word, list(comparison.FORMATS))
            raise ValueError(f"--format {formats}: no format is called {word!r}{known}")
    if formats is not None and output is None:
        raise ValueError("--format says what is written; say where with --output")
    found = comparison.compare(runs, a, b, flags["metric"], flags["trust"])
    for line in compared.lines(found):
        click.echo(line)
    if output is not None:
        comparison.write(found, runs, output, chosen)
        for word in chosen:
            click.echo(f"wrote   {output / comparison.FORMATS[word]}")
    return 0


@click.command()
@click.argument("what", type=click.Choice(["checkpoints", "denoisers", "datasets", "evaluators", "suites", "recipes"]))
@flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
def ls(what: str, verbose: bool) -> int:
    """Lists what is installed: kinds and where they come from, built-in suites, recipes and trained networks."""
    from robustbench_diffaug import listing

    for line in listing.lines(what):
        click.echo(line)
    return 0


@click.command()
@click.argument("runs", metavar="RUN...", type=FILE, nargs=-1, required=True)
@flag("--output", "-o", type=FILE, required=True, help="The folder of the united run.")
@flag("--trust", is_flag=True, help="Lets the locks of the runs name code of yours, which then runs.")
@flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
def merge(runs: tuple[Path, ...], output: Path, trust: bool, verbose: bool) -> int:
    """Unites runs of the same suite that were made on several machines, as with --shard."""
    from robustbench_diffaug import terminal
    from robustbench_diffaug.merge import merge as united

    done = united(runs, output, trust)
    for line in terminal.board(done):
        click.echo(line)
    for failed in done.failures:
        click.echo("failed: {bench} / {checkpoint} / {dataset}: {reason}".format_map(failed), err=True)
    click.echo(done.partial or f"report  {done.root / 'index.html'}")
    click.echo(f"digest  {done.digest}")
    return 1 if done.failures else 0


@click.command()
@flag("--output", "-o", type=FILE, help="The file to write; default: standard output.")
@flag("--verbose", "-v", is_flag=True, help="Shows the traceback of an error.")
def schema(output: Path | None, verbose: bool) -> int:
    """Writes the JSON schema of suites and checkpoint entries, with every installed kind, for editors.

    The first line of a suite, `# yaml-language-server: $schema=FILE`, says where it lies.
    """
    from robustbench_diffaug import files, schema

    for line in schema.broken():
        click.echo(f"warning: {line}", err=True)
    written = schema.text()
    if output is None:
        click.echo(written, nl=False)
        return 0
    with files.atomic(output) as file:
        file.write(written.encode())
    click.echo(f"wrote   {output}")
    return 0
