"""Which rows are read, in which order, by whom: pure functions of (seed, epoch), with no input or output.

Rows are numbered through all shards of a split in the manifest's order. The order of an epoch does not depend on the
number of workers: a global batch is a run of consecutive draws of it, of which each rank takes its own part. A position
is therefore one number, the draws that are behind us, and means the same on any number of workers.

A draw is a row that may come more than once in an epoch: `row + occurrence * num_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from pipeline.config import Strict
from pipeline.types import Int64Array

WINDOW = 16  # row groups mixed with each other; 16 x 128 rows


class Sampling(Strict):
    """Which rows an epoch is made of, where that is not each once; an epoch always has as many draws as rows.

    Attributes:
        balance: every class equally often: rows of rare classes come several times, of frequent ones not in each epoch.
        repeats: a row that is drawn comes so many times, each varied anew, close to each other (repeated augmentation,
            Hoffer et al. 2020, section 3); so many fewer rows make an epoch.
    """

    balance: bool = False
    repeats: int = Field(default=1, ge=1)

    @property
    def is_plain(self) -> bool:
        """Whether each row comes once."""
        return not self.balance and self.repeats == 1


def sampled_rows(sampling: Sampling, labels: Int64Array, seed: int, epoch: int) -> Int64Array:
    """The rows of one epoch, sorted, each as often as it comes.

    Args:
        sampling: how they are chosen.
        labels: of every row; it is their number that counts where classes are not balanced.
        seed: of the run.
        epoch: counted from 0.
    """
    rng = np.random.default_rng([seed, epoch, 1])  # another stream than that of the order
    num_draws = -(-len(labels) // sampling.repeats)
    chosen = _balanced(labels, num_draws, rng) if sampling.balance else rng.permutation(len(labels))[:num_draws]
    return np.sort(np.repeat(chosen, sampling.repeats)[: len(labels)])


def training_order(row_groups: Sequence[int], seed: int, epoch: int, rows: Int64Array | None = None) -> Int64Array:
    """The draws of one epoch: the row groups shuffled, then the rows within each window of row groups.

    Args:
        row_groups: rows in each row group.
        seed: of the run.
        epoch: counted from 0.
        rows: sorted rows to draw, each as often as it is to come; every row once by default.
    """
    rng = np.random.default_rng([seed, epoch])
    ends = np.cumsum(np.asarray(row_groups, np.int64))
    draws = np.arange(ends[-1]) if rows is None else rows + _occurrences(rows) * ends[-1]
    bounds = ends if rows is None else np.searchsorted(rows, ends)
    groups = np.split(draws, bounds[:-1])
    shuffled = rng.permutation(len(groups))
    windows = (
        np.concatenate([groups[group] for group in shuffled[at : at + WINDOW]]) for at in range(0, len(groups), WINDOW)
    )
    return np.concatenate([rng.permutation(window) for window in windows])


def training_share(order: Int64Array, batch_size: int, rank: int, world_size: int) -> Int64Array:
    """The draws of one rank, batch after batch of `batch_size`.

    The last draws that do not fill a batch on every rank are left out of this epoch (other ones each epoch), so that
    all ranks take the same number of steps.
    """
    whole = len(order) // (batch_size * world_size) * (batch_size * world_size)
    return order[:whole].reshape(-1, world_size, batch_size)[:, rank].reshape(-1)


def evaluation_share(num_rows: int, rank: int, world_size: int) -> Int64Array:
    """The rows of one rank: every row belongs to exactly one, whatever the number of ranks."""
    return np.arange(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)


def _balanced(labels: Int64Array, num_draws: int, rng: np.random.Generator) -> Int64Array:
    """As many rows of each class as of every other, give or take one; no row again before all others of its class."""
    known = rng.permutation(np.unique(labels))
    quotas = [num_draws // len(known) + (index < num_draws % len(known)) for index in range(len(known))]
    drawn = []
    for label, quota in zip(known, quotas, strict=True):
        members = np.flatnonzero(labels == label)
        drawn += [np.tile(members, quota // len(members)), rng.permutation(members)[: quota % len(members)]]
    return np.concatenate(drawn)


def _occurrences(rows: Int64Array) -> Int64Array:
    """How often the same row came before, for sorted rows: [3, 3, 7] gives [0, 1, 0]."""
    positions = np.arange(len(rows))
    return positions - np.searchsorted(rows, rows)
