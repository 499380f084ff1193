"""LeNet-5: two convolutions with subsampling and three full layers, on 28x28 grey pixels in a 32x32 frame.

LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 86(11), 1998.
Two variants, counted for 10 classes:

- `modern`: dense C3, parameterless pooling, logits and cross-entropy: 61,706 parameters.
- `1998`: the paper's net (section II.B): partial C3 (Table I), trainable subsampling, scaled tanh, Euclidean RBF output
  against fixed 7x12 bitmaps, loss of eq. 9; exactly 60,000 trainable parameters (C1 156, S2 12, C3 1516, S4 32,
  C5 48120, F6 10164). Only ten digits have bitmaps. The input is scaled so that background (pixel 0) is -0.1 and ink
  (pixel 255) is 1.175.

Both frame the image with background, two pixels on each side; MNIST's polarity (ink is bright) is expected.

Not the paper's: the bitmaps are drawn here (its figure 3 shows the full ASCII set, not its bits), and the constant j of
eq. 9, for which it prints no value. Left out: its second-order step sizes (an optimiser's business).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.errors import ModelError
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

C3_TABLE = (
    *((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)),
    *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
    *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5)),
    (0, 1, 2, 3, 4, 5),
)
"""Table I of the paper: for each of the sixteen C3 maps, the S2 maps that it sees."""

# Background -0.1 and ink 1.175: (0 - mean) / std and (1 - mean) / std.
INPUT_1998 = InputSpec(size_hw=(28, 28), mean=(0.1 / 1.275,), std=(1 / 1.275,))

BITMAPS = """
.......  .......  .......  .......  .......  .......  .......  .......  .......  .......
..###..  ...#...  ..###..  .#####.  ....##.  ######.  ..####.  #######  ..###..  ..###..
.#...#.  ..##...  .#...#.  #.....#  ...#.#.  #......  .#.....  ......#  .#...#.  .#...#.
#.....#  .#.#...  #.....#  ......#  ...#.#.  #......  #......  .....#.  #.....#  #.....#
#.....#  ...#...  ......#  ......#  ..#..#.  #......  #......  .....#.  #.....#  #.....#
#.....#  ...#...  ......#  .....#.  ..#..#.  #####..  #.###..  ....#..  .#...#.  #.....#
#.....#  ...#...  .....#.  ..###..  .#...#.  .....#.  ##...#.  ....#..  ..###..  .#...##
#.....#  ...#...  ....#..  .....#.  #######  ......#  #.....#  ...#...  .#...#.  ..###.#
#.....#  ...#...  ...#...  ......#  .....#.  ......#  #.....#  ...#...  #.....#  ......#
.#...#.  ...#...  ..#....  #.....#  .....#.  #....#.  .#...#.  ..#....  #.....#  .....#.
..###..  .#####.  #######  .#####.  .....#.  .####..  ..###..  ..#....  .#####.  .####..
.......  .......  .......  .......  .......  .......  .......  .......  .......  .......
"""
"""The digits 0 to 9 as 7x12 bitmaps, side by side: the targets of F6, ink +1 and background -1."""


class Config(ClassifierConfig):
    """LeNet-5.

    Attributes:
        variant: `modern` or `1998`, see the module.
        activation: of the modern variant (default relu); the 1998 net has its own.
        pooling: of the modern variant (default max); the 1998 net has its own.
        rubbish_penalty: the constant j of eq. 9, 1998 only: the penalty at which a collective "rubbish" class competes
            with the ten digits.
        input: 28x28 or 32x32 (then nothing is added), one mean and one std. Default of the modern variant: MNIST's
            0.1307 and 0.3081; of the 1998 one: the values that give -0.1 and 1.175.
    """

    name: Literal["lenet5"] = "lenet5"
    num_classes: int = Field(default=10, ge=2)
    input: InputSpec = InputSpec(size_hw=(28, 28), mean=(0.1307,), std=(0.3081,))
    variant: Literal["modern", "1998"] = "modern"
    activation: Activation | None = None
    pooling: Pooling | None = None
    rubbish_penalty: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        if self.input.size_hw not in ((28, 28), (32, 32)) or len(self.input.mean) != 1:
            raise ValueError(
                f"lenet5 takes grey images of 28x28 or 32x32, got input.size_hw {self.input.size_hw} and "
                f"{len(self.input.mean)} input.mean values; leave input out or give one mean and one std"
            )
        if self.variant == "modern":
            self.fill(activation="relu", pooling="max")
            return self
        if self.num_classes != 10:
            raise ValueError(_ten_digits(self.num_classes))
        if self.activation or self.pooling:
            raise ValueError("activation and pooling belong to lenet5's variant 'modern'; remove them for '1998'")
        self.fill(input=INPUT_1998)
        return self


class DigitClassifier(Classifier):
    """The 1998 net: outputs are negated penalties, and the loss is the paper's.

    `scores` stays the softmax of the outputs, that is of minus the penalties: the posterior that the loss implies once
    the rubbish class is left out.
    """

    def __init__(self, spec: InputSpec, network: nn.Module, rubbish_penalty: float) -> None:
        super().__init__(spec, network)
        self.rubbish_penalty = rubbish_penalty

    def loss(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """MAP criterion, eq. 9: `y_target + log(exp(-j) + sum_i exp(-y_i))`, mean over the batch.

        The penalties y are the negated outputs [B, 10]; targets int64 [B] or soft float32 [B, 10].
        """
        outputs = outputs.float()
        rubbish = outputs.new_full((len(outputs), 1), -self.rubbish_penalty)
        competition = torch.cat([outputs, rubbish], dim=1).logsumexp(dim=1)
        if targets.is_floating_point():  # linear in them, so that weighted classes weigh the whole criterion
            return {"map": (competition * targets.sum(1) - (outputs * targets).sum(1)).mean()}
        return {"map": (competition - outputs.gather(1, targets[:, None])[:, 0]).mean()}


class RadialOutput(nn.Module):
    """Minus the squared Euclidean distance of F6 to each digit's bitmap (eq. 7); the codes are fixed."""

    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", bitmap_codes())

    def forward(self, x: Tensor) -> Tensor:
        """[B, 84] -> float32 [B, 10]."""
        return -(x.float().unsqueeze(1) - self.codes).square().sum(dim=2)


