"""Weights of any file that people have, found in it by rule and put into a network; what was done is told.

`read_state` finds the tensors; `fit_state` takes off what wrappers put before the names and finds that every name,
shape and number fits. Where a rule chose or repaired something, a note says so (`notes`); nothing is guessed.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustbench_diffaug.component import suggest
from robustbench_diffaug.files import Weights
from robustbench_diffaug.notes import note
from robustbench_diffaug.pickles import Stored, Thing
from robustbench_diffaug.weight_files import examine

__all__ = ["ENTRIES", "PREFIXES", "State", "fit_state", "load_state", "read_state", "shapes"]

ENTRIES = (
    *("state_dict", "model_state_dict", "model", "average", "network", "net", "module", "params", "weights"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "net_ema"),
)
"""Where files keep the weights, the first that is there being taken: PyTorch's examples, DiffAug's, AugMix's and
Lightning's `state_dict`, DeiT's `model`, our training's `average` before its `network`; moving averages come last, as
in the evaluations of timm and DeiT."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "encoder.")
"""What wrappers put before every name: DataParallel and averages, torch.compile, Lightning modules, and the like."""

COUNTS = "num_batches_tracked"
"""A buffer of batch normalisation that old files lack and that evaluation does not use."""

OPTIMISER = {"state", "param_groups"}
"""The keys of the state of every optimiser of torch."""

AVERAGED = "n_averaged"
"""What torch.optim.swa_utils.AveragedModel adds to a network's weights: how many were averaged."""


class Place(NamedTuple):
    """Where in a file the weights are.

    Arguments:
        keys: Of the mappings in mappings.
        prefix: Of the names that count; the others are left.
    """

    keys: tuple[str, ...] = ()
    prefix: str = ""


@dataclass(frozen=True)
class State:
    """Weights by name, as the file names them.

    Arguments:
        tensors: On the CPU.
        notes: What was found and repaired, one line each.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_state(weights: Weights) -> State:
    """The weights of a file of safetensors or torch.save, of which no code is run.

    Raises:
        ValueError: If the file is missing, damaged, hostile, or it is unclear where in it the weights are.
    """
    path = weights.check()
    contents = examine(path, weights.uri)
    place, stored, notes = _found(contents.tree, weights)
    taken = place.prefix
    if contents.form == "safetensors":
        from safetensors.torch import load_file

        every = load_file(path)
        return State({name: every[taken + name] for name in stored}, notes)
    try:
        with warnings.catch_warnings():  # of the pickle's protocol, which was looked at
            warnings.simplefilter("ignore")
            tree = torch.load(path, map_location="cpu", weights_only=True)
        for key in place.keys:
            tree = tree[key]
        return State({name: tree[taken + name].detach() for name in stored}, notes)
    except Exception as error:  # whatever torch's loader finds that the look at the file did not
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{weights.uri} cannot be read by torch.load(weights_only=True): {reason}") from error


def shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights in a file, by name without what wrappers put before it; no numbers are read.

    Raises:
        ValueError: As of `read_state`.
    """
    path = weights.check()
    _, stored, _ = _found(examine(path, weights.uri).tree, weights)
    names, _ = _chains([name for name in stored if name != AVERAGED])[-1]
    kept = [name for name in stored if name != AVERAGED]
    return {name: stored[old].shape for name, old in zip(names, kept, strict=True)}


def load_state(network: nn.Module, weights: Weights) -> None:
    """Loads a file into a network, in the network's own precision; every key and shape must fit.

    Raises:
        ValueError: If the file cannot be read (see `read_state`) or does not fit (see `fit_state`).
    """
    fit_state(network, read_state(weights), weights.uri)


