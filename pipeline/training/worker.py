"""[Ray Train] What each training worker runs: it finds its rank, device and share of the data, then calls the loop."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray.train
import ray.train.torch
import torch

from pipeline import models
from pipeline.data import shards
from pipeline.data.loading import Loader
from pipeline.inference import bundle
from pipeline.models._contract import ClassifierConfig
from pipeline.training import checkpoint, start
from pipeline.training.guard import DivergedError
from pipeline.training.loop import Epoch, Recipe, fit

if TYPE_CHECKING:
    from pipeline.tracking.runs import Run

log = logging.getLogger("ventral.training")


@dataclass(frozen=True)
class Assignment:
    """What all workers of a run are told.

    Attributes:
        folder: of the run; must be reachable from every node.
        model: the recipe's model, with the number of classes of the shards.
        checkpoints: of the run; must be reachable from every node.
        tracking: MLflow's address and the run's id, for rank 0; None logs nowhere.
    """

    folder: Path
    shards: Path
    recipe: Recipe
    model: ClassifierConfig
    provenance: dict[str, str]
    checkpoints: checkpoint.Store
    tracking: tuple[str, str] | None = None


def work(config: dict[str, Assignment]) -> DivergedError | None:
    """Train on this worker; rank 0 writes the bundle.

    Returns:
        The error of a run that diverged. What is raised, Ray answers by starting the workers anew, and a run that is
        exactly resumed diverges again.
    """
    assignment, context = config["assignment"], ray.train.get_context()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # one pipeline per epoch, each with its own announcement
    rank, world_size = context.get_world_rank(), context.get_world_size()
    recipe, source = assignment.recipe, shards.load(assignment.shards)
    device = ray.train.torch.get_device()
    torch.manual_seed(recipe.seed)  # the same initial weights everywhere
    model = models.build(assignment.model)
    if recipe.start is not None:
        start.restore(model, assignment.folder / start.INITIAL)
        start.freeze(model, recipe.start.freeze)
    loader = Loader(
        source,
        model.spec,
        recipe.loading,
        augment=recipe.augment,
        seed=recipe.seed,
        rank=rank,
        world_size=world_size,
        device=device,
    )
    run = _attach(*assignment.tracking) if assignment.tracking and rank == 0 else None

    def observe(epoch: Epoch) -> None:
        if rank == 0:
            log.info("%s", describe(epoch))
        if run is not None:
            run.log_metrics(epoch.metrics, step=epoch.number)

    try:
        metrics = fit(model, loader, recipe, device=device, checkpoints=assignment.checkpoints, observe=observe)
    except DivergedError as error:  # on every rank
        return error
    if rank == 0:
        bundle.save(
            assignment.folder / "bundle",
            model,
            assignment.model,
            classes=source.manifest.classes,
            decoding=source.manifest.decoding,
            metrics=metrics,
            provenance=assignment.provenance | {"dataset_digest": source.manifest.digest},
        )
    return None


def _attach(uri: str, run_id: str) -> Run:
    from pipeline.tracking import runs  # noqa: PLC0415  (MLflow takes seconds to import, and only rank 0 needs it)

    return runs.attach(uri, run_id)


def describe(epoch: Epoch) -> str:
    """One line of progress for a person."""
    left_s = (epoch.total - epoch.number) * epoch.seconds
    values = epoch.metrics
    return (
        f"epoch {epoch.number}/{epoch.total}  loss {values['train/loss']:.4f}  val loss {values['val/loss']:.4f}  "
        f"val top-1 {values['val/top1']:.4f}  lr {values['lr']:.2g}  {values['images_per_s']:.0f} images/s  "
        f"data wait {values['data_wait_share']:.0%}  about {left_s:.0f} s left"
    )
