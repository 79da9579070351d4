"""Whether a classifier tells images of no class of its own from others: OpenOOD's protocol, from one pass."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from pydantic import Field, model_validator

from robustbench_diffaug.batch import Batch, Columns, View
from robustbench_diffaug.checkpoints.features import linear
from robustbench_diffaug.checkpoints.model import Model
from robustbench_diffaug.component import Options, Outside, Value, suggest
from robustbench_diffaug.data.base import Dataset
from robustbench_diffaug.detection.scores import PREFIX, SCORES, score_of
from robustbench_diffaug.evaluators import gains, ood_metrics
from robustbench_diffaug.evaluators.base import Evaluator, Forwards
from robustbench_diffaug.evaluators.ood_gradients import odin
from robustbench_diffaug.evaluators.ood_scored import ROLES, Protocol
from robustbench_diffaug.outcomes import Basis, Key
from robustbench_diffaug.records import Metric, Records

__all__ = ["Odin", "Ood"]

OFFLINE = tuple(name for name in SCORES if name != "ash-b")  # which ash is
PAPER = ("ash", "msp", "react", "scale")


class Odin(Value):
    """Settings of ODIN: a step against the image's own prediction, and a temperature.

    Arguments:
        temperatures: Validation chooses among them; without validation the last counts.
        noise: The size of the step, in pixels of [0, 1].
    """

    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0, 10.0, 100.0, 1000.0), min_length=1)
    noise: Annotated[float, Field(ge=0)] = 0.0014


class Ood(Evaluator):
    """Detection of images that are of none of the classes (out of distribution, OOD).

    Logits, features (what goes into the last layer) and the last layer itself are recorded once; every score but ODIN
    is a function of these, so another score or another value of a hyper-parameter needs no network.
    Scores are higher for what looks in-distribution (ID). The group of a dataset is its role:

        fit: training images, for scores that are fitted        val, ood-val: ID and other images, to choose
        id: ID test images                                      hyper-parameters by
        near, far: other images, by their likeness to ID ones   csid: ID images of another look (full spectrum)

    Near and far figures are unweighted means over datasets. Hyper-parameters are those with the highest AUROC on `val`
    against `ood-val`, the first of equals.

    Arguments:
        features: Whether features are recorded, which all scores but those of logits alone need.
        odin: ODIN's settings, if it is to be recorded: a gradient and two forwards more for each temperature.
        scores: Those to compute, by name (all, where it is left out), and 'openood:NAME' for a post-processor of the
            package openood, where it is installed.
        average: Those that are averaged and drawn; the DiffAug paper's four where it is left out.
        sweep: Whether hyper-parameters are chosen on `val` and `ood-val`; without these they have their defaults.
        parameters: Hyper-parameters set by hand, by the name of the score.
        gains: Checkpoints and the one each is compared with, as `resnet+diffaug: resnet`, over the same images.
        resamples: Of the bootstrap.

    References:
        OpenOOD v1.5: Enhanced Benchmark for Out-of-Distribution Detection (Zhang et al., 2023),
            https://arxiv.org/abs/2306.09301
    """

    kind: Literal["ood"] = "ood"
    heavy: ClassVar[tuple[str, ...]] = ("logits", "features")
    features: bool = True
    odin: Odin | None = None
    scores: Annotated[tuple[str, ...], Outside] = OFFLINE
    average: Annotated[tuple[str, ...], Outside] = PAPER
    sweep: Annotated[bool, Outside] = True
    parameters: Annotated[Options, Outside] = ()
    gains: Annotated[Options, Outside] = ()
    resamples: Annotated[int, Field(ge=100, le=100_000), Outside] = 200

    @model_validator(mode="before")
    @classmethod
    def _fitting(cls, data: object) -> object:
        """Left out, `scores` are all that can be had, and `average` those of the paper among them."""
        if not isinstance(data, Mapping):
            return data
        named = [name for name in OFFLINE if data.get("features", True) or "features" not in SCORES[name].needs]
        named += ["odin"] if data.get("odin") is not None else []
        scores = data.get("scores", named)
        average = [name for name in PAPER if name in scores] if isinstance(scores, list | tuple) else []
        return {"scores": scores, "average": average, **data}

    @model_validator(mode="after")
    def _consistent(self) -> "Ood":
        names = [*SCORES, *(["odin"] if self.odin else [])]
        for name in self.scores:
            if name not in names and not name.startswith(PREFIX):
                raise ValueError(f"there is no score {name!r}{suggest(name, names)}")
            if name in SCORES and "features" in SCORES[name].needs and not self.features:
                raise ValueError(f"score {name} needs features; leave it out, or set features: true")
        if not self.scores or len(set(self.scores)) < len(self.scores):
            raise ValueError("scores names none, or one twice")
        for name in self.average:
            if name not in self.scores:
                raise ValueError(f"average names {name!r}, which is none of scores{suggest(name, list(self.scores))}")
        for name, value in self.parameters:
            if name not in self.scores:
                raise ValueError(f"parameters sets {name!r}, which is none of scores{suggest(name, list(self.scores))}")
            if name in SCORES and not SCORES[name].parameter:
                raise ValueError(f"parameters sets {name}, which has no hyper-parameter; take it out")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"parameters.{name} is {value!r}, not a number")
        return self

    @property
    def protocol(self) -> Protocol:
        """What scores depend on, besides records."""
        temperatures = self.odin.temperatures if self.odin else ()
        return Protocol(self.scores, self.sweep, self.parameters, temperatures)

    def check(self) -> tuple[str, ...]:
        """Post-processors of openood must be there."""
        for name in self.scores:
            if name.startswith(PREFIX):
                score_of(name)
        return ()

    def fits(self, datasets: Sequence[Dataset], checkpoints: Sequence[str]) -> None:
        """There must be ID images and others, what scores are fitted to, and the checkpoints that gains compare."""
        roles = {dataset.group for dataset in datasets}
        for dataset in datasets:
            if dataset.group not in ROLES:
                raise ValueError(f"dataset {dataset.name} has group {dataset.group!r}; give one of {', '.join(ROLES)}")
        if "id" not in roles or not roles & {"near", "far"}:
            raise ValueError("needed are a dataset with group: id and one with group: near or far")
        for dataset in datasets:
            if dataset.name.removesuffix("-fs") in ("near", "far", "csid"):
                raise ValueError(f"a dataset is called {dataset.name}, as a figure is; give it another name")
        for name in self.scores:
            for role in ("fit", "val"):
                if name in SCORES and role in SCORES[name].needs and role not in roles:
                    raise ValueError(f"score {name} needs a dataset with group: {role}; add one, or leave {name} out")
        gains.require(self.gains, checkpoints)

    @property
    def needs_gradient(self) -> bool:
        """For ODIN alone; GradNorm is a closed form of features and logits."""
        return self.odin is not None

    @property
    def needs_layers(self) -> bool:
        """For all scores of features."""
        return self.features

    def forwards(self) -> Forwards:
        """One forward, and for each temperature of ODIN two more."""
        return Forwards(0, 1 + (2 * len(self.odin.temperatures) if self.odin else 0))

    def observe(self, model: Model, view: View, batch: Batch) -> Columns:
        """Logits, features, the prediction, and ODIN, which needs gradients."""
        images = view.images[:, 0]
        columns: dict[str, torch.Tensor] = {}
        if self.features:
            logits, columns["features"] = model.features(images)
        else:
            logits = model.logits(images)
        columns |= {"logits": logits, "pred": logits.argmax(dim=1).to(torch.int32)}
        if self.odin:
            found = [odin(model, images, value, self.odin.noise) for value in self.odin.temperatures]
            columns["odin"] = torch.stack(found, dim=1)
        return columns

    def constants(self, model: Model) -> Mapping[str, Shaped[np.ndarray, "..."]]:
        """The last layer, of which logits are the linear function `features weight^T + bias`."""
        if not self.features or not model.found:
            return {}
        weight, bias = linear(model.found[0].layer)
        return {"weight": weight.cpu().numpy(), "bias": bias.cpu().numpy()}

    def notices(self, records: Records) -> Iterable[str]:
        """Images in two sets, and features that a score does not presume."""
        return ood_metrics.notices(records, self.protocol) if len(records) else ()

    def metrics(self, records: Records) -> Iterable[Metric]:
        """Accuracy, and of each score AUROC, FPR@95, AUPR, detection error and AUOSCR by dataset, near and far."""
        return ood_metrics.metrics(records, self.protocol, self.average, self.resamples) if len(records) else ()

    def outcomes(self, records: Records) -> Mapping[Key, Basis]:
        """Hits of in-distribution images, and the scores of all images, of which areas are made."""
        return ood_metrics.outcomes(records, self.protocol, self.average)

    def compare(self, checkpoints: Sequence[str], records: Callable[[str], Records]) -> Iterable[tuple[str, Metric]]:
        """The gains of the checkpoints that `gains` names."""
        settings = (self.protocol, self.average, self.resamples)
        return gains.compared(self.gains, records, lambda one, base: ood_metrics.gains(one, base, *settings))
