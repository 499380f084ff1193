"""Stochastic gradient descent with momentum, and how its learning rate moves: warm-up, constant, steps, cosine."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from pipeline.config import Strict

Share = Annotated[float, Field(gt=0, lt=1)]


class Config(Strict):
    """The optimiser and its schedule; the learning rate changes with every step.

    Attributes:
        lr: learning rate after warm-up, for the global batch.
        weight_decay: L2 penalty, on weight tensors only: biases and the scales of normalisation are left free.
        schedule: `constant`; `step`: times `step_factor` at each share of the run in `step_at`; `cosine`: to 0.
        warmup_epochs: epochs (a fraction is fine) in which the learning rate rises linearly from 0.
        clip_norm: largest L2 norm of the gradient of all parameters; None leaves it alone.
    """

    lr: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    step_at: tuple[Share, ...] = (1 / 3, 2 / 3)
    step_factor: float = Field(default=0.1, gt=0, lt=1)
    warmup_epochs: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.SGD:
    """The optimiser, with two groups of parameters: those that decay, and biases and scales that do not."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    free = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
    )


def learning_rate(config: Config, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of a step, counted from 0 over the whole run."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = step / (steps_per_epoch * epochs)
    if config.schedule == "step":
        return config.lr * config.step_factor ** sum(done >= at for at in config.step_at)
    if config.schedule == "cosine":
        share = (step - warmup) / max(steps_per_epoch * epochs - warmup, 1)
        return config.lr * 0.5 * (1 + math.cos(math.pi * share))
    return config.lr