def bitmap_codes() -> Tensor:
    """The target codes of the ten digits, float32 [10, 84], +1 for ink and -1 for background, row by row."""
    rows = [line.split() for line in BITMAPS.split("\n") if line]
    digits = ["".join(column) for column in zip(*rows, strict=True)]
    return torch.tensor([[1.0 if dot == "#" else -1.0 for dot in digit] for digit in digits])


def build(config: Config) -> Classifier:
    """A freshly initialised LeNet-5.

    Raises:
        ModelError: if the 1998 variant is asked for another number of classes than ten.
    """
    margin = (32 - config.input.size_hw[0]) // 2
    background = -config.input.mean[0] / config.input.std[0]
    frame = nn.ConstantPad2d(margin, background)
    if config.variant == "modern":
        return Classifier(config.input, _modern(config, frame))
    if config.num_classes != 10:  # the number of classes may have come from the shards, after validation
        raise ModelError(_ten_digits(config.num_classes))
    return DigitClassifier(config.input, _of_1998(frame), config.rubbish_penalty)


def _modern(config: Config, frame: nn.Module) -> nn.Module:
    kind, pool = cast(Activation, config.activation), cast(Pooling, config.pooling)
    layers: dict[str, nn.Module] = {
        "frame": frame,
        "c1": nn.Conv2d(1, 6, 5),
        "squash1": activation(kind),
        "s2": pooling(pool, 2, 2),
        "c3": nn.Conv2d(6, 16, 5),
        "squash3": activation(kind),
        "s4": pooling(pool, 2, 2),
        "flatten": nn.Flatten(),
        "c5": nn.Linear(400, 120),
        "squash5": activation(kind),
        "f6": nn.Linear(120, 84),
        "squash6": activation(kind),
        "output": nn.Linear(84, config.num_classes),
    }
    return nn.Sequential(OrderedDict(layers))


def _of_1998(frame: nn.Module) -> nn.Module:
    layers: dict[str, nn.Module] = {
        "frame": frame,
        "c1": lecun_init(nn.Conv2d(1, 6, 5)),
        "squash1": ScaledTanh(),
        "s2": Subsampling(6),
        "squash2": ScaledTanh(),
        "c3": PartialConv2d(C3_TABLE, num_inputs=6, size=5),
        "squash3": ScaledTanh(),
        "s4": Subsampling(16),
        "squash4": ScaledTanh(),
        "c5": lecun_init(nn.Conv2d(16, 120, 5)),
        "squash5": ScaledTanh(),
        "flatten": nn.Flatten(),
        "f6": lecun_init(nn.Linear(120, 84)),
        "squash6": ScaledTanh(),
        "output": RadialOutput(),
    }
    return nn.Sequential(OrderedDict(layers))


def _ten_digits(num_classes: int) -> str:
    return (
        f"lenet5's variant '1998' has bitmaps for the 10 digits only, got num_classes {num_classes}; "
        "use variant 'modern' for other classes"
    )
