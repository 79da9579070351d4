"""Weights of the files that people have: torch's own loader and the numbers put in are the oracles."""

from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from robustbench_diffaug.files import Weights
from robustbench_diffaug.notes import noting
from robustbench_diffaug.pickles import ALLOWED
from robustbench_diffaug.state import PREFIXES, State, fit_state, load_state, read_state, shapes


def network() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 2, 3), bn=nn.BatchNorm2d(2), fc=nn.Linear(8, 4)))


def weights(seed: float = 0.5, prefix: str = "") -> dict[str, torch.Tensor]:
    state = network().state_dict()
    return {f"{prefix}{name}": torch.full_like(value, seed) for name, value in state.items()}


def loaded(path: Path, **more: str) -> tuple[float, list[str]]:
    """The number that all weights of a file have, and what was told."""
    target = network()
    with noting() as notes:
        load_state(target, Weights(uri=str(path), **more))
    values = torch.cat([value.detach().flatten() for value in target.parameters()])
    assert float(values.min()) == float(values.max())
    return float(values[0]), [note.removeprefix(f"{path}: ") for note in notes]


def refused(path: Path, target: nn.Module | None = None, **more: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_state(target or network(), Weights(uri=str(path), **more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_name_is_allowed_that_torch_refuses() -> None:
    assert set(torch._weights_only_unpickler._get_allowed_globals()) >= ALLOWED


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_all_forms_give_the_same_numbers(form: str, tmp_path: Path) -> None:
    state = {name: torch.arange(float(value.numel())).reshape(value.shape) for name, value in weights().items()}
    state["conv.weight"] = state["conv.weight"].transpose(2, 3)  # a view with strides of its own
    state["bn.num_batches_tracked"] = torch.tensor(3)
    path = tmp_path / "weights"
    if form == "safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    found = read_state(Weights(uri=str(path))).tensors
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert shapes(Weights(uri=str(path))) == {name: tuple(value.shape) for name, value in state.items()}


PLACES: dict[str, tuple[dict[str, Any], float, list[str]]] = {
    "plain": (weights(), 0.5, []),
    "DiffAug's ResNet-50": (
        {
            "state_dict": weights(0.25, "module."),
            "epoch": 90,
            "arch": "resnet50",
        },
        0.25,
        ["took the entry 'state_dict' of 3", "took 'module.' off the names of all 9 tensors"],
    ),
    "AugMix's, with a text as model": (
        {
            "epoch": 90,
            "model": "resnet50",
            "state_dict": weights(0.25, "module."),
            "best_acc1": torch.tensor(75.0),
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        },
        0.25,
        ["took the entry 'state_dict' of 5", "took 'module.' off the names of all 9 tensors"],
    ),
    "DeiT, as released": ({"model": weights()}, 0.5, ["took the entry 'model' of 1"]),
    "DeiT": (
        {"model": weights(), "model_ema": weights(0.75), "scaler": {"scale": 65536.0}},
        0.5,
        ["took the entry 'model' of 3", "holds weights under model_ema too; entry: model_ema takes them"],
    ),
    "Lightning": (
        {"state_dict": weights(0.5, "model."), "hyper_parameters": {"lr": 0.1}, "callbacks": {}},
        0.5,
        ["took the entry 'state_dict' of 3", "took 'model.' off the names of all 9 tensors"],
    ),
    "compiled, in parallel": (
        weights(0.5, "module._orig_mod."),
        0.5,
        ["took 'module._orig_mod.' off the names of all 9 tensors"],
    ),
    "averaged": (
        {"n_averaged": torch.tensor(7), **weights(0.5, "module.")},
        0.5,
        ["left n_averaged out, a count of AveragedModel", "took 'module.' off the names of all 9 tensors"],
    ),
    "ours": (
        {"average": weights(), "network": weights(0.75)},
        0.5,
        ["took the entry 'average' of 2", "holds weights under network too; entry: network takes them"],
    ),
    "one of an unknown name": ({"student": weights(), "epoch": 1}, 0.5, ["took the entry 'student' of 2"]),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_the_weights_are(name: str, tmp_path: Path) -> None:
    content, number, told = PLACES[name]
    torch.save(content, tmp_path / "w.pth")
    assert loaded(tmp_path / "w.pth") == (number, told)


def test_an_entry_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": weights(), "more": {"ema": weights(0.75)}, "a": weights(), "b": weights()}, path)
    assert loaded(path, entry="more/ema") == (0.75, ["took the entry 'more/ema' of 4"])
    assert "no weights under the entry 'modle'; did you mean model?" in refused(path, entry="modle")
    torch.save({"a": weights(), "b": weights()}, path)
    assert "say which by entry: one of a, b" in refused(path)
    bare = Weights.model_validate(str(path))
    assert bare == Weights(uri=str(path)) and bare.identity() == {"contents": bare.contents()}
    assert Weights(uri=str(path), entry="a").identity() == {"entry": "a", "contents": bare.contents()}


def test_networks_beside_each_other_are_told_apart_by_how_names_begin(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    names = weights(0.25, "student.") | weights(0.75, "teacher.") | {"criterion.weight": torch.ones(4)}
    told = r"those that begin with student. fit: say so by entry: student."
    for content, entry in ((names, "teacher."), ({"state_dict": names}, "state_dict/teacher.")):
        torch.save(content, path)
        assert refused(path).endswith(told)
        for words in (entry, "teacher."):
            number, notes = loaded(path, entry=words)
            assert number == 0.75
            assert notes[-1] == "took the 9 of 19 tensors whose names begin with 'teacher.'"
        assert shapes(Weights(uri=str(path), entry=entry))["fc.weight"] == (4, 8)
        assert "no weights under the entry 'taecher.'" in refused(path, entry="taecher.")
    save_file(names, path)
    assert loaded(path, entry="teacher.")[0] == 0.75


@pytest.mark.parametrize("place", [(), ("optimizer",), ("optimizer_state_dict",)])
def test_the_state_of_an_optimiser_is_told(place: tuple[str, ...], tmp_path: Path) -> None:
    target = network()
    optimiser = torch.optim.Adam(target.parameters())
    torch.cat([value.flatten() for value in target.parameters()]).sum().backward()
    optimiser.step()
    content: dict[str, Any] = optimiser.state_dict()
    torch.save({place[0]: content, "epoch": 3} if place else content, tmp_path / "w.pth")
    assert "that is the state of an optimiser, not the weights of a network" in refused(tmp_path / "w.pth")


@given(st.lists(st.sampled_from(PREFIXES), max_size=5, unique=True))
@settings(max_examples=20, deadline=None)
def test_any_chain_of_prefixes_is_taken_off(chain: list[str]) -> None:
    target = network()
    fit_state(target, State(weights(0.5, "".join(chain))), "file")
    assert all(bool((value == 0.5).all()) for value in target.parameters())


def test_a_prefix_that_the_network_has_stays() -> None:
    target = nn.ModuleDict({"model": nn.Linear(2, 2)})
    with noting() as notes:
        fit_state(target, State({"model.weight": torch.ones(2, 2), "model.bias": torch.ones(2)}), "file")
    assert notes == []
    partly = State({"module.weight": torch.ones(2, 2), "bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"file does not fit the network: missing weight; unexpected module.weight$"):
        fit_state(nn.Linear(2, 2), partly, "file")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"

    def message(**changed: torch.Tensor) -> str:
        torch.save(weights() | {name.replace("_", ".", 1): value for name, value in changed.items()}, path)
        return refused(path).removeprefix(f"{path} does not fit the network: ")

    written = "fc.weight is (9, 8), not (4, 8): the file has 9 classes, write classes: 9"
    assert message(fc_weight=torch.ones(9, 8)) == written
    assert message(conv_weight=torch.ones(2, 1, 3, 3)).endswith(
        "not (2, 3, 3, 3): the file is for images of other channels, write channels: 1"
    )
    assert message(conv_weight=torch.ones(2, 9, 3, 3)).endswith("conv.weight is (2, 9, 3, 3), not (2, 3, 3, 3)")
    torch.save({f"other.{name}": value for name, value in weights().items()}, path)
    assert refused(path, nn.Linear(2, 2)).endswith(
        "missing bias; missing weight; unexpected other.bn.bias; unexpected other.bn.num_batches_tracked and 7 more; "
        "is it of another architecture?"
    )
    assert message(fc_bias=torch.tensor([1, torch.nan, 0, 0])).startswith("fc.bias holds numbers that are not finite")
    assert message(fc_bias=torch.ones(4).double() * 1e300).startswith("fc.bias holds numbers that are not finite")
    assert message(fc_bias=torch.ones(4, dtype=torch.int32)) == "fc.bias is of int32, not of float32"
    assert message(fc_bias=torch.ones(4, dtype=torch.complex64)) == "fc.bias is of complex64, not of float32"
    assert message(a=torch.ones(1), b=torch.ones(1), c=torch.ones(1), d=torch.ones(1)).endswith("and 1 more")


def test_what_is_repaired_is_told(tmp_path: Path) -> None:
    state = weights()
    del state["bn.num_batches_tracked"]
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "w.pth")
    number, told = loaded(tmp_path / "w.pth")
    assert number == 0.5
    assert "lacks 1 buffers num_batches_tracked, which evaluation does not use" in told
    assert "converted float16 to the network's precision" in told


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": weights(), "args": Namespace(a=1)}, ["needs argparse.Namespace", "['model'], 'plain.pth')"]),
        ({"state_dict": weights(), "best": np.float64(0.5)}, ["scalar", "['state_dict'], 'plain.pth')"]),
        (network(), ["needs torch.nn.modules.container.Sequential", "weights_only=False).state_dict(), 'plain.pth')"]),
        ({"model": network()}, ["['model'].state_dict(), 'plain.pth')"]),
    ],
    ids=["arguments", "numpy", "module", "module in an entry"],
)
def test_pickles_that_need_code_say_how_to_convert_them(content: object, words: list[str], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    text = refused(tmp_path / "w.pth")
    assert all(word in text for word in words), text
    exec(
        text.partition("alone: ")[2]
        .replace("'w.pth'", repr(str(tmp_path / "w.pth")))
        .replace("'plain.pth'", repr(str(tmp_path / "plain.pth"))),
        {},
    )
    load_state(network(), Weights(uri=str(tmp_path / "plain.pth")))


def test_newer_protocols_are_named(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "w.pth", pickle_protocol=4)
    assert "was saved with pickle protocol 4" in refused(tmp_path / "w.pth")
