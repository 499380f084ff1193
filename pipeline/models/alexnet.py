"""AlexNet: five convolutions and three full layers; one tower as torchvision lays it out, or the two towers of 2012.

Two variants, counted for 1000 classes at the default configuration:

- `one_tower`: 64-192-384-256-256 maps, no normalisation (Krizhevsky, "One weird trick", arXiv:1404.5997, as torchvision
  has it): 61,100,840 parameters. Sub-modules are named as torchvision's, so its state dict loads into `network`
  whatever the activation, pooling or normalisation is (batch normalisation drops the convolutions' biases).
- `two_towers`: Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NIPS
  2012: 96-256-384-384-256 maps in two groups, response normalisation, overlapping pooling: 60,965,224 parameters. Where
  the paper's text and the original code (`layers-145.cfg`, whose log ends in the paper's 40.7 / 18.2 %) differ, the
  code is followed.

The differences, and what happens here:

1. Towers: conv3 and the full layers see both towers, conv1, conv2, conv4 and conv5 their own. Text and code agree. Here
   two towers are one convolution with `groups=2` (conv1 sees only the image and needs none).
2. Input: the text says 224, with which stride 4 gives no whole number. The code rounds the number of windows up: 55.
   Here zeros (the mean colour) are added to the right and below, `F.pad(x, (0, 3, 0, 3))` for 224.
3. Response normalisation runs within each tower, and the code divides alpha by the window of 5:
   `a / (2 + 1e-4/5 sum a^2) ^ 0.75`. The formula of the text would be alpha = 5e-4 in the code.
4. Order: the code normalises and pools conv1 (and pools conv5) before the ReLU; the text has ReLU after every
   convolution. Of conv2, the ReLU comes first in both.
5. After the second normalisation the code has another one, within each map, that the text never mentions
   (`within_map_norm`). The text's "-1.4 / -1.2 %" for response normalisation was measured with both gone.
6. Initialisation (`init: paper`): std 0.01 for conv1, conv2 and the full layers, 0.03 for conv3 to conv5 (text: 0.01
   everywhere); biases 1 in conv2, conv4, conv5 and the hidden full layers, 0 in conv1, conv3 and the output (text and
   code agree).
7. Schedule (left to the training configuration): rate 0.01 divided by ten at epochs 25, 51, 79; biases at twice the
   rate and without decay; conv1 slowed at 67 and frozen at 72; colour noise off from 67.
8. Colour noise (left to augmentation): the code adds 0.1 of it and divides by 1.1; the text does not divide.

The code subtracts the mean image from pixels 0..255 and divides by nothing; the initialisation and the constants of
the normalisation are meant for that scale. So the two towers' default input is `std` 1/255 with ImageNet's mean colour
(the mean image is left out); one tower has ImageNet's mean and std. Dropout comes before the two hidden full layers in
torchvision's net and behind them in that of 2012.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal, NamedTuple, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.models._contract import Classifier, ClassifierConfig
from pipeline.models._layers import Activation, Pooling, ResponseNorm, WithinMapNorm, activation, pooling
from pipeline.types import InputSpec

INPUT_2012 = InputSpec(size_hw=(224, 224), resize_short=256, std=(1 / 255, 1 / 255, 1 / 255))


class Stage(NamedTuple):
    """One convolution and what follows it."""

    maps: int
    size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    response_norm: bool = False
    within_map_norm: bool = False
    pool: bool = False
    activate_last: bool = False


ONE_TOWER = (
    Stage(64, 11, stride=4, padding=2, response_norm=True, pool=True),
    Stage(192, 5, padding=2, response_norm=True, within_map_norm=True, pool=True),
    Stage(384, 3, padding=1),
    Stage(256, 3, padding=1),
    Stage(256, 3, padding=1, pool=True),
)
TWO_TOWERS = (
    Stage(96, 11, stride=4, response_norm=True, pool=True, activate_last=True),
    Stage(256, 5, padding=2, groups=2, response_norm=True, within_map_norm=True, pool=True),
    Stage(384, 3, padding=1),
    Stage(384, 3, padding=1, groups=2),
    Stage(256, 3, padding=1, groups=2, pool=True, activate_last=True),
)


class Config(ClassifierConfig):
    """AlexNet.

    Attributes:
        variant: `one_tower` or `two_towers`, see the module.
        dropout: share of hidden units dropped in training.
        activation: of all hidden layers.
        pooling: of the three poolings.
        overlapping: windows of 3 at stride 2; otherwise windows of 2 at stride 2. Both give the same sizes at 224.
        norm: `lrn` after conv1 and conv2, `batch` after every convolution (which then has no bias), or `none`. Default:
            `lrn` for two towers, `none` for one.
        within_map_norm: the second normalisation after conv2. Default: with two towers and `lrn`.
        init: `torch` (its defaults), `paper` (point 6 of the module) or `kaiming` (normal, fan-out; full
            layers N(0, 0.01); biases 0). Default:
            `paper` for two towers, `torch` for one.
        fc_features: width of the two hidden full layers.
        input: at least 63 pixels a side (64 with two towers; 35 and 36 without overlap), in 1 or 3 channels. Sizes
            other than 224 are averaged to the 6x6 maps that the full layers expect.
    """

    name: Literal["alexnet"] = "alexnet"
    variant: Literal["one_tower", "two_towers"] = "one_tower"
    dropout: float = Field(default=0.5, ge=0, lt=1)
    activation: Activation = "relu"
    pooling: Pooling = "max"
    overlapping: bool = True
    norm: Literal["none", "lrn", "batch"] | None = None
    within_map_norm: bool | None = None
    init: Literal["torch", "paper", "kaiming"] | None = None
    fc_features: int = Field(default=4096, ge=1)

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        two_towers = self.variant == "two_towers"
        self.fill(norm="lrn" if two_towers else "none", init="paper" if two_towers else "torch")
        self.fill(within_map_norm=two_towers and self.norm == "lrn")
        if two_towers:
            self.fill(input=INPUT_2012)
        smallest = _smallest_input(self)
        if min(self.input.size_hw) < smallest:
            raise ValueError(
                f"alexnet's variant '{self.variant}' needs images of at least {smallest}x{smallest}, got input.size_hw "
                f"{self.input.size_hw}; the poolings would leave nothing of smaller ones"
            )
        return self


class AlexNet(nn.Module):
    """The network proper: normalised float32 [B, C, H, W] -> logits [B, num_classes]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.features = nn.Sequential(OrderedDict(_features(config)))
        self.avgpool = nn.AdaptiveAvgPool2d(6)  # the identity at 224
        self.classifier = _full_layers(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, num_classes]."""
        return cast(Tensor, self.classifier(torch.flatten(self.avgpool(self.features(x)), 1)))


def build(config: Config) -> Classifier:
    """A freshly initialised AlexNet."""
    network = AlexNet(config)
    if config.init == "paper":
        _init_paper(network)
    elif config.init == "kaiming":
        _init_kaiming(network, config.activation)
    return Classifier(config.input, network)


def _stages(config: Config) -> tuple[Stage, ...]:
    return ONE_TOWER if config.variant == "one_tower" else TWO_TOWERS


def _features(config: Config) -> Iterator[tuple[str, nn.Module]]:
    """Layers with torchvision's numbers; what torchvision does not have is named, so that the numbers stay."""
    channels, number = len(config.input.mean), 0
    if config.variant == "two_towers":
        height, width = config.input.size_hw
        yield "pad", nn.ZeroPad2d((0, (11 - width) % 4, 0, (11 - height) % 4))
    for position, stage in enumerate(_stages(config), start=1):
        for layer in _stage(config, stage, channels):
            if isinstance(layer, ResponseNorm | WithinMapNorm | nn.BatchNorm2d):
                yield f"{'within' if isinstance(layer, WithinMapNorm) else 'norm'}{position}", layer
            else:
                yield str(number), layer
                number += 1
        channels = stage.maps


