"""SqueezeNet: fire modules (1x1 squeeze, then 1x1 and 3x3 expand side by side), no full layers; torchvision's network.

Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and < 0.5 MB model size",
arXiv:1602.07360, 2016. Two variants, counted for 1000 classes:

- `1_0`: the paper's net (its Table 1): 1,248,424 parameters.
- `1_1`: smaller kernels and earlier pooling, 2.4 times less arithmetic, by the same authors: 1,235,496 parameters.

An adapter, not a copy: the network is torchvision's, whose state dicts load into it unchanged. The paper reports 57.5 %
top-1 and 80.3 % top-5 on ImageNet; torchvision's weights (58.1 and 58.2 % top-1) are theirs, not ours.

One thing is a choice here: the paper and torchvision end in a ReLU, so that no logit can be negative. A fresh output
layer then gets no gradient from a class whose logits start below 0, so `final_relu: false` is for transfer. It has no
parameters: weights load either way.
"""

from __future__ import annotations

from typing import Literal, Self

import torchvision
from pydantic import Field, model_validator
from torch import nn

from pipeline.models._contract import Classifier, ClassifierConfig
from pipeline.models._layers import check_size, take_channels

SMALLEST = {"1_0": 21, "1_1": 17}


class Config(ClassifierConfig):
    """SqueezeNet.

    Attributes:
        variant: see the module.
        dropout: before the output layer.
        final_relu: whether the logits pass a ReLU, see the module.
        input: at least 21 pixels a side (17 for `1_1`).
    """

    name: Literal["squeezenet"] = "squeezenet"
    variant: Literal["1_0", "1_1"] = "1_0"
    dropout: float = Field(default=0.5, ge=0, lt=1)
    final_relu: bool = True

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        check_size(f"squeezenet's variant '{self.variant}'", self.input, SMALLEST[self.variant])
        return self


def build(config: Config) -> Classifier:
    """A freshly initialised SqueezeNet."""
    network = torchvision.models.SqueezeNet(config.variant, config.num_classes, config.dropout)
    take_channels(network, "features.0", len(config.input.mean))
    if not config.final_relu:
        network.classifier[2] = nn.Identity()
    return Classifier(config.input, network)