def fit_state(network: nn.Module, state: State, uri: str) -> None:
    """Puts weights into a network, in the network's own precision, and tells the notes.

    Prefixes that all names share are taken off as far as more names fit the network then.

    Arguments:
        network: Its weights are replaced.
        state: The weights.
        uri: The file, for messages.

    Raises:
        ValueError: If a name is missing or unexpected, a shape differs, or numbers are not finite or of another kind;
            the first few are named.
    """
    expected = network.state_dict()
    tensors, notes = _renamed(state.tensors, expected)
    for text in (*state.notes, *notes):
        note(f"{uri}: {text}")
    counts = [name for name in expected.keys() - tensors.keys() if name.rpartition(".")[2] == COUNTS]
    if counts:
        note(f"{uri}: lacks {len(counts)} buffers {COUNTS}, which evaluation does not use")
    missing = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys() - set(counts))]
    unexpected = [f"unexpected {name[:80]}" for name in sorted(tensors.keys() - expected.keys())]
    pairs = {name: (tensors[name], value) for name, value in expected.items() if name in tensors}
    differing = [_differing(name, tuple(mine.shape), tuple(own.shape)) for name, (mine, own) in pairs.items()]
    _refuse([missing, unexpected, differing], uri, _guess(len(missing), state.tensors, expected))
    _refuse([[_kind(name, mine, own) for name, (mine, own) in pairs.items()]], uri)
    fitted = {name: mine.to(own.dtype) for name, (mine, own) in pairs.items()}
    _refuse([[_finite(name, mine) for name, mine in fitted.items()]], uri)
    changed = sorted(
        {str(mine.dtype).removeprefix("torch.") for mine, own in pairs.values() if mine.dtype != own.dtype}
    )
    if changed:
        note(f"{uri}: converted {' and '.join(changed)} to the network's precision")
    network.load_state_dict(fitted | {name: expected[name] for name in counts})


