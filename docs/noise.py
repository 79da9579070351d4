"""Writes docs/noise-results.md from a run of suites/analyses.yaml: entropy against t, and accuracy against noise.

Run `rdiff run analyses -o reports/analyses`, then `python docs/noise.py reports/analyses`.

reports/published/diffaug-figure2.yaml holds Figure 2 of "DiffAug: A Diffuse-and-Denoise Augmentation for Training Robust Classifiers"
(Sastry, Dumpala and Oore, NeurIPS 2024), https://arxiv.org/abs/2306.09192, mean entropy in nats on the ImageNet test
images: read off the vector paths of the figure on the authors' poster, to about 0.01; columns under the names that their
counterparts have in the zoo.
"""

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pandas as pd
from written import interval, table

from robustbench_diffaug.diffusion.base import Schedule
from robustbench_diffaug.paired import mcnemar
from robustbench_diffaug.report import published as publications

HERE = Path(__file__).parent
SHOWN = (0, 100, 200, 300, 400, 450, 500, 550, 600, 700, 800, 900, 950)
EARLY, LATE = 450, 500


class Bench:
    """The figures of one bench, by checkpoint and metric."""

    def __init__(self, metrics: pd.DataFrame, name: str) -> None:
        self.rows = metrics[metrics["bench"] == name].set_index(["checkpoint", "metric"])
        self.networks = list(dict.fromkeys(self.rows.index.get_level_values("checkpoint")))

    def cell(self, network: str, metric: str, scale: float = 1, digits: int = 2) -> str:
        """A figure with its interval."""
        return interval(*self.rows.loc[(network, metric), ["value", "low", "high"]], scale, digits)

    def value(self, network: str, metric: str) -> float:
        """A figure."""
        return float(self.rows.loc[(network, metric), "value"])


def crossings(times: Sequence[int], differences: Sequence[float]) -> str:
    """Between which times a difference changes its sign from at most 0 to above."""
    found = [f"{a}-{b}" for (a, x), (b, y) in pairwise(zip(times, differences, strict=True)) if x <= 0 < y]
    return ", ".join(found) or "nowhere"


def entropies(bench: Bench, bases: dict[str, str], published: pd.DataFrame) -> list[str]:
    """Entropy against t, and what DiffAug changes in it, beside the published curves."""
    heads = ["t", *bench.networks]
    rows = [[str(t), *(f"{bench.value(n, f'entropy@t={t}'):.2f}" for n in bench.networks)] for t in SHOWN]
    parts = ["### Entropy, nats\n", table(heads, rows) + "\n"]
    rows = []
    for network, base in bases.items():
        times = [t for t in range(0, 951, 50) if (network, f"gain/entropy@t={t}") in bench.rows.index]
        found = [bench.value(network, f"gain/entropy@t={t}") for t in times]
        paper = [""] * 2
        if network in published.columns:
            gap = published[network] - published[base]
            paper = [f"{gap[gap.index <= EARLY].mean():+.2f}, {gap[gap.index >= LATE].mean():+.2f}", "450-500"]
        rows.append(
            [
                f"{network} - {base}",
                bench.cell(network, "gain/entropy/early", digits=3),
                bench.cell(network, "gain/entropy/late", digits=3),
                crossings(times, found),
                f"{bench.value(network, 'entropy@t=950'):.2f} - {bench.value(base, 'entropy@t=950'):.2f}",
                *paper,
            ]
        )
    heads = ["difference", f"t <= {EARLY}", f"t >= {LATE}", "from below to above", "t = 950", "paper: early, late"]
    parts += [
        "### Differences in entropy, paired by image\n",
        table([*heads, "paper: from below to above"], rows) + "\n",
    ]
    rows = [[str(t), *(f"{published.loc[t, name]:.2f}" for name in published.columns)] for t in published.index]
    parts += ["### The paper's Figure 2 (ImageNet; ln 1000 = 6.91)\n", table(["t", *published.columns], rows) + "\n"]
    return parts


def accuracies(bench: Bench) -> list[str]:
    """Accuracy against the noise scale, Figure 19."""
    levels = Schedule().sigmas()  # the zoo's denoiser has the linear one
    rows = [
        [str(t), f"{levels[t]:.3g}", *(bench.cell(n, f"noisy/accuracy@t={t}", 100, 1) for n in bench.networks)]
        for t in range(0, 951, 50)
    ]
    return ["### Accuracy on noisy images, percent\n", table(["t", "sigma", *bench.networks], rows) + "\n"]


def at_random(bench: Bench, bases: dict[str, str], hits: dict[str, pd.Series]) -> list[str]:
    """Table 4: one uniformly random time of each image."""
    rows = [[n, bench.cell(n, "noisy/random-time/accuracy/clean", 100, 1)] for n in bench.networks]
    parts = ["### Accuracy at one random time of each image, percent\n", table(["network", "accuracy"], rows) + "\n"]
    rows = []
    for network, base in bases.items():
        one, other = hits[network].align(hits[base], join="inner")
        gain = bench.cell(network, "noisy/gain/random-time/clean", 100, 1)
        rows.append([f"{network} - {base}", gain, f"{mcnemar(one.to_numpy(), other.to_numpy()):.2g}"])
    return [*parts, table(["difference", "points, paired by image", "McNemar's p"], rows) + "\n"]


def hits_of(run: Path, network: str) -> pd.Series:
    """Whether a network was right at the random time of each image, by the image."""
    files = sorted((run / "records" / "noise" / network).glob("**/*.parquet"))
    rows = pd.concat([pd.read_parquet(path, columns=["sample", "label", "random_pred"]) for path in files])
    rows = rows.set_index("sample")
    return rows["label"] == rows["random_pred"]


def main(run: Path) -> None:
    metrics = pd.read_csv(run / "metrics.csv")
    manifest = json.loads((run / "manifest.json").read_text())
    published = publications.table("diffaug-figure2").T.rename(index=int)
    entropy, noise = (Bench(metrics, name) for name in ("entropy", "noise"))
    gains = {entry["name"]: dict(entry["evaluator"].get("gains", ())) for entry in manifest["benches"]}
    counts = {entry["bench"]: entry["n"] for entry in manifest["datasets"]}
    hits = {network: hits_of(run, network) for network in noise.networks}
    parts = [
        "# Entropy against t, and accuracy against noise\n",
        f"Made by `docs/noise.py` of the benches `entropy` and `noise` of suite `analyses`; suite digest {manifest['suite']['digest']}, seed "
        f"{manifest['suite']['seed']}, torch {manifest['versions']['torch']}, {manifest['device']}. Test images of MNIST, "
        f"{counts['entropy']} and {counts['noise']}; 95 % intervals over images. [noise.md](noise.md) says what the "
        "figures are.\n",
        "## Denoised images, and Figure 2\n",
        *entropies(entropy, gains["entropy"], published),
        "## Noisy images, Figure 19 and Table 4\n",
        *accuracies(noise),
        *at_random(noise, gains["noise"], hits),
    ]
    reading = HERE / "noise-reading.md"
    parts += [reading.read_text()] if reading.exists() else []
    (HERE / "noise-results.md").write_text("\n".join(parts).rstrip() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
