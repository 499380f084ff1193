"""The only training loop in the house: blind to the task, to Ray and to MLflow.

It is given a model and a loader, and tells an observer about every epoch. Distributed training is
`torch.distributed`, if the caller has initialised it: gradients are averaged over ranks, metrics are summed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import models
from pipeline.batch import Batch
from pipeline.config import Strict
from pipeline.data.loading import Config as Loading
from pipeline.data.loading import Loader
from pipeline.data.transforms import classify, mixing
from pipeline.data.transforms.classify import Augment
from pipeline.data.transforms.mixing import Mixing
from pipeline.errors import ModelError
from pipeline.evaluation.live import all_reduce, autocast, evaluate
from pipeline.models._contract import Classifier
from pipeline.training import checkpoint
from pipeline.training.optim import Config as Optim
from pipeline.training.optim import build_optimizer, learning_rate


class Recipe(Strict):
    """How a model is trained.

    Attributes:
        mixing: what is mixed within a batch, on the device.
        precision: `bf16` runs the network under autocast to bfloat16, `fp32` does not.
        label_smoothing: share of each target spread evenly over all classes (Szegedy et al. 2016, section 7).
        channels_last: keep images as [B, H, W, C] in memory, which convolutions of many channels like better.
        keep_best: end with the weights of the epoch of best validation top-1, not with the last ones.
    """

    model: models.AnyModel
    loading: Loading = Loading()
    augment: Augment = Augment()
    mixing: Mixing = Mixing()
    optim: Optim = Optim()
    epochs: int = Field(default=10, ge=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    keep_best: bool = False
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class Epoch:
    """What an observer is told after each epoch.

    Attributes:
        number: epochs finished, from 1, of `total`.
        metrics: `train/loss`, `val/top1`, ..., `lr`, `images_per_s` over all ranks, `data_wait_share`.
        seconds: of training in this epoch, without validation.
    """

    number: int
    total: int
    metrics: dict[str, float]
    seconds: float


def fit(
    model: Classifier,
    loader: Loader,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    checkpoints: Path | None = None,
    observe: Callable[[Epoch], None] = lambda epoch: None,
) -> dict[str, float]:
    """Train `model` in place, from its newest checkpoint if there is one, and leave it in evaluation mode.

    Returns:
        The metrics of the epoch whose weights the model is left with.

    Raises:
        ConfigError: the images do not allow the augmentation.
        ModelError: the loss is not finite; the checkpoints before it remain.
    """
    classify.check(recipe.augment, model.spec)
    mixing.check(recipe.mixing, model.spec.num_channels, _covariance(loader))
    model.to(device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, recipe.optim)
    state = _resume(model, optimizer, checkpoints, device)
    net = DistributedDataParallel(model) if _world_size() > 1 else model
    for epoch in range(state["epoch"], recipe.epochs):
        _seed_epoch(recipe.seed, epoch)
        started = time.monotonic()
        metrics = _train_epoch(net, model, loader, recipe, optimizer, epoch, device)
        seconds = time.monotonic() - started
        _share_buffers(model)
        num_classes = len(loader.source.manifest.classes)
        counts = all_reduce(evaluate(model, loader.evaluate("val"), num_classes, device, recipe.precision))
        metrics |= {f"val/{name}": value for name, value in counts.metrics().items()}
        state = _advance(state, model, optimizer, epoch + 1, metrics, keep_best=recipe.keep_best)
        if checkpoints is not None and _rank() == 0:
            checkpoint.save(checkpoints, epoch + 1, state)
        observe(Epoch(epoch + 1, recipe.epochs, metrics, seconds))
    model.eval()
    if not recipe.keep_best:
        return dict(state["metrics"])
    model.load_state_dict(state["best"]["model"])
    return dict(state["best"]["metrics"])


def _train_epoch(
    net: nn.Module,
    model: Classifier,
    loader: Loader,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    device: torch.device | str,
) -> dict[str, float]:
    """One pass over the data. `net` is `model`, possibly wrapped for distributed training."""
    net.train()
    started, waited, total, steps = time.monotonic(), 0.0, torch.zeros((), device=device), loader.steps_per_epoch
    num_classes, covariance = len(loader.source.manifest.classes), _covariance(loader)
    batches = iter(loader.train(epoch))
    for step in range(steps):
        asked = time.monotonic()
        batch = next(batches).to(device)
        waited += time.monotonic() - asked
        drawn = _generator(recipe.seed, epoch, step)
        batch = mixing.mix(batch, recipe.mixing, num_classes, drawn, covariance)
        lr = learning_rate(recipe.optim, epoch * steps + step, steps, recipe.epochs)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total += _step(net, model, batch, recipe, optimizer)
    seconds = time.monotonic() - started
    loss = _mean_over_ranks(float(total) / steps)  # before the check: all ranks must raise together
    if not math.isfinite(loss):
        raise ModelError(
            f"the training loss became {loss} in epoch {epoch + 1}; take a smaller optim.lr or a longer warm-up"
        )
    return {
        "train/loss": loss,
        "lr": lr,
        "images_per_s": steps * loader.config.batch_size * _world_size() / seconds,
        "data_wait_share": waited / seconds,
    }


def _step(net: nn.Module, model: Classifier, batch: Batch, recipe: Recipe, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step on one batch; returns the loss, detached."""
    assert batch.targets is not None
    with autocast(recipe.precision, batch.images.device):
        outputs = net(batch)
        losses = model.loss(outputs, _smooth(batch.targets, outputs.shape[1], recipe.label_smoothing))
        loss = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if recipe.optim.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_norm)
    optimizer.step()
    return loss.detach()


