"""What a training run leaves: weights, a card that says where they come from, and an entry to paste into a suite."""

import csv
import io
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml
from torch import nn

from robustbench_diffaug import document, stats
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import trusting
from robustbench_diffaug.diffusion import unet
from robustbench_diffaug.files import atomic, sha256
from robustbench_diffaug.train.loop import Step, train
from robustbench_diffaug.train.recipe import ClassifierRecipe, DenoiserRecipe

__all__ = ["load", "run"]

AnyRecipe: TypeAlias = ClassifierRecipe | DenoiserRecipe


def load(path: Path, *, trust: bool = False, data_dir: Path | None = None) -> AnyRecipe:
    """A recipe from a YAML file.

    Raises:
        ValueError: If something is wrong with it; one line with file, line and key.
    """
    found = document.read(path)
    kinds: dict[str, type[AnyRecipe]] = {"classifier": ClassifierRecipe, "denoiser": DenoiserRecipe}
    kind = found.data.get("kind") if isinstance(found.data, dict) else None
    if kind not in kinds:
        raise ValueError(f"{path}:1: a recipe needs a kind, one of {', '.join(kinds)}, not {kind!r}")
    context = {"folder": path.resolve().parent, "data": data_dir.resolve() if data_dir else None}
    with trusting(trust):
        return found.validate(kinds[kind], context)


def run(recipe: AnyRecipe, folder: Path, device: str = "cpu") -> Iterator[Step]:
    """Trains, passing every step on, and writes the results when the last is done.

    Arguments:
        recipe: What to train.
        folder: Where the state, the log, the weights, the card and the entry go.
        device: 'cpu' or 'cuda[:N]'.

    Raises:
        ValueError: As `train`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = None
    for last in train(recipe, folder / "state.pt", device):
        if last.number % 50 == 0 or last.number == recipe.steps:
            _log(folder / "log.csv", last)
        yield last
    if last is None:  # an earlier call did all the steps
        last = Step(recipe.steps, {}, _finished(recipe, folder / "state.pt"))
    if isinstance(recipe, ClassifierRecipe):
        _write_classifier(recipe, folder, last.kept)
    else:
        _write_denoiser(recipe, folder, last.kept)


def _finished(recipe: AnyRecipe, state: Path) -> nn.Module:
    from robustbench_diffaug.train.loop import network_of

    network = network_of(recipe)
    network.load_state_dict(torch.load(state, map_location="cpu", weights_only=True)["average"])
    return network


def _log(path: Path, step: Step) -> None:
    """Adds a row, in place of those that a run wrote after its last saved state before it was stopped."""
    rows = list(csv.reader(path.read_text().splitlines()))[1:] if path.exists() else []
    kept = [row for row in rows if int(row[0]) < step.number]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(
        [["step", *step.losses], *kept, [step.number, *step.losses.values()]]
    )
    with atomic(path) as file:
        file.write(text.getvalue().encode())


def _card(recipe: AnyRecipe, digest: str, parameters: int) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "recipe": recipe.digest,
        "data": {"name": recipe.dataset.name, "digest": recipe.dataset.contents()},
        "seed": recipe.seed,
        "steps": recipe.steps,
        "parameters": parameters,
        "sha256": digest,
        "versions": {name: version(name) for name in ("torch", "timm", "diffusers", "robustbench-diffaug")},
    }


def _write_yaml(path: Path, content: object) -> None:
    with atomic(path) as file:
        file.write(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


def _write_denoiser(recipe: DenoiserRecipe, folder: Path, network: nn.Module) -> None:
    unet.save(folder / recipe.name, network, recipe.schedule)
    digest = sha256(folder / recipe.name / unet.WEIGHTS)
    _write_yaml(folder / f"{recipe.name}.card.yaml", _card(recipe, digest, _parameters(network)))
    entry = {"kind": "unet", "folder": recipe.name, "sha256": digest}
    _write_yaml(folder / f"{recipe.name}.yaml", entry)


def _write_classifier(recipe: ClassifierRecipe, folder: Path, network: nn.Module) -> None:
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    path = folder / f"{recipe.name}.safetensors"
    with atomic(path) as file:
        file.write(save(state))
    digest = sha256(path)
    card = _card(recipe, digest, _parameters(network))
    if recipe.test:
        card["accuracy"] = _accuracy(recipe, network)
    _write_yaml(folder / f"{recipe.name}.card.yaml", card)
    entry = {
        "kind": "timm",
        "id": recipe.name,
        "arch": recipe.arch,
        "args": _plain(dict(recipe.args)),
        "classes": recipe.classes,
        "channels": recipe.channels,
        "preprocess": recipe.preprocess.model_dump(mode="json", exclude_defaults=True),
        "weights": {"uri": path.name, "sha256": digest},
    }
    _write_yaml(folder / f"{recipe.name}.yaml", entry)


def _accuracy(recipe: ClassifierRecipe, network: nn.Module) -> dict[str, Any]:
    assert recipe.test is not None
    source, rows = recipe.test.opened(), recipe.test.rows()
    images, labels = source.read(rows)
    device = next(network.parameters()).device
    model = Model(recipe.name, network.eval(), recipe.preprocess, recipe.classes, 128)
    with torch.no_grad():
        hits = (model.logits(images.to(device)).argmax(1).cpu() == labels).numpy()
    found = stats.proportion(hits)
    return {"dataset": recipe.test.name, "value": found.value, "low": found.low, "high": found.high, "n": found.n}


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _plain(value: Any) -> Any:
    """Tuples of pairs and tuples as YAML's own mappings and lists."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
