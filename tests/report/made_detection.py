"""A made-up run of out-of-distribution detection of any size."""

from math import exp, sqrt

import numpy as np
import pandas as pd

from tests.report.conftest import Wave, row

AVERAGED = ("ash", "msp", "react", "scale")
SCORES = (
    "msp", "maxlogit", "energy", "entropy", "gen", "temperature", "klm", "react", "ash", "ash-s", "ash-p", "scale",
    "dice", "knn", "mds", "rmds", "vim", "she", "nnguide",
)  # fmt: skip
DATASETS = {"letters": "near", "held-out": "near", "photographs": "far", "textures": "far", "noise": "far"}
FIGURES = (
    "auroc", "fpr95_ood_positive", "fpr95_id_positive", "aupr_in", "aupr_out", "detection_error", "auoscr",
)  # fmt: skip
SWEPT = {"ash": "percentile", "react": "percentile", "scale": "percentile", "knn": "k"}
VALUES = (65, 70, 75, 80, 85, 90, 95)
RATES = (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
ZOO = tuple(
    f"{net}-{recipe}{end}"
    for net, recipe in (("resnet", "standard"), ("resnet", "augmix"), ("resnet", "deepaugment"),
                        ("resnet", "deepaugment-augmix"), ("vit", "standard"), ("resnet", "synth"),
                        ("resnet", "augmix-extra"), ("resnet", "six"))
    for end in ("", "+diffaug")
) + ("resnet-augmix+diffaug-0-500",)  # fmt: skip


def ood(
    checkpoint: str, metric: str, group: str, value: float, width: float = 0.012, **more: object
) -> dict[str, object]:
    """A row of a bench of detection."""
    figure = metric.removeprefix("gain/").split("/")[0]
    lower = figure.startswith("fpr95") or figure == "detection_error"
    named = {"bench": "ood", "evaluator": "ood", "unit": "fraction", "better": "lower" if lower else "higher"}
    return row(checkpoint, metric, group, value, width, headline=metric == "auroc/average/near") | named | more


def _figures(checkpoint: str, scores: tuple[str, ...], noise: Wave) -> list[dict[str, object]]:
    """The figures of each score: of each set, and their averages; larger for the far ones."""
    made = []
    for figure in FIGURES:
        lower = figure.startswith("fpr95") or figure == "detection_error"
        average: dict[str, list[float]] = {}
        for score in scores:
            for name in ("near", "far", "near-fs", "far-fs", *DATASETS):
                value = (
                    0.82 + 0.1 * (DATASETS.get(name, name[:3]) == "far") - 0.05 * name.endswith("-fs") + 0.05 * noise()
                )
                value = 1 - value if lower else value
                made.append(ood(checkpoint, f"{figure}/{score}/{name}", DATASETS.get(name, name), value))
                if score in AVERAGED and name not in DATASETS:
                    average.setdefault(name, []).append(value)
        made += [ood(checkpoint, f"{figure}/average/{n}", n, float(np.mean(v)), 0.01) for n, v in average.items()]
    return made


def _curves(checkpoint: str, drawn: tuple[str, ...], noise: Wave) -> list[dict[str, object]]:
    """ROC curves, histograms and sweeps."""
    made = []
    for score in drawn:
        for name, power in (("near", 0.25), ("far", 0.1)):
            bent = power * (1 + 0.4 * noise())
            made += [ood(checkpoint, f"roc/{score}/{name}@fpr={x}", name, x**bent, 0.02) for x in RATES]
    bins = np.linspace(0, 1, 33)
    centres = (bins[1:] + bins[:-1]) / 2
    for score in AVERAGED:
        for role, middle in (("id", 0.8), ("near", 0.5), ("far", 0.25), ("csid", 0.65)):
            heights = np.array([exp(-(((x - middle - 0.08 * noise()) / 0.2) ** 2)) for x in centres])
            shares = heights / heights.sum()
            made += [
                ood(checkpoint, f"density/{score}/{role}@s={x:g}", role, float(y), 0.0)
                for x, y in zip(centres, shares, strict=True)
            ]
    for score, parameter in SWEPT.items():
        values = {at: 0.8 + 0.08 * noise() for at in VALUES}
        made += [ood(checkpoint, f"sweep/{score}@{parameter}={at}", "val", v, 0.0) for at, v in values.items()]
        best = max(values, key=values.__getitem__)
        made.append(ood(checkpoint, f"chosen/{score}", "val", float(best), 0.0, unit="count"))
    return made


def made_detection(
    checkpoints: tuple[str, ...] = ZOO, scores: tuple[str, ...] = SCORES, drawn: tuple[str, ...] = SCORES
) -> pd.DataFrame:
    """The metrics of such a run, with ROC curves of the scores `drawn`; DiffAug is compared with the same without."""
    rows = []
    for number, checkpoint in enumerate(checkpoints):
        noise = Wave(number)
        accuracy = 0.97 + 0.02 * noise()
        rows.append(ood(checkpoint, "accuracy", "id", accuracy, 1.96 * sqrt(accuracy * (1 - accuracy) / 1500)))
        rows.append(ood(checkpoint, "accuracy/csid", "csid", accuracy - 0.1, 0.012))
        rows += _figures(checkpoint, scores, noise) + _curves(checkpoint, drawn, noise)
        if (base := checkpoint.removesuffix("+diffaug")) != checkpoint and base in checkpoints:
            rows += [
                ood(checkpoint, f"gain/auroc/{score}/{name}", name, 0.02 * noise(), 0.012)
                for name in ("near", "far")
                for score in (*AVERAGED, "average")
            ]
    return pd.DataFrame(rows)
