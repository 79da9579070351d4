"""What is installed, for `rdiff ls`; no plug-in is imported for it, and no network loaded."""

from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

import yaml

from robustbench_diffaug.files import built_in

__all__ = ["lines"]


def lines(what: str) -> Iterator[str]:
    """One line for each thing of a kind.

    Arguments:
        what: 'checkpoints', 'denoisers', 'datasets', 'evaluators', 'suites' or 'recipes'.
    """
    if what in ("suites", "recipes"):
        for name, path in built_in(what).items():
            comment = next((line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line[:2] == "# "), "")
            yield f"{name:<28}{comment}"
        return
    for point in sorted(entry_points(group=f"robustbench_diffaug.{what}"), key=lambda point: point.name):
        origin = point.dist.name if point.dist else "?"
        yield f"{point.name:<28}{point.value}  ({origin})"
    if what in ("checkpoints", "denoisers"):
        yield from _zoo(what)


def _zoo(what: str) -> Iterator[str]:
    folder = Path(str(files("robustbench_diffaug"))) / "zoo"
    for path in sorted(folder.glob("*.card.yaml")):
        card = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = "checkpoints" if "accuracy" in card else "denoisers" if (folder / card["name"] / "unet").is_dir() else ""
        if found == what:
            accuracy = f", clean accuracy {100 * card['accuracy']['value']:.1f} %" if "accuracy" in card else ""
            yield f"{'rdiff:zoo/' + card['name']:<40}{card['parameters']:,} parameters{accuracy}"
