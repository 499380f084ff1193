"""ZFNet: AlexNet with a smaller, denser first layer, as found by looking at what its features see.

Zeiler, Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 (arXiv:1311.2901), figure 3. Counted
for 1000 classes: 62,357,608 parameters.

Against AlexNet: conv1 has 7x7 windows at stride 2 instead of 11x11 at stride 4, conv2 a stride of 2, there is one
tower, and each of the first two poolings comes before its "contrast normalisation across feature maps". Maps at 224:
110, 55, 26, 13, 13, 13, 13, 6, as in the figure, for which conv1 is padded by one pixel and poolings round up.

Differences from the paper:

1. The contrast normalisation is AlexNet's response normalisation over five maps; the paper gives no constants.
2. The paper scales every filter whose RMS exceeds 0.1 back to 0.1 during training, against a few dominating filters of
   conv1. Left out.
3. It subtracts the mean image from pixels 0..255 and divides by nothing; here the mean colour (`input.std` of 1/255).
4. Schedule (left to the training configuration): batch 128, rate 0.01, momentum 0.9, dropout 0.5, the rate lowered by
   hand when the validation error stalls, 70 epochs; crops of 224 from the centre square of 256, mirrored.

The paper's figures on ImageNet 2012's validation set: one net 38.3 % top-1 and 16.4 % top-5 error, its replication of
AlexNet 40.5 and 18.1 %.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import nn

from pipeline.models._contract import Classifier, ClassifierConfig
from pipeline.models._layers import ResponseNorm, check_size
from pipeline.types import InputSpec


class Config(ClassifierConfig):
    """ZFNet.

    Attributes:
        norm: `lrn` after the first two poolings, `batch` after every convolution (which then has no bias), or `none`.
        dropout: behind the two hidden full layers.
        init: `paper`: N(0, 0.01), biases 0; `kaiming`: convolutions as He et al. 2015, fan-out, full layers as `paper`.
            Default: `kaiming` with batch normalisation, else `paper`.
        fc_features: width of the two hidden full layers.
        input: at least 47 pixels a side. Sizes other than 224 are averaged to the 6x6 maps of the full layers.
    """

    name: Literal["zfnet"] = "zfnet"
    input: InputSpec = InputSpec(size_hw=(224, 224), resize_short=256, std=(1 / 255, 1 / 255, 1 / 255))
    norm: Literal["lrn", "batch", "none"] = "lrn"
    dropout: float = Field(default=0.5, ge=0, lt=1)
    init: Literal["paper", "kaiming"] | None = None
    fc_features: int = Field(default=4096, ge=1)

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        self.fill(init="kaiming" if self.norm == "batch" else "paper")
        check_size("zfnet", self.input, 47)
        return self


def build(config: Config) -> Classifier:
    """A freshly initialised ZFNet."""
    width = config.fc_features
    features = [
        *_stage(config, nn.Conv2d(len(config.input.mean), 96, 7, stride=2, padding=1), pool=True, normed=True),
        *_stage(config, nn.Conv2d(96, 256, 5, stride=2), pool=True, normed=True),
        *_stage(config, nn.Conv2d(256, 384, 3, padding=1)),
        *_stage(config, nn.Conv2d(384, 384, 3, padding=1)),
        *_stage(config, nn.Conv2d(384, 256, 3, padding=1), pool=True),
    ]
    classifier = [
        *(nn.Linear(256 * 6 * 6, width), nn.ReLU(), nn.Dropout(config.dropout)),
        *(nn.Linear(width, width), nn.ReLU(), nn.Dropout(config.dropout)),
        nn.Linear(width, config.num_classes),
    ]
    parts = {
        "features": nn.Sequential(*features),
        "avgpool": nn.AdaptiveAvgPool2d(6),  # the identity at 224
        "flatten": nn.Flatten(),
        "classifier": nn.Sequential(*classifier),
    }
    network = nn.Sequential(OrderedDict(parts))
    _initialise(network, kaiming=config.init == "kaiming")
    return Classifier(config.input, network)


def _stage(config: Config, conv: nn.Conv2d, *, pool: bool = False, normed: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = [conv, nn.ReLU()]
    if config.norm == "batch":
        conv.bias = None
        layers.insert(1, nn.BatchNorm2d(conv.out_channels))
    if pool:
        layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
    if normed and config.norm == "lrn":
        layers.append(ResponseNorm())
    return layers


def _initialise(network: nn.Module, *, kaiming: bool) -> None:
    for layer in network.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if kaiming and isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.normal_(layer.weight, std=0.01)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
