"""Kind edm against the exact denoiser in EDM's own units, and what it does with wrong functions and weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from robustbench_diffaug import rng, testing
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.component import trusting
from robustbench_diffaug.diffusion.base import Denoiser
from robustbench_diffaug.diffusion.edm import Edm

CODE = """
import torch

class Preconditioned(torch.nn.Module):
    '''EDM's preconditioning for data of mean 0 around a linear network F.'''

    def __init__(self, sigma_data):
        super().__init__()
        self.sigma_data = sigma_data
        self.scale = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, sigma):
        s2, d2 = sigma.square()[:, None, None, None], self.sigma_data**2
        skip, out, inner = d2 / (s2 + d2), s2.sqrt() * self.sigma_data / (s2 + d2).sqrt(), 1 / (s2 + d2).sqrt()
        return skip * x + out * self.scale * (inner * x)

def build(sigma_data=0.5):
    return Preconditioned(sigma_data)

def flat():
    return torch.nn.Sequential(Take(), torch.nn.Flatten())

class Take(torch.nn.Module):
    def forward(self, x, sigma):
        return x.flatten(1)

class Pair(torch.nn.Module):
    def forward(self, x, sigma):
        return x, sigma

def pair():
    return Pair()

def take():
    return Take()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "edm.py"
    path.write_text(CODE)
    return path


def entry(folder: Path, **fields: object) -> Edm:
    return Edm.model_validate({"arch": "edm.py:build", "microbatch": 5} | fields, context={"folder": folder})


def test_conforms(file: Path) -> None:
    testing.check_denoiser(entry(file.parent), (1, 8, 8))
    testing.check_denoiser(entry(file.parent, precision="float64"), (3, 8, 8))


def test_it_is_the_wiener_filter_in_units_of_images(file: Path) -> None:
    """With F = 0 the estimate of N(1/2, (d/2)^2) pixels under noise is `1/2 + v / (v + sigma^2) (x - 1/2)`."""
    noisy = torch.from_numpy(rng.normal(rng.key("noisy"), range(4), (1, 8, 8))).double()
    levels = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    for data in (0.5, 2.0):
        made = entry(file.parent, args={"sigma_data": data}, clip=False, precision="float64")
        v, s2 = (data / 2) ** 2, levels.square()[:, None, None, None]
        expected = 0.5 + v / (v + s2) * (noisy - 0.5)
        assert torch.allclose(made.loaded(Limits())(noisy, levels).mean, expected, atol=1e-12)


def test_weights_are_loaded_and_part_of_the_identity(file: Path) -> None:
    save_file({"scale": torch.tensor([0.25])}, file.parent / "w.safetensors")
    plain, made = entry(file.parent), entry(file.parent, weights="w.safetensors")
    noisy = torch.from_numpy(rng.uniform(rng.key("noisy"), range(4), (1, 8, 8))).float()
    z, s, d = 2 * noisy - 1, 2 * 0.5, 0.5
    signed = d**2 / (s**2 + d**2) * z + s * d / (s**2 + d**2) ** 0.5 * 0.25 * z / (s**2 + d**2) ** 0.5
    found = made.loaded(Limits())(noisy, 0.5).mean
    assert torch.allclose(found, ((signed + 1) / 2).clamp(0, 1), atol=1e-6)
    before = made.fingerprint
    assert before != plain.fingerprint
    save_file({"scale": torch.tensor([0.5])}, file.parent / "w.safetensors")
    assert made.fingerprint != before
    again = made.fingerprint
    file.write_text(CODE + "# another\n")
    assert made.fingerprint != again
    assert str(file.parent) not in str(made.identity())


def test_what_does_not_fit_is_one_line(file: Path) -> None:
    noisy = torch.zeros(2, 1, 8, 8)
    for name, said in (("take", r"returns \(5, 64\) for \(5, 1, 8, 8\)"), ("pair", r"returns tuple for")):
        denoise = entry(file.parent, arch=f"edm.py:{name}").loaded(Limits())
        with pytest.raises(ValueError, match=f"the network of .*edm.py:{name} {said}.*, not the image"):
            denoise(noisy, 0.5)
    for state, said in (
        ({}, "holds nothing; it has no weights by name"),
        ({"skale": torch.zeros(1)}, "does not fit the network: missing scale; unexpected skale"),
        ({"scale": torch.zeros(2)}, r"does not fit the network: scale is \(2,\), not \(1,\)"),
        (
            {"scale": torch.full((1,), float("nan"))},
            "does not fit the network: scale holds numbers that are not finite",
        ),
    ):
        save_file(state, file.parent / "bad.safetensors")
        with pytest.raises(ValueError, match=said):
            entry(file.parent, weights="bad.safetensors").load(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"there is no .*none.safetensors"):
        entry(file.parent, weights="none.safetensors").check()
    with pytest.raises(ValueError, match=r"there is no .*none.py"):
        entry(file.parent, arch="none.py:build").check()


def test_it_needs_trust(file: Path, rdiff: Callable[..., tuple[int, str, str]]) -> None:
    data = {"kind": "edm", "arch": "edm.py:build"}
    with pytest.raises(ValueError, match="kind edm runs code that this file names; if you trust it, add --trust"):
        Denoiser.model_validate(data, context={"folder": file.parent})
    with trusting(True):
        assert Denoiser.model_validate(data, context={"folder": file.parent}).kind == "edm"
    Path("mine.yaml").write_text("kind: denoiser\nid: mine\ndenoiser: {kind: edm, arch: 'edm.py:build'}")
    assert rdiff("check", "mine.yaml")[0] == 2
    code, out, err = rdiff("check", "mine.yaml", "--trust")
    assert (code, err) == (0, "") and "root mean square" in out
