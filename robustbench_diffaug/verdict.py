"""What `rdiff verify` prints, and the bar that it shows while samples are evaluated again."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from robustbench_diffaug import terminal
from robustbench_diffaug.verify import notes, whole
from robustbench_diffaug.verify.check import Check, judged, lines
from robustbench_diffaug.verify.recheck import Again, Part

__all__ = ["checks", "noted", "printed"]


def checks(root: Path, again: Again | None, trust: bool, data_dir: Path | None, quiet: bool) -> Iterator[Check]:
    """All checks of a run folder, one after another; with a bar while a share of the samples is evaluated again.

    Arguments:
        root: The folder.
        again: Which share; none where it is left out.
        trust: Whether the lock may name code of the user's.
        data_dir: Where files of datasets are looked for, if they are not where they were.
        quiet: Whether no bar is shown.
    """
    yield from whole.verify(root, trust, data_dir)
    if again is None:
        return
    with terminal.progress(quiet) as shown:

        def announce(parts: Sequence[Part]) -> None:
            seconds = terminal.duration(sum(part.seconds for part in parts))
            shown.bar.console.print(f"the run took {seconds} for as many samples", highlight=False)
            shown.announce([part.task for part in parts], [])

        found = whole.verify_again(root, again, trust, data_dir, announce, shown.advance)
    yield found  # after the bar, which takes standard output for its own


def noted(root: Path, again: Again, found: Iterator[Check]) -> Iterator[Check]:
    """The checks, and after them a note in the folder if none failed and every cell was evaluated again.

    Arguments:
        root: The folder.
        again: What was evaluated again.
        found: The checks, the recheck last.
    """
    failed, last = False, None
    for last in found:
        failed |= last.state == "FAILED"
        yield last
    if not failed and last is not None and last.state == "ok" and not last.details:
        yield judged("note", f"boards mark this run as rechecked: {notes.write(root, again.share, again.seed)}", [])
    else:
        why = "a check failed" if failed else "not every cell was evaluated again"
        yield Check("note", "not checked", f"none is written, since {why}")


def printed(found: Iterator[Check]) -> Iterator[tuple[str, bool]]:
    """The lines of checks, each with whether it begins one that failed."""
    for check in found:
        for place, line in enumerate(lines(check)):
            yield line, check.state == "FAILED" and not place
