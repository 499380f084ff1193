"""Which rows are read, in which order, by whom: pure functions of (seed, epoch), with no input or output.

Rows are numbered through all shards of a split in the manifest's order. The order of an epoch does not depend on the
number of workers: a global batch is a run of consecutive rows of it, of which each rank takes its own part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.types import Int64Array

WINDOW = 16  # row groups mixed with each other; 16 x 128 rows


def training_order(row_groups: Sequence[int], seed: int, epoch: int) -> Int64Array:
    """A permutation of all rows: the row groups shuffled, then the rows within each window of row groups.

    Args:
        row_groups: rows in each row group.
        seed: of the run.
        epoch: counted from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    sizes = np.asarray(row_groups, np.int64)
    starts = np.cumsum(sizes) - sizes
    order: list[Int64Array] = []
    shuffled = rng.permutation(len(sizes))
    for at in range(0, len(shuffled), WINDOW):
        rows = np.concatenate(
            [np.arange(starts[group], starts[group] + sizes[group]) for group in shuffled[at : at + WINDOW]]
        )
        order.append(rng.permutation(rows))
    return np.concatenate(order)


def training_share(order: Int64Array, batch_size: int, rank: int, world_size: int) -> Int64Array:
    """The rows of one rank, batch after batch of `batch_size`.

    The last rows that do not fill a batch on every rank are left out of this epoch (other ones each epoch), so that all
    ranks take the same number of steps.
    """
    whole = len(order) // (batch_size * world_size) * (batch_size * world_size)
    return order[:whole].reshape(-1, world_size, batch_size)[:, rank].reshape(-1)


def evaluation_share(num_rows: int, rank: int, world_size: int) -> Int64Array:
    """The rows of one rank: every row belongs to exactly one, whatever the number of ranks."""
    return np.arange(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)
