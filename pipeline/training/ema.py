"""The exponential moving average of a model's weights, which is often better than the last weights.

After each step `average += (weights - average) * (1 - decay)`. The decay grows from 0.18 to the configured one as
min(decay, (1 + n) / (10 + n)) with the number n of updates, so that short runs do not end with their first weights.

Running statistics of normalisations are averaged like weights: those of the model belong to its last weights, not to
the averaged ones. Whole numbers (counters) are copied.
"""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Strict

ModelT = TypeVar("ModelT", bound=nn.Module)


class Config(Strict):
    """How long the average remembers.

    Attributes:
        decay: share of the average that stays in one step; 0.999 remembers about 1,000 steps.
        warmup: let the decay grow from small values in the first steps.
    """

    decay: float = Field(default=0.9998, gt=0, lt=1)
    warmup: bool = True


class Ema(Generic[ModelT]):
    """The average of one model: `model` is a copy, in evaluation mode, to be measured and saved like any other.

    Make it after the model has its initial weights and is on its device.
    """

    def __init__(self, model: ModelT, config: Config) -> None:
        self.model: ModelT = copy.deepcopy(model).eval().requires_grad_(False)
        self.config = config
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: ModelT) -> None:
        """Take in the weights after a step."""
        self.num_updates += 1
        mine, theirs = _tensors(self.model), _tensors(model)
        for average, value in zip(mine[1], theirs[1], strict=True):
            average.copy_(value)
        torch._foreach_lerp_(mine[0], theirs[0], 1 - decay(self.config, self.num_updates))

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"num_updates": self.num_updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.num_updates = state["num_updates"]
        self.model.load_state_dict(state["model"])


def decay(config: Config, num_updates: int) -> float:
    """The share of the average that stays in the update of this number, counted from 1."""
    return min(config.decay, (1 + num_updates) / (10 + num_updates)) if config.warmup else config.decay


def _tensors(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The floating and the other tensors of a model, each in its order."""
    tensors = [*model.parameters(), *model.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
