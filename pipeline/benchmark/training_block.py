"""One block of the training benchmark: one loop, measured in a process of its own; see `clock` for what is measured.

Each way to train lives in its own file, which alone imports its library, and has one verb: `run(task) -> Figures`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch.multiprocessing.spawn import spawn

from pipeline.benchmark.clock import Clock, Figures, Steps
from pipeline.config import Strict
from pipeline.errors import DataError
from pipeline.training.recipe import Recipe

Way = Literal["loop", "ray", "script"]
"""This project's loop in plain processes; the same under Ray Train; a plain script of the reference's shape."""
Data = Literal["synthetic", "real"]
"""One batch that lies in memory, again and again; or encoded photos: shards for the loop, class folders for the script.
"""
MODULES: dict[Way, str] = {"loop": "own_loop", "ray": "ray_train", "script": "plain_script"}


class Task(Strict):
    """What one block does.

    Attributes:
        recipe: what is trained, and how; one epoch of `steps`.
        device: `cpu` or `cuda`; of several GPUs each worker takes its own.
        threads: of torch, in each worker.
        tf32: whether fp32 products may be computed in TF32 on a GPU.
        scratch: folder for what workers tell each other; `shards` and `folders` hold the photos of `real`.
        ray_address: of the Ray head, for the way that needs one.
        began: when the block was started, in seconds since 1970.
    """

    way: Way
    data: Data
    recipe: Recipe
    steps: Steps
    num_workers: int = Field(default=1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=1, ge=1)
    tf32: bool = False
    scratch: Path
    ray_address: str | None = None
    began: float

    @property
    def global_batch_size(self) -> int:
        """Images per step on all workers."""
        return self.recipe.loading.batch_size * self.num_workers

    def clock(self, device: torch.device, roots: list[int]) -> Clock:
        """The clock of one worker."""
        return Clock(self.steps, device, self.began, roots)


Rank = Callable[[Task, int, torch.device, list[int]], Figures]
"""What one worker does: task, rank, device, the processes of the block."""


def main(asked: Path, answer: Path) -> None:
    """Do the task in this process."""
    task = Task.model_validate_json(asked.read_bytes())
    run = cast(Callable[[Task], Figures], importlib.import_module(f"pipeline.benchmark.{MODULES[task.way]}").run)
    answer.write_text(run(task).model_dump_json())


def in_processes(work: Rank, task: Task) -> Figures:
    """Have every rank do its work, one alone in this process, several in processes of a group; returns rank 0's.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them failed; the others are ended.
    """
    if task.num_workers == 1:
        return _prepared(work, task, 0, [os.getpid()])
    spawn(_join, (work, task, os.getpid()), nprocs=task.num_workers)  # type: ignore[no-untyped-call]  # torch's
    return Figures.model_validate_json((task.scratch / "rank0.json").read_bytes())


def set_up(task: Task) -> None:
    """Set the arithmetic of this worker.

    Raises:
        DataError: it does not have the threads that all are to have.
    """
    torch.backends.cuda.matmul.allow_tf32 = task.tf32
    torch.backends.cudnn.allow_tf32 = task.tf32
    if torch.get_num_threads() != task.threads:
        raise DataError(f"expected a worker with {task.threads} threads, got {torch.get_num_threads()}")


def _join(rank: int, work: Rank, task: Task, root: int) -> None:
    """One process of several; rank 0 leaves its figures in a file."""
    rendezvous = f"file://{task.scratch.absolute()}/rendezvous"
    backend = "nccl" if task.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=task.num_workers)
    figures = _prepared(work, task, rank, [root])
    if rank == 0:
        (task.scratch / "rank0.json").write_text(figures.model_dump_json())
    dist.destroy_process_group()


def _prepared(work: Rank, task: Task, rank: int, roots: list[int]) -> Figures:
    set_up(task)
    device = torch.device("cpu") if task.device == "cpu" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return work(task, rank, device, roots)
