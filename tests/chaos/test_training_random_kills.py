"""Trainings whose workers and nodes die at random moments; run by `make chaos` only.

The moments come from a fixed seed, but a machine is never twice equally fast: a failure names the attempt, not a way to
repeat it. States that can be named have their tests in tests/integration/test_training_faults.py.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs._process import Service
from pipeline.config import validate
from pipeline.data import shards
from pipeline.inference.bundle import Bundle, load
from pipeline.training import launch
from pipeline.training.checkpoint import Config
from pipeline.training.recipe import Recipe
from tests import local_nodes

PATIENCE_S = 600.0
NUM_KILLS = 6
EPOCHS, LONG = 120, 300
RECIPE: dict[str, Any] = {
    "model": {"name": "lenet5"},
    "loading": {"batch_size": 4, "num_tasks": 0},
    "augment": {"crop": "none", "flip": True},
    "optim": {"lr": 0.02},
}
EVERY_THIRD = Config(every_steps=3)
QUICK_TO_NOTICE = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_health_check_failure_threshold": "2",
    "RAY_health_check_period_ms": "500",
}


def train(folder: Path, source: shards.Shards, epochs: int = EPOCHS, **keys: Any) -> Bundle:
    cluster = launch.Cluster(**{"num_workers": 2, "max_failures": 2 * NUM_KILLS, **keys})
    return launch.train(folder, source, validate(Recipe, RECIPE | {"epochs": epochs}), cluster, checkpoints=EVERY_THIRD)


@contextmanager
def training(folder: Path, source: shards.Shards, **keys: Any) -> Iterator[Future[Bundle]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(train, folder, source, **keys)


def draws(folder: Path) -> int:
    """How far the newest checkpoint is."""
    positions = launch.store_of(folder).positions()
    return positions[-1].epoch * 40 + positions[-1].offset if positions else 0


def wait_beyond(folder: Path, mark: int, result: Future[Bundle]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while draws(folder) <= mark and not result.done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_a_worker(head: Service, draw: random.Random) -> bool:
    """Whether there was one."""
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(head.pid).children(recursive=True)
        workers = [process for process in below if "RayTrainWorker" in "".join(process.cmdline())]
        if workers:
            draw.choice(workers).kill()
            return True
    return False


@pytest.fixture(scope="module")
def undisturbed(cluster: None, stripes: shards.Shards, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return train(tmp_path_factory.mktemp("undisturbed") / "run", stripes)


def test_workers_killed_at_random_moments_change_no_bit(
    undisturbed: Bundle, ray_head: Service, stripes: shards.Shards, tmp_path: Path
) -> None:
    draw, num_killed = random.Random(0), 0
    with training(tmp_path / "run", stripes) as result:
        for _ in range(NUM_KILLS):
            wait_beyond(tmp_path / "run", draws(tmp_path / "run"), result)
            time.sleep(draw.uniform(0, 1))
            if not result.done():
                num_killed += kill_a_worker(ray_head, draw)
        made = result.result(PATIENCE_S)
    assert num_killed >= 3, "it was over too soon: raise epochs"
    assert made.card.weights_sha256 == undisturbed.card.weights_sha256


def lose_and_replace_a_node(source: Path, folder: Path) -> None:
    """Train on a cluster of two nodes; the second node goes inside an epoch, and another one comes."""
    with local_nodes.cluster(num_cpus=1) as cluster:
        second = cluster.add_node(num_cpus=1)
        with training(folder, shards.load(source)) as result:
            wait_beyond(folder, 3 * 40 + 10, result)
            cluster.remove_node(second, allow_graceful=False)
            assert not result.done()
            cluster.add_node(num_cpus=1)
            result.result(PATIENCE_S)


def test_node_that_is_lost_and_replaced_changes_no_bit(
    undisturbed: Bundle, stripes: shards.Shards, tmp_path: Path
) -> None:
    local_nodes.alone(
        lose_and_replace_a_node, stripes.path, tmp_path / "run", timeout_s=PATIENCE_S, env=QUICK_TO_NOTICE
    )
    assert load(tmp_path / "run" / "bundle").card.weights_sha256 == undisturbed.card.weights_sha256


def has_a_worker(node: Any) -> bool:
    """Whether a training worker lives on a node of the cluster."""
    (raylet,) = node.all_processes["raylet"]
    return "RayTrainWorker" in "".join(
        word for child in psutil.Process(raylet.process.pid).children() for word in child.cmdline()
    )


def lose_a_node_and_add_one_later(source: Path, folder: Path) -> None:
    """Train on two workers, after the loss of a node on one, and on two again."""
    with local_nodes.cluster(num_cpus=1) as cluster:
        second = cluster.add_node(num_cpus=1)
        with training(folder, shards.load(source), min_workers=1, epochs=LONG) as result:
            wait_beyond(folder, 3 * 40 + 10, result)
            cluster.remove_node(second, allow_graceful=False)
            wait_beyond(folder, draws(folder) + 40, result)  # an epoch, more than a checkpoint that was on its way
            third = cluster.add_node(num_cpus=1)
            while not (has_grown := has_a_worker(third)) and not result.done():
                time.sleep(0.5)
            assert has_grown, "it was over too soon: raise LONG"
            wait_beyond(folder, draws(folder), result)
            result.result(PATIENCE_S)


def test_run_with_a_range_of_workers_shrinks_with_a_lost_node_and_grows_with_a_new_one(
    stripes: shards.Shards, tmp_path: Path
) -> None:
    local_nodes.alone(
        lose_a_node_and_add_one_later, stripes.path, tmp_path / "run", timeout_s=PATIENCE_S, env=QUICK_TO_NOTICE
    )
    assert load(tmp_path / "run" / "bundle").card.metrics["val/top1"] > 0.9
    newest = launch.store_of(tmp_path / "run").newest("cpu")
    assert newest is not None
    assert len(newest.progress["history"]) == LONG
