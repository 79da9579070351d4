"""Image classifiers saved by Hugging Face's transformers: a folder with config.json and model.safetensors."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256 as hashed
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import TypeAdapter, model_validator
from torch import Tensor, nn

from robustbench_diffaug.checkpoints.base import Checkpoint
from robustbench_diffaug.checkpoints.image_processors import PREPROCESSOR, stated
from robustbench_diffaug.files import Location, Weights, existing, sha256
from robustbench_diffaug.state import read_state

__all__ = ["HuggingFace"]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
LABELS = ("id2label", "label2id")
ELSEWHERE = (
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
    *("quantization_config", "fusion_config", "backbone", "use_timm_backbone", "use_pretrained_backbone"),
)
"""Keys of config.json by which transformers takes kernels or weights from another place than the folder."""
DEEPEST = 1000
"""Layers: a configuration that asks for more is damaged or hostile, and building them would take forever."""
_location: TypeAdapter[str] = TypeAdapter(Location)


class HuggingFace(Checkpoint):
    """A local folder of transformers' `save_pretrained`; nothing is downloaded, and no code of the folder runs.

    Left out, `classes` are those of `config.json`, and `preprocess` (or the word `hf`) that of
    `preprocessor_config.json`; both are written out in the value. The identity covers `config.json` and the weights.

    Arguments:
        folder: Its path.

    References:
        Transformers: State-of-the-Art Natural Language Processing (Wolf et al., 2020), https://arxiv.org/abs/1910.03771
    """

    kind: Literal["hf"] = "hf"
    may_normalise: ClassVar[bool] = False
    folder: Location

    @model_validator(mode="before")
    @classmethod
    def _stated(cls, data: Any, info: Any) -> Any:
        """Puts what the folder states in place of what was left out."""
        if not isinstance(data, Mapping) or not isinstance(data.get("folder"), str):
            return data
        found = dict(data)
        uri = _location.validate_python(found["folder"], context=info.context)
        if "classes" not in found:
            found["classes"] = _classes(uri)
        if found.get("preprocess", "hf") == "hf":
            found["preprocess"] = _preprocess(uri)
        return found

    def contents(self) -> str:
        """SHA-256 over the digests of `config.json` and of all files of weights."""
        root = existing(self.folder)
        files = [existing(str(root / CONFIG)), *_weights(self.folder)]
        return hashed("".join(map(sha256, files)).encode()).hexdigest()

    def check(self) -> None:
        """Looks at the configuration, the files of weights, and whether transformers is there."""
        _config(self.folder)
        for path in _weights(self.folder):
            Weights(uri=str(path)).check()
        _transformers()

    def takes(self) -> int | None:
        """The channels that `config.json` states, else as many as `preprocess` has means."""
        stated_ones = _config(self.folder).get("num_channels")
        return stated_ones if isinstance(stated_ones, int) and stated_ones > 0 else Checkpoint.takes(self)

    def about(self) -> tuple[tuple[str, str], ...]:
        """The sort of network, the files of its weights, and the digest of all."""
        files = ", ".join(path.name for path in _weights(self.folder))
        sort = f"{_config(self.folder)['model_type']}, of transformers {_transformers().__version__}"
        return (("model", sort), ("files", f"{CONFIG}, {files}"), ("sha256", f"{self.contents()}, of both"))

    def load(self) -> nn.Module:
        """The network with its weights; every key must fit."""
        self.check()
        state: dict[str, Tensor] = {}
        for path in _weights(self.folder):  # transformers sees none of these files, so their names cannot mislead it
            state |= read_state(Weights(uri=str(path))).tensors
        wrong = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
        if wrong:
            raise ValueError(
                f"{self.folder} holds numbers that are not finite (NaN or infinite), under {wrong[0][:80]}"
            )
        return _Logits(_built(self.folder, state))


class _Logits(nn.Module):
    """A model of transformers from images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """The `logits` of the model's answer."""
        logits: Tensor = self.model(pixel_values=images, return_dict=True).logits
        return logits


