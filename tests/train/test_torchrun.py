"""`rdiff train` in two processes of torchrun: the same curve and weights as in one, and one line when it fails."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

Make = Callable[..., Any]
VIT = {
    "arch": "vit_tiny_patch16_224",
    "args": {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
}


def rdiff(recipe: Any, folder: Path, processes: int) -> subprocess.CompletedProcess[str]:
    path = folder / f"{recipe.name}.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", serialize_as_any=True)))
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    words = [*start, "robustbench_diffaug", "train", str(path), "-o", str(folder / f"in {processes}")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)


def test_two_processes_give_the_curve_of_one(classifier: Make, tmp_path: Path) -> None:
    """A ViT with the DiffAug and AugMix terms, 50 steps."""
    recipe = classifier(**VIT, steps=50, diffaug={"denoiser": {"kind": "mixture"}}, augmix={}, save_every=25)
    found = {}
    for processes in (1, 2):
        done = rdiff(recipe, tmp_path, processes)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / f"in {processes}"
        rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
        found[processes] = (rows, load_file(folder / "tiny.safetensors"), done)
    (one, weights, _), (two, others, said) = found[1], found[2]
    assert [row["step"] for row in two] == ["50"]
    for name, value in one[0].items():
        assert float(two[0][name]) == pytest.approx(float(value), abs=1e-4), name
    for key, tensor in weights.items():
        assert float((tensor - others[key]).abs().max()) < 1e-3, key
    assert said.stdout.splitlines()[0] == f"weights  {tmp_path / 'in 2'}"  # said once
    assert said.stdout.count("entry") == 1
    assert "in 2 processes" in said.stderr
    assert (tmp_path / "in 2/tiny.card.yaml").read_text() != ""


def test_a_batch_that_cannot_be_shared_is_one_line(classifier: Make, tmp_path: Path) -> None:
    done = rdiff(classifier(batch=9, accumulate=1), tmp_path, 2)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("rdiff:")]
    assert said
    assert "batch of 9" in said[0]
    assert not (tmp_path / "in 2/state.pt").exists()
