"""What a training run leaves: weights, a card that says where they come from, and an entry to paste into a suite."""

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from robustbench_diffaug import document, rng, stats
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.base import Preprocess
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import trusting
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.diffusion import unet
from robustbench_diffaug.files import atomic, sha256
from robustbench_diffaug.train.generate import Generation
from robustbench_diffaug.train.log import Log, draw
from robustbench_diffaug.train.loop import Step, train
from robustbench_diffaug.train.networks import network_of, wants_of
from robustbench_diffaug.train.parallel import Place, barrier
from robustbench_diffaug.train.recipe import (
    AutoencoderRecipe,
    ClassifierRecipe,
    DenoiserRecipe,
    GuidanceRecipe,
    Recipe,
)

__all__ = ["load", "run"]

AnyRecipe: TypeAlias = ClassifierRecipe | DenoiserRecipe | AutoencoderRecipe | GuidanceRecipe
KINDS: dict[str, type[AnyRecipe] | type[Generation]] = {
    "classifier": ClassifierRecipe,
    "denoiser": DenoiserRecipe,
    "autoencoder": AutoencoderRecipe,
    "guidance": GuidanceRecipe,
    "generation": Generation,
}


def load(path: Path, *, trust: bool = False, data_dir: Path | None = None, settings: Sequence[str] = ()) -> Any:
    """A recipe from a YAML file.

    Arguments:
        path: The file.
        trust: Whether it may name code.
        data_dir: Where relative paths of data sets start.
        settings: 'a.b=value' each, put in place of what the file says.

    Raises:
        ValueError: If something is wrong with it; one line with file, line and key.
    """
    found = document.read(path)
    data = document.unshared(found.data)
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{path}:1: a recipe needs a kind, one of {', '.join(KINDS)}, not {kind!r}")
    given = {document.apply(data, setting): f"--set {setting}" for setting in settings}
    found = document.Document(found.path, data, found.lines, given)
    context = {"folder": path.resolve().parent, "data": data_dir.resolve() if data_dir else None}
    with trusting(trust):
        return found.validate(KINDS[kind], context)


def run(
    recipe: AnyRecipe, folder: Path, device: str = "cpu", place: Place | None = None, tensorboard: bool = False
) -> Iterator[Step]:
    """Trains, passing every step on, and writes the results when the last is done.

    Arguments:
        recipe: What to train.
        folder: Where the state, the log, the weights, the card and the entry go.
        device: 'cpu' or 'cuda[:N]'.
        place: Which of several processes this is; the first one writes.
        tensorboard: Whether events for TensorBoard are written too.

    Raises:
        ValueError: As `train`.
    """
    place = place or Place()
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder, tensorboard) if place.rank == 0 else None
    last = None
    for last in train(recipe, folder / "state.pt", device, place):
        if log is not None:
            log.add(last, last.number == recipe.steps)
        yield last
    if place.rank == 0:
        kept = last.kept if last is not None else _finished(recipe, folder / "state.pt")
        write(recipe, folder, kept.eval())
        if (folder / "log.csv").exists():
            draw(folder / "log.csv", folder / "log.png", recipe.name)
    barrier(place)


def _finished(recipe: AnyRecipe, state: Path) -> nn.Module:
    """The network of a run that an earlier call ended."""
    network = network_of(recipe)
    network.load_state_dict(torch.load(state, map_location="cpu", weights_only=True)["average"])
    return network


def write(recipe: AnyRecipe, folder: Path, network: nn.Module) -> None:
    """Writes the weights of a trained network, its card and its entry."""
    if isinstance(recipe, DenoiserRecipe):
        unet.save(folder / recipe.name, network, recipe.schedule)
        digest = sha256(folder / recipe.name / unet.WEIGHTS)
        _write_yaml(folder / f"{recipe.name}.card.yaml", _card(recipe, digest, network))
        _write_yaml(folder / f"{recipe.name}.yaml", {"kind": "unet", "folder": recipe.name, "sha256": digest})
        return
    path = folder / f"{recipe.name}.safetensors"
    _write_weights(path, network, recipe.half)
    digest = sha256(path)
    card = _card(recipe, digest, network)
    if recipe.test and not isinstance(recipe, AutoencoderRecipe):
        card["accuracy"] = _accuracy(recipe, recipe.test, network)
    _write_yaml(folder / f"{recipe.name}.card.yaml", card)
    _write_yaml(folder / f"{recipe.name}.yaml", _entry(recipe, {"uri": path.name, "sha256": digest}))


