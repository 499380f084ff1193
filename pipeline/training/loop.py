"""The only training loop in the house: blind to the task, to Ray and to MLflow.

It is given a model and a loader, and tells an observer about every epoch. Distributed training is
`torch.distributed`, if the caller has initialised it: gradients are averaged over ranks, metrics are summed.

Whatever changes in training is in the `State`; whatever is random in a step, and its learning rate, follows from the
position. So a run that was killed anywhere goes on exactly: see `pipeline.training.state`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

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
from pipeline.evaluation.live import all_reduce, autocast, evaluate
from pipeline.models._contract import Classifier
from pipeline.training import ranks
from pipeline.training.checkpoint import Position, Store
from pipeline.training.guard import Guard
from pipeline.training.optim import Config as Optim
from pipeline.training.optim import build_optimizer, learning_rate
from pipeline.training.state import State, begin, resume


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
    checkpoints: Store | None = None,
    observe: Callable[[Epoch], None] = lambda epoch: None,
) -> dict[str, float]:
    """Train `model` in place, from its newest checkpoint if there is one, and leave it in evaluation mode.

    An epoch is told to `observe` before its checkpoint is written, so that after a failure it may be told again, with
    the same figures, but is never left out.

    Returns:
        The metrics of the epoch whose weights the model is left with.

    Raises:
        ConfigError: the images do not allow the augmentation, or the checkpoints are of another run.
        DataError: a checkpoint cannot be written or read.
        DivergedError: the loss or a weight is not finite; no checkpoint holds such weights.
    """
    classify.check(recipe.augment, model.spec)
    mixing.check(recipe.mixing, model.spec.num_channels, _covariance(loader))
    model.to(device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    state = begin({"model": model, "optimizer": build_optimizer(model, recipe.optim)}, loader, device)
    if checkpoints is not None:
        resume(state, checkpoints, device)
    best = _best_weights(state, recipe, checkpoints, device)
    _protect_best(state, recipe)
    guard = Guard(state, checkpoints, loader.global_batch_size)
    net = _distributed(model, loader, recipe, device) if ranks.world_size() > 1 else model
    while state.epoch < recipe.epochs:
        _train_epoch(net, model, loader, recipe, state, guard)
        metrics, seconds = _measure(model, loader, recipe, state, guard), state.tally.seconds
        state.finish_epoch(metrics)
        _protect_best(state, recipe)
        if recipe.keep_best and _best_epoch(state) == state.epoch:
            best = {name: value.clone() for name, value in model.state_dict().items()}
        observe(Epoch(state.epoch, recipe.epochs, metrics, seconds))
        guard.save()
    model.eval()
    if best:
        model.load_state_dict(best)
    return dict(state.history[(_best_epoch(state) if recipe.keep_best else state.epoch) - 1])


def _train_epoch(net: nn.Module, model: Classifier, loader: Loader, recipe: Recipe, state: State, guard: Guard) -> None:
    """From where the state is to the end of its epoch. `net` is `model`, possibly wrapped for distributed training."""
    net.train()
    optimizer, tally = cast(torch.optim.Optimizer, state.parts["optimizer"]), state.tally
    num_classes, covariance = len(loader.source.manifest.classes), _covariance(loader)
    steps_per_epoch, batches = loader.steps_per_epoch, iter(loader.train(state.epoch, state.offset))
    for _ in range(_steps_left(loader, state)):
        asked = time.monotonic()
        batch = next(batches).to(tally.loss.device)
        tally.waited_s += time.monotonic() - asked
        _seed_step(recipe.seed, state)
        batch = mixing.mix(batch, recipe.mixing, num_classes, torch.default_generator, covariance)
        step = state.epoch * steps_per_epoch + state.offset // loader.global_batch_size
        tally.lr = learning_rate(recipe.optim, step, steps_per_epoch, recipe.epochs)
        for group in optimizer.param_groups:
            group["lr"] = tally.lr
        tally.loss += _step(net, model, batch, recipe, optimizer) * len(batch)
        state.offset += loader.global_batch_size
        guard.after_step()
        tally.seconds += time.monotonic() - asked


def _measure(model: Classifier, loader: Loader, recipe: Recipe, state: State, guard: Guard) -> dict[str, float]:
    """The metrics of an epoch that is trained to its end."""
    waited_from = time.monotonic()
    losses, tally = guard.losses(), state.tally
    tally.seconds += time.monotonic() - waited_from  # for steps that the device had not done yet
    guard.check_weights()
    _share_buffers(model)
    device, num_classes = tally.loss.device, len(loader.source.manifest.classes)
    counts = all_reduce(evaluate(model, loader.evaluate("val"), num_classes, device, recipe.precision))
    return {
        "train/loss": sum(losses) / state.offset,
        "lr": tally.lr,
        "images_per_s": state.offset / tally.seconds,
        "data_wait_share": tally.waited_s / tally.seconds,
        **{f"val/{name}": value for name, value in counts.metrics().items()},
    }


def _step(net: nn.Module, model: Classifier, batch: Batch, recipe: Recipe, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step on one batch; returns the loss, detached."""
    loss = _loss(net, model, batch, recipe)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if recipe.optim.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_norm)
    optimizer.step()
    return loss.detach()


