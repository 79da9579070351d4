"""Every example of docs/kinds.md is loaded, and its tables are true."""

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import robustbench_diffaug.torchvision_guard  # noqa: F401  (before timm and transformers)
from robustbench_diffaug import rng
from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.timm_model import build
from robustbench_diffaug.component import Component, find, is_built_in, kinds
from robustbench_diffaug.diffusion.base import Denoiser
from robustbench_diffaug.suite import entries

PAGE = (Path(__file__).parent.parent / "docs" / "kinds.md").read_text()
SMALLER = {
    "resnet18": "test_efficientnet",
    "resnet50": "squeezenet1_1",
    "preprocess: torchvision": "preprocess: {size: 32}",
    'mnist5k-ddpm"': 'mnist5k-ddpm", microbatch: 16',
}
"""In place of the page's networks and batches, since they are quick."""
CODE = """
import torch

def build(classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(classes)).eval()

class Shrinking(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, sigma):
        return self.scale * x / (1 + sigma[:, None, None, None] ** 2)

def denoiser():
    return Shrinking()
"""


def table(heading: str) -> dict[str, list[str]]:
    """The cells of each row of a table, by the kind in the first."""
    rows = PAGE.partition(f"| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {first.strip("`"): rest for first, *rest in cells}


def blocks() -> dict[str, str]:
    """The examples by the names of their files."""
    found = re.findall(r"```yaml\n# (\S+\.yaml)\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) == PAGE.count("```yaml") == 13
    return dict(found)


def network() -> nn.Sequential:
    with rng.seeded(rng.key("kinds")):
        made = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    made.eval()
    return made


def write_files() -> None:
    """What the examples name, in the current folder."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from torchvision import models
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
    from transformers.utils import logging

    state = network().state_dict()
    example = torch.zeros(2, 1, 32, 32)
    with rng.seeded(0):
        torch.save(build("test_efficientnet", (), 1, 10).state_dict(), "mine.pth")
        torch.save(models.squeezenet1_1(num_classes=10).state_dict(), "published.pth")
        config = ViTConfig(
            num_hidden_layers=1, num_attention_heads=2, hidden_size=8, intermediate_size=8, image_size=32,
            patch_size=16, num_channels=1, num_labels=10,
        )  # fmt: skip
        logging.disable_progress_bar()
        ViTForImageClassification(config).save_pretrained("vit")
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5]).save_pretrained("vit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, by which such files are made
        torch.jit.save(torch.jit.trace(network(), example), "scripted.pt")
    rows = torch.export.Dim("rows", min=1)
    torch.export.save(torch.export.export(network(), (example,), dynamic_shapes=({0: rows},)), "program.pt2")
    nodes = [helper.make_node("Flatten", ["x"], ["z"]), helper.make_node("Gemm", ["z", "w", "b"], ["y"], transB=1)]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 32, 32])
    taken = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])
    held = [numpy_helper.from_array(state[name].numpy(), short) for short, name in (("w", "1.weight"), ("b", "1.bias"))]
    graph = helper.make_graph(nodes, "g", [given], [taken], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "net.onnx")
    Path("net.py").write_text(CODE.replace("LazyLinear(", "Linear(1024, "))
    save_file(network().state_dict(), "ours.safetensors")
    place = Path("models", "cifar10", "corruptions")
    place.mkdir(parents=True)
    torch.save({}, place / "Hendrycks2020AugMix_ResNeXt.pt")
    save_file({"scale": torch.ones(1)}, "edm.safetensors")
    save_file({"a": torch.ones(1)}, "256x256_diffusion_uncond.pt")


@pytest.fixture
def robustbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of that name, which returns the network whatever it is asked for."""
    (tmp_path / "site" / "robustbench").mkdir(parents=True)
    code = "from net import build\n\ndef load_model(**fields):\n    return build(10)\n"
    (tmp_path / "site" / "robustbench" / "utils.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("robustbench", "robustbench.utils", "net"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("robustbench")
def test_every_example_loads_and_trust_is_needed_where_the_tables_say(
    rdiff: Callable[..., tuple[int, str, str]],
) -> None:
    """All go through `rdiff check` but adm, whose weights are only looked at, and the mixtures, of 8 pixels a side."""
    write_files()
    checkpoints, denoisers = table("checkpoint"), table("denoiser")
    seen = set()
    for file, block in blocks().items():
        for old, new in SMALLER.items():
            block = block.replace(old, new)
        Path(file).write_text(block + "microbatch: 16\n")
        kind, *inner = re.findall(r"kind: (\w+)", block)
        row = denoisers[inner[0]] if inner else checkpoints[kind]
        seen.add((inner[0] if inner else kind, bool(inner)))
        if (inner[0] if inner else kind) in ("adm", "mixture"):
            (entry,) = entries(Path(file)).values()
            entry.check()
            continue
        code, _, err = rdiff("check", file)
        if row[-1] == "yes":
            assert (code, err.count("\n")) == (2, 1) and "add --trust" in err, file
            code, _, err = rdiff("check", file, "--trust")
        assert code == 0, err
    shown = {(kind, False) for kind in checkpoints} | {(kind, True) for kind in denoisers}
    assert shown - seen == {("denoiser", False), ("module", False)}  # the first is shown with each denoiser


@pytest.mark.parametrize(("family", "heading"), [(Checkpoint, "checkpoint"), (Denoiser, "denoiser")])
def test_the_tables_say_what_the_classes_do(family: type[Component], heading: str) -> None:
    rows = table(heading)
    assert set(rows) == {name for name, point in kinds(family).items() if is_built_in(point)}
    for kind, row in rows.items():
        found = find(family, kind)
        said = [found.runs_code]
        if issubclass(found, Checkpoint):
            said = [found.differentiable, found.layered, found.runs_code]
        assert [cell == "yes" for cell in row[-len(said) :]] == said, kind
