"""What is installed, for `rdiff ls`; no plug-in is imported for it, and no network loaded."""

from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from robustbench_diffaug.files import built_in

__all__ = ["lines"]


def lines(what: str) -> Iterator[str]:
    """One line for each thing of a kind.

    Arguments:
        what: 'checkpoints', 'denoisers', 'datasets', 'evaluators', 'suites' or 'recipes'.
    """
    if what in ("suites", "recipes"):
        found = built_in(what)
        width = max(map(len, found)) + 2
        for name, path in found.items():
            comment = next((line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line[:2] == "# "), "")
            yield f"{name:<{width}}{comment}"
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
        denoiser = (folder / card["name"] / "unet").is_dir()
        if denoiser if what == "denoisers" else "accuracy" in card:
            yield f"{'rdiff:zoo/' + card['name']:<46}{card['parameters']:,} parameters{_accuracy(card)}"


def _accuracy(card: dict[str, Any]) -> str:
    if "accuracy" not in card:
        return ""
    of = "accuracy on diffused images" if "at" in card["accuracy"] else "clean accuracy"
    return f", {of} {100 * card['accuracy']['value']:.1f} %"
