"""The training benchmark's blocks under Ray Train: two workers of a real head, with the clock of the plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from pipeline.benchmark import training
from pipeline.benchmark.clock import Steps
from pipeline.benchmark.training_report import table
from pipeline.config import validate
from pipeline.training.recipe import Recipe


@contextmanager
def _head(num_cpus: int) -> Iterator[str]:
    assert num_cpus == 2
    yield ray.get_runtime_context().gcs_address


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_loop_under_ray_train_is_compared_with_the_same_loop_without(tmp_path: Path) -> None:
    raw = {"model": {"name": "lenet5"}, "loading": {"batch_size": 4, "reader": "local"}}
    steps = Steps(warm_up=1, timed=2, watched=1)
    case = training.Case(recipe=validate(Recipe, raw), ways=("loop", "ray"), workers=(2,), steps=steps)
    found = training.run(training.Config(cases={"lenet5": case}, rounds=1), tmp_path, _head)
    assert found.left_out == {}
    loop, on_ray = "lenet5, synthetic, loop, 2 workers", "lenet5, synthetic, loop under Ray Train, 2 workers"
    assert list(found.blocks) == [loop, on_ray]
    assert {figures.num_threads for figures in found.rounds[0].values()} == {1}  # Ray's doing and ours
    assert found.rounds[0][on_ray].peak_bytes > found.rounds[0][loop].peak_bytes > 2**24  # Ray's own processes count
    assert f"{on_ray}: " in table(found)
    assert list(tmp_path.iterdir()) == []
