"""Several processes under torchrun are one process with the whole batch."""

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import distributed, nn

from robustbench_diffaug import rng
from robustbench_diffaug.train.parallel import Place, agreed, averaged, barrier, joined, wrapped
from robustbench_diffaug.train.synced import synced

SCRIPT = """
import sys
from pathlib import Path

import torch
from torch import distributed

import robustbench_diffaug.torchvision_guard
import timm
from robustbench_diffaug import rng
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.mixture import MixtureSpec
from robustbench_diffaug.train.parallel import Place, agreed, averaged, barrier, joined, wrapped
from robustbench_diffaug.train.stream import stream

NETWORKS = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2},
    "resnet10t": {"channels": [4, 4, 8, 8], "stem_width": 4},
}


def train(name, place):
    data = Mixture(spec=MixtureSpec(channels=3, size=32), size=40)
    with rng.seeded(rng.key("weights", place.rank)):  # those of process 0 count
        network = timm.create_model(name, num_classes=4, **NETWORKS[name]).train()
    forward = wrapped(network, place, "cpu")
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    curve = []
    for number, samples in enumerate(stream(data, None, 0.0, 1, 8, 1, place, None, "cpu", 0), 1):
        loss = torch.nn.functional.cross_entropy(forward(samples.images), samples.labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(averaged({"loss": loss}, place)["loss"])
        if number == 50:
            return {"curve": curve, "state": network.state_dict(), "samples": len(samples.keys)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with joined("cpu") as (place, device):
        found = {name: train(name, place) for name in NETWORKS}
        found["world"] = (place.rank, place.world, distributed.get_world_size(), device)
        found["all"] = [agreed(True, place), agreed(place.rank == 0, place), agreed(False, place)]
        one = {"a": torch.tensor(float(place.rank)), "b": torch.tensor(float("nan") if place.rank else 1.0)}
        found["means"] = averaged(one, place)
        (folder / f"here{place.rank}").touch()
        barrier(place)
        found["seen"] = len(list(folder.glob("here*")))
        torch.save(found, folder / f"{place.rank}.pt")
    assert not distributed.is_initialized()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, and what one process does."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    start = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*start, str(script), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    here = runpy.run_path(str(script))
    alone = {name: here["train"](name, Place()) for name in here["NETWORKS"]}
    return [*(torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)), alone]


def test_there_are_two_processes(runs: list[dict[str, Any]]) -> None:
    assert [run["world"] for run in runs[:2]] == [(0, 2, 2, "cpu"), (1, 2, 2, "cpu")]
    for run in runs[:2]:
        assert run["all"] == [True, False, False]
        assert run["means"]["a"] == 0.5
        assert run["means"]["b"] != run["means"]["b"]  # not finite anywhere if not finite somewhere
        assert run["seen"] == 2


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_two_processes_train_as_one(name: str, runs: list[dict[str, Any]]) -> None:
    first, second, alone = (run[name] for run in runs)
    assert (first["samples"], second["samples"], alone["samples"]) == (4, 4, 8)
    assert first["curve"] == second["curve"]
    assert first["curve"] == pytest.approx(alone["curve"], abs=1e-4)
    assert len({round(loss, 3) for loss in alone["curve"]}) > 25  # something was learnt
    assert list(first["state"]) == list(alone["state"])
    for key, value in alone["state"].items():  # running statistics among them
        assert torch.allclose(first["state"][key].double(), value.double(), atol=1e-4), key
        assert torch.equal(first["state"][key], second["state"][key]), key


def alone_in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a group of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A group of one process."""
    alone_in_a_group(monkeypatch)
    with joined("cpu") as (place, device):
        assert (place, device) == (Place(), "cpu")
        yield place


def test_a_group_is_left_after_errors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    alone_in_a_group(monkeypatch)
    with pytest.raises(KeyError), joined("cpu"):
        assert distributed.is_initialized()
        raise KeyError
    assert not distributed.is_initialized()


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    return {
        "1d": (nn.BatchNorm1d(3), (5, 3)),
        "sequences": (nn.BatchNorm1d(3), (5, 3, 4)),
        "2d": (nn.BatchNorm2d(3, eps=1e-2, momentum=0.3), (5, 3, 4, 2)),
        "3d": (nn.BatchNorm3d(3, momentum=None), (2, 3, 4, 2, 2)),
        "no weights": (nn.BatchNorm2d(3, affine=False), (5, 3, 4, 2)),
        "no statistics": (nn.BatchNorm2d(3, track_running_stats=False), (5, 3, 4, 2)),
        "activation": (BatchNormAct2d(3), (5, 3, 4, 2)),
        "double": (nn.BatchNorm2d(3).double(), (5, 3, 4, 2)),
    }


