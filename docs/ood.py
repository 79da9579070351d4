"""Writes docs/ood-results.md from a run of suites/ood.yaml, in the layout of the DiffAug paper's Table 3 and beside it.

Run `rdiff run ood -o reports/ood`, then `python docs/ood.py reports/ood`.

reports/published/diffaug-table3.yaml holds Table 3 of "DiffAug: A Diffuse-and-Denoise Augmentation for Training Robust Classifiers"
(Sastry, Dumpala and Oore, NeurIPS 2024), https://arxiv.org/abs/2306.09192: AUROC in percent on OpenOOD v1.5's near-OOD
sets for ImageNet, its rows under the names that their counterparts have in the zoo.
"""

import json
import sys
from pathlib import Path

import pandas as pd
from written import interval, table

from robustbench_diffaug.report import published as publications

HERE = Path(__file__).parent
AVERAGED = ("ash", "msp", "react", "scale", "average")
RATES = {"fpr95_ood_positive": "OOD positive", "fpr95_id_positive": "ID positive"}


class Bench:
    """The figures of one bench, by checkpoint and metric."""

    def __init__(self, metrics: pd.DataFrame, name: str) -> None:
        rows = metrics[metrics["bench"] == name].drop_duplicates(["checkpoint", "metric"])
        self.networks = list(dict.fromkeys(rows["checkpoint"]))
        self.metrics = list(dict.fromkeys(rows["metric"]))
        self.rows = rows.set_index(["checkpoint", "metric"])

    def cell(self, network: str, metric: str, beside: str = "") -> str:
        """A figure with its interval, or a dash."""
        if (network, metric) not in self.rows.index:
            return "–"
        return interval(*self.rows.loc[(network, metric), ["value", "low", "high"]]) + beside

    def grid(self, heads: list[str], columns: list[str], networks: list[str] | None = None) -> str:
        """A table with a row for each network that has any of the metrics."""
        rows = [[n, *(self.cell(n, metric) for metric in columns)] for n in networks or self.networks]
        return table(["network", *heads], [row for row in rows if set(row[1:]) != {"–"}]) + "\n"


def near(bench: Bench, published: pd.DataFrame) -> str:
    """Near AUROC beside the paper's."""

    def beside(network: str, score: str) -> str:
        return f" ({published.loc[network, score]:.1f})" if network in published.index else ""

    rows = [[n, *(bench.cell(n, f"auroc/{s}/near", beside(n, s)) for s in AVERAGED)] for n in bench.networks]
    return table(["network", *AVERAGED], rows) + "\n"


def of_bench(bench: Bench, settings: dict[str, object], published: pd.DataFrame) -> list[str]:
    """The tables of a bench."""
    named = settings.get("gains")
    bases: dict[str, str] = dict(named) if isinstance(named, list) else {}
    parts = ["### Near AUROC\n", near(bench, published)]
    for role in ("near", "far"):
        for rate, text in RATES.items():
            parts += [
                f"### FPR at 95 %, {text}, {role}\n",
                bench.grid(list(AVERAGED), [f"{rate}/{s}/{role}" for s in AVERAGED]),
            ]
        if role == "near":
            parts += ["### Far AUROC\n", bench.grid(list(AVERAGED), [f"auroc/{s}/far" for s in AVERAGED])]
    if "auroc/average/near-fs" in bench.metrics:
        parts.append("### AUROC of the full spectrum, mean over the four scores, and accuracy\n")
        parts.append(
            bench.grid(
                ["near", "far", "accuracy, ID", "accuracy, shifted ID"],
                ["auroc/average/near-fs", "auroc/average/far-fs", "accuracy", "accuracy/csid"],
            )
        )
    rows = [
        [
            f"{n} - {bases[n]}",
            *(bench.cell(n, f"gain/auroc/{s}/near") for s in AVERAGED),
            bench.cell(n, "gain/auroc/average/far"),
        ]
        for n in bench.networks
        if n in bases
    ]
    if rows:
        parts.append("### Differences in AUROC, in points, paired by image\n")
        parts.append(table(["difference", *(f"near, {s}" for s in AVERAGED), "far, average"], rows) + "\n")
    prefix = "auroc/"
    scores = list(dict.fromkeys(m.split("/")[1] for m in bench.metrics if m.startswith(prefix) and m.endswith("/near")))
    best = [[s, *spread(bench, s)] for s in scores]
    parts.append("### Every score: AUROC of the networks\n")
    parts.append(table(["score", "near: least", "median", "largest", "far: least", "median", "largest"], best) + "\n")
    return parts


def spread(bench: Bench, score: str) -> list[str]:
    """The least, the middle and the largest AUROC of a score over networks, near and far."""
    shown = []
    for role in ("near", "far"):
        keys = [(n, f"auroc/{score}/{role}") for n in bench.networks]
        values = 100 * bench.rows["value"].reindex(keys).dropna()
        shown += [f"{value:.1f}" for value in values.quantile([0, 0.5, 1])] if len(values) else ["–"] * 3
    return shown


def main(run: Path) -> None:
    metrics = pd.read_csv(run / "metrics.csv")
    manifest = json.loads((run / "manifest.json").read_text())
    published = publications.table("diffaug-table3")
    parts = [
        "# Near-OOD detection by the zoo\n",
        f"Made by `rdiff run ood` and `docs/ood.py`; suite digest {manifest['suite']['digest']}, seed "
        f"{manifest['suite']['seed']}, torch {manifest['versions']['torch']}, {manifest['device']}. Percent, with 95 % "
        "intervals over test images. Near and far are unweighted means over datasets; average is the mean over the four "
        "scores. In brackets the number of the paper's Table 3 for ImageNet: other images and networks, so only orderings "
        "can be compared. [ood.md](ood.md) says what the figures are.\n",
    ]
    for entry in manifest["benches"]:
        bench = Bench(metrics, entry["name"])
        if any(metric.startswith("auroc/") for metric in bench.metrics):
            sets = [
                f"{d['name']} ({d['group']}, {d['n']})" for d in manifest["datasets"] if d["bench"] == entry["name"]
            ]
            parts += [f"## {entry['name']}\n", f"Datasets, with role and images: {', '.join(sets)}.\n"]
            parts += of_bench(bench, entry["evaluator"], published)
    reading = HERE / "ood-reading.md"
    parts += [reading.read_text()] if reading.exists() else []
    (HERE / "ood-results.md").write_text("\n".join(parts).rstrip() + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
