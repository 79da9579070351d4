"""Kind onnx against the same network in torch."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from robustbench_diffaug import rng, testing
from robustbench_diffaug.batch import Limits
from robustbench_diffaug.checkpoints.onnx_model import Onnx


def network(channels: int = 1) -> nn.Sequential:
    with rng.seeded(rng.key("onnx")):
        made = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    return made.requires_grad_(False)


def model(
    rows: int | str = "n",
    side: int | str = "h",
    channels: int = 1,
    dtype: int = TensorProto.FLOAT,
    outputs: tuple[str, ...] = ("logits",),
) -> Any:
    """The network as an ONNX file states it, of images of 8 pixels high and wide."""
    numbers = helper.tensor_dtype_to_np_dtype(dtype)
    state = {name: value.numpy().astype(numbers) for name, value in network(channels).state_dict().items()}
    nodes = [
        helper.make_node("Conv", ["images", "0.weight", "0.bias"], ["convolved"]),
        helper.make_node("Relu", ["convolved"], ["rectified"]),
        helper.make_node("Flatten", ["rectified"], ["features"]),
        helper.make_node("Gemm", ["features", "3.weight", "3.bias"], ["logits"], transB=1),
    ]
    sizes: dict[str, list[int | str | None]] = {"logits": ["m", 4], "features": ["m", 144]}
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("images", dtype, [rows, channels, side, side])],
        [helper.make_tensor_value_info(name, dtype, sizes[name]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in state.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def entry(path: Path, **fields: object) -> Onnx:
    return Onnx.model_validate({"id": "o", "classes": 4, "weights": str(path), "microbatch": 5} | fields)


def images(channels: int = 1) -> Tensor:
    return torch.from_numpy(rng.uniform(rng.key("images"), range(7), (channels, 8, 8))).float()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(model(), str(tmp_path / "net.onnx"))
    return tmp_path / "net.onnx"


@pytest.mark.parametrize("rows", ["n", 3, 5])
def test_logits_are_those_of_the_network(rows: int | str, tmp_path: Path) -> None:
    """Also of a file for a fixed number of images, more or fewer than `microbatch`."""
    onnx.save(model(rows), str(tmp_path / "net.onnx"))
    found = entry(tmp_path / "net.onnx").loaded(Limits()).logits(images())
    assert torch.allclose(found, network()(images()), atol=1e-5)


def test_a_file_of_half_precision(tmp_path: Path) -> None:
    onnx.save(model(dtype=TensorProto.FLOAT16), str(tmp_path / "net.onnx"))
    found = entry(tmp_path / "net.onnx").loaded(Limits()).logits(images())
    assert found.dtype == torch.float32 and torch.allclose(found, network()(images()), atol=1e-2)
    assert not torch.allclose(found, network()(images()), atol=1e-7)


def test_conforms(tmp_path: Path) -> None:
    onnx.save(model(3), str(tmp_path / "net.onnx"))
    testing.check_checkpoint(entry(tmp_path / "net.onnx"), (1, 8, 8))


def test_external_data_is_read_and_part_of_the_identity(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(model(), str(path), save_as_external_data=True, location="net.data", size_threshold=0)
    found = entry(path)
    assert torch.allclose(found.loaded(Limits()).logits(images()), network()(images()), atol=1e-5)
    before = found.fingerprint
    content = bytearray((tmp_path / "net.data").read_bytes())
    content[3] ^= 1
    (tmp_path / "net.data").write_bytes(content)
    assert found.fingerprint != before
    (tmp_path / "net.data").unlink()
    with pytest.raises(ValueError, match=r"has its weights in the file net.data, which is not beside it; copy it"):
        found.check()


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link"])
@pytest.mark.parametrize("within", ["graph", "node"])
def test_no_file_outside_the_folder_is_read(location: str, within: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(4096))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    made = model()
    tensor = made.graph.initializer[0]
    if within == "node":
        made.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))
        tensor = made.graph.node[-1].attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (folder / "net.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(ValueError, match="which lies outside its folder; it is not read"):
        entry(folder / "net.onnx").check()


def test_outputs_are_chosen_by_name(tmp_path: Path) -> None:
    onnx.save(model(outputs=("features", "logits")), str(tmp_path / "net.onnx"))
    with pytest.raises(ValueError, match="has the outputs features, logits; say by `output: NAME` which"):
        entry(tmp_path / "net.onnx").check()
    with pytest.raises(ValueError, match="has no output 'logit'; did you mean logits"):
        entry(tmp_path / "net.onnx", output="logit").check()
    found = entry(tmp_path / "net.onnx", output="logits").loaded(Limits()).logits(images())
    assert torch.allclose(found, network()(images()), atol=1e-5)


def test_channels_and_size_are_those_of_the_file(tmp_path: Path) -> None:
    """Grey images are shown three times over, and `fits` says what to write."""
    onnx.save(model(side=8, channels=3), str(tmp_path / "net.onnx"))
    found = entry(tmp_path / "net.onnx")
    assert found.takes() == 3
    grey = found.loaded(Limits()).logits(images())
    assert torch.allclose(grey, network(3)(images().expand(-1, 3, -1, -1)), atol=1e-5)
    found.fits(8, 8)
    with pytest.raises(ValueError, match=r"takes images of 8x8, and is given 9x7; write preprocess: .size: 8."):
        found.fits(7, 9)
    entry(tmp_path / "net.onnx", preprocess={"size": 8}).fits(7, 9)
    with pytest.raises(ValueError, match=r"takes images of 3x8x8 \(channels, height, width\), and is given 3x9x9"):
        found.loaded(Limits()).logits(torch.zeros(2, 3, 9, 9))


def test_what_does_not_fit_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="gives 4 logits, not 5; correct `classes`"):
        entry(path, classes=5).check()
    with pytest.raises(ValueError, match="an ONNX file has its own precision; leave precision out"):
        entry(path, precision="bfloat16")
    with pytest.raises(ValueError, match=r"cannot be run on images of \(5, 1, 9, 9\): ") as caught:
        entry(path).loaded(Limits()).logits(torch.zeros(2, 1, 9, 9))
    assert "\n" not in str(caught.value)
    made = model()
    made.graph.input[0].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 8, 8, 3]))
    path.write_bytes(made.SerializeToString())
    with pytest.raises(
        ValueError, match=r"takes images as \(n, height, width, channels\)|cannot be run by onnxruntime"
    ):
        entry(path).check()


def test_damaged_files_are_one_line(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 2], np.arange(99).tobytes()):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ValueError, match="is no ONNX file, or is cut off") as caught:
            entry(tmp_path / "bad.onnx").check()
        assert "\n" not in str(caught.value)
    made = model()
    made.graph.node[1].op_type = "Relo"
    (tmp_path / "bad.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(ValueError, match=r"cannot be run by onnxruntime: .*Relo") as caught:
        entry(tmp_path / "bad.onnx").check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_what_is_not_installed_is_named(missing: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustbench_diffaug.checkpoints import onnx_model

    onnx_model._named.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"needs {missing}, which is not installed; pip install '.*\[onnx\]'"):
        entry(path).check()


def suite(evaluator: dict[str, object], *groups: str) -> str:
    datasets = [{"kind": "mixture", "limit": 3, "name": f"d-{group}", "group": group} for group in groups]
    checkpoint = {"kind": "onnx", "id": "o", "classes": 4, "weights": "net.onnx", "microbatch": 5}
    bench = {"name": "b", "evaluator": evaluator, "datasets": datasets}
    return yaml.safe_dump({"name": "s", "checkpoints": [checkpoint], "benches": [bench]})


def test_a_suite_runs_and_gradients_are_refused(path: Path, rdiff: Callable[..., tuple[int, str, str]]) -> None:
    """Evaluators that need no gradients run; the others are refused by `validate`, in one line."""
    Path("s.yaml").write_text(suite({"kind": "shift"}, "clean"))
    code, _, err = rdiff("run", "s.yaml", "-q")
    assert code == 0, err
    assert "\no," in Path("reports/s/leaderboard.csv").read_text()
    for kind, word in (("gradients", "gradients"), ("ood", "the features of the last layer")):
        Path("s.yaml").write_text(
            suite({"kind": kind}, *(("id", "near", "fit", "val") if kind == "ood" else ("clean",)))
        )
        code, _, err = rdiff("validate", "s.yaml")
        assert code == 2 and err.count("\n") == 1, err
        assert f"evaluator {kind} needs {word}, and checkpoint o of kind onnx has none" in err
    Path("s.yaml").write_text(suite({"kind": "ood", "features": False}, "id", "near", "fit", "val"))
    assert rdiff("validate", "s.yaml")[0] == 0
