"""Classifiers without their heads, as detectors use them: maps of one or more strides, under the classifiers' names.

All but `plain` are torchvision's and keep its names, so that the weights of a trained classifier load into the part of
a detector that is called `Detector.backbone`. What lies behind the last map is left out, so that nothing is unused.

Where a cell of a map lies in the picture depends on padding. AlexNet and SqueezeNet were made to classify and pad
little: cell 0 of torchvision's AlexNet is centred at pixel 15.5, at a stride of 16. `padded` gives every window half
its size of padding, as Fast R-CNN's own AlexNet had (Girshick 2015, its `CaffeNet` definitions): then cell i of any
map is centred at pixel i times its stride, half a pixel beside. Weights fit as before. Networks whose poolings have
windows of 2 (VGG) need nothing: their cells are centred in the squares that they stand for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torchvision
from torch import Tensor, nn

from pipeline.models._layers import take_channels

Name = Literal[
    "plain",
    "alexnet",
    "vgg16",
    "squeezenet1_0",
    "squeezenet1_1",
    "resnet18",
    "resnet34",
    "resnet50",
    "mobilenet_v3_large",
]


class Tap(NamedTuple):
    """A map that a backbone gives: behind which layer, how many channels, and pixels from one cell to the next."""

    layer: str
    channels: int
    stride: int


PLAIN = ((16, 2), (32, 2), (64, 2), (64, 1), (128, 2), (128, 1), (128, 2), (128, 1))
"""Maps and stride of each 3x3 convolution of `plain`: 577,808 parameters, for small pictures and no weights at all."""
TAPS: dict[Name, tuple[Tap, ...]] = {
    "plain": (Tap("features.3", 64, 8), Tap("features.5", 128, 16), Tap("features.7", 128, 32)),
    "alexnet": (Tap("features.4", 192, 8), Tap("features.11", 256, 16)),
    "vgg16": (Tap("features.22", 512, 8), Tap("features.29", 512, 16)),
    "squeezenet1_0": (Tap("features.5", 256, 4), Tap("features.10", 512, 8), Tap("features.12", 512, 16)),
    "squeezenet1_1": (Tap("features.4", 128, 4), Tap("features.7", 256, 8), Tap("features.12", 512, 16)),
    "resnet18": (Tap("layer2", 128, 8), Tap("layer3", 256, 16), Tap("layer4", 512, 32)),
    "resnet34": (Tap("layer2", 128, 8), Tap("layer3", 256, 16), Tap("layer4", 512, 32)),
    "resnet50": (Tap("layer2", 512, 8), Tap("layer3", 1024, 16), Tap("layer4", 2048, 32)),
    "mobilenet_v3_large": (Tap("features.6", 40, 8), Tap("features.12", 112, 16), Tap("features.16", 960, 32)),
}
"""Of each network, the last map of each stride from 4 or 8 on."""
_FIRST = {
    "plain": "features.0.0",
    "resnet18": "conv1",
    "resnet34": "conv1",
    "resnet50": "conv1",
    "mobilenet_v3_large": "features.0.0",
}


class Backbone(nn.Module):
    """The layers of a classifier up to the last of some maps.

    Attributes:
        taps: what `forward` gives, from the finest map on.
    """

    def __init__(self, network: nn.Module, taps: tuple[Tap, ...]) -> None:
        super().__init__()
        self.taps = taps
        last = taps[-1].layer
        for name, child in network.named_children():
            self.add_module(name, child)
            if last == name:
                break
            if last.startswith(f"{name}."):
                self.add_module(name, nn.Sequential(*[*child.children()][: int(last.rpartition(".")[2]) + 1]))
                break

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps float32 [B, channels, H / stride, W / stride] of normalised [B, C, H, W], rounded up (VGG: down)."""
        found: list[Tensor] = []
        wanted = {tap.layer for tap in self.taps}
        for name, layer in self._layers():
            x = layer(x)
            if name in wanted:
                found.append(x)
        return found

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        for name, child in self.named_children():
            if name == "features":
                yield from ((f"{name}.{number}", layer) for number, layer in child.named_children())
            else:
                yield name, child


def build(name: Name, channels: int = 3, taps: tuple[Tap, ...] | None = None) -> Backbone:
    """A freshly initialised backbone.

    Args:
        channels: of the normalised pictures.
        taps: of `TAPS`, from the finest on; None: the last one only.
    """
    network = _plain() if name == "plain" else getattr(torchvision.models, name)()
    take_channels(network, _FIRST.get(name, "features.0"), channels)
    backbone = Backbone(network, taps or TAPS[name][-1:])
    if name in ("alexnet", "squeezenet1_0", "squeezenet1_1"):
        padded(backbone)
    return backbone


def normed(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (over the stride), its normalisation, and SiLU."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.SiLU())


def _plain() -> nn.Module:
    inputs = (3, *(maps for maps, _ in PLAIN))
    layers = (normed(channels, maps, 3, stride) for channels, (maps, stride) in zip(inputs, PLAIN, strict=False))
    return nn.Sequential(OrderedDict(features=nn.Sequential(*layers)))


def padded(network: nn.Module) -> None:
    """Pad every window by half its size, see the module; sides are then divided and rounded up."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding = tuple(size // 2 for size in layer.kernel_size)
        elif isinstance(layer, nn.MaxPool2d):
            assert isinstance(layer.kernel_size, int)
            layer.padding, layer.ceil_mode = layer.kernel_size // 2, False
