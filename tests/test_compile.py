"""Compiled networks: only where it is asked, all of them, and the run says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robustbench_diffaug import rng, runs
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints import base as checkpoints
from robustbench_diffaug.diffusion import base as denoisers
from robustbench_diffaug.diffusion.base import Denoiser, Posterior, Sigma
from robustbench_diffaug.diffusion.gaussian import MixtureDenoiser
from robustbench_diffaug.suite import load

SUITE = """
name: small
checkpoints:
  - kind: timm
    id: net
    arch: resnet10t
    args: {channels: [16, 32, 64, 128]}
    classes: 10
    channels: 1
    microbatch: 4
    weights: {uri: "rdiff:zoo/resnet-standard.safetensors"}
benches:
  - name: certify
    evaluator:
      kind: smoothing
      denoiser: {kind: unet, folder: "rdiff:zoo/mnist5k-ddpm", microbatch: 4}
      sigmas: [0.25]
      n0: 2
      n: 10
    datasets: [{kind: mnist5k, limit: 1}]
"""
IMAGES = torch.from_numpy(rng.normal(rng.key("compile"), range(3), (1, 32, 32))) / 4 + 0.5


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the modules that were compiled, and of those that were then called, with a star."""
    names: list[str] = []

    def compile_(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        name = type(function.__self__).__name__  # type: ignore[attr-defined]
        assert options == {"dynamic": False}
        names.append(name)

        def call(*inputs: Any, **more: Any) -> Any:
            names.append(f"{name}*")
            assert len(inputs[0]) == 4  # always the one shape
            return function(*inputs, **more)

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    for family in (checkpoints, denoisers):
        family._loaded.cache_clear()
    return names


def test_all_networks_are_compiled_where_it_is_asked(tmp_path: Path, compiled: list[str]) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE)
    suite = load(str(path)).suite
    (net,), (denoiser,) = suite.checkpoints, suite.benches[0].evaluator.denoisers()
    plain = net.loaded(Limits()).logits(IMAGES), denoiser.loaded(Limits())(IMAGES, 0.25).mean
    assert not compiled
    limits = Limits(compile=True)
    found = net.loaded(limits).logits(IMAGES), denoiser.loaded(limits)(IMAGES, 0.25).mean
    assert compiled == ["ResNet", "ResNet*", "UNet2DModel", "UNet2DModel*"]
    assert torch.equal(plain[0], found[0])
    assert torch.equal(plain[1], found[1])
    assert net.loaded(limits) is net.loaded(limits) is not net.loaded(Limits())


class Held:
    """A loaded denoiser that is an object, not a function."""

    def __init__(self) -> None:
        self.network = torch.nn.Identity()

    def __call__(self, noisy: torch.Tensor, sigma: Sigma) -> Posterior:
        return Posterior(self.network(noisy))


class Object(MixtureDenoiser):
    """A denoiser that loads such an object."""

    microbatch: int = 3

    def load(self, device: torch.device) -> Held:
        return Held()


def test_denoisers_that_are_objects_or_have_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: seen.append(module))
    held = Object().loaded(Limits(compile=True))
    assert isinstance(held, Held)
    assert seen == [held.network]
    exact: Denoiser = MixtureDenoiser()
    noisy = IMAGES[:, :, :8, :8]
    assert torch.equal(exact.loaded(Limits(compile=True))(noisy, 0.2).mean, exact.loaded(Limits())(noisy, 0.2).mean)
    assert len(seen) == 1


def test_a_run_says_whether_networks_were_compiled(tmp_path: Path, compiled: list[str]) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE)
    records = []
    for asked in (False, True):
        root = tmp_path / f"run {asked}"
        assert not runs.execute(load(str(path)), runs.Options(root, compile=asked)).failures
        (cost,), (record,) = (root / "records").rglob("*.json"), (root / "records").rglob("*.parquet")
        found = json.loads(cost.read_bytes())
        assert (found["compile"], found["noise"]) == (asked, "host")
        assert json.loads((root / "manifest.json").read_bytes())["compile"] is asked
        assert ("UNet2DModel*" in compiled) is ("ResNet*" in compiled) is asked
        records.append((record.relative_to(root), record.read_bytes()))
    assert records[0] == records[1]  # not of another identity
