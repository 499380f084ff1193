"""All that a run needs to go on exactly where it was: what a checkpoint holds, and how all ranks take it up.

No random state is among it: what is random in a step follows from (seed, epoch, offset, rank). Nor is a schedule: the
learning rate follows from the position. So a resumed run ends with the same bits as one that was never interrupted, on
as many CPU workers; on another number of workers it goes on with the next image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.data.loading import Loader
from pipeline.errors import ConfigError
from pipeline.training import ranks
from pipeline.training.checkpoint import Checkpoint, Position, Store

LAYOUT = "shards_digest"
"""In `State.order`: over the checksums of the training shards, which say what lies in which row."""


class Stateful(Protocol):
    """A model, an optimiser, a moving average, a scaler, ..."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes in it."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take it back."""


class Kept:
    """Weights that were put aside; none at first."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Keep a copy of these, and no longer those before."""
        self.weights = {name: value.clone() for name, value in weights.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """All of them."""
        return self.weights

    def load_state_dict(self, state_dict: dict[str, Tensor], /) -> None:
        """Take them back."""
        self.weights = state_dict


@dataclass(slots=True)
class Tally:
    """Sums over the steps of the unfinished epoch.

    Attributes:
        loss: of this rank, over its images; float64 [], on the device, so that adding to it waits for nothing.
        lr: of the last step.
        seconds: of training, of which `waited_s` were spent waiting for data.
    """

    loss: Tensor
    lr: float = 0.0
    seconds: float = 0.0
    waited_s: float = 0.0


@dataclass(slots=True)
class State:
    """Where a run is.

    Attributes:
        parts: by name, everything that training changes.
        order: what a position is counted in: it means the same only for the same dataset, in the same training shards,
            and the same seed and sampling.
        epoch: finished epochs.
        offset: draws of the next one that are behind us, over all workers.
        history: the metrics of each finished epoch.
    """

    parts: Mapping[str, Stateful]
    order: dict[str, Any]
    tally: Tally
    epoch: int = 0
    offset: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def position(self) -> Position:
        """As a name for a checkpoint."""
        return Position(self.epoch, self.offset)

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        """Note what came out, and stand at the beginning of the next epoch."""
        self.history.append(metrics)
        self.epoch, self.offset, self.tally = self.epoch + 1, 0, Tally(torch.zeros_like(self.tally.loss))

    def save(self, store: Store, losses: list[float]) -> None:
        """Write a checkpoint; for one rank, which is told the tally's loss of every rank.

        Raises:
            DataError: it cannot be written.
        """
        sums = {"lr": self.tally.lr, "seconds": self.tally.seconds, "waited_s": self.tally.waited_s}
        progress = {"order": self.order, "tally": {"loss": losses, **sums}, "history": self.history}
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        store.save(self.position, parts, progress)

    def restore(self, stored: Checkpoint, folder: str) -> None:
        """Take up what was stored.

        Raises:
            ConfigError: it was stored by a run on other data, or with another recipe.
        """
        progress = stored.progress
        self._check_order(progress["order"], folder)
        self._load_parts(stored.parts, folder)
        self.epoch, self.offset = stored.position
        self.history = list(progress["history"])
        tally = progress["tally"]
        self.tally = Tally(**tally | {"loss": torch.full_like(self.tally.loss, _own_share(tally["loss"]))})

    def _check_order(self, stored: dict[str, Any], folder: str) -> None:
        begun = {LAYOUT: self.order[LAYOUT]} | stored  # older checkpoints do not tell it
        changed = {key for key in begun | self.order if begun.get(key) != self.order.get(key)}
        if changed - {LAYOUT}:
            raise ConfigError(
                f"{folder}: the run was begun with {_listed(begun)}, now it is {_listed(self.order)}; resume it with "
                "those, or choose another name"
            )
        if changed:
            raise ConfigError(
                f"{folder}: the run was begun on training shards that held the same images in another order or size; "
                "ingest them as before (seed, rows_per_shard, rows_per_group, train_short_side, ...), or choose "
                "another name"
            )

    def _load_parts(self, stored: dict[str, Any], folder: str) -> None:
        if stored.keys() != self.parts.keys():
            raise ConfigError(
                f"{folder}: the run was begun with {', '.join(stored)}, now it has {', '.join(self.parts)}; resume it "
                "with the recipe that it was begun with"
            )
        for name, part in self.parts.items():
            try:
                part.load_state_dict(stored[name])
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ConfigError(
                    f"{folder}: the stored {name} does not fit the recipe ({reason}); resume the run with the recipe "
                    "that it was begun with"
                ) from None


def begin(parts: Mapping[str, Stateful], loader: Loader, device: torch.device | str) -> State:
    """The state before the first step."""
    checksums = "".join(shard.sha256 for shard in loader.source.manifest.of("train"))
    order = {
        "dataset_digest": loader.source.manifest.digest,
        LAYOUT: hashlib.sha256(checksums.encode()).hexdigest(),
        "seed": loader.seed,
        "sampling": loader.config.sampling.model_dump(mode="json"),
    }
    return State(parts, order, Tally(torch.zeros((), dtype=torch.float64, device=device)))


def resume(state: State, store: Store, device: torch.device | str) -> None:
    """Take up the newest whole checkpoint, if there is one: rank 0 chooses it for all.

    Raises:
        ConfigError: it is of another run.
        DataError: it cannot be read.
    """
    found = store.newest(device) if ranks.rank() == 0 else None
    epoch, offset = ranks.from_first(found.position if found else (-1, 0))
    if epoch >= 0:
        state.restore(found or store.load(Position(epoch, offset), device), store.folder)


def _own_share(losses: list[float]) -> float:
    """What this rank had summed up; where there are more or fewer ranks now, the first one takes the whole."""
    if len(losses) == ranks.world_size():
        return losses[ranks.rank()]
    return sum(losses) if ranks.rank() == 0 else 0.0


def _listed(order: dict[str, Any]) -> str:
    told = {key: str(value)[:16] if key == "dataset_digest" else value for key, value in order.items() if key != LAYOUT}
    return ", ".join(f"{key} {value}" for key, value in told.items())
