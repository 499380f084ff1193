"""The detectors of a comparison: trained here, or taken, and each evaluated in a child run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from jobs._run import Job, bundle_of
from jobs.train import Train
from pipeline import config
from pipeline.benchmark.detector_table import Row
from pipeline.benchmark.detectors import Speed
from pipeline.config import Strict
from pipeline.data import shards
from pipeline.errors import ConfigError
from pipeline.evaluation.run import evaluate_detector
from pipeline.inference.bundle import Bundle
from pipeline.tracking import registry, runs
from pipeline.training import experiment, launch
from pipeline.types import Split

PARENT_TAG = "mlflow.parentRunId"
EXPERIMENT = "compare-detectors"


class Entry(Strict):
    """One detector of the table.

    Attributes:
        name: in the table.
        model: one to take: `name@alias` or `name/3` in the registry, or the folder of a bundle.
        train: or the YAML of a training; what was finished is not done again, what was begun goes on.
        proposals: that it judges, as `jobs.propose` has called them; for Fast R-CNN.
    """

    name: str = Field(pattern=registry.NAME)
    model: str | None = None
    train: Path | None = None
    proposals: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.train is None):
            raise ValueError("expected exactly one of model and train")
        return self


@dataclass(frozen=True)
class Compared:
    """A detector with its accuracy; `train_s` where it was trained here."""

    bundle: Bundle
    metrics: dict[str, float]
    train_s: float | None

    def row(self, name: str, speed: Speed) -> Row:
        """Its line in the table."""
        model = self.bundle.card.model.name
        return Row(name=name, model=model, metrics=self.metrics, speed=speed, train_s=self.train_s)


def entries(
    job: Job, asked: Sequence[Entry], source: shards.Shards, split: Split, parent: runs.Run
) -> dict[str, Compared]:
    """Train or take every detector and evaluate it, on an initialised Ray, each in a child run of the parent.

    Raises:
        VentralError: whatever went wrong; what is finished is kept.
    """
    names = [entry.name for entry in asked]
    if len(set(names)) < len(names):
        raise ConfigError(f"models: expected each name once, got {', '.join(names)}")
    return {entry.name: _entry(job, entry, source, split, parent) for entry in asked}


def _entry(job: Job, entry: Entry, source: shards.Shards, split: Split, parent: runs.Run) -> Compared:
    print(f"{entry.name}: {entry.train or entry.model}", flush=True)
    made, train_s = _trained(job, entry, parent) if entry.train else (_taken(job, entry, parent.uri), None)
    if made.card.task != "detection":
        raise ConfigError(f"models: '{entry.name}' is for {made.card.task}, not a detector; leave it out")
    tracking = runs.Config(experiment=EXPERIMENT, run_name=f"evaluate-{entry.name}")
    with runs.start(parent.uri, tracking, params={}, tags={PARENT_TAG: parent.id}) as child:
        report = evaluate_detector(made, source, split, proposals=entry.proposals)
        report.record(child, job.store / "compare_detectors" / entry.name / f"report-{split}.json")
    return Compared(made, report.metrics, train_s)


def _taken(job: Job, entry: Entry, uri: str) -> Bundle:
    assert entry.model is not None
    return bundle_of(entry.model, uri, job.store)


def _trained(job: Job, entry: Entry, parent: runs.Run) -> tuple[Bundle, float | None]:
    assert entry.train is not None
    asked = config.load(Train, entry.train)
    folder = job.store / "runs" / asked.name
    begun = launch.where_begun(folder, asked.training.checkpoints) is not None
    training = asked.training.model_copy(update={"resume": begun})
    done = experiment.finished(asked.name, training, folder)
    outcome = done or experiment.conduct(
        asked.name, training, storage=job.store, uri=parent.uri, roots=(job.data_folder,), tags={PARENT_TAG: parent.id}
    )
    return outcome.bundle, outcome.seconds.get("train")
