"""Starting from other weights: ours, published ones, and files that should not be trusted."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from robustbench_diffaug.files import sha256
from robustbench_diffaug.train.loop import train
from robustbench_diffaug.train.networks import network_of
from robustbench_diffaug.train.optimiser import Optimiser, build_optimiser
from robustbench_diffaug.train.start import Start, begin

Make = Callable[..., Any]


def first_loss(recipe: Any, folder: Path, name: str) -> float:
    return next(iter(train(recipe, folder / name))).losses["clean"]


def test_a_run_starts_from_weights_alone_or_with_the_optimiser_s_state(classifier: Make, tmp_path: Path) -> None:
    *_, last = train(classifier(ema=0.0), tmp_path / "state.pt")
    save_file(
        {name: value.contiguous() for name, value in last.kept.state_dict().items()}, tmp_path / "weights.safetensors"
    )
    scratch = first_loss(classifier(), tmp_path, "scratch.pt")
    by_file = {
        name: first_loss(classifier(start={"uri": str(tmp_path / name)}), tmp_path, f"from {name}.pt")
        for name in ("state.pt", "weights.safetensors")
    }
    assert by_file["state.pt"] == by_file["weights.safetensors"] != scratch
    resumed, fresh = (network_of(classifier()) for _ in range(2))
    settings = Optimiser(lr=0.25)
    one, other = build_optimiser(settings, resumed), build_optimiser(settings, fresh)
    begin(Start(uri=str(tmp_path / "state.pt"), optimiser=True), resumed, one)
    begin(Start(uri=str(tmp_path / "state.pt")), fresh, other)
    assert len(one.state) == len(list(resumed.parameters()))
    assert not other.state
    assert {group["lr"] for group in one.param_groups} == {0.25}  # the recipe's, not the file's


def test_a_start_is_part_of_the_digest_by_its_content_not_its_place(classifier: Make, tmp_path: Path) -> None:
    network = network_of(classifier())
    for name in ("a", "b"):
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    a, b = (classifier(start={"uri": str(tmp_path / f"{name}.safetensors")}).digest for name in ("a", "b"))
    assert a == b != classifier().digest


@pytest.mark.parametrize("keys", [("state_dict", "optimizer"), ("model", "optimizer")])
def test_published_forms(keys: tuple[str, str], classifier: Make, tmp_path: Path) -> None:
    """AugMix's and DeepAugment's files hold `state_dict` with `module.` before each name, DeiT's `model`."""
    network = network_of(classifier(seed=5))
    settings = Optimiser(name="momentum", lr=0.1, decay_vectors=True)
    optimiser = build_optimiser(settings, network)
    sum(parameter.sum() for parameter in network.parameters()).backward()  # type: ignore[union-attr]
    optimiser.step()
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    torch.save({keys[0]: state, keys[1]: optimiser.state_dict(), "epoch": 90}, tmp_path / "checkpoint.pth.tar")
    fresh = network_of(classifier())
    again = build_optimiser(settings, fresh)
    begin(Start(uri=str(tmp_path / "checkpoint.pth.tar"), optimiser=True), fresh, again)
    for one, other in zip(network.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(optimiser.state[one]["momentum_buffer"], again.state[other]["momentum_buffer"])


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_bad_files_are_one_line(classifier: Make, tmp_path: Path) -> None:
    def message(path: Path, **more: Any) -> str:
        network = network_of(classifier())
        with pytest.raises(ValueError) as caught:
            begin(Start(uri=str(path), **more), network, build_optimiser(Optimiser(), network))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    good = tmp_path / "good.safetensors"
    save_file(network_of(classifier()).state_dict(), good)
    assert "there is no" in message(tmp_path / "none.safetensors")
    assert "another or a damaged file" in message(good, sha256="0" * 64)
    assert sha256(good) in message(good, sha256="0" * 64)
    assert "holds no state of an optimiser" in message(good, optimiser=True)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:5000])
    assert "is cut off" in message(cut)
    (tmp_path / "page.pt").write_text("<html>404</html>")
    assert "is an HTML page" in message(tmp_path / "page.pt")
    with (tmp_path / "hostile.pt").open("wb") as file:
        pickle.dump({"state_dict": Hostile(tmp_path / "ran")}, file)
    assert "which is code that would run" in message(tmp_path / "hostile.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list" in message(tmp_path / "list.pt")
    other = {name: value for name, value in network_of(classifier(classes=4)).state_dict().items() if "fc" not in name}
    torch.save(other, tmp_path / "part.pt")
    assert "does not fit the network: missing fc.bias; missing fc.weight" in message(tmp_path / "part.pt")
    small = network_of(classifier()).state_dict() | {"fc.weight": torch.zeros(2, 3)}
    torch.save(small, tmp_path / "small.pt")
    assert "fc.weight is (2, 3), not (4," in message(tmp_path / "small.pt")
    assert not (tmp_path / "ran").exists()
