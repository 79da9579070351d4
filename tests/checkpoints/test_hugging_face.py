"""Kind hf against transformers itself, on tiny networks that it saved."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import robustbench_diffaug.torchvision_guard  # noqa: F401  (before transformers)
from robustbench_diffaug import rng, testing
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.base import Preprocess
from robustbench_diffaug.checkpoints.hugging_face import HuggingFace
from robustbench_diffaug.checkpoints.image_processors import PLAIN, stated

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer of one channel and ten classes."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("hf") / "vit"
    config = ViTConfig(**SIZES, image_size=32, patch_size=16, num_channels=1, num_labels=10)
    with rng.seeded(rng.key("vit")):
        network = ViTForImageClassification(config)
    saved(network, folder)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.25]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def convnext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolutional network of three channels and two classes, which its config.json leaves out."""
    from transformers import ConvNextConfig, ConvNextForImageClassification, ConvNextImageProcessor

    folder = tmp_path_factory.mktemp("hf") / "convnext"
    with rng.seeded(rng.key("convnext")):
        network = ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1]))
    saved(network, folder)
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


def saved(network: Any, folder: Path, **more: object) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    network.save_pretrained(folder, **more)


def entry(folder: Path, **fields: object) -> HuggingFace:
    return HuggingFace.model_validate({"id": "h", "folder": str(folder), "microbatch": 5} | fields)


def images(channels: int, size: int = 32) -> Tensor:
    return torch.from_numpy(rng.uniform(rng.key("images"), range(5), (channels, size, size))).float()


def copied(folder: Path, place: Path, **config: object) -> Path:
    """A copy of a folder, with another configuration."""
    shutil.copytree(folder, place)
    path = place / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return place