def _loss(net: nn.Module, model: Classifier, batch: Batch, recipe: Recipe) -> Tensor:
    """The mean loss over a batch, with its graph."""
    assert batch.targets is not None
    with autocast(recipe.precision, batch.images.device):
        outputs = net(batch)
        losses = model.loss(outputs, _smooth(batch.targets, outputs.shape[1], recipe.label_smoothing))
        return torch.stack(list(losses.values())).sum()


def _distributed(model: Classifier, loader: Loader, recipe: Recipe, device: torch.device | str) -> nn.Module:
    """The model wrapped so that gradients are averaged over ranks, the same way in every step.

    After its first step DistributedDataParallel regroups the gradients by the order in which they came, and the last
    bits of a sum over three or more ranks depend on the groups. So the first step is one whose gradients nobody uses:
    otherwise the first one after a resume would differ from the same step of an uninterrupted run.
    """
    net = DistributedDataParallel(model).train()
    buffers = [buffer.clone() for buffer in model.buffers()]
    images = torch.zeros(loader.config.batch_size, model.spec.num_channels, *model.spec.size_hw, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(len(images), dtype=torch.int64)).to(device)
    torch.autograd.backward(_loss(net, model, batch, recipe))
    model.zero_grad(set_to_none=True)
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    return net


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


def _best_epoch(state: State) -> int:
    """The epoch, from 1, of best validation top-1, of equal ones the first."""
    values = [metrics["val/top1"] for metrics in state.history]
    return 1 + max(range(len(values)), key=lambda index: (values[index], -index))


def _protect_best(state: State, recipe: Recipe) -> None:
    if recipe.keep_best and state.history:
        state.protected = {Position(_best_epoch(state))}


def _best_weights(
    state: State, recipe: Recipe, checkpoints: Store | None, device: torch.device | str
) -> dict[str, Tensor]:
    """Those of the best epoch so far, where they are kept and a run goes on; else nothing."""
    if not recipe.keep_best or checkpoints is None or not state.history:
        return {}
    weights: dict[str, Tensor] = checkpoints.load(Position(_best_epoch(state)), device).parts["model"]
    return weights


def _steps_left(loader: Loader, state: State) -> int:
    """Steps of the epoch that are ahead of us; all of them, where it begins, and at least one."""
    if state.offset == 0:
        return loader.steps_per_epoch
    return (loader.source.manifest.num_rows("train") - state.offset) // loader.global_batch_size


def _seed_step(seed: int, state: State) -> None:
    """Make what is random in a step (dropout, mixing) a function of where we are, so that it resumes exactly."""
    numbers = np.random.SeedSequence([seed, *state.position, ranks.rank()])
    torch.manual_seed(int(numbers.generate_state(1, np.uint64)[0] >> np.uint64(1)))


def _share_buffers(model: nn.Module) -> None:
    """Give every rank the running statistics of rank 0, whose weights are the ones that are saved."""
    if ranks.world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
