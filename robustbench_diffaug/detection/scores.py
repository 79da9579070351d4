"""Every score by name, with the defaults and the sweeps of OpenOOD v1.5.

References:
    OpenOOD v1.5: Enhanced Benchmark for Out-of-Distribution Detection (Zhang et al., 2023),
        https://arxiv.org/abs/2306.09301
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from robustbench_diffaug.component import suggest
from robustbench_diffaug.detection import distance_scores, gradient_scores, logit_scores, shaping_scores
from robustbench_diffaug.detection.openood_scores import PREFIX, openood_score
from robustbench_diffaug.detection.rows import Need, Score, Scorer, Source

__all__ = ["PREFIX", "SCORES", "score_of"]

Formula: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float64]]
Fit: TypeAlias = Callable[[Source, float], Scorer]

SHAPED = (65.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0)
NEIGHBOURS = (50.0, 100.0, 200.0, 500.0, 1000.0)
GAMMAS = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0)


def _logits(name: str, formula: Formula) -> Score:
    """A score of logits, without parameters."""
    return Score(name, lambda source, value: lambda rows: formula(rows.logits))


def _shaping(name: str, fit: Fit, default: float) -> Score:
    """A score that shapes features by a percentage."""
    return _tuned(name, fit, {"features", "head"}, "percentile", default, SHAPED)


def _tuned(
    name: str, fit: Fit, needs: set[Need], parameter: str, default: float, sweep: tuple[float, ...] = ()
) -> Score:
    """A score with a hyper-parameter, which takes its default where no value is given."""
    return Score(
        name,
        lambda source, value: fit(source, float(default if value is None else value)),
        frozenset(needs),
        parameter,
        default,
        sweep,
        nonnegative=parameter == "percentile",
    )


SCORES: Mapping[str, Score] = {
    "msp": _logits("msp", logit_scores.max_softmax),
    "maxlogit": _logits("maxlogit", logit_scores.max_logit),
    "entropy": _logits("entropy", logit_scores.entropy),
    "energy": _tuned("energy", logit_scores.energy_score, set(), "temperature", 1.0),
    "gen": _tuned("gen", logit_scores.gen, set(), "gamma", 0.1, GAMMAS),
    "temperature": Score("temperature", logit_scores.temperature, frozenset({"val"})),
    "klm": Score("klm", logit_scores.klm, frozenset({"val"})),
    "react": _tuned(
        "react", shaping_scores.react, {"features", "head", "val"}, "percentile", 90.0, (85.0, 90.0, 95.0, 99.0)
    ),
    "ash": _shaping("ash", shaping_scores.ash_b, 90.0),
    "ash-b": _shaping("ash-b", shaping_scores.ash_b, 90.0),
    "ash-p": _shaping("ash-p", shaping_scores.ash_p, 90.0),
    "ash-s": _shaping("ash-s", shaping_scores.ash_s, 90.0),
    "scale": _shaping("scale", shaping_scores.scale, 85.0),
    "dice": _tuned("dice", shaping_scores.dice, {"features", "head", "fit"}, "p", 90.0),
    "knn": _tuned("knn", distance_scores.knn, {"features", "fit"}, "k", 50.0, NEIGHBOURS),
    "mds": Score("mds", distance_scores.mds, frozenset({"features", "fit"})),
    "rmds": Score("rmds", distance_scores.rmds, frozenset({"features", "fit"})),
    "vim": Score(
        "vim",
        lambda source, value: distance_scores.vim(source, None if value is None else float(value)),
        frozenset({"features", "head", "fit"}),
        parameter="dim",
        sweep=(256.0, 1000.0),
    ),
    "gradnorm": Score("gradnorm", lambda source, value: gradient_scores.gradnorm, frozenset({"features"})),
    "she": Score("she", distance_scores.she, frozenset({"features", "fit"})),
    "nnguide": _tuned("nnguide", distance_scores.nnguide, {"features", "fit"}, "k", 100.0),
}


def score_of(name: str) -> Score:
    """The score of a name of `SCORES`, or of a post-processor of the package openood after `PREFIX`.

    Raises:
        ValueError: There is none.
    """
    if name.startswith(PREFIX):
        return openood_score(name.removeprefix(PREFIX))
    if name not in SCORES:
        raise ValueError(f"there is no score {name!r}{suggest(name, sorted(SCORES))}")
    return SCORES[name]
