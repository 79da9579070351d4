"""A small run of certificates, for tests of what is made of a run folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from robustbench_diffaug import runs
from robustbench_diffaug.data.synthetic import Mixture
from robustbench_diffaug.suite import load

__all__ = ["certified"]


def certified(folder: Path, size: int, other: str = "tilted", radii: Sequence[float] = (0, 0.1)) -> Path:
    """Writes a suite, `small.yaml`, and its images, and runs it in `run`, which is returned.

    Arguments:
        folder: Where.
        size: The number of images.
        other: The id of the second checkpoint; the first is 'bayes'.
        radii: Of the certificates.
    """
    images, labels = Mixture(size=size).opened().read(range(size))
    np.savez(folder / "a.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    network = {"kind": "mixture", "classes": 4, "temperature": 0.0016}
    suite = {
        "name": "small",
        "checkpoints": [network | {"id": "bayes"}, network | {"id": other, "tilt": 120}],
        "benches": [
            {
                "name": "certify",
                "evaluator": {"kind": "smoothing", "sigmas": [0.25, 0.5], "n0": 8, "n": 40, "radii": list(radii)},
                "datasets": [{"kind": "arrays", "name": "a", "file": "a.npz"}],
            },
        ],
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    done = runs.execute(load(str(folder / "small.yaml")), runs.Options(folder / "run"))
    assert not done.failures
    return done.root
