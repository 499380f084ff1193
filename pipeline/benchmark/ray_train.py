"""[Ray Train] This project's loop in the workers of a TorchTrainer, with the clock of the loop without Ray."""

from __future__ import annotations

import os
from typing import Any

import ray
import ray.train
import ray.train.torch

from pipeline.benchmark import own_loop, ventral
from pipeline.benchmark.clock import Figures
from pipeline.benchmark.training_block import Task, set_up
from pipeline.training import launch


def run(task: Task) -> Figures:
    """In workers of the head that the task names, which has the resources for them."""
    ray.init(address=task.ray_address, log_to_driver=False, logging_level="ERROR")
    cluster = launch.Cluster(
        num_workers=task.num_workers, cpus_per_worker=task.threads, gpu=task.device == "cuda", max_failures=0
    )
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"task": task, "roots": [os.getpid(), *ventral.ray_processes()]},
        scaling_config=launch.scaling(cluster),
        run_config=ray.train.RunConfig(
            name="benchmark",
            storage_path=str(task.scratch.absolute() / "ray"),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    figures = trainer.fit().return_value
    assert isinstance(figures, Figures)
    return figures


def _work(config: dict[str, Any]) -> Figures:
    """What each worker runs; the figures of rank 0 are those that come back."""
    task, rank = config["task"], ray.train.get_context().get_world_rank()
    set_up(task)
    return own_loop.train(task, rank, ray.train.torch.get_device(), config["roots"])
