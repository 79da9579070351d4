"""The note that a recheck leaves in a run folder if it is asked to: what was evaluated again, and of which run.

It is a hidden file, so that the digests of the run stay as they are, and it holds for the run with the digest that it
names alone. It is not signed: whoever was handed a folder must check it again to know.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path

from robustbench_diffaug.files import atomic, sha256

__all__ = ["NOTE", "holds", "write"]

NOTE = ".rechecked.json"


def write(root: Path, share: float, seed: int) -> Path:
    """Notes that a share of the samples of every cell was evaluated again and came out the same.

    Arguments:
        root: The run folder.
        share: In (0, 1].
        seed: Which has chosen the samples.
    """
    about = {"digest": sha256(root / "digests.txt"), "share": share, "seed": seed}
    about["rdiff"] = version("robustbench-diffaug")
    with atomic(root / NOTE) as file:
        file.write(json.dumps(about, indent=1).encode() + b"\n")
    return root / NOTE


def holds(root: Path, digest: str) -> bool:
    """Whether there is a note, of the run with this digest.

    Raises:
        ValueError: If it is damaged.
    """
    path = root / NOTE
    if not path.is_file() or path.is_symlink():
        return False
    try:
        found = json.loads(path.read_bytes())["digest"]
        if re.fullmatch("[0-9a-f]{64}", found):
            return bool(found == digest)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ValueError(
        f"{path} is damaged: it names no digest; delete it, or write it with rdiff verify --recheck --note"
    )
