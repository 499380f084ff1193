"""Find a learning rate and the largest batch for a training, before it is started; reads the same YAML as `train`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import psutil
from pydantic import Field

from jobs._run import Job, run, tracking_uri
from pipeline.data import shards
from pipeline.data.loading import Loader
from pipeline.evaluation import figures
from pipeline.models._contract import Classifier
from pipeline.tracking import registry
from pipeline.training import experiment, finder, launch, loop, start


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
    range_test: finder.RangeTest | None = finder.RangeTest()
    batch: bool = True
    memory_gib: float | None = Field(default=None, gt=0)


def find(job: Find) -> None:
    """Look, and say what to write into the YAML. Runs in this process: neither Ray nor workers are started."""
    source = shards.load(job.store / job.training.shards)
    recipe, device = _alone(job.training.recipe), "cuda" if job.training.cluster.gpu else "cpu"
    model = _model(job, source)
    loader = Loader(source, model.spec, recipe.loading, augment=recipe.augment, seed=recipe.seed, device=device)
    if job.range_test is not None:
        curve = loop.find_rate(model, loader, recipe, job.range_test, device=device)
        steps, batch_size = len(curve.rates), loader.global_batch_size
        print(f"tried    {steps} steps of {batch_size} images, up to a rate of {curve.rates[-1]:.2g}")
        print(f"figure   {_drawn(job, curve, batch_size)}")
        print(
            f"rate     training.recipe.optim.lr={curve.suggestion:.2g}  (where the loss falls most steeply)", flush=True
        )
    if job.batch:
        limit = None if device == "cuda" else _limit_bytes(job)
        size = loop.find_batch(model, loader, recipe, device=device, limit_bytes=limit)
        room = "the GPU" if limit is None else f"{limit / 2**30:.1f} GiB"
        print(f"batch    training.recipe.loading.batch_size={size}  (the largest that fits into {room})")


def _drawn(job: Find, curve: finder.Curve, batch_size: int) -> Path:
    path = job.store / "find" / f"{job.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{job.name}, batch {batch_size}"
    figures.range_test(curve.rates, curve.losses, curve.smoothed, title).savefig(path)
    return path


def _alone(recipe: loop.Recipe) -> loop.Recipe:
    """The recipe for one process without Ray, whose weights are thrown away."""
    loading = recipe.loading.model_copy(update={"reader": "local"})
    return recipe.model_copy(update={"loading": loading, "ema": None, "keep_best": False, "compile": False})


def _model(job: Find, source: shards.Shards) -> Classifier:
    recipe = job.training.recipe
    asks_registry = recipe.start is not None and recipe.start.weights.startswith(start.REGISTERED)
    with tempfile.TemporaryDirectory() as room, tracking_uri(job.store) if asks_registry else nullcontext("") as uri:
        experiment.prepare(recipe, source, Path(room), (job.data_folder, job.store), uri)
        return start.build(launch.fitted(recipe.model, source), recipe.seed, recipe.start, Path(room))


def _limit_bytes(job: Find) -> int:
    if job.memory_gib is not None:
        return int(job.memory_gib * 2**30)
    return psutil.virtual_memory().available // 2 // job.training.cluster.num_workers


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line: python -m jobs.find jobs/configs/train/lenet5_digits.yaml [key=value ...]."""
    return run(Find, find, argv)


if __name__ == "__main__":
    sys.exit(main())