def _write_weights(path: Path, network: nn.Module, half: bool) -> None:
    """Writes safetensors; what is rounded in the file is rounded in the network too, so that it is the one measured."""
    from safetensors.torch import save

    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        rounded = half and value.is_floating_point() and value.ndim > 1
        state[name] = (value.half() if rounded else value).detach().cpu().contiguous()
    network.load_state_dict({name: value.to(network.state_dict()[name].dtype) for name, value in state.items()})
    with atomic(path) as file:
        file.write(save(state))


def _entry(recipe: ClassifierRecipe | GuidanceRecipe | AutoencoderRecipe, weights: dict[str, str]) -> dict[str, Any]:
    """What can be pasted into a suite, or for an autoencoder into the DeepAugment term of a recipe."""
    args = _plain(dict(recipe.args))
    if isinstance(recipe, AutoencoderRecipe):
        return {"arch": "autoencoder", "args": args, "channels": recipe.channels, "weights": weights}
    entry: dict[str, Any] = {"kind": "timm", "id": recipe.name, "arch": recipe.arch, "args": args}
    entry |= {"classes": recipe.classes, "channels": recipe.channels}
    if isinstance(recipe, GuidanceRecipe):
        entry["wants"] = list(wants_of(recipe))
    else:
        entry["preprocess"] = recipe.preprocess.model_dump(mode="json", exclude_defaults=True)
    return {**entry, "weights": weights}


def _card(recipe: Recipe, digest: str, network: nn.Module) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "recipe": recipe.digest,
        "data": {"name": recipe.dataset.name, "digest": recipe.dataset.contents()},
        "seed": recipe.seed,
        "steps": recipe.steps,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "sha256": digest,
        "versions": {name: version(name) for name in ("torch", "timm", "diffusers", "robustbench-diffaug")},
    }


def _write_yaml(path: Path, content: object) -> None:
    with atomic(path) as file:
        file.write(document.dump(content))


@torch.no_grad()
def _accuracy(recipe: ClassifierRecipe | GuidanceRecipe, test: Dataset, network: nn.Module) -> dict[str, Any]:
    """The share of the test images that are classified right; of noisy ones, each at one uniformly random time."""
    source, rows = test.opened(), test.rows()
    device = next(network.parameters()).device
    if isinstance(recipe, GuidanceRecipe):
        model = Model(recipe.name, network, Preprocess(), recipe.classes, 128, wants=wants_of(recipe))
    else:
        model = Model(recipe.name, network, recipe.preprocess, recipe.classes, 128)
    hits = []
    for first in range(0, len(rows), 128):
        images, labels = source.read(rows[first : first + 128])
        images = images.to(device)
        shown: tuple[Tensor | None, ...] = (images,)
        if isinstance(recipe, GuidanceRecipe):
            shown = _diffused(recipe, images, [source.ids[row] for row in rows[first : first + 128]])
        hits.append(model.logits(*shown).argmax(1).cpu() == labels)  # type: ignore[arg-type]  # the first is there
    found = stats.proportion(torch.cat(hits).numpy())
    how = {"at": "one uniformly random time of each image"} if model.wants else {}
    return {"dataset": test.name, **how, "value": found.value, "low": found.low, "high": found.high, "n": found.n}


def _diffused(recipe: GuidanceRecipe, images: Tensor, ids: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each image at a time of its own, the level, and the denoised twin where it is seen."""
    keys = [rng.key("guidance test", id) for id in ids]
    levels = recipe.denoiser.sigmas()
    times = [int(rng.uniform(key, range(1), (1,))[0, 0] * len(levels)) for key in keys]
    noise = torch.stack(
        [torch.from_numpy(rng.normal(key, range(1, 2), tuple(images.shape[1:]))[0]) for key in keys]
    ).to(images)
    sigma = torch.from_numpy(levels[times]).to(images)
    noisy = images + sigma[:, None, None, None] * noise
    if recipe.sees == "noisy":
        return noisy, sigma, None
    return noisy, sigma, recipe.denoiser.loaded(Limits(device=str(images.device)))(noisy, sigma).mean


def _plain(value: Any) -> Any:
    """Tuples of pairs and tuples as YAML's own mappings and lists."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
