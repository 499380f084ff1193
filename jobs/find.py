"""Find a learning rate and the largest batch for a training, before it is started; reads the same YAML as `train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import psutil
from pydantic import Field

from jobs._run import Job, run, tracking_uri
from pipeline.evaluation import figures
from pipeline.tracking import registry
from pipeline.training import experiment, start
from pipeline.training.finder import Curve, RangeTest
from pipeline.training.search import Search


class Find(Job):
    """What is looked for; of the training only the recipe and the kind of device are used.

    Attributes:
        name: of the training; the figure goes to `storage/find/<name>.png`.
        range_test: the rates that are tried; None: none.
        batch: look for the largest batch.
        memory_gib: that a step may take on a CPU; default: half of what is free, for each worker.
    """

    name: str = Field(pattern=registry.NAME)
    training: experiment.Config
    range_test: RangeTest | None = RangeTest()
    batch: bool = True
    memory_gib: float | None = Field(default=None, gt=0)


def find(job: Find) -> None:
    """Look, and say what to write into the YAML. Runs in this process: neither Ray nor workers are started."""
    source, begins = experiment.source_of(job.training, job.store), job.training.recipe.start
    asks_registry = begins is not None and begins.weights.startswith(start.REGISTERED)
    with tracking_uri(job.store) if asks_registry else nullcontext("") as uri:
        search = Search.of(job.training, source, (job.data_folder, job.store), uri)
    batch_size = job.training.recipe.loading.batch_size
    if job.range_test is not None:
        curve = search.rates(job.range_test)
        print(f"tried    {len(curve.rates)} steps of {batch_size} images, up to a rate of {curve.rates[-1]:.2g}")
        print(f"figure   {_drawn(job, curve)}")
        print(
            f"rate     training.recipe.optim.lr={curve.suggestion:.2g}  (where the loss falls most steeply)", flush=True
        )
    if job.batch:
        free = psutil.virtual_memory().available // 2 // job.training.cluster.num_workers
        limit = free if job.memory_gib is None else int(job.memory_gib * 2**30)
        room = "the GPU" if job.training.cluster.gpu else f"{limit / 2**30:.1f} GiB"
        print(f"batch    training.recipe.loading.batch_size={search.batch(limit)}  (the largest that fits into {room})")


def _drawn(job: Find, curve: Curve) -> Path:
    path = job.store / "find" / f"{job.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{job.name}, batch {job.training.recipe.loading.batch_size}"
    figures.range_test(curve.rates, curve.losses, curve.smoothed, title).savefig(path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.find jobs/configs/train/lenet5_digits.yaml [key=value ...]."""
    return run(Find, find, argv)


if __name__ == "__main__":
    sys.exit(main())
