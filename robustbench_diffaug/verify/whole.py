"""All checks of a run folder, in the order in which one rests on the other."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from robustbench_diffaug.engine import Outcome
from robustbench_diffaug.recorded import BOARD, LOCK, open_run
from robustbench_diffaug.verify import files, tables
from robustbench_diffaug.verify.certificates import certificates
from robustbench_diffaug.verify.check import Check, guarded
from robustbench_diffaug.verify.recheck import Again, Part, recheck

__all__ = ["verify", "verify_again"]

BARE = ("imported", "report")  # keys of the manifest of folders that hold no records


def verify(root: Path, trust: bool = False, data_dir: Path | None = None) -> Iterator[Check]:
    """Checks a run folder: its bytes, its settings, its records, and every figure that follows from them.

    Arguments:
        root: The folder.
        trust: Whether the lock may name code of the user's.
        data_dir: Where files of datasets are looked for, if they are not where they were.

    Raises:
        ValueError: If there is no such folder, or it is none of rdiff's.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; give the folder of a run, such as reports/quickstart")
    if not any((root / name).is_file() for name in (LOCK, "manifest.json", "digests.txt")):
        raise ValueError(f"{root} is no folder of rdiff: it has neither {LOCK} nor manifest.json nor digests.txt")
    yield guarded("digests", lambda: files.listing(root))
    try:
        run = open_run(root, trust=trust, data_dir=data_dir)
        run.bare, run.archive  # noqa: B018  # what they find to be damaged is found here
    except (ValueError, OSError) as error:
        yield Check("suite", "not checked" if _bare(root) else "FAILED", str(error))
        return
    yield guarded("suite", lambda: files.suite(run))
    yield from _several("contents", lambda: files.contents(run))
    yield guarded("records", lambda: tables.records(run))
    yield guarded("certificates", lambda: certificates(run))
    yield from _several("figures", lambda: tables.figures(run))


def verify_again(
    root: Path,
    again: Again,
    trust: bool = False,
    data_dir: Path | None = None,
    announce: Callable[[Sequence[Part]], None] = lambda found: None,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Check:
    """Evaluates a share of the samples of a run folder again: `recheck`, of a folder that may be damaged.

    Arguments:
        root: The folder.
        again: Which share, and where.
        trust: Whether the lock may name code of the user's.
        data_dir: Where files of datasets are looked for, if they are not where they were.
        announce: Told what will be evaluated, before it is.
        progress: Told each outcome.
    """
    if _bare(root):
        return Check("recheck", "not checked", "there are no records")

    def make() -> Check:
        return recheck(open_run(root, trust=trust, data_dir=data_dir), again, announce, progress)

    return guarded("recheck", make)


def _several(name: str, make: Callable[[], list[Check]]) -> list[Check]:
    """Checks that are made together; one that failed where a damaged file made them stop."""
    found: list[Check] = []

    def first() -> Check:
        found.extend(make())
        return found[0]

    stopped = guarded(name, first)
    return found or [stopped]


def _bare(root: Path) -> bool:
    """Whether a folder says of itself that it never had records."""
    if (root / BOARD).is_file() and not (root / LOCK).exists():
        return True
    try:
        manifest = json.loads((root / "manifest.json").read_bytes())
        return not (root / LOCK).exists() and any(key in manifest for key in BARE)
    except (ValueError, OSError, TypeError):
        return False
