"""Who reads which row: properties over any sizes, seeds and numbers of workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.order import (
    WINDOW,
    Sampling,
    evaluation_share,
    sampled_rows,
    training_order,
    training_share,
)

GROUPS = st.lists(st.integers(1, 9), min_size=1, max_size=40)
NUMBERS = st.integers(0, 1000)


@given(GROUPS, NUMBERS, NUMBERS)
def test_training_order_is_a_permutation_and_a_function_of_seed_and_epoch(
    groups: list[int], seed: int, epoch: int
) -> None:
    order = training_order(groups, seed, epoch)
    assert sorted(order.tolist()) == list(range(sum(groups)))
    np.testing.assert_array_equal(order, training_order(groups, seed, epoch))


def test_training_order_differs_by_seed_and_by_epoch() -> None:
    orders = {tuple(training_order([16] * 8, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_training_order_mixes_within_windows_of_row_groups_only() -> None:
    order = training_order([4] * (2 * WINDOW), 0, 0)
    first, second = (set((part // 4).tolist()) for part in np.split(order, 2))
    assert (len(first), len(second), first & second) == (WINDOW, WINDOW, set())
    assert len(set((order[:8] // 4).tolist())) > 2  # neighbours come from many groups


@given(st.integers(0, 200), st.integers(1, 7), st.integers(1, 5))
def test_training_shares_are_the_global_batches_cut_by_rank(num_rows: int, batch_size: int, world_size: int) -> None:
    order = np.random.default_rng(0).permutation(num_rows)
    shares = [training_share(order, batch_size, rank, world_size) for rank in range(world_size)]
    steps = num_rows // (batch_size * world_size)
    assert {len(share) for share in shares} == {steps * batch_size}
    together = np.concatenate([share.reshape(steps, batch_size) for share in shares], axis=1).reshape(-1)
    np.testing.assert_array_equal(together, order[: len(together)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_evaluation_covers_each_of_103_rows_once(world_size: int) -> None:
    shares = [evaluation_share(103, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(103))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(0, 300), st.integers(1, 12))
def test_evaluation_shares_partition_any_number_of_rows(num_rows: int, world_size: int) -> None:
    rows = np.concatenate([evaluation_share(num_rows, rank, world_size) for rank in range(world_size)])
    assert sorted(rows.tolist()) == list(range(num_rows))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(1, 5), NUMBERS)
def test_balanced_rows_hold_every_class_equally_often(labels: list[int], repeats: int, epoch: int) -> None:
    rows = sampled_rows(Sampling(balance=True, repeats=repeats), np.array(labels), 0, epoch)
    assert len(rows) == len(labels)
    counts = np.bincount(np.array(labels)[rows])
    present = counts[counts > 0]
    if len(labels) >= 5 * repeats:
        assert set(np.flatnonzero(counts)) == set(labels)
    assert present.max() - present.min() <= 2 * repeats


@given(st.integers(1, 200), st.integers(1, 7), NUMBERS)
def test_repeated_rows_come_so_many_times_and_fewer_of_them(num_rows: int, repeats: int, epoch: int) -> None:
    rows = sampled_rows(Sampling(repeats=repeats), np.zeros(num_rows, np.int64), 0, epoch)
    counts = np.bincount(rows)
    assert len(rows) == num_rows
    assert sorted(counts[counts > 0])[1:] == [repeats] * (len(counts[counts > 0]) - 1)  # the last one may be cut


@given(GROUPS, st.integers(1, 4), NUMBERS)
def test_repeated_draws_are_distinct_and_stay_in_their_window(groups: list[int], repeats: int, seed: int) -> None:
    num_rows = sum(groups)
    rows = np.sort(np.repeat(np.arange(num_rows), repeats))
    draws = training_order(groups, seed, 0, rows)
    assert sorted(draws.tolist()) == list(range(num_rows * repeats))
    np.testing.assert_array_equal(np.sort(draws % num_rows), rows)


@given(GROUPS, NUMBERS)
def test_every_row_once_is_the_plain_order(groups: list[int], seed: int) -> None:
    np.testing.assert_array_equal(
        training_order(groups, seed, 3, np.arange(sum(groups))), training_order(groups, seed, 3)
    )
