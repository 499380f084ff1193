"""Layers and initialisations that more than one model uses, or that a paper defines and torch does not have.

Tensor to tensor, no configuration and no names of models. Whatever torch has already is taken from torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.types import InputSpec

Activation = Literal["relu", "tanh", "sigmoid"]
Pooling = Literal["max", "average"]


def activation(kind: Activation) -> nn.Module:
    """A fresh non-linearity; never in place, so that export and hooks see every value."""
    layers: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
    return layers[kind]()


def pooling(kind: Pooling, size: int, stride: int) -> nn.Module:
    """A pooling of square windows; they overlap where `stride` is smaller than `size`."""
    return nn.MaxPool2d(size, stride) if kind == "max" else nn.AvgPool2d(size, stride)


def full_layers(inputs: int, width: int, dropout: float) -> nn.Sequential:
    """The two hidden full layers of AlexNet, [B, inputs] -> [B, width], each behind its dropout."""
    sides = ((inputs, width), (width, width))
    return nn.Sequential(*(layer for side in sides for layer in (nn.Dropout(dropout), nn.Linear(*side), nn.ReLU())))


class ScaledTanh(nn.Module):
    """`1.7159 tanh(2x/3)`, so that f(1) = 1 and f(-1) = -1, where its curvature is largest (LeCun 1998, appendix A)."""

    def forward(self, x: Tensor) -> Tensor:
        """Squash any shape into (-1.7159, 1.7159)."""
        return 1.7159 * torch.tanh(x * (2 / 3))


class Subsampling(nn.Module):
    """The sum of each 2x2 window, times one trainable coefficient per map, plus one bias per map.

    LeCun 1998, II.B, layer S2. The squashing that follows it is a layer of its own.
    """

    def __init__(self, num_maps: int) -> None:
        super().__init__()
        self.coefficient = nn.Parameter(torch.empty(num_maps, 1, 1))
        self.bias = nn.Parameter(torch.empty(num_maps, 1, 1))
        for weight in (self.coefficient, self.bias):
            lecun_uniform(weight, fan_in=4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H // 2, W // 2]."""
        return 4 * F.avg_pool2d(x, 2) * self.coefficient + self.bias


class PartialConv2d(nn.Module):
    """A convolution in which each output map sees only some of the input maps.

    Only the kernels of existing connections are stored: `weight` [connections, K, K], ordered by output map, then by
    input map, and `bias` [output maps].

    Args:
        table: for each output map, the input maps that it sees, ascending.
        num_inputs: number of input maps.
        size: height and width of the kernels.
    """

    scatter: Tensor

    def __init__(self, table: Sequence[Sequence[int]], num_inputs: int, size: int) -> None:
        super().__init__()
        self.shape = (len(table), num_inputs, size, size)
        links = [(row, column) for row, columns in enumerate(table) for column in columns]
        self.weight = nn.Parameter(torch.empty(len(links), size, size))
        self.bias = nn.Parameter(torch.empty(len(table)))
        # Where each kernel of the dense weight comes from; the row behind the last stored kernel is zero.
        scatter = torch.full((len(table), num_inputs), len(links))
        for kernel, (row, column) in enumerate(links):
            scatter[row, column] = kernel
        self.register_buffer("scatter", scatter.flatten(), persistent=False)
        with torch.no_grad():
            for kernel, (row, _) in enumerate(links):
                lecun_uniform(self.weight[kernel], fan_in=len(table[row]) * size**2)
            for row, columns in enumerate(table):
                lecun_uniform(self.bias[row], fan_in=len(columns) * size**2)

    def dense_weight(self) -> Tensor:
        """The weight of the equal dense convolution, [outputs, inputs, K, K], zero where there is no connection."""
        padded = F.pad(self.weight, (0, 0, 0, 0, 0, 1))
        return padded.index_select(0, self.scatter).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H - K + 1, W - K + 1]."""
        return F.conv2d(x, self.dense_weight(), self.bias)


class ResponseNorm(nn.Module):
    """Local response normalisation across maps, within each tower: `a / (2 + 1e-4/5 sum a^2) ^ 0.75`.

    The sum runs over five neighbouring maps of one tower and is clipped at the tower's edges. The division of alpha by
    the window is the original code's (cuda-convnet's `layer.py`; `torch.nn.LocalResponseNorm` does it too), not the
    paper's (Krizhevsky 2012, 3.3). Squares are summed in fp32 also under autocast: they overflow fp16 beyond 255.
    """

    def __init__(self, num_towers: int = 1) -> None:
        super().__init__()
        self.num_towers = num_towers

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape and type; C is a multiple of the number of towers."""
        batch, maps, height, width = x.shape
        squares = x.float().square().reshape(batch, self.num_towers, maps // self.num_towers, height * width)
        mean = F.avg_pool2d(squares, (5, 1), stride=1, padding=(2, 0))
        divisor = (2 + 1e-4 * mean.reshape(batch, maps, height, width)).pow(0.75)
        return (x.float() / divisor).to(x.dtype)


class WithinMapNorm(nn.Module):
    """Response normalisation over the 5x5 neighbours of the same map: `a / (1 + 1e-3/25 sum a^2) ^ 0.75`.

    The layer `cnorm2` of the original AlexNet code (`layers-145.cfg`), which the paper never mentions; fp32 as above.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape and type."""
        mean = F.avg_pool2d(x.float().square(), 5, stride=1, padding=2)
        return (x.float() / (1 + 1e-3 * mean).pow(0.75)).to(x.dtype)


def lecun_uniform(weight: Tensor, fan_in: int) -> None:
    """Fill in place from the uniform distribution within +-2.4 / `fan_in` (LeCun 1998, appendix A)."""
    nn.init.uniform_(weight, -2.4 / fan_in, 2.4 / fan_in)


def lecun_init(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """Give weights and biases of a dense layer LeCun's uniform initialisation; returns the layer."""
    for weight in (layer.weight, layer.bias):
        if weight is not None:
            lecun_uniform(weight, fan_in=layer.weight[0].numel())
    return layer


def take_channels(network: nn.Module, first: str, channels: int) -> None:
    """Give the convolution called `first` another number of input channels, freshly initialised as torch does."""
    old = network.get_submodule(first)
    if not isinstance(old, nn.Conv2d):
        raise TypeError(f"expected a convolution at {first}, got {type(old).__name__}")
    if old.in_channels != channels:
        size, stride, padding = (cast(tuple[int, int], pair) for pair in (old.kernel_size, old.stride, old.padding))
        fresh = nn.Conv2d(channels, old.out_channels, size, stride, padding, bias=old.bias is not None)
        network.set_submodule(first, fresh)


def check_size(whose: str, spec: InputSpec, smallest: int) -> None:
    """Refuse images of which the poolings would leave nothing.

    Raises:
        ValueError: for validators of configurations.
    """
    if min(spec.size_hw) < smallest:
        raise ValueError(
            f"{whose} needs images of at least {smallest}x{smallest}, got input.size_hw {spec.size_hw}; the poolings "
            "would leave nothing of smaller ones"
        )
