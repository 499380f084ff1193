"""Best epochs, patience and drops of the rate, by hand and against torch's scheduler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.training.stopping import Config, best_epoch, check, is_best, mode_of, num_drops, should_stop


def config(**keys: Any) -> Config:
    return parse(Config, keys, "here")


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        *(("val/top1", "max"), ("val/mean_recall", "max"), ("val/mAP", "max"), ("val/f1-score", "max")),
        *(("val/loss", "min"), ("train/loss", "min"), ("val/top1_error", None), ("images_per_s", None)),
    ],
)
def test_mode_follows_from_the_name_or_is_asked_for(metric: str, mode: str | None) -> None:
    if mode is None:
        with pytest.raises(ConfigError, match=f"'{metric}'.*give mode min or max"):
            mode_of(config(metric=metric))
    else:
        assert mode_of(config(metric=metric)) == mode
    assert mode_of(config(metric=metric, mode="min")) == "min"


def test_missing_metric_names_those_that_there_are() -> None:
    check(config(metric="val/loss"), ["val/top1", "val/loss"])
    with pytest.raises(ConfigError, match=r"reports no 'val/top2'; did you mean 'val/top1'\?"):
        check(config(metric="val/top2", mode="max"), ["val/top1", "val/loss"])


def test_best_epoch_is_the_first_of_the_best_and_never_one_without_a_number() -> None:
    assert best_epoch(config(), [0.1, 0.5, 0.3, 0.5]) == 1
    assert best_epoch(config(metric="val/loss"), [3.0, math.nan, 1.0, 1.0]) == 2
    assert [is_best(config(), [0.1, 0.5, 0.5, 0.6][:end]) for end in (1, 2, 3, 4)] == [True, True, False, True]


def stops_at(values: list[float], **keys: Any) -> int | None:
    given_config = config(**keys)
    return next((end for end in range(1, len(values) + 1) if should_stop(given_config, values[:end])), None)


def test_run_stops_after_patience_epochs_without_a_better_value() -> None:
    values = [0.1, 0.3, 0.2, 0.3, 0.1, 0.4]
    assert stops_at(values, patience=3) == 5
    assert stops_at(values, patience=4) is None
    assert stops_at(values) is None
    assert stops_at([2.0, 1.0, math.nan, math.nan], patience=2, metric="val/loss") == 4


def test_small_gains_do_not_count_until_they_add_up() -> None:
    values = [0.50, 0.51, 0.52, 0.53, 0.54]
    assert stops_at(values, patience=3, min_delta=0.1) == 4
    assert stops_at(values, patience=3, min_delta=0.025) is None  # 0.53 is 0.03 above the first


@given(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=30), st.integers(1, 4))
def test_drops_are_those_of_torchs_reduce_on_plateau(values: list[float], patience: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.5, patience=patience - 1, threshold=0.0, threshold_mode="abs", eps=0
    )
    for value in values:
        theirs.step(value)
    drops = num_drops(config(plateau_patience=patience), values)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5**drops)


def test_answers_depend_on_the_values_only_so_a_resumed_run_decides_alike() -> None:
    given_config, values = config(patience=2), [0.2, 0.4, 0.3, 0.35]
    stored = list(values[:2])  # what a checkpoint holds
    assert [should_stop(given_config, [*stored, *values[2:end]]) for end in (3, 4)] == [False, True]
