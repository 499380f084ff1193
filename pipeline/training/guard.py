"""Looks after a run between its steps: is it still finite, and is a checkpoint due? All ranks decide alike.

Asking costs a wait for the device and a few bytes between the ranks, so it is done about every `LOOK_S` seconds only,
and at least every `LOOK_EVERY` steps. What is not finite stays so in a sum: nothing is missed in between.
"""

from __future__ import annotations

import math
import time

import torch

from pipeline.errors import ModelError
from pipeline.training import ranks
from pipeline.training.checkpoint import Config, Store
from pipeline.training.state import State

LOOK_S = 2.0
LOOK_EVERY = 50


class DivergedError(ModelError):
    """The loss or a weight is not finite; every rank raises it at the same step, and would do so again."""


class Guard:
    """Of one run on this rank.

    Args:
        state: of the run; `state.parts["model"]` is what must stay finite.
        store: where checkpoints go; None keeps none.
        global_batch_size: images of one step on all ranks.
    """

    def __init__(self, state: State, store: Store | None, global_batch_size: int) -> None:
        self._state, self._store, self._global_batch_size = state, store, global_batch_size
        self._config = store.config if store else Config(every_s=None)
        self._saved_at = self._looked_at = time.monotonic()
        self._steps, self._gap = 0, 1  # since the last look, and until the next

    def after_step(self) -> list[float] | None:
        """Look, if it is time to, and store the state, if that is due.

        Returns:
            Every rank's sum of the loss over its images in the unfinished epoch, if it was time to look.

        Raises:
            DataError: the checkpoint cannot be written.
            DivergedError: the loss or a weight is not finite.
        """
        step, every = self._state.offset // self._global_batch_size, self._config.every_steps
        is_due = every is not None and step % every == 0
        self._steps += 1
        if not is_due and self._steps < self._gap:
            return None
        losses, is_late = self._ask()
        if is_due or is_late:
            self.check_weights()
            self._save(losses)
        return losses

    def losses(self) -> list[float]:
        """Every rank's sum of the loss over its images in the unfinished epoch.

        Raises:
            DivergedError: the loss is not finite.
        """
        return self._ask()[0]

    def check_weights(self) -> None:
        """A loss that was finite may have had a gradient that was not.

        Raises:
            DivergedError: a weight or a running statistic of the model is not finite.
        """
        values = self._state.parts["model"].state_dict().values()
        finite = torch.stack([value.isfinite().all() for value in values if value.is_floating_point()]).all()
        if not ranks.gather(finite.double()[None]).all():
            raise self._diverged("the weights became nan or infinite")

    def save(self) -> None:
        """Store the state, checked before, at the end of an epoch.

        Raises:
            DataError: the checkpoint cannot be written.
        """
        self._save([0.0] * ranks.world_size())

    def _save(self, losses: list[float]) -> None:
        if self._store and ranks.rank() == 0:
            self._state.save(self._store, losses)
        self._saved_at = time.monotonic()

    def _ask(self) -> tuple[list[float], bool]:
        """Every rank's loss, and whether rank 0 finds the last checkpoint too old; it also times the next look."""
        now, every_s = time.monotonic(), self._config.every_s
        is_late = every_s is not None and now - self._saved_at > every_s
        pace = self._steps / max(now - self._looked_at, 1e-9)
        gap = min(LOOK_EVERY, max(1, int(pace * LOOK_S))) if self._steps else self._gap
        loss = self._state.tally.loss
        told = ranks.gather(torch.stack([loss, *(torch.full_like(loss, value) for value in (is_late, gap))]))
        losses = [float(value) for value in told[:, 0]]
        self._looked_at, self._steps, self._gap = now, 0, int(told[0, 2])
        if not math.isfinite(sum(losses)):
            raise self._diverged(f"the training loss became {sum(losses)}")
        return losses, bool(told[0, 1])

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(
            f"{what} in epoch {self._state.epoch + 1}, within its first {self._state.offset} images; take a smaller "
            "optim.lr or a longer warm-up"
        )
