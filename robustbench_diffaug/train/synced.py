"""BatchNorm whose statistics are those of the samples of all processes."""

from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["synced"]


def synced(network: nn.Module, device: str) -> nn.Module:
    """The network with the statistics of its BatchNorm layers taken over all processes while it is trained.

    Parameters, buffers and the names of both stay as they are. On GPUs the layers become torch's SyncBatchNorm, in
    place; elsewhere, where that refuses to work, the forward of each layer is replaced.

    Arguments:
        network: Any network; in evaluation it computes what it did.
        device: 'cpu' or 'cuda[:N]'.

    Raises:
        ValueError: If a subclass of BatchNorm is not known, since what else it does would be lost.

    References:
        Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift (Ioffe and
        Szegedy, 2015), https://arxiv.org/abs/1502.03167
    """
    import robustbench_diffaug.torchvision_guard  # noqa: F401  # isort: skip
    from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm

    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    for layer in layers:
        if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d):
            raise ValueError(
                f"{type(layer).__name__} cannot be synchronised; train in one process, or with another norm_layer"
            )
    if torch.device(device).type == "cuda":
        # Not torch's own, which would lose the activation of BatchNormAct2d.
        converted: nn.Module = convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        return converted
    for layer in layers:
        forward = _forward_act if isinstance(layer, BatchNormAct2d) else _forward
        layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]  # keeps the layer and its names
    return network


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient, as each process' loss depends on each process' samples.

    torch's own of this kind is deprecated, and what it names instead is private.
    """

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(context, gradient)


def _summed(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total


def _forward(layer: _BatchNorm, images: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *space"]:
    """(x - mean) / sqrt(var + eps) * weight + bias, with the mean and variance of all processes' samples."""
    if not layer.training:
        return type(layer).forward(layer, images)
    wide = images if images.dtype == torch.float64 else images.float()
    others = [axis for axis in range(images.ndim) if axis != 1]
    shape = (1, -1, *[1] * (images.ndim - 2))
    count = wide.new_tensor([images.numel() / images.shape[1]])
    sums = _summed(torch.cat([wide.sum(others), count]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = wide - mean.view(shape)
    # A second exchange, since the difference of E[x^2] and E[x]^2 would lose digits.
    variance = _summed(centred.square().sum(others)) / count
    _track(layer, mean.detach(), variance.detach() * count / (count - 1))
    scale = (variance + layer.eps).rsqrt()
    if layer.affine:
        scale = scale * layer.weight
    result = centred * scale.view(shape)
    if layer.affine:
        result = result + layer.bias.view(shape)
    return result.to(images.dtype)


def _forward_act(layer: Any, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    if not layer.training:
        return type(layer).forward(layer, images)  # type: ignore[no-any-return]  # timm has no annotations
    result: Tensor = layer.act(layer.drop(_forward(layer, images)))
    return result


@torch.no_grad()
def _track(layer: _BatchNorm, mean: Float[Tensor, " c"], variance: Float[Tensor, " c"]) -> None:
    """Moves the running statistics, as torch does: by `momentum`, or to the mean of all where that is None."""
    if not layer.track_running_stats:
        return
    assert layer.num_batches_tracked is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.num_batches_tracked.add_(1)
    share = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share)
    layer.running_var.lerp_(variance.to(layer.running_var.dtype), share)
