"""Post-processors of openood, by a stand-in of its interface, give on recorded arrays what their formulas say."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import nn

from robustbench_diffaug import rng
from robustbench_diffaug.detection.openood_scores import Recorded, openood_score
from robustbench_diffaug.detection.rows import Chunks, Rows, Source

CLASSES, WIDTH = 7, 12
WEIGHT = rng.normal(rng.key("weight"), range(1), (CLASSES, WIDTH))[0]
BIAS = rng.normal(rng.key("bias"), range(1), (CLASSES,))[0]


def rows(name: str, size: int) -> Rows:
    features = np.maximum(rng.normal(rng.key(name), range(1), (size, WIDTH))[0], 0)
    logits = features @ WEIGHT.T + BIAS
    return Rows(logits, features, logits.argmax(axis=1))


def chunked(found: Rows, size: int) -> Chunks:
    def chunks() -> Iterator[Rows]:
        for start in range(0, len(found.labels), size):
            part = slice(start, start + size)
            assert found.features is not None
            yield Rows(found.logits[part], found.features[part], found.labels[part])

    return chunks


FIT, VAL, TEST = rows("fit", 430), rows("val", 210), rows("test", 501)
SOURCE = Source(chunked(FIT, 100), chunked(VAL, 70), WEIGHT, BIAS, 5)


class Energy:
    """As EBOPostprocessor: a search over one hyper-parameter, and no set-up."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.temperature = config["temperature"]
        self.dataset = config["dataset"]
        self.ones = torch.ones(1, device="cuda")  # as TemperatureScalingPostprocessor has it

    def setup(self, net: nn.Module, id_loader_dict: Any, ood_loader_dict: Any) -> None:
        print("Setup: ", file=sys.stderr)

    @torch.no_grad()
    def postprocess(self, net: nn.Module, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = net(data)
        return output.argmax(1), self.ones * self.temperature * torch.logsumexp(output / self.temperature, dim=1)

    def set_hyperparam(self, hyperparam: list[Any]) -> None:
        self.temperature = hyperparam[0]
        print(f"{hyperparam[0]:2d}")  # fails unless it is the integer of the file


class Clipped(Energy):
    """As ReactPostprocessor: set up on val images, with a network of openood's around the classifier."""

    def setup(self, net: nn.Module, id_loader_dict: Any, ood_loader_dict: Any) -> None:
        net.cuda()
        log = [net(batch["data"].cuda().float(), return_feature=True)[1] for batch in id_loader_dict["val"]]
        assert max(map(len, log)) == id_loader_dict["val"].batch_size == 200
        assert len(log) == len(id_loader_dict["val"])
        self.threshold = np.percentile(torch.cat(log).cpu().numpy().flatten(), 90)

    @torch.no_grad()
    def postprocess(self, net: nn.Module, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = net.forward_threshold(data, self.threshold)  # type: ignore[operator]
        return output.argmax(1), torch.logsumexp(output.data.cpu(), dim=1)


class Centre(Energy):
    """As MDSPostprocessor: set up on training images and their labels; needs a gradient and the global generators."""

    def setup(self, net: nn.Module, id_loader_dict: Any, ood_loader_dict: Any) -> None:
        found = [(net(batch["data"], True)[1], batch["label"]) for batch in id_loader_dict["train"]]
        features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        assert len(id_loader_dict["train"].dataset) == len(features)
        self.scale = torch.ones(1, requires_grad=True)
        (self.scale * 3).sum().backward()
        self.means = torch.stack([features[labels == label].mean(0) for label in range(CLASSES)])
        self.noise = float(torch.empty(1).normal_())

    @torch.no_grad()
    def postprocess(self, net: nn.Module, data: Any) -> Any:
        logits, features = net(data, return_feature=True)
        features.zero_().add_(net(data, return_feature=True)[1])  # in place, as ash_b does
        distances = torch.cdist(features.double(), self.means.double()).amin(1)
        return logits.argmax(1), -float(self.scale.grad or 0) * distances.numpy() + self.noise


class Perturbed(Energy):
    """As ODINPostprocessor."""

    def postprocess(self, net: nn.Module, data: Any) -> tuple[torch.Tensor, torch.Tensor]:
        data.requires_grad = True
        return net(data).argmax(1), net(data).max(1)[0]


class Inner(Energy):
    """As RankFeatPostprocessor."""

    def postprocess(self, net: nn.Module, data: Any) -> Any:
        return net.intermediate_forward(data, layer_index=4)  # type: ignore[operator]


class OnTest(Energy):
    """As ResidualPostprocessor, set up on test images."""

    def setup(self, net: nn.Module, id_loader_dict: Any, ood_loader_dict: Any) -> None:
        list(id_loader_dict["test"])


class ReactNet(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Any, return_feature: bool = False, return_feature_list: bool = False) -> Any:
        return self.backbone(x, return_feature, return_feature_list)

    def forward_threshold(self, x: Any, threshold: float) -> Any:
        _, feature = self.backbone(x, return_feature=True)
        return self.backbone.get_fc_layer()(feature.clip(max=threshold))  # type: ignore[operator]


APS = "{APS_mode: True"
SETTINGS = {
    "ebo": f"{APS}, postprocessor_args: {{temperature: 2}}, postprocessor_sweep: {{temperature_list: [1, 2, 10]}}}}",
    "react": "{APS_mode: False, postprocessor_args: {percentile: 90}}",
    "mds": "{name: mds}",
    "gen": f"{APS}, postprocessor_args: {{gamma: 1}}, postprocessor_sweep: {{gamma_list: [5, 6], M_list: [7, 8]}}}}",
    "fdbd": f"{APS}, postprocessor_sweep: {{normalizer_list: [True, False]}}}}",
    "odin": "{APS_mode: False}",
    "rankfeat": "{APS_mode: False}",
    "residual": "{APS_mode: False}",
    "broken": "[1, 2]",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module with the parts of openood that are used; returns the folder of its settings."""
    kinds = {"ebo": Energy, "react": Clipped, "mds": Centre, "odin": Perturbed, "rankfeat": Inner, "residual": OnTest}
    kinds |= {"gen": Energy, "fdbd": Energy, "broken": Energy, "unset": Energy}

    def get_postprocessor(config_root: str, postprocessor_name: str, id_data_name: str) -> Any:
        assert (Path(config_root) / "postprocessors" / f"{postprocessor_name}.yml").is_file()  # else it downloads
        return kinds[postprocessor_name]({"temperature": 2, "dataset": id_data_name})

    names = ("openood", "openood.evaluation_api", "openood.postprocessors", "openood.networks")
    modules = {name: ModuleType(name) for name in names}
    parts: dict[str, dict[str, Any]] = {
        "openood.evaluation_api.postprocessor": {"postprocessors": kinds, "get_postprocessor": get_postprocessor},
        "openood.postprocessors.info": {"num_classes_dict": {"cifar10": 10}},
        "openood.networks.react_net": {"ReactNet": ReactNet},
    }
    for name, held in parts.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(held)
    modules["openood.evaluation_api.postprocessor"].__file__ = str(tmp_path / "openood/evaluation_api/postprocessor.py")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    folder = tmp_path / "configs" / "postprocessors"
    folder.mkdir(parents=True)
    for name, text in SETTINGS.items():
        (folder / f"{name}.yml").write_text(f"postprocessor: {text}\n")
    return folder


def test_a_formula_of_logits_and_its_search(package: Path) -> None:
    score = openood_score("ebo")
    assert (score.name, score.parameter, score.default) == ("openood:ebo", "temperature", 2.0)
    assert score.sweep == (1.0, 2.0, 10.0)
    assert score.needs == {"features", "head"}
    for value, temperature in ((None, 2), (2.0, 2), (1.0, 1), (10.0, 10)):
        expected = temperature * logsumexp(TEST.logits / temperature, axis=1)
        found = score.fit(SOURCE, value)(TEST)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="openood:ebo: openood does not search 3; there are 1, 2, 10"):
        score.fit(SOURCE, 3.0)


def test_what_is_set_up_on_val_images_sees_the_last_layer(package: Path) -> None:
    score = openood_score("react")
    assert (score.parameter, score.sweep) == ("", ())
    assert VAL.features is not None
    assert TEST.features is not None
    clipped = np.minimum(TEST.features, np.percentile(VAL.features, 90))
    expected = logsumexp(clipped @ WEIGHT.T + BIAS, axis=1)
    np.testing.assert_allclose(score.fit(SOURCE, None)(TEST), expected, rtol=1e-5)


def test_what_is_set_up_on_training_images(package: Path) -> None:
    before = rng.global_states()
    scores = openood_score("mds").fit(SOURCE, None)(TEST)
    assert rng.global_states() == before
    assert FIT.features is not None
    assert TEST.features is not None
    means = np.stack([FIT.features[FIT.labels == label].mean(axis=0) for label in range(CLASSES)])
    nearest = np.linalg.norm(TEST.features[:, None] - means, axis=2).min(axis=1)
    assert np.ptp(scores + 3 * nearest) < 1e-5  # the draw of the set-up is one for all
    np.testing.assert_array_equal(openood_score("mds").fit(SOURCE, None)(TEST), scores)


@pytest.mark.parametrize("name", ["ebo", "react", "mds"])
def test_chunks_change_nothing(package: Path, name: str) -> None:
    whole = Source(chunked(FIT, 430), chunked(VAL, 1), WEIGHT, BIAS, 5)
    first = openood_score(name).fit(SOURCE, None)(TEST)
    np.testing.assert_array_equal(openood_score(name).fit(whole, None)(TEST), first)
    parts = [openood_score(name).fit(SOURCE, None)(part) for part in chunked(TEST, 200)()]
    np.testing.assert_array_equal(np.concatenate(parts), first)


def test_several_hyper_parameters_are_positions_in_openoods_order(package: Path) -> None:
    score = openood_score("gen")
    assert (score.parameter, score.default, score.sweep) == ("combination", None, (0.0, 1.0, 2.0, 3.0))
    taken = []
    for value in score.sweep:  # Energy takes the first of a combination for its temperature: 5, 6, 5, 6
        found = score.fit(SOURCE, value)(TEST)
        taken.append([np.allclose(found, t * logsumexp(TEST.logits / t, axis=1), rtol=1e-5) for t in (5, 6)])
    assert taken == [[True, False], [False, True]] * 2
    assert openood_score("fdbd").parameter == "combination"  # true is no number


def test_the_network_gives_what_was_recorded() -> None:
    network = Recorded(WEIGHT, BIAS)
    assert TEST.features is not None
    odd = TEST.logits + 1  # of a head that rounds otherwise, say
    images = torch.from_numpy(np.concatenate([TEST.features, odd], axis=1))
    logits, features = network(images, return_feature=True)
    np.testing.assert_array_equal(logits, odd)
    np.testing.assert_array_equal(features, TEST.features)
    np.testing.assert_array_equal(network(images, return_feature_list=True)[1][0], TEST.features)
    np.testing.assert_array_equal(network(images), odd)
    np.testing.assert_array_equal(network.get_fc()[0], WEIGHT)
    np.testing.assert_allclose(network.fc(features).detach(), TEST.logits, atol=1e-5)


def bare(found: Rows) -> Rows:
    return found._replace(features=None)


@pytest.mark.parametrize(
    ("name", "use", "message"),
    [
        ("odin", lambda s: s.fit(SOURCE, None)(TEST), "openood:odin: it needs gradients with respect to images"),
        ("rankfeat", lambda s: s.fit(SOURCE, None)(TEST), "openood:rankfeat: AttributeError: .*intermediate_forward"),
        ("residual", lambda s: s.fit(SOURCE, None), "openood:residual: it reads the test images when it is set up"),
        ("mds", lambda s: s.fit(Source(None, None, WEIGHT, BIAS), None), "openood:mds: .*add a dataset of group fit"),
        ("react", lambda s: s.fit(Source(SOURCE.fit, None, WEIGHT, BIAS), None), "add a dataset of group val"),
        ("mds", lambda s: s.fit(Source(SOURCE.fit, SOURCE.val), None), "openood:mds needs the last layer"),
        ("mds", lambda s: s.fit(SOURCE, None)(bare(TEST)), "openood:mds: it needs features, which were not recorded"),
    ],
)
def test_what_cannot_be_had_is_one_line(package: Path, name: str, use: Callable[[Any], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        use(openood_score(name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mdss", "openood has no post-processor 'mdss'; did you mean mds?"),
        (
            "unset",
            "there is no .*/unset.yml; put openood's configs/postprocessors/unset.yml there, which",
        ),
        ("broken", "broken.yml holds no settings of a post-processor of openood"),
    ],
)
def test_settings_that_are_not_there_are_one_line(package: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        openood_score(name)


def test_without_the_package_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openood", None)
    with pytest.raises(
        ValueError, match="score openood:knn needs the package openood, which cannot be imported"
    ) as caught:
        openood_score("knn")
    assert "\n" not in str(caught.value)