@pytest.mark.parametrize("name", layers())
def test_synced_layers_are_those_of_torch(name: str, group: Place) -> None:
    """Values, gradients and statistics over three steps, then evaluation."""
    found = []
    for change in (False, True):
        layer, shape = layers()[name]
        kind = torch.float64 if name == "double" else torch.float32
        for index, parameter in enumerate(layer.parameters()):
            parameter.data += torch.arange(3) / (index + 2)
        names = list(layer.state_dict())
        layer = synced(layer, "cpu") if change else layer
        assert list(layer.state_dict()) == names
        values = []
        for draw in range(3):
            noise = torch.from_numpy(rng.normal(rng.key("layers"), range(draw, draw + 1), shape)[0])
            images = (100 + 3 * noise.to(kind)).requires_grad_()  # far from zero: E[x^2] - E[x]^2 would lose digits
            result = layer(images)
            (result * torch.arange(result.numel()).view(shape).to(kind).sin()).sum().backward()
            assert images.grad is not None
            values += [result, images.grad, *(parameter.grad for parameter in layer.parameters())]
        values += [*layer.state_dict().values(), layer.eval()(images)]
        found.append(values)
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_half_precision_goes_through_single(group: Place) -> None:
    layer = synced(nn.BatchNorm2d(3), "cpu")
    images = torch.from_numpy(rng.normal(rng.key("half"), range(1), (64, 3, 8, 8))[0]).bfloat16()
    result = layer(images)
    assert result.dtype == torch.bfloat16
    assert torch.allclose(result, nn.BatchNorm2d(3)(images.float()).bfloat16(), atol=1e-2)


def test_on_gpus_layers_become_those_of_torch_with_their_activation() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), BatchNormAct2d(3), nn.BatchNorm2d(3)).eval()
    images = torch.from_numpy(rng.normal(rng.key("gpu"), range(2), (1, 6, 6)))
    before, names, weights = network(images), list(network.state_dict()), list(network.parameters())
    changed = synced(network, "cuda")
    assert sum(isinstance(layer, nn.SyncBatchNorm) for layer in changed.modules()) == 2
    assert torch.allclose(changed(images), before)
    assert list(changed.state_dict()) == names
    assert all(one is other for one, other in zip(changed.parameters(), weights, strict=True))


def test_unknown_kinds_of_batchnorm_are_refused() -> None:
    with pytest.raises(ValueError, match="SplitBatchNorm2d cannot be synchronised"):
        synced(nn.Sequential(SplitBatchNorm2d(4)), "cpu")  # type: ignore[no-untyped-call]


def test_alone_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")  # of no meaning by itself
    with joined("cuda:3") as found:
        assert found == (Place(), "cuda:3")
    network = nn.BatchNorm2d(3)
    assert wrapped(network, Place(), "cpu") is network
    assert averaged({"b": torch.tensor(2.0), "a": torch.tensor(0.5)}, Place()) == {"b": 2.0, "a": 0.5}
    assert averaged({}, Place()) == {}
    assert (agreed(True, Place()), agreed(False, Place())) == (True, False)
    barrier(Place())


@pytest.mark.parametrize(
    ("told", "device", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "cpu", "RANK, WORLD_SIZE is set and LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "cpu", "LOCAL_RANK is set and RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "cpu", "MASTER_ADDR, MASTER_PORT is not"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "cpu", "whole"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "cpu", "RANK <"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "cpu", "RANK <"),
        (
            {"RANK": "98", "WORLD_SIZE": "99", "LOCAL_RANK": "98", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "cuda",
            "process 98 of this machine has no GPU",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
            "cpu",
            "the 1 processes do not meet at 127.0.0.1:x",
        ),
    ],
)
def test_a_wrong_environment_is_refused(
    told: dict[str, str], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as caught, joined(device):
        pass
    assert "\n" not in str(caught.value)
