"""The only training loop in the house: blind to the task, to Ray and to MLflow.

It is given a model and a loader, and tells an observer about every epoch. Distributed training is
`torch.distributed`, if the caller has initialised it: gradients are averaged over ranks, metrics are summed.

Whatever changes in training is in the `State`; whatever is random in a step, and its learning rate, follows from the
position. So a run that was killed anywhere goes on exactly: see `pipeline.training.state`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.batch import Batch
from pipeline.data.loading import Loader
from pipeline.evaluation.live import autocast
from pipeline.models import Model
from pipeline.training import finder, optim, precision, ranks, start, step, stopping, tasks
from pipeline.training.checkpoint import Store
from pipeline.training.ema import Ema
from pipeline.training.guard import Guard
from pipeline.training.recipe import Recipe
from pipeline.training.state import Kept, State, Stateful, begin, resume
from pipeline.training.tasks import Task

RUNNING = ("train/loss", "lr", "images_per_s", "data_wait_share")
"""The metrics of every epoch beside those of validation: `images_per_s` is over all ranks, `data_wait_share` of this
one's time."""


def reported(task: Task) -> tuple[str, ...]:
    """The names of the metrics of every epoch."""
    return (*RUNNING, *(f"val/{name}" for name in task.MEASURED))


@dataclass(frozen=True, slots=True)
class Epoch:
    """What an observer is told after each epoch.

    Attributes:
        number: epochs finished, from 1, of `total`.
        metrics: those of `reported`.
        seconds: of training in this epoch.
        measuring_s: of validation after it.
    """

    number: int
    total: int
    metrics: dict[str, float]
    seconds: float
    measuring_s: float

    @property
    def left_s(self) -> float:
        """What all the others will take, if they take as long."""
        return (self.total - self.number) * (self.seconds + self.measuring_s)


@dataclass(frozen=True, slots=True)
class Progress:
    """What an observer is told now and then within an epoch.

    Attributes:
        number: of this epoch, from 1, of `total`.
        images: of this epoch that are behind us, of `num_images`, over all ranks.
        loss: mean over them.
        images_per_s: over all ranks, in this epoch.
        data_wait_share: of this rank's time.
    """

    number: int
    total: int
    images: int
    num_images: int
    loss: float
    images_per_s: float
    data_wait_share: float

    @property
    def left_s(self) -> float:
        """What all training takes from here on, validation not counted."""
        left = self.num_images - self.images + (self.total - self.number) * self.num_images
        return left / self.images_per_s


def fit(
    model: Model,
    loader: Loader,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    checkpoints: Store | None = None,
    observe: Callable[[Epoch], None] = lambda epoch: None,
    notice: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, float]:
    """Train `model` in place, from its newest checkpoint if there is one, and leave it in evaluation mode.

    Within an epoch `notice` is told every few seconds how far it is. Each epoch is told to `observe` before its
    checkpoint is written: after a failure it may be told again, with the same figures, but is never left out.

    Returns:
        The metrics of the epoch whose weights the model is left with.

    Raises:
        ConfigError: the images do not allow the augmentation, or the checkpoints are of another run.
        DataError: a checkpoint cannot be written or read.
        DivergedError: the loss or a weight is not finite; no checkpoint holds such weights.
    """
    run = _begun(model, loader, recipe, device, checkpoints)
    state, guard = run.state, Guard(run.state, checkpoints, loader.global_batch_size)
    while state.epoch < recipe.epochs and not stopping.should_stop(recipe.watch, run.watched):
        run.train_epoch(guard, notice)
        metrics, measuring_s = run.measure(guard)
        seconds = state.tally.seconds
        state.finish_epoch(metrics)
        run.note_best()
        observe(Epoch(state.epoch, recipe.epochs, metrics, seconds, measuring_s))
        guard.save()
    return run.finish()


def find_rate(
    model: Model,
    loader: Loader,
    recipe: Recipe,
    config: finder.RangeTest,
    *,
    device: torch.device | str = "cpu",
) -> finder.Curve:
    """The loss of the first steps of a training at rising rates, for this rank's batch; the model stays as it was.

    Raises:
        ConfigError: the images do not allow the augmentation.
        ModelError: there is no finite loss.
    """
    run = _begun(model, loader, recipe, device, None)
    run.begin_training()
    return finder.range_test(model, run.optimizer, run.endless_batches(), partial(run.loss, run.net), config)