def _stage(config: Config, stage: Stage, channels: int) -> Iterator[nn.Module]:
    batch_norm = config.norm == "batch"
    yield nn.Conv2d(
        channels, stage.maps, stage.size, stage.stride, stage.padding, groups=stage.groups, bias=not batch_norm
    )
    if batch_norm:
        yield nn.BatchNorm2d(stage.maps)
    if not stage.activate_last:
        yield activation(config.activation)
    if stage.response_norm and config.norm == "lrn":
        yield ResponseNorm(num_towers=2 if config.variant == "two_towers" else 1)
    if stage.within_map_norm and config.within_map_norm:
        yield WithinMapNorm()
    if stage.pool:
        yield pooling(config.pooling, _pool_size(config), 2)
    if stage.activate_last:
        yield activation(config.activation)


def _full_layers(config: Config) -> nn.Sequential:
    width = config.fc_features
    before = config.variant == "one_tower"
    layers: dict[str, nn.Module | None] = {
        "0": nn.Dropout(config.dropout) if before else None,
        "1": nn.Linear(256 * 6 * 6, width),
        "2": activation(config.activation),
        "3": nn.Dropout(config.dropout),
        "4": nn.Linear(width, width),
        "5": activation(config.activation),
        "dropout": None if before else nn.Dropout(config.dropout),
        "6": nn.Linear(width, config.num_classes),
    }
    return nn.Sequential(OrderedDict((name, layer) for name, layer in layers.items() if layer is not None))


def _pool_size(config: Config) -> int:
    return 3 if config.overlapping else 2


def _smallest_input(config: Config) -> int:
    """The shortest side that leaves one pixel after the last pooling, walking the stages backwards."""
    side = 1
    for stage in reversed(_stages(config)):
        if stage.pool:
            side = (side - 1) * 2 + _pool_size(config)
        side = (side - 1) * stage.stride + stage.size - 2 * stage.padding
    return side - 3 if config.variant == "two_towers" else side  # up to three pixels are added


def _weighted(network: AlexNet) -> list[nn.Conv2d | nn.Linear]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def _init_paper(network: AlexNet) -> None:
    for position, layer in enumerate(_weighted(network), start=1):
        nn.init.normal_(layer.weight, std=0.03 if position in (3, 4, 5) else 0.01)
        if layer.bias is not None:
            nn.init.constant_(layer.bias, 1.0 if position in (2, 4, 5, 6, 7) else 0.0)


def _init_kaiming(network: AlexNet, kind: Activation) -> None:
    """Convolutions as He et al. 2015, fan-out; full layers N(0, 0.01), else the untrained loss is far above log(C)."""
    for layer in _weighted(network):
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity=kind)
        else:
            nn.init.normal_(layer.weight, std=0.01)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
