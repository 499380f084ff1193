"""[Ray Train] What each training worker runs: it finds its rank, device and share of the data, then calls the loop."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import ray.train
import ray.train.torch

from pipeline.data import shards
from pipeline.data.loading import Loader
from pipeline.inference import bundle
from pipeline.models._contract import ModelConfig
from pipeline.tracking import journal, system
from pipeline.training import checkpoint, lines, start
from pipeline.training.checkpoint import Position
from pipeline.training.guard import DivergedError
from pipeline.training.loop import Epoch, Progress, fit
from pipeline.training.recipe import Recipe

Observer = Callable[[Epoch], None]

log = logging.getLogger("ventral.training")


@dataclass(frozen=True)
class Assignment:
    """What all workers of a run are told.

    Attributes:
        folder: of the run; must be reachable from every node.
        source: the dataset, by the manifest that the driver has read: a newer one may have come since.
        model: the recipe's model, with the number of classes of the shards.
        checkpoints: of the run; must be reachable from every node.
        is_tracked: whether `folder` holds a journal, to which rank 0 tells what there is to say.
        system_metrics: and the first worker of each node, how busy that is.
    """

    folder: Path
    source: shards.Shards
    recipe: Recipe
    model: ModelConfig
    provenance: dict[str, str]
    checkpoints: checkpoint.Store
    is_tracked: bool = False
    system_metrics: bool = False


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
    recipe, source = assignment.recipe, assignment.source
    device = ray.train.torch.get_device()
    model = start.build(assignment.model, recipe.seed, recipe.start, assignment.folder)
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
    with _watched(assignment), _Teller(assignment, source) if rank == 0 else nullcontext(_say_nothing) as observe:
        try:
            metrics = fit(
                model,
                loader,
                recipe,
                device=device,
                checkpoints=assignment.checkpoints,
                observe=observe,
                notice=lines.Ticker(log) if rank == 0 else _say_nothing,
            )
        except DivergedError as error:  # on every rank
            return error
    if rank == 0:
        bundle.save(
            assignment.folder / "bundle",
            model,
            assignment.model,
            classes=source.manifest.classes,
            decoding=source.manifest.decoding,
            search=loader.search,
            metrics=metrics,
            provenance=assignment.provenance | {"dataset_digest": source.manifest.digest},
        )
    return None


class _Teller:
    """Tells people and the run's journal about every epoch; on rank 0."""

    def __init__(self, assignment: Assignment, source: shards.Shards) -> None:
        self._store = assignment.checkpoints
        self._measured_on = journal.input_name(source.manifest.dataset, "val"), source.manifest.digest
        self._writer: journal.Writer | None = None
        self._kept = set[int]()  # epochs whose checkpoint MLflow may believe to be there
        if assignment.is_tracked:
            self._writer = journal.Writer(assignment.folder / journal.FOLDER, "rank0")
            earlier = max((position.epoch for position in self._store.positions()), default=0)
            self._kept = set(range(1, earlier + 1))

    def __enter__(self) -> Observer:
        return self._tell

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._writer is None:
            return
        try:
            if error is None:  # else storage may be what failed, and that error is the one to tell
                self._tell_what_is_gone(self._writer)
        finally:
            self._writer.close()

    def _tell(self, epoch: Epoch) -> None:
        """Before the checkpoint is committed: what lies before one is not said again when a run is resumed from it."""
        log.info("%s", lines.of_epoch(epoch))
        if self._writer is None:
            return
        self._tell_what_is_gone(self._writer)
        name, step = Position(epoch.number).name, epoch.number
        measured = {key: value for key, value in epoch.metrics.items() if key.startswith("val/")}
        self._writer.checkpoint(name, step, {"path": f"{self._store.folder}/{name}", "kept": "true"})
        self._kept.add(step)
        others = {key: epoch.metrics[key] for key in epoch.metrics if key not in measured}
        self._writer.metrics(others | {"epoch_s": epoch.seconds}, step)
        self._writer.metrics(measured, step, checkpoint=name, dataset=self._measured_on)
        self._writer.sync()

    def _tell_what_is_gone(self, writer: journal.Writer) -> None:
        """Say which checkpoints were removed since; their figures stay."""
        there = {position.epoch for position in self._store.positions() if position.offset == 0}
        for step in sorted(self._kept - there):
            writer.checkpoint(Position(step).name, step, {"kept": "false"})
        self._kept &= there


def _say_nothing(_: Epoch | Progress) -> None:
    """What the other ranks have to tell."""


def _watched(assignment: Assignment) -> AbstractContextManager[None]:
    """Write down how busy this node is, once per node."""
    context = ray.train.get_context()
    if not (assignment.is_tracked and assignment.system_metrics) or context.get_local_rank() != 0:
        return nullcontext()
    return system.watched(assignment.folder, f"node{context.get_node_rank()}")
