"""Several processes that train one network, started by torchrun: each has its share of every batch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from robustbench_diffaug.train.synced import synced

__all__ = ["Place", "agreed", "averaged", "barrier", "joined", "wrapped"]

PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MEETING = ("MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(hours=1)
"""At the end all wait while process 0 measures the accuracy."""


@dataclass(frozen=True)
class Place:
    """Which of several processes this is.

    Arguments:
        rank: From 0, among all.
        world: How many there are.
        local: From 0, among those of this machine; the number of its GPU.
    """

    rank: int = 0
    world: int = 1
    local: int = 0


@contextmanager
def joined(device: str) -> Iterator[tuple[Place, str]]:
    """Within it, under torchrun, the processes can reach each other; without torchrun it changes nothing.

    Once in the life of a process, since torchrun's meeting place is not cleared.

    Arguments:
        device: 'cpu' or 'cuda[:N]'; each process gets the GPU of its own number.

    Raises:
        ValueError: If the environment is torchrun's by half, a GPU is missing, or the processes do not meet.
    """
    place = _place()
    if place is None:
        yield Place(), device
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        there = torch.cuda.device_count()
        if place.local >= there:
            cure = f"start torchrun with --nproc_per_node {there} or less" if there else "train on the device cpu"
            raise ValueError(f"process {place.local} of this machine has no GPU, there are {there}; {cure}")
        device = f"cuda:{place.local}"
        torch.cuda.set_device(place.local)
    try:
        distributed.init_process_group(
            "nccl" if cuda else "gloo", timeout=PATIENCE, rank=place.rank, world_size=place.world
        )
    except (RuntimeError, ValueError) as error:
        where = ":".join(os.environ[name] for name in MEETING)
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the {place.world} processes do not meet at {where}: {reason}") from error
    try:
        yield place, device
    finally:
        distributed.destroy_process_group()


def _place() -> Place | None:
    """What torchrun says in the environment, if it started this process."""
    if not any(name in os.environ for name in PLACES):
        return None
    missing = [name for name in PLACES + MEETING if name not in os.environ]
    if missing:
        given = ", ".join(name for name in PLACES if name in os.environ)
        raise ValueError(f"{given} is set and {', '.join(missing)} is not; start with torchrun, or unset {given}")
    found = {name: os.environ[name] for name in PLACES}
    stated = ", ".join(f"{name}={value}" for name, value in found.items())
    if not all(value.isascii() and value.isdigit() for value in found.values()):
        raise ValueError(f"{stated}: needed are whole numbers, as torchrun sets them")
    place = Place(*(int(found[name]) for name in PLACES))
    if not place.local <= place.rank < place.world:
        raise ValueError(f"{stated}: needed is LOCAL_RANK <= RANK < WORLD_SIZE, as torchrun sets them")
    return place


def wrapped(network: nn.Module, place: Place, device: str) -> nn.Module:
    """The network with gradients averaged and BatchNorm's statistics taken over all processes.

    Its losses must be means over equal shares of the batch; then an update is that of one process with all of it.

    Arguments:
        network: On the device. Its BatchNorm layers are changed in place, the names of its state are not; the weights
            of process 0 replace those of the others.
        place: Which process this is; where there is one, the network is given back as it is.
        device: 'cpu' or 'cuda:N'.

    Raises:
        ValueError: If a kind of BatchNorm is not known.

    References:
        PyTorch Distributed: Experiences on Accelerating Data Parallel Training (Li et al., 2020),
        https://arxiv.org/abs/2006.15704
    """
    if place.world == 1:
        return network
    network = synced(network, device)
    index = [place.local] if torch.device(device).type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=index)


def averaged(terms: dict[str, Tensor], place: Place) -> dict[str, float]:
    """Means over all processes, for the log; not finite where one process' is not.

    Arguments:
        terms: Single numbers, under the same names in the same order in all processes.
        place: Which process this is.
    """
    if not terms:
        return {}
    values = torch.stack([value.detach().double() for value in terms.values()])
    if place.world > 1:
        distributed.all_reduce(values)
    return dict(zip(terms, (values / place.world).tolist(), strict=True))


def agreed(ok: bool, place: Place) -> bool:
    """Whether all processes are fine; all must ask, so that all stop together."""
    if place.world == 1:
        return ok
    answer = torch.tensor(float(ok), device=_reachable(place))
    distributed.all_reduce(answer, distributed.ReduceOp.MIN)
    return bool(answer)


def barrier(place: Place) -> None:
    """Waits until all processes are here."""
    if place.world > 1:
        distributed.barrier(device_ids=[place.local] if _reachable(place) != "cpu" else None)


def _reachable(place: Place) -> str:
    """The device whose tensors the processes can exchange."""
    return f"cuda:{place.local}" if distributed.get_backend() == "nccl" else "cpu"
