"""A whole training run: fit, solve if the model has that stage, evaluate, register; all in MLflow, however it ends."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline import provenance
from pipeline.config import Strict, dump, flatten
from pipeline.data import loading, lookup, proposals, shards
from pipeline.errors import ConfigError
from pipeline.evaluation import run as evaluation
from pipeline.evaluation.detection_report import DetectionReport
from pipeline.evaluation.report import ClassificationReport, Report
from pipeline.inference import bundle, golden
from pipeline.inference.bundle import Bundle
from pipeline.models._detector import check_proposals
from pipeline.tracking import connection, registry, runs
from pipeline.training import checkpoint, launch, solve, start
from pipeline.training.recipe import Recipe
from pipeline.training.record import Record
from pipeline.types import Split, Views

NUM_GOLDEN = 4
"""Validation images that a bundle keeps with their answers."""
REGISTRY_WAIT_S = 600.0  # for a server that is away when a model is ready to be registered

log = logging.getLogger("ventral.training")


class Registration(Strict):
    """Under which name a finished model is registered, and which alias moves to it (None: none moves)."""

    model: str = Field(pattern=registry.NAME)
    alias: str | None = Field(default=registry.CHAMPION, pattern=registry.ALIAS)


class Config(Strict):
    """What one run does.

    Attributes:
        shards: the dataset; a relative path lies in the job's `storage`.
        evaluate: splits that the finished model is measured on.
        views: of each image, whose scores are averaged there; after each epoch it is the centre crop alone.
        register_as: None leaves the registry alone.
        resume: go on from the newest checkpoint of a run of this name; what was finished is not done again.
    """

    shards: Path
    recipe: Recipe
    cluster: launch.Cluster = launch.Cluster()
    checkpoints: checkpoint.Config = checkpoint.Config()
    evaluate: tuple[Split, ...] = Field(default=("val",), min_length=1)
    views: Views = "centre"
    tracking: runs.Config
    register_as: Registration | None = None
    resume: bool = False

    @model_validator(mode="after")
    def _views_are_a_classifiers(self) -> Self:
        if self.views != "centre" and self.recipe.model.task != "classification":
            raise ValueError(f"views: a detector is shown whole pictures only, got '{self.views}'; leave it out")
        return self

    def num_cpus(self) -> int:
        """Logical CPUs that the workers and their decoding tasks take together."""
        reading = self.recipe.loading.num_tasks if self.recipe.loading.reader == "ray" else 0
        return math.ceil(self.cluster.num_workers * (self.cluster.cpus_per_worker + reading))


@dataclass(frozen=True)
class Outcome:
    """What a run left behind, and how long its stages took."""

    bundle: Bundle
    reports: Mapping[Split, Report]
    run_url: str
    version: registry.Version | None
    seconds: dict[str, float] = field(default_factory=dict)


def source_of(config: Config, storage: Path) -> shards.Shards:
    """The dataset of a run, with a class, or boxes, for every image of the splits that the run uses.

    Also with their proposals, where the recipe names some.

    Raises:
        DataError: there is none, it is another kind of dataset, or it has no proposals of the name that the recipe has.
        ConfigError: the recipe names none, and its model needs them.
    """
    source = shards.load(storage / config.shards)
    splits: tuple[Split, ...] = ("train", "val", *config.evaluate)
    evaluation.check_truth(source, config.recipe.model.task, splits)
    check_proposals(config.recipe.model, config.recipe.loading.proposals, source.address)
    if config.recipe.loading.proposals is not None:
        loading.check_proposals(proposals.read(source, config.recipe.loading.proposals), splits)
    return source


def finished(name: str, config: Config, folder: Path) -> Outcome | None:
    """What a run has left behind that is resumed with nothing left to do; else None.

    Raises:
        ConfigError: it was finished with another recipe.
    """
    record = Record.of(folder) if config.resume else None
    if record is None or not record.is_finished:
        return None
    if not record.began_with(config.recipe):
        raise ConfigError(f"{folder}: the run '{name}' was finished with another recipe; choose another name")
    files = {split: folder / f"report-{split}.json" for split in config.evaluate}
    if not all(file.exists() for file in files.values()):
        return None
    schema = ClassificationReport if config.recipe.model.task == "classification" else DetectionReport
    reports = {split: schema.model_validate_json(file.read_bytes(), strict=True) for split, file in files.items()}
    if any(report.provenance.get("views", "centre") != config.views for report in reports.values()):
        return None
    return Outcome(bundle.load(folder / "bundle"), reports, record.run_url, record.version)


def conduct(
    name: str,
    config: Config,
    *,
    storage: Path,
    uri: str,
    roots: Sequence[Path] = (),
    tags: Mapping[str, str] | None = None,
) -> Outcome:
    """Do the whole run on an initialised Ray, against the MLflow server at `uri`.

    Args:
        roots: folders that initial weights may lie in, beside `storage`.
        tags: further ones of the MLflow run.

    Raises:
        VentralError: whatever went wrong; the MLflow run has ended as FAILED or KILLED.
    """
    folder = storage / "runs" / name
    launch.check_folder(folder, config.checkpoints, resume=config.resume)
    if done := finished(name, config, folder):
        return done
    source, recipe = source_of(config, storage), config.recipe.model_dump(mode="json")
    _check_start(name, recipe, folder)
    used: tuple[Split, ...] = ("train", "val")
    for split in used:
        if split not in config.evaluate:  # those are checked when they are evaluated
            shards.check(source, split)
    tracking = config.tracking.model_copy(update={"run_name": config.tracking.run_name or name})
    tags = {"dataset_digest": source.manifest.digest, "seed": str(config.recipe.seed), **(tags or {})}
    seconds: dict[str, float] = {}
    known = (runs.known(folder) or _recorded(folder)) if config.resume else None
    with runs.start(uri, tracking, params=flatten(config), tags=tags, folder=folder, resume_id=known) as run:
        log.info("MLflow run %s", run.url)
        Record(run_id=run.id, run_url=run.url, recipe=recipe).write(folder)
        run.log_text("config.yaml", dump(config))
        for split in ("train", *config.evaluate):
            run.log_dataset(source.manifest.dataset, source.manifest.digest, source.address, split)
        prepare(config.recipe, source, folder, (*roots, storage), uri)
        with _timed(seconds, "train"):
            made = launch.train(
                folder,
                source,
                config.recipe,
                config.cluster,
                checkpoints=config.checkpoints,
                provenance=_facts(source, run),
                is_tracked=True,
                system_metrics=tracking.system_metrics,
            )
        if "solve" in config.recipe.model.stages:
            with _timed(seconds, "solve"):
                made = _solve(made, source, config, folder, run)
            run.log_metrics({"solve_s": seconds["solve"]}, step=config.recipe.epochs)
        with _timed(seconds, "evaluate"):
            reports = {split: _evaluate(made, source, split, config, folder, run) for split in config.evaluate}
        golden.keep(made, [image for _, image in islice(lookup.in_order(source, "val"), NUM_GOLDEN)])
        with _timed(seconds, "register"):
            version = register(run, made, config.register_as)
        Record(run_id=run.id, run_url=run.url, recipe=recipe, version=version, is_finished=True).write(folder)
    return Outcome(made, reports, run.url, version, seconds)


def _check_start(name: str, recipe: dict[str, Any], folder: Path) -> None:
    """The weights that a run began with cannot be changed afterwards."""
    if (record := Record.of(folder)) is not None and record.recipe.get("start") != recipe["start"]:
        raise ConfigError(
            f"{folder}: the run '{name}' was begun with recipe.start {record.recipe.get('start')}, now it is "
            f"{recipe['start']}; resume it with that, or choose another name"
        )


def _recorded(folder: Path) -> str | None:
    """The MLflow run of a folder that has lost its journal."""
    record = Record.of(folder)
    return None if record is None else record.run_id


def prepare(recipe: Recipe, source: shards.Shards, folder: Path, roots: Sequence[Path], uri: str) -> None:
    """Put the weights that training starts from where every worker finds them; a resumed run has them.

    Args:
        folder: of the run; there they are called `start.INITIAL`.
        roots: folders that they may lie in; below the last one, registered models are kept.
        uri: of the MLflow server, for those.

    Raises:
        VentralError: there are none, or they do not fit.
    """
    if recipe.start is None or (folder / start.INITIAL).exists():
        return

    def registered(reference: str) -> Bundle:
        return registry.fetch(uri, registry.resolve(uri, reference), roots[-1] / "bundles")

    weights = start.find(recipe.start, roots, registered)
    model, classes = launch.fitted(recipe.model, source), source.manifest.classes
    start.prepare(folder / start.INITIAL, model, weights, recipe.start, recipe.seed, classes)


def _solve(made: Bundle, source: shards.Shards, config: Config, folder: Path, run: runs.Run) -> Bundle:
    finished, told = solve.solve(
        folder,
        made,
        source,
        config.recipe.solve,
        proposals=config.recipe.loading.proposals,
        num_tasks=config.cluster.num_workers if config.cluster.gpu else config.num_cpus(),
        gpu=config.cluster.gpu,
    )
    run.log_text("solve.json", told.model_dump_json(indent=2))
    return finished


def _evaluate(made: Bundle, source: shards.Shards, split: Split, config: Config, folder: Path, run: runs.Run) -> Report:
    given = config.recipe.loading.proposals
    report = evaluation.evaluate(made, source, split, views=config.views, proposals=given)
    report.record(run, folder / f"report-{split}.json")
    log.info("%s: %s", split, "  ".join(f"{name} {value:.4f}" for name, value in report.metrics.items()))
    return report


def register(run: runs.Run, made: Bundle, registration: Registration | None) -> registry.Version | None:
    """Register the bundle that a run has made, if it is not yet, and move the alias; None: neither.

    It may be already where the job was killed before it noted that.

    Raises:
        TrackingError: the server does not answer for so long, or refuses.
    """
    if registration is None:
        return None
    connection.wait(run.uri, REGISTRY_WAIT_S)  # unlike figures, a model goes straight to the server
    name = registration.model
    version = registry.published(run.uri, made, name, f"run_id = '{run.id}'") or registry.publish(run, made, name)
    if registration.alias is None:
        return version
    reason = f"registered by run {run.id}, {registry.NO_GATE}"
    return registry.promote(run.uri, version.name, version.version, registration.alias, reason)


def _facts(source: shards.Shards, run: runs.Run) -> dict[str, str]:
    """What the bundle will say of its origin."""
    return {
        "commit": provenance.commit(),
        "run_id": run.id,
        "dataset": source.manifest.dataset,
        "dataset_digest": source.manifest.digest,
    }


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - started
