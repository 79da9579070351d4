"""Writes docs/gradients-results.md from a run of suites/analyses.yaml: gradients, steps along them, Jacobian, generation.

Run `rdiff run analyses -o reports/analyses`, then `python docs/gradients.py reports/analyses`.
"""

import json
import sys
from pathlib import Path

import pandas as pd
from written import interval, table

HERE = Path(__file__).parent
FIGURES = {  # of gradients, with the digits that their intervals justify
    "gradient_norm": 2,
    "jacobian_norm": 1,
    "pag_cosine": 3,
    "pag_class_cosine": 3,
    "gradient_sparsity": 3,
    "gradient_variation": 2,
}
THROUGH = {"": "at x_t", "denoised/": "at D(x_t)", "chain/": "through D"}
MADE = ("frechet", "precision", "recall", "density", "coverage", "score", "agreement")


class Bench:
    """The figures of one bench, by checkpoint and metric."""

    def __init__(self, metrics: pd.DataFrame, name: str) -> None:
        self.rows = metrics[metrics["bench"] == name].set_index(["checkpoint", "metric"])
        self.networks = list(dict.fromkeys(self.rows.index.get_level_values("checkpoint")))

    def cell(self, network: str, metric: str, digits: int = 2, scale: float = 1) -> str:
        """A figure with its interval, a dash where there is none."""
        if (network, metric) not in self.rows.index:
            return "-"
        return interval(*self.rows.loc[(network, metric), ["value", "low", "high"]], scale, digits)


def gains(bench: Bench, bases: dict[str, str], t: int, prefix: str) -> str:
    """What DiffAug changes, paired by image; in bold where the interval leaves out 0."""
    rows = []
    for network, base in bases.items():
        cells = []
        for figure, digits in FIGURES.items():
            metric = f"gain/{prefix}{figure}@t={t}"
            text = bench.cell(network, metric, digits)
            if text != "-":
                low, high = bench.rows.loc[(network, metric), ["low", "high"]]
                text = f"**{text}**" if low > 0 or high < 0 else text
            cells.append(text)
        rows.append([f"{network} - {base}", *cells])
    return table(["difference", *FIGURES], rows)


def gradients(bench: Bench, bases: dict[str, str]) -> list[str]:
    """Figures and differences by time and by what the gradient is taken to."""
    parts = []
    for t, prefix in ((0, ""), (300, ""), (300, "denoised/"), (300, "chain/")):
        head = f"### t = {t}, {THROUGH[prefix]}\n" if t else "### The images themselves (t = 0)\n"
        rows = [
            [name, *(bench.cell(name, f"{prefix}{figure}@t={t}", digits) for figure, digits in FIGURES.items())]
            for name in bench.networks
        ]
        parts += [head, table(["network", *FIGURES], rows) + "\n", gains(bench, bases, t, prefix) + "\n"]
    return parts


def steps(bench: Bench, bases: dict[str, str]) -> str:
    """What the judge takes images for after steps along gradients, percent, and the paired differences."""
    columns = [(t, prefix) for t, prefix in ((0, ""), (300, "denoised/"), (300, "chain/"))]
    heads = ["the images themselves" if not t else f"t = {t}, {THROUGH[prefix]}" for t, prefix in columns]
    names = [f"{prefix}generated_accuracy@t={t}" for t, prefix in columns]
    rows = [[network, *(bench.cell(network, name, 1, 100) for name in names)] for network in bench.networks]
    rows += [
        [f"{network} - {base}", *(bench.cell(network, f"gain/{name}", 1, 100) for name in names)]
        for network, base in bases.items()
    ]
    return table(["network", *heads], rows)


def jacobian(bench: Bench) -> str:
    """The denoiser's Jacobian by time."""
    (name,) = bench.networks
    figures = ["jacobian_trace", "denoising_error", "trace_gap", "jacobian_asymmetry", "jacobian_largest"]
    figures += ["jacobian_smallest", "effective_rank"]
    metrics = [str(metric) for metric in bench.rows.index.get_level_values("metric")]
    times = sorted({int(metric.split("@t=")[1]) for metric in metrics if "@t=" in metric})
    rows = [[str(t), *(bench.cell(name, f"{figure}@t={t}", 3) for figure in figures)] for t in times]
    return table(["t", *figures], rows)


def generation(bench: Bench, bases: dict[str, str]) -> str:
    """Samples under guidance, by scale."""
    metrics = [str(metric) for metric in bench.rows.index.get_level_values("metric")]
    scales = sorted({metric.split("@scale=")[1] for metric in metrics if "@scale=" in metric}, key=float)
    rows = []
    for scale in scales:
        for name in bench.networks:
            rows.append([f"{name}, scale {scale}", *(bench.cell(name, f"{made}@scale={scale}") for made in MADE)])
        for name, base in bases.items():
            cells = [bench.cell(name, f"gain/{made}@scale={scale}") for made in MADE]
            rows.append([f"{name} - {base}, scale {scale}", *cells])
    return table(["samples of", *MADE], rows)


def main(run: Path) -> None:
    metrics = pd.read_csv(run / "metrics.csv")
    manifest = json.loads((run / "manifest.json").read_text())
    bases = {entry["name"]: dict(entry["evaluator"].get("gains", ())) for entry in manifest["benches"]}
    counts = {entry["bench"]: entry["n"] for entry in manifest["datasets"]}
    parts = [
        "# Gradients, steps along them, the denoiser's Jacobian, and guidance\n",
        f"Made by `docs/gradients.py` of suite `analyses`, digest {manifest['suite']['digest']}, seed "
        f"{manifest['suite']['seed']}, torch {manifest['versions']['torch']}, {manifest['device']}; "
        f"{counts['gradients']} test images of MNIST. 95 % intervals that resample images; differences are paired by image "
        "and noise, in bold where the interval leaves out 0 (no correction for their number). "
        "[gradients.md](gradients.md), [jacobian.md](jacobian.md) and [generation.md](generation.md) say what the figures "
        "are.\n",
        "## Gradients of log p(y | x)\n",
        *gradients(Bench(metrics, "gradients"), bases["gradients"]),
        "## Steps along gradients: what another network takes the images for, percent\n",
        steps(Bench(metrics, "steps"), bases["steps"]) + "\n",
        "## The Jacobian of the denoiser\n",
        jacobian(Bench(metrics, "jacobian")) + "\n",
        "## Samples under the guidance of two classifiers of noisy images (Table 5)\n",
        generation(Bench(metrics, "generation"), bases["generation"]) + "\n",
    ]
    reading = HERE / "gradients-reading.md"
    parts += [reading.read_text()] if reading.exists() else []
    (HERE / "gradients-results.md").write_text("\n".join(parts).rstrip() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
