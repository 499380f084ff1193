"""The optimiser, which parameters it treats how, and how the learning rate moves over a run.

Everything here is a pure function of the configuration and of how far the run is, so that a resumed run goes on
exactly, also on another number of workers. A position is counted in any one unit (steps, or draws of the dataset), as
long as `per_epoch` is in the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from pipeline.config import Strict
from pipeline.errors import ConfigError

Share = Annotated[float, Field(gt=0, lt=1)]
_LOOKED_INTO = {"", "network", "network.backbone", "network.backbone.body"}
NOTHING_TO_TRAIN = "every parameter is frozen, so there is nothing to train; freeze fewer layers"


class Config(Strict):
    """The optimiser and its schedule; the learning rate changes with every step.

    Attributes:
        optimizer: `sgd` with momentum; `adamw` (Loshchilov, Hutter 2019), whose decay is not part of the gradient.
        lr: learning rate after warm-up, for the global batch.
        reference_batch_size: the global batch that `lr` is meant for: with n times as many images a step it is n times
            `lr` (Goyal et al. 2017, section 2.1); None: `lr` is meant for whatever the batch is.
        betas: of `adamw`.
        weight_decay: L2 penalty, on weight tensors only: biases and the scales of normalisation are left free.
        bias_lr_factor: biases learn at so many times the rate; 2 in AlexNet (2012) and other nets of that time.
        layer_decay: each block of the network learns at so many times the rate of the next one, the last at the full
            rate; 1 treats all alike. For fine-tuning.
        schedule: `constant`; `step`: times `step_factor` at each share of the run in `step_at`; `plateau`: times
            `step_factor` whenever validation stalls (`pipeline.training.stopping`); after the warm-up `cosine`,
            `polynomial` and `exponential` fall from `lr` to `final` times `lr`.
        final: share of `lr` at the end.
        power: of `polynomial`; 1 is a straight line.
        warmup_epochs: epochs (a fraction is fine) in which the learning rate rises linearly.
        warmup_from: share of `lr` that the warm-up begins with.
        clip_norm: largest L2 norm of the gradient of all parameters; None leaves it alone.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    reference_batch_size: int | None = Field(default=None, ge=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: float = Field(default=5e-4, ge=0)
    bias_lr_factor: float = Field(default=1.0, gt=0)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    schedule: Literal["constant", "step", "plateau", "cosine", "polynomial", "exponential"] = "cosine"
    step_at: tuple[Share, ...] = (1 / 3, 2 / 3)
    step_factor: float = Field(default=0.1, gt=0, lt=1)
    final: float = Field(default=0.0, ge=0, le=1)
    power: float = Field(default=1.0, gt=0)
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_from: float = Field(default=0.01, ge=0, le=1)
    clip_norm: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _falls_to_something(self) -> Self:
        if self.schedule == "exponential" and self.final == 0:
            raise ValueError("an exponential never reaches 0; give final, the share of lr at the end, for example 0.01")
        return self


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimiser of every parameter that is not frozen.

    Its groups hold `lr_scale`, by which `set_learning_rate` multiplies. Build it after the model is on its device, for
    which a fused kernel is chosen.

    Raises:
        ConfigError: every parameter is frozen.
    """
    groups = _groups(model, config)
    if not groups:
        raise ConfigError(NOTHING_TO_TRAIN)
    fused = all(parameter.device.type in {"cpu", "cuda"} for parameter in model.parameters())
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)


class Momenta:
    """What an optimiser has gathered over its steps, as a checkpoint holds it.

    Decay, momentum and all else that a recipe says stay what they are when it is taken back: they are those of the
    recipe that a run goes on with.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """That of the optimiser."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take it back, without what the recipe says."""
        groups = self._optimizer.param_groups
        asked = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self._optimizer.load_state_dict(state_dict)
        for group, own in zip(self._optimizer.param_groups, asked, strict=True):
            group.update(own)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let every group learn at its own multiple of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rate(config: Config, done: float, per_epoch: float, epochs: float, drops: int = 0) -> float:
    """The learning rate at a position of the run, for a batch of the size that `lr` is meant for.

    Args:
        config: of the schedule.
        done: steps or draws that are behind us, over the whole run.
        per_epoch: steps or draws in an epoch.
        epochs: of the whole run.
        drops: how often validation has stalled, for `plateau`.
    """
    warmup, whole = config.warmup_epochs * per_epoch, per_epoch * epochs
    if done < warmup:
        return config.lr * (config.warmup_from + (1 - config.warmup_from) * done / warmup)
    if config.schedule == "step":
        return config.lr * config.step_factor ** sum(done >= at * whole for at in config.step_at)
    if config.schedule == "plateau":
        return config.lr * config.step_factor**drops
    left = 1 - min((done - warmup) / max(whole - warmup, 1e-9), 1.0)
    return config.lr * _falling(config, left)


def scaled(config: Config, global_batch_size: int) -> Config:
    """The configuration for a step of so many images over all workers: `lr` in proportion, if it has a reference."""
    if config.reference_batch_size is None:
        return config
    return config.model_copy(update={"lr": config.lr * global_batch_size / config.reference_batch_size})


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts of a network that have parameters, in their order, each with its name: what depth is counted in.

    Plain sequences are looked into, whatever else is one block: a convolution, a fire module, a residual block. A part
    whose parameters are all vectors (a normalisation) belongs to the block before it and is not listed.
    """
    return [(name, part) for name, part in _parts(model, "") if any(value.ndim > 1 for value in part.parameters())]


def _falling(config: Config, left: float) -> float:
    """The share of `lr` where a share `left` of the run, the warm-up apart, is still to come."""
    if config.schedule == "cosine":
        return config.final + (1 - config.final) * 0.5 * (1 - math.cos(math.pi * left))
    if config.schedule == "polynomial":
        return config.final + float((1 - config.final) * left**config.power)
    return float(config.final ** (1 - left)) if config.schedule == "exponential" else 1.0


def _groups(model: nn.Module, config: Config) -> list[dict[str, object]]:
    """Parameters of equal treatment together, in the network's order."""
    depths = _depths(model)
    last = max(depths.values(), default=0)

    def treatment(item: tuple[str, nn.Parameter]) -> tuple[float, float]:
        name, parameter = item
        is_bias = name.rpartition(".")[2] == "bias"
        scale = config.layer_decay ** (last - depths[name]) * (config.bias_lr_factor if is_bias else 1.0)
        return scale, 0.0 if is_bias or parameter.ndim <= 1 else config.weight_decay

    trained = [item for item in model.named_parameters() if item[1].requires_grad]
    ordered = sorted(trained, key=treatment)  # stable
    return [
        {"params": [parameter for _, parameter in items], "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), items in groupby(ordered, treatment)
    ]


def _depths(model: nn.Module) -> dict[str, int]:
    """For each parameter's name, the number of the block that it belongs to."""
    depths: dict[str, int] = {}
    depth = -1
    for name, part in _parts(model, ""):
        depth += any(value.ndim > 1 for value in part.parameters())
        depths |= {f"{name}.{key}" if name else key: max(depth, 0) for key, _ in part.named_parameters()}
    return depths


def _parts(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """What has parameters, in order: sequences, the model, its network and backbone are looked into, nothing else."""
    if next(module.parameters(), None) is None:
        return
    is_whole = next(module.parameters(recurse=False), None) is not None or next(module.children(), None) is None
    if is_whole or not (isinstance(module, nn.Sequential) or name in _LOOKED_INTO):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _parts(child, f"{name}.{key}" if name else key)
