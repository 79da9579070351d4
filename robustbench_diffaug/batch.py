"""What passes through the engine: limits, a batch of images, a view of it; and networks called in one shape.

Images are `[0, 1]`, and `sigma` is the standard deviation of noise in the same units, everywhere.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from robustbench_diffaug import device_noise, rng
from robustbench_diffaug.prefetch import ahead

__all__ = ["Batch", "Columns", "Limits", "View", "fixed_shape"]

Columns: TypeAlias = Mapping[str, Shaped[Tensor, "b ..."]]
"""Named per-sample values; the first axis is the sample."""


@dataclass(frozen=True)
class Limits:
    """How much at a time and where; never changes what is recorded.

    Arguments:
        batch: Samples read together.
        budget: Images that an evaluator may hold at once.
        device: 'cpu', 'cuda' or 'cuda:N'.
        compile: Whether networks go through torch.compile, which rounds in its own ways, as another device does.
    """

    batch: int = 64
    budget: int = 512
    device: str = "cpu"
    compile: bool = False

    @property
    def noise(self) -> Literal["host", "device"]:
        """Where normals are made: on a GPU those of the host to 1e-6, without the way there."""
        return "device" if self.device.startswith("cuda") else "host"


@dataclass(frozen=True)
class Batch:
    """Some samples of one dataset.

    Arguments:
        dataset: The dataset's name.
        ids: Stable names of the samples, not positions.
        images: In [0, 1].
        labels: The class, -1 for none.
        seed: The suite's seed.
        limits: How much at a time and where.
        classes: The classes that the dataset's images can be of, increasing, where they are not all; empty for all.
        class_space: Whether the dataset declares that predictions are among those ('subset') or all ('full').
    """

    dataset: str
    ids: tuple[str, ...]
    images: Float[Tensor, "b c h w"]
    labels: Int[Tensor, " b"]
    seed: int
    limits: Limits
    classes: tuple[int, ...] = ()
    class_space: str = "subset"

    def noise(self, stream: str, draws: range) -> Iterator[Float[Tensor, "b d c h w"]]:
        """Standard normal draws of each sample, in chunks of at most `limits.budget` images.

        A draw is a function of (seed, stream, dataset, sample id, index) and of nothing else: not of the checkpoint,
        the batch, the chunk or the process. A GPU's normals are the host's to 1e-6.
        """
        yield from self.noises([(stream, draws)])

    def noises(self, streams: Iterable[tuple[str, range]]) -> Iterator[Float[Tensor, "b d c h w"]]:
        """The draws of several streams one after another, as `noise` gives them.

        The next chunk, which may be of the next stream, is made while this one is used, where there is a thread to
        spare: at one thread a process the other cores are other processes', and a GPU makes its own.
        """
        step = max(1, self.limits.budget // len(self.ids))
        chunks = [
            (stream, range(start, min(start + step, draws.stop)))
            for stream, draws in streams
            for start in range(draws.start, draws.stop, step)
        ]
        made = (self._normal(*chunk) for chunk in chunks)
        spare = self.limits.noise == "host" and torch.get_num_threads() > 1
        yield from ahead(made) if spare and len(chunks) > 1 else made

    def _normal(self, stream: str, draws: range) -> Float[Tensor, "b d c h w"]:
        keys, shape, device = self._keys(stream), tuple(self.images.shape[1:]), self.images.device
        if self.limits.noise == "device":
            return device_noise.normal(keys, draws, shape, device)
        values = np.empty((len(keys), len(draws), *shape), np.float32)
        for key, part in zip(keys, values, strict=True):
            rng.normal(key, draws, shape, out=part)
        return torch.from_numpy(values).to(device)

    def uniform(self, stream: str, draw: int = 0) -> Float[Tensor, " b"]:
        """One uniform on (0, 1) of each sample, float64."""
        values = np.array([rng.uniform(key, range(draw, draw + 1), (1,))[0, 0] for key in self._keys(stream)])
        return torch.from_numpy(values).to(self.images.device)

    def _keys(self, stream: str) -> list[int]:
        return [rng.key(self.seed, stream, self.dataset, id) for id in self.ids]


@dataclass(frozen=True)
class View:
    """Images to show to every checkpoint.

    Arguments:
        name: 'clean', 't=50', 'draws', ...
        images: `d` draws of each sample, in [0, 1]; a plain view has one.
        first: The number of the first draw, where a sequence of them is shown in several views of one name.
        sigma: The noise level of each image, for networks that want it.
        denoised: The denoised twin of each image, for networks that want it.
    """

    name: str
    images: Float[Tensor, "b d c h w"]
    first: int = 0
    sigma: Float[Tensor, "b d"] | None = None
    denoised: Float[Tensor, "b d c h w"] | None = None


def fixed_shape(
    network: Callable[[Float[Tensor, "size ..."]], Float[Tensor, "size ..."]], inputs: Float[Tensor, "n ..."], size: int
) -> Float[Tensor, "n ..."]:
    """Calls a network on `size` rows at a time, the last chunk padded with zeros.

    A row of a batch is not bitwise the row alone in PyTorch: kernels are chosen by shape. In one shape it is, so no
    result depends on the rows beside it.
    """
    outputs = []
    for chunk in torch.split(inputs, size):
        missing = size - len(chunk)
        padded = torch.cat([chunk, chunk.new_zeros(missing, *chunk.shape[1:])]) if missing else chunk
        outputs.append(network(padded)[: len(chunk)])
    return torch.cat(outputs)