def _guess(missing: int, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What may be the cause where names are missing."""
    needed = {name: value.shape for name, value in expected.items() if name.rpartition(".")[2] != COUNTS}
    shapes = {name: value.shape for name, value in tensors.items()}
    first = next(iter(needed), "")
    for prefix in (name.removesuffix(first) for name in shapes if missing and name.endswith(f".{first}")):
        if {f"{prefix}{name}": shape for name, shape in needed.items()}.items() <= shapes.items():
            return f"; those that begin with {prefix} fit: say so by entry: {prefix}"
    return "; is it of another architecture?" if missing > len(expected) / 2 else ""


def _refuse(groups: Iterable[Iterable[str]], uri: str, guess: str = "") -> None:
    """Complains of reasons of several kinds, the first few of each, if there are any."""
    found = [reasons for group in groups if (reasons := [reason for reason in group if reason])]
    if found:
        shown = [reason for reasons in found for reason in reasons[: 3 if len(found) == 1 else 2]]
        rest = sum(map(len, found)) - len(shown)
        more = f" and {rest} more" if rest else ""
        raise ValueError(f"{uri} does not fit the network: {'; '.join(shown)}{more}{guess}")


def _differing(name: str, found: tuple[int, ...], needed: tuple[int, ...]) -> str:
    """What is to be said of a shape: nothing where it fits."""
    if found == needed:
        return ""
    text = f"{name} is {found}, not {needed}"
    if len(found) == len(needed) == 2 and found[1] == needed[1]:
        return f"{text}: the file has {found[0]} classes, write classes: {found[0]}"
    ends = [(shape[:1], shape[2:]) for shape in (found, needed) if len(shape) == 4]
    if len(ends) == 2 and ends[0] == ends[1] and max(found[1], needed[1]) <= 4:
        return f"{text}: the file is for images of other channels, write channels: {found[1]}"
    return text


def _kind(name: str, found: Tensor, needed: Tensor) -> str:
    """What is to be said of numbers that are no ordinary ones, or of another kind than the network's."""
    if found.is_quantized or found.layout is not torch.strided:
        return f"{name} is quantised or sparse; needed are plain numbers"
    alike = found.is_floating_point() == needed.is_floating_point() and found.is_complex() == needed.is_complex()
    alike = alike and (found.dtype == torch.bool) == (needed.dtype == torch.bool)
    return "" if alike else f"{name} is of {str(found.dtype)[6:]}, not of {str(needed.dtype)[6:]}"


def _finite(name: str, values: Tensor) -> str:
    if not values.is_floating_point() or bool(torch.isfinite(values).all()):
        return ""
    return f"{name} holds numbers that are not finite (NaN or infinite)"


def _renamed(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by the names of the network, as far as taking off prefixes gives them, and what to say of it."""
    kept = {name: value for name, value in tensors.items() if name != AVERAGED or name in expected}
    notes = [f"left {AVERAGED} out, a count of AveragedModel"] if len(kept) < len(tensors) else []
    fits = [(sum(name in expected for name in names), -len(taken)) for names, taken in _chains(list(kept))]
    names, taken = _chains(list(kept))[fits.index(max(fits))]
    if taken:
        notes.append(f"took {taken!r} off the names of all {len(names)} tensors")
    return dict(zip(names, kept.values(), strict=True)), notes


def _chains(names: list[str]) -> list[tuple[list[str], str]]:
    """The names as they are, and after each prefix that all share was taken off, one after another."""
    chains = [(names, "")]
    while shared := next((prefix for prefix in PREFIXES if all(map(str.startswith, names, [prefix] * len(names)))), ""):
        names = [name.removeprefix(shared) for name in names] if names else []
        if not names or len(chains) > len(PREFIXES):
            break
        chains.append((names, chains[-1][1] + shared))
    return chains


def _found(tree: Any, weights: Weights) -> tuple[Place, dict[str, Stored], tuple[str, ...]]:
    """Where in a file the weights are, what is there, and what to say of it."""
    if not isinstance(tree, dict):
        raise ValueError(f"{weights.uri} holds {_named(tree)}, not weights by name")
    holding = [key for key, value in tree.items() if isinstance(key, str) and _holds(value)]
    if weights.entry:
        place = _entered(tree, weights, holding)
    else:
        known = [name for name in ENTRIES if name in holding]
        if not known and not _holds(tree) and len(holding) != 1:
            raise ValueError(f"{weights.uri} holds {_listed(tree)}; {_choice(tree, holding)}")
        taken = known or ([] if _holds(tree) else holding)
        place = Place(tuple(taken[:1]))
    found = tree
    for key in place.keys:
        found = found[key]
    chosen = {key: value for key, value in found.items() if not place.prefix or str(key).startswith(place.prefix)}
    odd = next((key for key, value in chosen.items() if not (isinstance(key, str) and isinstance(value, Stored))), None)
    if odd is not None:
        where = f" in {'/'.join(place.keys)!r}" if place.keys else ""
        raise ValueError(
            f"{weights.uri} holds, under {str(odd)[:80]!r}{where}, {_named(found[odd])}; needed are tensors by name"
        )
    notes = [f"took the entry {'/'.join(place.keys)!r} of {len(tree)}"] if place.keys else []
    if place.prefix:
        notes.append(f"took the {len(chosen)} of {len(found)} tensors whose names begin with {place.prefix!r}")
    others = [name for name in holding if place.keys and name != place.keys[0]]
    if others and not weights.entry:
        notes.append(f"holds weights under {', '.join(others)[:120]} too; entry: {others[0][:40]} takes them")
    return place, {name.removeprefix(place.prefix): value for name, value in chosen.items()}, tuple(notes)


def _listed(tree: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, tree))[:160] or "nothing"


def _choice(tree: Mapping[Any, Any], holding: list[str]) -> str:
    """What to do about a file in which no weights are found by rule."""
    if holding:
        return f"say which by entry: one of {', '.join(holding[:12])}"
    if any(isinstance(value, dict) and value.keys() >= OPTIMISER for value in (tree, *tree.values())):
        return "that is the state of an optimiser, not the weights of a network; name the file that has these"
    return "it has no weights by name"


def _entered(tree: Mapping[str, Any], weights: Weights, holding: list[str]) -> Place:
    """What the field `entry` means: a key, several with / between, or at last how the names begin, with a dot."""
    parts = tuple(weights.entry.split("/"))
    places = [Place((weights.entry,)), Place(parts)]
    if parts[-1].endswith("."):
        within = [Place(parts[:-1], parts[-1])]
        places += within if len(parts) > 1 else [*within, *(Place((name,), parts[0]) for name in ENTRIES)]
    for place in places:
        found: Any = tree
        for key in place.keys:
            found = found.get(key) if isinstance(found, dict) else None
        if _holds(found) and any(str(name).startswith(place.prefix) for name in found):
            return place
    there = suggest(weights.entry, holding) or "; it holds weights under no entry, leave it out"
    raise ValueError(f"{weights.uri} has no weights under the entry {weights.entry!r}{there}")


def _holds(value: object) -> bool:
    """Whether a value is a mapping with tensors in it."""
    return isinstance(value, dict) and any(isinstance(part, Stored) for part in value.values())


def _named(value: object) -> str:
    """What a value is, in words."""
    if isinstance(value, Stored):
        return f"a tensor of shape {value.shape}"
    return f"a {value.name}" if isinstance(value, Thing) else f"a {type(value).__name__}"