def find_batch(
    model: Model,
    loader: Loader,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    limit_bytes: int | None = None,
) -> int:
    """The largest batch whose training step fits into the memory of `device`; the model stays as it was.

    Args:
        limit_bytes: on a CPU, what the step may take; see `finder.step_probe`.

    Raises:
        ConfigError: not even one image fits.
    """
    run = _begun(model, loader, recipe, device, None)
    run.begin_training()
    probe = finder.step_probe(model, run.optimizer, partial(run.loss, run.net), run.task.blank, limit_bytes)
    return finder.largest_batch(probe)


def _begun(model: Model, loader: Loader, recipe: Recipe, device: torch.device | str, checkpoints: Store | None) -> _Run:
    """A training on `device` whose recipe has been checked."""
    task = tasks.of(model, recipe, loader, device)
    stopping.check(recipe.watch, reported(task))
    precision.check(recipe.precision, device)
    model = precision.arrange(
        model.to(device), channels_last=recipe.channels_last, sync_batch_norm=recipe.sync_batch_norm
    )
    return _Run(model, task, loader, recipe, device, checkpoints)


class _Run:
    """One training on this rank: what it trains, what is measured of it, and where it stands."""

    def __init__(
        self,
        model: Model,
        task: Task,
        loader: Loader,
        recipe: Recipe,
        device: torch.device | str,
        checkpoints: Store | None,
    ) -> None:
        self.model, self.task, self.loader, self.recipe = model, task, loader, recipe
        self.optim = optim.scaled(recipe.optim, loader.global_batch_size)
        self.optimizer = optim.build_optimizer(model, self.optim)
        self.scaler = precision.grad_scaler(recipe.precision, device)
        self.average = None if recipe.ema is None else Ema(model, recipe.ema)
        self.num_rows = loader.source.manifest.num_rows("train")
        self.best = Kept()
        self.state = begin(self._parts(), loader, device)
        if checkpoints is not None:
            resume(self.state, checkpoints, device)
        if recipe.compile:
            precision.compile_network(model)
        self.net = self._distributed(device) if ranks.world_size() > 1 else model

    @property
    def measured(self) -> Model:
        """The weights that count: the average, where there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def watched(self) -> list[float]:
        """The watched metric of every finished epoch."""
        return [metrics[self.recipe.watch.metric] for metrics in self.state.history]

    def train_epoch(self, guard: Guard, notice: Callable[[Progress], None]) -> None:
        """From where the state is to the end of its epoch."""
        self.begin_training()
        state, tally = self.state, self.state.tally
        batches = iter(self.loader.train(state.epoch, state.offset))
        for _ in range(_steps_left(self.loader, state)):
            asked = time.monotonic()
            batch = next(batches).to(tally.loss.device)
            tally.waited_s += time.monotonic() - asked
            batch = self.mixed(batch)
            tally.lr = self._set_learning_rate()
            tally.loss += self._step(batch) * len(batch)
            state.offset += self.loader.global_batch_size
            losses = guard.after_step()
            tally.seconds += time.monotonic() - asked
            if losses is not None:
                notice(self._progress(losses))

    def begin_training(self) -> None:
        """Training mode, but for the statistics of frozen layers."""
        self.net.train()
        start.hold_norms(self.model)

    def mixed(self, batch: Batch) -> Batch:
        """A batch on the device as a step gets it; what is random from here on follows from the position."""
        _seed_step(self.recipe.seed, self.state)
        return self.task.mixed(batch)

    def endless_batches(self) -> Iterator[Batch]:
        """Those of one epoch after another, for steps that do not count."""
        for epoch in itertools.count():
            for batch in itertools.islice(self.loader.train(epoch), self.loader.steps_per_epoch):
                yield self.mixed(batch.to(self.state.tally.loss.device))
                self.state.offset += self.loader.global_batch_size

    def measure(self, guard: Guard) -> tuple[dict[str, float], float]:
        """The metrics of an epoch that is trained to its end, and the seconds that measuring took."""
        waited_from = time.monotonic()
        losses, tally = guard.losses(), self.state.tally
        began = time.monotonic()
        tally.seconds += began - waited_from  # for steps that the device had not done yet
        guard.check_weights()
        _share_buffers(self.model)
        if self.average is not None:
            _share_buffers(self.average.model)
        measured = self.task.measure(self.measured, self.loader.evaluate("val"), tally.loss.device)
        running = self._running(losses)
        metrics = {
            "train/loss": running.pop("loss"),
            "lr": tally.lr,
            **running,
            **{f"val/{name}": value for name, value in measured.items()},
        }
        return metrics, time.monotonic() - began

    def note_best(self) -> None:
        """Keep the weights of the last epoch, if it is the best one and the best are wanted."""
        if self.recipe.keep_best and stopping.is_best(self.recipe.watch, self.watched):
            self.best.put(self.measured.state_dict())

    def finish(self) -> dict[str, float]:
        """Leave the model with the weights that count, in evaluation mode, and return their metrics."""
        self.model.eval()
        self.model.load_state_dict(self.best.weights or self.measured.state_dict())
        at = stopping.best_epoch(self.recipe.watch, self.watched) if self.recipe.keep_best else -1
        return dict(self.state.history[at])

    def _progress(self, losses: list[float]) -> Progress:
        state = self.state
        return Progress(state.epoch + 1, self.recipe.epochs, state.offset, self.num_rows, **self._running(losses))

    def _running(self, losses: list[float]) -> dict[str, float]:
        """What the epoch so far gives, from every rank's sum of the loss."""
        offset, tally = self.state.offset, self.state.tally
        return {
            "loss": sum(losses) / offset,
            "images_per_s": offset / tally.seconds,
            "data_wait_share": tally.waited_s / tally.seconds,
        }

    def _parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds."""
        parts: dict[str, Stateful] = {"model": self.model, "optimizer": optim.Momenta(self.optimizer)}
        if self.average is not None:
            parts["ema"] = self.average
        if self.scaler.is_enabled():
            parts["scaler"] = self.scaler
        if self.recipe.keep_best:
            parts["best"] = self.best
        return parts

    def _set_learning_rate(self) -> float:
        """Let the learning rate follow the position, which is counted in images, on however many workers."""
        drops = stopping.num_drops(self.recipe.watch, self.watched) if self.optim.schedule == "plateau" else 0
        done = self.state.epoch * self.num_rows + self.state.offset
        lr = optim.learning_rate(self.optim, done, self.num_rows, self.recipe.epochs, drops)
        optim.set_learning_rate(self.optimizer, lr)
        return lr

    def _step(self, batch: Batch) -> Tensor:
        """One step on one batch; returns the loss, detached."""
        parts = step.split(batch, self.recipe.accumulate)
        loss = step.backward(self.net, parts, partial(self.loss, self.net), self.scaler)
        step.update(self.optimizer, self.model.parameters(), self.scaler, self.recipe.optim.clip_norm)
        if self.average is not None:
            self.average.update(self.model)
        return loss

    def loss(self, net: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over a batch, with its graph."""
        with autocast(self.recipe.precision, batch.images.device):
            return torch.stack(list(self.task.losses(net(batch), batch).values())).sum()

    def _distributed(self, device: torch.device | str) -> nn.Module:
        """The model wrapped so that gradients are averaged over ranks, the same way in every step.

        After its first step DistributedDataParallel regroups the gradients by the order in which they came, and the
        last bits of a sum over three or more ranks depend on the groups. So the first step is one whose gradients
        nobody uses: otherwise the first one after a resume would differ from the same step of an uninterrupted run.
        """
        net = DistributedDataParallel(self.model)
        net.train()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        torch.autograd.backward(self.loss(net, self.task.blank(self.loader.config.batch_size).to(device)))
        self.model.zero_grad(set_to_none=True)
        for buffer, value in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(value)
        return cast(nn.Module, net)


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
