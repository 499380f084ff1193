"""Two numbers that are otherwise guessed: a learning rate, and the largest batch that fits into memory.

The range test raises the rate from step to step and looks at the loss (Smith 2017, "Cyclical Learning Rates for
Training Neural Networks", section 3.3). The batch is doubled until memory runs out, then narrowed down by bisection.
Both leave the model as it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.batch import Batch
from pipeline.config import Strict
from pipeline.errors import ConfigError, ModelError
from pipeline.training.optim import set_learning_rate


class RangeTest(Strict):
    """How rates are tried.

    Attributes:
        num_steps: training steps, each at a higher rate than the one before, by the same factor.
        smoothing: share that the running mean of the loss keeps in a step.
        diverged: the test ends where the smoothed loss exceeds its least value so many times.
    """

    lowest: float = Field(default=1e-6, gt=0)
    highest: float = Field(default=10.0, gt=0)
    num_steps: int = Field(default=100, ge=10)
    smoothing: float = Field(default=0.9, ge=0, lt=1)
    diverged: float = Field(default=4.0, gt=1)


@dataclass(frozen=True, slots=True)
class Curve:
    """What a range test saw, for a figure: a loss over a logarithmic axis of rates.

    Attributes:
        rates: those that were tried, ascending.
        losses: of the batch at each rate, before the step.
        smoothed: their running mean, corrected for its start at 0.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]

    @property
    def suggestion(self) -> float:
        """The rate at which the smoothed loss falls most steeply, over the logarithm of the rate.

        Raises:
            ModelError: the loss never falls.
        """
        lowest = min(range(len(self.smoothed)), key=self.smoothed.__getitem__)
        # Over two steps: a slope between neighbours is mostly noise. Behind the minimum it only rises.
        falls = {at: self.smoothed[at - 1] - self.smoothed[at + 1] for at in range(1, lowest)}
        steepest = max(falls, key=falls.__getitem__, default=0)
        if falls.get(steepest, 0.0) <= 0:
            raise ModelError("no rate in the range lowers the loss; widen it, or check data and initialisation")
        return self.rates[steepest]


def range_test(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], Tensor],
    config: RangeTest,
) -> Curve:
    """Try rates on a model, which afterwards is what it was to the bit, as are optimiser and random state.

    Args:
        model: that `loss_of` calls, in the mode that it is to be trained in.
        optimizer: of `build_optimizer`; its groups keep their multiples of the rate.
        batches: as many as `config.num_steps`, on the device.
        loss_of: the loss of a batch, with its graph.
        config: which rates.

    Raises:
        ModelError: the loss is not finite from the start, or there is no batch.
    """
    tried = _Trial(config)
    factor = (config.highest / config.lowest) ** (1 / (config.num_steps - 1))
    with _restored(model, optimizer):
        for number, batch in zip(range(config.num_steps), batches, strict=False):
            rate = config.lowest * factor**number
            loss = loss_of(batch)
            if not tried.goes_on(rate, float(loss.detach())):
                break
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            set_learning_rate(optimizer, rate)
            optimizer.step()
    return tried.curve()


class _Trial:
    """The losses so far, and whether another step makes sense."""

    def __init__(self, config: RangeTest) -> None:
        self.config, self.mean = config, 0.0
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []

    def goes_on(self, rate: float, loss: float) -> bool:
        """Note a loss; no longer if it is not finite or far above the least."""
        if not math.isfinite(loss):
            return False
        self.mean = self.config.smoothing * self.mean + (1 - self.config.smoothing) * loss
        self.rates.append(rate)
        self.losses.append(loss)
        self.smoothed.append(self.mean / (1 - self.config.smoothing ** len(self.losses)))
        return self.smoothed[-1] <= self.config.diverged * min(self.smoothed)

    def curve(self) -> Curve:
        if not self.losses:
            raise ModelError(
                "the range test saw no finite loss; check that there are batches and that the model computes"
            )
        return Curve(tuple(self.rates), tuple(self.losses), tuple(self.smoothed))


@contextmanager
def _restored(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put weights, buffers, gradients, the optimiser's state and torch's random state back afterwards."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state, was_training = copy.deepcopy(optimizer.state_dict()), model.training
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng([*devices]):
        try:
            yield
        finally:
            model.load_state_dict(weights)
            model.train(was_training)
            optimizer.zero_grad(set_to_none=True)
            optimizer.load_state_dict(state)


def largest_batch(probe: Callable[[int], None], *, start: int = 1, most: int = 65536) -> int:
    """The largest batch that `probe` takes: doubled until memory runs out, then bisected to 1/16 of itself.

    Args:
        probe: does a step on so many images and raises `torch.OutOfMemoryError` or `MemoryError` where they do not fit.
        start: tried first.
        most: never exceeded.

    Raises:
        ConfigError: not even one image fits.
    """
    fits, fails, size = 0, most + 1, min(start, most)
    while fails - fits > max(fits // 16, 1):
        if _fits(probe, size):
            fits = size
        else:
            fails = size
        size = min(2 * fits, most) if fails > most else (fits + fails) // 2
    if fits == 0:
        raise ConfigError("not even one image fits into memory; take a smaller model or smaller inputs")
    return fits


def step_probe(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Batch], Tensor],
    blank: Callable[[int], Batch],
    limit_bytes: int | None = None,
) -> Callable[[int], None]:
    """A probe that does what a training step does, on pictures without content, and keeps nothing of it.

    Args:
        model: on its device, in training mode.
        optimizer: of `build_optimizer`; counted with the state that a step gives it.
        loss_of: the loss of a batch, with its graph.
        blank: makes a batch of so many pictures of the model's size.
        limit_bytes: on a CPU, where memory does not run out in time: how much weights, gradients, the optimiser's state
            and what autograd keeps may take together. On a GPU its own memory is the limit.
    """

    def probe(num_images: int) -> None:
        device = next(model.parameters()).device
        batch = blank(num_images).to(device)
        with _restored(model, optimizer), _limited(model, limit_bytes):
            torch.autograd.backward(loss_of(batch))
            set_learning_rate(optimizer, 0.0)
            optimizer.step()

    return probe


@contextmanager
def _limited(model: nn.Module, limit_bytes: int | None) -> Iterator[None]:
    """Raise MemoryError once autograd keeps more than the limit leaves beside the weights and three times their like.

    Counted is each piece of memory once, however many operations keep it: gradient, momentum, second moment.
    """
    if limit_bytes is None:
        yield
        return
    weights = {value.untyped_storage().data_ptr(): value.nbytes for value in model.parameters()}
    left = limit_bytes - 4 * sum(weights.values())
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        if sum(kept.values()) > left:
            raise MemoryError(f"more than {limit_bytes} bytes")
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        yield


def _fits(probe: Callable[[int], None], size: int) -> bool:
    try:
        probe(size)
    except (torch.OutOfMemoryError, MemoryError):
        return False
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # else pieces of a failed attempt look like memory that is in use
    return True