def _smooth(targets: Tensor, num_classes: int, share: float) -> Tensor:
    """The targets, hard [B] or soft [B, num_classes], with `share` of each spread over all classes."""
    if share == 0:
        return targets
    soft = F.one_hot(targets, num_classes).float() if targets.ndim == 1 else targets
    return soft * (1 - share) + share / num_classes


def _covariance(loader: Loader) -> mixing.Covariance | None:
    """Of the colours of the training images, where the shards know it."""
    pixels = loader.source.manifest.pixels.get("train")
    return None if pixels is None else pixels.covariance


def _resume(
    model: Classifier, optimizer: torch.optim.Optimizer, checkpoints: Path | None, device: torch.device | str
) -> dict[str, Any]:
    """The state to go on from: that of the newest checkpoint, loaded into model and optimiser, or a fresh one."""
    path = checkpoint.latest(checkpoints) if checkpoints is not None else None
    if path is None:
        return {"epoch": 0, "metrics": {}, "best": {}}
    state = checkpoint.load(path, device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state


def _advance(
    state: dict[str, Any],
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    metrics: dict[str, float],
    *,
    keep_best: bool,
) -> dict[str, Any]:
    """The state after an epoch. The best weights are copied: those of the model go on changing."""
    weights, best = model.state_dict(), state["best"]
    if keep_best and metrics["val/top1"] > best.get("metrics", {}).get("val/top1", -1.0):
        best = {"metrics": metrics, "model": {name: value.clone() for name, value in weights.items()}}
    return {"epoch": epoch, "metrics": metrics, "model": weights, "optimizer": optimizer.state_dict(), "best": best}


def _generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """What is random in the mixing of one batch: a function of where we are, so that it resumes exactly."""
    return torch.Generator().manual_seed(int(np.random.default_rng([seed, epoch, step, _rank()]).integers(2**63)))


def _seed_epoch(seed: int, epoch: int) -> None:
    """Make what is random in an epoch (dropout) a function of seed, epoch and rank, so that it resumes exactly."""
    torch.manual_seed(int(np.random.default_rng([seed, epoch, _rank()]).integers(2**63)))


def _share_buffers(model: nn.Module) -> None:
    """Give every rank the running statistics of rank 0, whose weights are the ones that are saved."""
    if _world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _mean_over_ranks(value: float) -> float:
    if _world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    total = total.to("cuda") if dist.get_backend() == "nccl" else total
    dist.all_reduce(total)
    return float(total) / _world_size()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