def _built(folder: str, state: dict[str, Tensor]) -> nn.Module:
    """What transformers makes of a folder, once nothing is missing, left over or of another shape."""
    transformers = _transformers()
    root = str(existing(folder))
    try:
        with _alone(transformers):
            config = transformers.AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
            sort = _sort(transformers, config)
            with torch.device("meta"):
                needed = _size(sort(config))
            held = sum(value.numel() for value in state.values())
            if needed > 2 * held + 2**20:  # before memory is taken for it
                raise ValueError(f"it states a network of {needed:,} numbers, and the weights are {held:,}")
            network, loading = sort.from_pretrained(
                None, config=config, state_dict=state, output_loading_info=True, dtype="float32",
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # whatever transformers raises
        line = " ".join(str(error).split())
        sort_of = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{folder} cannot be loaded by transformers: {sort_of}{line[:300]}") from error
    odd = [f"missing {name}" for name in sorted(loading["missing_keys"])]
    odd += [f"unexpected {name[:80]}" for name in sorted(loading["unexpected_keys"])]
    odd += [f"{each[0]} is {tuple(each[1])}, not {tuple(each[2])}" for each in sorted(loading["mismatched_keys"])]
    odd += [" ".join(str(each).split())[:160] for each in loading.get("error_msgs") or ()]
    if odd:
        more_of = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ValueError(f"{folder}: its weights do not fit its config.json: {'; '.join(odd[:3])}{more_of}")
    model: nn.Module = network
    return model


def _sort(transformers: Any, config: Any) -> Any:
    """The class of image classifiers of a configuration: the one that it names, else the first."""
    mapping = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if type(config) not in mapping:
        raise ValueError(f"transformers has no image classifier of model_type {config.model_type}")
    found = mapping[type(config)]
    sorts = found if isinstance(found, list | tuple) else (found,)
    named = config.architectures or ()
    return next((sort for sort in sorts if sort.__name__ in named), sorts[0])


def _size(network: nn.Module) -> int:
    return sum(value.numel() for values in (network.parameters(), network.buffers()) for value in values)


def _transformers() -> Any:
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip

    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "kind hf needs transformers, which is not installed; pip install 'robustbench-diffaug[hf]'"
        ) from error
    return transformers


@contextmanager
def _alone(transformers: Any) -> Iterator[None]:
    """Without the network, whatever the configuration asks for, and without bars and words of transformers."""
    from huggingface_hub import constants

    logging = transformers.utils.logging
    level, bars, offline = logging.get_verbosity(), logging.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE
    logging.set_verbosity(logging.CRITICAL)  # its complaints are read from what it returns
    logging.disable_progress_bar()
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _json(folder: str, name: str) -> dict[str, Any]:
    path = existing(str(existing(folder) / name))
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is no JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no mapping")
    return found


def _config(folder: str) -> dict[str, Any]:
    """The configuration, once it is clear that it describes a network that lies in the folder alone."""
    config = _json(folder, CONFIG)
    if "auto_map" in config:
        raise ValueError(
            f"{folder} brings code of its own (auto_map), which is not run; give its network as kind local"
        )
    model = config.get("model_type")
    if model == "timm_wrapper" or (model is None and "architecture" in config):
        raise ValueError(f"{folder} is a network of timm; use kind timm, with the folder's {SINGLE} as weights")
    if not isinstance(model, str):
        raise ValueError(f"{folder}/{CONFIG} has no model_type; needed is a folder of save_pretrained")
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        key, value = waiting.pop()
        if key in ELSEWHERE and value not in (None, False, "eager", "sdpa"):  # the two are torch's own
            raise ValueError(f"{folder}/{CONFIG} has {key}, which takes code or weights from elsewhere; leave it out")
        if isinstance(value, dict):
            waiting += [(name, part) for name, part in value.items() if name not in LABELS]
        elif isinstance(value, list):
            waiting += [(key, part) for part in value]
        elif isinstance(value, int) and value > DEEPEST and any(word in key for word in ("layer", "depth", "block")):
            raise ValueError(f"{folder}/{CONFIG} has {key}: {value}; needed are at most {DEEPEST}")
    return config


def _classes(folder: str) -> int:
    config = _config(folder)
    named = config.get("id2label")
    count = len(named) if isinstance(named, dict) and named else config.get("num_labels", 2)  # 2 is transformers'
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{folder}/{CONFIG} has no number of labels; write classes out")
    return count


def _weights(folder: str) -> list[Path]:
    """The files of weights, the shards in the order of their names."""
    root = existing(folder)
    if (root / SINGLE).is_file():
        return [root / SINGLE]
    if (root / INDEX).is_file():
        named = _json(folder, INDEX).get("weight_map")
        shards = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
        for name in shards:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{folder}/{INDEX} names {name[:200]!r}, which is no safetensors file of the folder")
        if shards:
            return [existing(str(root / name)) for name in shards]
    if (root / PICKLE).is_file():
        return [root / PICKLE]
    raise ValueError(f"{folder} has no {SINGLE}; write it with model.save_pretrained(folder)")


def _preprocess(folder: str) -> dict[str, Any]:
    if not (existing(folder) / PREPROCESSOR).is_file():
        raise ValueError(f"{folder} has no {PREPROCESSOR}; write preprocess out, with size, mean and std")
    return stated(_json(folder, PREPROCESSOR), f"{folder}/{PREPROCESSOR}")
