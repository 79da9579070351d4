"""The ResNet-18 for CIFAR-10 that the wheel of pyautoattack has weights of, by the names of its file.

References:
    Deep Residual Learning for Image Recognition (He et al., 2015), https://arxiv.org/abs/1512.03385
"""

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional


def convolution(inputs: int, outputs: int, side: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, bias=False)


class Block(nn.Module):
    """Two convolutions and what they are added to."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = convolution(outputs, outputs, 3, 1), nn.BatchNorm2d(outputs)
        changes = stride > 1 or inputs != outputs
        self.shortcut = nn.Sequential(
            *((convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)) if changes else ())
        )

    def forward(self, images: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(images)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(images))


def resnet18() -> nn.Module:
    widths = (64, 64, 128, 256, 512)
    stages = {
        f"layer{place}": nn.Sequential(Block(before, width, min(place, 2)), Block(width, width, 1))
        for place, (before, width) in enumerate(pairwise(widths), 1)
    }
    stem = {"conv1": convolution(3, 64, 3, 1), "bn1": nn.BatchNorm2d(64), "relu": nn.ReLU()}
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "linear": nn.Linear(512, 10)}
    return nn.Sequential(OrderedDict({**stem, **stages, **head}))
