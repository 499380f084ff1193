"""ResNet: residual networks of 18, 34, 50, 101 or 152 layers; torchvision's network.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016. Counted for 1000 classes, the default
of 50 layers has 25,557,032 parameters; 18 layers have 11,689,512, 34 have 21,797,672.

An adapter, not a copy: the network is torchvision's, whose state dicts load into it unchanged. From 50 layers on it
differs from the paper in one place: the stride of a bottleneck lies in its 3x3, not in its first 1x1 ("ResNet v1.5").
The paper's ten-crop top-1 errors on ImageNet's validation set are 27.88, 25.03 and 22.85 % for 18, 34 and 50 layers.
"""

from __future__ import annotations

from typing import Literal

import torchvision

from pipeline.models._contract import Classifier, ClassifierConfig
from pipeline.models._layers import take_channels


class Config(ClassifierConfig):
    """ResNet.

    Attributes:
        depth: layers with weights.
        zero_init: start each residual branch at 0, by the scale of its last normalisation (Goyal et al. 2017, section
            5.1), so that a deep net begins as a shallow one.
    """

    name: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101, 152] = 50
    zero_init: bool = False


def build(config: Config) -> Classifier:
    """A freshly initialised ResNet."""
    make = getattr(torchvision.models, f"resnet{config.depth}")
    network = make(num_classes=config.num_classes, zero_init_residual=config.zero_init)
    take_channels(network, "conv1", len(config.input.mean))
    return Classifier(config.input, network)
