"""VGG: 3x3 convolutions in five stages and three full layers, of 11 to 19 layers; torchvision's layers and names.

Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015: the nets A (11
layers), B (13), D (16) and E (19) of its Table 1. Counted for 1000 classes, the default of 16 layers has 138,357,544
parameters.

The convolutional part is made by torchvision, the sub-modules are named as its own: its state dicts load unchanged,
with and without batch normalisation. Differences from the paper: the initialisation is He et al.'s (2015), where the
paper began the deep nets from trained shallow ones; batch normalisation did not exist. Inputs of other sizes than 224
are averaged to the 7x7 maps that the full layers expect.

The paper's figures on ImageNet's validation set, one net D at one scale (Table 3): 27.0 % top-1 and 8.8 % top-5 error
at best; torchvision's weights reach 71.592 and 90.382 % accuracy (theirs, not ours).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import nn
from torchvision.models import vgg

from pipeline.models._contract import Classifier, ClassifierConfig
from pipeline.models._layers import check_size, take_channels

TABLE_1 = {11: "A", 13: "B", 16: "D", 19: "E"}


class Config(ClassifierConfig):
    """VGG.

    Attributes:
        depth: layers with weights.
        batch_norm: after every convolution.
        dropout: behind the two hidden full layers.
        fc_features: width of these.
        input: at least 32 pixels a side.
    """

    name: Literal["vgg"] = "vgg"
    depth: Literal[11, 13, 16, 19] = 16
    batch_norm: bool = False
    dropout: float = Field(default=0.5, ge=0, lt=1)
    fc_features: int = Field(default=4096, ge=1)

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        check_size("vgg", self.input, 32)
        return self


def build(config: Config) -> Classifier:
    """A freshly initialised VGG."""
    features = vgg.make_layers(vgg.cfgs[TABLE_1[config.depth]], config.batch_norm)
    take_channels(features, "0", len(config.input.mean))
    parts = {
        "features": features,
        "avgpool": nn.AdaptiveAvgPool2d(7),  # the identity at 224
        "flatten": nn.Flatten(),
        "classifier": _full_layers(config),
    }
    network = nn.Sequential(OrderedDict(parts))
    _initialise(network)
    return Classifier(config.input, network)


def _full_layers(config: Config) -> nn.Sequential:
    width = config.fc_features
    return nn.Sequential(
        nn.Linear(512 * 7 * 7, width),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(width, config.num_classes),
    )


def _initialise(network: nn.Module) -> None:
    """Convolutions as He et al. 2015, fan-out; full layers N(0, 0.01); biases 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