@pytest.mark.parametrize(("name", "classes", "channels"), [("vit", 10, 1), ("convnext", 2, 3)])
def test_logits_are_those_of_the_library(
    name: str, classes: int, channels: int, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModelForImageClassification

    folder = request.getfixturevalue(name)
    made = entry(folder)
    assert (made.classes, made.takes()) == (classes, channels)
    network = AutoModelForImageClassification.from_pretrained(folder, local_files_only=True).eval()
    shown = images(channels)
    with torch.no_grad():
        expected = network(made.preprocess(shown)).logits
    assert torch.allclose(made.loaded(Limits()).logits(shown), expected, atol=1e-6)


def test_both_conform(vit: Path, convnext: Path) -> None:
    testing.check_checkpoint(entry(vit), (1, 32, 32))
    testing.check_checkpoint(entry(convnext), (3, 32, 32))


def test_its_last_layer_is_found(vit: Path) -> None:
    assert entry(vit).loaded(Limits()).last(images(1)).name == "model.classifier"


@pytest.mark.parametrize("kind", PLAIN)
def test_preprocess_shows_the_network_the_library_s_pixels(kind: str) -> None:
    """The library rounds a picture of 8 bits after resizing rows and again after columns; half a level each."""
    import transformers

    sizes = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    if kind in ("ViT", "DeiT", "Beit", "Siglip", "Segformer", "Pvt"):
        sizes = {**sizes, "size": {"height": 40, "width": 40}}
    processor = getattr(transformers, f"{kind}ImageProcessor")(**sizes, image_mean=[0.2, 0.4, 0.6])
    fields = json.loads(processor.to_json_string())
    pixels = (rng.uniform(rng.key("pixels"), range(1), (90, 90, 3))[0] * 256).astype(np.uint8)
    expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    preprocess = Preprocess(**stated(fields, "preprocessor_config.json"))
    found = preprocess(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0]
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1.5 / 255 / min(preprocess.std)


def test_of_a_crop_that_is_left_out_the_library_s_default_counts() -> None:
    """Old files leave out what is the default of their processor."""
    import transformers

    for kind in PLAIN:
        fields = json.loads(getattr(transformers, f"{kind}ImageProcessor")().to_json_string())
        kept = {key: value for key, value in fields.items() if key != "do_center_crop"}
        assert stated(kept, "p") == stated(fields, "p")
        old = {**kept, "feature_extractor_type": f"{kind}FeatureExtractor", "image_processor_type": None}
        assert stated(old, "p") == stated(fields, "p")


PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2,
    "image_mean": [0.5], "image_std": [0.5],
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_processor_type": "LevitImageProcessor"}, "LevitImageProcessor, which is none that rdiff knows"),
        ({"image_processor_type": None}, "image processor None"),
        ({"do_flip_channel_order": True}, "has do_flip_channel_order"),
        ({"do_pad": True}, "has do_pad"),
        ({"rescale_factor": 1 / 127.5}, "does not scale pixels by 1/255"),
        ({"do_rescale": False}, "does not scale pixels by 1/255"),
        ({"resample": 0}, "has resample: 0, and needed is 2"),
        ({"resample": [2]}, "has resample"),
        ({"size": {"height": 32, "width": 40}}, "has no square size"),
        ({"size": {"height": [], "width": {}}}, "has no square size"),
        ({"size": True}, "has no square size"),
        ({"do_center_crop": True}, "has no square crop_size"),
        ({"image_mean": None}, "has no image_mean and image_std"),
        ({"image_std": ["a"]}, "has no image_mean and image_std"),
        ({"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0}, "has crop_pct: 0"),
    ],
)
def test_processors_that_are_not_understood_are_refused(fields: dict[str, object], message: str) -> None:
    assert stated(PROCESSOR, "here") == {"interpolation": "bilinear", "size": 32, "mean": [0.5], "std": [0.5]}
    with pytest.raises(ValueError, match=f"^here .*{message}.*; write preprocess out"):
        stated(PROCESSOR | fields, "here")


def test_identity_is_the_configuration_and_the_weights(vit: Path, tmp_path: Path) -> None:
    before = entry(vit).fingerprint
    assert entry(copied(vit, tmp_path / "same"), id="other").fingerprint != before  # config.json is formatted anew
    shutil.copytree(vit, tmp_path / "moved")
    assert entry(tmp_path / "moved").fingerprint == before
    (tmp_path / "moved" / "README.md").write_text("# A card")
    assert entry(tmp_path / "moved").fingerprint == before


def test_shards_and_plain_pickles_are_the_same_network(vit: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    expected = entry(vit).loaded(Limits()).logits(images(1))
    network = AutoModelForImageClassification.from_pretrained(vit, local_files_only=True)
    saved(network, tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    pickled = copied(vit, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(network.state_dict(), pickled / "pytorch_model.bin")
    for folder in (tmp_path / "shards", pickled):
        found = entry(folder, preprocess={"size": 32, "mean": [0.5], "std": [0.25], "interpolation": "bilinear"})
        assert torch.equal(found.loaded(Limits()).logits(images(1)), expected), folder.name


class Bomb:
    """What calls a function when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("it ran",)


def test_no_pickle_is_run(vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(vit, tmp_path / "bomb")
    (folder / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"needs builtins.print"):
        entry(folder).load()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "brings code of its own .auto_map., which is not run"),
        ({"_attn_implementation": "evil/kernel"}, "has _attn_implementation, which takes code or weights from elsewh"),
        ({"backbone_config": {"quantization_config": {}}}, "has quantization_config, which takes code"),
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "timm_wrapper"}, "is a network of timm; use kind timm"),
        ({"model_type": None, "architecture": "resnet18"}, "is a network of timm; use kind timm"),
        ({"model_type": "bert"}, "no image classifier of model_type bert"),
        ({"model_type": "no-such-thing"}, "no-such-thing"),
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers: 1000000000; needed are at most 1000"),
        ({"hidden_size": 2**20}, "states a network of [0-9,]{13,} numbers, and the weights are"),
        ({"hidden_size": 16}, "weights do not fit its config.json: classifier.weight is .10, 8., not .10, 16.; .*more"),
        ({"num_hidden_layers": 2}, "weights do not fit its config.json: missing .*layer.* and [0-9]+ more"),
        ({"num_hidden_layers": 0}, "weights do not fit its config.json: unexpected .*layer.* and [0-9]+ more"),
        ({"hidden_act": "nothing"}, "cannot be loaded by transformers: KeyError: 'nothing'"),
        ({"hidden_size": "x"}, "cannot be loaded by transformers: .*hidden_size"),
        ({"id2label": None, "num_labels": "x"}, "has no number of labels; write classes out"),
    ],
)
def test_wrong_configurations_are_one_line(
    config: dict[str, object], message: str, vit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copied(vit, tmp_path / "bad", **config)
    with pytest.raises(ValueError, match=message) as caught:
        entry(folder, **({} if "num_labels" in config else {"classes": 10})).load()
    assert "\n" not in str(caught.value) or "validation error" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_wrong_files_are_one_line(vit: Path, tmp_path: Path) -> None:
    folder = copied(vit, tmp_path / "bad")
    whole = load_file(folder / "model.safetensors")
    save_file(whole | {"classifier.bias": torch.full((10,), float("nan"))}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds numbers that are not finite .*, under classifier.bias"):
        entry(folder).load()
    (folder / "model.safetensors").write_bytes((vit / "model.safetensors").read_bytes()[:99])
    with pytest.raises(ValueError, match=r"is cut off|damaged or cut off"):
        entry(folder).check()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors; write it with model.save_pretrained\(folder\)"):
        entry(folder).check()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../vit/model.safetensors"}}))
    with pytest.raises(ValueError, match="which is no safetensors file of the folder"):
        entry(folder).check()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config.json; write preprocess out"):
        entry(folder)
    for content in ("", "[]", "[" * 10**5):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config.json is no (JSON|mapping)"):
            entry(folder, preprocess={})


def test_nothing_is_fetched_and_the_library_is_left_as_it_was(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a folder is loaded the hub is out of reach, whatever its configuration makes the library ask for."""
    import transformers
    from huggingface_hub import constants

    seen = []
    kind = transformers.ViTForImageClassification
    plain = kind.from_pretrained

    def watched(*args: object, **more: object) -> object:
        seen.append(constants.is_offline_mode())
        return plain(*args, **more)

    monkeypatch.setattr(kind, "from_pretrained", watched)
    before = constants.HF_HUB_OFFLINE, transformers.utils.logging.get_verbosity()
    entry(vit).load()
    assert seen == [True]
    assert before == (constants.HF_HUB_OFFLINE, transformers.utils.logging.get_verbosity())


def test_what_is_not_installed_is_named(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers, which is not installed; pip install '.*\[hf\]'"):
        entry(vit).check()


def test_three_lines_are_enough(vit: Path, rdiff: Callable[..., tuple[int, str, str]]) -> None:
    """No trust is needed, and `check` says what the folder is; so does a suite."""
    shutil.copytree(vit, "vit")
    Path("mine.yaml").write_text("kind: hf\nid: mine\nfolder: vit\n")
    code, out, err = rdiff("check", "mine.yaml")
    assert (code, err) == (0, "")
    for said in ("vit, of transformers", "config.json, model.safetensors", "1 channel, 32x32 after", "mean [0.5]"):
        assert said in out
    bench = {"name": "b", "evaluator": {"kind": "shift"}, "datasets": [{"kind": "mnist5k", "limit": 2}]}
    entries = [yaml.safe_load(Path("mine.yaml").read_text())]
    Path("s.yaml").write_text(yaml.safe_dump({"name": "s", "checkpoints": entries, "benches": [bench]}))
    assert rdiff("validate", "s.yaml")[0] == 0
    Path("vit", "config.json").write_text("{}")
    code, _, err = rdiff("validate", "s.yaml")
    assert code == 2 and err.count("\n") == 1 and "s.yaml:" in err and "has no model_type" in err
