"""LeNet-1: four maps of 5x5, subsampling, twelve maps of 5x5, subsampling, ten outputs, on 28x28 grey pixels.

LeCun et al., "Handwritten Digit Recognition with a Back-Propagation Network", NIPS 1989 (printed 1990). Two variants,
counted for 10 classes:

- `modern`: every H3 map sees all four H2 maps, pooling has no parameters: 3,246 parameters.
- `1990`: the paper's net. H3 sees one or two H2 maps (its Table 1, 20 of 48 connections), subsampling is trainable, the
  squashing is a scaled tanh, weights start uniform in +-2.4 / fan-in: 2,578 parameters. Together with the layer sizes
  they give the 98,442 connections that the paper prints; the tests count both.

Left out: the paper's output units (tanh trained on +-1 by squared error); both variants end in logits and are trained
by cross-entropy. The paper put 16x16 digits into the 28x28 plane; MNIST's are 20x20.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, Self, cast

from pydantic import Field, model_validator
from torch import nn

from pipeline.models._contract import Classifier, ClassifierConfig
from pipeline.models._layers import (
    Activation,
    PartialConv2d,
    Pooling,
    ScaledTanh,
    Subsampling,
    activation,
    lecun_init,
    pooling,
)
from pipeline.types import InputSpec

H3_TABLE = (
    *((0,), (0, 1), (0, 1), (1,), (0, 1), (0, 1)),
    *((2,), (2, 3), (2, 3), (3,), (2, 3), (2, 3)),
)
"""Table 1 of the paper: for each of the twelve H3 maps, the H2 maps that it sees. Two almost independent halves."""


class Config(ClassifierConfig):
    """LeNet-1.

    Attributes:
        variant: `modern` or `1990`, see the module.
        activation: of the modern variant (default relu); the 1990 net has its own.
        pooling: of the modern variant (default max); the 1990 net has its own.
        input: 28x28, one mean and one std (default: those of MNIST).
    """

    name: Literal["lenet1"] = "lenet1"
    num_classes: int = Field(default=10, ge=2)
    input: InputSpec = InputSpec(size_hw=(28, 28), mean=(0.1307,), std=(0.3081,))
    variant: Literal["modern", "1990"] = "modern"
    activation: Activation | None = None
    pooling: Pooling | None = None

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        if self.input.size_hw != (28, 28) or len(self.input.mean) != 1:
            raise ValueError(
                f"lenet1 takes grey images of 28x28, got input.size_hw {self.input.size_hw} and "
                f"{len(self.input.mean)} input.mean values; leave input out or give one mean and one std"
            )
        if self.variant == "modern":
            self.fill(activation="relu", pooling="max")
        elif self.activation or self.pooling:
            raise ValueError("activation and pooling belong to lenet1's variant 'modern'; remove them for '1990'")
        return self


def build(config: Config) -> Classifier:
    """A freshly initialised LeNet-1."""
    network = _modern(config) if config.variant == "modern" else _of_1990(config.num_classes)
    return Classifier(config.input, network)


def _modern(config: Config) -> nn.Module:
    kind, pool = cast(Activation, config.activation), cast(Pooling, config.pooling)
    layers: dict[str, nn.Module] = {
        "h1": nn.Conv2d(1, 4, 5),
        "squash1": activation(kind),
        "h2": pooling(pool, 2, 2),
        "h3": nn.Conv2d(4, 12, 5),
        "squash3": activation(kind),
        "h4": pooling(pool, 2, 2),
        "flatten": nn.Flatten(),
        "output": nn.Linear(192, config.num_classes),
    }
    return nn.Sequential(OrderedDict(layers))


def _of_1990(num_classes: int) -> nn.Module:
    layers: dict[str, nn.Module] = {
        "h1": lecun_init(nn.Conv2d(1, 4, 5)),
        "squash1": ScaledTanh(),
        "h2": Subsampling(4),
        "squash2": ScaledTanh(),
        "h3": PartialConv2d(H3_TABLE, num_inputs=4, size=5),
        "squash3": ScaledTanh(),
        "h4": Subsampling(12),
        "squash4": ScaledTanh(),
        "flatten": nn.Flatten(),
        "output": lecun_init(nn.Linear(192, num_classes)),
    }
    return nn.Sequential(OrderedDict(layers))
