"""What is installed, for `rdiff ls`: built-in kinds are not imported; plug-ins are, to see whether they work."""

import ast
import inspect
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from robustbench_diffaug.component import Component, is_built_in, load_kind, offers
from robustbench_diffaug.files import built_in

__all__ = ["FAMILIES", "family", "lines", "origin", "spelled"]

FAMILIES = {
    "checkpoints": "robustbench_diffaug.checkpoints.base:Checkpoint",
    "datasets": "robustbench_diffaug.data.base:Dataset",
    "denoisers": "robustbench_diffaug.diffusion.base:Denoiser",
    "evaluators": "robustbench_diffaug.evaluators.base:Evaluator",
}
"""Where the abstract class of each family is."""


def family(what: str) -> type[Component]:
    """The abstract class of a family: 'checkpoints', 'datasets', 'denoisers' or 'evaluators'."""
    module, _, name = FAMILIES[what].partition(":")
    found: type[Component] = getattr(import_module(module), name)
    return found


def lines(what: str) -> Iterator[str]:
    """One line for each thing of a kind: its name, what it is, and where it comes from.

    A plug-in that does not work has the reason in its line.

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
    points = [point for several in offers(f"robustbench_diffaug.{what}").values() for point in several]
    width = max((len(spelled(point.name)) for point in points), default=0) + 2
    for point in points:
        said = _built_in_sentence(point) if is_built_in(point) else _plug_in_sentence(what, point)
        yield f"{spelled(point.name):<{width}}{said}  ({spelled(origin(point))})"
    if what in ("checkpoints", "denoisers"):
        yield from _zoo(what)


def spelled(text: str) -> str:
    """A text in one line, in which what a terminal would obey, or what turns its direction, is spelled out."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return "".join(shown)


def origin(point: EntryPoint) -> str:
    """'rdiff-example 0.1.0, rdiff_example.shake:Shake'; of a built-in kind the name and version of this package."""
    if point.dist is None:
        return point.value
    name = f"{point.dist.name} {point.dist.version}"
    return name if is_built_in(point) else f"{name}, {point.value}"


def _plug_in_sentence(what: str, point: EntryPoint) -> str:
    try:
        found = load_kind(family(what), point)
    except ValueError as error:
        return spelled(f"broken: {error}")
    return spelled(_sentence(inspect.getdoc(found) if found.__doc__ else ""))


def _built_in_sentence(point: EntryPoint) -> str:
    """The first sentence of a class's docstring, read from its source, since importing it may take seconds."""
    source = Path(str(files("robustbench_diffaug"))).parent.joinpath(*point.module.split(".")).with_suffix(".py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body if source.is_file() else ():
        if isinstance(node, ast.ClassDef) and node.name == point.attr:
            return spelled(_sentence(ast.get_docstring(node)))
    return ""


def _sentence(docstring: str | None) -> str:
    """The first paragraph of a docstring; for a built-in kind that is one sentence."""
    return (docstring or "").strip().partition("\n\n")[0]


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
