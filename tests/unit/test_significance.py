"""The statistics by hand, against SciPy's own tests, and by how often they raise a false alarm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.tracking.comparison.significance import bootstrap, holm, mcnemar, welch
from pipeline.types import BoolArray


def disagreeing(only_first: int, only_second: int, both: int = 20, neither: int = 5) -> tuple[BoolArray, BoolArray]:
    """What two models got right, with so many images of each kind."""
    pattern = [(True, False)] * only_first + [(False, True)] * only_second + [(True, True)] * both
    first, second = np.array(pattern + [(False, False)] * neither).T
    return first, second


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (2, 8, 1.0),  # never for the first, however sure the opposite
        (1, 0, 1.0),
        (5, 0, 2 / 2**5),  # twice that of five heads in five throws
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
    ],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p: float) -> None:
    first, second = disagreeing(only_first, only_second)
    assert mcnemar(first, second) == pytest.approx(p)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_twice_the_one_sided_binomial_test_of_the_disagreements(only_first: int, only_second: int) -> None:
    found = mcnemar(*disagreeing(only_first, only_second))
    both = only_first + only_second
    one_sided = stats.binomtest(only_first, both, alternative="greater").pvalue if both else 1.0
    assert found == pytest.approx(min(1.0, 2 * one_sided))
    if only_first > only_second:
        assert found == pytest.approx(stats.binomtest(only_first, both).pvalue)  # the usual two-sided one


def test_bootstrap_interval_agrees_with_scipys() -> None:
    first, second = disagreeing(60, 35, both=300, neither=105)
    differences = first.astype(float) - second
    found = bootstrap(differences)
    theirs = stats.bootstrap(
        (differences,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.mean == pytest.approx(25 / 500)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)
    error = np.sqrt((95 / 500 - found.mean**2) / 500)  # of the mean, by the formula of the variance
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.p == pytest.approx(2 * stats.norm.sf(found.mean / error), abs=0.005)  # zero counts on both sides


def test_bootstrap_is_seeded_and_bounded_and_never_for_the_worse() -> None:
    first, second = disagreeing(40, 20)
    differences = first.astype(float) - second
    assert bootstrap(differences) == bootstrap(differences)
    assert bootstrap(differences) != bootstrap(differences, seed=1)
    opposite = bootstrap(-differences)
    assert (opposite.mean, opposite.p) == (-bootstrap(differences).mean, 1.0)
    sure = bootstrap(np.ones(50))
    assert (sure.mean, sure.low, sure.high, sure.p) == (1.0, 1.0, 1.0, 2 / 10_001)
    assert bootstrap(np.zeros(50)).p == 1.0


def test_bootstrap_of_shares_of_seeds_resamples_images() -> None:
    rng = np.random.default_rng(5)
    differences = rng.choice([-2 / 3, -1 / 3, 0, 1 / 3, 1], 400, p=[0.05, 0.1, 0.6, 0.15, 0.1])
    drawn = [rng.choice(differences, 400).mean() for _ in range(4000)]
    found = bootstrap(differences)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.006)


@pytest.mark.parametrize("sizes", [(3, 3), (2, 5), (10, 4)])
def test_welch_agrees_with_scipy(sizes: tuple[int, int]) -> None:
    rng = np.random.default_rng(sum(sizes))
    first, second = rng.normal(0.9, 0.01, sizes[0]).tolist(), rng.normal(0.91, 0.03, sizes[1]).tolist()
    better, worse = sorted((first, second), key=lambda values: -np.mean(values))
    assert welch(better, worse) == pytest.approx(stats.ttest_ind(better, worse, equal_var=False).pvalue)
    assert welch(worse, better) == 1.0


def test_welch_by_hand() -> None:
    """Means 3 and 1 of variance 1 each: t = sqrt(2) at 2 degrees of freedom, whose tails are 1 - t / sqrt(2 + t^2)."""
    assert welch([2.0, 4.0], [0.0, 2.0]) == pytest.approx(1 - np.sqrt(2) / np.sqrt(2 + 2))


def test_welch_of_one_seed_has_no_answer_and_of_none_that_vary_a_plain_one() -> None:
    assert welch([0.9], [0.8, 0.81]) is None
    assert welch([], [0.8, 0.81]) is None
    assert welch([0.8], [0.9, 0.91]) == 1.0  # that the first is behind needs no test
    assert welch([0.9, 0.9], [0.9, 0.9, 0.9]) == 1.0
    assert welch([0.9, 0.9], [0.8, 0.8]) == 0.0
    assert welch([0.8, 0.8], [0.9, 0.9]) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_equal_models_raise_a_false_alarm_no_more_often_than_promised() -> None:
    rng, alarms = np.random.default_rng(0), {"images": 0, "bootstrap": 0, "seeds": 0}
    for trial in range(400):
        kind = rng.choice(3, 300, p=[0.1, 0.1, 0.8])
        first, second = kind != 0, kind != 1
        alarms["images"] += mcnemar(first, second) < 0.05
        alarms["bootstrap"] += bootstrap(first.astype(float) - second, num_draws=1000, seed=trial).p < 0.05
        alarms["seeds"] += (welch(rng.normal(0, 1, 3).tolist(), rng.normal(0, 1, 3).tolist()) or 1) < 0.05
    assert alarms["images"] / 400 < 0.06
    assert alarms["bootstrap"] / 400 < 0.08
    assert alarms["seeds"] / 400 < 0.07


def test_a_real_difference_is_found() -> None:
    rng = np.random.default_rng(0)
    kind = rng.choice(3, 2000, p=[0.02, 0.07, 0.91])
    assert mcnemar(kind != 0, kind != 1) < 0.001
    assert bootstrap((kind != 0).astype(float) - (kind != 1)).p < 0.001
